"""Images and arrays become one gray plane of their own depth, or are refused with the reason and the remedy."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_mammodino.image_io import (  # noqa: E402
    IMAGE_SUFFIXES,  # noqa: E402
    InvalidImageError,  # noqa: E402
    read_image,
    to_gray_plane,
)

cv2 = pytest.importorskip("cv2")


RNG = np.random.default_rng(0)
GRAY8 = RNG.integers(0, 256, (40, 50), dtype=np.uint8)
GRAY16 = RNG.integers(0, 65536, (40, 50), dtype=np.uint16)
GRAY12 = RNG.integers(0, 4096, (40, 50), dtype=np.uint16)
COLORED = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)


def png(rows: np.ndarray, depth: int, color_type: int) -> bytes:
    """A PNG written by hand, for the kinds that Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = rows.shape[:2]
    body = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tif", ".tiff", ".bmp"])
def test_eight_bits_are_kept(tmp_path: Path, suffix: str):
    assert suffix in IMAGE_SUFFIXES
    Image.fromarray(GRAY8).save(tmp_path / f"a{suffix}")
    plane = read_image(tmp_path / f"a{suffix}")
    assert plane.dtype == np.uint8 and np.array_equal(plane, GRAY8)


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tif"])
def test_sixteen_bits_are_kept(tmp_path: Path, suffix: str):
    cv2.imwrite(str(tmp_path / f"a{suffix}"), GRAY16)
    plane = read_image(str(tmp_path / f"a{suffix}"))
    assert plane.dtype == np.uint16 and np.array_equal(plane, GRAY16)


def test_twelve_bit_pgm_is_not_stretched(tmp_path: Path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5\n# hand-crafted\n50 40\n4095\n" + GRAY12.astype(">u2").tobytes())
    plane = read_image(path)
    assert plane.dtype == np.uint16 and np.array_equal(plane, GRAY12)


def test_sixteen_bit_png_with_color_or_alpha(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(png(np.repeat(GRAY16[..., None], 3, axis=2), 16, 2))
    assert np.array_equal(read_image(path), GRAY16)
    path.write_bytes(png(np.stack([GRAY16, np.full_like(GRAY16, 65535)], axis=2), 16, 4))
    assert np.array_equal(read_image(path), GRAY16)


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_color_tiff(tmp_path: Path, channels: int):
    opaque = [np.full_like(GRAY12, 65535)] * (channels - 3)
    cv2.imwrite(str(tmp_path / "a.tif"), np.dstack([GRAY12] * 3 + opaque))
    plane = read_image(tmp_path / "a.tif")
    assert plane.dtype == np.uint16 and np.array_equal(plane, GRAY12)


def test_twelve_bit_ppm_is_not_stretched(tmp_path: Path):
    (tmp_path / "a.ppm").write_bytes(b"P6 50 40 4095\n" + np.repeat(GRAY12.astype(">u2"), 3).tobytes())
    plane = read_image(tmp_path / "a.ppm")
    assert plane.dtype == np.uint16 and np.array_equal(plane, GRAY12)


def test_float_tiff(tmp_path: Path):
    values = GRAY16 / np.float32(1000) - 5
    Image.fromarray(values).save(tmp_path / "a.tif")
    plane = read_image(tmp_path / "a.tif")
    assert plane.dtype == np.float32 and np.array_equal(plane, values)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_gray_jpeg(tmp_path: Path, mode: str):
    smooth = cv2.GaussianBlur(GRAY8, (9, 9), 0)
    Image.fromarray(smooth).convert(mode).save(tmp_path / "a.jpg", quality=95)
    plane = read_image(tmp_path / "a.jpg")
    assert plane.dtype == np.uint8
    assert np.abs(plane.astype(int) - smooth).max() < 10


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1"])
def test_gray_in_other_modes(tmp_path: Path, mode: str):
    image = Image.fromarray(GRAY8).convert(mode)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.convert("L"))
    assert np.array_equal(read_image(tmp_path / "a.png"), expected)
    assert np.array_equal(to_gray_plane(image), expected)


def test_exif_orientation_is_ignored(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(GRAY8).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), GRAY8)


def refused(path: Path, reason: str) -> None:
    with pytest.raises(InvalidImageError, match=reason) as refusal:
        read_image(path)
    assert str(path) in str(refusal.value)
    assert ";" in str(refusal.value)  # the remedy stands after it


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_color_is_refused(tmp_path: Path, suffix: str):
    Image.fromarray(COLORED).save(tmp_path / f"a{suffix}")
    refused(tmp_path / f"a{suffix}", "colored")


def test_a_colored_mark_is_refused(tmp_path: Path):
    marked = np.repeat(GRAY8[..., None], 3, axis=2)
    marked[10:13, 10:13] = (255, 0, 0)
    Image.fromarray(marked).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "colored")


def test_cmyk_is_refused(tmp_path: Path):
    Image.fromarray(COLORED).convert("CMYK").save(tmp_path / "a.jpg")
    refused(tmp_path / "a.jpg", "CMYK")


def test_transparency_is_refused(tmp_path: Path):
    Image.fromarray(np.stack([GRAY8] * 4, axis=2)).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "transparent")


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, kept: float):
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(RNG.integers(0, 256, (200, 300), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(data[: int(kept * len(data))])
    refused(tmp_path / f"cut{suffix}", "cut short|not a readable")


def test_truncated_sixteen_bit_pgm_is_refused(tmp_path: Path):
    (tmp_path / "a.pgm").write_bytes(b"P5 50 40 4095\n" + GRAY12.astype(">u2").tobytes()[:3000])
    refused(tmp_path / "a.pgm", "cut short")


def test_damaged_png_is_refused(tmp_path: Path):
    data = bytearray(png(GRAY8, 8, 0))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(bytes(data))
    refused(tmp_path / "a.png", "broken")


def test_empty_and_foreign_files_are_refused(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"")
    refused(tmp_path / "a.png", "empty")
    (tmp_path / "b.png").write_text("not an image, " * 20)
    refused(tmp_path / "b.png", "not a readable image")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.png")


@pytest.mark.parametrize("kind", ["EPS", "GIF", "WEBP"])
def test_other_formats_are_refused_whatever_their_suffix(tmp_path: Path, kind: str, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *given, **options: pytest.fail("was started"))
    Image.fromarray(GRAY8).convert("RGB").save(tmp_path / "a.png", format=kind)
    refused(tmp_path / "a.png", "not a readable image")


def test_small_and_constant_images_are_refused(tmp_path: Path):
    Image.fromarray(GRAY8[:31]).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "31 x 50")
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(tmp_path / "b.png")
    refused(tmp_path / "b.png", "same value")


def test_several_pages_are_refused(tmp_path: Path):
    Image.fromarray(GRAY8).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(GRAY8)])
    refused(tmp_path / "a.tif", "2 pages")


@pytest.mark.parametrize("gray", [GRAY8, GRAY16, GRAY8.astype(np.float32), GRAY16.astype(">u2")])
def test_array_shapes(gray: np.ndarray):
    three = np.stack([gray] * 3)
    for array in (gray, gray[None], gray[..., None], three, np.moveaxis(three, 0, -1)):
        plane = to_gray_plane(array)
        assert plane.shape == gray.shape and plane.dtype == gray.dtype.newbyteorder("=")
        assert np.array_equal(plane, gray) and plane.flags.c_contiguous and plane.dtype.isnative


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
    plane = to_gray_plane((GRAY8 > 100).astype(dtype) if dtype is bool else (GRAY8 * 2.0).astype(dtype))
    assert plane.dtype == expected


def test_negative_integers_become_float():
    plane = to_gray_plane(GRAY12.astype(np.int16) - np.int16(1000))
    assert plane.dtype == np.float32 and plane.min() < 0


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    for gray in (GRAY8, GRAY16, GRAY8.astype(np.float32)):
        plane = to_gray_plane(torch.from_numpy(gray)[None])
        assert plane.dtype == gray.dtype and np.array_equal(plane, gray)
    half = torch.from_numpy(GRAY8).to(torch.bfloat16).requires_grad_()
    assert np.array_equal(to_gray_plane(half), GRAY8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GRAY16), GRAY16),
        (Image.fromarray(GRAY12.astype(np.int32)), GRAY12),
        (Image.fromarray(GRAY8.astype(np.float32)), GRAY8.astype(np.float32)),
    ],
)
def test_pil_images_of_more_than_eight_bits(image: Image.Image, expected: np.ndarray):
    plane = to_gray_plane(image)
    assert plane.dtype == expected.dtype and np.array_equal(plane, expected)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (COLORED, "colored"),
        (np.stack([GRAY16, GRAY16[::-1], GRAY16]), "separate slices"),
        (np.moveaxis(COLORED, -1, 0) / 255.0, "colored"),
        (COLORED / 255.0 - 0.5, "colored"),
        (GRAY8[None, None], "shape"),
        (np.stack([GRAY8] * 9), "shape"),
        (GRAY8[:, 0], "shape"),
        (GRAY8[:20], "20 x 50"),
        (np.full((40, 50), 7.0), "same value"),
        (np.full((40, 50), np.nan), "same value"),
        (GRAY8.astype(complex), "complex"),
        (np.array(["a"]), "type"),
        (np.zeros((0, 0)), "0 x 0"),
    ],
)
def test_arrays_that_are_refused(array: np.ndarray, reason: str):
    with pytest.raises(InvalidImageError, match=reason) as refusal:
        to_gray_plane(array, "image 3 of the batch")
    assert str(refusal.value).startswith("image 3 of the batch: ")


def test_nan_does_not_make_a_image_colored_or_constant():
    holed = np.where(GRAY8 > 250, np.nan, GRAY8.astype(np.float32))
    assert np.array_equal(to_gray_plane(np.stack([holed] * 3)), holed, equal_nan=True)


def test_floats_below_zero_are_not_taken_for_colored():
    negative = GRAY8.astype(np.float32) - 1000
    assert np.array_equal(to_gray_plane(np.stack([negative] * 3)), negative)


def tiff(plane: np.ndarray, photometric: int) -> bytes:
    """A TIFF written by hand, one strip; PhotometricInterpretation 0 is WhiteIsZero."""
    height, width = plane.shape
    bits, kind = 8 * plane.dtype.itemsize, 3 if plane.dtype.kind == "f" else 1
    fields = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 12 * 10 + 4)]
    fields += [(277, 1), (278, height), (279, plane.nbytes), (339, kind)]
    entries = b"".join(struct.pack("<HHLL", tag, 4 if value > 65535 else 3, 1, value) for tag, value in fields)
    return b"II*\0" + struct.pack("<LH", 8, len(fields)) + entries + bytes(4) + plane.tobytes()


def test_white_is_zero_is_inverted_at_every_depth(tmp_path):
    unit = (GRAY16 / 65535).astype(np.float32)
    for plane, negative in ((GRAY8, 255 - GRAY8), (GRAY16, 65535 - GRAY16), (unit, unit.max() + unit.min() - unit)):
        (tmp_path / "black.tif").write_bytes(tiff(plane, 1))
        (tmp_path / "white.tif").write_bytes(tiff(negative, 0))
        np.testing.assert_array_equal(read_image(tmp_path / "black.tif"), plane)
        np.testing.assert_allclose(read_image(tmp_path / "white.tif"), plane, atol=1e-6 if plane is unit else 0)


def test_an_open_file_given_as_an_array_is_left_attached():
    stream = io.BufferedReader(io.BytesIO(b"abc"))
    with pytest.raises(InvalidImageError, match="open file"):
        to_gray_plane(stream)
    assert stream.read() == b"abc"
