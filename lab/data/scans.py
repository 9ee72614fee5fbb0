"""Scans: DICOM, NIfTI and deep images, whose stored values are seen slice by slice through a window."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut, apply_rescale, pixel_array

from lab.data.images import MAX_PIXELS, ImageError, decode, in_colour, to_eight_bit

MAX_VOXELS = 512_000_000
"""Larger volumes are refused from their header alone."""


@dataclass
class Scan:
    """An image or volume whose slices are read when they are looked at."""

    slices: int
    read: Callable[[int], np.ndarray]
    """Slice to stored values (H, W), or (H, W, 3) uint8 RGB; CT in Hounsfield units."""
    window: tuple[float, float] | None
    """Least and greatest value that are told apart, unless others are asked for; None where there is nothing to choose
    as the values are 8-bit."""

    def picture(self, place: int, window: tuple[float, float] | None = None) -> np.ndarray:
        """A slice as (H, W, 3) uint8 RGB; what lies outside the window is black or white."""
        values = self.read(place)
        return in_colour(values if values.dtype == np.uint8 else to_eight_bit(values, window or self.window))


def open_scan(path: Path | str) -> Scan:
    """A DICOM file (one frame or several), a NIfTI volume (axial slices, radiological view), or an image.

    Raises:
        ImageError: Missing, empty, truncated, none of these, or too large.
    """
    path = Path(path)
    if path.name.endswith((".nii", ".nii.gz")):
        return _nifti(path)
    if path.suffix.lower() == ".dcm":
        return _dicom(path)
    values = decode(path)
    return Scan(1, lambda _: values, None if values.dtype in (np.uint8, bool) else usual_window(values))


def usual_window(values: np.ndarray) -> tuple[float, float]:
    """The 0.5th and the 99.5th percentile of what is finite."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def _nifti(path: Path) -> Scan:
    try:
        volume = nibabel.load(path)
        shape, data = volume.shape, volume.dataobj
        orientation = nibabel.io_orientation(volume.affine)
    except Exception:
        raise ImageError(f"'{path}' is not a NIfTI volume that can be read; give a .nii or .nii.gz file") from None
    if len(shape) not in (3, 4) or 0 in shape or np.isnan(orientation).any():
        raise ImageError(f"'{path}' has the shape {shape}; give a volume of three dimensions")
    if np.prod(shape[:3]) > MAX_VOXELS:
        raise ImageError(f"'{path}' holds {np.prod(shape[:3]):,} voxels, over {MAX_VOXELS:,}; cut it")
    axes = [int(np.flatnonzero(orientation[:, 0] == output)[0]) for output in range(3)]  # of left-right, back-front, up
    flips = [orientation[axis, 1] < 0 for axis in axes]

    def read(place: int) -> np.ndarray:
        index: list = [slice(None)] * 3 + [0] * (len(shape) - 3)
        index[axes[2]] = shape[axes[2]] - 1 - place if flips[2] else place
        try:
            plane = np.asarray(data[tuple(index)], np.float32)
        except Exception as error:
            raise ImageError(f"'{path}' is damaged or cut short ({error}); copy it again") from None
        plane = plane if axes[0] > axes[1] else plane.T  # rows run from back to front, columns from left to right
        return plane[:: 1 if flips[1] else -1, :: 1 if flips[0] else -1]  # front up, the patient's right at the left

    return Scan(shape[axes[2]], read, usual_window(read(shape[axes[2]] // 2)))


def _dicom(path: Path) -> Scan:
    try:
        data = pydicom.dcmread(path)
        rows, columns, frames = int(data.Rows), int(data.Columns), int(data.get("NumberOfFrames") or 1)
    except Exception:
        raise ImageError(f"'{path}' is not a DICOM image that can be read; give one with pixels") from None
    if rows * columns > MAX_PIXELS or rows * columns * frames > MAX_VOXELS:
        raise ImageError(f"'{path}' is {columns}x{rows}x{frames}, which is too large; cut it or scale it down")

    def read(place: int) -> np.ndarray:
        try:
            values = pixel_array(data, index=place)
            if data.get("PhotometricInterpretation") == "PALETTE COLOR":
                values = apply_color_lut(values, data)[..., :3]
                if values.dtype != np.uint8:
                    values = to_eight_bit(values, (0, 2 ** data.RedPaletteColorLookupTableDescriptor[2] - 1))
        except Exception as error:
            why = str(error).partition("\n")[0]
            raise ImageError(
                f"the pixels of '{path}' cannot be decoded ({why}); store them uncompressed, in gray or RGB"
            ) from None
        if values.ndim == 3:
            return values if values.dtype == np.uint8 else to_eight_bit(values)
        inverse = data.get("PhotometricInterpretation") == "MONOCHROME1"  # the least value is white
        if values.dtype == np.uint8 and "RescaleSlope" not in data:
            return 255 - values if inverse else values
        values = np.asarray(apply_rescale(values, data), np.float32)
        return -values if inverse else values

    values = read(0)
    if values.dtype == np.uint8:
        return Scan(frames, read, None)
    centre, width = (_first(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if not width or centre is None or data.get("PhotometricInterpretation") == "MONOCHROME1":
        return Scan(frames, read, usual_window(values))
    return Scan(frames, read, (centre - width / 2, centre + width / 2))


def _first(value) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)
