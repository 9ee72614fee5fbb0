"""One case to image, masks and records on disk."""

import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from lab.data.convert.duplicates import look
from lab.data.convert.find import Case
from lab.data.convert.images import View, read_image_case
from lab.data.convert.source import Source, filled
from lab.data.convert.volumes import read_volume_case
from lab.data.manifest import asked_name
from lab.errors import LabError


class OutputError(LabError):
    """Nothing can be written; this is of no case's making and ends the run."""


def convert_case(source: Source, case: Case, root: Path, out: Path, size: int) -> dict:
    """Write what a case gives, and say what that is.

    Args:
        source: The set.
        case: One of `find_cases`.
        root: Where the set lies.
        out: Folder for `images/` and `masks/`.
        size: Longest side in pixels; larger images are scaled down. 0 keeps every size.

    Raises:
        OutputError: The disk is full, or `out` is not writable.

    Returns:
        `case`, `group`, `part`; `records`, the lines of the manifest without split and group; `left_out`, sentences
        about slices and lesions that could not be used; `look`, the image's hash, empty for volumes; `skipped`, why
        there is no record, where there is none.
    """
    entry = {"case": case.name, "group": filled(source.group, case.fields) or case.name}
    entry |= {"part": case.fields.get("part", ""), "records": [], "left_out": [], "look": "", "skipped": ""}
    sliced = source.kind in ("volumes", "series")
    try:
        read = read_volume_case if sliced else read_image_case
        for view in read(source, case, root):
            if view.image.size == 0:
                entry["left_out"] += [f"{view.name}: {sentence}" for sentence in view.left_out]
                continue
            view, entry["group"] = _scaled(view, size), view.group or entry["group"]
            records, lost = _write(source, case, view, out)
            entry["records"] += records
            entry["left_out"] += lost
            if not sliced and not entry["look"]:
                entry["look"] = look(view.image)
    except OutputError:
        raise
    except LabError as error:
        entry["skipped"] = str(error)
    except Exception as error:  # whatever a parser makes of a broken file: one case must not end the others
        entry["skipped"] = f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())}); copy it again"
    if entry["skipped"]:
        entry["records"] = []
    elif not entry["records"]:
        entry["skipped"] = "; ".join(entry["left_out"])
    return entry


def _scaled(view: View, size: int) -> View:
    """With square pixels and a longest side of at most `size`."""
    height, width = view.image.shape[:2]
    tall, wide = view.spacing
    if abs(tall / wide - 1) > 0.02:  # stretched along the longer pixel
        height, width = height * max(1.0, tall / wide), width * max(1.0, wide / tall)
    factor = min(1.0, size / max(height, width)) if size else 1.0
    new = max(1, round(width * factor)), max(1, round(height * factor))
    if new == view.image.shape[1::-1]:
        return view
    kind = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    masks = {
        name: cv2.resize(mask.astype(np.uint8), new, interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)
        for name, mask in view.masks.items()
    }
    lost = [name for name, mask in masks.items() if view.masks[name].any() and not mask.any()]
    for name in lost:
        del masks[name]
    left_out = [f"{name} is too small to be seen at {new[0]}x{new[1]}; raise --size" for name in lost]
    return replace(view, image=cv2.resize(view.image, new, interpolation=kind), masks=masks, left_out=left_out)


def _write(source: Source, case: Case, view: View, out: Path) -> tuple[list[dict], list[str]]:
    """The records of a view whose lesions are there, or the one of a view without any, and what was lost in scaling."""
    drawn = {name: mask for name, mask in view.masks.items() if mask.any()}
    if not drawn:
        if view.left_out or not view.masks:
            return [], view.left_out
        drawn = {"none": np.zeros(view.image.shape[:2], bool)}
    stem = "-".join(part for part in (case.name, view.name) if part)
    image = f"images/{stem}.png"
    gray = (view.image[..., :1] == view.image).all()
    _save(out / image, view.image[..., 0] if gray else view.image[..., ::-1])
    records = []
    for lesion, mask in drawn.items():
        name = (
            stem
            if len(source.lesions) == 1 or lesion == "none"
            else f"{stem}-{re.sub(r'[^a-z0-9]+', '-', lesion.lower())}"
        )
        _save(out / f"masks/{name}.png", mask.astype(np.uint8) * 255)
        records.append(
            {
                "id": f"{source.name}/{name}",
                "image": image,
                "mask": f"masks/{name}.png",
                "width": view.image.shape[1],
                "height": view.image.shape[0],
                "modality": view.modality,
                "anatomy": source.anatomy,
                "lesion": lesion,
                "source": source.name,
                "license": source.license,
                "mask_fraction": round(float(mask.mean()), 8),
            }
        )
        if lesion != "none":  # there `read_manifest` asks for a lesion that the set has
            asked = f"Locate and segment the {asked_name(lesion)} in this {source.anatomy} {view.modality}."
            records[-1]["query"] = asked
    return records, view.left_out


def _save(path: Path, array: np.ndarray) -> None:
    """As PNG, whole or not at all, also when killed."""
    data = cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, 2])[1]
    part = path.with_suffix(".part")
    try:
        part.write_bytes(data.tobytes())
        part.replace(path)
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written ({error.strerror}); mend that and start again") from None
