"""The frames of PixelData: which transfer syntax they are in, what a compressed one says of itself, and decoding.

What a compressed frame says of itself is read before a decoder takes memory by its word: JPEG, also lossless and
JPEG-LS (ITU-T T.81 B.2.2, T.87 C.2.2), JPEG 2000 and HTJ2K (T.800 A.5.1), JPEG XL (ISO/IEC 18181-1 D.2).
"""

import io
import struct
import zlib
from collections.abc import Generator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .dicom_header import num_frames, number

try:
    import pydicom
except ImportError:  # a checkpoint runs on ready tensors without pydicom
    pydicom = None  # type: ignore[assignment]

HEAD_BYTES = 1 << 16  # in which the frame header stands: behind tables, comments and application segments
MAX_TILES = 4096  # of JPEG 2000; a decoder keeps some kilobytes for each
UNDEFINED = 0xFFFFFFFF  # length of an element that ends with a delimiter
START_OF_IMAGE, END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"  # of a JPEG or JPEG-LS stream (T.81 B.2.1, T.87 C.2.1)
PADDING, MAX_PADDING_BYTES = b"\0\xff", 1 << 20  # behind a codestream; more is a hole
ITEM, DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"

_ROOT = "1.2.840.10008.1.2"
EXPLICIT, BIG_ENDIAN = f"{_ROOT}.1", f"{_ROOT}.2"
NATIVE = (_ROOT, EXPLICIT, BIG_ENDIAN, f"{_ROOT}.1.99")  # PS3.5 A.1 to A.3, A.5
UNCOMPRESSED, DEFLATED = f"{_ROOT}.1.98", f"{_ROOT}.8.1"  # encapsulated: PS3.5 A.4.11, A.4.13
RLE = f"{_ROOT}.5"
DCT_JPEG = (f"{_ROOT}.4.51", f"{_ROOT}.4.50")
LOSSLESS_JPEG = (f"{_ROOT}.4.57", f"{_ROOT}.4.70")
JPEG_LS = (f"{_ROOT}.4.80", f"{_ROOT}.4.81")
JPEG_2000 = tuple(f"{_ROOT}.4.{end}" for end in (90, 91, 92, 93, 201, 202, 203))
JPEG_XL = tuple(f"{_ROOT}.4.{end}" for end in (110, 111, 112))
# syntaxes whose frames tell themselves; the first of a family stands for one that was found
FAMILIES = (DCT_JPEG, LOSSLESS_JPEG, JPEG_LS, JPEG_2000, JPEG_XL, (RLE,))
CELLS = (*NATIVE, UNCOMPRESSED, DEFLATED, RLE)  # whose values stand in cells as BitsStored and HighBit say
NAMES = {UNCOMPRESSED: "Encapsulated Uncompressed", DEFLATED: "Deflated Image Frame"}  # unknown to older pydicom
OVERLAYS = range(0x6000, 0x6020, 2)  # groups

_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_START_OF_CODESTREAM = b"\xff\x4f\xff\x51"
_BOX_OF_JPEG_XL = b"\0\0\0\x0cJXL \r\n\x87\n"
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # of width to height in JPEG XL


class FrameHeader(NamedTuple):
    rows: int
    columns: int
    samples: int  # 0 where it is not looked for
    tiles: int = 1
    bits: int = 0  # a sample, of JPEG
    family: tuple[str, ...] = ()  # transfer syntaxes that it may be in


def name_of(syntax: str) -> str:
    return NAMES.get(syntax) or ("JPEG XL" if syntax in JPEG_XL else pydicom.uid.UID(syntax).name)


def frame_header(head: bytes) -> FrameHeader | None:
    """Of the first bytes of a codestream; None where there is none that is known.

    Raises ValueError where it cannot be one.
    """
    try:
        if head[:2] == START_OF_IMAGE:
            return _jpeg(head)
        if head[:2] == b"\xff\x0a" or head[:12] == _BOX_OF_JPEG_XL:
            return _jpeg_xl(head[head.index(b"\xff\x0a") + 2 :])
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
            bits, rows, columns, samples = struct.unpack_from(">BHHB", head, at + 4)
            family = {0xC3: LOSSLESS_JPEG, 0xF7: JPEG_LS}.get(code, DCT_JPEG)
            return FrameHeader(rows, columns, samples, bits=bits, family=family)
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
    return FrameHeader(bottom - top, right - left, samples, tiles, family=JPEG_2000)


def _jpeg_xl(head: bytes) -> FrameHeader:
    (packed,) = struct.unpack_from("<Q", head + bytes(8))
    (more,) = struct.unpack_from("<Q", head + bytes(16), 8)
    bits = packed | more << 64

    def take(count: int) -> int:  # least significant bit first
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    def side() -> int:
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    is_small = take(1)
    rows = side()
    ratio = take(3)
    columns = rows * _RATIOS[ratio - 1][0] // _RATIOS[ratio - 1][1] if ratio else side()
    return FrameHeader(rows, columns, 0, family=JPEG_XL)


def fault_of_codestream(head: bytes, header: Any) -> tuple[str, str] | None:
    """Return what is wrong with a frame by its first bytes, and the remedy; None where nothing is."""
    try:
        stated = frame_header(head)
    except ValueError as error:
        return f"PixelData is damaged: {error}", "fetch the file again"
    if stated is None:
        return None
    wanted = tuple(int(number(header, name) or 1) for name in ("Rows", "Columns", "SamplesPerPixel"))
    found = (stated.rows, stated.columns, stated.samples or wanted[2])
    if found != wanted:
        said, meant = (f"{rows} x {columns} x {samples}" for rows, columns, samples in (found, wanted))
        return f"the codestream has {said} pixels, the header says {meant}", "check or export it again"
    if stated.tiles > MAX_TILES:
        return f"the codestream has {stated.tiles} tiles, at most {MAX_TILES} are read", "export it again"
    if _is_12_bit_jpeg(stated) and not (_pylibjpeg_is_here() or _imagecodecs()):
        return "JPEG Extended of 12 bits needs a decoder", "install one: pylibjpeg-libjpeg or imagecodecs"
    return None


def starts_frame(head: bytes) -> bool:
    """Whether a fragment with these first bytes is the first of a compressed frame."""
    return head[:2] == START_OF_IMAGE or bool(_family(head))


def end_of_item(stream: Any, start: int, stop: int) -> bytes:
    """The last bytes of the item from `start` to `stop`, and one byte of the padding behind them where there is any."""
    for size in (16, MAX_PADDING_BYTES):
        stream.seek(max(start, stop - size))
        end: bytes = stream.read(stop - stream.tell())
        if end.strip(PADDING):
            break
    return end[: len(end.rstrip(PADDING)) + 1]


def is_cut_off(head: bytes, end: bytes) -> bool:
    """Whether a frame that starts as JPEG or JPEG-LS does not end as one; decoders fill in what is missing."""
    return head[:2] == START_OF_IMAGE and not end.rstrip(PADDING).endswith(END_OF_IMAGE)


def _is_12_bit_jpeg(stated: FrameHeader | None) -> bool:
    return stated is not None and stated.family == DCT_JPEG and stated.bits > 8  # Pillow reads 8 bits only


def _pylibjpeg_is_here() -> bool:
    return "pylibjpeg" in pydicom.pixels.get_decoder(DCT_JPEG[0]).available_plugins


@cache
def _imagecodecs() -> Any:
    """The package, or None; optional, and named late so that a checkpoint does not ask for it."""
    try:
        import imagecodecs
    except ImportError:
        return None
    return imagecodecs


def missing_decoder(syntax: str) -> str | None:
    """What to install for a transfer syntax; "" for nothing. None where it is none that can be read."""
    if syntax in (UNCOMPRESSED, DEFLATED):
        return ""
    if syntax in JPEG_XL:
        return "" if _imagecodecs() else "imagecodecs"
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError:
        return None
    return "" if decoder.is_available else " or ".join(decoder.missing_dependencies)


def found_syntax(stated: str, head: bytes, length: int, frame_bytes: int, frames: int) -> str | None:
    """The transfer syntax that PixelData is in by its first bytes; None where it is not `stated` and is not known.

    length: as the element states it.  frame_bytes: of one frame, uncompressed.
    """
    is_encapsulated, whole = head[:4] == ITEM, frame_bytes * frames
    if stated in NATIVE:
        if length != UNDEFINED and (length >= whole or not is_encapsulated):
            return stated
    elif not is_encapsulated:
        return EXPLICIT if whole <= length <= whole + 1 else stated if len(head) < 8 else None
    elif not any(stated in family for family in FAMILIES):
        return stated
    at = 8 + int.from_bytes(head[4:8], "little")  # behind the basic offset table
    size, frame = int.from_bytes(head[at + 4 : at + 8], "little"), head[at + 8 :]
    if family := _family(frame):
        return stated if stated in family else family[0]
    if stated in NATIVE:
        return UNCOMPRESSED if frame_bytes <= size <= frame_bytes + 1 else None
    return stated


def _family(frame: bytes) -> tuple[str, ...]:
    try:
        if stated := frame_header(frame):
            return stated.family
    except ValueError:
        return ()
    segments, first = struct.unpack_from("<2L", frame + bytes(8))  # PS3.5 G.5
    return (RLE,) if 1 <= segments <= 15 and first == 64 else ()


def decode(
    stream: Any, header: Any, frames: list[int], syntax: str, pixel_vr: str = ""
) -> Generator[np.ndarray, None, None]:
    """Decode frames, one at a time: stored values (H, W), of color (H, W, 3) in RGB.

    stream: at the first byte of PixelData's value.
    frames: by their numbers in the file, from 0.
    syntax: that they are in.
    """
    if not frames:  # pydicom would take an empty list for all
        return
    high_bit = _HighBit.of(header) if syntax in CELLS else None
    # Bits above BitsStored are cleared where they may be an embedded overlay, else kept: BitsStored lies.
    clear = high_bit is None and any((group, 0x0102) in header and header[group, 0x0102].value for group in OVERLAYS)
    options = {
        name: value for name, value in pydicom.pixels.utils.as_pixel_options(header).items() if value is not None
    }
    missing = {"samples_per_pixel": 1, "pixel_representation": 0, "planar_configuration": 0}  # and what is meant
    options = {**missing, **options, "number_of_frames": num_frames(header), "correct_unused_bits": clear}
    is_gray = options["samples_per_pixel"] == 1
    if is_gray and options["bits_stored"] <= 8 and syntax in LOSSLESS_JPEG:
        options["bits_allocated"] = 8  # a stream of one byte a value, also where BitsAllocated is 16
    options |= {"pixel_keyword": "PixelData", "raw": is_gray}
    for frame in _decoded(stream, frames, syntax, options, pixel_vr):
        yield frame if high_bit is None else high_bit.values(frame)


def _decoded(
    stream: Any, frames: list[int], syntax: str, options: dict[str, Any], pixel_vr: str
) -> Generator[np.ndarray, None, None]:
    def encoded(index: int) -> bytes:
        which = {"number_of_frames": options["number_of_frames"], "extended_offsets": options.get("extended_offsets")}
        return pydicom.encaps.get_frame(stream, index, **which)

    if syntax in (UNCOMPRESSED, DEFLATED):
        native = pydicom.pixels.get_decoder(EXPLICIT)
        bits = options["rows"] * options["columns"] * options["samples_per_pixel"] * options["bits_allocated"]
        for index in frames:
            content = encoded(index)
            if syntax == DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, -(-bits // 8))
            alone = options | {"number_of_frames": 1, "transfer_syntax_uid": pydicom.uid.UID(EXPLICIT)}
            yield native.as_array(io.BytesIO(content), index=0, **alone)[0]
        return
    is_12_bit = syntax in DCT_JPEG and _is_12_bit_jpeg(frame_header(encoded(frames[0])[:HEAD_BYTES]))
    if syntax in JPEG_XL or is_12_bit and not _pylibjpeg_is_here():
        read = _imagecodecs().jpegxl_decode if syntax in JPEG_XL else _imagecodecs().jpeg_decode
        for index in frames:
            frame = read(encoded(index))
            yield frame if options["pixel_representation"] == 0 else frame.view(f"i{frame.dtype.itemsize}")
        return
    options |= {"transfer_syntax_uid": pydicom.uid.UID(syntax)} | ({"pixel_vr": pixel_vr} if pixel_vr else {})
    decoder = pydicom.pixels.get_decoder(syntax)
    strict = ""  # reads what it objects to with no other, which would fill in what is damaged
    if syntax in JPEG_LS:
        strict = "pyjpegls"
    elif syntax in DCT_JPEG and not is_12_bit and (syntax == DCT_JPEG[1] or options["bits_stored"] == 8):
        strict = "pillow"
    options["decoding_plugin"] = strict if strict in decoder.available_plugins else ""
    for frame, _ in decoder.iter_array(stream, indices=frames, **options):
        yield frame


class _HighBit(NamedTuple):
    """Where the values stand in their cells, if not at the lower end (PS3.5-2013 8.1.1)."""

    allocated: int
    stored: int
    high: int

    @classmethod
    def of(cls, header: Any) -> "_HighBit | None":
        found = [int(number(header, name) or 0) for name in ("BitsAllocated", "BitsStored", "HighBit")]
        allocated, stored, high = found
        return cls(*found) if stored <= high < allocated else None

    def values(self, frame: np.ndarray) -> np.ndarray:
        """The values, shifted down; as they are where they stand at the lower end all the same."""
        frame = frame.astype(frame.dtype.newbyteorder("="), copy=False)
        half = 1 << self.stored - 1
        low, high = (-half, half) if frame.dtype.kind == "i" else (0, 2 * half)
        if (frame & (1 << self.high + 1 - self.stored) - 1).any() and frame.min() >= low and frame.max() < high:
            return frame
        return frame << self.allocated - 1 - self.high >> self.allocated - self.stored
