"""A card whose figures are not those of the records would mislead whoever decides by it to use the data."""

import json
from collections import Counter

import cv2
import numpy as np
from huggingface_hub import DatasetCard

from apps.cli import main
from lab.data.manifest import read_manifest
from lab.data.statistics import dataset_card, frame_of


def test_stats_writes_a_card_that_the_hub_reads_and_a_figure(manifest, tmp_path):
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[0] |= {"license": "CC BY-NC-SA 4.0", "reasoning": "A dark area departs from the usual pattern."}
    lines[4]["source"] = "elsewhere"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "stats", str(manifest), str(tmp_path / "out"), "--name=Six lesions"]) == 0
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.pretty_name == "Six lesions" and card.data.license == "other"
    assert card.data.size_categories == ["n<1K"] and card.data.task_categories[0] == "image-segmentation"
    splits = {split["name"]: split["num_examples"] for split in card.data.to_dict()["dataset_info"]["splits"]}
    assert splits == dict(Counter(line["split"] for line in lines))
    fractions = [line["mask_fraction"] for line in lines if line["mask_fraction"]]
    for said in (
        f"median {np.median(fractions):.2%}",
        "forbid commercial use",
        "ask for share alike",
        "| made | ultrasound | breast | 2 | 2 | 1 | CC BY-NC-SA 4.0; CC0 |",
        "| elsewhere | ultrasound | breast | 0 | 0 | 1 | CC0 |",
        "Tested on but not trained on: elsewhere",
        "benign cyst 50.0%",
        "written for 16.7% of the records, median 8 words",
        "![modality, anatomy, lesion and lesion size](distribution.png)",
    ):
        assert said in card.text, said
    assert cv2.imread(str(tmp_path / "out" / "distribution.png")).std() > 10


def test_one_open_licence_is_named_in_the_hubs_words_and_forbids_nothing(manifest):
    card = DatasetCard(dataset_card("a", frame_of(read_manifest(manifest)), "x.png"))
    assert card.data.license == "cc0-1.0" and "forbid" not in card.text


def test_a_manifest_without_any_lesion_has_a_card_too(lesion_lines, write_lines, tmp_path):
    path = write_lines([line for line in lesion_lines if line["lesion"] == "none"])
    assert main(["data", "stats", str(path), str(tmp_path / "out")]) == 0
