"""What an evaluation leaves: JSON for programs, Markdown and a picture for people."""

import json
import os
import platform
import textwrap
from collections.abc import Callable
from datetime import date
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pandas as pd
import torch

from lab.data.images import load_sample
from lab.data.sample import Record

NOTICE = "Research use only. Not a medical device."
TRUTH, DRAWN = (60, 220, 90), (255, 70, 70)
"""RGB of the contours of the true and the drawn mask."""


def write_report(folder: Path | str, summary: dict, frame: pd.DataFrame) -> None:
    """Write `evaluation.json`, `evaluation.md` and `cases.csv` (one row an image)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "evaluation.md").write_text(markdown(summary))
    frame.round(5).to_csv(folder / "cases.csv", index=False)


def machine() -> dict:
    """What the figures were made on."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


def markdown(summary: dict) -> str:
    """The tables of an evaluation."""
    lines = [f"# {summary.get('model', 'Evaluation')}", "", NOTICE, ""]
    lines += [f"- {name}: {summary[name]}" for name in ("manifest", "split", "date", "machine") if name in summary]
    if swapped := summary.get("swapped_query"):
        lines.append(f"- with the query of another lesion in the same image: mDice {swapped['mDice']:.3f}")
    for key, groups in {"": {"all": summary["overall"]}, **summary["by"]}.items():
        columns = [name for name in summary["overall"] if not name.endswith("_ci")]
        lines += ["", f"| {key} | {' | '.join(columns)} | 95 % of mDice |", "|---" * (len(columns) + 2) + "|"]
        for name, values in groups.items():
            cells = [f"{v:.3f}" if isinstance(v := values.get(c), float) else str(v or "") for c in columns]
            lines.append(
                f"| {name} | {' | '.join(cells)} | {values['mDice_ci'][0]:.3f} to {values['mDice_ci'][1]:.3f} |"
            )
    return "\n".join(lines) + "\n"


def draw_cases(
    path: Path | str, frame: pd.DataFrame, records: list[Record], segment: Callable[[Record, str], np.ndarray]
) -> None:
    """A picture of 12 cases, 4 each of the worst, the median and the best: truth green, the model's mask red.

    Args:
        path: Of the PNG.
        frame: Of `evaluate` or `evaluate_boxes`.
        records: Those of the frame.
        segment: Record and query to the mask (H, W) bool that was scored.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = frame.sort_values("dice", kind="stable")
    middle = max(0, len(ordered) // 2 - 2)
    blocks = {"worst": ordered[:4], "median": ordered[middle : middle + 4], "best": ordered[-4:]}
    by_id = {record.id: record for record in records}
    figure, axes = pyplot.subplots(3, 4, figsize=(15, 13), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for row, (name, block) in zip(axes, blocks.items()):
        for axis, (_, case) in zip(row, block.iterrows()):
            record, query = by_id[case.id], case.get("query", "true boxes")
            sample = load_sample(record)
            axis.imshow(contoured(sample.image, sample.mask, segment(record, query)))
            claim = str(case.get("text", "")).partition("</think>")[0].removeprefix("<think>").strip()
            claim = "".join(character for character in claim if character.isprintable())
            title = textwrap.fill(f"{name}: Dice {case.dice:.2f}  {record.id}", 50) + "\n" + textwrap.fill(query, 50)
            axis.set_title(title, fontsize=9, loc="left")
            axis.text(0, 1.02 * sample.mask.shape[0], textwrap.fill(claim, 62), fontsize=7, va="top")
    figure.suptitle(f"Truth green, model red. {NOTICE}", fontsize=12)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def contoured(image: np.ndarray, truth: np.ndarray | None, drawn: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 with the contours of true and drawn mask (H, W) bool, and the drawn area tinted."""
    canvas = image.copy()
    canvas[drawn] = (0.7 * canvas[drawn] + 0.3 * np.array(DRAWN)).astype(np.uint8)
    for mask, colour in ((truth, TRUTH), (drawn, DRAWN)):
        if mask is not None:
            contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(canvas, contours, -1, colour, 1)
    return canvas
