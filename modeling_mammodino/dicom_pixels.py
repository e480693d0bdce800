"""From the stored values of a DICOM to gray.

Order of the steps to gray (PS3.4 N.2): modality LUT -> padding set to air -> VOI LUT or window -> MONOCHROME1 inversion
(PS3.3 C.7.5.1.1.2, C.11.1, C.11.2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dicom_header import number, scopes, text
from .image_io import GRAY_TOLERANCE

FLAT_FRACTION = 1 / 64  # a window that leaves less contrast than this on an image is of another bit depth
MOSTLY_WHITE_FRACTION = 0.5  # of what is not black; such a window is followed, with a warning
OVERSHOOT_FRACTION = 1 / 64  # of the range of BitsStored; a lossy codec stays within it, beyond it BitsStored lies
MALFORMED = (AttributeError, ValueError, TypeError, LookupError, NotImplementedError)  # of a LUT


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


def to_gray(
    frame: np.ndarray, header: Any, index: int, settings: GraySettings, warn: Callable[[str, str], None]
) -> np.ndarray:
    """Gray values of frame `index` of the file: (H, W) uint8, uint16 or float32; `frame` may be overwritten.

    frame: stored values (H, W), or RGB (H, W, 3).
    `warn(about, message)` is told of a header that does not fit its pixels.
    """
    frame = frame.astype(frame.dtype.newbyteorder("="), copy=False)
    values = _extend_sign(frame if frame.ndim == 2 else _one_channel(frame, warn), header)
    inverse = is_inverse(header)
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


def is_inverse(header: Any) -> bool:
    """Whether small values are displayed bright."""
    shape = text(header, "PresentationLUTShape")  # PS3.3 C.11.6.1.2
    return text(header, "PhotometricInterpretation") == "MONOCHROME1" or shape == "INVERSE"


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
    white = 0 if text(header, "PhotometricInterpretation") == "MONOCHROME1" else 1  # on display
    for scope in scopes(header, index, "FrameVOILUTSequence"):
        about, seen = _voi(scope, values, warn)
        if not about:
            continue
        if seen is None or (np.ptp(seen) < FLAT_FRACTION and np.ptp(values) > 0):
            warn(about, "does not fit the pixels; full range used")
            low, high = limits
            seen = np.clip((values.astype(np.float32) - low) / max(high - low, 1), 0, 1, dtype=np.float32)
        elif np.count_nonzero(seen == white) > MOSTLY_WHITE_FRACTION * np.count_nonzero(seen != 1 - white):
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
