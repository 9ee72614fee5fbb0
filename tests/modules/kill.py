"""A run that is killed without warning."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def killed_at(step: int, arguments: list[str], run: str) -> None:
    """Start `core-seg` in a process of its own and kill -9 it as soon as the metrics of `step` are written."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "lab", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    written = Path(f"runs/{run}/metrics.jsonl")
    end = time.monotonic() + 120
    while not (written.is_file() and f'"step": {step},' in written.read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait()
