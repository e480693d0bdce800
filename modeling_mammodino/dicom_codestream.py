"""What a compressed frame says of itself, read before a decoder takes memory by its word.

JPEG: ITU-T T.81 B.2.2, also lossless and JPEG-LS (T.87 C.2.2). JPEG 2000 and HTJ2K: T.800 A.5.1.
"""

import struct
from typing import NamedTuple

HEAD_BYTES = 1 << 16  # in which the frame header stands: behind tables, comments and application segments
MAX_TILES = 4096  # of JPEG 2000; a decoder keeps some kilobytes for each
_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_START_OF_CODESTREAM = b"\xff\x4f\xff\x51"


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
