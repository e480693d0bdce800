"""Pictures and arrays become one grey plane of their own depth, or are refused with the reason and the remedy."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_mammodino.image_io import (  # noqa: E402
    PICTURE_SUFFIXES,  # noqa: E402
    ImageRefused,  # noqa: E402
    read_picture,
    to_grey_plane,
)

cv2 = pytest.importorskip("cv2")


RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (40, 50), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (40, 50), dtype=np.uint16)
GREY12 = RNG.integers(0, 4096, (40, 50), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)


def png(rows: np.ndarray, depth: int, colour_type: int) -> bytes:
    """A PNG written by hand, for the kinds that Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = rows.shape[:2]
    body = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tif", ".tiff", ".bmp"])
def test_eight_bits_are_kept(tmp_path: Path, suffix: str):
    assert suffix in PICTURE_SUFFIXES
    Image.fromarray(GREY8).save(tmp_path / f"a{suffix}")
    plane = read_picture(tmp_path / f"a{suffix}")
    assert plane.dtype == np.uint8 and np.array_equal(plane, GREY8)


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tif"])
def test_sixteen_bits_are_kept(tmp_path: Path, suffix: str):
    cv2.imwrite(str(tmp_path / f"a{suffix}"), GREY16)
    plane = read_picture(str(tmp_path / f"a{suffix}"))
    assert plane.dtype == np.uint16 and np.array_equal(plane, GREY16)


def test_twelve_bit_pgm_is_not_stretched(tmp_path: Path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5\n# made by hand\n50 40\n4095\n" + GREY12.astype(">u2").tobytes())
    plane = read_picture(path)
    assert plane.dtype == np.uint16 and np.array_equal(plane, GREY12)


def test_sixteen_bit_png_with_colour_or_alpha(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(png(np.repeat(GREY16[..., None], 3, axis=2), 16, 2))
    assert np.array_equal(read_picture(path), GREY16)
    path.write_bytes(png(np.stack([GREY16, np.full_like(GREY16, 65535)], axis=2), 16, 4))
    assert np.array_equal(read_picture(path), GREY16)


def test_float_tiff(tmp_path: Path):
    values = GREY16 / np.float32(1000) - 5
    Image.fromarray(values).save(tmp_path / "a.tif")
    plane = read_picture(tmp_path / "a.tif")
    assert plane.dtype == np.float32 and np.array_equal(plane, values)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_jpeg(tmp_path: Path, mode: str):
    smooth = cv2.GaussianBlur(GREY8, (9, 9), 0)
    Image.fromarray(smooth).convert(mode).save(tmp_path / "a.jpg", quality=95)
    plane = read_picture(tmp_path / "a.jpg")
    assert plane.dtype == np.uint8
    assert np.abs(plane.astype(int) - smooth).max() < 10


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1"])
def test_grey_in_other_modes(tmp_path: Path, mode: str):
    image = Image.fromarray(GREY8).convert(mode)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.convert("L"))
    assert np.array_equal(read_picture(tmp_path / "a.png"), expected)
    assert np.array_equal(to_grey_plane(image), expected)


def test_exif_orientation_is_ignored(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(GREY8).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png"), GREY8)


def refused(path: Path, reason: str) -> None:
    with pytest.raises(ImageRefused, match=reason) as refusal:
        read_picture(path)
    assert str(path) in str(refusal.value)
    assert ";" in str(refusal.value)  # the remedy stands after it


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_colour_is_refused(tmp_path: Path, suffix: str):
    Image.fromarray(COLOUR).save(tmp_path / f"a{suffix}")
    refused(tmp_path / f"a{suffix}", "coloured")


def test_a_coloured_mark_is_refused(tmp_path: Path):
    marked = np.repeat(GREY8[..., None], 3, axis=2)
    marked[10:13, 10:13] = (255, 0, 0)
    Image.fromarray(marked).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "coloured")


def test_cmyk_is_refused(tmp_path: Path):
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "a.jpg")
    refused(tmp_path / "a.jpg", "CMYK")


def test_transparency_is_refused(tmp_path: Path):
    Image.fromarray(np.stack([GREY8] * 4, axis=2)).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "transparent")


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, kept: float):
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(RNG.integers(0, 256, (200, 300), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(data[: int(kept * len(data))])
    refused(tmp_path / f"cut{suffix}", "cut short|not a readable")


def test_truncated_sixteen_bit_pgm_is_refused(tmp_path: Path):
    (tmp_path / "a.pgm").write_bytes(b"P5 50 40 4095\n" + GREY12.astype(">u2").tobytes()[:3000])
    refused(tmp_path / "a.pgm", "cut short")


def test_damaged_png_is_refused(tmp_path: Path):
    data = bytearray(png(GREY8, 8, 0))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(bytes(data))
    refused(tmp_path / "a.png", "broken")


def test_empty_and_foreign_files_are_refused(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"")
    refused(tmp_path / "a.png", "empty")
    (tmp_path / "b.png").write_text("not a picture, " * 20)
    refused(tmp_path / "b.png", "not a readable picture")
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "absent.png")


def test_small_and_constant_pictures_are_refused(tmp_path: Path):
    Image.fromarray(GREY8[:31]).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "31 x 50")
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(tmp_path / "b.png")
    refused(tmp_path / "b.png", "same value")


def test_several_pages_are_refused(tmp_path: Path):
    Image.fromarray(GREY8).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(GREY8)])
    refused(tmp_path / "a.tif", "2 pages")


@pytest.mark.parametrize("grey", [GREY8, GREY16, GREY8.astype(np.float32), GREY16.astype(">u2")])
def test_array_shapes(grey: np.ndarray):
    three = np.stack([grey] * 3)
    for array in (grey, grey[None], grey[..., None], three, np.moveaxis(three, 0, -1)):
        plane = to_grey_plane(array)
        assert plane.shape == grey.shape and plane.dtype == grey.dtype.newbyteorder("=")
        assert np.array_equal(plane, grey) and plane.flags.c_contiguous and plane.dtype.isnative


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.int16, np.uint16),
        (np.int64, np.uint16),
        (np.float64, np.float32),
        (np.float16, np.float32),
        (bool, np.uint8),
    ],
)
def test_array_types(dtype: type, expected: type):
    plane = to_grey_plane((GREY8 > 100).astype(dtype) if dtype is bool else (GREY8 * 2.0).astype(dtype))
    assert plane.dtype == expected


def test_negative_integers_become_float():
    plane = to_grey_plane(GREY12.astype(np.int16) - np.int16(1000))
    assert plane.dtype == np.float32 and plane.min() < 0


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    for grey in (GREY8, GREY16, GREY8.astype(np.float32)):
        plane = to_grey_plane(torch.from_numpy(grey)[None])
        assert plane.dtype == grey.dtype and np.array_equal(plane, grey)
    half = torch.from_numpy(GREY8).to(torch.bfloat16).requires_grad_()
    assert np.array_equal(to_grey_plane(half), GREY8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY16), GREY16),
        (Image.fromarray(GREY12.astype(np.int32)), GREY12),
        (Image.fromarray(GREY8.astype(np.float32)), GREY8.astype(np.float32)),
    ],
)
def test_pil_images_of_more_than_eight_bits(image: Image.Image, expected: np.ndarray):
    plane = to_grey_plane(image)
    assert plane.dtype == expected.dtype and np.array_equal(plane, expected)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (COLOUR, "coloured"),
        (np.stack([GREY16, GREY16[::-1], GREY16]), "separate slices"),
        (np.moveaxis(COLOUR, -1, 0) / 255.0, "coloured"),
        (COLOUR / 255.0 - 0.5, "coloured"),
        (GREY8[None, None], "shape"),
        (np.stack([GREY8] * 9), "shape"),
        (GREY8[:, 0], "shape"),
        (GREY8[:20], "20 x 50"),
        (np.full((40, 50), 7.0), "same value"),
        (np.full((40, 50), np.nan), "same value"),
        (GREY8.astype(complex), "complex"),
        (np.array(["a"]), "type"),
        (np.zeros((0, 0)), "0 x 0"),
    ],
)
def test_arrays_that_are_refused(array: np.ndarray, reason: str):
    with pytest.raises(ImageRefused, match=reason) as refusal:
        to_grey_plane(array, "image 3 of the batch")
    assert str(refusal.value).startswith("image 3 of the batch: ")


def test_nan_does_not_make_a_picture_coloured_or_constant():
    holed = np.where(GREY8 > 250, np.nan, GREY8.astype(np.float32))
    assert np.array_equal(to_grey_plane(np.stack([holed] * 3)), holed, equal_nan=True)


def test_floats_below_zero_are_not_taken_for_coloured():
    negative = GREY8.astype(np.float32) - 1000
    assert np.array_equal(to_grey_plane(np.stack([negative] * 3)), negative)
