"""What is wrong with a manifest, all of it at once: lines, files, pixels, words, and what two splits share."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image
from tqdm import tqdm

from lab.data.images import ImageError, decode, read_image
from lab.data.manifest import LinesBefore, line_problems, manifest_lines, mark_problems, parse_line
from lab.data.packed import PackedRecords, is_packed
from lab.data.sample import Member, Record, leaves

NEAR = 3
"""Bits of 64 in which the perceptual hashes of near-duplicates differ at most."""
_NUMBER = r"[-+]?\d+(?:\.\d+)?\s*%?"
_COORDINATES = re.compile(
    rf"""
    [\[(<{{]\s*{_NUMBER}(?:\s*[,;]\s*{_NUMBER})+\s*[\])>}}]            # [8, 31, 40, 66], (120; 85)
    | <\s*(?:loc|box|point|bin)[^>]*\d[^>]*>                           # <loc0123>
    | \b(?:x|y|x[12]|y[12]|x_?(?:min|max)|y_?(?:min|max))\s*[=:]\s*{_NUMBER}
    | \b[xy]\s+(?:is|at)\s+\d
    | \b(?:[xy]-(?:axis|position|value)|row|column|coordinates?|bbox|bounding\ box|pixels?|px)
      \W+(?:(?:of|is|are|at|from)\W+)*\d
    | \b\d+(?:\.\d+)?\s*(?:px|pixels?)\b
    | \b{_NUMBER}\s*(?:percent|per\ cent)?\s*(?:of\ the\ way\s*)?(?:from|off)\ the
      \ (?:top|bottom|left|right|upper|lower)
    | \b(?:at|to|from|around|near)\s+{_NUMBER}\s*,\s*{_NUMBER}
    """,
    re.IGNORECASE | re.VERBOSE,
)


@dataclass
class Look:
    """What was seen of one line."""

    number: int
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fields: dict = field(default_factory=dict)
    pixels: bytes = b""
    """Digest of the decoded image; empty where it cannot be read."""
    record: bytes = b""
    """Digest of image, mask and query."""
    near: int | None = None
    """Perceptual hash of 64 bits (pHash); None for an image of one value, which looks like any other such."""


@dataclass(frozen=True)
class Report:
    """What `check_manifest` found, a sentence each."""

    lines: int
    problems: list[str]
    """Of what must not be."""
    warnings: list[str]
    """Of what a person should look at."""


def check_manifest(path: Path | str, workers: int) -> Report:
    """Read every line, image and mask of a manifest and say all that is wrong.

    Args:
        path: A `manifest.jsonl`, or what `core-seg data pack` wrote, whose rows count as lines.
        workers: Threads that decode.

    Raises:
        LabError: Where the file itself cannot be read.
    """
    path = Path(path).absolute()
    before, looks, problems, warnings = LinesBefore(), [], [], []
    with ThreadPoolExecutor(workers) as pool, tqdm(desc="checking", unit="line") as bar:
        if is_packed(path):
            lines, see = enumerate(PackedRecords(path), start=1), look_at_record
        else:
            lines, see = manifest_lines(path), lambda number, _, line: look_at_line(number, line, path.parent)
        while batch := list(islice(lines, 1024)):
            for look in pool.map(lambda numbered: see(*numbered), batch):
                known = [look.fields.get(name) for name in ("id", "group", "split")]
                if all(isinstance(value, str) for value in known):
                    look.problems += before.problems(look.number, *known)
                problems += [f"{path.name} line {look.number}: {problem}" for problem in look.problems]
                warnings += [f"{path.name} line {look.number}: {warning}" for warning in look.warnings]
                look.fields = {name: str(look.fields.get(name)) for name in ("split", "image")}
                looks.append(look)
                bar.update()
    if not looks:
        problems.append(f"manifest '{path}' is empty; write one JSON object a line")
    problems += [f"{path.name} {sentence}" for sentence in shared_pixels(looks)]
    warnings += [f"{path.name} {sentence}" for sentence in (*repeated(looks), *near_duplicates(looks))]
    return Report(len(looks), problems, warnings)


def look_at_line(number: int, line: str, folder: Path) -> Look:
    """A line with its files and words; what it shares with other lines is not seen here."""
    look = Look(number)
    try:
        look.fields = parse_line(line)
    except ValueError as error:
        look.problems.append(str(error))
        return look
    look.problems += line_problems(look.fields, folder)
    given = {name: look.fields.get(name) for name in ("image", "mask")}
    files = {name: folder / path for name, path in given.items() if isinstance(path, str) and not leaves(path)}
    for name in look_at_content(look, {name: path for name, path in files.items() if path != folder}):
        if not files[name].resolve().is_relative_to(folder.resolve()):
            look.warnings.append(f"{name} '{given[name]}' is a link out of the manifest's folder; a copy would lack it")
    look.problems = list(dict.fromkeys(look.problems))  # a header and its pixels can break for the same reason
    return look


def look_at_record(number: int, record: Record) -> Look:
    """A row of an index with its files and words."""
    look = Look(number, fields=record.__dict__ | {"image": record.image.name, "mask": record.mask.name})
    look_at_content(look, {"image": record.image, "mask": record.mask})
    return look


def look_at_content(look: Look, files: dict[str, Path | Member]) -> list[str]:
    """Read the words and decode image and mask; each is judged even where the other cannot be read.

    Returns:
        Which of image and mask could be.
    """
    look.problems += text_problems(look.fields)
    arrays = {}
    for name, read in (("image", read_image), ("mask", decode)):
        try:
            arrays |= {name: read(files[name])} if name in files else {}
        except ImageError as error:
            look.problems.append(f"{name} {error}")
    if "image" in arrays:
        image = arrays["image"]
        look.pixels = digest(image)
        if image.min() == image.max():
            look.warnings.append(f"image '{look.fields['image']}' is of one value only; look whether it is damaged")
        else:
            bits = np.packbits(imagehash.phash(Image.fromarray(image)).hash)
            look.near = int.from_bytes(bits.tobytes(), "big")
    if "mask" in arrays:
        values = arrays["mask"]
        mask = values != 0 if values.ndim == 2 else values.any(-1)
        look.problems += mask_problems(values, mask, look.fields)
        if mask.all():
            look.warnings.append(f"mask '{look.fields['mask']}' is lesion everywhere; look whether it is inverted")
        if "image" in arrays:
            if mask.shape != image.shape[:2]:
                sizes = "{1}x{0} but image is {3}x{2}".format(*mask.shape, *image.shape)
                look.problems.append(f"mask is {sizes}; resize one")
            look.record = look.pixels + digest(mask) + str(look.fields.get("query", "")).encode("utf-8", "replace")
    return list(arrays)


def mask_problems(values: np.ndarray, mask: np.ndarray, fields: dict) -> Iterator[str]:
    """What does not agree between the values of a mask, (H, W) or (H, W, 3), (H, W) bool of them, and its line."""
    if not (values[mask] == values[mask][:1]).all():
        yield "mask has more than two values; write 0 for background, 255 for lesion, as PNG"
    fraction, lesion, said = float(mask.mean()), fields.get("lesion"), fields.get("mask_fraction")
    if isinstance(lesion, str) and (fraction == 0) != (lesion == "none"):
        held = "is empty" if fraction == 0 else "is not empty"
        yield f"lesion is '{lesion}' but the mask {held}; correct one of them"
    elif isinstance(said, int | float) and abs(fraction - said) > 1e-4 + 0.01 * fraction:
        yield f"mask_fraction is {said} but {fraction:.5f} of the mask is lesion; correct the line"


def text_problems(fields: dict) -> Iterator[str]:
    """Words that give the place away, or that break the answer they would become part of."""
    yield from mark_problems(fields)
    for name in ("query", "reasoning"):
        text = fields.get(name)
        if isinstance(text, str) and (found := coordinates(text)):
            yield f"{name} gives coordinates away, '{found}'; say where in words"


def coordinates(text: str) -> str:
    """The first place in a text that gives numbers for a position; empty where none does.

    Sizes in millimetres, ages and counts are no coordinates.
    """
    found = _COORDINATES.search(text)
    return found.group() if found else ""


def digest(array: np.ndarray) -> bytes:
    """16 bytes that differ where shape or values do."""
    return hashlib.blake2b(np.ascontiguousarray(array), digest_size=16, key=repr(array.shape).encode()).digest()


def shared_pixels(looks: Iterable[Look]) -> Iterator[str]:
    """Images whose very pixels are in two splits, whatever their files are called."""
    first: dict[bytes, Look] = {}
    for look in looks:
        other = first.setdefault(look.pixels, look)
        if look.pixels and other.fields["split"] != look.fields["split"]:
            yield (
                f"line {look.number}: image '{look.fields['image']}' of split '{look.fields['split']}' has the pixels "
                f"of '{other.fields['image']}' of split '{other.fields['split']}' on line {other.number}; "
                "keep them in one split"
            )


def repeated(looks: Iterable[Look]) -> Iterator[str]:
    """Lines that repeat image, mask and query of another under a new id."""
    first: dict[bytes, Look] = {}
    for look in looks:
        other = first.setdefault(look.record, look)
        if look.record and other is not look:
            yield f"line {look.number}: image, mask and query are those of line {other.number}; drop one"


def near_duplicates(looks: list[Look]) -> Iterator[str]:
    """Images of one split that look like an image of another, by perceptual hash; one sentence a line."""
    once = {(look.pixels, look.fields["split"]): look for look in reversed(looks) if look.near is not None}
    seen = list(once.values())[::-1]
    told = set()
    for a, b in near_pairs(np.array([look.near for look in seen], np.uint64)):
        one, other = seen[a], seen[b]
        if one.fields["split"] == other.fields["split"] or one.pixels == other.pixels or other.number in told:
            continue
        told.add(other.number)
        yield (
            f"line {other.number}: image '{other.fields['image']}' of split '{other.fields['split']}' looks like "
            f"'{one.fields['image']}' of split '{one.fields['split']}' on line {one.number}; "
            "if they are one case, keep them in one split"
        )


def near_pairs(hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs a < b of places in (N,) uint64 whose values differ in at most `NEAR` bits, ordered by b, then a.

    Values that differ in 3 bits agree in one of 4 bands of 16 bits, so that only those within a band are compared.
    """
    pairs = set()
    for band in range(NEAR + 1):
        key = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(key, kind="stable")
        for block in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            for place, index in enumerate(block[:-1]):
                rest = block[place + 1 :]
                close = rest[np.bitwise_count(hashes[rest] ^ hashes[index]) <= NEAR]
                pairs.update((int(index), int(other)) for other in close)
    return iter(sorted(pairs, key=lambda pair: pair[::-1]))
