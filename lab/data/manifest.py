"""The manifest: one JSON object a line, every broken line reported, nothing dropped silently."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lab.data.images import ImageError, image_size
from lab.data.packed import PackedRecords, is_packed
from lab.data.sample import Record, leaves
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


def read_manifest(path: Path | str) -> Sequence[Record]:
    """Read and validate a manifest, looking at the headers of its images and masks but not at their pixels.

    Args:
        path: A `manifest.jsonl`; the format is in `../shared/data/README.md` and in the README. `query` and `reasoning`
            may be left out: the query then asks for the lesion by name. Or what `core-seg data pack` wrote, the folder
            or the Parquet file, which was validated then; its records are made when they are asked for.

    Raises:
        ManifestError: With a sentence for every broken line: number, what is wrong, what to do.
    """
    path = Path(path).absolute()
    if is_packed(path):
        return PackedRecords(path)
    problems: list[str] = []
    records: list[Record] = []
    lines_before = LinesBefore()
    for number, _, line in manifest_lines(path):
        try:
            record = read_line(line, path.parent)
            for problem in lines_before.problems(number, record.id, record.group, record.split):
                raise ValueError(problem)
            records.append(record)
        except ValueError as error:
            problems.append(f"{path.name} line {number}: {error}")
    if not records and not problems:
        problems.append(f"manifest '{path}' is empty; write one JSON object a line")
    if problems:
        raise ManifestError(problems)
    return _with_queries(records)


class LinesBefore:
    """What lines may not say when another line before has said it."""

    def __init__(self) -> None:
        self.line_of: dict[str, int] = {}
        self.split_of_group: dict[str, tuple[str, int]] = {}

    def problems(self, number: int, identity: str, group: str, split: str) -> Iterator[str]:
        """Of line `number`: an id for the second time, a group on another side of a split."""
        first = self.line_of.setdefault(identity, number)
        if first != number:
            yield f"id '{identity}' is also on line {first}; ids must be unique"
        other, first = self.split_of_group.setdefault(group, (split, number))
        if other != split:
            yield (
                f"group '{group}' is in split '{split}' here and in '{other}' on line {first}; keep a group on one side"
            )


def manifest_lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """Number (from 1), place in the file (bytes) and text of the lines that are not blank, read one at a time.

    Raises:
        ManifestError: A file that cannot be read or is not UTF-8.
    """
    place = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield number, place, line
                place += len(raw)
    except OSError as error:
        raise ManifestError([f"manifest '{path}' cannot be read ({error.strerror}); check the path"]) from None
    except UnicodeDecodeError as error:
        where = place + error.start
        raise ManifestError([f"{path.name}: not UTF-8 text (byte {where}); save it as UTF-8"]) from None


def read_line(line: str, folder: Path) -> Record:
    """One line as a record; its query stays empty where the line has none.

    Raises:
        ValueError: The first thing that is wrong with the line.
    """
    fields = parse_line(line)
    for problem in line_problems(fields, folder):
        raise ValueError(problem)
    names = (*TEXT_FIELDS, *NUMBER_FIELDS, *OPTIONAL_TEXT_FIELDS)
    paths = {name: folder / fields[name] for name in ("image", "mask")}
    return Record(**{"query": ""} | {name: fields[name] for name in names if name in fields} | paths)


def parse_line(line: str) -> dict:
    """The JSON object of a line.

    Raises:
        ValueError: When it is none.
    """
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise ValueError(f"not JSON that can be read ({error}); write one object a line") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object; write {...}")
    return fields


def line_problems(fields: dict, folder: Path) -> Iterator[str]:
    """What is wrong with the fields of a line and the headers of its files, a sentence each."""
    if missing := [name for name in (*TEXT_FIELDS, *NUMBER_FIELDS) if name not in fields]:
        yield f"field {' and '.join(map(repr, missing))} is missing; add it"
    sound = set()
    for name in (n for n in (*TEXT_FIELDS, *OPTIONAL_TEXT_FIELDS) if n in fields):
        if not isinstance(fields[name], str) or (name in TEXT_FIELDS and not fields[name].strip()):
            yield f"field '{name}' is {fields[name]!r}; it must be text"
        elif any("\ud800" <= letter <= "\udfff" for letter in fields[name]):
            yield f"field '{name}' holds half of a character, {ascii(fields[name])}; write it in full"
        else:
            sound.add(name)
    yield from mark_problems(fields)
    for name in (n for n in ("width", "height") if n in fields):
        if type(fields[name]) is not int or fields[name] < 1:
            yield f"field '{name}' is {fields[name]!r}; it must be a whole number of pixels"
        else:
            sound.add(name)
    fraction = fields.get("mask_fraction", 0)
    if type(fraction) not in (int, float) or not 0 <= fraction <= 1:
        yield f"field 'mask_fraction' is {fraction!r}; it must lie in 0..1"
    elif "lesion" in sound and "mask_fraction" in fields and (fields["lesion"] == "none") != (fraction == 0):
        yield f"lesion is '{fields['lesion']}' but mask_fraction is {fraction}; 'none' goes with 0"
    if "split" in sound and fields["split"] not in SPLITS:
        yield f"split '{fields['split']}' is unknown; use train, val or test"
    for name in (n for n in ("image", "mask") if n in sound):
        if leaves(fields[name]):
            yield f"{name} path '{fields[name]}' leaves the manifest's folder; use a relative path inside it"
            continue
        try:
            found = image_size(folder / fields[name])
        except ImageError as error:
            yield f"{name} {error}"
            continue
        if {"width", "height"} <= sound and found != (fields["width"], fields["height"]):
            yield (
                f"{name} '{fields[name]}' is {found[0]}x{found[1]} but the line says "
                f"{fields['width']}x{fields['height']}; resize it or correct the line"
            )


def mark_problems(fields: dict) -> Iterator[str]:
    """Words that break the answer they would become part of."""
    for name, marks in (("reasoning", "<>"), ("lesion", "<>[]")):
        text = fields.get(name)
        if isinstance(text, str) and any(mark in text for mark in marks):
            yield f"{name} holds one of {' '.join(marks)}, which are marks of the answer; leave them out"


class Derived:
    """A manifest that is made of the lines of another one, beside it, as their paths hold there.

    Args:
        manifest: The other one, a `manifest.jsonl`.
        name: Of the file that is to be written.

    Raises:
        LabError: The other one is packed, or the name is not that of another file in its folder.
    """

    def __init__(self, manifest: Path, name: str) -> None:
        self.manifest, self.path = manifest, manifest.parent / name
        if is_packed(manifest):
            raise LabError(f"'{manifest}' is packed; give the manifest.jsonl that it was packed from")
        if Path(name).name != name or self.path.is_dir():
            raise LabError(f"'{name}' is not the name of a file; give one, it is written beside '{manifest}'")
        if self.path.exists() and manifest.exists() and self.path.samefile(manifest):
            raise LabError(f"'{name}' is the manifest itself; give another name")

    def write(self, kept: Mapping[str, dict]) -> None:
        """Write the lines with these ids, as they are but for the fields that are given."""
        replace_lines(self.path, self._lines(kept))

    def _lines(self, kept: Mapping[str, dict]) -> Iterator[str]:
        for _, _, line in manifest_lines(self.manifest):
            fields = parse_line(line)
            if fields["id"] in kept:
                changed = kept[fields["id"]]
                yield json.dumps(fields | changed) if changed else line.strip()


def replace_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file of lines under another name first, so that a stopped run leaves no half of it."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    part.replace(path)


def _with_queries(records: list[Record]) -> list[Record]:
    names: dict[str, set[str]] = defaultdict(set)
    for record in records:
        named_by_source(names, record.source, record.lesion)
    chosen = {source: sorted(found) for source, found in names.items()}
    return [with_query(record, chosen.get(record.source, [])) for record in records]


def named_by_source(names: dict[str, set[str]], source: str, lesion: str) -> None:
    """Note how a record's lesion is asked for."""
    if lesion != "none":
        names[source].add(asked_name(lesion))


def with_query(record: Record, names: list[str]) -> Record:
    """Ask for the lesion by name where nothing is asked; where there is none, for one of its source's `names`."""
    if record.query:
        return record
    if record.lesion != "none":
        name = asked_name(record.lesion)
    else:
        pick = int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:4], "big")
        name = names[pick % len(names)] if names else "lesion"
    return replace(record, query=f"Locate and segment the {name} in this {record.anatomy} {record.modality}.")


def asked_name(lesion: str) -> str:
    """The lesion's name without the verdict, which the reader of an image does not know beforehand."""
    return lesion.removeprefix("benign ").removeprefix("malignant ")
