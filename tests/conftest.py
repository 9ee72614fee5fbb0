"""What every test stands on: one thread, no network, the environment restored, and a small data set with real files."""

import json
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["MPLBACKEND"] = "Agg"
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs deaf to Ctrl-C


@pytest.fixture(autouse=True)
def restored():
    """A test that changes the folder, the environment or the random state does not change the next test."""
    folder, environment = os.getcwd(), dict(os.environ)
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def lesion_lines(tmp_path) -> list[dict]:
    """Six manifest lines (two a split, the last of a split without lesion) whose files are in `tmp_path`."""
    lines = []
    for number, (split, lesion) in enumerate((s, n) for s in ("train", "val", "test") for n in ("benign cyst", "none")):
        rng = np.random.default_rng(number)
        height, width = 40 + 4 * number, 56
        mask = np.zeros((height, width), np.uint8)
        if lesion != "none":
            cv2.ellipse(mask, (20 + number, 18), (9, 6), 30, 0, 360, 255, -1)
        image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
        image[mask > 0] //= 2
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
        cv2.imwrite(str(tmp_path / f"{number}_mask.png"), mask)
        lines.append(
            {"id": f"made/{number}", "image": f"{number}.png", "mask": f"{number}_mask.png", "width": width}
            | {"height": height, "modality": "ultrasound", "anatomy": "breast", "lesion": lesion, "source": "made"}
            | {
                "license": "CC0",
                "split": split,
                "group": f"made-{number}",
                "mask_fraction": round(np.mean(mask > 0), 5),
            }
        )
    return lines


@pytest.fixture
def write_lines(tmp_path):
    """A function that writes lines (dicts; str for broken ones) as `manifest.jsonl` beside the files of the lines."""

    def write(lines: list[dict | str]) -> Path:
        path = tmp_path / "manifest.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def manifest(lesion_lines, write_lines) -> Path:
    """A valid manifest of six records."""
    return write_lines(lesion_lines)


@pytest.fixture
def real_manifest() -> Path:
    """The shared real lesions; a test that asks for them is skipped where they are absent."""
    path = Path(__file__).parents[2] / "shared/data/lesions/manifest.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return path
