"""Images and masks from files, and the one path by which an image becomes the model's padded square and back."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lab.data.sample import Record, Sample

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header alone: a 172 KB PNG can hold 13,300 x 13,300 pixels."""
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")


class ImageError(ValueError):
    """An image or mask that cannot be used; the message says which, why, and what to do."""


def read_image(path: Path | str) -> np.ndarray:
    """An image of any size as (H, W, 3) uint8 RGB, turned as its EXIF orientation says.

    Takes PNG, JPEG (CMYK too), TIFF, BMP and WebP, 8 bit, 16 bit and float, gray, palette and colour, with or without
    alpha (composed on black). More than 8 bits are scaled linearly from the 0.5th and 99.5th percentile to 0 and 255.

    Raises:
        ImageError: Missing, empty, truncated, not an image, or more than 64 megapixels.
    """
    array = _decode(path)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        array = _to_eight_bit(array)
    if array.ndim == 2:
        return np.repeat(array[..., None], 3, axis=2)
    return np.ascontiguousarray(array[..., :3])


def read_mask(path: Path | str) -> np.ndarray:
    """A mask as (H, W) bool: whatever is not 0 in any channel but alpha.

    Raises:
        ImageError: As `read_image`.
    """
    array = _decode(path)
    return array > 0 if array.ndim == 2 else (array[..., :3] > 0).any(-1)


def load_sample(record: Record) -> Sample:
    """A record with its pixels.

    Raises:
        ImageError: A file that cannot be read, or image and mask of different sizes.
    """
    image, mask = read_image(record.image), read_mask(record.mask)
    if image.shape[:2] != mask.shape:
        raise ImageError(
            f"{record.id}: mask '{record.mask.name}' is {mask.shape[1]}x{mask.shape[0]} but image "
            f"'{record.image.name}' is {image.shape[1]}x{image.shape[0]}; resize one or drop the line"
        )
    return Sample(record, image, mask)


def image_size(path: Path | str) -> tuple[int, int]:
    """Width and height from the header alone, as displayed (EXIF orientation applied).

    Raises:
        ImageError: As `read_image`, but pixels are not decoded.
    """
    with _open(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def _open(path: Path | str) -> Image.Image:
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"image '{path}' does not exist; check the path")
    if path.stat().st_size == 0:
        raise ImageError(f"image '{path}' is empty (0 bytes); copy it again")
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"image '{path}' is larger than 64 megapixels; scale it down") from None
    except Exception:
        raise ImageError(f"'{path}' is not an image that can be read; give a PNG, JPEG or TIFF file") from None
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"image '{path}' is {image.width}x{image.height}, over 64 megapixels; scale it down")
    return image


def _decode(path: Path | str) -> np.ndarray:
    with _open(path) as image:
        try:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                image = image.convert("RGB")
            elif image.mode in ("P", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode in ("LA", "RGBA"):
                black = Image.new("RGBA", image.size, (0, 0, 0, 255))
                image = Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
            return np.asarray(image)
        except Exception as error:
            raise ImageError(f"image '{path}' is damaged or cut short ({error}); copy it again") from None


def _to_eight_bit(array: np.ndarray) -> np.ndarray:
    values = np.nan_to_num(array.astype(np.float32))
    low, high = np.percentile(values, [0.5, 99.5])
    return (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class Frame:
    """The padded square: the longest side becomes `size`, the rest is zeros on the right and at the bottom."""

    height: int
    """Of the original image, in pixels."""
    width: int
    size: int
    """Side of the square, in pixels."""

    @property
    def scale(self) -> float:
        return self.size / max(self.height, self.width)

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of the image within the square, in pixels; at least 1."""
        return max(1, round(self.height * self.scale)), max(1, round(self.width * self.scale))

    def image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 to (size, size, 3) uint8."""
        return self._place(image, cv2.INTER_AREA if self.scale < 1 else cv2.INTER_LINEAR)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) bool to (size, size) float32 in [0, 1]: how much of each pixel is lesion."""
        return self._place(mask.astype(np.float32), cv2.INTER_AREA if self.scale < 1 else cv2.INTER_LINEAR)

    def boxes_to_model(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) xyxy in pixels of the image to pixels of the square."""
        return boxes * self._factors()

    def boxes_to_original(self, boxes: np.ndarray) -> np.ndarray:
        """The inverse of `boxes_to_model`."""
        return boxes / self._factors()

    def logits_to_original(self, logits: Tensor) -> Tensor:
        """(B, h, w) over the square, at any resolution, to (B, H, W): padding cut, bilinear."""
        square = torch.nn.functional.interpolate(logits[:, None], (self.size, self.size), mode="bilinear")
        height, width = self.inner
        inner = square[..., :height, :width]
        return torch.nn.functional.interpolate(inner, (self.height, self.width), mode="bilinear")[:, 0]

    def _factors(self) -> np.ndarray:
        height, width = self.inner
        return np.array([width / self.width, height / self.height] * 2)

    def _place(self, array: np.ndarray, interpolation: int) -> np.ndarray:
        height, width = self.inner
        square = np.zeros((self.size, self.size, *array.shape[2:]), array.dtype)
        square[:height, :width] = cv2.resize(array, (width, height), interpolation=interpolation)
        return square
