"""Reasoning influence: does the mask move when the reasoning says that the lesion lies elsewhere?"""

import pandas as pd
from tqdm import tqdm

from lab.data.images import load_sample
from lab.data.reasoning import NORMAL, find_claims, sentences
from lab.data.sample import Record
from lab.evaluation.metrics import dice_iou
from lab.model.answer import parse
from lab.model.core_seg import CoreSeg

OPPOSITE = {"left": "right", "right": "left", "upper": "lower", "lower": "upper", "centre": "upper left"}


def moved_claim(text: str) -> str | None:
    """A valid answer whose reasoning claims the opposite location, all else as it was; None without one."""
    start, stop = text.find("<think>") + len("<think>"), text.find("</think>")
    claim = next((claim for claim in find_claims(text[start:stop]) if claim.name == "location"), None)
    if claim is None:
        return None
    words = claim.says.split()
    elsewhere = " ".join(OPPOSITE[word] for word in words if word != "centre" or len(words) == 1)
    elsewhere += " centre" if len(words) == 2 and "centre" in words else ""
    return text[: start + claim.start] + elsewhere + text[start + claim.end :]


def reworded(text: str, record: Record) -> str:
    """An answer whose first sentence, about normal anatomy, is put in other words: a change without a claim."""
    start, stop = text.find("<think>") + len("<think>"), text.find("</think>")
    begin, end = sentences(text[start:stop])[0]
    said = text[start + begin : start + end]
    others = [normal.format(anatomy=record.anatomy, modality=record.modality) for normal in NORMAL]
    other = next(sentence for sentence in others if sentence != said)
    return text[: start + begin] + other + text[start + end :]


def reasoning_influence(model: CoreSeg, records: list[Record], texts: list[str], batch_size: int = 16) -> pd.Series:
    """How much further the mask moves for a moved claim than for other words, by record id.

    `Dice(mask, mask of the reworded answer) - Dice(mask, mask of the moved claim)`, -1..1: above 0, what the reasoning
    says of the location has weight of its own, for the boxes in the answer stay as they were. Records whose answer
    draws no mask or claims no location are left out: there is nothing to move.

    Args:
        model: That wrote the answers.
        records: What was asked, with their own queries.
        texts: The answers.
        batch_size: Images at once.
    """
    answers = [parse(text, model.config.reasoner.grid) for text in texts]
    asked = [
        (record, text, moved)
        for record, text, answer in zip(records, texts, answers)
        if answer.valid and not answer.says_empty and (moved := moved_claim(text))
    ]
    influence = {}
    for place in tqdm(range(0, len(asked), batch_size), desc="moving claims", unit="batch"):
        batch = asked[place : place + batch_size]
        scene = model.open([load_sample(record).image for record, *_ in batch], [record.query for record, *_ in batch])
        versions = zip(*((text, moved, reworded(text, record)) for record, text, moved in batch))
        masks = [[prediction.mask for prediction in model.segment_text(scene, list(said))] for said in versions]
        for (record, *_), mask, far, near in zip(batch, *masks):
            if mask.any():
                influence[record.id] = dice_iou(mask, near)[0] - dice_iou(mask, far)[0]
    return pd.Series(influence, dtype=float)
