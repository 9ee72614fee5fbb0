"""Augmentation that keeps image, mask and words true to each other."""

import hashlib
from dataclasses import replace

import cv2
import numpy as np

from lab.data.facts import measure
from lab.data.reasoning import check_claims, mirror, parse_claims
from lab.data.sample import Sample


def augment(sample: Sample, rng: np.random.Generator, strength: float = 1.0) -> Sample:
    """Flip, turn, scale, shift and recolour at random.

    Args:
        sample: Unchanged; image (H, W, 3) uint8, mask (H, W) bool.
        rng: Source of all randomness.
        strength: 0 returns the sample; 1 turns by up to 12 degrees, scales by up to 20 %.

    Returns:
        A sample of the same size. A crop that would lose the whole lesion is not applied.
    """
    if strength == 0:
        return sample
    if rng.random() < 0.5:
        sample = mirror_sample(sample)
    height, width = sample.mask.shape
    angle, scale = rng.uniform(-12, 12) * strength, 1 + rng.uniform(-0.2, 0.2) * strength
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
    matrix[:, 2] += rng.uniform(-0.08, 0.08, 2) * strength * [width, height]
    mask = cv2.warpAffine(sample.mask.astype(np.uint8), matrix, (width, height), flags=cv2.INTER_NEAREST) > 0
    image = sample.image
    if mask.any() or not sample.mask.any():
        image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)
    else:
        mask = sample.mask
    return replace(sample, image=_recolour(image, rng, strength), mask=mask)


def _recolour(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    gain, shift = 1 + rng.uniform(-0.2, 0.2) * strength, rng.uniform(-20, 20) * strength
    gamma = np.exp(rng.uniform(-0.3, 0.3) * strength)
    levels = np.clip((np.arange(256) / 255) ** gamma * 255 * gain + shift, 0, 255)
    tint = 1 + rng.uniform(-0.06, 0.06, 3) * strength
    table = np.clip(levels[:, None] * tint, 0, 255).astype(np.uint8)[None]  # (1, 256, 3)
    return cv2.LUT(image, table)


def mirror_sample(sample: Sample) -> Sample:
    """Left becomes right in image, mask, query and reasoning."""

    record = replace(sample.record, query=mirror(sample.record.query), reasoning=mirror(sample.record.reasoning))
    image, mask = np.ascontiguousarray(sample.image[:, ::-1]), np.ascontiguousarray(sample.mask[:, ::-1])
    return replace(sample, record=record, image=image, mask=mask)


def view(sample: Sample, index: int) -> Sample:
    """The `index`-th fixed way to see a sample: 0 as it is, 1 mirrored, from 2 on a random augmentation.

    The augmentation is that of the group, so that records which share an image still share its pixels. Its record has
    no reasoning where a claim of it, such as the location, was true and no longer is: one is then written from facts.
    """
    if index == 0:
        return sample
    if index == 1:
        return mirror_sample(sample)
    name = int.from_bytes(hashlib.sha256(sample.record.group.encode()).digest()[:8], "big")
    return _told_truly(sample, augment(sample, np.random.default_rng((name, index))))


def _told_truly(before: Sample, after: Sample) -> Sample:
    """`after`, a view of `before`, without reasoning that it makes false."""
    if not after.record.reasoning:
        return after
    was, still = (
        check_claims(parse_claims(sample.record.reasoning), measure(sample.image, sample.mask))
        for sample in (before, after)
    )
    stale = any(true and not still[name] for name, true in was.items())
    return replace(after, record=replace(after.record, reasoning="")) if stale else after
