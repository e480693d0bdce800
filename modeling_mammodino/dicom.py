"""Volumes stored as one file a slice: DBT of older vendors, in CT or mammography objects, and CT and MR themselves."""
# MERGED: One DICOM file or data set: opened, refused with a reason where it cannot be used, decoded frame by frame.
# MERGED: DICOM in, gray images out: single mammograms and the slices of digital breast tomosynthesis (DBT) volumes.
#
# Order of the pixel steps (DICOM PS3.4 N.2): modality LUT -> padding set to air -> VOI LUT or window -> MONOCHROME1
# inversion. Nothing of a header leaves this file but the fields of `Mammogram`; identifiers leave as keyed hashes.
#

import hashlib
import hmac
import io
import logging
import math
import os
import re
import secrets
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .dicom_header import (
    FOR_PROCESSING,
    SECONDARY_CAPTURE,
    has_burned_in_annotation,
    identifier,
    is_of_stack,
    kind,
    laterality,
    num_frames,
    number,
    order_of_frames,
    pixel_spacing_mm,
    positions_mm,
    slice_spacing_mm,
    text,
    view,
)
from .dicom_pixels import HEAD_BYTES, MAX_TILES, frame_header, to_gray
from .image_io import DICOM_SUFFIXES, MAX_PIXELS, ImageFile, InvalidImageError, suffix

try:
    import pydicom
except ImportError:  # a checkpoint runs on ready tensors without pydicom
    pydicom = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

MAX_SIDE_PX = 32768
MAX_FRAMES = 4096  # a tomosynthesis volume has at most some hundred
MAX_INFLATED_BYTES = 1 << 29  # of a deflated data set
VENDORS = {
    "1.2.840.113619": "GE",
    "1.3.12.2.1107": "Siemens",
    "1.3.46.670589": "Philips",
    "1.2.392.200036.9125": "Fuji",
}
LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")


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
        if frames > MAX_FRAMES:
            raise self.refuse(f"NumberOfFrames is over {MAX_FRAMES}", "check the header")
        return frames

    def refuse(self, problem: str, remedy: str) -> InvalidImageError:
        return InvalidImageError(self.name, f"{problem}; {remedy}")

    def warn_once(self, about: str, message: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            logger.warning("%s: %s: %s", self.name, about, message)


@contextmanager
def boundary(opened: Source, problem: str, remedy: str = "check or export the file again") -> Iterator[None]:
    """Whatever pydicom and its plugins raise becomes InvalidImageError; their messages may quote the header and stay out."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():  # both would quote it too
        warnings.simplefilter("ignore")
        try:
            yield
        except InvalidImageError:
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
        raise InvalidImageError("source", f"a {type(source).__name__}; give a path, an ImageFile or a pydicom Dataset")
    with boundary(opened, "not a readable DICOM file", "give a DICOM file, or an image by its own extension"):
        _check_inflated_size(opened)
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


def _check_inflated_size(opened: Source) -> None:
    """A deflated data set is inflated whole when it is opened: only where that fits."""
    is_open = hasattr(opened.pixels, "seek")
    with nullcontext(opened.pixels) if is_open else open(opened.pixels, "rb") as stream:
        stream.seek(0)
        start = stream.read(2048)
        if b"1.2.840.10008.1.2.1.99" not in start or start[132:136] != b"\x02\0\0\0":  # of the group length
            return
        stream.seek(144 + int.from_bytes(start[140:144], "little"))
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while piece := inflater.unconsumed_tail or stream.read(1 << 20):
            size += len(inflater.decompress(piece, 1 << 24))
            if size > MAX_INFLATED_BYTES:
                raise opened.refuse(f"the data set inflates to over {MAX_INFLATED_BYTES >> 20} MiB", "check the file")
            if inflater.eof:
                return


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
        raise opened.refuse(f"{_object_name(header)} without Rows or PhotometricInterpretation", "give an image object")
    photometric, samples = text(header, "PhotometricInterpretation"), number(header, "SamplesPerPixel")
    is_gray, is_color = photometric in ("MONOCHROME1", "MONOCHROME2"), photometric in COLOURS
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


def _object_name(header: Any) -> str:
    """Of the SOP class; by vendor where it is private."""
    sop = identifier(header, "SOPClassUID")
    if sop.startswith("1.2.840.10008."):
        name = pydicom.uid.UID(sop).name
        return "an object" if name == sop else f"{name}, an object"
    vendor = next((name for root, name in VENDORS.items() if sop.startswith(f"{root}.")), None)
    return f"a private object of {vendor or 'a vendor'}" if sop else "an object"


def _check_transfer_syntax(opened: Source) -> Any:
    syntax = getattr(opened.header, "file_meta", {}).get("TransferSyntaxUID")
    if not syntax:
        raise opened.refuse("no TransferSyntaxUID", "set file_meta.TransferSyntaxUID")
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError as error:
        name = syntax.name if re.fullmatch(r"1\.2\.840\.10008\.[0-9.]+", syntax) else "(not of DICOM)"
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
        after = stream.tell() + int.from_bytes(item[4:], "little")
        if after > end:
            raise truncated
        if fragments:
            _check_codestream(opened, stream.read(min(HEAD_BYTES, after - stream.tell())))
        stream.seek(after)
    if fragments < opened.num_frames:
        raise truncated


def _check_codestream(opened: Source, head: bytes) -> None:
    try:
        stated = frame_header(head)
    except ValueError as error:
        raise opened.refuse(f"PixelData is damaged: {error}", "fetch the file again") from error
    if stated is None:
        return
    header = opened.header
    wanted = tuple(int(number(header, name) or 1) for name in ("Rows", "Columns", "SamplesPerPixel"))
    if stated[:3] != wanted:
        said, meant = (f"{rows} x {columns} x {samples}" for rows, columns, samples in (stated[:3], wanted))
        raise opened.refuse(f"the codestream has {said} pixels, the header says {meant}", "check or export it again")
    if stated.tiles > MAX_TILES:
        raise opened.refuse(f"the codestream has {stated.tiles} tiles, at most {MAX_TILES} are read", "export it again")


def decode(opened: Source, frames: list[int]) -> Iterator[np.ndarray]:
    """Stored values (H, W), of color (H, W, 3) in RGB, of the given frames of the file, one at a time."""
    if not frames:  # pydicom would take an empty list for all
        return
    header = opened.header
    is_gray = number(header, "SamplesPerPixel") in (None, 1)
    syntax = header.file_meta.TransferSyntaxUID
    # Bits above BitsStored are cleared where they may be an embedded overlay, else kept: BitsStored lies.
    clear = bool((0x6000, 0x0102) in header and header[0x6000, 0x0102].value)
    options: dict[str, Any] = {"raw": is_gray, "correct_unused_bits": clear}
    if is_gray and (number(header, "BitsStored") or 16) <= 8 and syntax in LOSSLESS_JPEG:
        options["bits_allocated"] = 8  # a stream of one byte a value, also where BitsAllocated is 16
    if hasattr(opened.pixels, "seek"):
        opened.pixels.seek(0)
    decoded: Any = pydicom.pixels.iter_pixels(opened.pixels, indices=frames, **options)
    with closing(decoded):
        for _ in frames:
            with boundary(opened, f"PixelData cannot be decoded as {syntax.name}", "fetch or export the file again"):
                frame = next(decoded)
            yield frame


PROCESS_KEY = secrets.token_bytes(32)  # made at import, so that forked workers share it


@dataclass(frozen=True, eq=False)
class Mammogram:
    """One image: a 2-D mammogram or one slice of a volume.

    Attributes:
        pixels: (H, W), larger is denser. float32 in 0..1 where `apply_voi` found a VOI LUT or a window; otherwise the
            stored values, uint8 or uint16, or float32 where they are signed, wider, or rescaled to modality units.
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
        """An image without a header, such as a PNG: only its pixels and the keyed hash of its path are known."""
        identity = source.identity or source.name if isinstance(source, ImageFile) else str(source)
        volume_id = keyed_hash(identity, hash_key or PROCESS_KEY)
        return cls(pixels, "unknown", None, None, None, 0, 1, None, volume_id, None, None)


class _Options(NamedTuple):
    key: bytes
    steps: dict[str, bool]  # of to_gray


def keyed_hash(value: str, key: bytes) -> str:
    """HMAC-SHA256 of `value`, the first 16 bytes as 32 hexadecimal digits."""
    return hmac.new(key, value.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


def is_dicom(source: str | os.PathLike[str] | ImageFile) -> bool:
    """Whether the file has the DICM preamble, or is a data set without one under the name *.dcm or *.dicom."""
    try:
        if isinstance(source, ImageFile):
            source.stream.seek(0)
            start = source.stream.read(132)
        else:
            with open(source, "rb") as stream:
                start = stream.read(132)
        return start[128:] == b"DICM" or suffix(source) in DICOM_SUFFIXES and bool(open_header(source))
    except (OSError, InvalidImageError):
        return False


def count_slices(source: Any) -> int:
    """Number of frames, from the header only."""
    return open_header(source).num_frames


def frame_order(source: Any) -> tuple[int, ...]:
    """Frame numbers of the file (0-based) in order of position: `frame_order(f)[slice_index]` is the file's frame."""
    opened = open_header(source)
    with boundary(opened, "the header cannot be interpreted"):
        return tuple(order_of_frames(opened.header, opened.num_frames))


def read_mammogram(
    source: Any,
    *,
    hash_key: bytes | None = None,
    apply_modality_lut: bool = True,
    apply_voi: bool = True,
    invert_monochrome1: bool = True,
    allow_for_processing: bool = False,
) -> Mammogram:
    """The one image of a single-frame file.

    Args:
        source: a path, an ImageFile or a pydicom Dataset.
        hash_key: key of the hashes. None takes a random key made once per process: such hashes agree within the
            process and its forks and cannot be linked between runs.
        apply_modality_lut: rescale slope and intercept or modality LUT (PS3.3 C.11.1).
        apply_voi: VOI LUT or window (PS3.3 C.11.2); with it, or with the modality LUT, padding becomes air.
        invert_monochrome1: larger becomes brighter in MONOCHROME1 files too.
        allow_for_processing: accept raw (FOR PROCESSING) images.

    Raises:
        InvalidImageError: the file cannot be read as one gray image.
    """
    steps = {"modality": apply_modality_lut, "voi": apply_voi, "invert": invert_monochrome1}
    options = _Options(hash_key or PROCESS_KEY, steps)
    opened = open_checked(source, allow_for_processing)
    if (frames := opened.num_frames) > 1:
        raise opened.refuse(f"NumberOfFrames is {frames}", "read a volume with iter_slices")
    return next(_slices(opened, [0], options))


def iter_slices(
    source: Any,
    *,
    indices: Sequence[int] | None = None,
    hash_key: bytes | None = None,
    apply_modality_lut: bool = True,
    apply_voi: bool = True,
    invert_monochrome1: bool = True,
    allow_for_processing: bool = False,
) -> Iterator[Mammogram]:
    """The slices of a single- or multi-frame file, decoded one at a time.

    Slices count in order of ImagePositionPatient along the slice normal; without positions in order of StackID and
    InStackPositionNumber; without these in file order. `indices` picks slices by that count, in the order given.
    The header is read and checked at the call, each slice when it is asked for. Arguments as in `read_mammogram`.
    """
    steps = {"modality": apply_modality_lut, "voi": apply_voi, "invert": invert_monochrome1}
    options = _Options(hash_key or PROCESS_KEY, steps)
    opened = open_checked(source, allow_for_processing)
    frames = opened.num_frames
    wanted = list(range(frames)) if indices is None else [int(index) for index in indices]
    if outside := [index for index in wanted if not 0 <= index < frames]:
        raise opened.refuse(f"slice {outside[0]} of {frames} was asked for", f"use indices in 0..{frames - 1}")
    return _slices(opened, wanted, options)


def _slices(opened: Source, wanted: Sequence[int], options: _Options) -> Iterator[Mammogram]:
    header, frames = opened.header, opened.num_frames
    with boundary(opened, "the header cannot be interpreted"):
        order, positions = order_of_frames(header, frames), positions_mm(header, frames)
        shared = shared_fields(opened, frames, positions, options.key)
    decoded = decode(opened, [order[index] for index in wanted])
    for index, frame in zip(wanted, decoded, strict=True):
        place = order[index]
        with boundary(opened, "the gray values cannot be interpreted"):
            mammogram = Mammogram(
                pixels=to_gray(frame, header, place, **options.steps, warn=opened.warn_once),
                laterality=laterality(header, place),
                view=view(header, place),
                slice_index=index,
                slice_position_mm=None if positions is None else float(positions[place]),
                **shared,
            )
        yield mammogram


def instance_uid(opened: Source) -> str:
    """Of the SOP instance; where the header has none, the identity of the file."""
    return identifier(opened.header, "SOPInstanceUID") or opened.identity or opened.name


def shared_fields(opened: Source, frames: int, positions: np.ndarray | None, key: bytes) -> dict[str, Any]:
    """The fields of `Mammogram` that all slices of a file have in common."""
    header, what = opened.header, kind(opened.header, frames)
    uid = instance_uid(opened)
    series = identifier(header, "SeriesInstanceUID")
    if (what == "dbt" or what == "unknown" and is_of_stack(header)) and frames == 1 and series:
        uid = f"{series} {laterality(header)} {view(header)}"
    patient, study = identifier(header, "PatientID"), identifier(header, "StudyInstanceUID")
    return {
        "kind": what,
        "pixel_spacing_mm": pixel_spacing_mm(header),
        "num_slices": frames,
        "slice_spacing_mm": slice_spacing_mm(header, positions),
        "volume_id": keyed_hash(uid, key),
        "patient": keyed_hash(patient, key) if patient else None,
        "study": keyed_hash(study, key) if study else None,
        "has_burned_in_annotation": has_burned_in_annotation(header),
    }


class Instance(NamedTuple):
    """A file's place among others: keyed hashes, and what orders it."""

    sop_instance: str
    volume_id: str  # equal to sop_instance, or shared by the files of a volume
    num_slices: int  # in the file
    slice_position_mm: float | None
    instance_number: float | None

    @property
    def is_slice(self) -> bool:
        return self.volume_id != self.sop_instance


def read_instance(source: Any, hash_key: bytes, allow_for_processing: bool = False) -> Instance:
    """From the header alone. Raises InvalidImageError for all that the header is enough to refuse."""
    opened = open_header(source)
    check_header(opened, allow_for_processing)
    frames = opened.num_frames
    with boundary(opened, "the header cannot be interpreted"):
        positions = positions_mm(opened.header, 1) if frames == 1 else None
        return Instance(
            sop_instance=keyed_hash(instance_uid(opened), hash_key),
            volume_id=shared_fields(opened, frames, positions, hash_key)["volume_id"],
            num_slices=frames,
            slice_position_mm=None if positions is None else float(positions[0]),
            instance_number=number(opened.header, "InstanceNumber"),
        )


def order_of_files(instances: Sequence[Instance]) -> list[int]:
    """Places of the files of one volume in order of position, else of InstanceNumber, else as they come."""
    for name in ("slice_position_mm", "instance_number"):
        values = [getattr(each, name) for each in instances]
        if None not in values and len(set(values)) > 1:
            return np.argsort(values, kind="stable").tolist()
    return list(range(len(instances)))


def iter_series(sources: Sequence[Any], indices: Sequence[int] | None = None, **options: Any) -> Iterator[Mammogram]:
    """The slices of a volume of several files, given in order; options as in `read_mammogram`."""
    for index in range(len(sources)) if indices is None else indices:
        mammogram = read_mammogram(sources[index], **options)
        yield replace(mammogram, slice_index=index, num_slices=len(sources))
