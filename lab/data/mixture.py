"""Which records make up a training batch, as a pure function of seed, epoch and step: a resumed run draws the same."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch.utils.data import Sampler

from lab.data.packed import PackedRecords
from lab.data.sample import Record
from lab.errors import LabError


@dataclass
class Part:
    """One manifest's share of every batch."""

    manifest: str
    """Path of a manifest.jsonl, or what core-seg data pack wrote."""
    per_batch: int
    """Records of this manifest in each batch, counted over all processes."""
    split: str = "train"
    """Which split to draw from: train, val or test."""
    queries_per_image: int = 1
    """Records drawn together where several ask about one image: 2 or more shows a batch the same image with different
    answers, without which a model learns to ignore the query."""
    balance: float = 0.0
    """0 draws sources as often as they have images; 1 draws all sources equally often; 0.5 lies between."""


def image_codes(records: Sequence[Record]) -> np.ndarray:
    """(N,) int: the image of each record as a number, counted in order of first appearance."""
    images = records.codes("image_number") if isinstance(records, PackedRecords) else [str(r.image) for r in records]
    return pd.factorize(np.asarray(images))[0]


def repeats(sources: np.ndarray, exponent: float) -> np.ndarray:
    """(G,) int of each image's source as a number to (G,) int: how often an image of it is walked past,
    `round((largest source / own) ** exponent)`."""
    sizes = np.bincount(sources)
    return np.round((sizes.max() / sizes[sources]) ** exponent).astype(np.int64)


@dataclass(frozen=True)
class Images:
    """The images of one part that can be drawn, with the records that ask about each."""

    members: np.ndarray
    """(N,) int: indices of records, image after image."""
    starts: np.ndarray
    """(G + 1,) int: where each image's records begin in `members`."""
    walk: np.ndarray
    """Numbers of the images that are drawn in a walk, those of small sources several times."""

    def records(self, place: int) -> np.ndarray:
        """Indices of the records of the image at a place of the walk."""
        image = self.walk[place]
        return self.members[self.starts[image] : self.starts[image + 1]]


def images_of(part: Part, records: Sequence[Record], offset: int) -> Images:
    """The images of a part with at least `queries_per_image` records; indices of records start at `offset`.

    Raises:
        LabError: When there are none.
    """
    codes = image_codes(records)
    members = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    starts = np.concatenate([[0], np.cumsum(counts)])
    chosen = np.flatnonzero(counts >= part.queries_per_image)
    if not len(chosen):
        raise LabError(
            f"{part.manifest}: no image of split '{part.split}' has {part.queries_per_image} records; "
            "choose another split or lower queries_per_image"
        )
    firsts = members[starts[chosen]]
    if isinstance(records, PackedRecords):
        sources = records.codes("source")[firsts]
    else:
        sources = pd.factorize(np.array([records[first].source for first in firsts]))[0]
    return Images(members + offset, starts, np.repeat(chosen, repeats(sources, part.balance)))


class MixtureSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (record index, item seed), where the item seed drives the augmentation of that draw.

    Every part is walked in its own endless shuffled order, so that no image of it repeats before all have been seen.
    Indices run over the records of all parts, one part after the other. Several processes share each batch: the first
    takes its first images, and so on, with all that is asked about an image. Each iteration is what is left of an epoch
    from the run's `step()` on; Lightning's epochs are one off after a resume.

    Args:
        parts: What to draw from, with its records.
        steps_per_epoch: Batches in an epoch.
        seed: Of order and augmentation.
        step: Batches that the run has seen.
        rank: Which process this is.
        world: How many there are.
    """

    def __init__(
        self,
        parts: list[tuple[Part, Sequence[Record]]],
        steps_per_epoch: int,
        seed: int,
        step: Callable[[], int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.steps_per_epoch, self.seed, self.step = steps_per_epoch, seed, step
        self.rank, self.world = rank, world
        self.parts: list[tuple[Part, Images]] = []
        self.orders: dict[int, tuple[int, np.ndarray]] = {}  # by part: the walk that is under way, and its order
        offset = 0
        for part, records in parts:
            if part.per_batch % part.queries_per_image:
                raise LabError(
                    f"{part.manifest}: per_batch {part.per_batch} is not a multiple of "
                    f"queries_per_image {part.queries_per_image}; change one of them"
                )
            self.parts.append((part, images_of(part, records, offset)))
            offset += len(records)
        self.images = sum(part.per_batch // part.queries_per_image for part, _ in parts)
        if self.images % world:
            raise LabError(
                f"a batch of {self.images} images cannot be shared evenly by {world} processes; "
                "change per_batch or --trainer.devices"
            )

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first, share = self.step(), self.images // self.world
        for step in range(first, (first // self.steps_per_epoch + 1) * self.steps_per_epoch):
            shown = self.batch(step)[self.rank * share : (self.rank + 1) * share]
            yield [draw for draws in shown for draw in draws]

    def batch(self, number: int) -> list[list[tuple[int, int]]]:
        """The `number`-th batch of the run: of each image, what is drawn together."""
        shown = []
        for part_number, (part, drawn) in enumerate(self.parts):
            images = part.per_batch // part.queries_per_image
            for position in range(number * images, (number + 1) * images):
                walk, place = divmod(position, len(drawn.walk))
                if walk != self.orders.get(part_number, (None,))[0]:
                    rng = np.random.default_rng((self.seed, part_number, walk))
                    self.orders[part_number] = walk, rng.permutation(len(drawn.walk))
                order = self.orders[part_number][1]
                rng = np.random.default_rng((self.seed, part_number, position))
                item_seed = int(rng.integers(2**31))
                chosen = rng.permutation(drawn.records(order[place]))[: part.queries_per_image]
                shown.append([(int(index), item_seed) for index in chosen])
        return shown
