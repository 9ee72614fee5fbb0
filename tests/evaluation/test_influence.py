"""Without these reasoning that the mask ignores could seem to matter, or the other way round."""

from types import SimpleNamespace

import numpy as np
import pytest

from lab.data.manifest import read_manifest
from lab.data.reasoning import parse_claims
from lab.evaluation.influence import moved_claim, reasoning_influence, reworded
from lab.model.answer import parse

ANSWER = (
    "<think> The skin looks as expected in most of this dermoscopy image. A small area at the {} departs from it: "
    "darker than its surround. Its outline is oval and its margin sharp. It is a single lesion. "
    "This fits naevus. </think><answer>The naevus are located at [[5,5,30,30]]. The mask is <seg>.</answer>"
)


@pytest.mark.parametrize(
    "place, opposite",
    [
        ("upper left", "lower right"),
        ("right", "left"),
        ("centre", "upper left"),
        ("lower centre", "upper centre"),
        ("middle left", "right"),
    ],
)
def test_only_the_location_is_moved(place, opposite):
    assert moved_claim(ANSWER.format(place)) == ANSWER.format(opposite)


def test_an_answer_without_a_location_cannot_be_moved():
    assert moved_claim(ANSWER.replace("at the {} ", "")) is None


def test_other_words_claim_the_same(manifest):
    record, text = read_manifest(manifest)[0], ANSWER.format("left")
    other = reworded(text, record)
    assert other != text and parse(other, 100).valid
    assert parse_claims(parse(other, 100).reasoning) == parse_claims(parse(text, 100).reasoning)


class Model:
    """Draws a column where its reasoning says so, or where its box is."""

    config = SimpleNamespace(reasoner=SimpleNamespace(grid=100))

    def __init__(self, heeds_reasoning):
        self.heeds_reasoning = heeds_reasoning

    def open(self, images, queries):
        return images

    def segment_text(self, images, texts):
        masks = [np.zeros(image.shape[:2], bool) for image in images]
        for mask, text in zip(masks, texts):
            half = mask.shape[1] // 2
            left = "left" in parse_claims(parse(text, 100).reasoning)["location"] or not self.heeds_reasoning
            mask[:, :half] |= left
            mask[:, half:] |= not left
        return [SimpleNamespace(mask=mask) for mask in masks]


def test_influence_is_one_for_a_mask_that_follows_the_claim_and_zero_for_one_that_does_not(manifest):
    records = read_manifest(manifest)[:3]
    texts = [ANSWER.format("upper left"), ANSWER.format("left"), "no idea"]
    heeded = reasoning_influence(Model(True), records, texts)
    assert list(heeded.index) == [record.id for record in records[:2]] and (heeded == 1).all()
    assert (reasoning_influence(Model(False), records, texts) == 0).all()
