"""Without these the policy would be taught by a reward that says something else than the paper's, or nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data.facts import Facts
from lab.grpo.rewards import (
    area_giou,
    binary_box_rewards,
    detect_rewards,
    dice_scores,
    faithful_rewards,
    format_rewards,
    segment_rewards,
)
from lab.model.answer import EMPTY_ANSWER, Answer, parse, render

KINDS = [("paper", "boxes", -1, 3), ("paper", "areas", -1, 3), ("residual", "boxes", 0, 1), ("dice", "boxes", 0, 1)]
KINDS += [("iou2", "boxes", 0, 1)]
BOX = st.tuples(*[st.integers(0, 99)] * 2, *[st.integers(1, 40)] * 2).map(
    lambda b: [b[0] / 140, b[1] / 140, (b[0] + b[2]) / 140, (b[1] + b[3]) / 140]
)
BOXES = st.lists(BOX, max_size=4).map(lambda rows: np.array(rows, np.float32).reshape(-1, 4))
MASKS = st.lists(st.integers(0, 1), min_size=36, max_size=36).map(lambda v: torch.tensor(v).view(1, 6, 6).bool())


def answer(boxes):
    return Answer(True, "", "It is dark.", boxes.astype(np.float32))


def square(y, x, side=10, size=60):
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[0, y : y + side, x : x + side] = True
    return mask


YES = torch.tensor([True])
VALID = render("It is dark.", "cyst", np.array([[0.1, 0.1, 0.5, 0.5]]), 100)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        (VALID, 1, 1),
        (render("Nothing.", "", np.zeros((0, 4)), 100), 1, 1),
        (VALID.replace("<seg>", ""), 0.5, 0.9),
        (VALID.replace("<seg>", "<seg><seg>"), 0.5, 0.9),
        (VALID.replace("[10,10,50,50]", "here"), 0.5, 0.9),
        (VALID.replace("</answer>", ""), 0.2, 0.9),
        ("<think> it is dark", 0, 0.2),
        ("", 0, 0),
        ("the " * 2500, 0, 0),
    ],
)
def test_format_tells_nearly_right_from_noise(text, low, high):
    assert low <= float(format_rewards([text])) <= high


@given(st.text(alphabet="<think>/answer[]1,. seg", max_size=200) | st.text(max_size=200))
def test_full_format_is_validity(text):
    reward = float(format_rewards([text]))
    assert 0 <= reward <= 1 and (reward == 1) == parse(text, 100).valid


def test_detect_by_hand():
    """Two true boxes, one found with IoU 1/3 and another named in vain: 1/3 x F1 of 1/2."""
    truth = np.array([[0.0, 0.0, 0.2, 0.2], [0.6, 0.6, 0.8, 0.8]], np.float32)
    named = answer(np.array([[0.1, 0.0, 0.3, 0.2], [0.0, 0.9, 0.1, 1.0]]))
    assert float(detect_rewards([named], [truth])) == pytest.approx(1 / 6, abs=1e-4)
    assert float(detect_rewards([named], [truth], threshold=0.5)) == 0


def test_detect_where_nothing_is_there():
    empty, nothing = parse(f"<think> a </think><answer>{EMPTY_ANSWER}</answer>", 100), np.zeros((0, 4), np.float32)
    one, noise = answer(np.array([[0.1, 0.1, 0.4, 0.4]])), parse("no idea", 100)
    truths = [nothing, nothing, nothing, one.boxes_norm, one.boxes_norm]
    assert detect_rewards([empty, one, noise, empty, noise], truths).tolist() == [1, 0, 0, 0, 0]


@given(BOXES, BOXES, st.randoms(use_true_random=False))
def test_detect_is_bounded_and_no_order_matters(named, truth, random):
    order = list(range(len(named)))
    random.shuffle(order)
    found = detect_rewards([answer(named), answer(named[order])], [truth, truth[::-1]])
    assert torch.isfinite(found).all() and (found >= 0).all() and (found <= 1 + 1e-6).all()
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    if len(named) and len(truth):
        swapped = detect_rewards([answer(truth)], [answer(named).boxes_norm])
        torch.testing.assert_close(found[:1], swapped, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "of", "low", "high"), KINDS)
@given(predicted=MASKS, truth=MASKS, has_mask=st.booleans())
@settings(max_examples=60)
def test_segment_is_bounded_and_symmetric(kind, of, low, high, predicted, truth, has_mask):
    reward = segment_rewards(predicted, truth, torch.tensor([has_mask]), kind, of)
    assert torch.isfinite(reward).all() and low <= float(reward) <= high
    torch.testing.assert_close(reward, segment_rewards(truth, predicted, torch.tensor([has_mask]), kind, of))


@pytest.mark.parametrize(("kind", "of", "low", "high"), KINDS)
def test_segment_edges(kind, of, low, high):
    some, none, no = square(10, 10), torch.zeros(1, 60, 60, dtype=torch.bool), torch.tensor([False])
    reward = lambda *given: float(segment_rewards(*given, kind, of))  # noqa: E731
    assert reward(some, some, YES) == pytest.approx(high) == reward(none, none, YES)
    assert reward(none, some, YES) == reward(some, none, YES) == reward(some, some, no) == low


@pytest.mark.parametrize(("kind", "of", "low", "high"), KINDS)
def test_segment_rises_with_dice(kind, of, low, high):
    rewards = [float(segment_rewards(square(10, 10 + shift), square(10, 10), YES, kind, of)) for shift in range(9)]
    assert all(nearer > farther for nearer, farther in zip(rewards, rewards[1:]))


@pytest.mark.parametrize(("kind", "of"), [("paper", "boxes"), ("paper", "areas"), ("residual", "boxes")])
def test_a_miss_that_is_nearer_earns_more(kind, of):
    rewards = [float(segment_rewards(square(10, 20 + gap), square(10, 10), YES, kind, of)) for gap in range(0, 30, 3)]
    assert all(nearer > farther for nearer, farther in zip(rewards, rewards[1:]))
    assert len({float(segment_rewards(square(10, 20 + g), square(10, 10), YES, "dice")) for g in range(9)}) == 1


def test_segment_by_hand():
    """Squares of 10 side by side at a distance of 10: GIoU (0 - 100/300); Dice 1/2 gives 1 + 1."""
    torch.testing.assert_close(segment_rewards(square(0, 20), square(0, 0), YES), torch.tensor([-1 / 3]))
    torch.testing.assert_close(segment_rewards(square(0, 5), square(0, 0), YES), torch.tensor([2.0]))
    near = (1 + (0 - 20**2 / (30**2 + 10**2))) / 2  # (1 + DIoU) / 2
    torch.testing.assert_close(segment_rewards(square(0, 20), square(0, 0), YES, "residual"), torch.tensor([near / 2]))


def test_a_ring_and_its_disc_differ_by_area_not_by_box():
    disc, ring = square(10, 10, 20), square(10, 10, 20) & ~square(12, 12, 16)
    boxes = torch.tensor([[10, 10, 30, 30]])
    assert float(area_giou(ring, disc, boxes, boxes)) == pytest.approx(144 / 400)
    assert float(dice_scores(ring, disc)) == pytest.approx(2 * 144 / 544)


def test_faithful_is_the_share_of_claims_that_hold():
    facts = Facts("upper left", "small", "darker", "sharp", "round", "single")
    texts = ["Normal. A small area at the upper right is darker. This fits cyst.", "Nothing to say.", ""]
    answers = [parse(f"<think> {text} </think><answer>{EMPTY_ANSWER}</answer>", 100) for text in texts]
    assert faithful_rewards(answers, [facts] * 3).tolist() == pytest.approx([2 / 3, 0, 0])


def test_ten_thousand_characters_and_boxes_outside_the_image():
    long = VALID.replace("[10,10,50,50]", ",".join(["[90,90,99999,99999]"] * 1000))
    assert float(format_rewards([long])) == 1
    reward = detect_rewards([parse(long, 100)], [np.array([[0.9, 0.9, 1, 1]], np.float32)])
    assert 0 < float(reward) < 0.01


def test_boxes_without_area_cost_as_much_as_other_wrong_ones():
    """Else a policy could pad its answers for nothing."""
    truth = [np.array([[0.1, 0.1, 0.5, 0.5]], np.float32)]
    padded = {said: VALID.replace("[10,10,50,50]", f"[10,10,50,50],{said}") for said in ("[5,5,5,5]", "[80,80,90,90]")}
    for rewards in (detect_rewards, binary_box_rewards):
        flat, wrong = (float(rewards([parse(text, 100)], truth)) for text in padded.values())
        assert flat == wrong < float(rewards([parse(VALID, 100)], truth)) == 1


def test_the_binary_box_reward_counts_hits_and_near_corners_by_halves():
    truth = np.array([[0.2, 0.2, 0.4, 0.4]], np.float32)
    far, loose = truth + 0.5, truth + np.array([[0.0, 0.0, 0.05, 0.05]], np.float32)
    rewards = binary_box_rewards([answer(boxes) for boxes in (truth, loose, far)], [truth] * 3)
    assert rewards.tolist() == [1, 0.5, 0]
    two = binary_box_rewards([answer(np.vstack([truth, far]))], [truth])
    assert two.tolist() == [0.5]  # a second box on nothing halves it
    empty = binary_box_rewards(
        [answer(np.zeros((0, 4), np.float32)), parse(render("x", "", [], 100), 100)], [truth[:0]] * 2
    )
    assert empty.tolist() == [0, 1]


def test_the_reward_of_lens_is_the_square_of_the_iou():
    overlap, union = 6 * 10, 2 * 100 - 6 * 10
    reward = segment_rewards(square(14, 10), square(10, 10), YES, "iou2")
    assert float(reward) == pytest.approx((overlap / union) ** 2)
