"""Without these the mask could be learnt from numbers in the text, and no image would have to be looked at."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data.coordinates import find_coordinates, strip_coordinates

NAMES = ("MRI T1 contrast", "lung", "COVID-19 infiltrate")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("A dark area at [12, 30, 80, 90] stands out.", "A dark area stands out."),
        ("A dark area at the left ([[1,2,3,4],[5,6,7,8]]).", "A dark area at the left."),
        ("It lies at coordinates (x=120, y=80), upper left.", "It lies, upper left."),
        ("It lies within the bounding box [0.1, 0.2, 0.5, 0.6].", "It lies."),
        ("Seen <|box_start|>(12,34),(56,78)<|box_end|> on the right.", "Seen on the right."),
        ("It spans from (10px, 20px) to (40px, 60px) and is dark.", "It spans and is dark."),
        ("Dark on T2 (FLAIR) and bright on (T1).", "Dark on T2 (FLAIR) and bright on (T1)."),
    ],
)
def test_numbers_in_brackets_are_taken_out_and_words_in_brackets_stay(text, left):
    assert strip_coordinates(text) == left
    assert find_coordinates(left) == []


@pytest.mark.parametrize(
    "text",
    [
        "It begins 30 pixels from the left.",
        "It lies at x = 120.",
        "It is at x120y80.",
        "It lies at 45% of the width.",
        "It lies at forty-five percent of the width.",
        "It lies at forty five of the width.",
        "It starts at one two zero.",
        "It starts at zero point four.",
        "It starts at five point four.",
        "It lies two thirds of the way down.",
        "It lies a quarter of the width from the left.",
        "It lies half-way down.",
        "It is at the two o'clock position.",
        "It is in row two of the grid.",
        "It begins at ½ of the height.",
        "It begins at ١٢.",
        "It begins at １２.",
        "It begins at ⑫.",
        "It begins at 三.",
        "It is 5mm wide.",
        "It is five millimetres wide.",
        "It lies at [12, 30",
        "Its coordinates are known.",
        "It fills the bounding box.",
        "The mask shows it at the left.",
        "The annotated region is at the left.",
        "It agrees with the ground truth.",
        "Its y-axis position is high.",
        "<answer>It lies here.</answer>",
        "Slice T3 shows it.",
    ],
)
def test_text_that_gives_the_place_away_is_found(text):
    assert find_coordinates(strip_coordinates(text), NAMES)


@pytest.mark.parametrize(
    "text",
    [
        "At the upper left a small region stands out, much darker than its surround.",
        "There are two such places in the upper third of the image.",
        "On this T1-weighted image, as on T2, one or two nodules are bright.",
        "This MRI T1 contrast image shows the lung. Taken together this suggests COVID-19 infiltrate.",
        "A second, third and fourth nodule lie near the first one.",
    ],
)
def test_places_in_words_and_digits_of_names_may_stay(text):
    assert strip_coordinates(text) == text
    assert find_coordinates(text, NAMES) == []


def test_a_name_allows_its_own_digits_only():
    assert find_coordinates("This is a stage 3 ulcer at 3.", ("photograph", "foot", "stage 3 ulcer")) == ["3."]
    assert find_coordinates("It lies at 12.", ("photograph", "foot", "12")) == ["12."]


SHAPES = (
    "[{}, {}, {}, {}]",
    "({},{}),({},{})",
    "x={} y={} w={} h={}",
    "{}/{}/{}/{}",
    "<box>{} {} {} {}</box>",
    "{}.{}%",
)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    numbers=st.lists(st.integers(0, 2000) | st.floats(0, 1).map(lambda x: round(x, 3)), min_size=4, max_size=4),
    before=st.sampled_from(["at", "around the point", "covering", "", "within box"]),
    after=st.sampled_from([".", ", at the left.", " and further down."]),
)
def test_no_box_in_any_notation_gets_through(shape, numbers, before, after):
    """What is accepted after stripping holds no digit, whatever the notation."""
    text = strip_coordinates(f"A dark area {before} {shape.format(*numbers)}{after}")
    assert find_coordinates(text) or not any(letter.isnumeric() for letter in text)
