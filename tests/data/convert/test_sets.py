"""Without these a set is read wrongly, or part of it is missing and nobody is told."""

import json
import re

import pytest

from lab.data.check import check_manifest
from lab.data.convert.run import convert
from lab.data.convert.sets import SETS
from lab.data.images import read_mask
from lab.data.manifest import read_manifest
from tests.data.convert.trees import TREES, Tree


def test_every_set_has_a_tree():
    assert set(TREES) == set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_a_set_in_its_real_layout_is_converted_and_what_is_broken_is_named(tmp_path, name):
    """Masks as drawn, one sample for each lesion class, all of it in the manifest or in skipped.jsonl."""
    tree = Tree(tmp_path / "root")
    TREES[name](tree)
    summary = convert(SETS[name], tree.root, tmp_path / "out", size=0)
    records = read_manifest(tmp_path / "out/manifest.jsonl")
    assert check_manifest(tmp_path / "out/manifest.jsonl", 1).problems == []
    assert {(record.id, record.lesion) for record in records} == set(tree.masks)
    for record in records:
        assert (read_mask(record.mask) == tree.masks[record.id, record.lesion]).all(), record.id
        named = record.lesion.removeprefix("malignant ").removeprefix("benign ")
        assert record.lesion == "none" or f"the {named} in this {record.anatomy} {record.modality}" in record.query
    lost = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    skipped = {line["case"]: line["reason"] for line in lost if not line["written"]}
    assert set(skipped) == set(tree.skipped)
    assert all(re.search(word, skipped[case]) for case, word in tree.skipped.items()), skipped
    cases = {record.image.name for record in records}
    assert summary.found == summary.written + summary.skipped
    assert summary.skipped == len(tree.skipped) and summary.records == len(records)
    assert summary.written <= len(cases) and summary.left_out == len(lost) - len(skipped)
