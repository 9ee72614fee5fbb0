"""Without these an augmented sample would be learnt with a text or a mask that is not true of it."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from lab.data.augment import augment, mirror_sample, view
from lab.data.facts import measure
from lab.data.reasoning import check_claims, parse_claims, write
from lab.data.sample import Record, Sample, lesion_boxes


@pytest.fixture
def sample():
    mask = cv2.circle(np.zeros((120, 160), np.uint8), (30, 30), 14, 1, -1).astype(bool)
    image = np.where(mask[..., None], 50, 180).astype(np.uint8).repeat(3, -1)
    record = Record(
        "a", Path("a.png"), Path("m.png"), 160, 120, "CT", "liver", "cyst", "s", "l", "train", "g", float(mask.mean()),
        "Segment the lesion furthest to the left.", "A lesion lies in the upper left.",
    )  # fmt: skip
    return Sample(record, image, mask)


def test_a_flip_turns_left_into_right_in_image_mask_boxes_facts_and_words(sample):
    flipped = mirror_sample(sample)
    np.testing.assert_array_equal(flipped.mask, sample.mask[:, ::-1])
    assert measure(flipped.image, flipped.mask).location == "upper right"
    assert "right" in flipped.record.query and "upper right" in flipped.record.reasoning
    (x1, _, x2, _), (was1, _, was2, _) = lesion_boxes(flipped.mask)[0], lesion_boxes(sample.mask)[0]
    assert (x1, x2) == (160 - was2, 160 - was1)


@pytest.mark.parametrize("seed", range(40))
def test_the_mask_stays_on_the_lesion(sample, seed):
    changed = augment(sample, np.random.default_rng(seed))
    assert changed.mask.any()
    assert changed.image[changed.mask].mean() < changed.image[~changed.mask].mean() - 40


def test_views_are_the_same_every_time_and_differ_from_each_other(sample):
    for index in range(4):
        np.testing.assert_array_equal(view(sample, index).image, view(sample, index).image)
    assert not np.array_equal(view(sample, 2).image, view(sample, 3).image)
    np.testing.assert_array_equal(view(sample, 0).image, sample.image)


def test_own_reasoning_is_left_out_where_a_view_makes_it_false(sample):
    """Location, size and contrast change with the view, the words do not: half of the views were taught false ones."""
    facts = measure(sample.image, sample.mask)
    text = write(facts, "CT", "liver", "cyst", np.random.default_rng(0))
    told = replace(sample, record=replace(sample.record, reasoning=text))
    views = [view(told, index) for index in range(2, 30)]
    assert {bool(each.record.reasoning) for each in views} == {True, False}
    for each in views:
        claims = parse_claims(each.record.reasoning)
        assert all(check_claims(claims, measure(each.image, each.mask)).values())
    strange = replace(sample, record=replace(sample.record, reasoning="The liver. It lies at the lower right. A cyst."))
    assert view(strange, 2).record.reasoning, "what was never measured as true is its author's to say"
