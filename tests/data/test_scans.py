"""Without these a scan could be shown upside down, or through the wrong window, and nobody would be told."""

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset

from lab.data.images import ImageError, read_image
from lab.data.scans import open_scan, usual_window


def dicom(path, values, **tags):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * values.itemsize
    data.HighBit, data.PixelRepresentation = 8 * values.itemsize - 1, int(values.dtype.kind == "i")
    if values.ndim == 3:
        data.NumberOfFrames = len(values)
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def test_ct_is_in_hounsfield_units_and_seen_through_its_own_window(tmp_path):
    stored = np.array([[0, 1024], [1064, 2000]], np.int16)
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [40, 300], "WindowWidth": [80, 1500]}
    scan = open_scan(dicom(tmp_path / "a.dcm", stored, **tags))
    assert scan.read(0).tolist() == [[-1024, 0], [40, 976]] and scan.window == (0, 80) and scan.slices == 1
    assert scan.picture(0)[..., 0].tolist() == [[0, 0], [128, 255]]
    assert scan.picture(0, (-1024, 976))[1, 0, 0] == round(255 * 1064 / 2000)


def test_bright_means_much_also_where_the_file_says_the_reverse(tmp_path):
    stored = np.array([[0, 1000]], np.uint16)
    scan = open_scan(dicom(tmp_path / "a.dcm", stored, PhotometricInterpretation="MONOCHROME1"))
    assert scan.picture(0)[0, 0, 0] > scan.picture(0)[0, 1, 0]


@pytest.mark.parametrize("deep", [False, True])
def test_a_palette_gives_its_colours(tmp_path, deep):
    """Colour Doppler of older machines is stored so; its indices would be shown as noise in gray."""
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255]], np.uint8)
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, channel in zip(("Red", "Green", "Blue"), palette.T):
        entries = (channel * np.uint16(257) if deep else np.append(channel, 0).astype(np.uint8)).tobytes()
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [len(entries) // (1 + deep), 0, 16 if deep else 8]
        tags[f"{name}PaletteColorLookupTableData"] = entries
    stored = np.array([[[0, 1], [2, 1]], [[1, 1], [1, 2]]], np.uint8)
    scan = open_scan(dicom(tmp_path / "a.dcm", stored, **tags))
    assert scan.slices == 2 and scan.window is None
    assert all(np.array_equal(scan.picture(place), palette[stored[place]]) for place in range(2))
    with pytest.raises(ImageError, match="Lookup Table"):
        open_scan(dicom(tmp_path / "b.dcm", stored, PhotometricInterpretation="PALETTE COLOR"))


def test_frames_are_slices(tmp_path):
    scan = open_scan(dicom(tmp_path / "a.dcm", np.arange(12, dtype=np.uint8).reshape(3, 2, 2)))
    assert scan.slices == 3 and scan.window is None and scan.picture(2)[1, 1].tolist() == [11] * 3


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LIA", "PSR", "SAL"])
def test_front_is_up_and_the_right_of_the_patient_at_the_left(tmp_path, codes):
    """However the file stores its axes."""
    canonical = np.zeros((3, 4, 5), np.float32)  # left to right, back to front, feet to head
    canonical[2, 3, 4] = 100  # right, front, head
    volume = nibabel.Nifti1Image(canonical, np.eye(4))
    wanted = nibabel.orientations.axcodes2ornt(tuple(codes))
    volume = volume.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(np.eye(4)), wanted))
    nibabel.save(volume, tmp_path / "a.nii.gz")
    scan = open_scan(tmp_path / "a.nii.gz")
    assert scan.slices == 5 and scan.read(4).shape == (4, 3)
    assert scan.read(4)[0, 0] == 100 and scan.read(3).max() == 0


def test_a_deep_image_is_seen_as_elsewhere_unless_a_window_is_chosen(tmp_path):
    values = np.linspace(0, 60000, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    scan = open_scan(tmp_path / "a.png")
    assert np.array_equal(scan.picture(0), read_image(tmp_path / "a.png"))
    assert (scan.picture(0, (0, 10)) == 255).mean() > 0.9
    assert usual_window(np.full((4, 4), np.nan))[0] == 0


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.dcm", b"", "not a DICOM"),
        ("a.dcm", b"\0" * 128 + b"DICM", "not a DICOM"),
        ("a.nii", b"nothing", "not a NIfTI"),
        ("a.nii.gz", b"\x1f\x8b", "not a NIfTI"),
        ("a.png", b"<html>", "not an image"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=words) as error:
        open_scan(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_volume_that_is_cut_short_or_too_large_is_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), tmp_path / "a.nii")
    whole = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(whole[:-1500])
    with pytest.raises(ImageError, match="cut short"):
        open_scan(tmp_path / "a.nii").read(7)
    header = nibabel.Nifti1Image(np.ones((2, 2, 2), np.float32), np.eye(4)).header
    header.set_data_shape((2000, 2000, 2000))
    (tmp_path / "b.nii").write_bytes(header.binaryblock + b"\0" * 64)
    with pytest.raises(ImageError, match="voxels"):
        open_scan(tmp_path / "b.nii")
    path = dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint16), Rows=60000, Columns=60000)
    with pytest.raises(ImageError, match="too large"):
        open_scan(path)
