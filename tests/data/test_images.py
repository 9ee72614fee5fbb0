"""Images come in many formats, and coordinates must come back to the original image exactly."""

import struct
import time
import zlib

import cv2
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lab.data.images import Frame, ImageError, image_size, load_sample, read_image, read_mask
from lab.data.manifest import read_manifest

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (21, 30, 3), dtype=np.uint8)
GRAY = COLOUR[..., 0]
DEEP = RNG.integers(0, 4096, (21, 30, 3), dtype=np.uint16)
"""12 bits in 16, as scanners write them: the upper byte alone would be black."""


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG file by its specification, gray, with whatever compressed pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_eight_bit_colour_and_gray_are_read_as_stored(tmp_path, name):
    for array in (COLOUR, GRAY):
        Image.fromarray(array).save(tmp_path / name)
        expected = array if array.ndim == 3 else np.stack([array] * 3, -1)
        image = read_image(tmp_path / name)
        assert image.dtype == np.uint8 and image.flags.c_contiguous and np.array_equal(image, expected)


def test_transparency_is_composed_on_black(tmp_path):
    """What is hidden in the viewer must not be shown to the model."""
    alpha = np.where(np.arange(30) < 10, 0, 255).astype(np.uint8)[None].repeat(21, 0)
    Image.fromarray(np.dstack([COLOUR, alpha])).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), np.where(alpha[..., None] > 0, COLOUR, 0))
    Image.fromarray(np.dstack([GRAY, alpha])).save(tmp_path / "b.png")
    assert np.array_equal(read_image(tmp_path / "b.png")[..., 1], np.where(alpha > 0, GRAY, 0))
    Image.fromarray(GRAY).save(tmp_path / "c.png", transparency=int(GRAY[0, 0]))
    assert np.array_equal(read_image(tmp_path / "c.png")[..., 2], np.where(GRAY == GRAY[0, 0], 0, GRAY))


def test_palette_and_one_bit_show_their_colours(tmp_path):
    """Palette indices are not gray values."""
    image = Image.fromarray(GRAY // 128, "P")
    image.putpalette([10, 200, 30, 250, 5, 60])
    image.save(tmp_path / "a.png")
    expected = np.array([[10, 200, 30], [250, 5, 60]], np.uint8)[GRAY // 128]
    assert np.array_equal(read_image(tmp_path / "a.png"), expected)
    Image.fromarray(GRAY > 128).save(tmp_path / "b.tif", compression="group4")
    assert np.array_equal(read_image(tmp_path / "b.tif")[..., 0], np.where(GRAY > 128, 255, 0))


def test_jpeg_in_colour_gray_and_cmyk(tmp_path):
    smooth = cv2.GaussianBlur(COLOUR, (0, 0), 6)
    for mode in ("RGB", "L", "CMYK"):
        Image.fromarray(smooth).convert(mode).save(tmp_path / "a.jpg", quality=98, subsampling=0)
        expected = np.asarray(Image.fromarray(smooth).convert(mode).convert("RGB")).astype(int)
        assert np.abs(read_image(tmp_path / "a.jpg") - expected).max() <= 8, mode


def stretched(array: np.ndarray) -> np.ndarray:
    low, high = np.percentile(array, [0.5, 99.5])
    return np.clip((array - low) / (high - low), 0, 1) * 255


def test_sixteen_bit_and_float_keep_their_contrast(tmp_path):
    """A 12-bit scan would be black if only the upper byte were kept, and white if it were clipped."""
    cv2.imwrite(str(tmp_path / "colour.png"), DEEP[..., ::-1])
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([DEEP[..., ::-1], np.full((21, 30), 65535, np.uint16)]))
    cv2.imwrite(str(tmp_path / "gray.png"), DEEP[..., 0])
    for order in "<>":
        tifffile.imwrite(tmp_path / f"gray{ord(order)}.tif", DEEP[..., 0], byteorder=order)
        tifffile.imwrite(tmp_path / f"colour{ord(order)}.tif", DEEP, byteorder=order, photometric="rgb")
    tifffile.imwrite(tmp_path / "signed.tif", DEEP[..., 0].astype(np.int16) - 1000)
    tifffile.imwrite(tmp_path / "float.tif", DEEP[..., 0] / np.float32(5e6))
    for path in sorted(tmp_path.iterdir()):
        colour = path.stem[:5] in ("colou", "alpha")
        expected = stretched(DEEP) if colour else stretched(DEEP[..., 0])[..., None]
        assert np.abs(read_image(path) - expected).max() <= 1, path.name


def test_infinite_and_constant_floats_do_not_wreck_the_scale(tmp_path):
    values = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    values[0, :8] = [np.inf, -np.inf, np.nan, np.inf, np.inf, np.inf, np.inf, np.inf]
    tifffile.imwrite(tmp_path / "a.tif", values)
    image = read_image(tmp_path / "a.tif")[..., 0]
    assert image[0, 0] == 255 and image[0, 1] == 0 and 100 < image[10, 0] < 155
    tifffile.imwrite(tmp_path / "b.tif", np.full((5, 5), 7.0, np.float32))
    assert not read_image(tmp_path / "b.tif").any()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_photograph_is_turned_as_a_viewer_turns_it(tmp_path, name, orientation):
    """Or the mask, drawn in a viewer, lies across the picture; the header's size must be the turned one too."""
    seen = np.zeros((24, 40), np.uint8)
    seen[:8, :8] = 255  # as the viewer shows it: bright at the upper left
    stored = {
        1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1],
        5: seen.T, 6: np.rot90(seen), 7: seen[::-1, ::-1].T, 8: np.rot90(seen, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif)
    assert image_size(tmp_path / name) == (40, 24)
    assert np.abs(read_image(tmp_path / name)[..., 0] - seen.astype(int)).max() < 40


def test_header_is_enough_for_the_size(tmp_path):
    """3,000 images are checked in a blink because none is decoded: these pixels cannot be."""
    (tmp_path / "a.png").write_bytes(png(640, 480, b"not pixels"))
    assert image_size(tmp_path / "a.png") == (640, 480)
    with pytest.raises(ImageError, match="damaged or cut short"):
        read_image(tmp_path / "a.png")


def planar(path):
    tifffile.imwrite(path, np.moveaxis(DEEP, -1, 0), photometric="rgb", planarconfig="separate")


def cut(path):
    Image.fromarray(COLOUR).resize((300, 300)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


BAD = {
    "missing": (lambda path: None, "does not exist"),
    "a folder": (lambda path: path.mkdir(), "does not exist"),
    "zero bytes": (lambda path: path.write_bytes(b""), "is empty"),
    "a text": (lambda path: path.write_text("hello"), "not an image"),
    "a web page": (lambda path: path.write_text("<html>404</html>"), "not an image"),
    "only a signature": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "not an image"),
    "a cut JPEG": (cut, "damaged or cut short"),
    "a cut PNG": (lambda path: path.write_bytes(png(300, 300, bytes(301 * 300))[:80]), "damaged or cut short"),
    "a bomb": (lambda path: path.write_bytes(png(13300, 13300)), "13300x13300, over 64 megapixels"),
    "a greater bomb": (lambda path: path.write_bytes(png(100_000, 100_000)), "over 64 megapixels"),
    "planes of 16 bit": (planar, "plane by plane"),
    "a GIF": (lambda path: Image.fromarray(GRAY).save(path, "GIF"), "not an image"),
}


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_sentence_with_a_remedy(tmp_path, name):
    path = tmp_path / "x.png"
    make, said = BAD[name]
    make(path)
    start = time.process_time()
    for read in (read_image, read_mask):
        with pytest.raises(ImageError) as caught:
            read(path)
        message = str(caught.value)
        assert said in message and str(path) in message and "; " in message and "\n" not in message
    assert time.process_time() - start < 0.5  # a bomb is refused by its header


def test_broken_bytes_never_raise_anything_else(tmp_path):
    """A stranger's file must not take the page down."""
    path = tmp_path / "a"
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        Image.fromarray(COLOUR).save(path, kind, exif=exif)
        good = path.read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            for at in RNG.integers(0, len(bad), 4):
                bad[at] = RNG.integers(256)
            path.write_bytes(bad[: RNG.integers(1, len(bad) + 1)] if RNG.random() < 0.3 else bad)
            try:
                image_size(path)
                assert read_image(path).shape[2] == 3
            except ImageError:
                pass


def test_mask_is_whatever_is_not_background(tmp_path):
    """0/1, 0/255, 16 bit, coloured and palette masks all mean the same."""
    mask = GRAY > 128
    Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "ones.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "full.png")
    Image.fromarray(mask.astype(np.uint16) * 7).save(tmp_path / "deep.png")
    Image.fromarray(mask).save(tmp_path / "bit.png")
    Image.fromarray(mask[..., None] * np.array([0, 0, 255], np.uint8)).save(tmp_path / "blue.png")
    opaque = np.dstack([mask[..., None] * np.array([255] * 3, np.uint8), np.full(mask.shape, 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "alpha.png")
    palette = Image.fromarray(mask.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    for path in tmp_path.iterdir():
        read = read_mask(path)
        assert read.dtype == bool and np.array_equal(read, mask), path.name


def test_sample_holds_pixels_and_refuses_two_sizes(manifest):
    record = read_manifest(manifest)[0]
    sample = load_sample(record)
    assert sample.image.shape == (40, 56, 3) and sample.mask.shape == (40, 56) and sample.mask.any()
    cv2.imwrite(str(record.mask), np.zeros((7, 9), np.uint8))
    with pytest.raises(ImageError, match="mask '0_mask.png' is 9x7 but image '0.png' is 56x40; resize one"):
        load_sample(record)


SIDE = st.integers(1, 3000)


@given(SIDE, SIDE, st.sampled_from([64, 192, 256, 1024]), st.data())
def test_boxes_go_to_the_square_exactly(height, width, size, data):
    """A box that drifts by a pixel is a wrong answer on a small lesion."""
    frame = Frame(height, width, size)
    x, y = data.draw(st.tuples(st.integers(0, width), st.integers(0, height)))
    boxes = np.array([[0, 0, width, height], [x, y, width, height]])
    model = frame.boxes_to_model(boxes)
    assert (model >= 0).all() and (model <= size + 1e-9).all()
    assert max(frame.inner) == size and np.allclose(model[0][[3, 2]], frame.inner)  # the longest side fills the square
    corner, share = model[1][:2], np.array([x / width, y / height])
    assert np.allclose(corner, share * frame.inner[::-1], rtol=0, atol=1e-9)
    assert frame.boxes_to_model(np.zeros((0, 4))).shape == (0, 4)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([32, 96]))
@settings(max_examples=50, deadline=None)
def test_every_size_and_aspect_fits(height, width, size):
    frame = Frame(height, width, size)
    image = frame.image(np.full((height, width, 3), 200, np.uint8))
    inner_height, inner_width = frame.inner
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert (image[:inner_height, :inner_width] == 200).all() and image.sum() == 600 * inner_height * inner_width
    mask = frame.mask(np.ones((height, width), bool))
    assert mask.dtype == np.float32 and mask.max() < 1 + 1e-5 and mask.min() >= 0
    assert mask.sum() == pytest.approx(inner_height * inner_width, rel=1e-5)
    assert frame.logits_to_original(torch.zeros(2, size // 4, size // 4)).shape == (2, height, width)


@pytest.mark.parametrize(("height", "width", "size"), [(300, 200, 96), (97, 353, 64), (40, 30, 128), (1200, 900, 256)])
def test_pixels_and_boxes_move_together(height, width, size):
    """Boxes are mapped by arithmetic and pixels by OpenCV; were they to differ, the mask would sit beside its box."""
    frame = Frame(height, width, size)
    mask = np.zeros((height, width), bool)
    box = np.array([[width // 5, height // 4, 4 * width // 5, height // 2]])
    x1, y1, x2, y2 = box[0]
    mask[y1:y2, x1:x2] = True
    moved, expected = frame.mask(mask), frame.boxes_to_model(box)[0]
    area = (expected[2] - expected[0]) * (expected[3] - expected[1])
    assert abs(moved.sum() - area) / area < 0.02
    rows, columns = np.nonzero(moved > 0.5)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("stride", [1, 4])
def test_logits_over_the_square_come_back_to_their_pixels(stride):
    """The mask a user saves lies on the lesion, not on the padding or half a stride off."""
    for height, width in ((300, 200), (97, 353), (60, 60)):
        frame = Frame(height, width, 256)
        y, x = np.mgrid[:height, :width]
        mask = (x - width * 0.7) ** 2 + (y - height * 0.4) ** 2 < (0.25 * min(height, width)) ** 2
        square = torch.from_numpy(frame.mask(mask))[None, None]
        logits = torch.nn.functional.avg_pool2d(square, stride)[:, 0] - 0.5
        back = (frame.logits_to_original(logits)[0] > 0).numpy()
        assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.97
        centre = np.array([np.nonzero(m)[i].mean() for m in (back, mask) for i in (0, 1)])
        assert np.abs(centre[:2] - centre[2:]).max() < 0.3  # pixels of the original
