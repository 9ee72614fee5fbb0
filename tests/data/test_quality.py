"""Without these a text that is untrue, leaks, or that a judge scored low would be learnt from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lab.data.facts import Facts
from lab.data.quality import MAX_WORDS, PASS_SCORE, clean, find_faults, overall_score, parse_scores
from lab.data.sample import Record

RECORD = Record(
    id="1", image=Path("1.png"), mask=Path("1m.png"), width=9, height=9, modality="ultrasound", anatomy="breast",
    lesion="cyst", source="made", license="CC0", split="train", group="1", mask_fraction=0.1, query="Find the cyst.",
)  # fmt: skip
FACTS = Facts("upper left", "small", "darker", "sharp", "oval", "single")
FINE = (
    "The breast looks as expected. A small area at the upper left is darker. Its outline is oval and its margin sharp. "
    "It is a single one. This fits a cyst."
)
NONE = "The breast looks as expected. Nothing departs from it."


def test_a_true_text_has_no_fault():
    assert find_faults(FINE, RECORD, FACTS) == []
    assert find_faults(NONE, replace(RECORD, lesion="none"), Facts()) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("upper left", "upper right", "location 'upper right' but measured is 'upper left'"),
        ("small", "large", "size 'large' but measured is 'small'"),
        ("darker", "much brighter", "contrast 'much brighter'"),
        ("sharp", "blurred", "margin 'blurred'"),
        ("oval", "irregular", "shape 'irregular'"),
        ("a single one", "one of many", "count 'many'"),
        ("at the upper left", "here", "does not say that the lesion lies at the 'upper left'"),
        ("upper left", "upper left, 30 from the edge", "gives the place away ('30')"),
        (FINE, "I'm sorry, I can't help with that.", "refusal"),
        (FINE, "The area at the upper left is a cyst.", "too short"),
        (FINE, "", "empty"),
        ("This fits", "This is so " + "very " * MAX_WORDS + "much like", "words; write at most"),
    ],
)
def test_each_fault_of_a_text_is_named(old, new, fault):
    assert any(fault in sentence for sentence in find_faults(FINE.replace(old, new), RECORD, FACTS))


def test_a_lesion_that_is_not_there_must_not_be_claimed():
    (fault,) = find_faults(
        "The breast is seen. A spot lies at the left. That is all.", replace(RECORD, lesion="none"), Facts()
    )
    assert "there is no lesion" in fault


def test_a_name_with_an_everyday_claim_word_is_no_claim_where_it_is_the_conclusion():
    """`small cell carcinoma` must not be read as the size."""
    record, facts = replace(RECORD, lesion="small cell carcinoma"), replace(FACTS, size="large")
    text = FINE.replace("small", "large").replace("a cyst", "small cell carcinoma")
    assert find_faults(text, record, facts) == []


def test_markdown_and_line_breaks_go():
    assert clean("**Normal** anatomy.\n\n- A `dark` area.\n1. Done.") == "Normal anatomy. A dark area. Done."


def test_scores_weigh_three_three_and_four():
    scores = {"normal_anatomy": 1.0, "lesion_characteristics": 0.5, "reasoning_logic": 0.25}
    assert overall_score(scores) == pytest.approx(0.3 * 1 + 0.3 * 0.5 + 0.4 * 0.25)
    scores = {"normal_anatomy": 0.57, "lesion_characteristics": 0.83, "reasoning_logic": 0.95}
    assert overall_score(scores) >= PASS_SCORE  # 0.8 exactly; the sum of floating point numbers is a little less


def test_scores_are_found_between_other_words():
    scores = {"normal_anatomy": 1, "lesion_characteristics": 0.5, "reasoning_logic": 0}
    assert parse_scores('I think {so}: {"a": 1} ```' + json.dumps(scores | {"comment": "ok"}) + "```") == scores


@pytest.mark.parametrize("value", ["0.9", 9, -0.1, True, None, [1]])
def test_a_score_that_is_no_share_is_refused(value):
    reply = json.dumps({"normal_anatomy": 1, "lesion_characteristics": 1, "reasoning_logic": value})
    with pytest.raises(ValueError, match="reasoning_logic"):
        parse_scores(reply)


@pytest.mark.parametrize("reply", ["", "{", "[1, 2]", '{"normal_anatomy": 1}', '{"normal_anatomy": NaN', "{" * 5000])
def test_a_reply_without_scores_is_refused(reply):
    with pytest.raises(ValueError, match="no JSON object"):
        parse_scores(reply)
