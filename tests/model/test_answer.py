"""Without these an answer that the model wrote would be scored as something else than it says."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.model.answer import EMPTY_ANSWER, mirrored, parse, render

GOOD = (
    "<think> dark area </think>"
    "<answer>The cyst are located at [[10,20,30,40],[0,0,100,100]]. The mask is <seg>.</answer>"
)


def test_the_papers_schema_is_valid_and_its_boxes_are_shares_of_the_image():
    answer = parse(GOOD, 100)
    assert answer.valid and answer.reasoning == "dark area" and not answer.says_empty
    np.testing.assert_allclose(answer.boxes_norm, [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]], atol=1e-6)


@pytest.mark.parametrize("box", ["[30,20,10,40]", "[120,20,130,40]", "[10,20,10,40]"])
def test_a_box_without_area_is_counted_alone_but_the_answer_keeps_the_schema(box):
    answer = parse(GOOD.replace("[10,20,30,40]", box), 100)
    assert answer.valid and len(answer.boxes_norm) == answer.flat == 1


def test_no_lesion_is_a_valid_answer():
    answer = parse(f"<think> all normal </think><answer>{EMPTY_ANSWER}</answer>", 100)
    assert answer.valid and answer.says_empty and len(answer.boxes_norm) == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no <think>"),
        (GOOD.replace("</think>", ""), "no </think>"),
        (GOOD.replace("<seg>", ""), "no <seg>"),
        (GOOD.replace("<seg>", "<seg><seg>"), "more than one <seg>"),
        (GOOD + "<think>", "more than one <think>"),
        (GOOD.replace("[[10,20,30,40]", "[[10,20,x,40]"), "not in the schema"),
        (GOOD.replace(" dark area ", " "), "no reasoning"),
        ("so: " + GOOD, "outside"),
        (GOOD.replace("located", "found"), "not in the schema"),
    ],
)
def test_what_is_wrong_with_an_answer_is_named(text, problem):
    answer = parse(text, 100)
    assert not answer.valid and problem in answer.problem


boxes = st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=6).map(
    lambda rows: np.array([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in rows]).reshape(-1, 4)
)


@given(boxes, st.sampled_from([10, 100, 1000]))
def test_what_is_rendered_is_read_back_to_the_grid(true, grid):
    answer = parse(render("why", "small cyst", true, grid), grid)
    assert answer.valid and answer.says_empty == (len(true) == 0)
    np.testing.assert_allclose(answer.boxes_norm, true.astype(np.float32), atol=1.51 / grid)  # a box has to be one wide


pieces = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "<seg>", "[", "]", "[[1,2,3,4]]", "9" * 50, ",", EMPTY_ANSWER]
)


@given(st.lists(st.one_of(pieces, st.text()), max_size=30).map("".join))
def test_any_text_is_parsed_without_an_error(text):
    answer = parse(text, 100)
    assert answer.valid == (answer.problem == "")
    assert np.isfinite(answer.boxes_norm).all() and (answer.boxes_norm >= 0).all() and (answer.boxes_norm <= 1).all()


def test_a_very_long_answer_is_parsed_in_time_that_grows_with_its_length():
    def seconds(copies):
        start = time.process_time()
        parse("<think>a</think><answer>The " + "x are located at [[1,2,3,4]," * copies + "<seg></answer>", 100)
        return time.process_time() - start

    longer, shorter = (min(seconds(copies) for _ in range(3)) for copies in (32_000, 1_000))
    assert longer < 200 * max(shorter, 1e-3)  # linear is 32 times, quadratic 1,024


def test_the_mirror_image_has_other_sides_and_boxes():
    text = "<think> At the upper left. </think><answer>The cyst are located at [[0,1,30,40],[70, 5,999,9]]."
    other = mirrored(text, 100)
    assert "upper right" in other and "[[70,1,100,40],[0,5,30,9]]" in other
    assert mirrored(mirrored(GOOD, 100), 100) == GOOD
    assert mirrored("no idea", 100) == "no idea"
