"""What a chain of thought must be before it may be learnt from: the checks that need no judge, and a judge's scores."""

import json
import re

from lab.data.coordinates import find_coordinates, strip_coordinates
from lab.data.facts import Facts
from lab.data.reasoning import check_claims, parse_claims, sentences
from lab.data.sample import Record

WEIGHTS = {"normal_anatomy": 0.3, "lesion_characteristics": 0.3, "reasoning_logic": 0.4}
"""Of a judge's scores, each 0..1 (CORE-Seg, automated quality assurance)."""
PASS_SCORE = 0.8
"""Below it a sample is written again (CORE-Seg)."""
MAX_WORDS = 130
"""A longer text does not fit into the 200 tokens of an answer."""

_REFUSAL = re.compile(
    r"\b(?:I(?:['’]m| am) sorry|I (?:can(?:['’]t|not)|(?:am|['’]m) (?:not able|unable))|as an AI)\b|^unable to\b", re.I
)


def clean(text: str) -> str:
    """A text in one line without markdown's asterisks and without coordinates in brackets."""
    return strip_coordinates(re.sub(r"\*+|`+|^\s*(?:[-#]+|\d+[.)])\s+", "", text, flags=re.MULTILINE))


def refuses(text: str) -> bool:
    """Whether a model says that it will not answer."""
    return _REFUSAL.search(text) is not None


def find_faults(text: str, record: Record, facts: Facts) -> list[str]:
    """What is wrong with a chain of thought, in words that tell its author what to do.

    Args:
        text: As `clean` leaves it.
        record: Whose names may hold digits.
        facts: Measured on image and mask; claims that differ from them are faults.

    Returns:
        One sentence a fault; empty for a text to keep.
    """
    if refuses(text):
        return ["It is a refusal; write the reasoning about this de-identified research image."]
    faults = []
    if given := find_coordinates(text, (record.modality, record.anatomy, record.lesion)):
        words = ", ".join(f"'{word}'" for word in given[:5])
        faults.append(f"It gives the place away ({words}); use no number, share, box, pixel or mask, only words.")
    if len(sentences(text)) < 3 and facts.count != "none":
        faults.append("It is too short; write normal anatomy first, then the finding, then a conclusion.")
    if not text:
        faults.append("It is empty; write the reasoning.")
    if (words := len(text.split())) > MAX_WORDS:
        faults.append(f"It has {words} words; write at most {MAX_WORDS}.")
    claims = parse_claims(text)
    for name, true in check_claims(claims, facts).items():
        if not true:
            measured = f"measured is '{getattr(facts, name)}'" if facts.count != "none" else "there is no lesion"
            faults.append(f"It says {name} '{claims[name]}' but {measured}; correct it or leave it out.")
    if facts.count != "none" and "location" not in claims:
        faults.append(f"It does not say that the lesion lies at the '{facts.location}'; say so.")
    return faults


def parse_scores(reply: str) -> dict[str, float]:
    """A judge's scores from its reply: the first JSON object in it that has them.

    Raises:
        ValueError: With what is wrong, when there is none, or a score is not a number in 0..1.
    """
    for start in (found.start() for found in re.finditer(r"\{", reply)):
        try:
            fields, _ = json.JSONDecoder().raw_decode(reply, start)
        except (ValueError, RecursionError):
            continue
        if set(WEIGHTS) <= set(fields):
            scores = {name: fields[name] for name in WEIGHTS}
            if wrong := [name for name, x in scores.items() if type(x) not in (int, float) or not 0 <= x <= 1]:
                raise ValueError(f"'{wrong[0]}' is not a number from 0 to 1")
            return scores
    raise ValueError("there is no JSON object with " + ", ".join(WEIGHTS))


def overall_score(scores: dict[str, float]) -> float:
    """The weighted mean, 0..1; rounded, so that 0.57, 0.83 and 0.95 are 0.8 and not a little less."""
    return round(sum(weight * scores[name] for name, weight in WEIGHTS.items()), 6)
