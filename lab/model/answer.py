"""The answer schema of the paper, rendered and parsed here and nowhere else.

<think> R </think><answer>The {lesion} are located at [[x1,y1,x2,y2],...]. The mask is <seg>.</answer>
<think> R </think><answer>No such lesion is found. The mask is empty.</answer>
"""

import re
from dataclasses import dataclass, field

import numpy as np

from lab.data.reasoning import mirror

EMPTY_ANSWER = "No such lesion is found. The mask is empty."
_BOX = r"\[\s*(\d{1,5})\s*,\s*(\d{1,5})\s*,\s*(\d{1,5})\s*,\s*(\d{1,5})\s*\]"
_FOUND = rf"The ([^\[\]<>]+) are located at \[\s*{_BOX}(?:\s*,\s*{_BOX})*\s*\]\. The mask is <seg>\."
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Answer:
    """What a completion says."""

    valid: bool
    problem: str
    """Why it is not valid, in a few words; empty when it is."""
    reasoning: str
    boxes_norm: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(N, 4) float32, xyxy as shares of width and height, 0..1; those without area are left out."""
    says_empty: bool = False
    """The answer declares that there is no lesion."""
    lesion: str = ""
    """What is said to have been found; empty where nothing is, or not in the schema's words."""
    flat: int = 0
    """How many boxes without area there were beside."""


def render(reasoning: str, lesion: str, boxes_norm: np.ndarray, grid: int) -> str:
    """Write an answer.

    Args:
        reasoning: Goes between the think tags.
        lesion: What was found; unused when there are no boxes.
        boxes_norm: (N, 4) xyxy as shares of width and height; none gives the no-lesion answer.
        grid: Coordinates are whole numbers 0..grid; a box is at least one wide and high.
    """
    if len(boxes_norm) == 0:
        return f"<think> {reasoning} </think><answer>{EMPTY_ANSWER}</answer>"
    low = np.clip(np.floor(boxes_norm[:, :2] * grid + 0.5), 0, grid - 1)
    high = np.clip(np.floor(boxes_norm[:, 2:] * grid + 0.5), low + 1, grid)
    boxes = ",".join("[" + ",".join(map(str, box)) + "]" for box in np.hstack([low, high]).astype(int).tolist())
    found = f"The {lesion} are located at [{boxes}]. The mask is <seg>."
    return f"<think> {reasoning} </think><answer>{found}</answer>"


def parse(text: str, grid: int) -> Answer:
    """Read a completion; never raises, and gives what can be read of an invalid one.

    Boxes are clipped to the grid, and those without area left are counted alone: the schema is kept, the box is wrong.
    """
    reasoning = _between(text, "<think>", "</think>")
    conclusion = _between(text, "<answer>", "</answer>")
    closing = " ".join(conclusion.split())
    says_empty, found = closing == EMPTY_ANSWER, re.fullmatch(_FOUND, closing)
    raw = np.array([[int(n) for n in box] for box in re.findall(_BOX, conclusion)], np.float64).reshape(-1, 4)
    boxes = np.clip(raw / grid, 0, 1)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
    problem = _problem(text, conclusion, reasoning, says_empty)
    lesion = found[1] if found else ""
    boxes, flat = boxes[has_area].astype(np.float32), int((~has_area).sum())
    return Answer(not problem, problem, reasoning.strip(), boxes, says_empty, lesion, flat)


def mirrored(text: str, grid: int) -> str:
    """What an answer, valid or not, says of the mirror image: sides and boxes change, all else is kept."""

    def box(found: re.Match) -> str:
        x1, y1, x2, y2 = map(int, found.groups())
        return f"[{max(0, grid - x2)},{y1},{max(0, grid - x1)},{y2}]"

    return re.sub(_BOX, box, mirror(text))


def schema_share(text: str) -> float:
    """Share of the schema's parts that a completion keeps, 0..1; 1 exactly for a valid answer (see `parse`)."""
    thought, concluded = _between(text, "<think>", "</think>"), _between(text, "<answer>", "</answer>")
    closing = " ".join(concluded.split())
    says_empty = closing == EMPTY_ANSWER
    if not _problem(text, concluded, thought, says_empty):
        return 1.0
    parts = [
        all(text.count(tag) == 1 for tag in _TAGS[:2]) and text.find("<think>") < text.find("</think>"),
        bool(thought.strip()),
        all(text.count(tag) == 1 for tag in _TAGS[2:]) and text.find("<answer>") < text.find("</answer>"),
        says_empty or re.search(rf"\[\s*{_BOX}(?:\s*,\s*{_BOX})*\s*\]", closing) is not None,
        concluded.count("<seg>") == (0 if says_empty else 1),
        says_empty or closing.endswith("The mask is <seg>."),
    ]
    return sum(parts) / (len(parts) + 1)


def _between(text: str, start: str, end: str) -> str:
    _, found, rest = text.partition(start)
    return rest.partition(end)[0] if found else ""


def _problem(text: str, conclusion: str, reasoning: str, says_empty: bool) -> str:
    for tag in _TAGS:
        if text.count(tag) != 1:
            return f"no {tag}" if tag not in text else f"more than one {tag}"
    if not re.fullmatch(r"\s*<think>[^<]*</think>\s*<answer>([^<]|<seg>)*</answer>\s*", text):
        return "text outside <think> and <answer>, or tags out of order"
    if not reasoning.strip():
        return "no reasoning"
    if says_empty:
        return ""
    segs = conclusion.count("<seg>")
    if segs != 1:
        return "no <seg>" if segs == 0 else "more than one <seg>"
    if not re.fullmatch(_FOUND, " ".join(conclusion.split())):
        return "boxes or closing sentence are not in the schema"
    return ""
