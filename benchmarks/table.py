"""The paper's table on your data: baselines and ablations, evaluated on both tracks.

    python -m benchmarks.table --manifest ../shared/data/lesions/manifest.jsonl --budget-minutes 120

Trains and evaluates what is missing until the minutes are over, and goes on where it stopped when it is called again;
then draws what there is: OUT/table.md, OUT/table.png and one JSON a cell, OUT/CELL-SEED.json.

As the paper's rows all start from the same Qwen2.5-VL and the same SAM, all rows with language start from one stage 0
and one reasoner, releases both, and are then trained on the same records for the same steps. That reasoner has learnt
to reason, to write boxes and, by our relevance loss, where in the picture what is asked for is; it has had no gradient
of a mask that was drawn, so that the ways to draw one are all new. What is not the same for all: text to box goes on
with what the reasoner has been learning all along; rows without reasoning have to leave off what it has learnt;
CORE-Seg reads the prompt twice (`notice`, ours), which that reasoner had not learnt, and the baselines once, as the
rows of one look do; the U-Net has the encoder of stage 0, which it alone trains, in as many steps as SFT; only rows
with a stage 2 see data/fresh; groups of 4 and 16 are of as many steps as those of 8, so that half and twice as many
answers are sampled.
It needs data/reason, data/track and, for stage 2, data/fresh/hard.jsonl, which the README makes.
"""

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import pandas as pd
import yaml
from jsonargparse import auto_cli

from apps.demo import core_seg, say
from lab.errors import LabError
from lab.evaluation.compare import compare, read_cases
from lab.evaluation.metrics import bootstrap_interval
from lab.model.release import read_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs" / "tiny"
MODEL = "--model.init_args."
OURS = "grpo"
"""The cell that the others are compared with."""
FIGURES = ("mDice", "mIoU", "failure_rate", "NSD", "HD95", "box_f1", "lesion_f1", "faithfulness", "influence")


@dataclass(frozen=True)
class Cell:
    """A row of the table: what is trained, and from what."""

    title: str
    configs: tuple[str, ...]
    share: float
    """Of the optimiser steps in its first configuration."""
    rival: bool = False
    """A baseline with language: one of those that the paper's margin is over."""
    after: str = ""
    """The cell that it starts from; none is stage 0, and the language model."""
    flags: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of all that its configurations say, of its flags, and of the cell before it: a cell that was trained as they
        were once is another."""
        read = [yaml.safe_load((CONFIGS / config).read_text()) for config in self.configs]
        before = CELLS[self.after].digest if self.after else ""
        told = json.dumps([self.share, self.flags, before, read], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Shared:
    """What all cells have in common; cells that differ in it are in no table together."""

    manifest: Path
    segmenter: Path
    language: Path
    quick: float
    limit: int

    @property
    def runs(self) -> str:
        """Folder below runs/ of what is trained so."""
        return run_folder("table", self.quick, self.manifest, self.segmenter, self.language)

    def settings(self) -> dict:
        """As JSON, the manifest by its folder and name."""
        return asdict(self) | {
            name: "/".join(getattr(self, name).parts[-2:]) for name in ("manifest", "segmenter", "language")
        }


def run_folder(name: str, quick: float, *places: Path) -> str:
    """A folder for runs of these settings, so that none goes on, or is evaluated, as one of others."""
    settings = json.dumps([quick, *(str(place.resolve()) for place in places)])
    return f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def sft(title: str, *configs: str, rival: bool = False) -> Cell:
    return Cell(title, ("sft.yaml", *configs), 0.1, rival)


def grpo(title: str, *flags: str, after: str = "sft", rival: bool = False) -> Cell:
    return Cell(title, ("grpo.yaml",), 0.15, rival, after, flags)


CELLS = {
    "sft": sft("CORE-Seg, SFT"),
    "grpo": grpo("CORE-Seg, SFT + GRPO"),
    "unet": Cell("U-Net, no language", ("unet.yaml",), 0.4),
    "text-box": sft("text to box (Seg-Zero), SFT", "ablations/text_box.yaml", rival=True),
    "text-box-grpo": grpo(
        "text to box (Seg-Zero), SFT + RL",
        f"{MODEL}seg_weight=0",
        f"{MODEL}rewards.segment=0",
        f"{MODEL}rewards.detect_kind=binary",
        after="text-box",
        rival=True,
    ),
    "seg-token": sft("<seg> token (LISA), no reasoning", "ablations/seg_token.yaml", rival=True),
    "queries": sft("learnable queries (LENS), SFT", "ablations/queries.yaml", rival=True),
    "queries-grpo": grpo(
        "learnable queries (LENS), SFT + RL",
        f"{MODEL}rewards.segment_kind=iou2",
        after="queries",
        rival=True,
    ),
    "one-look": sft("one look, SFT", "ablations/one_look.yaml"),
    "one-look-grpo": grpo("one look, SFT + GRPO", after="one-look"),
    "linear": sft("linear map for the adapter", "ablations/linear_adapter.yaml"),
    "mean": sft("mean state for that of <seg>", "ablations/mean_state.yaml"),
    "no-reasoning": sft("no reasoning", "ablations/no_reasoning.yaml"),
    "grpo-no-dicece": grpo("GRPO without DiceCE", f"{MODEL}seg_weight=0"),
    "grpo-residual": grpo("GRPO, residual reward", f"{MODEL}rewards.segment_kind=residual"),
    "grpo-dice": grpo("GRPO, Dice reward", f"{MODEL}rewards.segment_kind=dice"),
    "grpo-4": grpo("GRPO, groups of 4", f"{MODEL}group_size=4"),
    "grpo-16": grpo("GRPO, groups of 16", f"{MODEL}group_size=16"),
}
TRACKS = {"real": "", "reason": "data/track/manifest.jsonl"}


def checkpoint_of(run: str) -> Path:
    return Path("runs") / run / "checkpoints" / "last.ckpt"


def finished(cell: Cell, run: str, quick: float) -> Path | None:
    """The checkpoint of a cell that has been trained to its end."""
    last = checkpoint_of(run)
    return last if last.is_file() and read_checkpoint(last)["global_step"] >= steps_of(cell, quick) else None


def steps_of(cell: Cell, quick: float) -> int:
    """Optimiser steps."""
    config = yaml.safe_load((CONFIGS / cell.configs[0]).read_text())
    return max(1, round(quick * cell.share * config["trainer"]["max_steps"]))


def train(
    cell: Cell, run: str, manifest: Path, starts: dict[str, Path], seed: int, quick: float, minutes: float
) -> Path | None:
    """Train a cell, or go on with it; its checkpoint once it is done, None when the minutes were over before.

    Args:
        cell: What to train.
        run: Folder below runs/.
        manifest: In place of the real lesions of the configuration.
        starts: Arguments of the module, with the releases or checkpoints that they take.
        seed: Of weights and data.
        quick: Share of the cell's steps.
        minutes: At most.
    """
    if (done := finished(cell, run, quick)) or minutes <= 0:
        return done
    config = yaml.safe_load((CONFIGS / cell.configs[0]).read_text())
    data, arguments, steps = config["data"]["init_args"], config["model"]["init_args"], steps_of(cell, quick)
    # steps that a configuration counts shrink with it; an ablation's own come after
    flags = [f"--config={CONFIGS / cell.configs[0]}"]
    counted = [key for key in ("decoder_after", "own_text_after") if key in arguments]
    flags += [f"{MODEL}{key}={round(quick * cell.share * arguments[key])}" for key in counted]
    flags += [f"--config={CONFIGS / config}" for config in cell.configs[1:]]
    flags += [f"--name={run}", f"--seed_everything={seed}", f"--data.init_args.seed={seed}"]
    flags += [f"--trainer.max_steps={steps}", f"{MODEL}total_steps={steps}", *cell.flags]
    parts = [p | {"manifest": str(manifest)} if p["manifest"] == data["val"] else p for p in data["train"]]
    flags += [f"--data.init_args.train={parts}", f"--data.init_args.val={manifest}"]
    flags += [f"{MODEL}{argument}={start}" for argument, start in starts.items()]
    if "seed" in arguments:
        flags.append(f"{MODEL}seed={seed}")
    spent = 0.0
    if checkpoint_of(run).is_file():
        flags.append("--ckpt_path=last")
        spent = read_checkpoint(checkpoint_of(run))["callbacks"]["Timer"]["time_elapsed"]["train"]  # it counts on
    days, seconds = divmod(round(60 * minutes + spent), 86400)
    flags.append(f"--trainer.max_time={days:02}:{time.strftime('%H:%M:%S', time.gmtime(seconds))}")
    say(f"{run}: {cell.title}, {steps} steps")
    core_seg("fit", *flags)
    return finished(cell, run, quick)


def trained(name: str, seed: int, shared: Shared, end: float) -> Path | None:
    """A cell's checkpoint, after that of the cell that it starts from; None when the minutes were over before.

    Args:
        name: Of the cell.
        seed: Of it.
        shared: What all cells have in common.
        end: By `time.monotonic`.
    """
    cell = CELLS[name]
    if cell.after:
        starts = {"start": trained(cell.after, seed, shared, end)}
    elif cell.configs[0] == "unet.yaml":
        starts = {"encoder": shared.segmenter}
    else:
        starts = {"segmenter_checkpoint": shared.segmenter, "language_checkpoint": shared.language}
    if None in starts.values():
        return None
    minutes = (end - time.monotonic()) / 60
    run = f"{shared.runs}/{name}-{seed}-{cell.digest}"
    return train(cell, run, shared.manifest, starts, seed, shared.quick, minutes)


def evaluated(checkpoint: Path, manifest: Path, limit: int, folder: Path) -> dict:
    """An evaluation's summary, and the Dice and the group of every image."""
    if not (folder / "evaluation.json").is_file():
        core_seg("evaluate", str(checkpoint), f"--manifest={manifest}", f"--limit={limit}", f"--out={folder}")
    cases = read_cases(folder)
    return json.loads((folder / "evaluation.json").read_text()) | {
        "dice": dict(zip(cases.id, cases.dice.round(4))),
        "group": dict(zip(cases.id, cases.group)),
    }


def rows(cells: dict[tuple[str, int], dict]) -> list[dict]:
    """One row a cell and track: its figures, seeds averaged, and the gain of `OURS` over it, image by image."""
    found = []
    for track in TRACKS:
        of_track = {
            name: [
                one["tracks"][track] for (other, _), one in cells.items() if other == name and track in one["tracks"]
            ]
            for name in CELLS
        }
        for name, seeds in of_track.items():
            if not seeds:
                continue
            dice = mean_dice(seeds)
            row = {"track": track, "cell": name, "title": CELLS[name].title, "seeds": len(seeds), "n": len(dice)}
            row |= average([one["overall"] for one in seeds]) | {
                "mDice_ci": bootstrap_interval(dice.dice.to_numpy(), dice.group)
            }
            row["by"] = {
                key: {
                    group: average([one["by"][key][group] for one in seeds])["mDice"] for group in seeds[0]["by"][key]
                }
                for key in ("modality", "anatomy")
            }
            if of_track[OURS] and name != OURS:
                against = compare(dice, [mean_dice(of_track[OURS])])["mean"]
                row |= {key: against[key] for key in ("gain", "gain_ci", "p")}
            found.append(row)
    return found


def mean_dice(seeds: list[dict]) -> pd.DataFrame:
    """One row an image: its group, Dice and failure as means over the seeds."""
    dice = pd.DataFrame([one["dice"] for one in seeds]).T
    means = {"dice": dice.mean(axis=1), "failed": (dice == 0).mean(axis=1)}
    return pd.DataFrame({"id": dice.index, "group": dice.index.map(seeds[0]["group"]), **means})


def average(figures: list[dict]) -> dict:
    """Each figure's mean over the seeds that have it; None where none has."""
    values = {name: [one[name] for one in figures if one.get(name) is not None] for name in FIGURES}
    return {name: round(sum(of) / len(of), 4) if of else None for name, of in values.items()}


def margin(of_track: list[dict]) -> str:
    """The paper's claim on a track: how far `OURS` is ahead of the best rival."""
    ours = [row for row in of_track if row["cell"] == OURS]
    rivals = [row for row in of_track if CELLS[row["cell"]].rival]
    if not (ours and rivals):
        return ""
    best, all_rivals = max(rivals, key=lambda row: row["mDice"]), sum(cell.rival for cell in CELLS.values())
    return (
        f"\n{CELLS[OURS].title} {ours[0]['mDice']:.3f}; best of {len(rivals)} of {all_rivals} baselines with language: "
        f"{best['title']}, {best['mDice']:.3f}; difference {with_interval(best)}.\n"
    )


def with_interval(row: dict) -> str:
    return f"{row['gain']:+.3f} ({row['gain_ci'][0]:+.3f} to {row['gain_ci'][1]:+.3f}), p {row['p']:.2g}"


def markdown(table: list[dict]) -> str:
    """The rows as tables of each track: overall, by modality and by anatomy."""
    lines = []
    for track in TRACKS:
        of_track = [row for row in table if row["track"] == track]
        names = [name for name in FIGURES if any(row[name] is not None for row in of_track)]
        lines += [
            f"\n## {track}\n",
            f"| seeds, images | {' | '.join(names)} | 95 % of mDice | {CELLS[OURS].title}, ahead by |",
        ]
        lines.append("|---" * (len(names) + 3) + "|")
        for row in of_track:
            cells = ["" if row[name] is None else f"{row[name]:.3f}" for name in names]
            cells += [
                f"{row['mDice_ci'][0]:.3f} to {row['mDice_ci'][1]:.3f}",
                with_interval(row) if "gain" in row else "",
            ]
            lines.append(f"| {row['title']} ({row['seeds']}, {row['n']}) | {' | '.join(cells)} |")
        lines.append(margin(of_track))
        for key in ("modality", "anatomy"):
            groups = sorted({group for row in of_track for group in row["by"][key]})
            lines += [f"\n| mDice by {key} | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
            for row in of_track:
                cells = [f"{row['by'][key][group]:.3f}" if group in row["by"][key] else "" for group in groups]
                lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, table: list[dict]) -> None:
    """The mDice of every row as bars with intervals, a panel a track."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(TRACKS), figsize=(7 * len(TRACKS), 6), layout="constrained", squeeze=False)
    for axis, track in zip(axes[0], TRACKS):
        of_track = [row for row in table if row["track"] == track][::-1]
        low, high = ([abs(row["mDice_ci"][side] - row["mDice"]) for row in of_track] for side in (0, 1))
        colours = ["#2563eb" if row["cell"] in ("sft", OURS) else "#94a3b8" for row in of_track]
        titles, values = [row["title"] for row in of_track], [row["mDice"] for row in of_track]
        bars = axis.barh(titles, values, xerr=(low, high), color=colours, ecolor="#334155", capsize=2)
        axis.bar_label(bars, fmt="%.3f", padding=3)
        axis.set(title=track, xlabel="mDice (95 % over images)", xlim=(0, 1.1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(
    manifest: Path,
    budget_minutes: float = 60,
    cells: list[str] | None = None,
    seeds: tuple[int, ...] = (0,),
    quick: float = 1.0,
    limit: int = 0,
    segmenter: Path = Path("releases/core-seg-tiny-segmenter"),
    language: Path = Path("releases/core-seg-tiny-text-box"),
    out: Path = Path("out/table"),
) -> None:
    """Train, evaluate and draw.

    Args:
        manifest: Of the real track: trained on, validated on and tested on by its splits.
        budget_minutes: When training stops; call again to go on.
        cells: Some of the rows, in order; None is all.
        seeds: Of each row.
        quick: Share of the rows' steps, for a quick look.
        limit: Evaluate on this many images of each track; 0 takes all.
        segmenter: Release or checkpoint of stage 0.
        language: Release or checkpoint whose language model the rows start from.
        out: Folder of the results.
    """
    if unknown := sorted(set(cells or ()) - CELLS.keys()):
        raise LabError(f"there is no cell '{unknown[0]}'; choose from {', '.join(CELLS)}")
    end, shared = time.monotonic() + 60 * budget_minutes, Shared(manifest, segmenter, language, quick, limit)
    out.mkdir(parents=True, exist_ok=True)
    for name, seed in ((name, seed) for seed in seeds for name in cells or CELLS):
        if (path := out / f"{name}-{seed}.json").is_file():
            continue  # as committed, or as an earlier call left it
        checkpoint = trained(name, seed, shared, end)
        if checkpoint is None:
            say(f"the minutes are over before {name}, seed {seed}; call again to go on")
            break
        folder = checkpoint.parents[1] / f"evaluation-{limit}"
        tracks = {
            track: evaluated(checkpoint, Path(other or manifest), limit, folder / track)
            for track, other in TRACKS.items()
        }
        told = {
            "cell": name,
            "seed": seed,
            "config": CELLS[name].digest,
            "steps": read_checkpoint(checkpoint)["global_step"],
        }
        path.write_text(json.dumps(told | {"settings": shared.settings(), "tracks": tracks}) + "\n")
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*-*.json"))]
    for one in found:
        if one["settings"] != shared.settings():
            raise LabError(f"'{out}' holds cells of other settings, {one['settings']}; give another --out")
        if one["config"] != CELLS[one["cell"]].digest:
            raise LabError(f"cell {one['cell']} in '{out}' is of another configuration; move {one['cell']}-*.json away")
    written = {(one["cell"], one["seed"]): one for one in found}
    table = rows(written)
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    (out / "table.md").write_text(markdown(table))
    draw(out / "table.png", table)
    print(markdown(table))


def underscored(word: str) -> str:
    """`--budget-minutes=5` as jsonargparse has it."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


if __name__ == "__main__":
    auto_cli(main, as_positional=False, args=[underscored(word) for word in sys.argv[1:]])
