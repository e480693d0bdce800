"""Images and arrays that are not DICOM, as one gray plane (H, W) at the bit depth that they came in.

EXIF orientation is ignored on purpose: mammography viewers and converters write pixels upright, and a tag left behind
by an editor would turn the chest wall away from its side.
"""

import io
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

try:
    import cv2
except ImportError:  # transformers imports remote code before its packages are checked
    cv2 = None  # type: ignore[assignment]

DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".pgm", ".tif", ".tiff", ".bmp")
FORMATS = ("PNG", "JPEG", "PPM", "TIFF", "BMP")  # of Pillow, which would also start Ghostscript for an EPS
MAX_PIXELS = 2**26  # of one plane: twice the largest film scan that we know of; more is a damaged header
MIN_SIDE_PX = 32
GRAY_TOLERANCE = 4 / 255  # largest difference between channels, of the full scale: what a JPEG's chroma leaves
CLIPPED_REMEDY = (
    "an image of more bits was clipped on the way, as transformers' pipelines do with a path: "
    "give the path to the image processor, or image_processor.fetch_images(path) to the pipeline"
)


class InvalidImageError(ValueError):
    """An image that cannot be read as a mammogram.

    Attributes:
        name: of the file or the position in the batch. A path may carry a patient's name: log it where that is allowed.
        reason: the field or property at fault, and the remedy; free of paths and of values of a header.

    Callers that work over many files catch this one class, note the message and go on.
    """

    def __init__(self, name: object, reason: str):
        super().__init__(str(name), reason)  # both in args, so that it crosses processes
        self.name, self.reason = str(name), reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class ImageFile:
    """An image file that is open already, in an object store, a zip or a request; takes the place of a path.

    For one reader at a time: the stream has one position.
    """

    stream: BinaryIO  # seekable
    name: str  # for messages; its suffix counts as a path's does
    identity: str = ""  # hashed where a file has no UID of its own; `name` if empty


def as_image_file(source: Any, name: str) -> Any:
    """Make an `ImageFile` of the bytes of a file, or of a file that is open; everything else is left as it is.

    An open file that can seek is read from its start, and stays where it was.
    """
    if isinstance(source, io.TextIOBase):
        raise InvalidImageError(name, "a file that was opened as text; open it with mode 'rb'.")
    if isinstance(source, (bytes, bytearray)):
        return ImageFile(io.BytesIO(source), name)
    if not callable(getattr(source, "read", None)):
        return source
    try:
        can_seek = not hasattr(source, "seekable") or source.seekable()
        place = source.tell() if can_seek else 0
        if can_seek:
            source.seek(0)
        content = source.read()
        if can_seek:
            source.seek(place)
    except (OSError, ValueError) as error:
        raise InvalidImageError(name, f"the file cannot be read ({type(error).__name__}); open it again.") from error
    stated = getattr(source, "name", None)
    return ImageFile(io.BytesIO(content), stated if isinstance(stated, str) else name)


def suffix(source: Any) -> str:
    """Of a path or an `ImageFile`, in lower case."""
    return Path(source.name if isinstance(source, ImageFile) else source).suffix.lower()


class GrayImage(Image.Image):
    """A gray plane as the PIL image that a transformers pipeline takes, at its own depth: mode L, I;16 or F.

    A pipeline calls `convert("RGB")` on every image (transformers.image_utils.load_image), and Pillow then cuts what
    is above 255. Here an image of more than 8 bits answers with a gray copy of itself; all else is Pillow's, and
    `numpy.asarray` gives the plane (H, W).
    """

    @classmethod
    def of(cls, plane: np.ndarray) -> "GrayImage":
        """Of a plane (H, W) uint8, uint16 or float32."""
        return cls._from(Image.fromarray(plane))

    @classmethod
    def _from(cls, image: Image.Image) -> "GrayImage":
        image.__class__ = cls  # Pillow offers no constructor that keeps the pixels
        return image  # type: ignore[return-value]

    def copy(self) -> "GrayImage":
        return self._from(super().copy())

    def convert(self, mode: str | None = None, *args: Any, **kwargs: Any) -> Image.Image:
        return self.copy() if mode == "RGB" and self.mode != "L" else super().convert(mode, *args, **kwargs)


def read_image(source: str | Path | ImageFile) -> np.ndarray:
    """The gray plane (H, W) of a PNG, JPEG, PGM, TIFF or BMP file, as uint8, uint16 or (TIFF) float32."""
    name, data = _read(source)
    if not data:
        raise InvalidImageError(name, "the file is empty; copy it again from its source.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise InvalidImageError(
                    name, f"{pixels / 1e6:.0f} million pixels; give at most {MAX_PIXELS / 1e6:.0f}."
                )
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            image.load()  # raises where the file ends early; cv2 would fill the rest with gray and say nothing
    except InvalidImageError:
        raise
    except Image.UnidentifiedImageError:
        known = ", ".join(IMAGE_SUFFIXES)
        raise InvalidImageError(name, f"not a readable image; give one of {known}, or a DICOM file.") from None
    except Exception as error:  # Pillow's plugins raise whatever they meet in a damaged file
        raise InvalidImageError(name, f"broken or cut short ({type(error).__name__}); copy it again.") from error
    if pages > 1:
        raise InvalidImageError(name, f"{pages} pages in one file; save each page as a file of its own.")
    if _pillow_changes_depth(image, data):
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None:
            raise InvalidImageError(name, "cannot be decoded; save it as an 8- or 16-bit gray PNG.")
        return to_gray_plane(decoded, name)
    plane = to_gray_plane(image, name)
    return _inverted(plane, image) if _is_white_zero(image) else plane


def _read(source: str | Path | ImageFile) -> tuple[str, bytes]:
    """The name for messages, and the content."""
    if isinstance(source, ImageFile):
        source.stream.seek(0)
        return source.name, source.stream.read()
    if str(source).startswith(("http://", "https://", "data:")):
        raise InvalidImageError(str(source)[:80], "not a file; download the image and give its path.")
    return str(source), Path(source).read_bytes()


def to_gray_plane(image: Any, name: str = "image") -> np.ndarray:
    """The gray plane (H, W) of an array, torch tensor or PIL image; `name` stands in the message of a refusal.

    Shapes: (H, W), (1, H, W), (H, W, 1), and 3 or 4 channels first or last, where the colors are equal and the fourth
    is opaque. uint8 and uint16 stay; other integers become uint16 where they fit, else float32; floats become float32.
    """
    if isinstance(image, Image.Image):
        image = _from_pil(image, name)
    elif hasattr(image, "detach") and hasattr(image, "cpu"):  # a torch tensor, without importing torch
        image = image.detach().cpu()
        try:
            image = image.numpy()
        except TypeError:  # bfloat16 has no numpy counterpart
            image = image.float().numpy()
    values = np.asarray(image)
    if values.dtype.kind not in "buif":
        raise InvalidImageError(
            name,
            f"{type(image).__name__} with values of type {values.dtype}; give a path, an open file or its bytes, "
            "a PIL image, or an array or tensor of integers or floats.",
        )
    if values.dtype.kind == "b":
        values = values.astype(np.uint8) * np.uint8(255)
    plane = _one_channel(values, name)
    H, W = plane.shape
    if min(H, W) < MIN_SIDE_PX:
        raise InvalidImageError(
            name, f"{H} x {W} pixels, fewer than {MIN_SIDE_PX} on a side; give the full-size image."
        )
    plane = _plain_dtype(plane)
    if not (_varies(plane[:: 1 + H // 64]) or _varies(plane)):  # some rows mostly spare the whole scan
        clipped = plane.dtype == np.uint8 and plane.flat[0] == 255
        remedy = CLIPPED_REMEDY if clipped else "leave it out or export it again."
        raise InvalidImageError(name, f"every pixel has the same value; {remedy}")
    return np.ascontiguousarray(plane)


def _pillow_changes_depth(image: Any, data: bytes) -> bool:
    """Pillow stretches 10- to 16-bit PGM to its own range and cuts 16-bit color down to 8 bits."""
    if image.format == "PNG":
        depth, color_type = data[24], data[25]  # in IHDR, which the PNG standard puts first
        return depth == 16 and color_type != 0
    if image.format == "TIFF":
        return image.mode in ("RGB", "RGBA", "RGBX") and max(image.tag_v2.get(258, (8,))) > 8  # BitsPerSample
    return image.format == "PPM" and data[:2] in (b"P2", b"P5", b"P6")


def _is_white_zero(image: Any) -> bool:
    """Whether larger is darker still: Pillow inverts such TIFF files up to 8 bits only."""
    return image.format == "TIFF" and image.tag_v2.get(262) == 0 and image.mode not in ("1", "L", "LA")


def _inverted(plane: np.ndarray, image: Any) -> np.ndarray:
    """Inverted within the bits of a sample; of other numbers than uint16, within their own range."""
    bits = image.tag_v2.get(258, (16,))[0]
    if plane.dtype == np.uint16 and bits <= 16:
        return np.uint16(2**bits - 1) - plane
    finite = plane[np.isfinite(plane)]
    return (finite.min() + finite.max() - plane).astype(plane.dtype)


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    if "transparency" in image.info and image.mode in ("P", "L", "RGB"):
        image = image.convert("RGBA")
    if image.mode in ("LA", "PA", "RGBA"):
        _check_opaque(np.asarray(image.getchannel("A")), name)
        image = image.convert("L" if image.mode == "LA" else "RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "I", "F", "RGB") and not image.mode.startswith("I;16"):
        raise InvalidImageError(name, f"color mode {image.mode}; save it as an 8- or 16-bit gray PNG.")
    return np.asarray(image)


def _one_channel(image: np.ndarray, name: str) -> np.ndarray:
    if image.ndim == 2:
        return image
    if image.ndim == 3 and image.shape[-1] in (1, 3, 4):
        image = np.moveaxis(image, -1, 0)
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise InvalidImageError(name, f"shape {image.shape}; give one plane (H, W), (1, H, W) or (H, W, 1) at a time.")
    if len(image) == 4:
        _check_opaque(image[3], name)
    # plane by plane: passes over channels that lie interleaved are several times slower than one copy of each
    channels = [np.ascontiguousarray(channel) for channel in image[:3]]
    if len(channels) > 1 and not all(np.array_equal(channels[0], channel) for channel in channels[1:]):
        _check_gray(channels, name)
    return channels[len(channels) // 2]  # green, or the one plane


def _check_opaque(alpha: np.ndarray, name: str) -> None:
    if alpha.min() != alpha.max() or alpha.max() == 0:
        raise InvalidImageError(name, "partly transparent; flatten it and save it as a gray PNG.")


def _check_gray(channels: list[np.ndarray], name: str) -> None:
    spread = reduce(np.maximum, channels) - reduce(np.minimum, channels)  # (H, W), same dtype
    if spread.dtype in (np.uint8, np.uint16):
        scale = float(np.iinfo(spread.dtype).max)
    else:
        values = np.stack(channels)
        finite = values[np.isfinite(values)]
        scale = float(np.ptp(finite)) if finite.size else 0.0
    colored = float(np.mean(spread > GRAY_TOLERANCE * scale))
    if colored > 0:
        raise InvalidImageError(
            name,
            f"{colored:.1%} of the pixels are colored (or the planes are separate slices), and a mammogram "
            "is gray; give the original without marks, one plane at a time.",
        )


def _varies(plane: np.ndarray) -> bool:
    finite = plane[np.isfinite(plane)] if plane.dtype.kind == "f" else plane
    return finite.size > 0 and bool(finite.min() != finite.max())


def _plain_dtype(plane: np.ndarray) -> np.ndarray:
    if plane.dtype in (np.uint8, np.uint16):
        return plane
    if plane.dtype.kind == "f":
        return plane.astype(np.float32, copy=False)
    return plane.astype(np.uint16 if plane.min() >= 0 and plane.max() <= 65535 else np.float32)
