"""Stage 1 with the feature cache against without, and where the time of a step goes.

    python -m benchmarks.sft_cache ../shared/data/lesions/manifest.jsonl --out docs/results/sft_cache.json

Both run the same batches of the same model, one after the other in one process; ratios count, not seconds.
"""

import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import run
from benchmarks.clock import Clock
from lab.data.manifest import read_manifest
from lab.evaluation.report import machine
from lab.model.core_seg import CoreSegConfig
from modules.sft import Sft


def measure(cache: str | None, manifest: Path, steps: int, batch_size: int) -> dict:
    """Train `steps` teacher-forced steps twice over the same batches and time the second round.

    Returns:
        Samples a second, and the share of each part of a step.
    """
    torch.manual_seed(0)
    sft = Sft(CoreSegConfig(), cache=cache, own_text=0.0)
    sft.log = sft.log_dict = lambda *args, **kwargs: None
    sft.train()
    records = [record for record in read_manifest(manifest) if record.split == "train"][: steps * batch_size]
    data, optimizer, clock = sft.training_data(records), sft.configure_optimizers()["optimizer"], Clock()
    clock.wrap(sft, "encode", "encoders or cache")
    clock.wrap(sft.core_seg.reasoner, "forward", "language model, forward")
    clock.wrap(sft.core_seg.adapter, "forward", "adapter, forward")
    clock.wrap(sft.core_seg, "masks", "mask decoder, forward")
    for _ in range(2):
        clock.seconds.clear()
        start = time.perf_counter()
        for step in range(steps):
            with clock.time("reading, resizing, facts, text"):
                batch = data[[(step * batch_size + row, row) for row in range(batch_size)]]
            loss = sft.training_step(batch, step)
            with clock.time("backward"):
                loss.backward()
            with clock.time("optimiser"):
                optimizer.step()
                optimizer.zero_grad()
        total = time.perf_counter() - start
    clock.seconds["losses and the rest"] = total - sum(clock.seconds.values())
    shares = {part: round(seconds / total, 3) for part, seconds in clock.seconds.items()}
    return {"samples_per_second": round(steps * batch_size / total, 2), "share_of_time": shares}


def main(manifest: Path, out: Path | None = None, steps: int = 8, batch_size: int = 16) -> None:
    """Measure and print; the last line is JSON.

    Args:
        manifest: Whose training split is used.
        out: Also written here.
        steps: Optimiser steps that are timed.
        batch_size: Records a step.
    """
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as cache:
        result = {"with_cache": measure(cache, manifest, steps, batch_size)}
    result["without_cache"] = measure(None, manifest, steps, batch_size)
    result["speedup"] = round(
        result["with_cache"]["samples_per_second"] / result["without_cache"]["samples_per_second"], 2
    )
    for name, side in list(result.items())[:2]:
        print(f"{name}: {side['samples_per_second']} samples/s")
        for part, share in sorted(side["share_of_time"].items(), key=lambda item: -item[1]):
            print(f"  {share:6.1%}  {part}")
    line = json.dumps(result | machine())
    if out:
        out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    run(main)
