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
    folder: Path, frame: pd.DataFrame, records: list[Record], segment: Callable[[Record, str], np.ndarray]
) -> None:
    """Pictures of cases, truth green, the model's mask red: `cases.png` of 12, 4 each of the worst, the median and the
    best, and `worst.webp` of the worst alone, small enough for a card.

    Args:
        folder: Where to.
        frame: Of `evaluate` or `evaluate_boxes`.
        records: Those of the frame.
        segment: Record and query to the mask (H, W) bool that was scored.
    """
    ordered = frame.sort_values("dice", kind="stable")
    middle = max(0, len(ordered) // 2 - 2)
    blocks = {"worst": ordered[:4], "median": ordered[middle : middle + 4], "best": ordered[-4:]}
    by_id, panels = {record.id: record for record in records}, {}
    for name, block in blocks.items():
        panels[name] = []
        for _, case in block.iterrows():
            record, query = by_id[case.id], case.get("query", "true boxes")
            sample = load_sample(record)
            picture = contoured(sample.image, sample.mask, segment(record, query))
            title = textwrap.fill(f"{name}: Dice {case.dice:.2f}  {record.id}", 50) + "\n" + textwrap.fill(query, 50)
            claim = str(case.get("text", "")).partition("</think>")[0].removeprefix("<think>").strip()
            claim = "".join(character for character in claim if character.isprintable())
            panels[name].append((picture, title, textwrap.fill(claim, 62)))
    _draw_panels(folder / "cases.png", list(panels.values()))
    _draw_panels(folder / "worst.webp", [panels["worst"]])


def _draw_panels(path: Path, rows: list[list[tuple[np.ndarray, str, str]]]) -> None:
    """Rows of at most four panels: an image, what stands above it, and what stands below it."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (15, 5 * len(rows) + 0.3)
    figure, axes = pyplot.subplots(len(rows), 4, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, panels in zip(axes, rows):
        for axis, (picture, title, claim) in zip(row, panels):
            axis.imshow(picture)
            axis.set_title(title, fontsize=9, loc="left")
            axis.set_xlabel(claim, fontsize=7, loc="left")
    figure.suptitle(f"Truth green, model red. {NOTICE}", fontsize=12)
    figure.savefig(path, dpi=90, pil_kwargs={"quality": 50} if path.suffix == ".webp" else None)
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
