"""The reward engine: what each completion earns for its format, its boxes, its mask and the truth of its claims.

Every function is pure, takes a batch of N completions and gives (N,) float32, so that each reward is logged by itself.
"""

from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import distance_box_iou_loss, generalized_box_iou_loss, masks_to_boxes

from lab.data.facts import Facts
from lab.data.reasoning import check_claims, parse_claims
from lab.evaluation.metrics import match_boxes
from lab.model.answer import Answer, schema_share

SegmentReward = Literal["paper", "residual", "dice", "iou2"]
MISS = 0.05
"""Dice below which the paper's segment reward falls back on GIoU (CORE-Seg, figure 2)."""
RESIDUAL_CREDIT = 0.5
"""k of the residual reward: the most that distance alone can earn."""
MATCH_IOU = 0.0
"""IoU that a matched pair of boxes must exceed to count in the detect reward. At 0 the fewest groups are silent, and it
goes along with Dice best: `docs/results/reward_signal.json`."""


def format_rewards(texts: list[str]) -> Tensor:
    """Share of the answer schema that each text keeps, 0..1; 1 for valid answers alone, "no lesion" ones included."""
    return torch.tensor([schema_share(text) for text in texts], dtype=torch.float32)


def detect_rewards(answers: list[Answer], truth_norm: list[np.ndarray], threshold: float = MATCH_IOU) -> Tensor:
    """`mIoU(matched) x F1` after Hungarian matching (CORE-Seg, figure 2), 0..1.

    Args:
        answers: Of the completions; boxes are used even where the rest of the answer is not valid.
        truth_norm: (M, 4) each, xyxy as shares of width and height.
        threshold: A matched pair counts when its IoU is above it.

    Returns:
        1 where nothing is there and the answer says so; 0 where boxes are missing on one side only.
    """
    rewards = []
    for answer, truth in zip(answers, truth_norm):
        total = len(answer.boxes_norm) + answer.flat + len(truth)
        if len(answer.boxes_norm) == 0 or len(truth) == 0:
            rewards.append(float(total == 0 and answer.says_empty))
            continue
        ious = match_boxes(answer.boxes_norm, truth)
        rewards.append(2 * float(ious[ious > threshold].sum()) / total)  # mean of n IoUs x F1 of 2 n / total
    return torch.tensor(rewards, dtype=torch.float32)


def binary_box_rewards(answers: list[Answer], truth_norm: list[np.ndarray]) -> Tensor:
    """Seg-Zero's two box rewards (Liu et al. 2025), averaged to 0..1: of all boxes on the side that has more, the share
    whose matched IoU is over 0.5, and the share whose corners are off by less than 10 of 840 pixels on average.

    Args:
        answers: Of the completions.
        truth_norm: (M, 4) each, xyxy as shares of width and height.

    Returns:
        1 where nothing is there and the answer says so; 0 where boxes are missing on one side only.
    """
    rewards = []
    for answer, truth in zip(answers, truth_norm):
        boxes = answer.boxes_norm
        most = max(len(boxes) + answer.flat, len(truth))
        if len(boxes) == 0 or len(truth) == 0:
            rewards.append(float(most == 0 and answer.says_empty))
            continue
        overlaps = np.count_nonzero(match_boxes(boxes, truth) > 0.5)
        distance = np.abs(boxes[:, None] - truth[None]).mean(2)
        close = np.count_nonzero(distance[linear_sum_assignment(distance)] < 10 / 840)
        rewards.append((overlaps + close) / (2 * most))
    return torch.tensor(rewards, dtype=torch.float32)


def segment_rewards(
    predicted: Tensor,
    truth: Tensor,
    has_mask: Tensor,
    kind: SegmentReward = "paper",
    giou_of: Literal["boxes", "areas"] = "boxes",
) -> Tensor:
    """How good the masks are, misses included.

    Args:
        predicted: (N, H, W) bool.
        truth: (N, H, W) bool.
        has_mask: (N,) bool, False where the answer is invalid or drew nothing: that earns the lowest value.
        kind: `paper`: GIoU where Dice < 0.05, else 1 + 2 Dice, so -1..1 and 1.1..3 (CORE-Seg, figure 2);
            `residual`: D + k (1 - D) (1 + DIoU) / 2 with k = 0.5, without a threshold, 0..1;
            `dice`: Dice, 0..1, which says nothing about a miss; `iou2`: the square of the IoU, 0..1, as LENS has it.
        giou_of: What the GIoU of `paper` is of: the masks' `boxes`, or their pixel `areas` in the box around both.
    """
    dice = has_mask * dice_scores(predicted, truth)
    if kind == "dice":
        return dice
    if kind == "iou2":
        return (dice / (2 - dice)) ** 2
    compared = has_mask & predicted.any((1, 2)) & truth.any((1, 2))
    boxes = [masks_to_boxes(masks[compared]) for masks in (predicted, truth)]
    for corners in boxes:
        corners[:, 2:] += 1  # they name the last pixel, not its end
    if kind == "residual":
        nearness = torch.zeros_like(dice)
        nearness[compared] = 1 - distance_box_iou_loss(*boxes) / 2
        return dice + RESIDUAL_CREDIT * (1 - dice) * nearness
    giou = torch.full_like(dice, -1.0)
    if giou_of == "boxes":
        giou[compared] = 1 - generalized_box_iou_loss(*boxes)
    else:
        giou[compared] = area_giou(predicted[compared], truth[compared], *boxes)
    return torch.where(dice < MISS, giou, 1 + 2 * dice)


def dice_scores(predicted: Tensor, truth: Tensor) -> Tensor:
    """Dice of N pairs of masks (N, H, W) bool; both empty 1, one empty 0."""
    overlap, total = (predicted & truth).sum((1, 2)), predicted.sum((1, 2)) + truth.sum((1, 2))
    return torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0)


def area_giou(predicted: Tensor, truth: Tensor, predicted_boxes: Tensor, truth_boxes: Tensor) -> Tensor:
    """GIoU (Rezatofighi et al. 2019) of mask areas (M, H, W) bool, enclosed by the smallest box around both."""
    union = (predicted | truth).sum((1, 2))
    low = torch.minimum(predicted_boxes[:, :2], truth_boxes[:, :2])
    high = torch.maximum(predicted_boxes[:, 2:], truth_boxes[:, 2:])
    enclosing = (high - low).prod(1)
    return (predicted & truth).sum((1, 2)) / union - (enclosing - union) / enclosing


def faithful_rewards(answers: list[Answer], facts: list[Facts]) -> Tensor:
    """Share of the claims in the reasoning that the measured facts confirm, 0..1; 0 where nothing is claimed."""
    checked = [check_claims(parse_claims(answer.reasoning), fact) for answer, fact in zip(answers, facts)]
    return torch.tensor([sum(c.values()) / max(1, len(c)) for c in checked], dtype=torch.float32)
