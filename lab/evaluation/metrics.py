"""Per-image scores of masks and boxes, and their summary with intervals; docs/metrics.md says what each is for."""

from collections.abc import Sequence

import cv2
import numpy as np
import pandas as pd
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.optimize import linear_sum_assignment
from torchmetrics.functional.classification import binary_calibration_error
from torchvision.ops import box_iou

RESAMPLES = 2000
"""Bootstrap resamples behind every 95 % interval."""
NSD_TOLERANCE = 2.0
"""Pixels that a surface may be off."""
FOUND_IOU = 0.1
"""IoU above which a lesion counts as found."""
DOUBTFUL = 0.05
"""Probability from which a pixel counts in the calibration error; below, all the background would."""
MEANS = {
    "mIoU": "iou",
    "NSD": "nsd",
    "HD95": "hd95",
    "lesion_f1": "lesion_f1",
    "calibration_error": "calibration_error",
}
"""Figures that are means over images, and their columns."""


def dice_iou(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice and IoU of two masks (H, W) bool, each in 0..1; both empty counts as 1, one empty as 0.

    Two counts; torchmetrics and MONAI leave both-empty to a flag and want batches (the tests compare with both).
    """
    overlap, total = np.count_nonzero(predicted & truth), np.count_nonzero(predicted) + np.count_nonzero(truth)
    if total == 0:
        return 1.0, 1.0
    return 2 * overlap / total, overlap / (total - overlap)


def mask_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """`dice`, `iou`, `nsd` (0..1), `hd95` (pixels) and `lesion_f1` (0..1) of two masks (H, W) bool.

    Surface scores are MONAI's, with what it leaves open: both empty is NSD 1 and HD95 0, one empty is NSD 0 and as far
    away as the image is wide, its diagonal.
    """
    dice, iou = dice_iou(predicted, truth)
    scores = {"dice": dice, "iou": iou, "lesion_f1": lesion_f1(predicted, truth)}
    if predicted.any() != truth.any():
        return scores | {"nsd": 0.0, "hd95": float(np.hypot(*truth.shape))}
    if not truth.any():
        return scores | {"nsd": 1.0, "hd95": 0.0}
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (predicted, truth)]
    nsd = compute_surface_dice(*pair, [NSD_TOLERANCE], include_background=True)
    return scores | {"nsd": float(nsd), "hd95": float(compute_hausdorff_distance(*pair, True, percentile=95))}


def lesion_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """F1 of the connected components of two masks (H, W) bool, matched one to one where their IoU is over `FOUND_IOU`;
    both empty is 1."""
    parts = [cv2.connectedComponents(mask.astype(np.uint8), connectivity=8) for mask in (predicted, truth)]
    (n, of_predicted), (m, of_truth) = parts
    if n + m == 2:
        return 1.0
    common = np.bincount((of_predicted * m + of_truth).ravel(), minlength=n * m).reshape(n, m).astype(float)
    union = common.sum(1, keepdims=True) + common.sum(0) - common
    overlaps = (common / union.clip(1))[1:, 1:]
    found = (overlaps[linear_sum_assignment(overlaps, maximize=True)] > FOUND_IOU).sum()
    return float(2 * found / (n + m - 2))


def calibration_error(probability: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error (torchmetrics, 15 bins, 0..1) of a mask's probability (H, W) over the pixels that are
    lesion or that it thinks could be; 0 where there are none."""
    counts = truth | (probability >= DOUBTFUL)
    pair = (torch.from_numpy(values[counts]) for values in (probability, truth.astype(int)))
    return float(binary_calibration_error(*pair)) if counts.any() else 0.0


def match_boxes(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """IoUs (min(N, M),) of the Hungarian matching of boxes (N, 4) and (M, 4) xyxy: the one with the largest sum."""
    boxes = [torch.from_numpy(np.array(rows, np.float32, order="C")) for rows in (predicted, truth)]
    overlaps = box_iou(*boxes).numpy()
    return overlaps[linear_sum_assignment(overlaps, maximize=True)]


def box_f1(predicted: np.ndarray, truth: np.ndarray, flat: int = 0, threshold: float = 0.5) -> float:
    """F1 of boxes (N, 4) and (M, 4) xyxy whose matched IoU reaches `threshold`, with so many more predicted ones that
    are `flat`, without area; no boxes on both sides is 1."""
    if len(predicted) + flat + len(truth) == 0:
        return 1.0
    hits = int((match_boxes(predicted, truth) >= threshold).sum()) if len(predicted) and len(truth) else 0
    return 2 * hits / (len(predicted) + flat + len(truth))


def bootstrap_interval(values: np.ndarray, groups: Sequence | None = None, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean of per-image values (n,), by resampling groups: images of one patient or
    video are like each other.

    Args:
        values: One an image.
        groups: Of each image; None is a group for each. Of a single group the images are resampled: what is between
            groups cannot be known.
        seed: Of the resampling.
    """
    codes = np.arange(len(values)) if groups is None else pd.factorize(np.asarray(groups))[0]
    if codes.max() == 0:
        codes = np.arange(len(values))
    sums, counts = np.bincount(codes, values), np.bincount(codes)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return [round(float(bound), 4) for bound in np.percentile(means, [2.5, 97.5])]


def summarise(frame: pd.DataFrame) -> dict:
    """Overall, per source, modality and anatomy; rates in 0..1.

    Args:
        frame: One row an image: `dice`, `failed`, `group`, `source`, `modality`, `anatomy`, those of `MEANS` that there
            are and, where there is text, `box_f1`, `claims`, `claims_true`, `drafted`, `drafted_true`, `influence`. Box
            F1 is None where boxes were given, not named.
    """
    by = {
        key: {name: _summary(group) for name, group in frame.groupby(key)} for key in ("source", "modality", "anatomy")
    }
    return {"overall": _summary(frame), "by": by}


def _summary(frame: pd.DataFrame) -> dict:
    summary = {
        "mDice": round(float(frame.dice.mean()), 4),
        "mDice_ci": bootstrap_interval(frame.dice.to_numpy(float), frame.group),
        "failure_rate": round(float(frame.failed.mean()), 4),
        "box_f1": round(float(frame.box_f1.mean()), 4) if "box_f1" in frame else None,
    }
    summary |= {name: round(float(frame[column].mean()), 4) for name, column in MEANS.items() if column in frame}
    if "claims" in frame:
        summary["faithfulness"] = round(float(frame.claims_true.sum() / max(1, frame.claims.sum())), 4)
        summary["claims_per_answer"] = round(float(frame.claims.mean()), 2)
        summary["draft_faithfulness"] = round(float(frame.drafted_true.sum() / max(1, frame.drafted.sum())), 4)
    if "influence" in frame and len(moved := frame.dropna(subset="influence")):
        interval = bootstrap_interval(moved.influence.to_numpy(float), moved.group)
        summary |= {"influence": round(float(moved.influence.mean()), 4), "influence_ci": interval}
        summary["influence_n"] = len(moved)
    return summary | {"n": len(frame), "groups": frame.group.nunique()}
