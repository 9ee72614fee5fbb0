"""The manifest: one JSON object a line, every broken line reported, nothing dropped silently."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from lab.data.images import ImageError, decode, image_size, read_image
from lab.data.sample import Record
from lab.errors import LabError

SPLITS = ("train", "val", "test")
TEXT_FIELDS = ("id", "image", "mask", "modality", "anatomy", "lesion", "source", "split", "group", "license")
NUMBER_FIELDS = ("width", "height", "mask_fraction")
OPTIONAL_TEXT_FIELDS = ("query", "reasoning")


class ManifestError(LabError):
    """A manifest that cannot be used; the message has one line for each broken line of the file."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def read_manifest(path: Path | str) -> list[Record]:
    """Read and validate a manifest, looking at the headers of its images and masks but not at their pixels.

    Args:
        path: A `manifest.jsonl`; the format is in `../shared/data/README.md` and in the README. `query` and `reasoning`
            may be left out: the query then asks for the lesion by name.

    Raises:
        ManifestError: With a sentence for every broken line: number, what is wrong, what to do.
    """
    path = Path(path).absolute()
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ManifestError([f"manifest '{path}' cannot be read ({error.strerror}); check the path"]) from None
    except UnicodeDecodeError as error:
        raise ManifestError([f"{path.name}: not UTF-8 text (byte {error.start}); save it as UTF-8"]) from None
    problems: list[str] = []
    records: list[Record] = []
    line_of: dict[str, int] = {}
    split_of_group: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _record(line, path.parent)
            if record.id in line_of:
                raise ValueError(f"id '{record.id}' is also on line {line_of[record.id]}; ids must be unique")
            split, first = split_of_group.setdefault(record.group, (record.split, number))
            if split != record.split:
                raise ValueError(
                    f"group '{record.group}' is in split '{record.split}' here and in '{split}' on line {first}; "
                    "keep a group on one side"
                )
            line_of[record.id] = number
            records.append(record)
        except ValueError as error:
            problems.append(f"{path.name} line {number}: {error}")
    if not records and not problems:
        problems.append(f"manifest '{path}' is empty; write one JSON object a line")
    if problems:
        raise ManifestError(problems)
    return _with_queries(records)


def check_pixels(records: list[Record]) -> list[str]:
    """Decode every image and mask and say what does not agree with the manifest.

    Returns:
        One sentence for each problem; empty when all is well.
    """
    problems = []
    for record in tqdm(records, desc="checking pixels", unit="image"):
        try:
            size, values = read_image(record.image).shape[:2], decode(record.mask)
        except ImageError as error:
            problems.append(f"{record.id}: {error}")
            continue
        mask = values != 0 if values.ndim == 2 else values.any(-1)
        fraction = float(mask.mean())
        if mask.shape != size:
            problems.append(
                f"{record.id}: mask is {mask.shape[1]}x{mask.shape[0]} but image is {size[1]}x{size[0]}; resize one"
            )
        if not (values[mask] == values[mask][:1]).all():
            problems.append(
                f"{record.id}: mask has more than two values; write 0 for background, 255 for lesion, as PNG"
            )
        if (fraction == 0) != (record.lesion == "none"):
            held = "is empty" if fraction == 0 else "is not empty"
            problems.append(f"{record.id}: lesion is '{record.lesion}' but the mask {held}; correct one of them")
        elif abs(fraction - record.mask_fraction) > 1e-4 + 0.01 * fraction:
            problems.append(
                f"{record.id}: mask_fraction is {record.mask_fraction} but {fraction:.5f} of the mask is lesion; "
                "correct the line"
            )
    return problems


def _record(line: str, folder: Path) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise ValueError(f"not JSON that can be read ({error}); write one object a line") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object; write {...}")
    if missing := [name for name in (*TEXT_FIELDS, *NUMBER_FIELDS) if name not in fields]:
        raise ValueError(f"field {' and '.join(map(repr, missing))} is missing; add it")
    for name in (*TEXT_FIELDS, *(n for n in OPTIONAL_TEXT_FIELDS if n in fields)):
        if not isinstance(fields[name], str) or (name in TEXT_FIELDS and not fields[name].strip()):
            raise ValueError(f"field '{name}' is {fields[name]!r}; it must be text")
        if any("\ud800" <= letter <= "\udfff" for letter in fields[name]):
            raise ValueError(f"field '{name}' holds half of a character, {ascii(fields[name])}; write it in full")
    for name in ("width", "height"):
        if type(fields[name]) is not int or fields[name] < 1:
            raise ValueError(f"field '{name}' is {fields[name]!r}; it must be a whole number of pixels")
    fraction = fields["mask_fraction"]
    if type(fraction) not in (int, float) or not 0 <= fraction <= 1:
        raise ValueError(f"field 'mask_fraction' is {fraction!r}; it must lie in 0..1")
    if fields["split"] not in SPLITS:
        raise ValueError(f"split '{fields['split']}' is unknown; use train, val or test")
    if (fields["lesion"] == "none") != (fraction == 0):
        raise ValueError(f"lesion is '{fields['lesion']}' but mask_fraction is {fraction}; 'none' goes with 0")
    paths = {}
    for name in ("image", "mask"):
        paths[name] = folder / fields[name]
        if Path(fields[name]).is_absolute() or ".." in Path(fields[name]).parts:
            raise ValueError(
                f"{name} path '{fields[name]}' leaves the manifest's folder; use a relative path inside it"
            )
        try:
            found = image_size(paths[name])
        except ImageError as error:
            raise ValueError(f"{name} {error}") from None
        if found != (fields["width"], fields["height"]):
            raise ValueError(
                f"{name} '{fields[name]}' is {found[0]}x{found[1]} but the line says "
                f"{fields['width']}x{fields['height']}; resize it or correct the line"
            )
    names = (*TEXT_FIELDS, *NUMBER_FIELDS, *OPTIONAL_TEXT_FIELDS)
    return Record(**{"query": ""} | {name: fields[name] for name in names if name in fields} | paths)


def _with_queries(records: list[Record]) -> list[Record]:
    """Ask for the lesion by name; where there is none, for a lesion that other images of the source have."""
    names: dict[str, list[str]] = defaultdict(list)
    for record in records:
        name = asked_name(record.lesion)
        if record.lesion != "none" and name not in names[record.source]:
            names[record.source].append(name)
    return [record if record.query else _with_query(record, sorted(names[record.source])) for record in records]


def _with_query(record: Record, names: list[str]) -> Record:
    if record.lesion != "none":
        name = asked_name(record.lesion)
    else:
        pick = int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:4], "big")
        name = names[pick % len(names)] if names else "lesion"
    query = f"Locate and segment the {name} in this {record.anatomy} {record.modality}."
    return Record(**{**record.__dict__, "query": query})


def asked_name(lesion: str) -> str:
    """The lesion's name without the verdict, which the reader of an image does not know beforehand."""
    return lesion.removeprefix("benign ").removeprefix("malignant ")
