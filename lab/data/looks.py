"""Anatomy to put lesions into, and the artefacts that lie on top: six looks, drawn from low-resolution noise.

A look is two functions. The scene gives the healthy picture, float32 in about [0, 1] of shape (S, S, 1) for grey
modalities and (S, S, 3) for colour ones, with the (S, S) bool region where lesions may grow. The finish takes it
with its lesions and adds what the device adds (speckle, shadow, glare, hair, vignette, noise), by `artefacts` in 0..1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

Rng = np.random.Generator


@dataclass(frozen=True)
class Look:
    """One modality: the words of the manifest and the two functions that draw it."""

    modality: str
    anatomy: str
    scene: Callable[[Rng, int], tuple[np.ndarray, np.ndarray]]
    finish: Callable[[Rng, np.ndarray, float], np.ndarray]


@lru_cache(maxsize=4)
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixel centres, each (S, S) float32 in 0..1."""
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) / size
    return x, y


def noise(rng: Rng, size: int, columns: int, rows: int | None = None) -> np.ndarray:
    """Smooth noise (S, S) float32, mean 0, standard deviation about 0.8, with that many cells across and down."""
    coarse = rng.standard_normal((rows or columns, columns), dtype=np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def warp(field: np.ndarray, rng: Rng, cells: int, amount: float) -> np.ndarray:
    """The field with its pixels moved by smooth noise, `amount` in image sides."""
    size = len(field)
    x, y = grid(size)
    dx, dy = (noise(rng, size, cells) * amount for _ in range(2))
    return cv2.remap(
        field, (x + dx) * size - 0.5, (y + dy) * size - 0.5, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )


def ridges(rng: Rng, size: int, cells: int, width: float) -> np.ndarray:
    """Thin winding lines (S, S) in 0..1, as of vessels, septa and sulci."""
    field = warp(noise(rng, size, cells), rng, 5, 0.04)
    return np.exp(-np.square(field / width))


def step(value: np.ndarray, edge: float, width: float) -> np.ndarray:
    """0 below the edge, 1 above it, a smooth ramp of that width between."""
    t = np.clip((value - edge) / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def blob(x: np.ndarray, y: np.ndarray, cx: float, cy: float, rx: float, ry: float, soft: float = 0.06) -> np.ndarray:
    """A filled ellipse (S, S) in 0..1 with an edge `soft` radii wide."""
    return step(-np.square((x - cx) / rx) - np.square((y - cy) / ry), -1, 2 * soft)


def turned(rng: Rng, size: int, shift: float, degrees: float, wobble: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates about the (jittered, tilted, wobbling) centre of the body, each (S, S) in about -0.5..0.5."""
    x, y = grid(size)
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    dx, dy = (0.5 + rng.uniform(-shift, shift) + wobble * noise(rng, size, 4) for _ in range(2))
    x, y = x - dx, y - dy
    return x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)


def profile(rho: np.ndarray, *knots: tuple[float, float]) -> np.ndarray:
    """Piecewise linear values over the radius, given as (radius, value) pairs."""
    at, values = zip(*knots)
    return np.interp(rho, at, values).astype(np.float32)


def breast_ultrasound(rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Skin, fat with septa, gland, muscle and what lies behind, darker with depth."""
    _, y = grid(size)
    depth = y + 0.035 * noise(rng, size, 4) + 0.02 * noise(rng, size, 9)
    fat_ends, gland_ends = rng.uniform(0.18, 0.34), rng.uniform(0.6, 0.75)
    muscle_ends = gland_ends + rng.uniform(0.1, 0.2)
    streaks = warp(noise(rng, size, 7, 44), rng, 5, 0.06)
    fat = 0.27 + 0.05 * noise(rng, size, 10) + 0.28 * ridges(rng, size, 7, 0.1)
    gland = 0.47 + 0.1 * warp(noise(rng, size, 14, 22), rng, 6, 0.04) + 0.08 * streaks
    muscle = 0.33 + 0.12 * streaks
    echo = fat + (gland - fat) * step(depth, fat_ends, 0.04)
    echo += (muscle - echo) * step(depth, gland_ends, 0.03)
    echo += (0.16 + 0.08 * streaks - echo) * step(depth, muscle_ends, 0.03)
    echo += 0.4 * np.exp(-np.square((depth - gland_ends) / 0.008)) * step(streaks, 0, 1)
    echo += (0.8 - echo) * step(-depth, -rng.uniform(0.05, 0.08), 0.02)
    echo = np.clip(echo, 0.03, 1) * (1.1 - 0.35 * y)
    return echo[..., None], (y > 0.1) & (depth < muscle_ends)


def finish_ultrasound(rng: Rng, image: np.ndarray, artefacts: float) -> np.ndarray:
    """Speckle wider than tall, columns of acoustic shadow, log compression, a few burnt-in letters."""
    size = len(image)
    real, imaginary = rng.standard_normal((2, size, size), dtype=np.float32)
    real, imaginary = (cv2.GaussianBlur(part, (0, 0), sigmaX=1.3, sigmaY=0.7) for part in (real, imaginary))
    speckle = cv2.magnitude(real, imaginary)
    speckle /= speckle.mean()
    strength = 0.45 + 0.35 * artefacts
    echo = image[..., 0] * (1 - strength + strength * speckle)
    columns = noise(rng, size, 9, 2)
    echo *= 1 - 0.55 * artefacts * step(columns, 1.0, 0.8)
    echo = np.power(np.clip(echo, 0, 1.5), 0.85)
    if rng.random() < artefacts:
        at = (int(0.02 * size), int(rng.uniform(0.06, 0.95) * size))
        echo = np.maximum(echo, burned_in(f"{rng.integers(1, 90) / 10} cm", at, size))
    return echo[..., None]


def brain_mri(rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An axial slice: scalp, skull, folded cortex, white matter, deep nuclei, ventricles, midline."""
    x, y = turned(rng, size, 0.03, 12, 0.008)
    rho = np.hypot(x / rng.uniform(0.37, 0.43), y / rng.uniform(0.42, 0.47))
    head = profile(
        rho, (0.86, 0.3), (0.89, 0.1), (0.92, 0.12), (0.94, 0.04), (0.975, 0.05), (0.99, 0.6), (1.04, 0.45), (1.06, 0.0)
    )
    folds = ridges(rng, size, 15, 0.28)
    white = step(-rho, -0.68, 0.12) * (1 - 0.9 * folds * step(rho, 0.5, 0.3))
    brain = 0.33 + 0.13 * white - 0.2 * folds * step(rho, 0.6, 0.35) + 0.015 * noise(rng, size, 50)
    scale = rng.uniform(0.8, 1.25)
    for side in (-1, 1):
        nucleus = blob(x, y, side * 0.12, 0.03, 0.05 * scale, 0.08, 0.25)
        brain += (0.34 - brain) * nucleus
        bent = x - side * (0.035 + 1.1 * np.square(y))
        brain += (0.09 - brain) * blob(bent, y, 0, -0.02, 0.026 * scale, 0.15, 0.15)
    brain -= 0.18 * np.exp(-np.square(x / 0.005)) * step(np.abs(y), 0.2, 0.08)
    inside = step(-rho, -0.87, 0.02)
    return (head + (brain - head) * inside)[..., None], rho < 0.85


def finish_mri(rng: Rng, image: np.ndarray, artefacts: float) -> np.ndarray:
    """Coil shading, sometimes a ghost of motion, and Rician noise."""
    size = len(image)
    field = image[..., 0] * (1 + (0.05 + 0.13 * artefacts) * noise(rng, size, 3))
    if rng.random() < 0.5 * artefacts:
        field = field + 0.09 * np.roll(field, int(rng.uniform(0.1, 0.3) * size), axis=int(rng.integers(2)))
    level = 0.012 + 0.03 * artefacts
    parts = level * rng.standard_normal((2, size, size), dtype=np.float32)
    return cv2.GaussianBlur(np.hypot(field + parts[0], parts[1]).astype(np.float32), (0, 0), 0.6)[..., None]


def abdomen_ct(rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An axial slice: fat, muscle, liver with vessels, spleen and stomach, bowel, kidneys, spine, aorta, ribs."""
    x, y = turned(rng, size, 0.02, 6, 0.006)
    rho = np.hypot(x / rng.uniform(0.45, 0.48), y / rng.uniform(0.36, 0.42))
    body = profile(rho, (0.80, 0.17), (0.82, 0.42), (0.88, 0.44), (0.9, 0.17), (0.97, 0.15), (0.985, 0.4), (1.0, 0.0))
    bowel = step(warp(noise(rng, size, 11), rng, 6, 0.03), 0.1, 0.4)
    cavity = 0.17 + 0.22 * bowel
    cavity -= 0.4 * blob(x, y, rng.uniform(-0.05, 0.1), -0.2, 0.04, 0.025) * bowel
    wx, wy = x + 0.012 * noise(rng, size, 7), y + 0.012 * noise(rng, size, 7)
    liver = blob(wx, wy, -0.17, -0.05, rng.uniform(0.2, 0.24), rng.uniform(0.22, 0.26))
    spleen = blob(wx, wy, 0.21, -0.05, rng.uniform(0.16, 0.2), rng.uniform(0.19, 0.24))
    vessels = ridges(rng, size, 8, 0.09) * step(noise(rng, size, 5), 0.2, 0.8)
    cavity += (0.5 + 0.03 * noise(rng, size, 30) + 0.14 * vessels - cavity) * liver
    cavity += (0.47 + 0.03 * noise(rng, size, 30) - cavity) * spleen
    for side in (-1, 1):
        cx, cy = side * rng.uniform(0.15, 0.2), rng.uniform(0.15, 0.2)
        cavity += (0.66 - cavity) * blob(wx, wy, cx, cy, 0.055, 0.075)
        cavity += (0.42 - cavity) * blob(wx, wy, cx - side * 0.015, cy, 0.022, 0.04, 0.2)
    inside = step(-rho, -0.81, 0.02)
    image = body + (cavity - body) * inside
    spine = rng.uniform(0.17, 0.2)
    image += (0.92 - image) * blob(wx, wy, 0, spine, 0.062, 0.052)
    image += (0.62 + 0.1 * noise(rng, size, 60) - image) * blob(wx, wy, 0, spine, 0.048, 0.04, 0.15)
    image += (0.35 - image) * blob(x, y, 0, spine + 0.07, 0.024, 0.018)
    image += (0.85 - image) * blob(x, y, 0, spine + 0.115, 0.013, 0.03)
    image += (0.7 - image) * blob(x, y, rng.uniform(0.0, 0.03), spine - 0.085, 0.026, 0.026)
    ribs = step(rng.standard_normal(26).astype(np.float32)[np.int32((np.arctan2(y, x) / np.pi + 1) * 12.99)], 0.8, 0.1)
    image += 0.5 * ribs * np.exp(-np.square((rho - 0.83) / 0.018))
    image += 0.5 * np.exp(-np.square((y - 0.43 + 0.25 * x * x) / 0.004)) * (rho > 1.02)
    return image[..., None], (liver + spleen > 0.6) & (rho < 0.8)


def finish_ct(rng: Rng, image: np.ndarray, artefacts: float) -> np.ndarray:
    """Quantum noise with the texture of the kernel, and sometimes streaks from something dense."""
    size = len(image)
    grain = cv2.GaussianBlur(rng.standard_normal((size, size), dtype=np.float32), (0, 0), 0.9)
    field = image[..., 0] + (0.03 + 0.07 * artefacts) * grain * step(image[..., 0], 0.05, 0.1)
    if rng.random() < 0.6 * artefacts:
        x, y = grid(size)
        angle = np.arctan2(y - rng.uniform(0.3, 0.7), x - rng.uniform(0.3, 0.7))
        streaks = rng.standard_normal(181).astype(np.float32)[np.int32((angle / np.pi + 1) * 90)]
        field += 0.035 * cv2.GaussianBlur(streaks, (0, 0), 1)
    return field[..., None]


def colon(rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A tube seen from inside: dark lumen, crescent folds around it, vessels under a wet pink lining."""
    x, y = grid(size)
    cx, cy = rng.uniform(0.1, 0.9, 2)
    dx, dy = x - cx + 0.02 * noise(rng, size, 5), y - cy + 0.02 * noise(rng, size, 5)
    rho = np.hypot(dx, dy * rng.uniform(0.8, 1.25))
    lobes = 0.5 * np.cos(3 * np.arctan2(dy, dx) + rng.uniform(0, 6))
    turn = (rng.uniform(4, 6) * np.log(rho + 0.1) + lobes + 0.5 * noise(rng, size, 4)) / (2 * np.pi)
    phase = turn - np.floor(turn)
    fold = cv2.GaussianBlur(np.exp(-4 * phase) - 0.45 * np.exp(-8 * (1 - phase)), (0, 0), size / 170)
    lit = 0.2 + 0.8 * step(rho, 0.18, 0.34)
    lit *= 0.78 + 0.32 * fold + 0.05 * noise(rng, size, 6) + 0.02 * noise(rng, size, 40)
    hue = np.array([rng.uniform(0.74, 0.88), rng.uniform(0.36, 0.5), rng.uniform(0.26, 0.38)], np.float32)
    image = lit[..., None] * hue
    vessels = ridges(rng, size, 10, 0.07) * step(noise(rng, size, 5), 0.0, 1.0)
    image[..., 1:] *= (1 - 0.35 * vessels - 0.06 * noise(rng, size, 9))[..., None]
    return image, (rho > 0.2) & (np.maximum(abs(x - 0.5), abs(y - 0.5)) + 0.3 * (abs(x - 0.5) + abs(y - 0.5)) < 0.56)


def finish_colonoscopy(rng: Rng, image: np.ndarray, artefacts: float) -> np.ndarray:
    """Wet glare, the scope's dark corners, the date of the examination, a little blur."""
    size = len(image)
    x, y = grid(size)
    wet = noise(rng, size, int(rng.integers(40, 70)), int(rng.integers(30, 50))) + 1.2 * noise(rng, size, 5)
    glare = cv2.GaussianBlur(step(wet, 3.3 - 0.5 * artefacts, 0.3), (0, 0), 0.8)
    image = image + (np.array([0.95, 0.96, 0.92], np.float32) - image) * glare[..., None]
    image = image * (1.15 - 0.9 * (np.square(x - 0.5) + np.square(y - 0.5)))[..., None]
    image = image + (0.015 + 0.015 * artefacts) * rng.standard_normal(image.shape, dtype=np.float32)
    diagonal = np.maximum(np.maximum(abs(x - 0.5), abs(y - 0.5)), (abs(x - 0.5) + abs(y - 0.5)) * 0.62)
    image = image * step(-diagonal, -rng.uniform(0.47, 0.49), 0.01)[..., None]
    if rng.random() < 0.6:
        for row, text in enumerate(
            (f"{rng.integers(10, 28)}/0{rng.integers(1, 9)}/2012", f"{rng.integers(7, 18)}:14:36")
        ):
            at = (int(0.01 * size), int((0.2 + 0.05 * row) * size))
            image = np.maximum(image, burned_in(text, at, size)[..., None])
    return image


def skin(rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Close-up of skin: tone, blotches of colour, furrows and pores."""
    x, y = grid(size)
    tone = rng.uniform(0, 1)
    hue = np.array([0.86, 0.66, 0.56], np.float32) * (1 - tone) + np.array([0.72, 0.5, 0.36], np.float32) * tone
    hue += rng.uniform(-0.03, 0.03, 3).astype(np.float32)
    furrows = ridges(rng, size, 34, 0.2)
    image = hue * (1 + 0.03 * noise(rng, size, 4) + 0.02 * noise(rng, size, 50) - 0.05 * furrows)[..., None]
    blotches = noise(rng, size, 7)
    image *= np.stack([1 + 0.01 * blotches, 1 - 0.035 * blotches, 1 - 0.03 * blotches], -1)
    return image, np.hypot(x - 0.5, y - 0.5) < 0.47


def finish_dermoscopy(rng: Rng, image: np.ndarray, artefacts: float) -> np.ndarray:
    """Hair, gel bubbles, a ruler, and the dark corners of the lens."""
    size = len(image)
    x, y = grid(size)
    image = np.ascontiguousarray(image, np.float32)
    hairs = np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(0, 1 + int(26 * artefacts)))):
        start, heading, bend = rng.uniform(-0.1, 1.1, 2), rng.uniform(0, 2 * np.pi), rng.uniform(-1.5, 1.5)
        along = np.linspace(0, rng.uniform(0.3, 1.0), 12)
        points = (
            start
            + np.stack([np.cumsum(np.cos(heading + bend * along)), np.cumsum(np.sin(heading + bend * along))], 1)
            * along[1]
        )
        cv2.polylines(hairs, [np.int32(points * size * 8)], False, 255, int(rng.integers(1, 3)), cv2.LINE_AA, 3)
    dark = np.array([0.16, 0.1, 0.08], np.float32)
    image += (dark - image) * (hairs.astype(np.float32)[..., None] * (rng.uniform(0.5, 0.9) / 255))
    for _ in range(int(rng.poisson(2.5 * artefacts))):
        at, radius = tuple(int(v) for v in rng.uniform(0, size, 2)), int(rng.uniform(0.01, 0.035) * size)
        cv2.circle(image, at, radius, (0.93, 0.9, 0.86), 1, cv2.LINE_AA)
        cv2.circle(image, (at[0] - radius // 2, at[1] - radius // 2), 1, (1.0, 1.0, 1.0), -1, cv2.LINE_AA)
    if rng.random() < 0.3 * artefacts:
        for tick in range(0, size, max(size // 22, 4)):
            cv2.line(image, (tick, size - 1), (tick, size - 1 - size // 28), (0.12, 0.12, 0.12), 1, cv2.LINE_AA)
    radius = np.hypot(x - 0.5, y - 0.5)
    fall = 1 - 0.55 * np.square(radius) - 0.9 * step(radius, rng.uniform(0.54, 0.75), 0.05)
    image = image * np.clip(fall, 0.03, 1)[..., None]
    return image + 0.012 * rng.standard_normal((size, size, 1), dtype=np.float32)


def foot(rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A sole or the back of a foot on a cloth, lit from one side, toes apart."""
    x, y = grid(size)
    cloths = ((0.3, 0.42, 0.52), (0.3, 0.45, 0.4), (0.75, 0.76, 0.76), (0.3, 0.28, 0.27), (0.42, 0.33, 0.26))
    cloth = np.array(cloths[rng.integers(len(cloths))], np.float32)
    creases = (
        1
        + 0.1 * warp(noise(rng, size, 4, 9), rng, 4, 0.1)
        + 0.03 * noise(rng, size, 90)
        - 0.12 * ridges(rng, size, 3, 0.1)
    )
    shape = np.zeros((size, size), np.uint8)
    big, side = rng.uniform(1.05, 1.35), rng.choice([-1, 1])
    turn = cv2.getRotationMatrix2D((0, 0), rng.uniform(-50, 50) + 180 * float(rng.random() < 0.3), big * size)
    centre = size * (0.5 + rng.uniform(-0.05, 0.05, 2))

    def ellipse(cx: float, cy: float, rx: float, ry: float, value: int, thickness: int = -1) -> None:
        middle = turn[:, :2] @ (side * cx, cy) + centre
        axes = (int(rx * big * size), int(ry * big * size))
        angle = -np.rad2deg(np.arctan2(turn[0, 1], turn[0, 0]))
        cv2.ellipse(shape, tuple(int(v) for v in middle), axes, angle, 0, 360, value, thickness)

    ellipse(0, 0.24, 0.13, 0.17, 255)
    ellipse(0.01, 0.08, 0.12, 0.25, 255)
    ellipse(-0.01, -0.14, 0.185, 0.16, 255)
    shape = cv2.GaussianBlur(cv2.GaussianBlur(shape, (0, 0), 0.03 * size) // 128 * 255, (0, 0), 1)
    toes = [(-0.125, -0.31, 0.055, 0.085), (-0.03, -0.325, 0.036, 0.07), (0.045, -0.305, 0.033, 0.062)]
    for toe in (*toes, (0.11, -0.27, 0.031, 0.055), (0.165, -0.225, 0.029, 0.05)):
        ellipse(*toe[:2], toe[2] + 0.008, toe[3] + 0.008, 0)
        ellipse(*toe, 255)
    depth = cv2.distanceTransform((shape > 127).astype(np.uint8), cv2.DIST_L2, 3) / size
    solid = cv2.GaussianBlur(shape.astype(np.float32) / 255, (0, 0), 1)
    light = rng.uniform(-0.25, 0.25, 2)
    lit = 0.62 + 0.38 * np.sqrt(np.clip(depth / 0.1, 0, 1)) + light[0] * (x - 0.5) + light[1] * (y - 0.5)
    lit = cv2.GaussianBlur(lit.astype(np.float32), (0, 0), size / 70)
    lit += 0.03 * noise(rng, size, 6) + 0.02 * noise(rng, size, 70) - 0.06 * ridges(rng, size, 12, 0.06)
    tone = rng.uniform(0, 1) ** 1.5
    hue = np.array([0.88, 0.66, 0.56], np.float32) * (1 - tone) + np.array([0.58, 0.39, 0.29], np.float32) * tone
    flesh = lit[..., None] * hue
    flush = noise(rng, size, 5)
    flesh *= np.stack([1 + 0.02 * flush, 1 - 0.05 * flush, 1 - 0.05 * flush], -1)
    shadow = cv2.GaussianBlur(solid, (0, 0), size / 25)
    behind = cloth * (creases * (1 - 0.5 * shadow))[..., None]
    return behind + (flesh - behind) * solid[..., None], depth > 0.012


def finish_photograph(rng: Rng, image: np.ndarray, artefacts: float) -> np.ndarray:
    """Colour cast, flash on damp skin, a soft lens, sensor noise."""
    size = len(image)
    image = image * rng.uniform(1 - 0.08 * artefacts, 1 + 0.08 * artefacts, 3).astype(np.float32)
    damp = step(noise(rng, size, 45) + 1.2 * noise(rng, size, 6), 3.4, 0.8)
    image = image + 0.4 * artefacts * damp[..., None]
    image = cv2.GaussianBlur(image, (0, 0), 0.5 + 0.5 * artefacts * rng.random())
    return image + (0.012 + 0.02 * artefacts) * rng.standard_normal((size, size, 1), dtype=np.float32)


LOOKS = {
    "ultrasound": Look("ultrasound", "breast", breast_ultrasound, finish_ultrasound),
    "dermoscopy": Look("dermoscopy", "skin", skin, finish_dermoscopy),
    "mri": Look("MRI", "brain", brain_mri, finish_mri),
    "ct": Look("CT", "abdomen", abdomen_ct, finish_ct),
    "colonoscopy": Look("colonoscopy", "colon", colon, finish_colonoscopy),
    "photograph": Look("visible-light photograph", "foot", foot, finish_photograph),
}


def burned_in(text: str, at: tuple[int, int], size: int) -> np.ndarray:
    """Text as scanners write it into the picture: (S, S) float32 in 0..0.8."""
    layer = np.zeros((size, size), np.uint8)
    cv2.putText(layer, text, at, cv2.FONT_HERSHEY_PLAIN, size / 400, 204, 1, cv2.LINE_AA)
    return layer.astype(np.float32) / 255
