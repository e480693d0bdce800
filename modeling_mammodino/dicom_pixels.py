"""The pixels of a DICOM: checks of compressed frames, decoding, and gray values.

Order of the steps to gray (PS3.4 N.2): modality LUT -> padding set to air -> VOI LUT or window -> MONOCHROME1 inversion
(PS3.3 C.7.5.1.1.2, C.11.1, C.11.2). What a compressed frame says of itself is read before a decoder takes memory by its
word: JPEG, also lossless and JPEG-LS (ITU-T T.81 B.2.2, T.87 C.2.2), JPEG 2000 and HTJ2K (T.800 A.5.1).
"""

import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .dicom_header import number, scopes, text
from .image_io import GRAY_TOLERANCE

try:
    import pydicom
except ImportError:  # a checkpoint runs on ready tensors without pydicom
    pydicom = None  # type: ignore[assignment]

HEAD_BYTES = 1 << 16  # in which the frame header stands: behind tables, comments and application segments
MAX_TILES = 4096  # of JPEG 2000; a decoder keeps some kilobytes for each
LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
FLAT_FRACTION = 1 / 64  # a window that leaves less contrast than this on an image is of another bit depth
MOSTLY_WHITE_FRACTION = 0.5  # of what is not black; such a window is followed, with a warning
OVERSHOOT_FRACTION = 1 / 64  # of the range of BitsStored; a lossy codec stays within it, beyond it BitsStored lies
MALFORMED = (AttributeError, ValueError, TypeError, LookupError, NotImplementedError)  # of a LUT
_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_START_OF_CODESTREAM = b"\xff\x4f\xff\x51"


@dataclass(frozen=True)
class GraySettings:
    """The steps from stored values to gray.

    Attributes:
        do_modality_lut: rescale slope and intercept or modality LUT (PS3.3 C.11.1).
        do_voi_lut: VOI LUT or window (PS3.3 C.11.2); with it, or with the modality LUT, padding becomes air.
        do_invert_monochrome1: larger becomes brighter in MONOCHROME1 files too.
    """

    do_modality_lut: bool = True
    do_voi_lut: bool = True
    do_invert_monochrome1: bool = True


TO_GRAY = GraySettings()
AS_STORED = GraySettings(do_modality_lut=False, do_voi_lut=False, do_invert_monochrome1=False)


class FrameHeader(NamedTuple):
    rows: int
    columns: int
    samples: int
    tiles: int = 1


def frame_header(head: bytes) -> FrameHeader | None:
    """Of the first bytes of a codestream; None where there is none that is known.

    Raises ValueError where it cannot be one.
    """
    try:
        if head[:2] == b"\xff\xd8":
            return _jpeg(head)
        if (start := head[:512].find(_START_OF_CODESTREAM)) >= 0:  # behind the boxes of a JP2 file, too
            return _jpeg_2000(head[start:])
    except struct.error as error:
        raise ValueError("the codestream's frame header is cut off") from error
    return None


def _jpeg(head: bytes) -> FrameHeader | None:
    at = 2
    while at + 4 <= len(head):
        marker, code, length = struct.unpack_from(">BBH", head, at)
        if marker != 0xFF:
            raise ValueError("the codestream's markers are damaged")
        if code == 0xFF:  # fill bytes
            at += 1
        elif code in _START_OF_FRAME:
            _, rows, columns, samples = struct.unpack_from(">BHHB", head, at + 4)
            return FrameHeader(rows, columns, samples)
        elif code == 0xDA:
            raise ValueError("the codestream has no frame header")
        else:
            at += 2 + length
    return None


def _jpeg_2000(head: bytes) -> FrameHeader:
    right, bottom, left, top, width, height, tile_left, tile_top, samples = struct.unpack_from(">8LH", head, 8)
    if not (width and height and left < right and top < bottom):
        raise ValueError("the codestream has no area")
    tiles = -(-(right - tile_left) // width) * -(-(bottom - tile_top) // height)
    return FrameHeader(bottom - top, right - left, samples, tiles)


def fault_of_codestream(head: bytes, header: Any) -> tuple[str, str] | None:
    """Return what is wrong with a frame by its first bytes, and the remedy; None where nothing is."""
    try:
        stated = frame_header(head)
    except ValueError as error:
        return f"PixelData is damaged: {error}", "fetch the file again"
    if stated is None:
        return None
    wanted = tuple(int(number(header, name) or 1) for name in ("Rows", "Columns", "SamplesPerPixel"))
    if stated[:3] != wanted:
        said, meant = (f"{rows} x {columns} x {samples}" for rows, columns, samples in (stated[:3], wanted))
        return f"the codestream has {said} pixels, the header says {meant}", "check or export it again"
    if stated.tiles > MAX_TILES:
        return f"the codestream has {stated.tiles} tiles, at most {MAX_TILES} are read", "export it again"
    return None


def decode(source: Any, header: Any, frames: list[int], pixel_vr: str = "") -> Generator[np.ndarray, None, None]:
    """Decode frames, one at a time: stored values (H, W), of color (H, W, 3) in RGB.

    source: a stream at the first byte of PixelData's value, or the data set that holds it.
    frames: by their numbers in the file, from 0.
    """
    if not frames:  # pydicom would take an empty list for all
        return
    is_gray = number(header, "SamplesPerPixel") in (None, 1)
    syntax = header.file_meta.TransferSyntaxUID
    # Bits above BitsStored are cleared where they may be an embedded overlay, else kept: BitsStored lies.
    clear = bool((0x6000, 0x0102) in header and header[0x6000, 0x0102].value)
    options = pydicom.pixels.utils.as_pixel_options(header, correct_unused_bits=clear)
    if is_gray and (number(header, "BitsStored") or 16) <= 8 and syntax in LOSSLESS_JPEG:
        options["bits_allocated"] = 8  # a stream of one byte a value, also where BitsAllocated is 16
    if source is not header:
        options |= {"transfer_syntax_uid": syntax, "pixel_keyword": "PixelData"}
        options |= {"pixel_vr": pixel_vr} if pixel_vr else {}
    for frame, _ in pydicom.pixels.get_decoder(syntax).iter_array(source, indices=frames, raw=is_gray, **options):
        yield frame


def to_gray(
    frame: np.ndarray, header: Any, index: int, settings: GraySettings, warn: Callable[[str, str], None]
) -> np.ndarray:
    """Gray values of frame `index` of the file: (H, W) uint8, uint16 or float32; `frame` may be overwritten.

    frame: stored values (H, W), or RGB (H, W, 3).
    `warn(about, message)` is told of a header that does not fit its pixels.
    """
    frame = frame.astype(frame.dtype.newbyteorder("="), copy=False)
    values = _extend_sign(frame if frame.ndim == 2 else _one_channel(frame, warn), header)
    inverse = text(header, "PhotometricInterpretation") == "MONOCHROME1"
    uses_padding = settings.do_modality_lut or settings.do_voi_lut
    padding = _padding(values, header) if uses_padding else None  # (H, W) bool
    if padding is not None and (padding.all() or not padding.any()):
        padding = None
    limits = _stored_range(values if padding is None else values[~padding], header, warn)
    if settings.do_modality_lut:
        values, limits = _apply_modality(values, limits, header, index, warn)
    if values.dtype not in (np.uint8, np.uint16):
        values = values.astype(np.float32, copy=False)
    if padding is not None:
        least, most = values.min(), values.max()
        inside = ~padding
        air = values.max(where=inside, initial=least) if inverse else values.min(where=inside, initial=most)
        values[padding] = air  # the darkest value on display
    if settings.do_voi_lut:
        values, limits = _apply_voi(values, limits, header, index, warn)
    if inverse and settings.do_invert_monochrome1:
        np.subtract(values.dtype.type(limits[0] + limits[1]), values, out=values)
    return values


def _one_channel(colors: np.ndarray, warn: Callable[[str, str], None]) -> np.ndarray:
    """Green, where the channels of (H, W, 3) agree as far as a lossy codec lets them; else the luminance (BT.601)."""
    spread = colors.max(axis=2) - colors.min(axis=2)
    if spread.max() <= GRAY_TOLERANCE * np.iinfo(colors.dtype).max:
        return np.ascontiguousarray(colors[..., 1])
    warn("PhotometricInterpretation", "the image is colored; its luminance is taken")
    return np.rint(colors @ np.array([0.299, 0.587, 0.114], np.float32)).astype(colors.dtype)


def _extend_sign(values: np.ndarray, header: Any) -> np.ndarray:
    """Signed values, also where the pixels leave the bits above BitsStored clear (PS3.5 8.1.1)."""
    unused = 8 * values.dtype.itemsize - int(number(header, "BitsStored") or 8 * values.dtype.itemsize)
    if values.dtype.kind != "i" or unused <= 0 or values.min() < 0 or values.max() >> (8 * values.itemsize - unused):
        return values  # extended already, or BitsStored lies
    return values << unused >> unused


def _stored_range(values: np.ndarray, header: Any, warn: Callable[[str, str], None]) -> tuple[float, float]:
    """Lowest and highest storable value by BitsStored, widened to the next power of two where pixels exceed it."""
    bits = int(number(header, "BitsStored") or 8 * values.dtype.itemsize)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if values.dtype.kind == "i" else (0, (1 << bits) - 1)
    least, most = int(values.min()), int(values.max())
    if max(low - least, most - high) > OVERSHOOT_FRACTION * (high - low):
        warn("BitsStored", "pixels exceed it; taken as they are")
        most = max(most, (1 << most.bit_length()) - 1)
    return min(low, least), max(high, most)


def _padding(values: np.ndarray, header: Any) -> np.ndarray | None:
    """Pixels between PixelPaddingValue and PixelPaddingRangeLimit, both included."""
    stated = (number(header, "PixelPaddingValue"), number(header, "PixelPaddingRangeLimit"))
    ends = [_of_pixels_sign(value, values.dtype) for value in stated if value is not None]
    if stated[0] is None:
        return None
    low, high = min(ends), max(ends)
    return values == low if low == high else (values >= low) & (values <= high)


def _of_pixels_sign(value: float, dtype: np.dtype) -> float:
    """A value written with the other sign than the pixels have, such as 63536 for -2000, as the pixels have it."""
    span = 1 << 8 * dtype.itemsize
    if dtype.kind == "i" and span // 2 <= value < span:
        return value - span
    return value + span if dtype.kind == "u" and -span // 2 <= value < 0 else value


def _apply_modality(
    values: np.ndarray, limits: tuple[float, float], header: Any, index: int, warn: Callable[[str, str], None]
) -> tuple[np.ndarray, tuple[float, float]]:
    """Modality LUT, else rescale slope and intercept, of the frame, the volume or the file (C.11.1)."""
    for scope in scopes(header, index, "PixelValueTransformationSequence"):
        if tables := scope.get("ModalityLUTSequence"):
            table, first, top = _table(tables[0], values)
            return _look_up(values, table, first), (0, top)
        slope, intercept = number(scope, "RescaleSlope"), number(scope, "RescaleIntercept")
        if slope is not None or intercept is not None:
            if slope == 0:
                warn("RescaleSlope", "0 would erase the image; taken as 1")
            slope, intercept = slope or 1.0, intercept or 0.0
            if (slope, intercept) == (1, 0):
                return values, limits
            low, high = sorted(slope * limit + intercept for limit in limits)
            return values.astype(np.float32) * np.float32(slope) + np.float32(intercept), (low, high)
    return values, limits


def _apply_voi(
    values: np.ndarray, limits: tuple[float, float], header: Any, index: int, warn: Callable[[str, str], None]
) -> tuple[np.ndarray, tuple[float, float]]:
    """float32 in 0..1 by the first VOI LUT, else the first window; unchanged where the header has neither (C.11.2).

    The standard leaves the choice among several, and between LUT and window, to the reader; the first is the vendor's.
    """
    for scope in scopes(header, index, "FrameVOILUTSequence"):
        about, seen = _voi(scope, values, warn)
        if not about:
            continue
        if seen is None or (np.ptp(seen) < FLAT_FRACTION and np.ptp(values) > 0):
            warn(about, "does not fit the pixels; full range used")
            low, high = limits
            seen = np.clip((values.astype(np.float32) - low) / max(high - low, 1), 0, 1, dtype=np.float32)
        elif np.count_nonzero(seen == 1) > MOSTLY_WHITE_FRACTION * np.count_nonzero(seen):
            warn(about, "most of what is not black is white; is it of another bit depth?")
        return seen, (0, 1)
    return values, limits


def _voi(scope: Any, values: np.ndarray, warn: Callable[[str, str], None]) -> tuple[str, np.ndarray | None]:
    """Which element of `scope` applies, "" for none, and what it makes of the values; None where it is illegal."""
    if tables := scope.get("VOILUTSequence"):
        try:
            table, first, top = _table(tables[0], values)
            return "VOILUTSequence", _look_up(values, (table / top).astype(np.float32), first)
        except MALFORMED:
            warn("VOILUTSequence", "malformed; left out")
    center, width = number(scope, "WindowCenter"), number(scope, "WindowWidth")
    if center is None or width is None:
        return "", None
    return "WindowCenter and WindowWidth", window(values, center, width, text(scope, "VOILUTFunction"))


def window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray | None:
    """float32 in 0..1 by LINEAR, LINEAR_EXACT or SIGMOID (C.11.2.1.2, C.11.2.1.3); None for an illegal width."""
    if width <= 0 or (width < 1 and function not in ("LINEAR_EXACT", "SIGMOID")):
        return None
    if function == "SIGMOID":  # 1 / (1 + exp(-4 x)) without overflow
        return (0.5 + 0.5 * np.tanh((values.astype(np.float32) - center) * (2 / width))).astype(np.float32)
    if function != "LINEAR_EXACT":  # LINEAR, the default
        center, width = center - 0.5, width - 1
    if width == 0:
        return (values > center).astype(np.float32)
    seen = values.astype(np.float32)
    seen -= np.float32(center - width / 2)
    seen /= np.float32(width)
    return np.clip(seen, 0, 1, out=seen)


def _table(item: Any, values: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Entries of a LUT item as uint16, the value that the first maps, and the highest output (C.11.1.1.1)."""
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    entries = entries % 65536 or 65536
    data = item.LUTData
    if isinstance(data, bytes):  # OW: a word an entry, or two packed bytes
        order = ">" if item.original_encoding[1] is False else "<"
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * entries else f"{order}u2")
    table = np.atleast_1d(np.asarray(data)).astype(np.uint16)[:entries]
    if first > 32767 and values.min() < 0:  # written unsigned, meant signed
        first -= 65536
    return table, first, max((1 << bits) - 1, (1 << int(table.max()).bit_length()) - 1)


def _look_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    places = np.rint(values).astype(np.int64) - first
    return table[np.clip(places, 0, len(table) - 1)]
