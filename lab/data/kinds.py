"""What each kind of lesion looks like, and how it is painted into a picture."""

from dataclasses import dataclass

import cv2
import numpy as np

from lab.data.looks import Rng, grid, noise, step

Colour = tuple[float, ...]


@dataclass(frozen=True)
class Kind:
    """The constant appearance of a kind, by which it can be told from the others of its look."""

    name: str
    tone: str
    """dark or bright, against healthy tissue."""
    colour: Colour
    second: Colour
    """Colour where the texture is high; one value for grey looks, three for colour."""
    texture: str
    """smooth, mottled, network, lacunae, dome, core or rim."""
    shapes: tuple[str, ...]
    """Of round and irregular."""
    spikes: float = 0.0
    """Length of the spikes that leave an irregular outline, in radii."""
    behind: float = 0.0
    """Ultrasound: brightening (above 0) or shadow (below 0) of what lies deeper."""
    ring: Colour = ()
    """Colour of a reddened surround, none when empty."""


BOTH = ("round", "irregular")
KINDS = {
    "ultrasound": (
        Kind("cyst", "dark", (0.02,), (0.05,), "smooth", ("round",), behind=0.7),
        Kind("nodule", "bright", (0.98,), (0.7,), "mottled", BOTH),
        Kind("spiculated mass", "dark", (0.12,), (0.27,), "mottled", ("irregular",), spikes=0.35, behind=-0.6),
    ),
    "dermoscopy": (
        Kind("naevus", "dark", (0.5, 0.3, 0.18), (0.28, 0.15, 0.09), "network", ("round",)),
        Kind("melanoma", "dark", (0.16, 0.1, 0.1), (0.33, 0.31, 0.38), "mottled", ("irregular",)),
        Kind("keratosis", "bright", (0.98, 0.93, 0.8), (0.86, 0.76, 0.55), "lacunae", BOTH),
        Kind("haemangioma", "dark", (0.66, 0.1, 0.13), (0.42, 0.02, 0.08), "lacunae", ("round",)),
    ),
    "mri": (
        Kind("meningioma", "bright", (0.85,), (0.75,), "smooth", ("round",)),
        Kind("glioma", "bright", (0.8,), (0.25,), "core", ("irregular",)),
        Kind("cyst", "dark", (0.03,), (0.05,), "smooth", ("round",)),
        Kind("infarct", "dark", (0.12,), (0.25,), "mottled", ("irregular",)),
    ),
    "ct": (
        Kind("cyst", "dark", (0.1,), (0.13,), "smooth", ("round",)),
        Kind("tumour", "dark", (0.2,), (0.38,), "mottled", ("irregular",)),
        Kind("haemangioma", "bright", (0.98,), (0.62,), "rim", BOTH),
    ),
    "colonoscopy": (
        Kind("polyp", "bright", (0.9, 0.5, 0.38), (1.0, 0.86, 0.78), "dome", ("round",)),
        Kind("ulcer", "bright", (0.96, 0.9, 0.72), (0.85, 0.74, 0.5), "mottled", ("irregular",), ring=(0.7, 0.14, 0.1)),
        Kind("haemorrhage", "dark", (0.4, 0.02, 0.03), (0.22, 0.01, 0.02), "mottled", BOTH),
    ),
    "photograph": (
        Kind("ulcer", "dark", (0.55, 0.07, 0.07), (0.72, 0.5, 0.24), "mottled", ("irregular",), ring=(0.75, 0.3, 0.27)),
        Kind("necrosis", "dark", (0.05, 0.04, 0.04), (0.15, 0.1, 0.08), "mottled", BOTH),
        Kind("callus", "bright", (0.97, 0.9, 0.68), (0.9, 0.8, 0.52), "smooth", ("round",)),
        Kind("bruise", "dark", (0.3, 0.16, 0.4), (0.42, 0.3, 0.36), "smooth", BOTH),
    ),
}


def outline(rng: Rng, radius: float, shape: str, irregularity: float, spikes: float) -> np.ndarray:
    """Radius in pixels at 360 angles, with the area of a circle of `radius`."""
    angle = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    stretch = rng.uniform(1.0, 1.22 if shape == "round" else 1.5)
    tilt = rng.uniform(0, np.pi)
    curve = 1 / np.sqrt(np.square(np.cos(angle - tilt)) / stretch + np.square(np.sin(angle - tilt)) * stretch)
    amount = 0.02 if shape == "round" else 0.08 + 0.1 * irregularity
    for order in range(2, 5 if shape == "round" else 9):
        curve += amount * rng.normal() / np.sqrt(order - 1) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    if spikes:
        count = int(rng.integers(7, 11))
        wander = 0.3 * np.cos(2 * angle + rng.uniform(0, 6))
        wave = 0.5 + 0.5 * np.cos(count * (angle + wander / count) + rng.uniform(0, 6))
        curve += spikes * (0.5 + irregularity) * np.power(wave, 3)
    curve = np.maximum(curve, 0.35)
    return radius * curve / np.sqrt(np.mean(np.square(curve)))


def cover(curve: np.ndarray, centre: tuple[float, float], softness: float, size: int) -> np.ndarray:
    """How much of every pixel the lesion covers, (S, S) float32 in 0..1, its edge `softness` pixels of Gaussian."""
    angle = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    points = np.stack([centre[0] + curve * np.cos(angle), centre[1] + curve * np.sin(angle)], axis=1)
    filled = np.zeros((size, size), np.uint8)
    cv2.fillPoly(filled, [np.int32(np.round(points * 8))], 255, cv2.LINE_AA, 3)
    return cv2.GaussianBlur(filled.astype(np.float32) / 255, (0, 0), softness)


def texture(rng: Rng, name: str, depth: np.ndarray, radius: float) -> np.ndarray:
    """Share of the second colour, (S, S) in 0..1; `depth` is the distance to the margin in pixels."""
    size = len(depth)
    cells = int(np.clip(5 * size / (2 * radius), 8, size // 3))  # about five cells across the lesion
    if name == "smooth":
        return np.clip(0.5 + 0.3 * noise(rng, size, cells), 0, 1)
    if name == "mottled":
        return step(noise(rng, size, cells) + 0.5 * noise(rng, size, 2 * cells), 0.2, 1.2)
    if name == "network":
        return 1 - step(np.abs(noise(rng, size, 3 * cells)), 0.35, 0.5)
    if name == "lacunae":
        return step(noise(rng, size, 2 * cells), 0.1, 0.4)
    if name == "core":
        return step(depth + 0.12 * radius * noise(rng, size, cells), 0.55 * radius, 0.2 * radius)
    if name == "rim":
        return step(depth + 0.25 * radius * noise(rng, size, cells), 0.4 * radius, 0.3 * radius)
    if name == "dome":
        x, y = grid(size)
        heading = rng.uniform(0, 2 * np.pi)
        inside = depth > 0
        across = (x - x[inside].mean()) * np.cos(heading) + (y - y[inside].mean()) * np.sin(heading)
        return np.clip(0.4 + 0.5 * across * size / radius + 0.12 * noise(rng, size, cells), 0, 1)
    raise ValueError(f"unknown lesion texture '{name}'; see Kind.texture for the known ones")


def paint(rng: Rng, image: np.ndarray, kind: Kind, alpha: np.ndarray, contrast: float, radius: float) -> np.ndarray:
    """The picture (S, S, C) with one lesion in it, and with what the lesion does to its surround.

    Args:
        image: (S, S, C) float32 in about 0..1.
        alpha: (S, S), how much of every pixel is lesion; the mask is alpha > 0.5.
        contrast: 0 cannot be seen, 1 has the kind's full colour.
        radius: Of a circle of the same area, pixels.
    """
    size = len(image)
    mask = alpha > 0.5
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)
    ground = image[mask].mean(axis=0)
    if kind.behind:
        x, y = grid(size)
        bottom = np.nonzero(mask.any(axis=1))[0][-1] / size
        deeper = np.maximum.accumulate(alpha, axis=0) - alpha
        image = image * (1 + kind.behind * deeper * np.exp(-np.maximum(y - bottom, 0) / 0.22))[..., None]
    if kind.ring:
        around = cv2.GaussianBlur(alpha, (0, 0), 0.3 * radius)
        image = (
            image
            + (np.array(kind.ring, np.float32) * ground.mean() * 1.6 - image) * (0.7 * around * contrast)[..., None]
        )
    share = texture(rng, kind.texture, depth, radius)[..., None]
    colour = np.array(kind.colour, np.float32) * (1 - share) + np.array(kind.second, np.float32) * share
    tissue = 0.35 * (image - ground)  # some of the tissue shows through
    lesion = ground + contrast * (colour - ground) + tissue
    if kind.texture == "dome":  # a protruding lesion throws a shadow ring
        rim = np.clip(cv2.GaussianBlur(alpha, (0, 0), 0.18 * radius) - alpha, 0, 1)
        image = image * (1 - 0.9 * contrast * rim)[..., None]
    return image + (lesion - image) * alpha[..., None]
