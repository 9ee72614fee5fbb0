"""Without these the reasoning that the model learns, and is judged by, would not be true of the image."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from lab.data.facts import Facts, borderline, measure
from lab.data.reasoning import CONTRAST, COUNT, check_claims, mirror, parse_claims, write


def disc(x, y, radius, inside=60, outside=160, size=200, blur=0.0):
    mask = cv2.circle(np.zeros((size, size), np.uint8), (x, y), radius, 1, -1)
    alpha = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), blur) if blur else mask.astype(np.float32)
    image = outside + (inside - outside) * alpha
    return np.repeat(image[..., None], 3, 2).astype(np.uint8), mask.astype(bool)


@pytest.mark.parametrize(
    ("x", "y", "location"),
    [(30, 30, "upper left"), (100, 100, "centre"), (170, 100, "right"), (100, 180, "lower centre")],
)
def test_a_disc_is_located_by_thirds(x, y, location):
    assert measure(*disc(x, y, 15)).location == location


def test_a_dark_sharp_disc_is_described_as_such():
    facts = measure(*disc(100, 100, 20))
    assert (facts.contrast, facts.margin, facts.shape, facts.count) == ("much darker", "sharp", "round", "single")
    assert facts.size == "medium" and facts.fraction == pytest.approx(np.pi * 20**2 / 200**2, rel=0.03)
    assert facts.difference == pytest.approx(-100, abs=8)


def test_a_blurred_margin_is_told_from_a_sharp_one():
    assert measure(*disc(100, 100, 30, blur=8)).margin == "blurred"


def test_brighter_small_and_two():
    image, mask = disc(60, 60, 8, inside=185)
    other, also = disc(150, 150, 6, inside=185)
    facts = measure(np.maximum(image, other), mask | also)
    assert (facts.contrast, facts.size, facts.count, facts.location) == ("brighter", "small", "two", "upper left")


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (7, 3)])
@pytest.mark.parametrize("full", [False, True])
def test_degenerate_masks_are_measured(shape, full):
    facts = measure(np.zeros((*shape, 3), np.uint8), np.full(shape, full))
    assert (facts.count == "none") == (not full)


def every_fact():
    for location in ("upper left", "upper centre", "right", "centre", "left", "lower right"):
        for size in ("tiny", "small", "medium", "large"):
            for contrast in CONTRAST:
                for margin in ("sharp", "blurred"):
                    for shape in ("round", "oval", "irregular"):
                        for count in COUNT:
                            yield Facts(location, size, contrast, margin, shape, count)


def test_every_claim_that_is_written_is_read_back():
    rng = np.random.default_rng(0)
    for facts in every_fact():
        text = write(facts, "CT", "left kidney", "small round tumour", rng)
        claims = parse_claims(text)
        assert len(claims) == 6 and all(check_claims(claims, facts).values()), text
        assert not any(character.isdigit() for character in text)


def test_a_wrong_claim_is_refuted():
    facts = measure(*disc(30, 30, 15))
    text = write(replace(facts, location="lower right"), "CT", "liver", "cyst", np.random.default_rng(0))
    checked = check_claims(parse_claims(text), facts)
    assert not checked["location"] and checked["contrast"]


def test_free_text_is_read_without_an_error():
    assert parse_claims("Hazy. A large, well-defined mass sits at the top left. Done.") == {
        "location": "upper left",
        "size": "large",
        "margin": "sharp",
    }
    assert parse_claims("") == {}


def test_mirrored_words_are_swapped_and_swapped_back():
    text = "Left of the upper right lesion"
    assert mirror(text) == "Right of the upper left lesion" and mirror(mirror(text)) == text
    assert mirror("LEFT: the leftmost one, not the Right-most, bright and rightful") == (
        "RIGHT: the rightmost one, not the Left-most, bright and rightful"
    )


def test_a_number_on_the_border_of_two_words_is_told_apart_from_one_well_inside():
    inside = Facts("centre", "medium", "darker", "sharp", "oval", "single", (0.5, 0.5), 0.05, -25.0, 0.6, 0.74)
    assert borderline(inside) == set()
    edges = {
        "location": {"centroid": (0.5, 0.34)},
        "size": {"fraction": 0.021},
        "contrast": {"difference": -38.0},
        "margin": {"edge_share": 0.27},
        "shape": {"roundness": 0.87},
    }
    for name, change in edges.items():
        assert borderline(replace(inside, **change)) == {name}
    assert borderline(replace(inside, fraction=0.9, difference=90.0, roundness=1.0)) == set()
