"""What is sent to a multimodal model: first describe, then reason (CORE-Seg, VQA and CoT generation), then judge."""

import base64

import cv2
import numpy as np

from lab.data.facts import COLUMNS, ROWS, Facts
from lab.data.quality import MAX_WORDS, PASS_SCORE, WEIGHTS
from lab.data.reasoning import CLAIMS
from lab.data.sample import Record, Sample, lesion_boxes

MAX_SIDE = 1024
"""Of the images that are sent, in pixels; larger ones are scaled down."""
MAX_BOXES = 10

DESCRIBE = """You are a radiologist who describes a de-identified image of a public research data set.
The second picture is the mask of the lesion (white), drawn by experts.
First describe the normal anatomy that is visible, then the lesion's characteristics: where it lies, its size, its tone
against the surround, its outline and margin, how many there are. Left and right are those of the picture. Plain text,
no list, at most {words} words."""
REASON = """You are a radiologist who thinks aloud while looking for a lesion in a de-identified research image.
You know no mask. Write one paragraph of four to six sentences, at most {words} words:
first a sentence about the normal anatomy; then where something departs from it and why it stands out; its size, outline
and margin; how many there are; last a sentence that names the lesion as the conclusion.
Say the place in words only ({places}; left and right are those of the picture). Write no digit, coordinate, percentage,
fraction, box, pixel, mask or annotation. Plain text, no list."""
REASON_NONE = """You are a radiologist who thinks aloud while looking for a lesion in a de-identified research image
that does not show it. Write two or three sentences, at most {words} words: first about the normal anatomy, last that
nothing departs from it. Give no place, size, shape, margin, tone or number. Plain text, no list."""
JUDGE = """You review the reasoning that another model wrote about a medical image. The second picture is the true mask
of the lesion (white). Score from 0 to 1: normal_anatomy (is the normal anatomy described, and rightly?),
lesion_characteristics (is the lesion described, and rightly?), reasoning_logic (does the reasoning lead from what is
seen to the conclusion?). Reply with one JSON object and nothing else:
{{"normal_anatomy": 0.0, "lesion_characteristics": 0.0, "reasoning_logic": 0.0, "comment": "what to mend"}}"""


def describe_messages(sample: Sample, facts: Facts) -> list[dict]:
    """Step one: image, mask, modality, anatomy, class name, boxes and what was measured."""
    image = _scaled(sample.image, cv2.INTER_AREA)
    mask = _scaled(sample.mask.astype(np.uint8) * 255, cv2.INTER_NEAREST)
    boxes = lesion_boxes(mask > 0, MAX_BOXES).astype(int).tolist()
    where = f"Boxes (x1, y1, x2, y2 in pixels): {boxes}" if boxes else "There is no lesion; the mask is empty."
    about = f"{_metadata(sample.record)}\n{where}\n{_measured(facts)}"
    return _messages(DESCRIBE.format(words=MAX_WORDS), about, image, mask)


def reason_messages(sample: Sample, facts: Facts, description: str) -> list[dict]:
    """Step two: image and description without mask or boxes, so that there are no coordinates to repeat."""
    places = ", ".join(column if row == "middle" else f"{row} {column}" for row in ROWS for column in COLUMNS)
    asked = REASON_NONE if facts.count == "none" else REASON
    about = f"{_metadata(sample.record)}\n{_measured(facts)}\nDescription: {description}"
    return _messages(asked.format(words=MAX_WORDS, places=places), about, _scaled(sample.image, cv2.INTER_AREA))


def judge_messages(sample: Sample, facts: Facts, reasoning: str) -> list[dict]:
    """The judge sees image, mask, names, what was measured, and the reasoning."""
    image = _scaled(sample.image, cv2.INTER_AREA)
    mask = _scaled(sample.mask.astype(np.uint8) * 255, cv2.INTER_NEAREST)
    about = f"{_metadata(sample.record)}\n{_measured(facts)}\nReasoning to review: {reasoning}"
    return _messages(JUDGE.format(), about, image, mask)


def again(messages: list[dict], reply: str, faults: list[str]) -> list[dict]:
    """A conversation goes on: the reply, what was wrong with it, and that it is to be written anew."""
    said = {"role": "assistant", "content": reply or "(nothing)"}
    return [*messages, said, {"role": "user", "content": "Write it again, all of it. " + " ".join(faults)}]


def low_score(score: float, scores: dict[str, float], comment: str) -> str:
    """What the author is told when the judge is not content."""
    parts = ", ".join(f"{name.replace('_', ' ')} {scores[name]:g}" for name in WEIGHTS)
    return f"A reviewer scored it {score:g}, below {PASS_SCORE:g} ({parts}). The review: {comment[:500]}"


def _metadata(record: Record) -> str:
    return f"Modality: {record.modality}\nAnatomy: {record.anatomy}\nLesion: {record.lesion}\nQuery: {record.query}"


def _measured(facts: Facts) -> str:
    if facts.count == "none":
        return "Measured: no lesion"
    return "Measured: " + ", ".join(f"{name} {getattr(facts, name)}" for name in CLAIMS)


def _messages(system: str, text: str, *pictures: np.ndarray) -> list[dict]:
    parts = [{"type": "text", "text": text}]
    for picture in pictures:
        png = cv2.imencode(".png", picture[..., ::-1] if picture.ndim == 3 else picture)[1]
        url = "data:image/png;base64," + base64.b64encode(png).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}]


def _scaled(picture: np.ndarray, interpolation: int) -> np.ndarray:
    height, width = picture.shape[:2]
    scale = MAX_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(picture, size, interpolation=interpolation) if scale < 1 else picture
