"""The page: without these a visitor would see a traceback, a wrong state, or nothing."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from apps.page import NOTICE, annotations, build, figures, plain, state
from lab.model.answer import parse
from lab.model.core_seg import CoreSeg, CoreSegConfig, Prediction
from lab.model.reasoner import ReasonerConfig
from lab.model.segmenter import SegmenterConfig

TEXT = "<think> dark </think><answer>The cyst are located at [[10,20,30,40]]. The mask is <seg>.</answer>"


@pytest.fixture
def prediction():
    mask = np.zeros((50, 100), bool)
    mask[10:20, 10:30] = True
    return Prediction(
        TEXT, parse(TEXT, 100), np.array([[10, 10, 30, 20]]), mask, mask.astype(np.float32), True, 0.5, 20
    )


def test_every_state_of_an_answer_is_unmistakable(prediction):
    assert "4.0%" in state(prediction) and "1 box" in state(prediction)
    assert "Invalid answer: no <think>" in state(replace(prediction, answer=parse("x", 100), has_mask=False))
    empty = parse("<think> a </think><answer>No such lesion is found. The mask is empty.</answer>", 100)
    assert "No such lesion" in state(replace(prediction, answer=empty))
    assert "Empty mask" in state(replace(prediction, mask=np.zeros((50, 100), bool)))


def test_boxes_and_mask_are_drawn_on_the_image(prediction):
    drawn, boxes = annotations(np.zeros((50, 100, 3), np.uint8), prediction)
    assert boxes == [((10, 10, 30, 20), "box 1")]
    assert drawn[10, 10].any() and not drawn[40, 40].any()
    assert plain(TEXT) == "dark \n\nThe cyst are located at [[10,20,30,40]]. The mask is <seg>."


def test_a_release_without_figures_shows_none(tmp_path):
    assert figures(tmp_path / "release").empty


@pytest.fixture(scope="module")
def address():
    config = CoreSegConfig(
        SegmenterConfig(image_size=64, embed_dim=32), ReasonerConfig("small", 64, 1, 64, scene_dim=32)
    )
    page = build(CoreSeg(config).eval(), pd.DataFrame(), [])
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=True)
    yield url
    page.close()


def test_an_image_is_answered_and_bad_ones_get_a_sentence(address, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("<html>")
    client = Client(address, verbose=False)
    text, seen, said = client.predict(handle_file(tmp_path / "a.png"), "Segment the cyst.", api_name="/segment")
    assert text and seen["image"] and "Invalid answer" in said  # the weights are random
    for path, query, words in (
        (handle_file(tmp_path / "b.png"), "Segment.", "not an image"),
        (None, "Segment.", "Choose an image"),
        (handle_file(tmp_path / "a.png"), " ", "1 to 300"),
        (handle_file(tmp_path / "a.png"), "x" * 301, "1 to 300"),
    ):
        with pytest.raises(Exception, match=words) as error:
            client.predict(path, query, api_name="/segment")
        assert str(tmp_path) not in str(error.value)


def test_the_notice_is_in_the_page():
    assert "Not a medical device" in NOTICE and "Do not upload patient data" in NOTICE
