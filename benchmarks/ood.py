"""Out of distribution: a source is left out of everything that is learnt from, and tested on.

    core-seg data leave-out LESIONS/manifest.jsonl busi
    python -m benchmarks.ood LESIONS/without-busi.jsonl --budget-minutes 45

Stage 0, CORE-Seg (SFT) and the U-Net are trained from ImageNet's weights on the other sources alone, at a share of the
steps of the releases; what a release makes of the same images tells what having seen the source is worth. It goes on
where it stopped when it is called again. One JSON a manifest: OUT/NAME.json.
"""

import json
import time
from pathlib import Path

from jsonargparse import auto_cli

from apps.demo import say
from benchmarks.table import Cell, evaluated, mean_dice, train
from lab.evaluation.compare import compare

STAGE_0 = Cell("stage 0", ("segmenter.yaml",), 0.4)
CELLS = {"sft": Cell("CORE-Seg, SFT", ("sft.yaml",), 0.2), "unet": Cell("U-Net, no language", ("unet.yaml",), 0.4)}
ARGUMENT = {"sft": "segmenter_checkpoint", "unet": "encoder"}


def main(
    *manifests: Path,
    seen: Path = Path("releases/core-seg-tiny-sft"),
    budget_minutes: float = 45,
    quick: float = 1.0,
    limit: int = 0,
    out: Path = Path("out/ood"),
) -> None:
    """Train, evaluate and compare.

    Args:
        manifests: Of core-seg data leave-out.
        seen: A release that was trained on all sources.
        budget_minutes: When training stops; call again to go on.
        quick: Share of the steps, for a quick look.
        limit: Evaluate on this many images; 0 takes all.
        out: Folder of the results.
    """
    end = time.monotonic() + 60 * budget_minutes
    out.mkdir(parents=True, exist_ok=True)
    for manifest in manifests:
        name = manifest.stem
        if (path := out / f"{name}.json").is_file():
            continue
        runs, found = f"ood/{name}", {}
        start = train(STAGE_0, f"{runs}-stage0", manifest, {}, 0, quick, (end - time.monotonic()) / 60)
        for row, cell in CELLS.items() if start else ():
            minutes = (end - time.monotonic()) / 60
            checkpoint = train(cell, f"{runs}-{row}", manifest, {ARGUMENT[row]: start}, 0, quick, minutes)
            if checkpoint:
                found[row] = evaluated(checkpoint, manifest, limit, checkpoint.parents[1] / "evaluation")
        if len(found) < len(CELLS):
            say(f"the minutes are over before {name} is done; call again to go on")
            break
        found["seen"] = evaluated(seen, manifest, limit, Path("runs") / f"{runs}-seen")
        dice = {row: mean_dice([one]) for row, one in found.items()}
        told = {row: one["overall"] for row, one in found.items()}
        told |= {f"sft over {row}": compare(dice[row], [dice["sft"]])["mean"] for row in ("unet", "seen")}
        path.write_text(json.dumps({"machine": found["sft"]["machine"], "date": found["sft"]["date"]} | told, indent=1))
        print(name, json.dumps(told))


if __name__ == "__main__":
    auto_cli(main)
