"""Chain of thought written from measured facts, and read back into claims that can be checked against them."""

import re
from dataclasses import asdict, dataclass

import numpy as np

from lab.data.facts import Facts

CLAIMS = ("location", "size", "contrast", "margin", "shape", "count")

NORMAL = (
    "The {anatomy} looks as expected in most of this {modality} image.",
    "Most of the {anatomy} in this {modality} image keeps its usual pattern.",
    "This {modality} image shows the {anatomy}, and its usual texture is kept in most places.",
)
FINDING = (
    "A {size} area at the {location} departs from it: {contrast}.",
    "At the {location} a {size} region stands out, {contrast}.",
    "What breaks the pattern lies at the {location}: a {size} region, {contrast}.",
)
CONTRAST = {
    "much darker": "much darker than its surround",
    "darker": "darker than its surround",
    "similar": "similar in tone to its surround",
    "brighter": "brighter than its surround",
    "much brighter": "much brighter than its surround",
}
OUTLINE = (
    "Its outline is {shape} and its margin {margin}.",
    "The shape is {shape}, with a {margin} margin.",
    "It has a {margin} margin and an outline that is {shape}.",
)
COUNT = {
    "single": "It is a single lesion.",
    "two": "There are two such places.",
    "several": "There are several such places.",
    "many": "There are many such places.",
}
CONCLUSION = ("This fits {lesion}.", "Taken together this suggests {lesion}.", "The finding agrees with {lesion}.")
NOTHING = (
    "Nothing here departs from normal.",
    "No area stands out from its surround.",
    "No part of it fits what is asked for.",
)

_PATTERNS = {
    "location": r"\b(?:(?:upper|middle|lower|top|bottom)[ -])?(?:left|centre|center|right)\b",
    "size": r"\b(?:tiny|small|medium|large)\b",
    "contrast": r"\b(?:(?:much )?(?:darker|brighter)|similar)\b",
    "margin": r"\b(?:sharp|blurred|well[ -]defined|ill[ -]defined)\b",
    "shape": r"\b(?:round|oval|irregular)\b",
    "count": r"\b(?:single|two|several|many)\b",
}
_SYNONYMS = {"top": "upper", "bottom": "lower", "center": "centre", "well": "sharp", "ill": "blurred"}


def write(facts: Facts, modality: str, anatomy: str, lesion: str, rng: np.random.Generator) -> str:
    """Reasoning in the paper's order: normal anatomy, what departs from it, conclusion; no coordinates.

    Args:
        facts: Measured on image and mask; a count of "none" gives reasoning that finds nothing.
        modality: Such as "ultrasound".
        anatomy: Such as "breast".
        lesion: Such as "benign breast tumour"; unused where there is none.
        rng: Picks the phrasing.
    """
    if facts.count == "none":
        sentences = [_pick(NORMAL, rng), _pick(NOTHING, rng)]
    else:
        sentences = [_pick(NORMAL, rng), _pick(FINDING, rng), _pick(OUTLINE, rng), COUNT[facts.count]]
        sentences.append(_pick(CONCLUSION, rng))
    words = asdict(facts) | {"contrast": CONTRAST.get(facts.contrast, "")}
    return " ".join(sentences).format(**words | {"modality": modality, "anatomy": anatomy, "lesion": lesion})


def _pick(phrasings: tuple[str, ...], rng: np.random.Generator) -> str:
    return phrasings[rng.integers(len(phrasings))]


def write_claims(claims: dict[str, str]) -> list[str]:
    """Sentences that claim some of the facts, one phrasing each; of what is not given, nothing is said."""
    article = "A" if "size" in claims else "An"
    finding = " ".join([article, *([claims["size"]] if "size" in claims else []), "area"])
    finding += f" at the {claims['location']}" if "location" in claims else ""
    finding += " departs from it" + (f": {CONTRAST[claims['contrast']]}." if "contrast" in claims else ".")
    outline = {name: claims[name] for name in ("shape", "margin") if name in claims}
    outlines = {
        ("shape", "margin"): "Its outline is {shape} and its margin {margin}.",
        ("shape",): "Its outline is {shape}.",
        ("margin",): "Its margin is {margin}.",
    }
    count = [COUNT[claims["count"]]] if "count" in claims else []
    return [finding, *([outlines[tuple(outline)].format(**outline)] if outline else []), *count]


@dataclass(frozen=True)
class Claim:
    """What a reasoning says of one fact, and where: `text[start:end]`."""

    name: str
    """Of the fact, one of `CLAIMS`."""
    says: str
    """In the words of `Facts`."""
    start: int
    end: int


def sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text start and end."""
    return [found.span() for found in re.finditer(r"\S.*?(?:[.!?](?=\s|$)|$)", text, re.DOTALL)]


def find_claims(text: str) -> list[Claim]:
    """What a reasoning claims about location, size, contrast, margin, shape and count.

    Any text is taken; the first mention of each fact counts. The first sentence is about normal anatomy and the last
    one names the lesion, so that their words are read only when they stand alone.
    """
    spans = sentences(text)
    body = spans[1:-1] if len(spans) > 2 else spans
    claims = []
    for name, pattern in _PATTERNS.items():
        found = re.compile(pattern, re.IGNORECASE).search(text, body[0][0], body[-1][1]) if body else None
        if found:
            words = [_SYNONYMS.get(word, word) for word in re.split(r"[ -]", found.group().lower())]
            says = " ".join(word for word in words if word not in ("middle", "defined"))
            claims.append(Claim(name, says, *found.span()))
    return claims


def parse_claims(text: str) -> dict[str, str]:
    """The claims of `find_claims`, by the name of the fact; one that is not mentioned has no entry."""
    return {claim.name: claim.says for claim in find_claims(text)}


def check_claims(claims: dict[str, str], facts: Facts) -> dict[str, bool]:
    """Each claim against the measured fact, to the word: a neighbouring bin is refuted."""
    return {name: getattr(facts, name) == claim for name, claim in claims.items() if name in CLAIMS}


def mirror(text: str) -> str:
    """Swap left and right, leftmost and rightmost, as a horizontal flip of the image does."""
    pairs = [("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")]
    swap = dict(pairs) | {right: left for left, right in pairs}
    pattern = rf"\b(?:{'|'.join(swap)})(?=(?:-?most|wards?)?\b)"
    return re.sub(pattern, lambda found: swap[found.group()], text)
