"""A packed manifest: a Parquet index and, if images were packed too, tar shards; a million records open in no time.

Parquet cannot be read at one row, so that its rows are copied once into an Arrow file of the user's cache, which is
mapped into memory: what is not looked at is not loaded, and processes share it. Images in shards are read by offset.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from lab.data.sample import Member, Record, leaves
from lab.errors import LabError

INDEX = "index.parquet"
TEXTS = ("id", "image", "mask", "modality", "anatomy", "lesion", "source", "license", "split", "group", "query")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in (*TEXTS, "reasoning")),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mask_fraction", pa.float64()),
        ("image_number", pa.int32()),  # records of one image have one number
        ("shard", pa.int32()),  # null where images stayed in their folder
        ("image_offset", pa.int64()),  # bytes from the start of the shard
        ("image_size", pa.int64()),  # bytes
        ("mask_offset", pa.int64()),
        ("mask_size", pa.int64()),
    ]
)
"""Of the index; `image` and `mask` are paths relative to its folder, or names in the shard."""
ROWS = 65_536
"""Rows of a record batch."""


def shard_name(number: int) -> str:
    """File of a shard, in the folder of the index."""
    return f"shard-{number:05d}.tar"


class PackedRecords(Sequence[Record]):
    """The records of an index, made when they are asked for.

    Args:
        path: Of the Parquet file, or of the folder with its `index.parquet`.
        rows: Those of the index that belong; None for all.

    Raises:
        LabError: No such file, or not an index that `core-seg data pack` wrote.
    """

    def __init__(self, path: Path | str, rows: np.ndarray | None = None) -> None:
        path = Path(path).absolute()
        self.path = path / INDEX if path.is_dir() else path
        table = mapped(self.path)
        self.columns = dict(zip(table.column_names, table.itercolumns()))
        self.rows = np.arange(len(table)) if rows is None else rows

    def __reduce__(self) -> tuple:
        return PackedRecords, (self.path, self.rows)  # another process maps the file, too

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int | slice) -> "Record | PackedRecords":
        if isinstance(place, slice):
            return PackedRecords(self.path, self.rows[place])
        row = int(self.rows[place])
        fields = {name: column[row].as_py() for name, column in self.columns.items()}
        shard = fields.pop("shard")
        for name in ("image", "mask"):
            offset, size = fields.pop(f"{name}_offset"), fields.pop(f"{name}_size")
            if shard is not None:
                fields[name] = Member(self.path.parent / shard_name(shard), fields[name], offset, size)
            elif leaves(fields[name]):
                raise LabError(
                    f"{self.path} row {row}: {name} path '{fields[name]}' leaves the index's folder; pack anew"
                )
            else:
                fields[name] = self.path.parent / fields[name]
        del fields["image_number"]
        return Record(**fields)

    def of_split(self, split: str) -> "PackedRecords":
        """Those of one split."""
        chosen = pc.equal(self.columns["split"], split).to_numpy()
        return PackedRecords(self.path, self.rows[chosen[self.rows]])

    def codes(self, name: str) -> np.ndarray:
        """(N,) int: the values of a column as numbers; equal where the values are."""
        column = self.columns[name]
        if pa.types.is_string(column.type):
            encoded = column.dictionary_encode().unify_dictionaries()
            column = pa.chunked_array([chunk.indices for chunk in encoded.chunks])
        return column.to_numpy()[self.rows]


def is_packed(path: Path | str) -> bool:
    """Whether a path names an index or the folder of one, rather than a manifest of lines."""
    return Path(path).suffix == ".parquet" or (Path(path) / INDEX).is_file()


def mapped(path: Path) -> pa.Table:
    """The rows of an index, mapped into memory; copied to the cache when this very file has not been before.

    The cache is `CORE_SEG_CACHE`, or `~/.cache/core-seg`; what is in there can be deleted at any time.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise LabError(f"index '{path}' cannot be read ({error.strerror}); check the path") from None
    key = hashlib.sha256(f"{path}\0{state.st_size}\0{state.st_mtime_ns}".encode()).hexdigest()[:32]
    cache = Path(os.environ.get("CORE_SEG_CACHE") or Path.home() / ".cache" / "core-seg") / f"{key}.arrow"
    if not cache.is_file():
        try:
            _copy(path, cache)
        except (pa.ArrowException, KeyError) as error:
            first = str(error).strip("'\"").splitlines()[0]
            raise LabError(f"'{path}' is not an index that core-seg data pack wrote ({first}); pack it anew") from None
    return pa.ipc.open_file(pa.memory_map(str(cache))).read_all()


def _copy(path: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_suffix(f".{os.getpid()}")
    with pq.ParquetFile(path) as file, pa.ipc.new_file(str(temporary), SCHEMA) as writer:
        total = file.metadata.num_rows
        with tqdm(total=total, desc=f"{path.name}: first opening", unit="row", disable=total < ROWS) as bar:
            for batch in file.iter_batches(ROWS, columns=SCHEMA.names):
                writer.write_table(pa.Table.from_batches([batch]).select(SCHEMA.names).cast(SCHEMA))
                bar.update(len(batch))
    temporary.replace(cache)
