"""Without these a resumed run would see other images than an unbroken one, or never the same image with two queries."""

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lab.data.mixture import MixtureSampler, Part
from lab.data.sample import Record
from lab.errors import LabError

BASE = Record("", Path(), Path(), 1, 1, "", "", "", "s", "", "train", "", 0.0, "")


def records(images, queries=1, source="s"):
    return [
        replace(BASE, id=f"{i}-{q}", image=Path(f"{source}{i}"), source=source)
        for i in range(images)
        for q in range(queries)
    ]


def sampler(step=0):
    parts = [
        (Part("a", per_batch=3), records(7)),
        (Part("b", per_batch=4, queries_per_image=2), records(5, queries=3)),
    ]
    return MixtureSampler(parts, steps_per_epoch=4, seed=0, step=lambda: step)


def flat(batch):
    return [draw for image in batch for draw in image]


def test_a_run_resumed_inside_an_epoch_draws_what_is_left_of_it():
    assert list(sampler(step=6)) == list(sampler(step=4))[2:] == [flat(sampler().batch(number)) for number in (6, 7)]


def test_no_image_repeats_before_all_were_seen():
    drawn = [index for number in range(7) for index, _ in flat(sampler().batch(number)) if index < 7]
    assert sorted(drawn[:7]) == list(range(7)) and sorted(drawn[7:14]) == list(range(7))


def test_paired_parts_show_one_image_with_two_queries_and_the_same_augmentation():
    for number in range(10):
        (a, b), (c, d) = sampler().batch(number)[3:]
        for (first, seed), (second, also) in ((a, b), (c, d)):
            assert first != second and (first - 7) // 3 == (second - 7) // 3 and seed == also


def test_small_sources_are_repeated():
    part = Part("a", per_batch=1, balance=1.0)
    mixture = MixtureSampler([(part, records(8, source="big") + records(2, source="small"))], 1, 0, lambda: 0)
    drawn = [mixture.batch(number)[0][0][0] for number in range(16)]
    assert sum(index >= 8 for index in drawn) == 8


def test_a_seed_draws_what_it_drew_before_images_were_kept_as_arrays():
    """A run started with an earlier version would go on with other images; the earlier version in short."""
    parts = [
        (Part("a", 3, balance=0.5), records(7) + records(2, source="t")),
        (Part("b", 4, "train", 2), records(5, 3)),
    ]
    groups, offset = [], 0
    for part, given in parts:
        of_image = defaultdict(list)
        for index, record in enumerate(given):
            of_image[record.image].append(offset + index)
        sizes = Counter(given[group[0] - offset].source for group in of_image.values())
        largest = max(sizes.values())
        groups.append([
            group for group in of_image.values()
            for _ in range(round((largest / sizes[given[group[0] - offset].source]) ** part.balance))
        ])  # fmt: skip
        offset += len(given)
    expected = []
    for number in range(12):
        draws = []
        for which, (part, _) in enumerate(parts):
            images = part.per_batch // part.queries_per_image
            for position in range(number * images, (number + 1) * images):
                walk, place = divmod(position, len(groups[which]))
                order = np.random.default_rng((5, which, walk)).permutation(len(groups[which]))
                rng = np.random.default_rng((5, which, position))
                seed = int(rng.integers(2**31))
                chosen = rng.permutation(groups[which][order[place]])[: part.queries_per_image]
                draws += [(int(index), seed) for index in chosen]
        expected.append(draws)
    assert list(MixtureSampler(parts, 12, 5, lambda: 0)) == expected


def test_a_batch_that_pairs_do_not_divide_is_refused():
    with pytest.raises(LabError, match="not a multiple"):
        MixtureSampler([(Part("a", per_batch=3, queries_per_image=2), records(4, 2))], 1, 0, lambda: 0)


def test_processes_share_the_batch_that_one_process_sees():
    """Else two processes would train on other data than one, and a query might lose its image's other query."""
    parts = [
        (Part("a", per_batch=2), records(7)),
        (Part("b", per_batch=4, queries_per_image=2), records(5, queries=3)),
    ]
    alone, first, second = (
        list(MixtureSampler(parts, 5, 0, lambda: 0, rank, world)) for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    assert alone == [one + other for one, other in zip(first, second)]
    assert all(len(batch) == 2 for batch in first) and all(len(batch) == 4 for batch in second)
    with pytest.raises(LabError, match="a batch of 4 images cannot be shared evenly by 3 processes"):
        MixtureSampler(parts, 5, 0, lambda: 0, 0, 3)
