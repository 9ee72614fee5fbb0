"""Opening a million rows, and samples a second from a folder and from shards.

    python -m benchmarks.loader ../shared/data/lesions/manifest.jsonl --out docs/results/loader.json

Memory is of a fresh process: `private` is its own, `mapped` are pages of the index that the kernel may drop.
Throughput is per second of processor time, so that other work on the machine does not count; files are in its cache.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import run
from lab.data.images import load_sample
from lab.data.manifest import read_manifest
from lab.data.mixture import MixtureSampler, Part
from lab.data.pack import pack
from lab.data.packed import SCHEMA, PackedRecords
from lab.data.sample import Record
from lab.evaluation.report import machine


def write_rows(folder: Path, manifest: Path, rows: int) -> Path:
    """An index of so many rows, those of a manifest again and again under new names; its files are not there."""
    records = read_manifest(manifest)
    with pq.ParquetWriter(folder / "million.parquet", SCHEMA, compression="zstd") as writer:
        for start in range(0, rows, len(records)):
            block = [
                record.__dict__
                | {"id": f"{record.id}/{place}", "image_number": place, "group": f"{record.group}/{start}"}
                | {name: f"{record.source}/{name}s/{place:09d}.png" for name in ("image", "mask")}
                for place, record in enumerate(records[: rows - start], start=start)
            ]
            writer.write_table(pa.Table.from_pylist(block, SCHEMA))
    return folder / "million.parquet"


def as_lines(index: Path) -> Path:
    """The same rows as JSON lines."""
    path = index.with_suffix(".jsonl")
    names = [name for name in SCHEMA.names if name in Record.__dataclass_fields__]
    with path.open("w") as file:
        for batch in pq.ParquetFile(index).iter_batches(columns=names):
            file.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    return path


def draw(records: Sequence[Record]) -> int:
    """Sample 100 batches of 16 records."""
    sampler = MixtureSampler([(Part("a", per_batch=16, balance=0.5), records)], 100, 0, lambda: 0)
    return len({records[index].id for batch in sampler for index, _ in batch})


def open_index(index: Path) -> tuple[dict, Sequence[Record]]:
    """Open, filter and sample an index; seconds of each, and all records."""
    start = time.perf_counter()
    records = PackedRecords(index)
    opened = time.perf_counter()
    train = records.of_split("train")
    filtered = time.perf_counter()
    draw(train)
    seconds = np.diff([start, opened, filtered, time.perf_counter()])
    return dict(zip(("open_s", "filter_s", "sample_1600_s"), np.round(seconds, 4).tolist())), records


def open_lines(path: Path) -> tuple[dict, Sequence[Record]]:
    """The same from JSON lines, all of which become records; the headers of the files are not looked at."""
    start = time.perf_counter()
    with path.open() as file:
        records = [Record(**json.loads(line)) for line in file]
    opened = time.perf_counter()
    train = [record for record in records if record.split == "train"]
    filtered = time.perf_counter()
    draw(train)
    seconds = np.diff([start, opened, filtered, time.perf_counter()])
    return dict(zip(("open_s", "filter_s", "sample_1600_s"), np.round(seconds, 4).tolist())), records


def in_fresh_process(function: Callable[[Path], tuple], path: Path) -> dict:
    """What a function gives, and the memory that this took."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_memory, (function, path))


def _with_memory(function: Callable[[Path], tuple], path: Path) -> dict:
    process = psutil.Process()
    before = process.memory_info()
    found, records = function(path)
    after = process.memory_info()
    private = (after.rss - after.shared) - (before.rss - before.shared)
    found |= {"rows": len(records)}
    return found | {"private_MB": round(private / 1e6, 1), "mapped_MB": round((after.shared - before.shared) / 1e6, 1)}


def throughput(places: dict[str, Sequence[Record]], samples: int) -> dict[str, float]:
    """Samples (image and mask, decoded) a second of processor time, in random order; medians of five rounds in turn."""
    count = min(len(records) for records in places.values())
    chosen = np.random.default_rng(0).choice(count, min(samples, count), replace=False)
    seconds: dict[str, list[float]] = {name: [] for name in places}
    for _ in range(6):  # the first round fills the cache
        for name, records in places.items():
            start = time.process_time()
            for place in chosen:
                load_sample(records[int(place)])
            seconds[name].append(time.process_time() - start)
    return {name: round(len(chosen) / float(np.median(rounds[1:])), 1) for name, rounds in seconds.items()}


def main(manifest: Path, out: Path | None = None, rows: int = 1_000_000, samples: int = 1000) -> None:
    """Measure and print; the last line is JSON.

    Args:
        manifest: Whose records are read, and repeated for the million.
        out: Also written here.
        rows: Of the index that is opened.
        samples: Records whose pixels are read.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CORE_SEG_CACHE"] = f"{folder}/cache"
        index = write_rows(Path(folder), manifest, rows)
        start = time.perf_counter()
        PackedRecords(index)
        result = {"first_opening_s": round(time.perf_counter() - start, 2)}
        result["parquet_MB"] = round(index.stat().st_size / 1e6, 1)
        result["index"] = in_fresh_process(open_index, index)
        result["lines"] = in_fresh_process(open_lines, as_lines(index))
        start, cpu = time.perf_counter(), time.process_time()
        shards = pack(manifest, Path(folder) / "shards", 1000, 1)
        packed = {"records_per_core_second": round(len(PackedRecords(shards)) / (time.process_time() - cpu), 1)}
        result["pack"] = packed | {"seconds": round(time.perf_counter() - start, 1)}
        places = {"folder": read_manifest(manifest), "shards": read_manifest(shards)}
        result["samples_per_core_second"] = throughput(places, samples)
    line = json.dumps(result | machine())
    if out:
        out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    run(main)
