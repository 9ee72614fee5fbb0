"""Without these scans are shown turned, through the wrong window, or with slices missing."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import scipy.io

from lab.data.convert.run import convert
from lab.data.convert.sets import SETS
from lab.data.convert.source import Lesion, read_description
from lab.data.images import read_image
from lab.data.scans import open_scan
from tests.data.convert.trees import Tree, affine_of, fumpe, head, lesions, lines, stored, volumes

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL", "AIR"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_slice_is_turned_as_radiologists_look_at_it(tmp_path, codes, plane):
    """Front or head up, the patient's right (sagittal: front) at the left, however the file stores its axes."""
    volume = np.zeros((6, 7, 8), np.int16)
    volume[5, 6, 7] = 200  # right, front, head: x runs to the right, as R is the first of its code
    labels = np.ones((6, 7, 8), np.uint8)
    tree = Tree(tmp_path / "root")
    affine = affine_of(codes, (1, 1, 1))
    tree.nifti("images/a.nii.gz", stored(volume, codes), affine)
    tree.nifti("labels/a.nii.gz", stored(labels, codes), affine)
    source = replace(read_description(ROOT / "configs/convert/volumes.yaml"), plane=plane, lesions=(Lesion("x", (1,)),))
    convert(source, tree.root, tmp_path / "out", most=20)
    last = lines(tmp_path / "out/manifest.jsonl")[-1]
    picture = read_image(tmp_path / "out" / last["image"])[..., 0]
    shape = {"axial": (7, 6), "coronal": (8, 6), "sagittal": (8, 7)}[plane]
    assert picture.shape == shape and picture[0, 0] > picture[1:].max() and (picture[0, 1:] < picture[0, 0]).all()
    if plane == "axial":
        scan = open_scan(tree.root / "images/a.nii.gz")
        assert np.array_equal(scan.picture(7, (-150, 250))[..., 0], picture)


def test_ct_is_seen_through_the_window_of_what_is_looked_at_whatever_the_file_scales_by(tmp_path):
    """Liver, centre 30 and width 150: -45 is black, 105 white."""
    units = np.zeros((24, 28, 6), np.int16)
    units[:, :, 2] = np.linspace(-200, 300, 24).round()[:, None]
    volume = nibabel.Nifti1Image((units + 1024).astype(np.int16), affine_of("RAS"))
    volume.header.set_slope_inter(1, -1024)
    tree = Tree(tmp_path / "root")
    nibabel.save(volume, tree.path("volume-1.nii.gz"))
    header = nibabel.load(tree.path("volume-1.nii.gz"))
    raw = nibabel.Nifti1Image(np.asanyarray(header.dataobj.get_unscaled()), header.affine)
    raw.header.set_slope_inter(header.dataobj.slope, header.dataobj.inter)
    tree.nifti("segmentation-1.nii", lesions(1, 2), affine_of("RAS"))
    convert(SETS["lits"], tree.root, tmp_path / "out")
    picture = read_image(tmp_path / "out/images/1-z002.png")[..., 0]
    stored_units = np.asarray(header.dataobj)[:, :, 2]
    wanted = np.clip((stored_units + 45.0) / 150, 0, 1) * 255
    assert np.array_equal(picture, wanted.T[::-1, ::-1].round().astype(np.uint8))


def test_mri_is_seen_from_the_percentiles_of_its_tissue_the_same_in_every_slice(tmp_path):
    """The air that skull stripping left would else make everything bright, and each slice another."""
    volume = np.zeros((24, 28, 6), np.float32)
    volume[4:20, 4:24] = np.random.default_rng(0).normal(600, 50, (16, 20, 6))
    volume[:, :, 3] *= 0.5
    tree = Tree(tmp_path / "root")
    tree.nifti("pre/FLAIR.nii.gz", volume, affine_of("RAS"))
    tree.nifti("1/pre/FLAIR.nii.gz", volume, affine_of("RAS"))
    tree.nifti("1/wmh.nii.gz", lesions(0, 1), affine_of("RAS"))
    convert(SETS["wmh"], tree.root, tmp_path / "out")
    pictures = [read_image(tmp_path / f"out/images/1-z00{place}.png")[..., 0] for place in (2, 3)]
    low, high = np.percentile(volume[::2, ::2, ::2][volume[::2, ::2, ::2] > 0], [0.5, 99.5])
    wanted = [np.clip((volume[..., place] - low) / (high - low), 0, 1) * 255 for place in (2, 3)]
    for picture, want in zip(pictures, wanted):
        assert np.abs(picture - want.T[::-1, ::-1]).max() <= 1
    assert pictures[0].max() == 255 and pictures[1].mean() < 0.5 * pictures[0].mean()


def test_a_broken_slice_of_a_series_is_left_out_and_named(tmp_path):
    tree = Tree(tmp_path / "root")
    fumpe(tree)
    labels = np.zeros((24, 20, 11), np.uint8)
    labels[4:10, 6:12, 3:6] = 1
    scipy.io.savemat(tree.path("FUMPE/GroundTruth/PAT001.mat"), {"Mask": labels})
    tree.path("FUMPE/CT_scans/PAT001/D4.dcm").write_bytes(b"")
    summary = convert(SETS["fumpe"], tree.root, tmp_path / "out")
    ids = {line["id"] for line in lines(tmp_path / "out/manifest.jsonl")}
    assert {"fumpe/PAT001-z003", "fumpe/PAT001-z005"} < ids and "fumpe/PAT001-z004" not in ids
    named = [line for line in lines(tmp_path / "out/skipped.jsonl") if line["written"]]
    assert summary.left_out == 1 and "z004" in named[0]["reason"] and "D4.dcm" in named[0]["reason"]
    picture = read_image(tmp_path / "out/images/PAT002-z009.png")[..., 0]  # 900 - 1024 units, seen from -250 to 450
    assert picture[5, 5] == round((-124 + 250) / 700 * 255) and picture[0, 0] == round(250 / 700 * 255)


def test_slices_are_the_largest_and_others_evenly_spread(tmp_path):
    labels = np.zeros((24, 28, 60), np.uint8)
    labels[4:10, 4:10, 10:50] = 1
    labels[4:20, 4:20, 17] = 1
    tree = Tree(tmp_path / "root")
    tree.nifti("1/pre/FLAIR.nii.gz", head(0, (24, 28, 60)), affine_of("RAS"))
    tree.nifti("1/wmh.nii.gz", labels, affine_of("RAS"))
    convert(SETS["wmh"], tree.root, tmp_path / "out", most=5)
    places = [int(line["id"][-3:]) for line in lines(tmp_path / "out/manifest.jsonl")]
    assert len(places) == 5 and 17 in places and places[0] == 10 and places[-1] == 49
    assert max(np.diff(places)) <= 14


def test_specks_are_not_called_healthy(tmp_path):
    labels = np.zeros((24, 28, 6), np.uint8)
    labels[4, 4, 2] = 1
    tree = Tree(tmp_path / "root")
    volumes(tree, "wmh")
    tree.nifti("training/Amsterdam/GE3T/109/pre/FLAIR.nii.gz", head(9), affine_of("RAS"))
    tree.nifti("training/Amsterdam/GE3T/109/wmh.nii.gz", labels, affine_of("RAS"))
    convert(SETS["wmh"], tree.root, tmp_path / "out")
    (reason,) = [line["reason"] for line in lines(tmp_path / "out/skipped.jsonl") if line["case"] == "109"]
    assert "fewer than 16 pixels" in reason
