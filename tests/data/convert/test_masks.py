"""Without these a label would be read as another lesion, as all of it, or as health."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from lab.data.convert.run import convert
from lab.data.convert.sets import SETS
from lab.data.convert.source import Lesion, read_description
from lab.data.images import read_image, read_mask
from lab.data.manifest import read_manifest
from tests.data.convert.trees import Tree, box, lines

ROOT = Path(__file__).parents[3]


def test_sixteen_bits_are_told_apart_and_labels_of_sixteen_bits_read(tmp_path):
    tree = Tree(tmp_path / "root")
    deep = np.linspace(20000, 24000, 48 * 64).reshape(48, 64).astype(np.uint16)
    cv2.imwrite(str(tree.path("images/a.png")), deep)
    cv2.imwrite(str(tree.path("masks/a.png")), box(0).astype(np.uint16) * 300 + box(7).astype(np.uint16))
    source = read_description(ROOT / "configs/convert/pairs.yaml")
    source = replace(source, lesions=(Lesion("polyp", (300, 301)), Lesion("instrument", (1, 301))))
    convert(source, tree.root, tmp_path / "out")
    found = {record.lesion: record for record in read_manifest(tmp_path / "out/manifest.jsonl")}
    assert np.unique(read_image(found["polyp"].image)).size > 200
    assert (read_mask(found["polyp"].mask) == box(0)).all() and (read_mask(found["instrument"].mask) == box(7)).all()
    assert found["polyp"].query != found["instrument"].query and found["polyp"].group == found["instrument"].group


@pytest.mark.parametrize(
    "name, labels",
    [
        ("a.png", [2]),
        ("a.png", [1, 2, 3]),
        ("a.png", [100]),
        ("a.png", [100, 200]),
        ("a.tif", [5]),
        ("a.png", [300]),
        ("a.jpg", [100]),
    ],
)
def test_labels_without_values_are_skipped_and_do_not_pass_for_health(tmp_path, name, labels):
    tree = Tree(tmp_path / "root")
    tree.image("images/a.png", 0)
    tree.image("images/b.png", 1)
    tree.mask("masks/b.png", box(1))
    values = np.zeros((48, 64), np.uint16 if max(labels) > 255 else np.uint8)
    for place, label in enumerate(labels):
        values[8:24, 16 * place : 16 * place + 16] = label
    cv2.imwrite(str(tree.path(f"masks/{name}")), values)
    convert(read_description(ROOT / "configs/convert/pairs.yaml"), tree.root, tmp_path / "out")
    assert [record.id for record in read_manifest(tmp_path / "out/manifest.jsonl")] == ["my_pairs/b"]
    (lost,) = lines(tmp_path / "out/skipped.jsonl")
    assert lost["case"] == "a" and f"mask '{name}' holds the value" in lost["reason"]
    assert "under values" in lost["reason"]


def test_a_softened_border_is_no_label(tmp_path):
    tree = Tree(tmp_path / "root")
    tree.image("images/a.png", 0)
    soft = cv2.resize(box(0)[::4, ::4] * np.uint8(255), (64, 48), interpolation=cv2.INTER_LINEAR)
    assert len(np.unique(soft)) > 4
    cv2.imwrite(str(tree.path("masks/a.png")), soft)
    convert(read_description(ROOT / "configs/convert/pairs.yaml"), tree.root, tmp_path / "out")
    (record,) = read_manifest(tmp_path / "out/manifest.jsonl")
    assert (read_mask(record.mask) == (soft > 127)).all()


def test_what_jpeg_leaves_in_a_mask_without_lesion_is_no_label(tmp_path):
    tree = Tree(tmp_path / "root")
    tree.image("images/a.jpg", 0)
    traces = np.random.default_rng(0).integers(0, 6, (48, 64)).astype(np.uint8)
    cv2.imwrite(str(tree.path("masks/a.jpg")), traces)
    convert(SETS["kvasir_seg"], tree.root, tmp_path / "out")
    assert [record.lesion for record in read_manifest(tmp_path / "out/manifest.jsonl")] == ["none"]


def test_values_of_a_palette_mask_are_its_indices(tmp_path):
    """As Pascal VOC and many annotation tools write them: 1 is dark red, 2 dark green."""
    tree = Tree(tmp_path / "root")
    tree.image("images/a.png", 0)
    labels = Image.fromarray(box(0) * np.uint8(1) + (box(5) & ~box(0)) * np.uint8(2)).convert("P")
    labels.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    labels.save(tree.path("masks/a.png"))
    source = read_description(ROOT / "configs/convert/pairs.yaml")
    convert(replace(source, lesions=(Lesion("polyp", (1,)), Lesion("clip", (2,)))), tree.root, tmp_path / "out")
    found = {record.lesion: read_mask(record.mask) for record in read_manifest(tmp_path / "out/manifest.jsonl")}
    assert (found["polyp"] == box(0)).all() and (found["clip"] == (box(5) & ~box(0))).all()
