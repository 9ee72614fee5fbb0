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
rows of one look do; all rows train the mask decoder from the hundredth step on (`decoder_after`), which helps a new
adapter, but LISA's and LENS's like lack the loss that gives ours a target until then; LENS's like has our weight of
DiceCE in stage 2 (2, LENS: 1); the U-Net has the encoder of stage 0, which it alone trains, in as many steps as SFT;
only rows with a stage 2 see data/fresh; groups of 4 and 16 are of as many steps as those of 8, so that half and twice
as many answers are sampled.
It needs data/reason, data/track and, for stage 2, data/fresh/hard.jsonl, which docs/reproduce.md makes.
"""

import json
import time
from pathlib import Path

import matplotlib
import pandas as pd

from apps.demo import say
from benchmarks import run
from benchmarks.cells import CELLS, Shared, evaluated, trained
from lab.errors import LabError
from lab.evaluation.compare import compare
from lab.evaluation.metrics import bootstrap_interval
from lab.model.release import read_checkpoint

FIGURES = ("mDice", "mIoU", "failure_rate", "NSD", "HD95", "box_f1", "lesion_f1", "faithfulness", "influence")
TRACKS = {"real": "", "reason": "data/track/manifest.jsonl"}


def rows(cells: dict[tuple[str, int], dict], ours: str) -> list[dict]:
    """One row a cell and track: its figures, seeds averaged, and the gain of the cell `ours` over it, image by image,
    of the seeds that both have."""
    found = []
    for track in TRACKS:
        of_track = {
            name: {
                seed: one["tracks"][track]
                for (other, seed), one in cells.items()
                if other == name and track in one["tracks"]
            }
            for name in CELLS
        }
        for name, by_seed in of_track.items():
            if not (seeds := list(by_seed.values())):
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
            if name != ours and (both := sorted(by_seed.keys() & of_track[ours])):
                theirs, own = (mean_dice([of_track[cell][seed] for seed in both]) for cell in (name, ours))
                against = compare(theirs, [own])["mean"]
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


def margin(of_track: list[dict], ours: str) -> str:
    """The paper's claim on a track: how far the cell `ours` is ahead of the best rival."""
    own = [row for row in of_track if row["cell"] == ours]
    rivals = [row for row in of_track if CELLS[row["cell"]].rival and "gain" in row]
    if not (own and rivals):
        return ""
    best, all_rivals = max(rivals, key=lambda row: row["mDice"]), sum(cell.rival for cell in CELLS.values())
    return (
        f"\n{CELLS[ours].title} {own[0]['mDice']:.3f}; best of {len(rivals)} of {all_rivals} baselines with language: "
        f"{best['title']}, {best['mDice']:.3f}; difference {with_interval(best)}.\n"
    )


def with_interval(row: dict) -> str:
    return f"{row['gain']:+.3f} ({row['gain_ci'][0]:+.3f} to {row['gain_ci'][1]:+.3f}), p {row['p']:.2g}"


def markdown(table: list[dict], ours: str) -> str:
    """The rows as tables of each track: overall, by modality and by anatomy."""
    lines = []
    for track in TRACKS:
        of_track = [row for row in table if row["track"] == track]
        names = [name for name in FIGURES if any(row[name] is not None for row in of_track)]
        lines += [
            f"\n## {track}\n",
            f"| seeds, images | {' | '.join(names)} | 95 % of mDice | {CELLS[ours].title}, ahead by |",
        ]
        lines.append("|---" * (len(names) + 3) + "|")
        for row in of_track:
            cells = ["" if row[name] is None else f"{row[name]:.3f}" for name in names]
            cells += [
                f"{row['mDice_ci'][0]:.3f} to {row['mDice_ci'][1]:.3f}",
                with_interval(row) if "gain" in row else "",
            ]
            lines.append(f"| {row['title']} ({row['seeds']}, {row['n']}) | {' | '.join(cells)} |")
        lines.append(margin(of_track, ours))
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
        colours = ["#2563eb" if row["cell"] in ("sft", "grpo") else "#94a3b8" for row in of_track]
        titles, values = [row["title"] for row in of_track], [row["mDice"] for row in of_track]
        bars = axis.barh(titles, values, xerr=(low, high), color=colours, ecolor="#334155", capsize=2)
        axis.bar_label(bars, fmt="%.3f", padding=3)
        axis.set(title=track, xlabel="mDice (95 % over groups of images)", xlim=(0, 1.1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def kept(out: Path, shared: Shared) -> list[dict]:
    """What earlier calls left in a folder.

    Raises:
        LabError: It was trained otherwise.
    """
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*-*.json"))]
    for one in found:
        if one["settings"] != shared.settings():
            raise LabError(f"'{out}' holds cells of other settings, {one['settings']}; give another --out")
        if one["config"] != CELLS[one["cell"]].digest:
            raise LabError(f"cell {one['cell']} in '{out}' is of another configuration; move {one['cell']}-*.json away")
    return found


def main(
    manifest: Path,
    budget_minutes: float = 60,
    cells: list[str] | None = None,
    seeds: tuple[int, ...] = (0,),
    ours: str = "grpo",
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
        ours: The row that the others are compared with.
        quick: Share of the rows' steps, for a quick look.
        limit: Evaluate on this many images of each track; 0 takes all.
        segmenter: Release or checkpoint of stage 0.
        language: Release or checkpoint whose language model the rows start from.
        out: Folder of the results.
    """
    if unknown := sorted({ours, *(cells or ())} - CELLS.keys()):
        raise LabError(f"there is no cell '{unknown[0]}'; choose from {', '.join(CELLS)}")
    end, shared = time.monotonic() + 60 * budget_minutes, Shared(manifest, segmenter, language, quick, limit)
    kept(out, shared)  # what does not go together is refused before anything is trained
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
    written = {(one["cell"], one["seed"]): one for one in kept(out, shared)}
    table = rows(written, ours)
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    (out / "table.md").write_text(markdown(table, ours))
    draw(out / "table.png", table)
    print(markdown(table, ours))


if __name__ == "__main__":
    run(main, as_positional=False)
