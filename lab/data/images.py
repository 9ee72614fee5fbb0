"""Images and masks from files, and the one path by which an image becomes the model's padded square and back."""

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lab.data.sample import Member, Record, Sample
from lab.errors import LabError

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header alone: a 172 KB PNG can hold 13,300 x 13,300 pixels."""
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter guard


class ImageError(LabError):
    """An image or mask that cannot be used; the message says which, why, and what to do."""


def read_image(path: Path | str | Member) -> np.ndarray:
    """An image of any size as (H, W, 3) uint8 RGB, turned as its EXIF orientation says.

    Takes PNG, JPEG (CMYK too), TIFF, BMP and WebP, 8 bit, 16 bit and float, gray, palette and colour, with or without
    alpha (composed on black). More than 8 bits are scaled linearly from the 0.5th and 99.5th percentile, of all
    channels together, to 0 and 255. Of several pages or frames, the first.

    Raises:
        ImageError: Missing, empty, truncated, not an image, or more than 64 megapixels.
    """
    array = decode(path)
    return in_colour(array if array.dtype == np.uint8 else to_eight_bit(array))


def in_colour(array: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3 or more) to (H, W, 3)."""
    return np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else np.ascontiguousarray(array[..., :3])


def read_mask(path: Path | str | Member) -> np.ndarray:
    """A mask as (H, W) bool: whatever is not 0 (black, or wholly transparent).

    Raises:
        ImageError: As `read_image`.
    """
    array = decode(path)
    return array != 0 if array.ndim == 2 else array.any(-1)


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


def image_size(path: Path | str | Member) -> tuple[int, int]:
    """Width and height from the header alone, as displayed (EXIF orientation applied).

    Raises:
        ImageError: As `read_image`, but pixels are not decoded.
    """
    with _open(path) as image:
        # A TIFF's size is turned by Pillow already.
        return image.size[::-1] if image.format != "TIFF" and _orientation(image) >= 5 else image.size


def decode(path: Path | str | Member, indices: bool = False) -> np.ndarray:
    """The first page as stored: (H, W) or (H, W, 3) RGB, of the file's depth, turned, alpha composed on black.

    Args:
        path: Of the file.
        indices: Give a palette image as its indices (H, W) uint8, not in the palette's colours.

    Raises:
        ImageError: As `read_image`.
    """
    with _open(path) as image:
        orientation = _orientation(image)
        if image.format == "TIFF" and image.tag_v2.get(284) == 2 and max(image.tag_v2.get(258, (1,))) > 8:
            raise ImageError(f"'{path}' stores 16-bit colour plane by plane; save it as PNG or interleaved")
        image.filename = ""  # or Pillow maps the file into memory, and a turned gray TIFF comes out sheared
        try:
            if image.mode in ("RGB", "RGBA", "LA") and ";16" in str(image.tile) and orientation == 1:
                return _deep_colour(path)  # Pillow would keep the upper 8 bits only
            image = ImageOps.exif_transpose(image)
            if indices and image.mode == "P":
                return np.asarray(image)
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                image = image.convert("RGB")
            if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or (
                image.mode in ("1", "L", "RGB") and "transparency" in image.info
            ):
                black = Image.new("RGBA", image.size, (0, 0, 0, 255))
                image = Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
            return np.asarray(image)
        except Exception as error:
            raise ImageError(f"'{path}' is damaged or cut short ({error}); copy it again") from None


def _open(path: Path | str | Member) -> Image.Image:
    path = path if isinstance(path, Member) else Path(path)
    try:
        if isinstance(path, Member):
            source = BytesIO(path.read_bytes())
            size = len(source.getbuffer())
        else:
            source, size = path, path.stat().st_size if path.is_file() else None
    except OSError as error:  # no permission, name too long
        raise ImageError(f"'{path}' cannot be read ({error.strerror}); check the path") from None
    if size is None:
        raise ImageError(f"'{path}' does not exist; check the path")
    if size == 0:
        raise ImageError(f"'{path}' is empty (0 bytes); copy it again")
    try:
        image = Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"'{path}' is over 64 megapixels; scale it down") from None
    except Exception:
        raise ImageError(f"'{path}' is not an image that can be read; give a PNG, JPEG or TIFF file") from None
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"'{path}' is {image.width}x{image.height}, over 64 megapixels; scale it down")
    return image


def _orientation(image: Image.Image) -> int:
    # Not image.getexif(): a PNG's decodes every pixel to look for EXIF behind them.
    try:
        value = Image.Image.getexif(image).get(0x0112)
    except Exception as error:
        raise ImageError(f"'{image.filename}' has damaged EXIF data ({error}); save it again without") from None
    return value if value in range(1, 9) else 1


def _deep_colour(path: Path | str | Member) -> np.ndarray:
    content = path.read_bytes() if isinstance(path, Member) else Path(path).read_bytes()
    array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise ValueError("16-bit colour")
    if array.ndim == 3 and array.shape[2] == 4:
        array = array[..., :3] * (array[..., 3:] / 65535)
    return array[..., ::-1]  # BGR to RGB


def to_eight_bit(array: np.ndarray, window: tuple[float, float] | None = None) -> np.ndarray:
    """Values to 0..255 uint8, linearly from the low to the high end of the window; None: 0.5th to 99.5th percentile."""
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    values = array.astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = window or (np.percentile(finite, [0.5, 99.5]) if len(finite) else (0.0, 0.0))
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return (np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255).round().astype(np.uint8)


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

    def filled(self, side: int) -> tuple[int, int]:
        """Height and width of the image in a square of so many cells a side; at least 1."""
        height, width = (max(1, round(side * length / self.size)) for length in self.inner)
        return height, width

    def image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 to (size, size, 3) uint8."""
        return self._place(image, cv2.INTER_AREA if self.scale < 1 else cv2.INTER_LINEAR)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) bool to (size, size) float32 in [0, 1]: how much of each pixel is lesion."""
        return self._place(mask.astype(np.float32), cv2.INTER_AREA if self.scale < 1 else cv2.INTER_LINEAR)

    def boxes_to_model(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) xyxy in pixels of the image to pixels of the square."""
        height, width = self.inner
        return boxes * np.array([width / self.width, height / self.height] * 2)

    def logits_to_original(self, logits: Tensor) -> Tensor:
        """(B, h, w) over the square, at any resolution, to (B, H, W): padding cut, bilinear."""
        square = torch.nn.functional.interpolate(logits[:, None], (self.size, self.size), mode="bilinear")
        height, width = self.inner
        inner = square[..., :height, :width]
        return torch.nn.functional.interpolate(inner, (self.height, self.width), mode="bilinear")[:, 0]

    def _place(self, array: np.ndarray, interpolation: int) -> np.ndarray:
        height, width = self.inner
        square = np.zeros((self.size, self.size, *array.shape[2:]), array.dtype)
        square[:height, :width] = cv2.resize(array, (width, height), interpolation=interpolation)
        return square
