"""DICOM in, grey pictures out: single mammograms and the slices of digital breast tomosynthesis (DBT) volumes.

Order of the pixel steps (DICOM PS3.4 N.2): modality LUT -> padding set to air -> VOI LUT or window -> MONOCHROME1
inversion. Nothing of a header leaves this file but the fields of `Mammogram`; identifiers leave as keyed hashes.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .dicom_file import Source, boundary, decode, open_checked, open_header
from .dicom_grey import to_grey
from .dicom_header import (
    has_burned_in_annotation,
    identifier,
    is_of_stack,
    kind,
    laterality,
    order_of_frames,
    pixel_spacing_mm,
    positions_mm,
    slice_spacing_mm,
    view,
)
from .errors import ImageRefused
from .image_file import DICOM_SUFFIXES, ImageFile, suffix

PROCESS_KEY = secrets.token_bytes(32)  # made at import, so that forked workers share it


@dataclass(frozen=True, eq=False)
class Mammogram:
    """One picture: a 2-D mammogram or one slice of a volume.

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
    def from_picture(cls, source: Any, pixels: np.ndarray, hash_key: bytes | None = None) -> "Mammogram":
        """A picture without a header, such as a PNG: only its pixels and the keyed hash of its path are known."""
        identity = source.identity or source.name if isinstance(source, ImageFile) else str(source)
        volume_id = keyed_hash(identity, hash_key or PROCESS_KEY)
        return cls(pixels, "unknown", None, None, None, 0, 1, None, volume_id, None, None)


class _Options(NamedTuple):
    key: bytes
    steps: dict[str, bool]  # of to_grey


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
    except (OSError, ImageRefused):
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
    """The one picture of a single-frame file.

    Args:
        source: a path, an ImageFile or a pydicom Dataset.
        hash_key: key of the hashes. None takes a random key made once per process: such hashes agree within the
            process and its forks and cannot be linked between runs.
        apply_modality_lut: rescale slope and intercept or modality LUT (PS3.3 C.11.1).
        apply_voi: VOI LUT or window (PS3.3 C.11.2); with it, or with the modality LUT, padding becomes air.
        invert_monochrome1: larger becomes brighter in MONOCHROME1 files too.
        allow_for_processing: accept raw (FOR PROCESSING) images.

    Raises:
        ImageRefused: the file cannot be read as one grey picture.
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
        with boundary(opened, "the grey values cannot be interpreted"):
            mammogram = Mammogram(
                pixels=to_grey(frame, header, place, **options.steps, warn=opened.warn_once),
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
