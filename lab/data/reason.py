"""Cases in which the query matters: several abnormalities an image, and words that pick one of them or none."""

from collections.abc import Iterable, Iterator
from itertools import count as count_from
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from lab.data.kinds import KINDS
from lab.data.synthetic import (
    BLOCK,
    TRACK_BLOCK,
    Case,
    Difficulty,
    Lesion,
    case_seeds,
    make_case,
    record,
    split_of,
    write_image,
    write_manifest,
)
from lab.errors import LabError

REASON = Difficulty(
    contrast=(0.65, 1.0),
    area=(0.018, 0.08),
    count=(2, 3),
    irregularity=0.7,
    blur=0.45,
    decoys=0.75,
    artefacts=0.45,
    empty=0.0,
)
"""Several lesions that can be seen; what is hard is to know which one is meant."""
TRACK_RECORDS = 500
CLEAR_RATIO = 1.6
"""An area is "the larger" only when it is at least this many times the other."""
CLEAR_SHIFT = 0.15
"""A lesion is "on the left" only when it is at least this share of the width further left than the next."""
LEADS = ("Locate and segment {}.", "Where is {}? Segment it.", "Segment {}.", "Find {} and outline it.")

Question = tuple[str, np.ndarray, str]
"""Query, mask (H, W) bool, and the name of what it asks for ("none" where there is nothing)."""


def queries(case: Case, rng: np.random.Generator) -> list[Question]:
    """Every unambiguous question about a case whose answer is some but not all of its lesions, in random order.

    The kind may be named ("the cyst"), or has to be worked out from margin, shape, tone, size or place ("the larger of
    the dark ones"). Where two lesions both could be meant there is no such question.
    """
    found = list(_by_kind(case)) + list(_by_attribute(case.lesions)) + list(_by_rank(case.lesions))
    unique = [(LEADS[rng.integers(len(LEADS))].format(f"the {what}"), mask, name) for what, mask, name in found]
    return [unique[index] for index in rng.permutation(len(unique))]


def none_here(case: Case, rng: np.random.Generator) -> list[Question]:
    """One question about a kind that this look can show but this case does not; none where it shows them all."""
    absent = sorted({kind.name for kind in KINDS[case.look]} - {lesion.kind for lesion in case.lesions})
    query = LEADS[rng.integers(len(LEADS))]
    return [(query.format(f"the {rng.choice(absent)}"), np.zeros(case.image.shape[:2], bool), "none")] if absent else []


def _by_kind(case: Case) -> Iterator[Question]:
    for kind in sorted({lesion.kind for lesion in case.lesions}):
        chosen = [lesion for lesion in case.lesions if lesion.kind == kind]
        if len(chosen) < len(case.lesions):
            yield kind, np.any([lesion.mask for lesion in chosen], axis=0), kind


def _by_attribute(lesions: tuple[Lesion, ...]) -> Iterator[Question]:
    phrasings = {
        ("margin", "blurred"): "lesion with the blurred margin",
        ("margin", "sharp"): "lesion with the sharp margin",
        ("shape", "round"): "round lesion",
        ("shape", "irregular"): "lesion with the irregular outline",
        ("tone", "dark"): "dark lesion",
        ("tone", "bright"): "bright lesion",
    }
    for (attribute, value), what in phrasings.items():
        chosen = [lesion for lesion in lesions if getattr(lesion, attribute) == value]
        if len(chosen) == 1:
            yield what, chosen[0].mask, chosen[0].kind


def _by_rank(lesions: tuple[Lesion, ...]) -> Iterator[Question]:
    for tone, largest, smallest in (
        ("", "largest lesion", "smallest lesion"),
        ("dark", "larger of the dark ones", "smaller of the dark ones"),
        ("bright", "larger of the bright ones", "smaller of the bright ones"),
    ):
        group = sorted((x for x in lesions if tone in ("", x.tone)), key=lambda lesion: lesion.mask.sum())
        if len(group) < 2 or (tone and (len(group) != 2 or len(group) == len(lesions) == 2)):
            continue
        if group[-1].mask.sum() > CLEAR_RATIO * group[-2].mask.sum():
            yield largest, group[-1].mask, group[-1].kind
        if group[1].mask.sum() > CLEAR_RATIO * group[0].mask.sum():
            yield smallest, group[0].mask, group[0].kind
    across = sorted(lesions, key=_column)
    if _column(across[1]) - _column(across[0]) > CLEAR_SHIFT:
        yield "lesion furthest to the left", across[0].mask, across[0].kind
    if _column(across[-1]) - _column(across[-2]) > CLEAR_SHIFT:
        yield "lesion furthest to the right", across[-1].mask, across[-1].kind


def _column(lesion: Lesion) -> float:
    return float(np.nonzero(lesion.mask)[1].mean()) / lesion.mask.shape[1]


def chosen_questions(case: Case, rng: np.random.Generator, number: int) -> list[Question]:
    """Up to `number` questions, the first two with different answers; empty when a case does not have two."""
    found = queries(case, rng)
    partner = next((q for q in found[1:] if _overlap(found[0][1], q[1]) < 0.1), None) if found else None
    if partner is None:
        return []
    rest = [q for q in found[1:] if q is not partner]
    return [found[0], partner, *rest][:number]


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / min(first.sum(), second.sum()))


def write_reason(
    folder: Path,
    count: int,
    queries_per_image: int = 3,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.97, 0.03, 0.0),
    size: int = 256,
) -> Path:
    """A manifest of cases asked about in several ways; one image in eight is asked for what it does not show.

    Args:
        folder: Gets manifest.jsonl, images/ and masks/.
        count: Images; those without two questions are passed over.
        queries_per_image: Records of each image, at most.
        seed: 0 to 999; data sets of different seeds share no case, and none is in the benchmark.
        fractions: Of train, val and test.
        size: Side in pixels.
    """
    seeds = case_seeds(seed, min(BLOCK, 4 * count))
    return write_manifest(
        folder, _lines(folder, seeds, count, queries_per_image, 8, fractions, size, f"reason-{seed:03d}")
    )


def write_reason_track(folder: Path, size: int = 256) -> Path:
    """The benchmark track `reason`: 500 fixed records, two an image, each with a partner that has another answer."""
    seeds = range(TRACK_BLOCK * BLOCK, TRACK_BLOCK * BLOCK + BLOCK)
    lines = _lines(folder, seeds, TRACK_RECORDS // 2, 2, 0, (0.0, 0.0, 1.0), size, "reason-track")
    return write_manifest(folder, lines)


def _lines(
    folder: Path,
    seeds: Iterable[int],
    count: int,
    queries_per_image: int,
    none_every: int,
    fractions: tuple[float, float, float],
    size: int,
    prefix: str,
) -> Iterator[dict]:
    index = count_from()
    with tqdm(total=count, desc=f"{folder.name}: images", unit="image") as bar:
        for seed in seeds:
            if bar.n == count:
                return
            case, rng = make_case(seed, REASON, size=size), np.random.default_rng((seed, 1))
            questions = chosen_questions(case, rng, queries_per_image)
            if not questions:
                continue
            number = next(index)
            if none_every and number % none_every == 0:
                questions = [*questions[:2], *none_here(case, rng), *questions[2:]][:queries_per_image]
            name = f"{prefix}-{number:06d}"
            image, split = write_image(folder, name, case.image), split_of(number, count, fractions)
            for place, (query, mask, lesion) in enumerate(questions):
                yield record(folder, f"{name}-{place}", image, case, mask, lesion, query, split, group=name)
            bar.update()
        raise LabError(f"{folder}: the seeds gave only {bar.n} of {count} images; write several data sets")


def contact_sheet(path: Path, seed: int = 0, rows: int = 4, size: int = 256) -> None:
    """A PNG of cases with their questions, the answer outlined."""
    tiles = []
    for case_seed in count_from(seed):
        case = make_case(case_seed, REASON, size=size)
        for query, mask, _ in chosen_questions(case, np.random.default_rng((case_seed, 1)), 4):
            tile = case.image.copy()
            contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(tile, contours, -1, (255, 230, 0), 1)
            cv2.putText(tile, query, (3, size - 5), cv2.FONT_HERSHEY_PLAIN, 0.65, (255, 255, 255), 1, cv2.LINE_AA)
            tiles.append(tile)
        if len(tiles) >= rows * 6:
            break
    grid = [np.hstack(tiles[6 * row : 6 * row + 6]) for row in range(rows)]
    cv2.imwrite(str(path), np.vstack(grid)[..., ::-1])
