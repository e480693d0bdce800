"""DICOM in, gray images out: mammograms and the slices of tomosynthesis (DBT), CT and MR volumes.

`open_dicom` parses a header once; what it returns is taken by every function here in place of the file. The pixels
stay in the file until they are asked for, frame by frame. What is read here of a header are the fields of `Mammogram`
and `Instance`, identifiers as keyed hashes. `DicomFile.header` holds all of it: the readers of labeled data sets
(dataset_scripts/) match UIDs and descriptions with their tables by it, and keep what those tables hold.
"""

import hashlib
import hmac
import io
import logging
import math
import os
import re
import secrets
import struct
import threading
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .dicom_frames import (
    BIG_ENDIAN,
    DEFLATED,
    DELIMITER,
    HEAD_BYTES,
    ITEM,
    NATIVE,
    RLE,
    UNCOMPRESSED,
    UNDEFINED,
    decode,
    end_of_item,
    fault_of_codestream,
    found_syntax,
    is_cut_off,
    missing_decoder,
    name_of,
    starts_frame,
)
from .dicom_header import (
    FOR_PROCESSING,
    SECONDARY_CAPTURE,
    TOMOSYNTHESIS,
    has_burned_in_annotation,
    identifier,
    kind,
    laterality,
    num_frames,
    number,
    order_of_frames,
    pixel_aspect,
    pixel_spacing_mm,
    positions_mm,
    series_identity,
    slice_spacing_mm,
    text,
    view,
)
from .dicom_pixels import TO_GRAY, GraySettings, StoredRange, needs_range, to_gray
from .image_io import DICOM_SUFFIXES, MAX_PIXELS, ImageFile, InvalidImageError, suffix

try:
    import pydicom
except ImportError:  # a checkpoint runs on ready tensors without pydicom
    pydicom = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

MAX_SIDE_PX = 32768
ASPECT_TOLERANCE = 0.02  # by which the sides of a pixel may differ unsaid
MAX_FRAMES = 4096  # a tomosynthesis volume has at most some hundred
MAX_INFLATED_BYTES = 1 << 29  # of a deflated data set
MAX_ELEMENT_BYTES = 1 << 24  # of one element that is read with the header: a private payload stays in the file
VENDORS = {
    "1.2.840.113619": "GE",
    "1.3.12.2.1107": "Siemens",
    "1.3.46.670589": "Philips",
    "1.2.392.200036.9125": "Fuji",
}
COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")
SAMPLED_SLICES = 5  # of a volume, evenly spaced: what is decided once for all slices is decided by these
PROCESS_KEY = secrets.token_bytes(32)  # made at import, so that forked workers share it
START_OF_DATA_SET = re.compile(rb"[\x02\x08]\0..([A-Z]{2}|..\0\0)", re.DOTALL)  # group 2 or 8, with a VR or a length
NOT_DICOM = ("not a readable DICOM file", "give a DICOM file, or an image by its own extension")
NO_GRAY = ("the gray values cannot be interpreted", "check or export the file again")
NO_HEADER = ("the header cannot be interpreted", "check or export the file again")


@dataclass(frozen=True, eq=False)
class DicomFile:
    """A DICOM file or data set whose header was parsed, by `open_dicom`."""

    name: str  # for messages
    header: Any  # pydicom Dataset
    stored: Path | BinaryIO | None = None  # where the pixels are; None where the header holds them
    pixels_at: int = 0  # first byte behind the header, of the element PixelData
    identity: str = ""  # hashed where the header has no UID; the name if empty
    warned: set[str] = field(default_factory=set)

    @cached_property
    def num_frames(self) -> int:
        """Raises InvalidImageError where NumberOfFrames is no count or absurd."""
        frames = num_frames(self.header)
        if frames is None:
            raise self.refuse("NumberOfFrames is not a count", "check the header")
        if frames > MAX_FRAMES:
            raise self.refuse(f"NumberOfFrames is over {MAX_FRAMES}", "check the header")
        return frames

    @cached_property
    def positions_mm(self) -> np.ndarray | None:
        """(frames,) along the slice normal, as in the file."""
        return positions_mm(self.header, self.num_frames)

    @cached_property
    def order(self) -> list[int]:
        """Frame numbers of the file (0-based) in order of position."""
        order, positions = order_of_frames(self.header, self.num_frames, self.positions_mm), self.positions_mm
        if positions is not None and (np.diff(positions[order]) < 0).any():
            self.warn_once("StackID", "several stacks at the same positions; taken one behind another")
        return order

    @cached_property
    def instance_identity(self) -> str:
        """UID of the SOP instance; where the header has none, the identity of the file."""
        return identifier(self.header, "SOPInstanceUID") or self.identity or self.name

    @cached_property
    def volume_identity(self) -> str:
        """The same, or what the files of one volume share where each holds one of its slices."""
        return series_identity(self.header, self.num_frames) or self.instance_identity

    @cached_property
    def num_complete_frames(self) -> int:
        """`num_frames`, once it was checked, without decoding, that PixelData holds them."""
        frame_bytes = _check_geometry(self)
        _check_transfer_syntax(self)
        with self.refusing("PixelData is damaged", "fetch the file again"), self.pixel_data() as (stream, length, vr):
            _check_complete(self, stream, length, frame_bytes if self.syntax in NATIVE else None)
            if self.stored is not None:
                _read_behind(self.header, stream, implicit=not vr)
        return self.num_frames

    @cached_property
    def syntax(self) -> str:
        """The transfer syntax of the pixels: the one that the header states, or another that is found in them."""
        stated = str(self.header.file_meta.TransferSyntaxUID)
        remedy = "export it again with the right transfer syntax"
        with self.refusing("PixelData is damaged", "fetch the file again"), self.pixel_data() as (stream, length, _):
            frame_bytes = math.ceil(_check_geometry(self))
            found = found_syntax(stated, stream.read(HEAD_BYTES), length, frame_bytes, self.num_frames)
        if found is None:
            lies = "not encapsulated" if stated not in NATIVE else "encapsulated"
            raise self.refuse(f"TransferSyntaxUID is {name_of(stated)}, but PixelData is {lies}", remedy)
        if found != stated:
            said = f"says {name_of(stated)}, the pixels are in {name_of(found)}; read as they are"
            self.warn_once("TransferSyntaxUID", said)
        return found

    def refuse(self, problem: str, remedy: str) -> InvalidImageError:
        return InvalidImageError(self.name, f"{problem}; {remedy}")

    def refusing(self, problem: str, remedy: str) -> Any:
        return refusing(self.name, problem, remedy)

    def warn_once(self, about: str, message: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            logger.warning("%s: %s: %s", self.name, about, message)

    @contextmanager
    def pixel_data(self) -> Iterator[tuple[BinaryIO, int, str]]:
        """A stream at the first byte of the frames, and the length in bytes and the VR that the element states."""
        missing = ("no PixelData (7FE0,0010)", "give an image object; or the file is cut off, fetch it again")
        if self.stored is None:
            if "PixelData" not in self.header:
                raise self.refuse(*missing)
            element = self.header["PixelData"]
            yield io.BytesIO(element.value), len(element.value), element.VR
            return
        with _opened(self.stored) as stream:
            stream.seek(self.pixels_at)
            endian = ">" if self.header.file_meta.TransferSyntaxUID == BIG_ENDIAN else "<"
            if stream.read(4) != struct.pack(f"{endian}HH", 0x7FE0, 0x0010):
                raise self.refuse(*missing)
            field, vr = stream.read(4), ""
            if field[:2] in (b"OB", b"OW", b"UN"):  # explicit VR, whatever the header states; no even length reads so
                field, vr = stream.read(4), field[:2].decode()
            (length,) = struct.unpack(f"{endian}L", field)
            yield stream, length, vr

    def decode(self, frames: list[int]) -> Iterator[np.ndarray]:
        """Decode the given frames of the file one at a time: stored values (H, W), of color (H, W, 3) in RGB."""
        if number(self.header, "PixelRepresentation") is None:
            self.warn_once("PixelRepresentation", "missing; the pixels are taken as unsigned")
        with self.pixel_data() as (stream, _, vr):
            decoded = decode(stream, self.header, frames, self.syntax, vr)
            problem = f"PixelData cannot be decoded as {name_of(self.syntax)}"
            with closing(decoded):
                for _ in frames:
                    with self.refusing(problem, "fetch or export the file again"):
                        frame = next(decoded)
                    yield frame


class _Silence:
    """Keep pydicom's validation and warnings, which quote a header, from speaking while any thread reads one.

    Both are settings of the whole process: the first reader sets them, the last one puts them back.
    """

    filter = ("ignore", None, Warning, re.compile(r"(pydicom|pylibjpeg|openjpeg|libjpeg|jpeg_ls)\b"), 0)

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.lock, self.readers = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            self.readers += 1
            if self.readers == 1:
                self.validation = pydicom.config.disable_value_validation()
                self.validation.__enter__()
                warnings.filters.insert(0, self.filter)  # type: ignore[attr-defined]

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            self.readers -= 1
            if self.readers == 0:
                self.validation.__exit__(None, None, None)
                with suppress(ValueError):  # someone else has put other filters back
                    warnings.filters.remove(self.filter)  # type: ignore[attr-defined]


_silence = _Silence()
if hasattr(os, "register_at_fork"):  # a lock that another thread holds would stay held in the child
    os.register_at_fork(after_in_child=_silence.start)


@contextmanager
def refusing(name: str, problem: str, remedy: str) -> Iterator[None]:
    """Turn whatever pydicom and its plugins raise into InvalidImageError, without their messages, which may quote the
    header."""
    with _silence, np.errstate(all="ignore"):
        try:
            yield
        except InvalidImageError:
            raise
        except Exception as error:
            raise InvalidImageError(name, f"{problem} ({type(error).__name__}); {remedy}") from error


def _opened(stored: Path | BinaryIO) -> Any:
    """A context with the stream; one that was open already stays so."""
    return open(stored, "rb") if isinstance(stored, Path) else nullcontext(stored)


def open_dicom(source: Any) -> DicomFile:
    """Parse the header of a path, an ImageFile or a pydicom Dataset; one that is opened already is returned.

    The pixels stay in the file, except where only a data set in memory can be decoded. Raises InvalidImageError for
    what is no DICOM file, ImportError without pydicom.
    """
    if isinstance(source, DicomFile):
        return source
    if pydicom is None:
        raise ImportError("reading DICOM needs pydicom: pip install pydicom")
    if isinstance(source, pydicom.Dataset):
        return DicomFile(str(getattr(source, "filename", None) or "DICOM data set"), source)
    stored: Path | BinaryIO
    if isinstance(source, ImageFile):
        name, stored, identity = source.name, source.stream, source.identity
    elif isinstance(source, (str, os.PathLike)):
        name, stored, identity = str(source), Path(source), ""
        if not stored.is_file():
            raise InvalidImageError(name, "no such file; check the path")
    else:
        raise InvalidImageError("source", f"a {type(source).__name__}; give a path, an ImageFile or a pydicom Dataset")
    with refusing(name, *NOT_DICOM), _opened(stored) as stream:
        _check_inflated_size(name, stream)
        stream.seek(0)
        header = pydicom.dcmread(stream, stop_before_pixels=True, force=True, defer_size=MAX_ELEMENT_BYTES)
        if "SOPClassUID" not in header and "Rows" not in header:
            raise InvalidImageError(name, "; ".join(("not a DICOM file", NOT_DICOM[1])))
        syntax = header.file_meta.get("TransferSyntaxUID")
        if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
            stream.seek(0)  # its pixels cannot be found in the file
            return DicomFile(name, pydicom.dcmread(stream, force=True), identity=identity)
        if not syntax:
            implicit, little = header.original_encoding
            explicit = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
            header.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit
        return DicomFile(name, header, stored, stream.tell(), identity)


def _read_behind(header: Any, stream: BinaryIO, implicit: bool) -> None:
    """Add the elements behind PixelData, where the stream is, to those before it."""
    little = header.file_meta.TransferSyntaxUID != BIG_ENDIAN
    with suppress(Exception):  # it may be anything
        behind = pydicom.filereader.read_dataset(stream, implicit, little, defer_size=MAX_ELEMENT_BYTES)
        header.update({tag: behind.get_item(tag) for tag in behind.keys() if tag not in header})


def _check_inflated_size(name: str, stream: BinaryIO) -> None:
    """Refuse a deflated data set, which is inflated whole when it is opened, where that does not fit."""
    stream.seek(0)
    start = stream.read(2048)
    if b"1.2.840.10008.1.2.1.99" not in start or start[132:136] != b"\x02\0\0\0":  # of the group length
        return
    stream.seek(144 + int.from_bytes(start[140:144], "little"))
    inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while piece := inflater.unconsumed_tail or stream.read(1 << 20):
        size += len(inflater.decompress(piece, 1 << 24))
        if size > MAX_INFLATED_BYTES:
            raise InvalidImageError(
                name, f"the data set inflates to over {MAX_INFLATED_BYTES >> 20} MiB; check the file"
            )
        if inflater.eof:
            return


def is_dicom(source: str | os.PathLike[str] | ImageFile) -> bool:
    """Whether the file has the DICM preamble, or is a data set without one."""
    return _first_bytes(source)[128:] == b"DICM" or open_if_dicom(source) is not None


def open_if_dicom(source: str | os.PathLike[str] | ImageFile) -> DicomFile | None:
    """`open_dicom`, or None for a file that is no DICOM file, or no file; see `is_dicom`."""
    start = _first_bytes(source)
    if start[128:] == b"DICM":
        return open_dicom(source)
    try:
        return open_dicom(source) if suffix(source) in DICOM_SUFFIXES or START_OF_DATA_SET.match(start) else None
    except (OSError, InvalidImageError):
        return None


def _first_bytes(source: str | os.PathLike[str] | ImageFile) -> bytes:
    try:
        with _opened(source.stream if isinstance(source, ImageFile) else Path(source)) as stream:
            stream.seek(0)
            return stream.read(132)
    except OSError:
        return b""


def _check_header(opened: DicomFile, allow_for_processing: bool) -> None:
    """Refuse all for which the header is enough."""
    with opened.refusing(*NO_HEADER):
        _check_object(opened, allow_for_processing)
        _check_geometry(opened)
        _check_transfer_syntax(opened)


def _check_object(opened: DicomFile, allow_for_processing: bool) -> None:
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
            "give the FOR PRESENTATION image, or pass allow_for_processing=True to the reader or image processor",
        )


def _check_geometry(opened: DicomFile) -> float:
    """Bytes of one uncompressed frame."""
    header = opened.header
    if "Rows" not in header or "PhotometricInterpretation" not in header:
        raise opened.refuse(f"{_object_name(header)} without Rows or PhotometricInterpretation", "give an image object")
    if not is_image(header):  # a segmentation or a dose map has both
        raise opened.refuse(f"{_object_name(header)} that is no image", "give one")
    photometric, samples = text(header, "PhotometricInterpretation"), number(header, "SamplesPerPixel")
    is_gray, is_color = photometric in ("MONOCHROME1", "MONOCHROME2"), photometric in COLORS
    if not (is_gray and samples in (None, 1) or is_color and samples == 3):
        known = photometric if is_gray or is_color or photometric == "PALETTE COLOR" else "unknown"
        raise opened.refuse(
            f"PhotometricInterpretation is {known}, SamplesPerPixel {'absent' if samples is None else f'{samples:g}'}",
            "give MONOCHROME1 or MONOCHROME2 with one sample, or RGB or YBR with three",
        )
    sizes = {}
    for keyword, limit in {"Rows": MAX_SIDE_PX, "Columns": MAX_SIDE_PX, "BitsAllocated": 64, "BitsStored": 64}.items():
        value = number(header, keyword)
        if value is None or not 1 <= value <= limit:
            raise opened.refuse(f"{keyword} is missing or not in 1..{limit}", "check the header")
        sizes[keyword] = value
    if sizes["Rows"] * sizes["Columns"] > MAX_PIXELS:
        raise opened.refuse(
            f"Rows x Columns: a frame of over {MAX_PIXELS / 1e6:.0f} million pixels", "check the header"
        )
    channels = 2 if photometric == "YBR_FULL_422" else samples or 1
    return sizes["Rows"] * sizes["Columns"] * sizes["BitsAllocated"] * channels / 8


def is_image(header: Any) -> bool:
    """Whether the object may be an image: every SOP class of the standard that is one has the word in its name."""
    sop = identifier(header, "SOPClassUID")
    return sop not in pydicom.uid.UID_dictionary or "Image" in pydicom.uid.UID(sop).name


def _object_name(header: Any) -> str:
    """Of the SOP class; by vendor where it is private."""
    sop = identifier(header, "SOPClassUID")
    if sop.startswith("1.2.840.10008."):
        name = pydicom.uid.UID(sop).name
        return "an object" if name == sop else f"{name}, an object"
    vendor = next((name for root, name in VENDORS.items() if sop.startswith(f"{root}.")), None)
    return f"a private object of {vendor or 'a vendor'}" if sop else "an object"


def _check_transfer_syntax(opened: DicomFile) -> None:
    stated = getattr(opened.header, "file_meta", {}).get("TransferSyntaxUID")
    if not stated:
        raise opened.refuse("no TransferSyntaxUID", "set file_meta.TransferSyntaxUID")
    needs = missing_decoder(stated)
    if needs is None:
        name = name_of(stated) if re.fullmatch(r"1\.2\.840\.10008\.[0-9.]+", stated) else "(not of DICOM)"
        raise opened.refuse(f"transfer syntax {name} is not supported", "convert the file, or export it again")
    if needs := missing_decoder(opened.syntax):
        raise opened.refuse(f"transfer syntax {name_of(opened.syntax)} needs a decoder", f"install one: {needs}")


def _check_complete(opened: DicomFile, stream: BinaryIO, length: int, frame_bytes: float | None) -> None:
    """Refuse PixelData that lacks frames of the header; the stream is left behind it.

    `frame_bytes` is None where it is encapsulated (PS3.5 A.4).
    """
    start = stream.tell()
    end = stream.seek(0, io.SEEK_END)
    truncated = ("PixelData is truncated", "fetch the file again")
    if frame_bytes is not None:
        if min(length, end - start) < math.ceil(opened.num_frames * frame_bytes):
            raise opened.refuse(*truncated)
        if length != UNDEFINED:
            _check_no_more(opened, int(length // frame_bytes))
        stream.seek(start + length if length != UNDEFINED else end)
        return
    stream.seek(start)
    cut_off = ("PixelData is damaged: a frame ends before its end-of-image marker", "fetch the file again")
    fragments, frames = -1, 0  # the first item is the basic offset table
    first, last = b"", b""  # bytes of the frame that the fragments belong to
    while len(item := stream.read(8)) == 8 and item[:4] == ITEM:
        fragments += 1
        before = stream.tell()
        after = before + int.from_bytes(item[4:], "little")
        if after > end:
            raise opened.refuse(*truncated)
        if fragments and opened.syntax not in (UNCOMPRESSED, DEFLATED):  # which may start as any codestream
            head = stream.read(min(HEAD_BYTES, after - before))
            if opened.syntax != RLE and (fault := fault_of_codestream(head, opened.header)):
                raise opened.refuse(*fault)
            if starts_frame(head):
                if is_cut_off(first, last):
                    raise opened.refuse(*cut_off)
                frames, first, last = frames + 1, head[:2], b""
            last = last[-16:] + end_of_item(stream, before, after)
        stream.seek(after)
    if is_cut_off(first, last):
        raise opened.refuse(*cut_off)
    if fragments < opened.num_frames:
        raise opened.refuse(*truncated)
    _check_no_more(opened, frames)
    if item[:4] != DELIMITER:
        stream.seek(end)


def _check_no_more(opened: DicomFile, frames: int) -> None:
    """Say that PixelData holds more frames than the header states; refuse where a volume does not state them, which it
    must (PS3.3 C.7.6.6)."""
    if frames <= opened.num_frames:
        return
    header = opened.header
    if identifier(header, "SOPClassUID") == TOMOSYNTHESIS and not identifier(header, "NumberOfFrames"):
        raise opened.refuse(
            f"NumberOfFrames (0028,0008) is missing, and PixelData holds {frames}", "set it, or export the file again"
        )
    opened.warn_once("NumberOfFrames", f"{opened.num_frames}, but PixelData holds {frames}; what is behind is left out")


@dataclass(frozen=True, eq=False)
class Mammogram:
    """One image: a 2-D mammogram or one slice of a volume.

    Attributes:
        pixels: (H, W), larger is denser. float32 in 0..1 where a VOI LUT or a window was applied; otherwise the stored
            values, uint8 or uint16, or float32 where they are signed, wider, or rescaled to modality units.
        kind: "ffdm", "synthetic_2d", "dbt" or "unknown".
        laterality: "L", "R" or None.  view: "CC", "MLO", ... (a name of CID 4014) or None.
        pixel_spacing_mm: between rows; of the detector plane where the header has nothing nearer to the breast.
        slice_index: 0-based in order of position; 0 where each slice is a file of its own (see `slice_position_mm`).
        volume_id: keyed hash of the SOP instance UID; of series UID, laterality and view for a slice of DBT, CT or MR
            stored as a file of its own; of the path where the header has no UID.
        patient, study: keyed hashes of PatientID and StudyInstanceUID.
        slice_position_mm: along the slice normal, to order slices that are files of their own.
        has_burned_in_annotation: whether the header says so.
    """

    pixels: np.ndarray = field(repr=False)
    kind: str
    laterality: str | None
    view: str | None
    pixel_spacing_mm: float | None
    slice_index: int
    num_slices: int
    slice_spacing_mm: float | None
    volume_id: str
    patient: str | None
    study: str | None
    slice_position_mm: float | None = None
    has_burned_in_annotation: bool = False

    @classmethod
    def from_image(cls, source: Any, pixels: np.ndarray, hash_key: bytes | None = None) -> "Mammogram":
        """Make one without a header, as of a PNG: only its pixels and the keyed hash of its path are known."""
        identity = source.identity or source.name if isinstance(source, ImageFile) else str(source)
        volume_id = keyed_hash(identity, hash_key or PROCESS_KEY)
        return cls(pixels, "unknown", None, None, None, 0, 1, None, volume_id, None, None)


def keyed_hash(value: str, key: bytes) -> str:
    """HMAC-SHA256 of `value`, the first 16 bytes as 32 hexadecimal digits."""
    return hmac.new(key, value.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


def frame_order(source: Any) -> tuple[int, ...]:
    """Frame numbers of the file (0-based) in order of position: `frame_order(f)[slice_index]` is the file's frame."""
    opened = open_dicom(source)
    with opened.refusing(*NO_HEADER):
        return tuple(opened.order)


def read_mammogram(source: Any, settings: GraySettings = TO_GRAY, **options: Any) -> Mammogram:
    """Read the one image of a single-frame file. Arguments and errors as in `iter_slices`."""
    (mammogram,) = iter_series([source], settings, **options)
    return mammogram


def iter_slices(
    source: Any,
    settings: GraySettings = TO_GRAY,
    *,
    indices: Sequence[int] | None = None,
    hash_key: bytes | None = None,
    allow_for_processing: bool = False,
) -> Iterator[Mammogram]:
    """Read the slices of a single- or multi-frame file, decoded one at a time.

    Slices count in order of ImagePositionPatient along the slice normal, where stacks share positions stack by stack;
    without positions in order of StackID and InStackPositionNumber; without these in file order. The header is checked
    at the call, each slice when it is asked for.

    Args:
        source: a path, an ImageFile, a pydicom Dataset or a DicomFile.
        settings: the steps from stored values to gray.
        indices: picks slices by that count, in the order given; all by default.
        hash_key: key of the hashes. None takes a random key made once per process: such hashes agree within the
            process and its forks and cannot be linked between runs.
        allow_for_processing: accept raw (FOR PROCESSING) images.

    Raises:
        InvalidImageError: the file cannot be read as gray images.
    """
    opened = _checked(open_dicom(source), allow_for_processing)
    frames = opened.num_frames
    wanted = list(range(frames)) if indices is None else [int(index) for index in indices]
    if outside := [index for index in wanted if not 0 <= index < frames]:
        raise opened.refuse(f"slice {outside[0]} of {frames} was asked for", f"use indices in 0..{frames - 1}")
    return _slices(opened, wanted, settings, hash_key or PROCESS_KEY)


def _checked(opened: DicomFile, allow_for_processing: bool, is_single: bool = False) -> DicomFile:
    """Refuse all that can be refused before a pixel is decoded."""
    _check_header(opened, allow_for_processing)
    frames = opened.num_complete_frames
    if is_single and frames > 1:
        raise opened.refuse(f"NumberOfFrames is {frames}", "read a volume with iter_slices")
    return opened


def spread(num_slices: int, count: int) -> list[int]:
    """`count` slices evenly spaced through a volume, half a step from either end; all where it has no more."""
    if num_slices <= count:
        return list(range(num_slices))
    return ((np.arange(count) + 0.5) * num_slices / count).astype(int).tolist()


def _sampled(opened: DicomFile, settings: GraySettings) -> tuple[StoredRange | None, dict[int, np.ndarray]]:
    """The range of a volume by some of its slices, and these, decoded, by their place in order of position."""
    sampled = spread(opened.num_frames, SAMPLED_SLICES)
    frames: dict[int, np.ndarray] = {}
    with suppress(InvalidImageError):  # raised again where that slice is asked for
        for index, frame in zip(sampled, opened.decode([opened.order[each] for each in sampled]), strict=True):
            frames[index] = frame
    with opened.refusing(*NO_GRAY):
        return StoredRange.of(list(frames.values()), opened.header, settings) if frames else None, frames


def _slices(
    opened: DicomFile,
    wanted: list[int],
    settings: GraySettings,
    key: bytes,
    volume: StoredRange | None = None,
    frames_at: Mapping[int, np.ndarray] = MappingProxyType({}),
) -> Iterator[Mammogram]:
    """Read slices. The range of the volume that they belong to, and frames that were decoded, may be given."""
    header, frames = opened.header, opened.num_frames
    with opened.refusing(*NO_HEADER):
        order, positions = opened.order, opened.positions_mm
        patient, study = identifier(header, "PatientID"), identifier(header, "StudyInstanceUID")
        shared: dict[str, Any] = {
            "kind": kind(header, frames),
            "pixel_spacing_mm": pixel_spacing_mm(header),
            "num_slices": frames,
            "slice_spacing_mm": slice_spacing_mm(header, positions),
            "volume_id": keyed_hash(opened.volume_identity, key),
            "patient": keyed_hash(patient, key) if patient else None,
            "study": keyed_hash(study, key) if study else None,
            "has_burned_in_annotation": has_burned_in_annotation(header),
        }
        if abs(pixel_aspect(header) - 1) > ASPECT_TOLERANCE:
            opened.warn_once("PixelSpacing or PixelAspectRatio", "pixels are not square; taken as if they were")
    if volume is None and frames > 1 and needs_range(header, frames, settings):
        volume, frames_at = _sampled(opened, settings)
    others = opened.decode([order[index] for index in wanted if index not in frames_at])
    for index in wanted:
        # a copy, because it is overwritten, and may be wanted again
        frame, place = frames_at[index].copy() if index in frames_at else next(others), order[index]
        with opened.refusing(*NO_GRAY):
            mammogram = Mammogram(
                pixels=to_gray(frame, header, place, settings, opened.warn_once, volume),
                laterality=laterality(header, place),
                view=view(header, place),
                slice_index=index,
                slice_position_mm=None if positions is None else float(positions[place]),
                **shared,
            )
        yield mammogram


class Instance(NamedTuple):
    """A file's place among others: keyed hashes, and what orders it."""

    sop_instance: str
    volume_id: str  # equal to sop_instance, or shared by the files of a volume
    num_slices: int  # in the file
    slice_position_mm: float | None
    instance_number: float | None
    shape: str = ""  # rows x columns

    @property
    def is_slice(self) -> bool:
        return self.volume_id != self.sop_instance


def read_instance(source: Any, hash_key: bytes, allow_for_processing: bool = False) -> Instance:
    """Read a file's place from its header. Raises InvalidImageError for all that the header is enough to refuse."""
    opened = open_dicom(source)
    _check_header(opened, allow_for_processing)
    frames = opened.num_frames
    with opened.refusing(*NO_HEADER):
        positions = opened.positions_mm if frames == 1 else None
        return Instance(
            sop_instance=keyed_hash(opened.instance_identity, hash_key),
            volume_id=keyed_hash(opened.volume_identity, hash_key),
            num_slices=frames,
            slice_position_mm=None if positions is None else float(positions[0]),
            instance_number=number(opened.header, "InstanceNumber"),
            shape=f"{number(opened.header, 'Rows')} x {number(opened.header, 'Columns')}",
        )


def order_of_files(instances: Sequence[Instance]) -> list[int]:
    """Places of the files of one volume in order of position, else of InstanceNumber, else as they come."""
    for name in ("slice_position_mm", "instance_number"):
        values = [getattr(each, name) for each in instances]
        if None not in values and len(set(values)) > 1:
            return np.argsort(values, kind="stable").tolist()
    return list(range(len(instances)))


def group_files(instances: Sequence[Instance | None]) -> list[list[int]]:
    """Places of the files of each volume, in order of position; volumes in order of their first files.

    A file without an instance is one of its own. Copies of a slice belong to copies of the volume, files of another
    size, such as a scout, to another.
    """
    together: dict[Any, list[int]] = defaultdict(list)
    seen: Counter[Instance] = Counter()  # whole, for anonymizers give all slices one SOPInstanceUID
    for place, instance in enumerate(instances):
        if instance is None:
            together[place].append(place)
            continue
        together[instance.volume_id, instance.shape, seen[instance]].append(place)
        seen[instance] += 1
    volumes = []
    for places in together.values():
        for stack in split_stacks([each for place in places if (each := instances[place])]) or [[0]]:
            volumes.append([places[index] for index in stack])
    return volumes


def split_stacks(instances: Sequence[Instance]) -> list[list[int]]:
    """Places of the files of a series by stack, each in order of position.

    A series whose positions repeat holds several stacks, such as phases, echoes or contrasts: the n-th image of a
    position, by InstanceNumber, belongs to the n-th.
    """
    stacks: dict[int, list[int]] = defaultdict(list)
    positions = [None if each.slice_position_mm is None else round(each.slice_position_mm, 2) for each in instances]
    repeat = None not in positions and 1 < len(set(positions)) < len(positions)
    turn: Counter[float | None] = Counter()
    for place in sorted(range(len(instances)), key=lambda place: instances[place].instance_number or 0):
        stacks[turn[positions[place]]].append(place)
        turn[positions[place]] += repeat
    return [
        [places[index] for index in order_of_files([instances[place] for place in places])]
        for places in map(sorted, stacks.values())
    ]


def instance_of(source: Any, hash_key: bytes = PROCESS_KEY) -> Instance | None:
    """`read_instance` of what `open_dicom` takes, or None for a file that is no DICOM or that it refuses: who reads its
    pixels says why."""
    try:
        is_file = isinstance(source, (str, os.PathLike, ImageFile))
        opened = open_if_dicom(source) if is_file else open_dicom(source)
        return None if opened is None else read_instance(opened, hash_key)
    except (InvalidImageError, OSError):
        return None


def open_folder(folder: str | os.PathLike[str]) -> list[DicomFile]:
    """Open the files of a folder that holds one volume, a file a slice, in order of position.

    Files that are no DICOM are ignored, other folders not entered. Raises InvalidImageError where it holds none, or
    more than one volume.
    """
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file() and path.name.upper() != "DICOMDIR")
    files = [opened for path in paths if (opened := open_if_dicom(path))]
    if not files:
        raise InvalidImageError(folder, "a folder without DICOM files; give a file, or the folder of one volume")
    volumes = group_files([read_instance(file, PROCESS_KEY) for file in files])
    if len(volumes) > 1:
        raise InvalidImageError(
            folder, f"a folder of {len(volumes)} volumes or images; give the files, or the folder of one volume"
        )
    return [files[place] for place in volumes[0]]


def iter_series(
    sources: Sequence[Any],
    settings: GraySettings = TO_GRAY,
    indices: Sequence[int] | None = None,
    *,
    hash_key: bytes | None = None,
    allow_for_processing: bool = False,
) -> Iterator[Mammogram]:
    """Read the slices of a volume of several files, given in order; options as in `iter_slices`."""

    def opened(index: int) -> DicomFile:
        return _checked(open_dicom(sources[index]), allow_for_processing, is_single=True)

    frames, volume = {}, None
    for index in spread(len(sources), SAMPLED_SLICES) if len(sources) > 1 else ():
        with suppress(InvalidImageError):  # raised again where that slice is asked for
            each = opened(index)
            (frames[index],) = each.decode([0])
            with each.refusing(*NO_GRAY):
                ranges = StoredRange.of([frames[index]], each.header, settings)
            volume = volume.union(ranges) if volume else ranges
    shape: tuple[int, ...] = ()
    for index in range(len(sources)) if indices is None else indices:
        decoded = {0: frames[index]} if index in frames else {}
        each = opened(index)
        (mammogram,) = _slices(each, [0], settings, hash_key or PROCESS_KEY, volume, decoded)
        shape = shape or mammogram.pixels.shape
        if mammogram.pixels.shape != shape:
            height, width = mammogram.pixels.shape
            raise each.refuse(f"{height} x {width} pixels, unlike other slices of its series", "leave a scout out")
        yield replace(mammogram, slice_index=index, num_slices=len(sources))
