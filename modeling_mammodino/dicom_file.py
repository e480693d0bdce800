"""One DICOM file or data set: opened, refused with a reason where it cannot be used, decoded frame by frame."""

import io
import logging
import math
import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .dicom_header import FOR_PROCESSING, SECONDARY_CAPTURE, identifier, num_frames, number, text
from .errors import ImageRefused
from .image_file import MAX_PIXELS, ImageFile

try:
    import pydicom
except ImportError:  # a checkpoint runs on ready tensors without pydicom
    pydicom = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

MAX_SIDE_PX = 32768
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "XYB")


class Source(NamedTuple):
    name: str  # for messages
    header: Any  # Dataset
    pixels: Any  # what pydicom decodes from: the path or stream, or the data set where it must be in memory
    warned: set[str]
    identity: str = ""  # hashed where the header has no UID; the name if empty

    @property
    def num_frames(self) -> int:
        frames = num_frames(self.header)
        if frames is None:
            raise self.refuse("NumberOfFrames is not a count", "check the header")
        return frames

    def refuse(self, problem: str, remedy: str) -> ImageRefused:
        return ImageRefused(self.name, f"{problem}; {remedy}")

    def warn_once(self, about: str, message: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            logger.warning("%s: %s: %s", self.name, about, message)


@contextmanager
def boundary(opened: Source, problem: str, remedy: str = "check or export the file again") -> Iterator[None]:
    """Whatever pydicom and its plugins raise becomes ImageRefused; their messages may quote the header and stay out."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():  # both would quote it too
        warnings.simplefilter("ignore")
        try:
            yield
        except ImageRefused:
            raise
        except Exception as error:
            raise opened.refuse(f"{problem} ({type(error).__name__})", remedy) from error


def open_header(source: Any) -> Source:
    """The header. The pixels stay in the file, except where only a data set in memory can be decoded."""
    if pydicom is None:
        raise ImportError("reading DICOM needs pydicom: pip install pydicom")
    if isinstance(source, pydicom.Dataset):
        return Source(str(getattr(source, "filename", None) or "DICOM data set"), source, source, set())
    if isinstance(source, ImageFile):
        opened = Source(source.name, None, source.stream, set(), source.identity)
    elif isinstance(source, (str, os.PathLike)):
        opened = Source(str(source), None, Path(source), set())
        if not opened.pixels.is_file():
            raise opened.refuse("no such file", "check the path")
    else:
        raise ImageRefused("source", f"a {type(source).__name__}; give a path, an ImageFile or a pydicom Dataset")
    with boundary(opened, "not a readable DICOM file", "give a DICOM file, or an image by its own extension"):
        header = _read(opened.pixels, stop_before_pixels=True)
        if "SOPClassUID" not in header and "Rows" not in header:
            raise opened.refuse("not a DICOM file", "give a DICOM file, or an image by its own extension")
        syntax = header.file_meta.get("TransferSyntaxUID")
        if not syntax or syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:  # pydicom decodes neither from the file
            header = _read(opened.pixels)
            if not syntax:
                implicit, little = header.original_encoding
                explicit = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
                header.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit
            return opened._replace(header=header, pixels=header)
    return opened._replace(header=header)


def _read(file: Any, **options: Any) -> Any:
    if hasattr(file, "seek"):
        file.seek(0)
    return pydicom.dcmread(file, force=True, **options)


def open_checked(source: Any, allow_for_processing: bool) -> Source:
    """`open_header`, then every refusal that needs no decoding."""
    opened = open_header(source)
    frame_bytes, syntax = check_header(opened, allow_for_processing)
    damaged = boundary(opened, "PixelData is damaged", "fetch the file again")
    with damaged, _pixel_data(opened, syntax) as (stream, length):
        _check_complete(opened, stream, length, None if syntax.is_encapsulated else frame_bytes)
    return opened


def check_header(opened: Source, allow_for_processing: bool) -> tuple[float, Any]:
    """Every refusal for which the header is enough. Bytes of one uncompressed frame, and the transfer syntax."""
    with boundary(opened, "the header cannot be interpreted"):
        _check_object(opened, allow_for_processing)
        return _check_geometry(opened), _check_transfer_syntax(opened)


def _check_object(opened: Source, allow_for_processing: bool) -> None:
    header = opened.header
    sop = identifier(header, "SOPClassUID")
    if (0x7E01, 0x1010) in header and (sop.startswith(SECONDARY_CAPTURE) or "Rows" not in header):
        raise opened.refuse(
            "Hologic secondary capture (SCO): the slices are in a private payload (7E01,1010)",
            "export it as Breast Tomosynthesis (BTO) from the workstation, or convert it with DicomScoToBto",
        )
    intent = text(header, "PresentationIntentType")
    if not allow_for_processing and (intent == "FOR PROCESSING" or sop in FOR_PROCESSING):
        raise opened.refuse(
            "PresentationIntentType is FOR PROCESSING (raw detector values)",
            "give the FOR PRESENTATION image, or pass allow_for_processing=True",
        )


def _check_geometry(opened: Source) -> float:
    """Bytes of one uncompressed frame."""
    header = opened.header
    if "Rows" not in header or "PhotometricInterpretation" not in header:
        raise opened.refuse("no Rows or PhotometricInterpretation, so no image", "give an image object with PixelData")
    photometric = text(header, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or number(header, "SamplesPerPixel") not in (None, 1):
        colour = photometric if photometric in COLOURS else "not MONOCHROME1 or MONOCHROME2"
        raise opened.refuse(f"PhotometricInterpretation is {colour}", "convert the picture to grey first")
    sizes = {}
    for keyword, limit in {"Rows": MAX_SIDE_PX, "Columns": MAX_SIDE_PX, "BitsAllocated": 64, "BitsStored": 64}.items():
        value = number(header, keyword)
        if value is None or not 1 <= value <= limit:
            raise opened.refuse(f"{keyword} is missing or not in 1..{limit}", "check the header")
        sizes[keyword] = value
    frame_bytes = sizes["Rows"] * sizes["Columns"] * sizes["BitsAllocated"] / 8
    if sizes["Rows"] * sizes["Columns"] > MAX_PIXELS:
        raise opened.refuse(
            f"Rows x Columns: a frame of over {MAX_PIXELS / 1e6:.0f} million pixels", "check the header"
        )
    return frame_bytes


def _check_transfer_syntax(opened: Source) -> Any:
    syntax = getattr(opened.header, "file_meta", {}).get("TransferSyntaxUID")
    if not syntax:
        raise opened.refuse("no TransferSyntaxUID", "set file_meta.TransferSyntaxUID")
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError as error:
        name = syntax.name if re.fullmatch(r"[0-9.]+", syntax) else "(no UID)"
        raise opened.refuse(
            f"transfer syntax {name} is not supported", "convert the file, or export it again"
        ) from error
    if not decoder.is_available:
        needs = " or ".join(decoder.missing_dependencies)
        raise opened.refuse(f"transfer syntax {syntax.name} needs a decoder", f"install one: {needs}")
    return syntax


@contextmanager
def _pixel_data(opened: Source, syntax: Any) -> Iterator[tuple[BinaryIO, int]]:
    """A stream at the first byte of PixelData, and the length in bytes that the element states."""
    missing = opened.refuse("no PixelData (7FE0,0010)", "give an image object; or the file is cut off, fetch it again")
    if opened.pixels is opened.header:
        if "PixelData" not in opened.header:
            raise missing
        yield io.BytesIO(opened.header.PixelData), len(opened.header.PixelData)
        return
    is_open = hasattr(opened.pixels, "seek")
    with nullcontext(opened.pixels) if is_open else open(opened.pixels, "rb") as stream:
        stream.seek(0)
        pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=["Rows"], force=True)
        endian = "<" if syntax.is_little_endian else ">"
        if stream.read(4) != struct.pack(f"{endian}HH", 0x7FE0, 0x0010):
            raise missing
        if not syntax.is_implicit_VR:
            stream.seek(4, io.SEEK_CUR)  # VR and two reserved bytes
        (length,) = struct.unpack(f"{endian}L", stream.read(4))
        yield stream, length


def _check_complete(opened: Source, stream: BinaryIO, length: int, frame_bytes: float | None) -> None:
    """PixelData holds the frames that the header promises; `frame_bytes` is None for encapsulated data (PS3.5 A.4)."""
    start = stream.tell()
    end = stream.seek(0, io.SEEK_END)
    truncated = opened.refuse("PixelData is truncated", "fetch the file again")
    if frame_bytes is not None:
        if min(length, end - start) < math.ceil(opened.num_frames * frame_bytes):
            raise truncated
        return
    stream.seek(start)
    fragments = -1  # the first item is the basic offset table
    while len(item := stream.read(8)) == 8 and item[:4] == b"\xfe\xff\x00\xe0":
        fragments += 1
        if stream.seek(int.from_bytes(item[4:], "little"), io.SEEK_CUR) > end:
            raise truncated
    if fragments < opened.num_frames:
        raise truncated


def decode(opened: Source, frames: list[int]) -> Iterator[np.ndarray]:
    """Stored values (H, W) of the given frames of the file, one at a time."""
    if not frames:  # pydicom would take an empty list for all
        return
    header = opened.header
    # Bits above BitsStored are cleared where they may be a sign or an embedded overlay, else kept: BitsStored lies.
    overlay = (0x6000, 0x0102) in header and header[0x6000, 0x0102].value
    clear = bool(number(header, "PixelRepresentation") or overlay)
    if hasattr(opened.pixels, "seek"):
        opened.pixels.seek(0)
    decoded: Any = pydicom.pixels.iter_pixels(opened.pixels, indices=frames, raw=True, correct_unused_bits=clear)
    syntax = header.file_meta.TransferSyntaxUID.name
    with closing(decoded):
        for _ in frames:
            with boundary(opened, f"PixelData cannot be decoded as {syntax}", "fetch or export the file again"):
                frame = next(decoded)
            yield frame
