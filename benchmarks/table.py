"""The paper's table on your data: baselines and ablations, each trained on the same records, evaluated on both tracks.

    python -m benchmarks.table --manifest ../shared/data/lesions/manifest.jsonl --budget-minutes 120

Trains and evaluates what is missing until the minutes are over, and goes on where it stopped when it is called again;
then draws what there is: OUT/table.md, OUT/table.png and one JSON a cell, OUT/CELL/TRACK/evaluation.json. All rows
start from the same stage 0, a committed release, whose image encoder stays frozen but for the U-Net. It needs
data/reason, data/track and, for stage 2, data/fresh/hard.jsonl, which the README makes.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import pandas as pd
import yaml
from jsonargparse import auto_cli

from apps.demo import core_seg, say
from lab.errors import LabError
from lab.evaluation.compare import compare, read_cases
from lab.model.release import read_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs" / "tiny"
MODEL = "--model.init_args."


@dataclass(frozen=True)
class Cell:
    """A row of the table: what is trained, and from what."""

    title: str
    configs: tuple[str, ...]
    after: str = ""
    """The cell that it starts from."""
    starts: str = ""
    """The argument that takes that cell's checkpoint, or stage 0."""
    flags: tuple[str, ...] = field(default=())


def sft(title: str, *configs: str) -> Cell:
    one_view = f"{MODEL}views=1"  # at a share of the steps it is not worth while to encode more views of an image
    return Cell(title, ("sft.yaml", *configs), starts="segmenter_checkpoint", flags=(one_view,))


def grpo(title: str, *flags: str, after: str = "sft") -> Cell:
    return Cell(title, ("grpo.yaml",), after, "start", flags)


CELLS = {
    "sft": sft("CORE-Seg, SFT"),
    "grpo": grpo("CORE-Seg, SFT + GRPO"),
    "unet": Cell("U-Net, no language", ("unet.yaml",), starts="encoder"),
    "text-box": sft("text to box (Seg-Zero), SFT", "ablations/text_box.yaml"),
    "text-box-grpo": grpo(
        "text to box (Seg-Zero), SFT + RL",
        f"{MODEL}seg_weight=0",
        f"{MODEL}rewards.segment=0",
        f"{MODEL}rewards.detect_kind=binary",
        after="text-box",
    ),
    "seg-token": sft("<seg> token (LISA), no reasoning", "ablations/seg_token.yaml"),
    "queries": sft("learnable queries (LENS), SFT", "ablations/queries.yaml"),
    "queries-grpo": grpo(
        "learnable queries (LENS), SFT + RL",
        f"{MODEL}rewards.segment_kind=iou2",
        after="queries",
    ),
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


def train(name: str, seed: int, share: float, manifest: Path, segmenter: Path, minutes: float) -> Path | None:
    """Train a cell, or go on with it; its checkpoint once it is done, None when the minutes were over before."""
    cell, run = CELLS[name], f"table/{name}-{seed}"
    last = Path("runs") / run / "checkpoints" / "last.ckpt"
    config = yaml.safe_load((CONFIGS / cell.configs[0]).read_text())
    steps, data = round(share * config["trainer"]["max_steps"]), config["data"]["init_args"]
    if last.is_file() and read_checkpoint(last)["global_step"] >= steps:
        return last
    if minutes <= 0:
        return None
    flags = [word for config in cell.configs for word in ("-c", str(CONFIGS / config))]
    flags += [f"--name={run}", f"--seed_everything={seed}", f"--data.init_args.seed={seed}"]
    flags += [f"--trainer.max_steps={steps}", f"{MODEL}total_steps={steps}", *cell.flags]
    for key in ("decoder_after", "own_text_after"):  # steps, too
        if key in config["model"]["init_args"] and "text_box" not in "".join(cell.configs):
            flags.append(f"{MODEL}{key}={round(share * config['model']['init_args'][key])}")
    parts = [p | {"manifest": str(manifest)} if p["manifest"] == data["val"] else p for p in data["train"]]
    flags += [f"--data.init_args.train={parts}", f"--data.init_args.val={manifest}"]
    flags += [f"--trainer.max_time={time.strftime('00:%H:%M:%S', time.gmtime(60 * minutes))}"]
    start = train(cell.after, seed, share, manifest, segmenter, 0) if cell.after else segmenter
    if start is None:
        raise LabError(f"cell '{name}' starts from '{cell.after}', which is not trained; add it to --cells")
    flags.append(f"{MODEL}{cell.starts}={start}")
    if last.is_file():
        flags.append("--ckpt_path=last")
    say(f"{name}, seed {seed}: {cell.title}, {steps} steps")
    core_seg("fit", *flags)
    return last if read_checkpoint(last)["global_step"] >= steps else None


def rows(out: Path, seeds: int) -> list[dict]:
    """One row a cell that has been evaluated on a track: its figures, and CORE-Seg's gain over it, seeds averaged."""
    found = []
    for track in TRACKS:
        ours = [read_cases(path) for seed in range(seeds) if (path := out / f"grpo-{seed}" / track).is_dir()]
        for name, cell in CELLS.items():
            folders = [path for seed in range(seeds) if (path := out / f"{name}-{seed}" / track).is_dir()]
            if not folders:
                continue
            overall = [json.loads((folder / "evaluation.json").read_text())["overall"] for folder in folders]
            row = {"track": track, "cell": name, "title": cell.title, "seeds": len(folders), "n": overall[0]["n"]}
            for figure in ("mDice", "mIoU", "failure_rate", "NSD", "box_f1", "faithfulness", "influence"):
                values = [one[figure] for one in overall if one.get(figure) is not None]
                row[figure] = sum(values) / len(values) if values else None
            if ours and name != "grpo":
                against = compare(mean_of_seeds(folders), ours)["mean"]
                row["gain"], row["gain_ci"] = against["gain"], against["gain_ci"]
            found.append(row)
    return found


def mean_of_seeds(folders: list[Path]) -> pd.DataFrame:
    """One row an image: Dice and failure as means over evaluations of the same images."""
    return pd.concat(map(read_cases, folders)).groupby("id", as_index=False)[["dice", "failed"]].mean()


def markdown(table: list[dict]) -> str:
    """The rows as a table a track."""
    lines = []
    for track in TRACKS:
        lines += [f"\n## {track}\n", "| | mDice | mIoU | failure | NSD | box F1 | faithful | CORE-Seg's gain (95 %) |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for row in (row for row in table if row["track"] == track):
            figures = [row[name] for name in ("mDice", "mIoU", "failure_rate", "NSD", "box_f1", "faithfulness")]
            cells = ["" if value is None else f"{value:.3f}" for value in figures]
            gain = f"{row['gain']:+.3f} ({row['gain_ci'][0]:+.3f} to {row['gain_ci'][1]:+.3f})" if "gain" in row else ""
            lines.append(f"| {row['title']} ({row['seeds']} seeds, n {row['n']}) | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, table: list[dict]) -> None:
    """The mDice of every row as bars, a panel a track."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(TRACKS), figsize=(7 * len(TRACKS), 5), layout="constrained", squeeze=False)
    for axis, track in zip(axes[0], TRACKS):
        of_track = [row for row in table if row["track"] == track][::-1]
        bars = axis.barh([row["title"] for row in of_track], [row["mDice"] for row in of_track], color="#2563eb")
        axis.bar_label(bars, fmt="%.3f", padding=3)
        axis.set(title=track, xlabel="mDice", xlim=(0, 1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(
    manifest: Path,
    budget_minutes: float = 60,
    cells: list[str] | None = None,
    seeds: int = 1,
    share: float = 1.0,
    limit: int = 0,
    segmenter: Path = Path("releases/core-seg-tiny-segmenter"),
    out: Path = Path("out/table"),
) -> None:
    """Train, evaluate and draw.

    Args:
        manifest: Of the real track: trained on, validated on and tested on by its splits.
        budget_minutes: When training stops; call again to go on.
        cells: Some of the rows, in order; None is all.
        seeds: Of each row.
        share: Of the steps in the configurations, for a quick look.
        limit: Evaluate on this many images of each track; 0 takes all.
        segmenter: Release or checkpoint of stage 0.
        out: Folder of the results.
    """
    if unknown := sorted(set(cells or ()) - CELLS.keys()):
        raise LabError(f"there is no cell '{unknown[0]}'; choose from {', '.join(CELLS)}")
    end = time.monotonic() + 60 * budget_minutes
    for seed in range(seeds):
        for name in cells or CELLS:
            folders = {track: out / f"{name}-{seed}" / track for track in TRACKS}
            if all((folder / "evaluation.json").is_file() for folder in folders.values()):
                continue  # as committed, or as an earlier call left it
            checkpoint = train(name, seed, share, manifest, segmenter, (end - time.monotonic()) / 60)
            if checkpoint is None:
                say(f"the minutes are over before {name}, seed {seed}; call again to go on")
                break
            for track, path in TRACKS.items():
                if not ((folder := folders[track]) / "evaluation.json").is_file():
                    flags = [f"--manifest={path or manifest}", f"--limit={limit}", f"--out={folder}"]
                    core_seg("evaluate", str(checkpoint), *flags)
    table = rows(out, seeds)
    out.mkdir(parents=True, exist_ok=True)
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
