"""Text that gives a lesion's place away in numbers: taken out where that can be done, and found where it is left.

A chain of thought with coordinates is a shortcut: the mask could be read from the text without looking at the image.
Places in words ("upper left") are wanted.
"""

import re
import unicodedata
from collections.abc import Iterable

_BRACKETS = re.compile(r"[\[({][^\[\](){}]*[\])}]|<\|?/?(?:box|bbox|quad|ref|point|loc)[^<>]*>")
_IN_BRACKETS = {"", "x", "y", "w", "h", "px", "pixel", "pixels", "to", "and"}
_LEAD = (
    r"(?:\b(?:at|in|within|inside|near|around|by|with|from|to|and|the|approximately|about|roughly|coordinates?"
    r"|pixels?|position|points?|bounding|box|boxes|bbox)\b[\s:=]*)*"
)
_CUT = "\0"

_ONES = "one|two|three|four|five|six|seven|eight|nine"
_TENS = (
    "zero|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty"
    "|sixty|seventy|eighty|ninety|hundred|thousand"
)
_PARTS = "half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?"
_GIVEN_AWAY = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\S*[\[\]{}<>|%=]\S*",
        r"\bper\s?cent(?:age)?s?\b",
        rf"\b(?:{_TENS})s?\b",
        rf"\b(?:{_ONES})(?:[\s,-]+(?:point[\s-]+)?(?:{_ONES}))+\b",
        rf"\b(?:{_ONES}|half|quarter)\b[\s-]+(?:pixels?|mm|cm|millimet\w+|centimet\w+|units?)\b",
        rf"\b(?:a|an|{_ONES})[\s-]+(?:{_PARTS})\b",
        r"\b(?:half|mid)[\s-]?way\b",
        rf"\b(?:rows?|columns?|cells?)\s+(?:{_ONES})\b",
        r"\bo['’]?\s?clock\b",
        r"\b(?:co-?ordinates?|bounding[\s-]box(?:es)?|bbox(?:es)?|box(?:es)?|pixels?|px)\b",
        r"\b[xy][\s-]?(?:axis|value|position|is|equals|of)\b",
        r"\b(?:annotat\w+|ground[\s-]truth|masks?|overlays?)\b",
    )
]
_NUMERAL = re.compile(r"\S*\d\S*")
_SEQUENCE = re.compile(r"\bT[12]w?(?:-weighted)?\b", re.IGNORECASE)
"""T1 and T2 are names of MRI sequences."""
_NAME = re.compile(r"\b(?=[\w-]*[^\W\d_])[\w-]*\d[\w-]*\b")


def strip_coordinates(text: str) -> str:
    """Take bracketed numbers out, such as "at [12, 30, 80, 90]" or "(x=4, y=7)", with the words that led to them.

    Brackets that hold words, such as "(FLAIR)" or "(T1)", stay. Numbers without brackets stay too, because no rule can
    mend such a sentence: `find_coordinates` finds them.
    """
    before = None
    while before != text:
        before, text = text, _BRACKETS.sub(lambda found: _CUT if _holds_numbers(found.group()) else found.group(), text)
    text = re.sub(rf"\s*{_LEAD}{_CUT}(?:[\s,;]*(?:and\b\s*)?{_CUT})*", " ", text, flags=re.IGNORECASE)
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split()))


def _holds_numbers(brackets: str) -> bool:
    if brackets.startswith("<"):
        return True
    words = {word.lower() for word in re.findall(r"[^\W\d_]+", brackets)}
    numbers = any(letter.isnumeric() or letter == _CUT for letter in brackets)
    return numbers and words <= _IN_BRACKETS


def find_coordinates(text: str, names: Iterable[str] = ()) -> list[str]:
    """What in a text gives a place away: numerals of any script, brackets, shares, grids, number words, and talk of
    boxes, pixels or masks.

    Args:
        text: Any.
        names: Of modality, anatomy and lesion; digits in them ("COVID-19", "stage 3 ulcer") are no coordinates.

    Returns:
        The words that do, each once; none where the text may be learnt from.
    """
    plain = unicodedata.normalize("NFKC", text)
    for name in names:
        for known in (name, *_NAME.findall(name)):
            if any(letter.isdigit() for letter in known) and not known.isdigit():
                plain = re.sub(rf"(?<!\w){re.escape(known)}(?!\w)", " ", plain, flags=re.IGNORECASE)
    plain = _SEQUENCE.sub(" ", plain)
    plain = "".join("0" if letter.isnumeric() and not letter.isdecimal() else letter for letter in plain)
    found = [match.group() for pattern in (_NUMERAL, *_GIVEN_AWAY) for match in pattern.finditer(plain)]
    return list(dict.fromkeys(found))
