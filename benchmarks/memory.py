"""The image encoder with freed memory kept by the process, against given back to the system after every tensor.

    python -m benchmarks.memory releases/core-seg-tiny-sft --out docs/results/memory.json

Both take turns, each in a process of its own; ratios count, not seconds.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import run
from lab.evaluation.report import machine
from lab.memory import keep_freed_memory
from lab.model.release import load_segmenter
from modules.precision import bfloat16

TURNS, BATCHES, IMAGES = 5, 5, 16


@torch.no_grad()
def measure(release: Path, keep: bool) -> dict[str, float]:
    """Seconds and page faults of a batch of images through the encoder, in bfloat16 where training is."""
    if keep:
        keep_freed_memory()
    segmenter = load_segmenter(release)
    size = segmenter.config.image_size
    pixels = torch.randint(0, 255, (IMAGES, size, size, 3), dtype=torch.uint8)
    with bfloat16(torch.device("cpu"), True):
        segmenter.encode(pixels)
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(BATCHES):
            segmenter.encode(pixels)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": (time.perf_counter() - start) / BATCHES,
        "cpu_seconds": (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / BATCHES,
        "page_faults": (after.ru_minflt - before.ru_minflt) / BATCHES,
    }


def main(release: Path, out: Path | None = None, turn: str = "") -> None:
    """Measure and print; the last line is JSON.

    Args:
        release: Of any stage.
        out: Also written here.
        turn: `keep` or `give`: measure this once and print it alone.
    """
    if turn:
        print(json.dumps(measure(release, turn == "keep")))
        return
    turns = {"keep": [], "give": []}
    for _ in range(TURNS):
        for name, found in turns.items():
            command = [sys.executable, "-m", "benchmarks.memory", str(release), f"--turn={name}"]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(said.splitlines()[-1]))
    medians = {
        name: {key: round(statistics.median(one[key] for one in found), 3) for key in found[0]}
        for name, found in turns.items()
    }
    ratios = {key: round(medians["give"][key] / medians["keep"][key], 2) for key in ("seconds", "cpu_seconds")}
    line = json.dumps({"images": IMAGES, **medians, "times_as_fast": ratios} | machine())
    if out:
        out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    run(main)
