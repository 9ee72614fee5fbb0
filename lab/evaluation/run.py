"""The evaluation loop: every record is asked once and scored; what cannot be parsed is a failure, never skipped."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pandas as pd
from tqdm import tqdm

from lab.data.facts import measure
from lab.data.images import load_sample
from lab.data.reasoning import check_claims, parse_claims
from lab.data.sample import Record, Sample, lesion_boxes
from lab.evaluation.metrics import box_f1, calibration_error, mask_scores
from lab.model.answer import parse
from lab.model.core_seg import Prediction
from lab.model.segmenter import Segmenter

Predict = Callable[[list[np.ndarray], list[str]], list[Prediction]]


def evaluate(predict: Predict, records: list[Record], max_boxes: int, swapped: bool = False, batch_size: int = 16):
    """Ask a model about every record and score the answers at the size of the original image.

    Args:
        predict: Images (H, W, 3) uint8 and queries to predictions, as `CoreSeg.predict`.
        records: What to ask.
        max_boxes: True boxes are the largest this many, as in the answers that were learnt.
        swapped: Ask each record with the query of `partner`, and score against its own mask: the lower, the more the
            query matters. Records without a partner are left out.
        batch_size: Images at once.

    Returns:
        A frame with one row a record: `id`, `group`, `source`, `modality`, `anatomy`, `query`, `text`, `problem`, those
        of `mask_scores`, `failed`, `calibration_error`, `box_f1`, `claims`, `claims_true`, the same of the draft as
        `drafted` and `drafted_true`, and `seconds`.
    """
    asked = partners(records) if swapped else [(record, record.query) for record in records]
    rows = []
    for start in tqdm(range(0, len(asked), batch_size), desc="evaluating", unit="batch"):
        batch = asked[start : start + batch_size]
        samples = [load_sample(record) for record, _ in batch]
        predictions = predict([sample.image for sample in samples], [query for _, query in batch])
        rows += [score(*row, max_boxes) for row in zip(samples, [query for _, query in batch], predictions)]
    return pd.DataFrame(rows)


def partners(records: list[Record]) -> list[tuple[Record, str]]:
    """Each record with the query of the next record on the same image whose mask is another and not empty."""
    by_image: dict = defaultdict(list)
    for record in records:
        by_image[record.image].append(record)
    pairs = []
    for group in by_image.values():
        for place, record in enumerate(group):
            others = [*group[place + 1 :], *group[:place]]
            other = next((o for o in others if o.lesion != "none" and _differ(record, o)), None)
            if other and record.lesion != "none":
                pairs.append((record, other.query))
    return pairs


def _differ(record: Record, other: Record) -> bool:
    return not np.array_equal(load_sample(record).mask, load_sample(other).mask)


def score(sample: Sample, query: str, prediction: Prediction, max_boxes: int) -> dict:
    """One row of the frame; an invalid answer scores Dice 0 whatever was drawn, or declared empty, with it."""
    scores = mask_scores(prediction.mask, sample.mask)
    if not prediction.has_mask:
        scores = dict.fromkeys(scores, 0.0) | {"hd95": float(np.hypot(*sample.mask.shape))}
    facts, truth = measure(sample.image, sample.mask), lesion_boxes(sample.mask, max_boxes)
    checked = check_claims(parse_claims(prediction.answer.reasoning), facts)
    draft = parse(prediction.draft, 1).reasoning if prediction.draft else prediction.answer.reasoning
    drafted = check_claims(parse_claims(draft), facts)
    return about(sample.record) | {
        "query": query,
        "text": prediction.text,
        "problem": prediction.answer.problem,
        **scores,
        "failed": scores["dice"] == 0,
        "calibration_error": calibration_error(prediction.probability, sample.mask),
        "box_f1": box_f1(prediction.boxes, truth, prediction.answer.flat) if prediction.has_mask else 0.0,
        "claims": len(checked),
        "claims_true": sum(checked.values()),
        "drafted": len(drafted),
        "drafted_true": sum(drafted.values()),
        "seconds": round(prediction.seconds, 4),
    }


def evaluate_boxes(segmenter: Segmenter, records: list[Record]) -> pd.DataFrame:
    """Stage 0: the true box of every lesion is given, the union of masks is scored; rows as `evaluate`, less text."""
    rows = []
    for record in tqdm(records, desc="evaluating with true boxes", unit="image"):
        sample = load_sample(record)
        scores = mask_scores(segmenter.segment_boxes(sample.image, lesion_boxes(sample.mask)), sample.mask)
        rows.append(about(record) | scores | {"failed": scores["dice"] == 0})
    return pd.DataFrame(rows)


def about(record: Record) -> dict:
    """The columns by which rows are grouped."""
    return {name: getattr(record, name) for name in ("id", "group", "source", "modality", "anatomy")}
