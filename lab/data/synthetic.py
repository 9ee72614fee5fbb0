"""Procedural complex lesions: hard medical-looking images with masks, a pure function of a seed.

Seeds come in blocks of a million: data sets written with `seed` use the cases `seed * BLOCK + i`, for seeds below
`TRACK_BLOCK`. The block `TRACK_BLOCK` belongs to the reason benchmark (lab/data/reason.py), so that no training set can
hold one of its cases; `case_seeds` refuses it to everyone else.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from lab.data.kinds import KINDS, Kind, cover, outline, paint
from lab.data.looks import LOOKS
from lab.errors import LabError

BLOCK = 1_000_000
TRACK_BLOCK = 1000


@dataclass(frozen=True)
class Difficulty:
    """Knobs of a case; a pair is the range that is drawn from."""

    contrast: tuple[float, float] = (0.35, 0.95)
    """Lesion against tissue: 0 cannot be seen, 1 is the full colour of its kind."""
    area: tuple[float, float] = (0.004, 0.1)
    """Of one lesion, as a share of the image."""
    count: tuple[int, int] = (1, 3)
    """Lesions an image, decoys included."""
    irregularity: float = 0.7
    """How ragged irregular outlines are, 0 to 1."""
    blur: float = 0.45
    """Share of lesions with a blurred margin."""
    decoys: float = 0.35
    """Chance of every lesion after the first to be of another kind than the one asked for."""
    artefacts: float = 0.6
    """Speckle, shadow, noise, hair, glare: 0 to 1."""
    empty: float = 0.06
    """Chance that nothing of the asked kind is in the image."""


EASY = Difficulty(contrast=(0.8, 1.0), area=(0.02, 0.1), count=(1, 2), blur=0.2, decoys=0.0, artefacts=0.2, empty=0.0)
NORMAL = Difficulty()
HARD = Difficulty(contrast=(0.25, 0.55), area=(0.002, 0.05), count=(2, 5), irregularity=1.0, blur=0.7, artefacts=1.0)


@dataclass(frozen=True)
class Lesion:
    """One lesion: what it is and its own mask, (S, S) bool."""

    mask: np.ndarray
    kind: str
    tone: str
    """dark or bright."""
    margin: str
    """sharp or blurred."""
    shape: str
    """round or irregular."""


@dataclass(frozen=True)
class Case:
    """An image (S, S, 3) uint8 RGB with all its lesions; `asked` is the kind that an ordinary query means."""

    image: np.ndarray
    lesions: tuple[Lesion, ...]
    look: str
    modality: str
    anatomy: str
    asked: str

    @property
    def asked_mask(self) -> np.ndarray:
        """(S, S) bool, everything of the asked kind; decoys are background."""
        masks = [lesion.mask for lesion in self.lesions if lesion.kind == self.asked]
        return np.any(masks, axis=0) if masks else np.zeros(self.image.shape[:2], bool)


def make_case(seed: int, difficulty: Difficulty = NORMAL, look: str | None = None, size: int = 256) -> Case:
    """One case, the same for the same arguments.

    Args:
        seed: At least 0.
        look: A key of LOOKS; drawn from the seed when None.
        size: Side in pixels, at least 64.
    """
    rng = np.random.default_rng(seed)
    drawn = list(LOOKS)[rng.integers(len(LOOKS))]
    look = look or drawn
    empty = rng.random() < difficulty.empty
    while True:
        asked, wanted = draw_kinds(rng, difficulty, KINDS[look], empty)
        image, allowed = LOOKS[look].scene(rng, size)
        lesions = []
        for kind in wanted:
            placed = place(rng, kind, allowed, difficulty, size)
            if placed is None:
                continue
            alpha, lesion = placed
            radius = float(np.sqrt(lesion.mask.sum() / np.pi))
            image = paint(rng, image, kind, alpha, rng.uniform(*difficulty.contrast), radius)
            gap = cv2.dilate((alpha > 0.05).astype(np.uint8), np.ones((3, 3), np.uint8), iterations=max(size // 64, 1))
            allowed = allowed & (gap == 0)
            lesions.append(lesion)
        if len(lesions) >= min(difficulty.count[0], len(wanted)):  # else the anatomy had no room: another one
            break
    image = LOOKS[look].finish(rng, image, difficulty.artefacts)
    pixels = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(pixels, (size, size, 3)))
    return Case(pixels, tuple(lesions), look, LOOKS[look].modality, LOOKS[look].anatomy, asked.name)


def draw_kinds(
    rng: np.random.Generator, difficulty: Difficulty, kinds: tuple[Kind, ...], empty: bool
) -> tuple[Kind, list[Kind]]:
    """The kind asked for, and the kind of every lesion to be placed."""
    asked, *others = rng.permutation(np.array(kinds, object))
    count = int(rng.integers(difficulty.count[0], difficulty.count[1] + 1))
    if empty:
        return asked, list(rng.choice(others, count - 1))
    return asked, [asked] + [
        others[rng.integers(len(others))] if rng.random() < difficulty.decoys else asked for _ in range(count - 1)
    ]


def place(
    rng: np.random.Generator, kind: Kind, allowed: np.ndarray, difficulty: Difficulty, size: int
) -> tuple[np.ndarray, Lesion] | None:
    """A lesion where there is room for it: its cover (S, S) in 0..1 and its description; None without room."""
    smallest, largest = difficulty.area
    area = smallest * (largest / smallest) ** rng.random()
    shape = str(rng.choice(kind.shapes))
    blurred = rng.random() < difficulty.blur
    room = cv2.distanceTransform(np.pad(allowed, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    for shrink in (1.0, 0.75, 0.5, 0.3):
        radius = size * float(np.sqrt(max(area * shrink, smallest) / np.pi))
        curve = outline(rng, radius, shape, difficulty.irregularity, kind.spikes)
        ys, xs = np.nonzero(room > 0.5 * (radius + curve.max()))
        if len(ys):
            break
    else:
        return None
    chosen = rng.integers(len(ys))
    softness = rng.uniform(0.17, 0.24) * radius + 0.004 * size if blurred else 0.0025 * size + 0.2
    alpha = cover(curve, (float(xs[chosen]), float(ys[chosen])), softness, size)
    margin = "blurred" if blurred else "sharp"
    return alpha, Lesion(alpha > 0.5, kind.name, kind.tone, margin, shape)


def case_seeds(seed: int, count: int) -> range:
    """The seeds of a data set's cases; data sets with different `seed` share none, nor does any with the benchmark."""
    if not 0 <= seed < TRACK_BLOCK:
        raise LabError(f"seed {seed} of a data set must be 0 to {TRACK_BLOCK - 1}; the rest is kept for benchmarks")
    if count > BLOCK:
        raise LabError(f"{count} images do not fit one seed's block of {BLOCK}; write several data sets")
    return range(seed * BLOCK, seed * BLOCK + count)


def split_of(index: int, count: int, fractions: tuple[float, float, float]) -> str:
    """train, val or test by position: fractions are of train, val and test, and add up to 1."""
    train, val, _ = np.cumsum(fractions) * count
    return "train" if index < round(train) else "val" if index < round(val) else "test"


def write_plain(
    folder: Path,
    count: int,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.94, 0.03, 0.03),
    difficulty: Difficulty = NORMAL,
    size: int = 256,
) -> Path:
    """A manifest of ordinary cases, one record an image: the mask is everything of the kind the query asks for.

    Args:
        folder: Made if missing; gets manifest.jsonl, images/ and masks/.
        count: Images.
        seed: 0 to 999.
        fractions: Of train, val and test.

    Returns:
        The path of the manifest.
    """

    def lines() -> Iterable[dict]:
        for index, case_seed in enumerate(tqdm(case_seeds(seed, count), desc=f"{folder.name}: images", unit="image")):
            case = make_case(case_seed, difficulty, size=size)
            name = f"plain-{seed:03d}-{index:06d}"
            image = write_image(folder, name, case.image)
            lesion = case.asked if case.asked_mask.any() else "none"
            query = f"Locate and segment the {case.asked} in this {case.modality} image."
            split = split_of(index, count, fractions)
            yield record(folder, name, image, case, case.asked_mask, lesion, query, split, group=name)

    return write_manifest(folder, lines())


def write_image(folder: Path, name: str, image: np.ndarray) -> str:
    """Save an image (H, W, 3) uint8 RGB as JPEG of quality 92; the path is relative to the folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = f"images/{name}.jpg"
    cv2.imwrite(str(folder / path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    return path


def record(
    folder: Path, name: str, image: str, case: Case, mask: np.ndarray, lesion: str, query: str, split: str, group: str
) -> dict:
    """Save a mask (H, W) bool as PNG and give the manifest line that asks for it."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    mask_path = f"masks/{name}.png"
    cv2.imwrite(str(folder / mask_path), mask.astype(np.uint8) * 255)
    return {
        "id": f"synthetic/{name}",
        "image": image,
        "mask": mask_path,
        "width": mask.shape[1],
        "height": mask.shape[0],
        "modality": case.modality,
        "anatomy": case.anatomy,
        "lesion": lesion,
        "source": "synthetic",
        "license": "Apache-2.0",
        "split": split,
        "group": group,
        "mask_fraction": round(float(mask.mean()), 5),
        "query": query,
    }


def write_manifest(folder: Path, lines: Iterable[dict]) -> Path:
    """Write manifest.jsonl once all lines are there, so that an interrupted run leaves none."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path = folder / "manifest.jsonl"
    path.write_text(text)
    return path


def contact_sheet(path: Path, seed: int = 0, columns: int = 2, size: int = 256) -> None:
    """A PNG of the six looks, a row each, at three difficulties; the asked lesions outlined yellow, decoys blue."""
    rows = []
    for look in LOOKS:
        tiles = []
        for difficulty in (EASY, NORMAL, HARD):
            for column in range(columns):
                case = make_case(seed + column, replace(difficulty, empty=0.0), look, size)
                tiles += [case.image, outlined(case)]
        rows.append(np.hstack(tiles))
    cv2.imwrite(str(path), np.vstack(rows)[..., ::-1])


def outlined(case: Case) -> np.ndarray:
    """The image with the outline of every lesion, asked ones yellow, decoys blue."""
    image = case.image.copy()
    for lesion in case.lesions:
        contours, _ = cv2.findContours(lesion.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, contours, -1, (255, 230, 0) if lesion.kind == case.asked else (60, 160, 255), 1)
    return image
