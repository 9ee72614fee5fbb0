"""One record of a manifest, and the same record with its pixels loaded."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np


@dataclass(frozen=True)
class Member:
    """A file within a tar shard."""

    shard: Path
    name: str
    offset: int
    """Of its first byte, from the start of the shard."""
    size: int
    """Bytes."""

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read_bytes(self) -> bytes:
        """Its content; shorter where the shard ends before.

        Raises:
            OSError: A shard that cannot be read.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(min(self.size, os.fstat(file.fileno()).st_size))


@dataclass(frozen=True)
class Record:
    """One manifest line; paths are absolute, `lesion` is "none" exactly where the mask is empty."""

    id: str
    image: Path | Member
    mask: Path | Member
    width: int
    height: int
    modality: str
    anatomy: str
    lesion: str
    source: str
    license: str
    split: str
    group: str
    mask_fraction: float
    query: str
    """What is asked about the image; `read_manifest` fills it in where the file has none."""
    reasoning: str = ""
    """Chain of thought; empty means that it is written from facts measured on the mask."""


def evenly(records: Sequence[Record], count: int) -> Sequence[Record]:
    """So many of the records, evenly spread; all of them when the count is 0, or more than there are."""
    if not 0 < count < len(records):
        return records
    return [records[place * len(records) // count] for place in range(count)]


@dataclass(frozen=True)
class Sample:
    """A record with its pixels: `image` (H, W, 3) uint8 RGB, `mask` (H, W) bool."""

    record: Record
    image: np.ndarray
    mask: np.ndarray


def leaves(path: str) -> bool:
    """Whether a path of a manifest points out of its folder."""
    return Path(path).is_absolute() or ".." in Path(path).parts


SPECK_SHARE = 0.02
"""Of the largest component's area, below which another is no lesion; chosen on `val`."""


def without_specks(mask: np.ndarray) -> np.ndarray:
    """A drawn mask (H, W) bool without the 8-connected components that are specks beside the largest one."""
    total, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA]
    kept = area >= SPECK_SHARE * area[1:].max(initial=0)
    kept[0] = False
    return kept[labels]


def lesion_boxes(mask: np.ndarray, limit: int | None = None) -> np.ndarray:
    """Boxes of the 8-connected components of a mask, largest area first.

    Args:
        mask: (H, W) bool.
        limit: Keep at most this many.

    Returns:
        (N, 4) float32, xyxy in pixels, x2 and y2 exclusive; (0, 4) for an empty mask.
    """
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    stats = stats[1:]  # the first component is the background
    stats = stats[np.argsort(-stats[:, cv2.CC_STAT_AREA], kind="stable")][:limit]
    x, y, w, h = (stats[:, i] for i in range(4))
    return np.stack([x, y, x + w, y + h], axis=1).astype(np.float32)
