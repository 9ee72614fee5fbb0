"""Per-image scores of masks and boxes, and their summary with intervals."""

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

RESAMPLES = 2000
"""Bootstrap resamples behind every 95 % interval."""


def dice_iou(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice and IoU of two masks (H, W) bool, each in 0..1; both empty counts as 1, one empty as 0.

    Two counts; torchmetrics and MONAI leave both-empty to a flag and want batches (the tests compare with both).
    """
    overlap, total = np.count_nonzero(predicted & truth), np.count_nonzero(predicted) + np.count_nonzero(truth)
    if total == 0:
        return 1.0, 1.0
    return 2 * overlap / total, overlap / (total - overlap)


def match_boxes(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """IoUs (min(N, M),) of the Hungarian matching of boxes (N, 4) and (M, 4) xyxy: the one with the largest sum."""
    boxes = [torch.from_numpy(np.array(rows, np.float32, order="C")) for rows in (predicted, truth)]
    overlaps = box_iou(*boxes).numpy()
    return overlaps[linear_sum_assignment(overlaps, maximize=True)]


def box_f1(predicted: np.ndarray, truth: np.ndarray, threshold: float = 0.5) -> float:
    """F1 of boxes (N, 4) and (M, 4) xyxy whose matched IoU reaches `threshold`; no boxes on both sides is 1."""
    if len(predicted) + len(truth) == 0:
        return 1.0
    hits = int((match_boxes(predicted, truth) >= threshold).sum()) if len(predicted) and len(truth) else 0
    return 2 * hits / (len(predicted) + len(truth))


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean of per-image values (n,), by resampling images."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    return [round(float(bound), 4) for bound in np.percentile(means, [2.5, 97.5])]


def summarise(frame: pd.DataFrame) -> dict:
    """Overall, per source, modality and anatomy; rates in 0..1.

    Args:
        frame: One row an image: `dice`, `iou`, `failed`, `source`, `modality`, `anatomy` and, where there is text,
            `box_f1`, `claims` and `claims_true`. Box F1 is None where boxes were given, not named.
    """
    by = {
        key: {name: _summary(group) for name, group in frame.groupby(key)} for key in ("source", "modality", "anatomy")
    }
    return {"overall": _summary(frame), "by": by}


def _summary(frame: pd.DataFrame) -> dict:
    summary = {
        "mDice": round(float(frame.dice.mean()), 4),
        "mDice_ci": bootstrap_interval(frame.dice.to_numpy(float)),
        "mIoU": round(float(frame.iou.mean()), 4),
        "failure_rate": round(float(frame.failed.mean()), 4),
        "box_f1": round(float(frame.box_f1.mean()), 4) if "box_f1" in frame else None,
    }
    if "claims" in frame:
        summary["faithfulness"] = round(float(frame.claims_true.sum() / max(1, frame.claims.sum())), 4)
    return summary | {"n": len(frame)}
