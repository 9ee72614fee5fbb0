"""Do a model's own words help its mask? Each answer is segmented as it stands, and with its `<seg>` blind to it.

    python -m benchmarks.own_words --manifest data/fresh/manifest.jsonl --models '[runs/mine/checkpoints/last.ckpt]'

A blind `<seg>` sees image and query alone, as half of those of stage 1 do. Where it draws better, the reasoning before
it leads it astray.
"""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import run
from lab.data.manifest import read_manifest
from lab.data.sample import evenly
from lab.evaluation.compare import compare
from lab.evaluation.report import machine
from lab.evaluation.run import evaluate
from lab.model.core_seg import CoreSeg, Output
from lab.model.release import load_model


def blind(model: CoreSeg) -> CoreSeg:
    """The model, henceforth with a `<seg>` that no answer reaches."""
    forward: Callable[..., Output] = model.forward
    model.forward = lambda encoded, prompts, completions, **given: forward(
        encoded, prompts, completions, [True] * len(prompts), **given
    )
    return model


def main(manifest: Path, models: list[Path], split: str = "train", limit: int = 300, out: Path | None = None) -> None:
    """Segment and print; with `out` also write the JSON.

    Args:
        manifest: Of records that the models have not seen.
        models: Releases or checkpoints of stage 1 or 2.
        split: Its split.
        limit: Ask this many, evenly spread; 0 asks all.
        out: JSON to write.
    """
    records = evenly([record for record in read_manifest(manifest) if record.split == split], limit)
    told = machine() | {"manifest": manifest.as_posix(), "split": split, "models": {}}
    for path in models:
        model = load_model(path)
        most = model.config.reasoner.max_boxes
        read = evaluate(model.predict, records, most)
        compared = compare(evaluate(blind(model).predict, records, most), [read])
        told["models"][str(path)] = {"blind": compared["base"], "read": compared["mean"]}
        print(path, json.dumps(told["models"][str(path)]))
        if out:
            out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    run(main, as_positional=False)
