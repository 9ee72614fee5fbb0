"""Without these an answer that fails could vanish from the score, or the swapped query could be scored wrongly."""

import json

import numpy as np

from lab.data.images import read_mask
from lab.data.manifest import read_manifest
from lab.data.reason import write_reason
from lab.data.sample import lesion_boxes
from lab.evaluation.metrics import summarise
from lab.evaluation.report import draw_cases, write_report
from lab.evaluation.run import evaluate, partners
from lab.model.answer import parse, render
from lab.model.core_seg import Prediction


def says(image, mask, text=None):
    height, width = mask.shape
    text = text or render("A dark area.", "cyst", lesion_boxes(mask) / [width, height, width, height], 100)
    answer = parse(text, 100)
    boxes = answer.boxes_norm * [width, height, width, height]
    return Prediction(text, answer, boxes, mask, mask.astype(np.float32), answer.valid, 0.1, 9)


def test_a_perfect_model_scores_one_and_an_invalid_answer_is_never_skipped(manifest):
    records = read_manifest(manifest)
    truths = iter([read_mask(record.mask) for record in records])
    frame = evaluate(lambda images, queries: [says(i, next(truths)) for i in images], records, 5, batch_size=4)
    assert (frame.dice == 1).all() and not frame.failed.any() and (frame.box_f1 > 0).all()
    truths = iter([read_mask(record.mask) for record in records])
    frame = evaluate(lambda images, queries: [says(i, next(truths), "no idea") for i in images], records, 5)
    assert len(frame) == len(records) and frame.failed.all() and (frame.dice == 0).all()


def test_the_swapped_query_is_another_lesion_of_the_same_image(tmp_path):
    records = read_manifest(write_reason(tmp_path, 4, seed=5))
    mask_of_query = {(record.image, record.query): read_mask(record.mask) for record in records}
    pairs = partners(records)
    assert pairs
    for record, query in pairs:
        assert query != record.query and mask_of_query[record.image, query].any()

    def heeds(images, queries):  # a model that does as it is told
        found = []
        for image, query in zip(images, queries):
            masks = [mask for (path, asked), mask in mask_of_query.items() if asked == query and same(path, image)]
            found.append(says(image, masks[0]))
        return found

    def same(path, image):
        from lab.data.images import read_image

        return np.array_equal(read_image(path), image)

    right, swapped = evaluate(heeds, records, 5), evaluate(heeds, records, 5, swapped=True)
    assert right.dice.mean() == 1 and swapped.dice.mean() < 0.6


def test_the_report_holds_the_json_of_the_issue_and_pictures(manifest, tmp_path):
    records = read_manifest(manifest)
    truths = {record.id: read_mask(record.mask) for record in records}
    order = iter(truths.values())
    frame = evaluate(lambda images, queries: [says(i, next(order)) for i in images], records, 5)
    out = tmp_path / "out"
    write_report(out, {"model": "m"} | summarise(frame), frame)
    draw_cases(out, frame, records, lambda record, query: truths[record.id])
    written = json.loads((out / "evaluation.json").read_text())
    assert set(written["overall"]) >= {"mDice", "mDice_ci", "mIoU", "failure_rate", "box_f1", "n"}
    assert set(written["by"]) == {"source", "modality", "anatomy"}
    assert "Not a medical device" in (out / "evaluation.md").read_text()
    assert (out / "worst.webp").read_bytes()[8:12] == b"WEBP"
    assert (out / "cases.png").stat().st_size > 10_000 and len((out / "cases.csv").read_text().splitlines()) == 7
