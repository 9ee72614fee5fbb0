"""Out of distribution: a source is left out of everything that is learnt from, and tested on.

    core-seg data leave-out LESIONS/manifest.jsonl busi
    python -m benchmarks.ood --manifest LESIONS/without-busi.jsonl --budget-minutes 45

Stage 0, CORE-Seg (SFT) and the U-Net are trained from ImageNet's weights on the other sources and on synthetic lesions
(of breast ultrasound, too) alone, at a share of the steps of the releases, and tested on all images of the source,
and on `val` of the others, which tells what is too little training from what is a strange source. It goes on where it
stopped when it is called again. One JSON a manifest: OUT/NAME.json.
"""

import json
import time
from pathlib import Path

from apps.demo import say
from benchmarks import run
from benchmarks.cells import Cell, evaluated, run_folder, train
from benchmarks.table import mean_dice
from lab.evaluation.compare import compare

STAGE_0 = Cell("stage 0", ("segmenter.yaml",), 0.4)
CELLS = {"sft": Cell("CORE-Seg, SFT", ("sft.yaml",), 0.2), "unet": Cell("U-Net, no language", ("unet.yaml",), 0.4)}
ARGUMENT = {"sft": "segmenter_checkpoint", "unet": "encoder"}


def main(
    manifest: Path, budget_minutes: float = 45, quick: float = 1.0, limit: int = 0, out: Path = Path("out/ood")
) -> None:
    """Train, evaluate and compare.

    Args:
        manifest: Of core-seg data leave-out.
        budget_minutes: When training stops; call again to go on.
        quick: Share of the steps, for a quick look.
        limit: Evaluate on this many images; 0 takes all.
        out: Folder of the results.
    """
    end, name, found = time.monotonic() + 60 * budget_minutes, manifest.stem, {}
    runs = run_folder("ood", quick, manifest)

    def minutes() -> float:
        return (end - time.monotonic()) / 60

    start = train(STAGE_0, f"{runs}/{name}-stage0", manifest, {}, 0, quick, minutes())
    for row, cell in CELLS.items() if start else ():
        starts = {ARGUMENT[row]: start}
        if checkpoint := train(cell, f"{runs}/{name}-{row}", manifest, starts, 0, quick, minutes()):
            folder = checkpoint.parents[1] / f"evaluation-{limit}"
            left_out = evaluated(checkpoint, manifest, limit, folder)
            others = evaluated(checkpoint, manifest, limit, folder / "val", "val")
            found[row] = {"left out": left_out, "val of the others": others}
    if len(found) < len(CELLS):
        say(f"the minutes are over before {name} is done; call again to go on")
        return
    dice = {row: mean_dice([images["left out"]]) for row, images in found.items()}
    told = {key: found["sft"]["left out"][key] for key in ("manifest", "machine", "date")}
    told |= {row: {name: one["overall"] for name, one in images.items()} for row, images in found.items()}
    told["sft over unet"] = compare(dice["unet"], [dice["sft"]])["mean"]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    run(main, as_positional=False)
