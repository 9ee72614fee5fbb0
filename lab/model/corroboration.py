"""An answer read again beside the mask that it drew: claims that the mask confirms stay, boxes are those of the mask.

Ours, not the paper's. Two witnesses saw the image: the language model, which wrote the claims, and the mask decoder, on
whose mask the same facts can be measured. Where they disagree, or the number is on the border between two words,
nothing is claimed.
"""

import numpy as np

from lab.data.facts import borderline, measure
from lab.data.reasoning import check_claims, parse_claims, sentences, write_claims
from lab.data.sample import lesion_boxes
from lab.model.answer import parse, render


def corroborated(text: str, image: np.ndarray, mask: np.ndarray, grid: int, max_boxes: int) -> str:
    """The answer that is left of a draft; the draft itself where it is invalid, or says or shows no lesion.

    Args:
        text: The draft.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool, what the draft drew.
        grid: Coordinates are whole numbers 0..grid.
        max_boxes: Boxes of at most this many components, the largest.
    """
    answer = parse(text, grid)
    spans = sentences(answer.reasoning)
    if not answer.valid or answer.says_empty or not mask.any() or len(spans) < 3:
        return text
    claims = parse_claims(answer.reasoning)
    facts = measure(image, mask)
    unsure = borderline(facts)
    agreed = [name for name, true in check_claims(claims, facts).items() if true and name not in unsure]
    first, last = (answer.reasoning[start:end] for start, end in (spans[0], spans[-1]))
    reasoning = " ".join([first, *write_claims({name: claims[name] for name in agreed}), last])
    height, width = mask.shape
    return render(reasoning, answer.lesion, lesion_boxes(mask, max_boxes) / ([width, height] * 2), grid)
