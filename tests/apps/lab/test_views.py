"""Without these the lab could show a wrong mask, an unescaped query, or an invalid answer as if it were a good one."""

import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import gradio as gr
import numpy as np
import pytest

from apps.lab import views
from apps.lab.asking import Answer
from apps.lab.inspection import export, shown_of
from apps.lab.results import Result
from lab.data.facts import measure
from lab.model.answer import parse
from lab.model.core_seg import Prediction

TEXT = (
    "<think> The breast looks as expected. A small area at the left departs from it: darker than its surround. "
    "Its outline is round and its margin sharp. It is a single lesion. This fits cyst. </think>"
    "<answer>The cyst are located at [[10,20,30,40]]. The mask is <seg>.</answer>"
)


@pytest.fixture
def mask():
    mask = np.zeros((50, 100), bool)
    mask[10:20, 10:30] = True
    return mask


@pytest.fixture
def prediction(mask):
    boxes = np.array([[10, 10, 30, 20]], np.float32)
    return Prediction(TEXT, parse(TEXT, 100), boxes, mask, mask.astype(np.float32), True, 0.5, 20)


def test_every_state_of_an_answer_is_unmistakable(prediction):
    assert views.state(prediction) == ""
    invalid = parse("x", 100)
    assert "INVALID ANSWER: no &lt;think&gt;" in views.state(replace(prediction, answer=invalid, has_mask=False))
    empty = parse("<think> a </think><answer>No such lesion is found. The mask is empty.</answer>", 100)
    assert "no such lesion" in views.state(replace(prediction, answer=empty))
    assert "EMPTY MASK" in views.state(replace(prediction, mask=np.zeros((50, 100), bool)))


def test_claims_are_confirmed_refuted_or_unchecked(mask):
    image = np.full((50, 100, 3), 200, np.uint8)
    image[mask] = 20
    shown = views.reasoning(TEXT, measure(image, mask))
    assert '<mark class="confirmed" title="location: confirmed">left</mark>' not in shown  # it is upper left
    assert re.search(r'class="refuted" title="location: refuted">left<', shown)
    assert re.search(r'class="confirmed" title="count: confirmed">single<', shown)
    assert 'class="unchecked"' in views.reasoning(TEXT) and "confirmed" not in views.reasoning(TEXT)
    assert re.findall(r'class="step (\w+)"', shown) == [
        "normal",
        "finding",
        "finding",
        "finding",
        "conclusion",
        "answer",
    ]


def test_nothing_that_a_model_or_visitor_writes_becomes_html(prediction):
    evil = "<think> <img src=x onerror=alert(1)> a small one. </think><answer><script>alert(2)</script></answer>"
    for shown in (views.reasoning(evil), views.changes("<b>", evil), views.reasoning("<script>")):
        assert "<script>" not in shown and "<img" not in shown
    assert "<script>" not in views.viewer(np.zeros((9, 9, 3), np.uint8), label="<script>")


def test_errors_and_difference_colour_what_they_name(mask):
    truth = np.roll(mask, 5, axis=1)
    drawn = views.errors(mask, truth)
    assert tuple(drawn[15, 20]) == (*views.HIT, 255)
    assert tuple(drawn[15, 11]) == (*views.ALARM, 255)
    assert tuple(drawn[15, 33]) == (*views.MISSED, 255)
    assert not drawn[40, 40].any()
    assert (views.difference(mask, mask) == 0).all() and views.difference(mask, truth)[..., 3].sum() == 2 * 50 * 255


def test_a_viewer_has_the_layers_that_are_known(prediction, mask):
    image = np.zeros((50, 100, 3), np.uint8)
    layers = lambda **known: set(  # noqa: E731
        re.findall(r'class="layer ([\w-]+)"', views.viewer(image, views.Shown("m", prediction, mask * 0.5, **known)))
    )
    always = {"overlay", "contour", "attention", "boxes"}
    assert layers() == always | {"no-noticed", "no-errors", "no-difference"}
    assert layers(truth=mask) == always | {"errors", "truth", "no-noticed", "no-difference"}
    assert "difference" in layers(other=mask) and "noticed" in layers(noticed=mask.astype(np.uint8))
    nothing, something = (
        views.viewer(image, views.Shown("m", prediction, mask * 0.5, noticed=noticed))
        for noticed in (None, mask.astype(np.uint8))
    )
    assert "reads the prompt once" in nothing and "reads the prompt once" not in something
    assert views.viewer(image).count("<img") == 1


def test_scores_of_a_perfect_and_of_an_invalid_answer(prediction, mask):
    assert views.score(prediction, mask, 5) == pytest.approx(
        {"Dice": 1, "IoU": 1, "NSD": 1, "lesion F1": 1, "box F1": 1}
    )
    assert set(views.score(replace(prediction, has_mask=False), mask, 5).values()) == {0.0}


def test_large_images_are_sent_smaller():
    assert len(views.data_uri(np.zeros((4000, 3000, 3), np.uint8))) < 10_000


def test_changes_show_what_was_struck_out_and_put_in():
    assert views.changes("a b c", "a x c") == '<div class="reasoning">a <del>b</del> <ins>x</ins> c</div>'


def test_what_is_exported_is_what_was_seen(prediction, mask, tmp_path):
    """Masks of the image's size, the answers word for word, and a figure with nothing cut off it."""
    image = np.full((50, 100, 3), 200, np.uint8)
    result = Result(image, "Segment the cyst; it costs $5 or $6.", "a/1")
    with pytest.raises(gr.Error, match="no answer yet"):
        export(result, tmp_path)
    moved = replace(prediction, mask=np.roll(mask, 5, 1))
    for name, said in (("releases/one", prediction), ("two", moved)):
        answer = Answer(None, said, said.probability, None)
        result.shown[name] = shown_of(answer, name, 5, result, mask, None)
    files = {Path(path).name: path for path in export(result, tmp_path)}
    assert sorted(files) == ["answers.json", "figure.png", "releases-one_mask.png", "two_mask.png"]
    np.testing.assert_array_equal(cv2.imread(files["two_mask.png"], cv2.IMREAD_GRAYSCALE) > 0, moved.mask)
    told = json.loads(Path(files["answers.json"]).read_text())
    assert told["query"] == result.query and told["notice"] == views.NOTICE
    assert told["answers"]["releases/one"]["text"] == TEXT and told["answers"]["releases/one"]["scores"]["Dice"] == 1
    figure = cv2.imread(files["figure.png"])
    edges = np.concatenate([figure[0], figure[-1], figure[:, 0], figure[:, -1]])
    assert (edges == 255).all() and figure.shape[1] > figure.shape[0]
