"""Without these the figures in the README would not mean what their names say."""

import numpy as np
import pandas as pd
import pytest
import torch
from monai.metrics import compute_dice, compute_iou
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

from lab.evaluation.metrics import (
    bootstrap_interval,
    box_f1,
    calibration_error,
    dice_iou,
    lesion_f1,
    mask_scores,
    match_boxes,
    summarise,
)


@pytest.mark.parametrize("seed", range(5))
def test_dice_and_iou_are_those_of_monai_and_torchmetrics(seed):
    rng = np.random.default_rng(seed)
    predicted, truth = rng.random((2, 40, 30)) < rng.uniform(0.05, 0.6, (2, 1, 1))
    dice, iou = dice_iou(predicted, truth)
    p, t = (torch.from_numpy(mask)[None, None] for mask in (predicted, truth))
    assert dice == pytest.approx(compute_dice(p, t).item(), abs=1e-6)
    assert iou == pytest.approx(compute_iou(p, t).item(), abs=1e-6)
    assert dice == pytest.approx(binary_f1_score(p.int(), t.int()).item(), abs=1e-6)
    assert iou == pytest.approx(binary_jaccard_index(p.int(), t.int()).item(), abs=1e-6)


def test_both_empty_is_right_and_one_empty_is_wrong():
    empty, some = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    assert dice_iou(empty, empty) == (1, 1) and dice_iou(empty, some) == dice_iou(some, empty) == (0, 0)


def test_boxes_are_matched_one_to_one_for_the_largest_sum():
    true = np.array([[0, 0, 10, 10], [20, 20, 30, 30]])
    assert box_f1(true[::-1], true) == 1
    assert box_f1(true[:1], true) == pytest.approx(2 / 3)
    assert box_f1(np.vstack([true, true]), true) == pytest.approx(2 / 3)  # a second box on one lesion is a false one
    assert box_f1(true + 8, true) == 0
    assert box_f1(np.zeros((0, 4)), np.zeros((0, 4))) == 1 and box_f1(true, np.zeros((0, 4))) == 0
    assert box_f1(true, true, flat=1) == pytest.approx(4 / 5) and box_f1(true[:0], true[:0], flat=1) == 0
    half = np.array([[0, 0, 10, 5]])
    np.testing.assert_allclose(match_boxes(half, true), [0.5])


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    covered = 0
    for seed in range(60):
        low, high = bootstrap_interval(np.random.default_rng(seed).beta(2, 1, 80), seed=seed)
        covered += low <= 2 / 3 <= high
    assert 50 <= covered <= 60


def test_of_groups_that_are_alike_within_the_interval_is_as_wide_as_of_one_image_each():
    values = np.random.default_rng(0).beta(2, 1, 20)
    wide, low = (
        np.diff(bootstrap_interval(np.repeat(values, 9), groups)) for groups in (np.repeat(range(20), 9), None)
    )
    assert wide == pytest.approx(np.diff(bootstrap_interval(values)), rel=0.1) and wide > 2 * low
    assert bootstrap_interval(values, [0] * 20) == bootstrap_interval(values), "of one group, over its images"


def test_the_summary_is_a_mean_over_images_and_counts_every_failure():
    frame = pd.DataFrame(
        {"dice": [1.0, 0.0, 0.5], "iou": [1.0, 0.0, 1 / 3], "failed": [False, True, False]}
        | {name: ["a", "a", "b"] for name in ("group", "source", "modality", "anatomy")}
        | {"box_f1": [1.0, 0.0, 0.5], "claims": [4, 0, 6], "claims_true": [4, 0, 1]}
        | {"drafted": [6, 0, 6], "drafted_true": [4, 0, 2]}
    )
    summary = summarise(frame)
    overall = summary["overall"]
    assert (overall["mDice"], overall["failure_rate"], overall["n"]) == (0.5, 0.3333, 3)
    assert (overall["claims_per_answer"], overall["draft_faithfulness"]) == (3.33, 0.5)
    assert overall["faithfulness"] == 0.5 and summary["by"]["source"]["b"]["mDice"] == 0.5
    boxes_were_given = summarise(frame.drop(columns=["box_f1", "claims"]))["overall"]
    assert boxes_were_given["box_f1"] is None and "faithfulness" not in boxes_were_given


def square(x, y, side, size=60):
    mask = np.zeros((size, size), bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_a_shifted_square_is_off_by_its_shift():
    scores = mask_scores(square(15, 10, 20), square(10, 10, 20))
    assert scores["hd95"] == 5 and 0 < scores["nsd"] < 1
    assert mask_scores(square(11, 10, 20), square(10, 10, 20))["nsd"] == 1  # within the tolerance
    far = mask_scores(square(0, 0, 5), square(50, 50, 5))
    assert far["nsd"] == 0 and far["hd95"] > 60


def test_no_empty_mask_is_skipped_or_undefined():
    empty, some = np.zeros((60, 60), bool), square(10, 10, 20)
    assert mask_scores(empty, empty) == {"dice": 1, "iou": 1, "lesion_f1": 1, "nsd": 1, "hd95": 0}
    for pair in ((empty, some), (some, empty)):
        scores = mask_scores(*pair)
        assert scores.pop("hd95") == pytest.approx(60 * 2**0.5) and not any(scores.values())


def test_lesions_count_each_whatever_their_size():
    large, small = square(0, 0, 30), square(50, 50, 4)
    assert lesion_f1(large | small, large | small) == 1
    assert lesion_f1(large, large | small) == pytest.approx(2 / 3)
    assert lesion_f1(large | small | square(40, 0, 3), large | small) == pytest.approx(4 / 5)
    assert lesion_f1(square(0, 0, 60), small) == 0  # all of the image finds nothing


def test_a_probability_is_calibrated_when_it_is_right_as_often_as_it_says():
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.05, 1, (300, 300)).astype(np.float32)
    truth = rng.random((300, 300)) < probability
    assert calibration_error(probability, truth) < 0.02
    assert calibration_error(np.ones((9, 9), np.float32), np.zeros((9, 9), bool)) == pytest.approx(1)
    assert calibration_error(np.zeros((9, 9), np.float32), square(0, 0, 3, 9)) == pytest.approx(1)
    assert calibration_error(np.zeros((9, 9), np.float32), np.zeros((9, 9), bool)) == 0
