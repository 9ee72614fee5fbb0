"""Cases of one image: pairs, halves, polygons, and DICOM with run lengths."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pydicom

from lab.data.convert.find import Case, Skipped
from lab.data.convert.source import Lesion, Source, filled
from lab.data.images import decode, in_colour, to_eight_bit
from lab.data.scans import open_scan
from lab.errors import LabError

TRACES = 16
"""Of 255: what JPEG leaves at most in a mask without lesion."""
SQUARE = np.ones((3, 3), np.uint8)
"""In which values are all one within an area."""


@dataclass
class View:
    """One image to be written, with a mask for each lesion class that it was looked at for."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB; (0, 0, 3) where it cannot be read, which `left_out` then says."""
    masks: dict[str, np.ndarray]
    """Name of the lesion to (H, W) bool; several lesions of one name are one mask."""
    modality: str
    name: str = ""
    """Of the slice, where a case has several."""
    group: str = ""
    """Where the file says more than its name, such as a DICOM's patient."""
    spacing: tuple[float, float] = (1.0, 1.0)
    """Height and width of a pixel, in any unit."""
    left_out: list[str] = field(default_factory=list)
    """Sentences about what could not be used."""


class CaseError(LabError):
    """A case that cannot be used; the message says why."""


def read_image_case(source: Source, case: Case, root: Path) -> Iterator[View]:
    """The view of a case of one image, one for each image of it that shows lesions of its own.

    Raises:
        CaseError: Files that are missing or do not fit together.
        ImageError: A file that cannot be read.
    """
    for pattern in dict.fromkeys(source.image_of(lesion) for lesion in source.lesions):
        lesions = [lesion for lesion in source.lesions if source.image_of(lesion) == pattern]
        path = root / one(case, pattern)
        group = ""
        if source.kind == "rle":
            image, group = open_scan(path).picture(0), _patient(path)
        else:
            values = decode(path)
            image = in_colour(values if values.dtype == np.uint8 else to_eight_bit(values))
        labels = None
        if source.kind == "halves":
            if image.shape[1] % 2:
                raise CaseError(f"'{path.name}' is {image.shape[1]} pixels wide, which has no half; is it of this set?")
            image, labels = np.hsplit(image, 2)
        masks: dict[str, np.ndarray] = {}
        for lesion in lesions:
            if labels is not None:
                mask = selected(labels, lesion, path)
            elif not (paths := case.files[source.mask_of(lesion)]):
                continue
            elif source.kind == "polygons":
                mask = _polygons(root / paths[0], case.fields["image"], image.shape[:2])
            elif source.kind == "rle":
                mask = _run_lengths(root / paths[0], path.stem, image.shape[:2])
            else:
                mask = np.any([_mask(root / file, lesion, image.shape[:2]) for file in paths], axis=0)
            name = filled(lesion.name, case.fields)
            masks[name] = masks.get(name, False) | mask
        if not masks:
            raise CaseError(f"there is no mask like '{source.mask_of(lesions[0])}' for it; add it")
        modality = lesions[0].modality or source.modality
        yield View(np.ascontiguousarray(image), masks, modality, group=group)


def one(case: Case, pattern: str) -> str:
    """The first file of a case that a pattern names.

    Raises:
        CaseError: None.
    """
    if not case.files[pattern]:
        raise CaseError(f"there is no file like '{pattern}' for it; add it")
    return case.files[pattern][0]


def selected(labels: np.ndarray, lesion: Lesion, path: Path) -> np.ndarray:
    """Where labels (H, W), or colours (H, W, 3) uint8, of a file are those of a lesion, as (H, W) bool.

    Colours are compared after each channel was rounded to 0 or 255, as borders may be blended.

    Raises:
        CaseError: As `foreground`.
    """
    if not lesion.values:
        return foreground(labels, path)
    if isinstance(lesion.values[0], tuple):
        rounded = np.where(in_colour(labels) > 127, 255, 0)
        return np.any([(rounded == colour).all(-1) for colour in lesion.values], axis=0)
    if labels.ndim == 3:
        labels = labels[..., 0]
    return np.isin(labels, lesion.values)


def foreground(values: np.ndarray, path: Path) -> np.ndarray:
    """A drawn mask as (H, W) bool: whatever is not 0 where there are only 0 and 1; else the brighter half of the
    range of 8 or 16 bits, as JPEG leaves traces around the border.

    Raises:
        CaseError: Labels, perhaps: nothing is in the brighter half, but the darker one holds more than JPEG's traces;
            or the darker half holds areas, which a softened border is not.
    """
    if values.ndim == 3:
        values = values[..., :3].max(-1)
    peak = values.max(initial=0)
    if peak <= 1:
        return values != 0
    most = 255 if peak <= 255 else 65535
    exact = values.astype(np.float32)  # all 16 bits
    areas = (cv2.erode(exact, SQUARE) == cv2.dilate(exact, SQUARE)) & (values <= most // 2)
    labels = values[areas & (values > TRACES * most // 255)]
    if labels.size or (peak <= most // 2 and (peak > TRACES or not _is_jpeg(path))):
        raise CaseError(
            f"mask '{path.name}' holds the value {max(labels, default=peak)} of {most}, which may be a label; name the "
            "lesion's under values (in a palette image, its indices), or cut a soft mask at half of its range"
        )
    return values > most // 2


def _is_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\xff\xd8"


def _mask(path: Path, lesion: Lesion, size: tuple[int, int]) -> np.ndarray:
    labels = decode(path, indices=any(isinstance(value, int) for value in lesion.values))
    mask = selected(labels, lesion, path)
    if mask.shape != size:
        raise CaseError(
            f"mask '{path.name}' is {mask.shape[1]}x{mask.shape[0]} but the image is {size[1]}x{size[0]}; resize one"
        )
    return mask


def _polygons(path: Path, number: str, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    try:
        outlines = [
            np.array([(point["x"], point["y"]) for point in region["points"]], np.float64)
            for text in _marks(path).get(number, ())
            if text.strip()
            for region in json.loads(text)
        ]
    except (ElementTree.ParseError, ValueError, KeyError, TypeError) as error:
        raise CaseError(f"'{path.name}' is damaged ({error}); correct it") from None
    outlines = [outline.round().astype(np.int32) for outline in outlines if len(outline) > 2]
    if not outlines:
        raise CaseError(f"'{path.name}' has no outline for image {number}; draw one")
    for outline in outlines:
        cv2.fillPoly(mask, [outline], 1)
    return mask.astype(bool)


def _marks(path: Path) -> dict[str, list[str]]:
    """DDTI: `<mark><image>1</image><svg>[{"points": [{"x": 1, "y": 2}, ...]}, ...]</svg></mark>`, in pixels."""
    found: dict[str, list[str]] = defaultdict(list)
    for mark in ElementTree.parse(path).getroot().findall(".//mark"):
        found[(mark.findtext("image") or "").strip()].append(mark.findtext("svg") or "")
    return found


def unclaimed(source: Source, cases: list[Case], root: Path) -> list[Skipped]:
    """Rows of a table, and outlines of XML, whose images are not there."""
    lost = []
    if source.kind == "rle":
        images = {Path(case.files[source.image][0]).stem for case in cases}
        for path in sorted({name for case in cases for name in case.files[source.mask]}):
            rows = _table(root / path)
            lost += [
                Skipped(f"{path}: {row}", "there is no image for this row; add it") for row in rows.keys() - images
            ]
    elif source.kind == "polygons":
        numbers: dict[str, set[str]] = defaultdict(set)
        for case in cases:
            for path in case.files[source.mask]:
                numbers[path].add(case.fields["image"])
        for path, known in numbers.items():
            try:
                outlined = [number for number, texts in _marks(root / path).items() if "".join(texts).strip()]
            except (ElementTree.ParseError, OSError):
                continue  # its images are reported as they are read
            missing = (number for number in outlined if number not in known)
            lost += [Skipped(f"{path}: image {number}", "there is no such image; add it") for number in missing]
    return lost


def _run_lengths(path: Path, name: str, size: tuple[int, int]) -> np.ndarray:
    """SIIM-ACR: rows of one image are joined; gaps and lengths in turn, down the columns; -1 for none."""
    rows = _table(path).get(name)
    if rows is None:
        raise CaseError(f"'{path.name}' has no row for it; add one, -1 for no lesion")
    mask = np.zeros(size[0] * size[1], bool)
    for row in rows:
        if row.strip() == "-1":
            continue
        try:
            gaps, lengths = np.array(row.split(), np.int64).reshape(-1, 2).T
        except ValueError:
            raise CaseError(
                f"'{path.name}' has run lengths for it that are not pairs of numbers; correct them"
            ) from None
        ends = np.cumsum(gaps + lengths)
        if len(ends) == 0 or (gaps < 0).any() or (lengths < 1).any() or ends[-1] > mask.size:
            raise CaseError(f"'{path.name}' has run lengths for it that leave the image; correct them")
        for start, end in zip(ends - lengths, ends):
            mask[start:end] = True
    return mask.reshape(size[1], size[0]).T


@lru_cache(maxsize=2)
def _table(path: Path) -> dict[str, list[str]]:
    """Image to its run lengths; the second column is called ` EncodedPixels`, with a space, in the set itself."""
    found: dict[str, list[str]] = defaultdict(list)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, skipinitialspace=True):
                row = {str(name).strip(): value for name, value in row.items()}
                found[row["ImageId"].strip()].append(row["EncodedPixels"] or "")
    except (KeyError, UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise CaseError(
            f"'{path.name}' is not a table with ImageId and EncodedPixels ({error}); copy it again"
        ) from None
    return dict(found)


def _patient(path: Path) -> str:
    return str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"]).get("PatientID") or "")
