"""Which records make up a training batch, as a pure function of seed, epoch and step: a resumed run draws the same."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from lab.data.sample import Record
from lab.errors import LabError


@dataclass
class Part:
    """One manifest's share of every batch."""

    manifest: str
    """Path of a manifest.jsonl."""
    per_batch: int
    """Records of this manifest in each batch, counted over all processes."""
    split: str = "train"
    """Which split to draw from: train, val or test."""
    queries_per_image: int = 1
    """Records drawn together where several ask about one image: 2 or more shows a batch the same image with different
    answers, without which a model learns to ignore the query."""
    balance: float = 0.0
    """0 draws sources as often as they have images; 1 draws all sources equally often; 0.5 lies between."""


def image_groups(records: list[Record]) -> list[list[int]]:
    """Indices of the records that share an image file, in order of first appearance."""
    groups: dict = defaultdict(list)
    for index, record in enumerate(records):
        groups[record.image].append(index)
    return list(groups.values())


def balanced(groups: list[list[int]], sources: list[str], exponent: float) -> list[list[int]]:
    """Repeat the groups of small sources `round((largest / own) ** exponent)` times."""
    sizes: dict[str, int] = defaultdict(int)
    for source in sources:
        sizes[source] += 1
    largest = max(sizes.values())
    return [
        group for group, source in zip(groups, sources) for _ in range(round((largest / sizes[source]) ** exponent))
    ]


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
        parts: list[tuple[Part, list[Record]]],
        steps_per_epoch: int,
        seed: int,
        step: Callable[[], int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.steps_per_epoch, self.seed, self.step = steps_per_epoch, seed, step
        self.rank, self.world = rank, world
        self.parts = []
        offset = 0
        for part, records in parts:
            if part.per_batch % part.queries_per_image:
                raise LabError(
                    f"{part.manifest}: per_batch {part.per_batch} is not a multiple of "
                    f"queries_per_image {part.queries_per_image}; change one of them"
                )
            groups = image_groups(records)
            if part.queries_per_image > 1:
                groups = [group for group in groups if len(group) >= part.queries_per_image]
            if not groups:
                raise LabError(
                    f"{part.manifest}: no image of split '{part.split}' has {part.queries_per_image} records; "
                    "choose another split or lower queries_per_image"
                )
            groups = balanced(groups, [records[group[0]].source for group in groups], part.balance)
            self.parts.append((part, [[offset + index for index in group] for group in groups]))
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
        drawn = []
        for part_number, (part, groups) in enumerate(self.parts):
            images = part.per_batch // part.queries_per_image
            for position in range(number * images, (number + 1) * images):
                walk, place = divmod(position, len(groups))
                order = np.random.default_rng((self.seed, part_number, walk)).permutation(len(groups))
                rng = np.random.default_rng((self.seed, part_number, position))
                item_seed = int(rng.integers(2**31))
                chosen = rng.permutation(groups[order[place]])[: part.queries_per_image]
                drawn.append([(int(index), item_seed) for index in chosen])
        return drawn
