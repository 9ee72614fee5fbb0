"""Cases of many slices: NIfTI volumes with label volumes, and DICOM series with a MAT file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import scipy.io

from lab.data.convert.find import Case
from lab.data.convert.images import CaseError, View, one
from lab.data.convert.source import WINDOWS, Source, filled
from lab.data.images import ImageError, in_colour, to_eight_bit
from lab.data.scans import MAX_VOXELS, open_scan, usual_window

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}


@dataclass
class Stack:
    """Parallel slices as a radiologist looks at them: front or head up, the patient's right at the left."""

    count: int
    read: Callable[[int], np.ndarray]
    """Slice to stored values (H, W), rescaled as the file says: CT in Hounsfield units."""
    spacing: tuple[float, float]
    """Height and width of a pixel, mm."""
    usual: Callable[[], tuple[float, float] | None] = lambda: None
    """Least and greatest value that are told apart; None where that is found slice by slice."""


@dataclass
class Volume:
    """A NIfTI file."""

    stack: Stack
    shape: tuple[int, ...]
    """Turned to left-right, back-front, feet-head."""
    affine: np.ndarray
    """Of the turned voxels to mm."""
    directions: np.ndarray
    """(3, 3), columns of length 1: where the stored axes point."""


def read_volume_case(source: Source, case: Case, root: Path) -> Iterator[View]:
    """Views of the slices that show lesions, as `Source.most` and `Source.least` say.

    Raises:
        CaseError: Files that are missing or do not fit together.
        ImageError: A file that cannot be read.
    """
    load = _series if source.kind == "series" else _volumes(source.plane)
    stacks: dict[str, Stack] = {}
    masks: dict[str, dict[str, np.ndarray]] = {}  # image's pattern to lesion to (D, H, W)
    modalities: dict[str, str] = {}
    for lesion in source.lesions:
        pattern = source.image_of(lesion)
        stacks[pattern], labels = load(case, pattern, source.mask_of(lesion), root)
        mask = np.logical_or.reduce([labels == value for value in lesion.values]) if lesion.values else labels != 0
        shown, name = masks.setdefault(pattern, {}), filled(lesion.name, case.fields)
        shown[name] = shown.get(name, False) | mask
        modalities.setdefault(pattern, lesion.modality or source.modality)
    places, some = _places(
        [mask for shown in masks.values() for mask in shown.values()], source.most, source.least, labels
    )
    windows = {name: WINDOWS[source.window] if source.window else stack.usual() for name, stack in stacks.items()}
    for place in places:
        for pattern, stack in stacks.items():
            shown = {name: mask[place] for name, mask in masks[pattern].items()}
            if some and not any(mask.any() for mask in shown.values()):
                continue
            name = f"z{place:03d}" + ("" if len(stacks) == 1 else f"-{modalities[pattern].split()[-1]}")
            try:
                picture = in_colour(to_eight_bit(stack.read(place), windows[pattern]))
            except ImageError as error:
                yield View(np.zeros((0, 0, 3), np.uint8), {}, modalities[pattern], name, left_out=[str(error)])
                continue
            yield View(picture, shown, modalities[pattern], name, spacing=stack.spacing)
            if not some:
                return


def _places(masks: list[np.ndarray], most: int, least: int, labels: np.ndarray) -> tuple[list[int], bool]:
    """Slices to take of masks and labels (D, H, W), and whether there is a lesion in them.

    Where no slice has `least` pixels of any class: the middle one of those with any label, else the middle one; where
    it is empty only, so that nothing that was drawn passes for healthy.
    """
    places: set[int] = set()
    for mask in masks:
        area = mask.sum(axis=(1, 2))
        enough = np.flatnonzero(area >= least)
        if len(enough):
            spread = enough[np.linspace(0, len(enough) - 1, min(most, len(enough))).round().astype(int)]
            largest = int(area.argmax())
            if largest not in spread:
                spread[np.abs(spread - largest).argmin()] = largest
            places |= {int(place) for place in spread}
    if places:
        return sorted(places), True
    if any(mask.any() for mask in masks):
        raise CaseError(f"its lesions have fewer than {least} pixels in every slice; lower least to take them")
    labelled = np.flatnonzero(labels.any(axis=(1, 2)))
    return [int(labelled[len(labelled) // 2]) if len(labelled) else len(labels) // 2], False


def _volumes(plane: str) -> Callable[[Case, str, str, Path], tuple[Stack, np.ndarray]]:
    """How to read a volume and its labels (D, H, W) in the same orientation; no file of a case is read twice."""
    opened: dict[str, Volume] = {}
    labels: dict[str, np.ndarray] = {}

    def load(case: Case, image: str, mask: str, root: Path) -> tuple[Stack, np.ndarray]:
        names = one(case, image), one(case, mask)
        for name in names:
            if name not in opened:
                opened[name] = _nifti(root / name, plane)
        picture, label = (opened[name] for name in names)
        if label.shape != picture.shape:
            raise CaseError(f"labels '{names[1]}' are {label.shape} but '{names[0]}' is {picture.shape}; resample them")
        if not _same_place(picture, label):
            raise CaseError(f"labels '{names[1]}' lie elsewhere than '{names[0]}' by their headers; correct one")
        if names[1] not in labels:
            slices = [label.stack.read(place).round().astype(np.int16) for place in range(label.stack.count)]
            labels[names[1]] = np.stack(slices)
        return picture.stack, labels[names[1]]

    return load


def _same_place(first: Volume, second: Volume) -> bool:
    """Whether voxels lie in the same place up to half a voxel; or else, since headers are often careless about where
    the whole lies and how large a voxel is, at least their stored axes point the same way."""
    ends = np.array([(0, 0, 0, 1), (*np.subtract(first.shape, 1), 1)], float).T
    apart = np.abs((first.affine @ ends - second.affine @ ends)[:3]).max()
    near = apart < 0.5 * nibabel.affines.voxel_sizes(first.affine).min()
    return bool(near or np.allclose(first.directions, second.directions, atol=0.05))


def _nifti(path: Path, plane: str) -> Volume:
    """A NIfTI volume turned as `nibabel.as_closest_canonical` would, but kept in the type that it is stored in."""
    try:
        volume = nibabel.load(path)
        shape = volume.shape[:3] + tuple(size for size in volume.shape[3:] if size != 1)
        turn = nibabel.io_orientation(volume.affine)
    except Exception:
        raise ImageError(f"'{path}' is not a NIfTI volume that can be read; give a .nii or .nii.gz file") from None
    if len(shape) != 3 or 0 in shape or np.isnan(turn).any():
        raise ImageError(f"'{path}' has the shape {volume.shape}; give a volume of three dimensions")
    if np.prod(shape) > MAX_VOXELS:
        raise ImageError(f"'{path}' holds {np.prod(shape):,} voxels, over {MAX_VOXELS:,}; cut it")
    try:
        stored = np.asanyarray(volume.dataobj.get_unscaled()).reshape(shape)
    except Exception as error:
        raise ImageError(f"'{path}' is damaged or cut short ({error}); copy it again") from None
    slope, intercept = volume.dataobj.slope, volume.dataobj.inter
    turned = nibabel.orientations.apply_orientation(stored, turn)  # a view
    affine = volume.affine @ nibabel.orientations.inv_ornt_aff(turn, shape)
    sizes = nibabel.affines.voxel_sizes(affine)
    axis = int(sizes.argmax()) if plane == "thickest" else PLANES[plane]
    slices = np.moveaxis(turned, axis, 0).transpose(0, 2, 1)[:, ::-1, ::-1]  # front or head first; right (front) first
    width, height = np.delete(sizes, axis).tolist()
    stack = Stack(
        len(slices),
        lambda place: _scaled(slices[place], slope, intercept),
        (height, width),
        lambda: usual_window(_scaled(_tissue(stored), slope, intercept)),
    )
    directions = volume.affine[:3, :3] / nibabel.affines.voxel_sizes(volume.affine)
    return Volume(stack, turned.shape, affine, directions)


def _tissue(stored: np.ndarray) -> np.ndarray:
    """Every second voxel each way that is not 0: what MRI shows beside the air that was cut away."""
    some = stored[::2, ::2, ::2]
    return some[some != 0] if (some != 0).any() else some


def _scaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    values = stored.astype(np.float32)
    return values if (slope, intercept) == (1, 0) else values * np.float32(slope) + np.float32(intercept)


def _series(case: Case, image: str, mask: str, root: Path) -> tuple[Stack, np.ndarray]:
    """FUMPE: `Mask` (H, W, D) of a MAT file, whose slices follow the names of the DICOM files."""
    paths = [root / name for name in case.files[image]]
    table = root / one(case, mask)
    try:
        if any(np.prod(shape) > MAX_VOXELS for _, shape, _ in scipy.io.whosmat(table)):
            raise CaseError(f"'{table.name}' holds over {MAX_VOXELS:,} voxels; cut it")
        labels = np.moveaxis(scipy.io.loadmat(table, variable_names=["Mask"])["Mask"], 2, 0).astype(np.int16)
    except CaseError:
        raise
    except KeyError:
        raise CaseError(f"'{table.name}' has no variable 'Mask'; copy it again") from None
    except NotImplementedError:
        raise CaseError(f"'{table.name}' is a MAT file of version 7.3; save it as version 7") from None
    except Exception as error:
        raise CaseError(f"'{table.name}' is not a MAT file that can be read ({error}); copy it again") from None
    if len(labels) != len(paths):
        raise CaseError(
            f"'{table.name}' has {len(labels)} slices but there are {len(paths)} DICOM files; complete them"
        )
    for path in paths:  # the first that can be read says how the patient lies
        try:
            data = pydicom.dcmread(path, stop_before_pixels=True)
            height, width = (float(size) for size in data.get("PixelSpacing") or (1, 1))
            row, column = np.reshape(data.get("ImageOrientationPatient") or (1, 0, 0, 0, 1, 0), (2, 3)).astype(float)
            break
        except Exception:
            continue
    else:
        raise ImageError(f"no DICOM file of '{paths[0].parent}' can be read; copy them again")
    turn = (slice(None, None, -1 if column[1] < 0 else 1), slice(None, None, -1 if row[0] < 0 else 1))

    def read(place: int) -> np.ndarray:
        values = open_scan(paths[place]).read(0)
        if values.shape != labels.shape[1:]:
            raise ImageError(f"'{paths[place]}' is {values.shape} but its mask is {labels.shape[1:]}; complete it")
        return values[turn]

    return Stack(len(paths), read, (height, width)), labels[(slice(None), *turn)]
