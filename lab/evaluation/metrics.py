"""Per-image scores of masks and boxes."""

import numpy as np


def dice_iou(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice and IoU of two masks (H, W) bool, each in 0..1; both empty counts as 1, one empty as 0."""
    overlap, total = np.count_nonzero(predicted & truth), np.count_nonzero(predicted) + np.count_nonzero(truth)
    if total == 0:
        return 1.0, 1.0
    return 2 * overlap / total, overlap / (total - overlap)
