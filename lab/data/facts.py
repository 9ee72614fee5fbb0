"""What can be measured about a lesion: location, size, contrast, margin, shape and count, as numbers and as words."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

COLUMNS, ROWS = ("left", "centre", "right"), ("upper", "middle", "lower")
SIZES = ((0.005, "tiny"), (0.02, "small"), (0.1, "medium"), (1.01, "large"))
"""Upper bounds of the lesion's share of the image."""
CONTRASTS = ((-40, "much darker"), (-12, "darker"), (12, "similar"), (40, "brighter"), (np.inf, "much brighter"))
"""Upper bounds of gray levels inside minus gray levels around, 0..255."""
EDGE_REACH = 9
"""Pixels around a lesion that its margin is judged by."""
SHARP_MARGIN = 0.3
"""A margin is sharp when at least this share of the contrast is crossed within the border's two pixels."""
SHAPES = ((0.62, "irregular"), (0.86, "oval"), (np.inf, "round"))
"""Upper bounds of the roundness."""
COUNTS = ((1, "single"), (2, "two"), (5, "several"), (np.inf, "many"))
"""Upper bounds of the number of components."""

NEAR = {"location": 0.02, "size": 0.15, "contrast": 3.0, "margin": 0.05, "shape": 0.03}
"""How near to the border between two words a number is not told for sure: shares of the side, of the fraction (as a
ratio), gray levels, and differences of edge share and roundness; chosen on `val`, by claims confirmed."""


@dataclass(frozen=True)
class Facts:
    """Measured on image and mask; words are empty and numbers 0 where there is no lesion."""

    location: str = ""
    """One of nine: "upper left" .. "lower right"; "left", "centre" and "right" in the middle row."""
    size: str = ""
    contrast: str = ""
    margin: str = ""
    shape: str = ""
    count: str = "none"
    centroid: tuple[float, float] = (0.0, 0.0)
    """Of the largest component: x and y as shares of width and height."""
    fraction: float = 0.0
    """Lesion pixels / image pixels, all components."""
    difference: float = 0.0
    """Mean gray inside minus mean gray of the ring around, in gray levels."""
    edge_share: float = 0.0
    """Contrast across the border's two pixels / contrast between well inside and well outside, 0..1."""
    roundness: float = 0.0
    """Of the largest component: 4 pi area / perimeter^2, clipped to 1."""


def measure(image: np.ndarray, mask: np.ndarray) -> Facts:
    """Measure a lesion.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool.

    Returns:
        The facts; location, shape and margin are those of the largest component, size and contrast of the whole mask.
    """
    binary = mask.astype(np.uint8)
    total, labels, stats, centroids = cv2.connectedComponentsWithStats(binary, connectivity=8)
    if total == 1:
        return Facts()
    height, width = mask.shape
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    component = (labels == largest).astype(np.uint8)
    x, y = (float(value) for value in (centroids[largest] + 0.5) / [width, height])
    fraction = float(binary.mean())
    ring = max(3, round(0.03 * max(height, width)))
    near = _around(stats[1:], ring, (height, width))
    difference = _contrast(cv2.cvtColor(image[near], cv2.COLOR_RGB2GRAY), binary[near], ring)
    near = _around(stats[[largest]], EDGE_REACH, (height, width))
    edge_share = _edge_share(cv2.cvtColor(image[near], cv2.COLOR_RGB2GRAY), component[near])
    roundness = _roundness(component[near])
    return Facts(
        location=_location(x, y),
        size=_word(fraction, SIZES),
        contrast=_word(difference, CONTRASTS),
        margin="sharp" if edge_share >= SHARP_MARGIN else "blurred",
        shape=_word(roundness, SHAPES),
        count=_word(total - 2, COUNTS),
        centroid=(x, y),
        fraction=fraction,
        difference=difference,
        edge_share=edge_share,
        roundness=roundness,
    )


def borderline(facts: Facts) -> set[str]:
    """The facts for which a slightly different mask would have another word."""
    distances = {
        "location": min(abs(value - third / 3) for value in facts.centroid for third in (1, 2)),
        "size": min(abs(math.log(max(facts.fraction, 1e-9) / bound)) for bound, _ in SIZES[:-1]),
        "contrast": min(abs(facts.difference - bound) for bound, _ in CONTRASTS[:-1]),
        "margin": abs(facts.edge_share - SHARP_MARGIN),
        "shape": min(abs(facts.roundness - bound) for bound, _ in SHAPES[:-1]),
    }
    return {name for name, distance in distances.items() if distance < NEAR[name]}


def _word(value: float, bounds: tuple) -> str:
    return next(word for bound, word in bounds if value < bound)


def _location(x: float, y: float) -> str:
    column, row = COLUMNS[min(2, int(3 * x))], ROWS[min(2, int(3 * y))]
    return column if row == "middle" else f"{row} {column}"


def _around(stats: np.ndarray, reach: int, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the components' common box, widened by `reach` pixels."""
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    rows = slice(max(0, top.min() - reach), min(shape[0], bottom.max() + reach))
    return rows, slice(max(0, left.min() - reach), min(shape[1], right.max() + reach))


def _contrast(gray: np.ndarray, mask: np.ndarray, reach: int) -> float:
    """Mean gray inside minus mean gray of the ring of `reach` pixels around."""
    ring = (cv2.distanceTransform(1 - mask, cv2.DIST_L2, 3) <= reach) & (mask == 0)
    return float(gray[mask == 1].mean() - gray[ring].mean()) if ring.any() else 0.0


def _edge_share(gray: np.ndarray, component: np.ndarray) -> float:
    """How much of the contrast between 4 pixels inside and 4 outside is crossed from 1 inside to 1 outside."""
    smooth = cv2.GaussianBlur(gray, (3, 3), 0)
    inside = cv2.distanceTransform(component, cv2.DIST_L2, 3)
    outside = cv2.distanceTransform(1 - component, cv2.DIST_L2, 3)
    deep = min(5.0, float(inside.max()))
    bands = [
        (inside > 0) & (inside <= 1.5),
        (outside > 0) & (outside <= 1.5),
        (inside >= deep - 1) & (inside <= deep + 3),
        (outside >= 4) & (outside <= 8),
    ]
    if not all(band.any() for band in bands):
        return 0.0
    near_in, near_out, far_in, far_out = (float(smooth[band].mean()) for band in bands)
    return float(np.clip((near_in - near_out) / (far_in - far_out), 0, 1)) if abs(far_in - far_out) > 1 else 0.0


def _roundness(component: np.ndarray) -> float:
    contours, _ = cv2.findContours(component, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contour = max(contours, key=len)
    perimeter = cv2.arcLength(contour, True)
    return float(min(1.0, 4 * np.pi * component.sum() / perimeter**2)) if perimeter > 0 else 1.0
