"""What the lab shows of an answer, as HTML and pictures made by pure functions.

A viewer holds an image and all of its layers (mask, contour, errors, difference, what was noticed, attention, boxes);
which one is seen, how strongly, and the zoom are attributes of the page that `assets/lab.js` sets, so that one click
changes all columns.
"""

import base64
import difflib
import html
from collections.abc import Iterable
from dataclasses import dataclass, field

import cv2
import matplotlib
import numpy as np
import plotly.graph_objects as go

from lab.data.facts import Facts
from lab.data.reasoning import find_claims, sentences
from lab.data.sample import lesion_boxes
from lab.evaluation.metrics import box_f1, mask_scores
from lab.model.core_seg import Prediction

ADDRESS = "link => link.startsWith('?') ? location.origin + location.pathname + link : link"
"""JavaScript: what a link to a view lacks that only the browser knows."""
NOTICE = "Research use only. Not a medical device. Do not upload patient data."
MISSING = {
    "noticed": "This model reads the prompt once: it notices nothing before it speaks",
    "errors": "The truth of this image is not known",
    "difference": "This is the first: others are compared with it",
}
"""What is said in place of a layer that there is none of."""
SHOWN_SIDE = 768
"""Pixels of the longer side of what is sent to the browser."""
MASK, TRUTH, HIT, ALARM, MISSED = (255, 80, 70), (60, 220, 90), (60, 200, 90), (255, 80, 70), (60, 130, 255)
"""RGB: the model's mask; the true one; true positives, false positives and false negatives."""
BOX, MINE, ONLY_FIRST = (255, 215, 0), (255, 190, 0), (190, 90, 255)
"""RGB: boxes in an answer; what only its mask has, and what only the first one's has."""
VIEWS = {
    "overlay": ("Overlay", {"mask": MASK}),
    "contour": ("Contour", {"mask": MASK, "true mask": TRUTH}),
    "errors": ("Errors", {"true positive": HIT, "false positive": ALARM, "missed": MISSED}),
    "difference": ("Difference to the first", {"only in this mask": MINE, "only in the first": ONLY_FIRST}),
    "noticed": ("What it noticed first", {"the brighter, the surer": (252, 165, 10)}),
    "attention": ("Where the prompt looks", {"the brighter, the more": (252, 165, 10)}),
    "off": ("Off", {}),
}
"""What can be drawn over an image: its name on the page, and what its colours mean."""


@dataclass
class Shown:
    """One answer with all that is known about it."""

    name: str
    prediction: Prediction
    attention: np.ndarray
    """(H, W), 0..1."""
    truth: np.ndarray | None = None
    """(H, W) bool, where it is known."""
    facts: Facts | None = None
    max_boxes: int = 5
    other: np.ndarray | None = None
    """(H, W) bool, the mask of the first model, to tell the difference from."""
    scores: dict[str, float] = field(default_factory=dict)
    noticed: np.ndarray | None = None
    """(H, W) uint8, before a word was written; None of a model that does not notice."""


def data_uri(pixels: np.ndarray, side: int = SHOWN_SIDE) -> str:
    """Pixels (H, W, 3 or 4) uint8 RGB or RGBA as a PNG to put into HTML, its longer side at most `side` pixels."""
    scale = min(1.0, side / max(pixels.shape[:2]))
    if scale < 1:
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    code = cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR
    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", cv2.cvtColor(pixels, code))[1]).decode()


def area(mask: np.ndarray, colour: tuple[int, int, int], alpha: int = 255) -> np.ndarray:
    """(H, W, 4) uint8: the colour where the mask is."""
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = (*colour, alpha)
    return layer


def outline(mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(H, W, 4) uint8: the border of the mask, about 1 in 250 of the image wide."""
    layer = np.zeros((*mask.shape, 4), np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(layer, contours, -1, (*colour, 255), max(1, round(max(mask.shape) / 250)))
    return layer


def errors(mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8: true positives, false positives and false negatives in their colours."""
    return area(mask & truth, HIT) + area(mask & ~truth, ALARM) + area(~mask & truth, MISSED)


def difference(mask: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8: what only this mask has, and what only the other has."""
    return area(mask & ~other, MINE) + area(other & ~mask, ONLY_FIRST)


def heat(weights: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 of weights in 0..1."""
    layer = (matplotlib.colormaps["inferno"](weights) * 255).astype(np.uint8)
    layer[..., 3] = (255 * np.clip(weights, 0, 1) ** 0.5).astype(np.uint8)
    return layer


def box_svg(boxes: np.ndarray, colour: tuple[int, int, int], dashed: bool = False) -> str:
    """SVG rectangles of boxes (N, 4) xyxy in pixels."""
    style = 'stroke-dasharray="6 4" ' if dashed else ""
    return "".join(
        f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" fill="none" '
        f'stroke="rgb{colour}" {style}stroke-width="2" vector-effect="non-scaling-stroke"/>'
        for x1, y1, x2, y2 in boxes.tolist()
    )


def viewer(image: np.ndarray, shown: Shown | None = None, label: str = "image") -> str:
    """HTML of an image (H, W, 3) uint8 with the layers of an answer about it."""
    height, width = image.shape[:2]
    layers, rects = {}, ""
    if shown:
        mask = shown.prediction.mask
        layers["overlay"] = area(mask, MASK)
        layers["contour"] = outline(mask, MASK)
        layers["attention"] = heat(shown.attention)
        if shown.noticed is not None:
            layers["noticed"] = heat(shown.noticed / 255)
        if shown.truth is not None:
            layers["errors"] = errors(mask, shown.truth)
            layers["truth"] = outline(shown.truth, TRUTH)
            rects += box_svg(lesion_boxes(shown.truth, shown.max_boxes), TRUTH, dashed=True)
        if shown.other is not None:
            layers["difference"] = difference(mask, shown.other)
        rects += box_svg(shown.prediction.boxes, BOX)
    pictures = "".join(f'<img class="layer {name}" src="{data_uri(p)}" alt="">' for name, p in layers.items())
    pictures += "".join(f'<p class="layer no-{n}">{w}</p>' for n, w in MISSING.items() if shown and n not in layers)
    shape = f"aspect-ratio:{width}/{height};max-width:calc(56vh * {width} / {height})"
    return (
        f'<div class="stage" tabindex="0" role="img" aria-label="{html.escape(label)}" style="{shape}">'
        f'<div class="pan"><img src="{data_uri(image)}" alt="">{pictures}'
        f'<svg class="layer boxes" viewBox="0 0 {width} {height}">{rects}</svg></div></div>'
    )


def state(prediction: Prediction) -> str:
    """A banner where there is no usable mask; empty where there is one."""
    if not prediction.has_mask:
        problem = html.escape(prediction.answer.problem or "no <seg> token, so no mask was drawn")
        return f'<div class="banner bad">INVALID ANSWER: {problem} (it counts as no mask)</div>'
    if prediction.answer.says_empty:
        return '<div class="banner none">The answer says that there is no such lesion; the mask is empty</div>'
    if not prediction.mask.any():
        return '<div class="banner bad">EMPTY MASK although boxes were named</div>'
    return ""


def reasoning(text: str, facts: Facts | None = None) -> str:
    """An answer, finished or not, as HTML: each step in its colour, each claim marked.

    Args:
        text: What the model has written so far.
        facts: Measured on the true mask: claims are confirmed or refuted; None: they cannot be checked.
    """
    before, _, rest = text.partition("<think>")
    thought, closed, tail = rest.partition("</think>")
    said = tail.replace("<answer>", "").replace("</answer>", "").strip()
    marks = {claim.start: (claim, verdict(claim, facts)) for claim in find_claims(thought)} if closed else {}
    spans = sentences(thought)
    parts = [f'<span class="stray">{html.escape(before.strip())}</span>'] if before.strip() else []
    for place, (start, end) in enumerate(spans):
        step = "normal" if place == 0 and len(spans) > 1 else "finding"
        step = "conclusion" if closed and place == len(spans) - 1 and place > 1 else step
        parts.append(f'<span class="step {step}" title="{step}">{_marked(thought, start, end, marks)}</span>')
    if said:
        parts.append(f'<div class="step answer" title="answer">{html.escape(said)}</div>')
    return f'<div class="reasoning">{" ".join(parts)}</div>'


def draft(prediction: Prediction) -> str:
    """What became of the model's own words when its mask was measured; empty where nothing did."""
    if not prediction.draft:
        return ""
    summary = "the draft, before it was read again beside its mask"
    return f"<details><summary>{summary}</summary>{changes(prediction.draft, prediction.text)}</details>"


def verdict(claim, facts: Facts | None) -> str:
    """`confirmed`, `refuted` or `unchecked`."""
    if facts is None:
        return "unchecked"
    return "confirmed" if getattr(facts, claim.name) == claim.says else "refuted"


def _marked(text: str, start: int, end: int, marks: dict) -> str:
    pieces, at = [], start
    for place in sorted(p for p in marks if start <= p < end):
        claim, found = marks[place]
        if claim.start < at:
            continue  # it overlaps the one before
        words = html.escape(text[claim.start : claim.end])
        pieces.append(html.escape(text[at : claim.start]))
        pieces.append(f'<mark class="{found}" title="{claim.name}: {found}">{words}</mark>')
        at = claim.end
    return "".join([*pieces, html.escape(text[at:end])])


def score(prediction: Prediction, truth: np.ndarray, max_boxes: int) -> dict[str, float]:
    """Dice, IoU, NSD, lesion and box F1 of an answer; 0 for an invalid one."""
    names = {"dice": "Dice", "iou": "IoU", "nsd": "NSD", "lesion_f1": "lesion F1"}
    if not prediction.has_mask:
        return dict.fromkeys([*names.values(), "box F1"], 0.0)
    scores = mask_scores(prediction.mask, truth)
    boxes = box_f1(prediction.boxes, lesion_boxes(truth, max_boxes), prediction.answer.flat)
    return {label: scores[name] for name, label in names.items()} | {"box F1": boxes}


def figures(prediction: Prediction, scores: dict[str, float]) -> str:
    """The line of numbers under an answer."""
    numbers = {name: f"{value:.3f}" for name, value in scores.items()}
    flat = f" and {prediction.answer.flat} without area" if prediction.answer.flat else ""
    numbers |= {"area": f"{prediction.mask.mean():.1%}", "boxes": f"{len(prediction.boxes)}{flat}"}
    numbers |= {"tokens": str(prediction.tokens), "time": f"{prediction.seconds:.2f} s"}
    return '<p class="figures">' + "".join(f"<span>{k} <b>{v}</b></span>" for k, v in numbers.items()) + "</p>"


def changes(old: str, new: str) -> str:
    """Word by word, what was struck out of an answer and what was put in."""
    words = old.split(), new.split()
    pieces = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(html.escape(" ".join(words[0][a:b])))
        else:
            pieces += [f"<del>{html.escape(' '.join(words[0][a:b]))}</del>"] if b > a else []
            pieces += [f"<ins>{html.escape(' '.join(words[1][c:d]))}</ins>"] if d > c else []
    return f'<div class="reasoning">{" ".join(pieces)}</div>'


def short(name: str) -> str:
    """A name without its middle where it would leave its axis or column."""
    return f"{name[:16]}…{name[-23:]}" if len(name) > 40 else name


def plain(figure: go.Figure) -> go.Figure:
    """A chart that reads on a light and on a dark page."""
    figure.update_xaxes(gridcolor="rgba(127,127,127,0.25)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(127,127,127,0.25)", zeroline=False)
    return figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(127,127,127,0.06)", font={"color": "#808890"}
    )


def toolbar(names: Iterable[str]) -> str:
    """Buttons that choose what is drawn over all images, of these `VIEWS`; pressed at first is the overlay."""
    buttons = "".join(
        f'<button type="button" data-view-button="{name}" aria-pressed="{str(name == "overlay").lower()}">'
        f"{VIEWS[name][0]}</button>"
        for name in names
    )
    return (
        f'<div class="views" role="toolbar" aria-label="What is drawn over the images">{buttons}'
        '<label>opacity <input type="range" min="0" max="1" step="0.05" value="0.45" data-opacity></label>'
        '<label><input type="checkbox" checked data-toggle="boxes"> boxes</label>'
        '<button type="button" data-zoom="1.25" aria-label="Zoom in">+</button>'
        '<button type="button" data-zoom="0.8" aria-label="Zoom out">−</button>'
        '<button type="button" data-reset>Reset zoom</button>'
        "<small>wheel zooms all columns, drag moves them; keys + - 0 and arrows</small></div>"
    )


def legend(truth: bool) -> str:
    """What the colours mean; those over an image, of the view that is chosen alone.

    Args:
        truth: Whether that of an image may be known.
    """
    items = ("normal", "normal anatomy"), ("finding", "finding"), ("conclusion", "conclusion"), ("answer", "answer")
    marks = [("confirmed", "claim, true"), ("refuted", "claim, false")] if truth else []
    marks.append(("unchecked", "claim, truth not known"))
    spans = [f'<span class="step {name}">{words}</span>' for name, words in items]
    spans += [f'<mark class="{name}">{words}</mark>' for name, words in marks]
    for view, (_, colours) in VIEWS.items():
        spans += [swatch(w, c, f"of {view}") for w, c in colours.items() if truth or c != TRUTH]
    spans.append(swatch("box in the answer", BOX, "outlined"))
    if truth:
        spans.append(swatch("true box", TRUTH, "outlined dashed"))
    return f'<div class="legend">{" ".join(spans)}</div>'


def swatch(words: str, colour: tuple[int, int, int], kinds: str) -> str:
    return f'<span class="swatch {kinds}" style="--c:rgb{colour}">{words}</span>'
