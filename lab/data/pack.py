"""Packs a manifest: its lines into a Parquet index, its images and masks into tar shards that WebDataset reads too."""

import hashlib
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from lab.data.manifest import (
    LinesBefore,
    ManifestError,
    line_problems,
    manifest_lines,
    named_by_source,
    parse_line,
    read_line,
    with_query,
)
from lab.data.packed import INDEX, SCHEMA, shard_name
from lab.data.sample import Record
from lab.errors import LabError


class Layout:
    """Where the lines of a manifest are in its file, and in what order they are packed: image after image.

    Reading it is the first of two passes, which looks at no image and keeps a few numbers a line.
    """

    def __init__(self, manifest: Path) -> None:
        self.manifest, self.problems = manifest, []
        before, number_of = LinesBefore(), {}
        names: dict[str, set[str]] = defaultdict(set)
        numbers, places, images = [], [], []
        for number, place, line in tqdm(manifest_lines(manifest), desc="reading lines", unit="line"):
            try:
                fields = parse_line(line)
                for problem in self._broken(fields, number, before):
                    raise ValueError(problem)
            except ValueError as error:
                self.problems.append(f"{manifest.name} line {number}: {error}")
                continue
            named_by_source(names, fields["source"], fields["lesion"])
            numbers.append(number)
            places.append(place)
            images.append(number_of.setdefault(fields["image"], len(number_of)))
        self.names = {source: sorted(found) for source, found in names.items()}
        images = np.array(images, np.int32)
        order = np.argsort(images, kind="stable")
        self.images, self.numbers, self.places = images[order], np.array(numbers)[order], np.array(places)[order]

    def _broken(self, fields: dict, number: int, before: LinesBefore) -> Iterator[str]:
        known = [fields.get(name) for name in ("id", "group", "split", "image", "source", "lesion")]
        if not all(isinstance(value, str) for value in known):
            yield from line_problems(fields, self.manifest.parent)
        else:
            yield from before.problems(number, *known[:3])

    def parts(self, images_per_part: int) -> Iterator[slice]:
        """Runs of lines with so many images each, in order."""
        ends = np.searchsorted(self.images, np.arange(0, self.images[-1] + 1 + images_per_part, images_per_part))
        return (slice(int(a), int(b)) for a, b in zip(ends, ends[1:]))

    def records(self, part: slice) -> tuple[list[tuple[int, Record]], list[str]]:
        """The records of a run of lines with their image numbers, queries filled in; and what is wrong with others."""
        records, problems = [], []
        with self.manifest.open("rb") as file:
            for image, number, place in zip(self.images[part], self.numbers[part], self.places[part]):
                file.seek(place)
                try:
                    record = read_line(file.readline().decode("utf-8-sig"), self.manifest.parent)
                    records.append((int(image), with_query(record, self.names.get(record.source, []))))
                except ValueError as error:
                    problems.append(f"{self.manifest.name} line {number}: {error}")
        return records, problems


def pack(manifest: Path, out: Path, images_per_shard: int, workers: int) -> Path:
    """Write the index of a manifest, with shards or without.

    A stopped run goes on where it stopped: a part that was written from this very manifest is not written again.

    Args:
        manifest: A `manifest.jsonl`.
        out: A folder for `index.parquet` and the shards; or the name of a Parquet file beside the manifest, for an
            index alone, whose images stay where they are.
        images_per_shard: Images in a shard, with all of their masks.
        workers: Shards that are written at once.

    Returns:
        The path of the index.

    Raises:
        ManifestError: With a sentence for every broken line; no index is written then.
        LabError: Where something else is in the way.
    """
    manifest, out = Path(manifest).absolute(), Path(out).absolute()
    alone = out.suffix == ".parquet"
    if alone and out.parent != manifest.parent:
        raise LabError(f"'{out}' is an index without images and must lie beside '{manifest}', whose paths it holds")
    index, parts = (out, out.with_suffix(".parts")) if alone else (out / INDEX, out / "parts")
    with manifest.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    stamp = {b"manifest": f"{digest}-{images_per_shard}".encode()}
    if index.exists():
        if (pq.read_schema(index).metadata or {}).get(b"manifest") == stamp[b"manifest"]:
            return index
        raise LabError(f"'{index}' is of another manifest or was packed otherwise; delete it or give another place")
    layout = Layout(manifest)
    problems = layout.problems
    if not len(layout.images):
        raise ManifestError(problems or [f"manifest '{manifest}' is empty; write one JSON object a line"])
    parts.mkdir(parents=True, exist_ok=True)
    slices = list(layout.parts(images_per_shard))
    files = [parts / f"{number:05d}.parquet" for number in range(len(slices))]
    remove_others(out, parts, len(slices), stamp)

    def write(number: int) -> list[str]:
        if files[number].is_file():
            return []
        records, wrong = layout.records(slices[number])
        if not wrong:
            rows = [row(image, record, manifest.parent) for image, record in records]
            if not alone:
                write_shard(out / shard_name(number), number, records, rows)
            table = pa.Table.from_pylist(rows, SCHEMA.with_metadata(stamp))
            replace(files[number], lambda path: pq.write_table(table, path))
        return wrong

    with ThreadPoolExecutor(workers) as pool:
        for wrong in tqdm(pool.map(write, range(len(slices))), desc="packing", unit="part", total=len(slices)):
            problems += wrong
    if problems:
        raise ManifestError(problems)
    replace(index, lambda path: join(path, files, SCHEMA.with_metadata(stamp)))
    for file in files:
        file.unlink()
    parts.rmdir()
    return index


def remove_others(out: Path, parts: Path, count: int, stamp: dict[bytes, bytes]) -> None:
    """Remove what stopped runs have left of another manifest or of shards of another size: parts that do not bear the
    stamp, shards from number `count` on, and unfinished files."""
    for path in parts.iterdir():
        if re.fullmatch(r"\.\d{5,}\.parquet\.unfinished", path.name) or (
            re.fullmatch(r"\d{5,}\.parquet", path.name) and pq.read_schema(path).metadata != stamp
        ):
            path.unlink()
    for path in out.iterdir() if out.is_dir() else ():  # an index alone is a file, and has no shards
        number = re.fullmatch(r"\.?shard-(\d{5,})\.tar(?:\.unfinished)?", path.name)
        if number and (path.name.startswith(".") or int(number[1]) >= count):
            path.unlink()


def row(image_number: int, record: Record, folder: Path) -> dict:
    """A record as a row of the index, with paths relative to the manifest's folder."""
    paths = {name: str(getattr(record, name).relative_to(folder)) for name in ("image", "mask")}
    return asdict(record) | paths | {"image_number": image_number}


def write_shard(path: Path, number: int, records: list[tuple[int, Record]], rows: list[dict]) -> None:
    """Write a tar file and note in the rows where in it everything is.

    An image is one sample of WebDataset: `KEY.image.jpg`, and for its n-th record `KEY.n.mask.png` and `KEY.n.json`.
    """

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            before, place, written = None, 0, {}
            for (image, record), fields in zip(records, rows):
                if image != before:
                    before, place = image, 0
                    written = add(tar, f"{image:09d}.image{record.image.suffix.lower()}", record.image.read_bytes())
                mask = add(tar, f"{image:09d}.{place}.mask{record.mask.suffix.lower()}", record.mask.read_bytes())
                add(tar, f"{image:09d}.{place}.json", json.dumps(fields).encode())
                place += 1
                fields |= {"shard": number}
                for name, (member, offset, size) in (("image", written), ("mask", mask)):
                    fields |= {name: member, f"{name}_offset": offset, f"{name}_size": size}

    replace(path, write)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> tuple[str, int, int]:
    """Append a file; its name, the offset of its first byte in the tar file, and its bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, BytesIO(content))
    blocks = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return name, tar.offset - blocks, len(content)


def join(path: Path, files: list[Path], schema: pa.Schema) -> None:
    """One Parquet file of several, read one after the other."""
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for file in files:
            writer.write_table(pq.read_table(file).replace_schema_metadata(schema.metadata))


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let a file be written under another name first, so that a killed run leaves no half of it."""
    temporary = path.with_name(f".{path.name}.unfinished")
    write(temporary)
    temporary.replace(path)
