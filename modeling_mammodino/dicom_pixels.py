"""From the stored values of a DICOM to gray.

Order of the steps to gray (PS3.4 N.2): modality LUT -> padding set to air -> VOI LUT or window -> MONOCHROME1 inversion
(PS3.3 C.7.5.1.1.2, C.11.1, C.11.2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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


class StoredRange(NamedTuple):
    """The values of a volume, of which follows what is decided for all its slices alike; of an image, its own."""

    raw: tuple[int, int]  # lowest and highest, as decoded
    shown: tuple[int, int]  # the same with the sign extended, without padding

    @classmethod
    def of(cls, frames: Sequence[np.ndarray], header: Any, settings: GraySettings) -> "StoredRange":
        """Measure frames (H, W) or (H, W, 3), stored values."""
        planes = [_plane(frame, _ignore) for frame in frames]
        raw = _extremes(planes)
        signed = [_extend_sign(plane, header, raw) for plane in planes]
        paddings = [_padding(plane, header, settings) for plane in signed]
        shown = [plane if padding is None else plane[~padding] for plane, padding in zip(signed, paddings, strict=True)]
        return cls(raw, _extremes(shown))

    def union(self, other: "StoredRange") -> "StoredRange":
        """Return the range of both."""
        raw, shown = ((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(self, other, strict=True))
        return StoredRange(raw, shown)


def _extremes(planes: Sequence[np.ndarray]) -> tuple[int, int]:
    return min(int(plane.min()) for plane in planes), max(int(plane.max()) for plane in planes)


def _ignore(about: str, message: str) -> None:
    """Take a warning that was given elsewhere."""


def needs_range(header: Any, frames: int, settings: GraySettings) -> bool:
    """Whether anything in a slice's gray values follows from the range of its whole volume."""

    def states(sequence: str, *keywords: str) -> bool:
        return any(word in scope for i in range(frames) for scope in scopes(header, i, sequence) for word in keywords)

    return (
        number(header, "PixelRepresentation") == 1
        or (settings.do_invert_monochrome1 and is_inverse(header))
        or (settings.do_voi_lut and states("FrameVOILUTSequence", "WindowCenter", "VOILUTSequence"))
        or (settings.do_modality_lut and states("PixelValueTransformationSequence", "ModalityLUTSequence"))
    )


def to_gray(
    frame: np.ndarray,
    header: Any,
    index: int,
    settings: GraySettings,
    warn: Callable[[str, str], None],
    volume: StoredRange | None = None,
) -> np.ndarray:
    """Gray values of frame `index` of the file: (H, W) uint8, uint16 or float32; `frame` may be overwritten.

    frame: stored values (H, W), or RGB (H, W, 3).
    `warn(about, message)` is told of a header that does not fit its pixels.
    volume: the range of the volume that the frame is a slice of, so that all slices are read alike; by default, its
        own.
    """
    volume = volume or StoredRange.of([frame], header, settings)
    values = _extend_sign(_plane(frame, warn), header, volume.raw)
    inverse = is_inverse(header)
    padding = _padding(values, header, settings)  # (H, W) bool
    limits = _stored_range(values.dtype, volume.shown, header, warn)
    probe = _between(*volume.shown).astype(values.dtype)  # stands for all values of the volume
    modality, limits = _modality(probe, limits, header, index, warn) if settings.do_modality_lut else (None, limits)
    if modality:
        values, probe = modality(values), modality(probe)
    if values.dtype not in (np.uint8, np.uint16):
        values = values.astype(np.float32, copy=False)
    if padding is not None:
        least, most = values.min(), values.max()
        inside = ~padding
        air = values.max(where=inside, initial=least) if inverse else values.min(where=inside, initial=most)
        values[padding] = air  # the darkest value on display
    if settings.do_voi_lut:
        about, look = _voi(probe, limits, header, index, warn)
        if look:
            values, limits = look(values), (0, 1)
            black, white = (1, 0) if inverse else (0, 1)  # on display
            is_white = np.count_nonzero(values == white) > MOSTLY_WHITE_FRACTION * np.count_nonzero(values != black)
            if about and is_white:
                warn(about, "most of what is not black is white; is it of another bit depth?")
    if inverse and settings.do_invert_monochrome1:
        low, high = limits
        if values.max() > high:  # beyond what was measured of the volume
            values = np.minimum(values, values.dtype.type(high))
        np.subtract(values.dtype.type(low + high), values, out=values)
    return values


def is_inverse(header: Any) -> bool:
    """Whether small values are displayed bright."""
    shape = text(header, "PresentationLUTShape")  # PS3.3 C.11.6.1.2
    return text(header, "PhotometricInterpretation") == "MONOCHROME1" or shape == "INVERSE"


def _plane(frame: np.ndarray, warn: Callable[[str, str], None]) -> np.ndarray:
    """One channel (H, W) of a frame, in the byte order of this machine."""
    frame = frame.astype(frame.dtype.newbyteorder("="), copy=False)
    return frame if frame.ndim == 2 else _one_channel(frame, warn)


def _between(least: int, most: int) -> np.ndarray:
    """At most 4,096 whole numbers from `least` to `most`, both included."""
    return np.rint(np.linspace(least, most, min(most - least + 1, 4096)))


def _one_channel(colors: np.ndarray, warn: Callable[[str, str], None]) -> np.ndarray:
    """Green, where the channels of (H, W, 3) agree as far as a lossy codec lets them; else the luminance (BT.601)."""
    spread = colors.max(axis=2) - colors.min(axis=2)
    if spread.max() <= GRAY_TOLERANCE * np.iinfo(colors.dtype).max:
        return np.ascontiguousarray(colors[..., 1])
    warn("PhotometricInterpretation", "the image is colored; its luminance is taken")
    return np.rint(colors @ np.array([0.299, 0.587, 0.114], np.float32)).astype(colors.dtype)


def _extend_sign(values: np.ndarray, header: Any, raw: tuple[int, int]) -> np.ndarray:
    """Signed values, also where the pixels leave the bits above BitsStored clear (PS3.5 8.1.1)."""
    unused = 8 * values.dtype.itemsize - int(number(header, "BitsStored") or 8 * values.dtype.itemsize)
    if values.dtype.kind != "i" or unused <= 0 or raw[0] < 0 or raw[1] >> (8 * values.itemsize - unused):
        return values  # extended already, or BitsStored lies
    return values << unused >> unused


def _stored_range(
    dtype: np.dtype, shown: tuple[int, int], header: Any, warn: Callable[[str, str], None]
) -> tuple[float, float]:
    """Lowest and highest storable value by BitsStored, widened to the next power of two where pixels exceed it."""
    bits = int(number(header, "BitsStored") or 8 * dtype.itemsize)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if dtype.kind == "i" else (0, (1 << bits) - 1)
    least, most = shown
    if max(low - least, most - high) > OVERSHOOT_FRACTION * (high - low):
        warn("BitsStored", "pixels exceed it; taken as they are")
        most = max(most, (1 << most.bit_length()) - 1)
    return min(low, least), max(high, most)


def _padding(values: np.ndarray, header: Any, settings: GraySettings) -> np.ndarray | None:
    """Pixels between PixelPaddingValue and PixelPaddingRangeLimit, both included; None where none or all are."""
    stated = (number(header, "PixelPaddingValue"), number(header, "PixelPaddingRangeLimit"))
    ends = [_of_pixels_sign(value, values.dtype) for value in stated if value is not None]
    if stated[0] is None or not (settings.do_modality_lut or settings.do_voi_lut):
        return None
    low, high = min(ends), max(ends)
    padding: np.ndarray = values == low if low == high else (values >= low) & (values <= high)
    return padding if padding.any() and not padding.all() else None


def _of_pixels_sign(value: float, dtype: np.dtype) -> float:
    """A value written with the other sign than the pixels have, such as 63536 for -2000, as the pixels have it."""
    span = 1 << 8 * dtype.itemsize
    if dtype.kind == "i" and span // 2 <= value < span:
        return value - span
    return value + span if dtype.kind == "u" and -span // 2 <= value < 0 else value


def _modality(
    probe: np.ndarray, limits: tuple[float, float], header: Any, index: int, warn: Callable[[str, str], None]
) -> tuple[Callable[[np.ndarray], np.ndarray] | None, tuple[float, float]]:
    """Modality LUT, else rescale slope and intercept, of the frame, the volume or the file (C.11.1), and the limits of
    what it gives; None where it changes nothing."""
    for scope in scopes(header, index, "PixelValueTransformationSequence"):
        if tables := scope.get("ModalityLUTSequence"):
            table, first, top = _table(tables[0], probe)
            return partial(_look_up, table=table, first=first), (0, top)
        slope, intercept = number(scope, "RescaleSlope"), number(scope, "RescaleIntercept")
        if slope is not None or intercept is not None:
            if slope == 0:
                warn("RescaleSlope", "0 would erase the image; taken as 1")
            slope, intercept = slope or 1.0, intercept or 0.0
            if (slope, intercept) == (1, 0):
                return None, limits
            low, high = sorted(slope * limit + intercept for limit in limits)
            return partial(_rescaled, slope=slope, intercept=intercept), (low, high)
    return None, limits


def _rescaled(values: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    return values.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _voi(
    probe: np.ndarray, limits: tuple[float, float], header: Any, index: int, warn: Callable[[str, str], None]
) -> tuple[str, Callable[[np.ndarray], np.ndarray] | None]:
    """The first VOI LUT, else the first window (C.11.2), as a function to float32 in 0..1; None where there is neither.

    The standard leaves the choice among several, and between LUT and window, to the reader; the first is the vendor's.
    Beside it which element it was, "" where that does not fit the pixels and the full range takes its place.
    """
    for scope in scopes(header, index, "FrameVOILUTSequence"):
        about, look = _stated_voi(scope, probe, warn)
        if not about:
            continue
        if look is None or (np.ptp(look(probe)) < FLAT_FRACTION and np.ptp(probe) > 0):
            warn(about, "does not fit the pixels; full range used")
            return "", partial(_full_range, limits=limits)
        return about, look
    return "", None


def _full_range(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    low, high = limits
    return np.clip((values.astype(np.float32) - low) / max(high - low, 1), 0, 1, dtype=np.float32)


def _stated_voi(
    scope: Any, probe: np.ndarray, warn: Callable[[str, str], None]
) -> tuple[str, Callable[[np.ndarray], np.ndarray] | None]:
    """Which element of `scope` applies, "" for none, and what it makes of values; None where it is illegal."""
    if tables := scope.get("VOILUTSequence"):
        try:
            table, first, top = _table(tables[0], probe)
            return "VOILUTSequence", partial(_look_up, table=(table / top).astype(np.float32), first=first)
        except MALFORMED:
            warn("VOILUTSequence", "malformed; left out")
    center, width = number(scope, "WindowCenter"), number(scope, "WindowWidth")
    if center is None or width is None:
        return "", None
    look = partial(window, center=center, width=width, function=text(scope, "VOILUTFunction"))
    is_legal = look(probe) is not None  # one width, one answer for all values
    return "WindowCenter and WindowWidth", look if is_legal else None  # type: ignore[return-value]


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


def _table(item: Any, probe: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Entries of a LUT item as uint16, the value that the first maps, and the highest output (C.11.1.1.1)."""
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    entries = entries % 65536 or 65536
    data = item.LUTData
    if isinstance(data, bytes):  # OW: a word an entry, or two packed bytes
        order = ">" if item.original_encoding[1] is False else "<"
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * entries else f"{order}u2")
    elif bits <= 8 and 1 < entries and np.size(data) == (entries + 1) // 2:
        data = np.atleast_1d(data).astype("<u2").view(np.uint8)  # two packed into a word, the first below
    table = np.atleast_1d(np.asarray(data)).astype(np.uint16)[:entries]
    if first > 32767 and probe.min() < 0:  # written unsigned, meant signed
        first -= 65536
    return table, first, max((1 << bits) - 1, (1 << int(table.max()).bit_length()) - 1)


def _look_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    places = np.rint(values).astype(np.int64) - first
    return table[np.clip(places, 0, len(table) - 1)]
