"""What a DICOM header says of a mammogram: kind, side, view, spacing, order of slices. Plain values only.

Every function takes a pydicom Dataset. An optional element that is missing or malformed counts as absent. These facts
are the allow-list: nothing else of a header reaches a corpus.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

_SOP = "1.2.840.10008.5.1.4.1.1."
SECONDARY_CAPTURE = _SOP + "7"  # and its multi-frame variants, 7.1 to 7.4
FOR_PROCESSING = (_SOP + "1.2.1", _SOP + "13.1.5")  # digital mammography, breast projection
_MAMMOGRAPHY = (_SOP + "1.2", _SOP + "1.2.1")
_PROJECTION = (_SOP + "13.1.4", _SOP + "13.1.5")
TOMOSYNTHESIS = _SOP + "13.1.3"
_STACK = (_SOP + "2", _SOP + "4")  # CT, MR
_CT = (_SOP + "2", _SOP + "2.1")  # early DBT was stored as CT
_DETECTOR_SPACINGS = ("ImagerPixelSpacing", "NominalScannedPixelSpacing")  # of the detector, of the film scanner
_CONTRAST = re.compile(r"SUBTRACTION|RECOMBINED|HIGH_ENERGY")  # iodine, not tissue: PS3.3 table C.8-74, and GE's word
_SYNTHETIC_2D = re.compile(r"GENERATED_?2D|TOMO_?2D|SYNTHETIC|[CS]_?VIEW|INTELLIGENT_?2D|INSIGHT_?2D|V_?PREVIEW")

# Views: meanings, SCT and SRT codes of PS3.16 CID 4014 (AT: CID 4015), in letters and digits only.
_VIEWS = {
    "CC": "craniocaudal 399162004 r10242",
    "MLO": "mediolateraloblique 399368009 r10226",
    "ML": "mediolateral 399260004 r10224",
    "LM": "lateromedial 399352003 r10228",
    "LMO": "lateromedialoblique 399099002 r10230",
    "XCC": "craniocaudalexaggerated 399265009",
    "XCCL": "craniocaudalexaggeratedlaterally 399192008 r1024a yx1770",
    "XCCM": "craniocaudalexaggeratedmedially 399101009 r1024b yx1771",
    "FB": "caudocranialfrombelow caudocranial 399196006 r10244",
    "SIO": "superolateraltoinferomedialoblique 399188001 r102d0",
    "ISO": "inferomedialtosuperolateraloblique 441555000 r40aaa",
    "AT": "axillarytail 399011000 r102d1",
}
_VIEW_OF = {alias: view for view, aliases in _VIEWS.items() for alias in (view.lower(), *aliases.split())}
# Sides: ImageLaterality's terms, meanings, SCT and SRT codes of PS3.16 CID 244, in letters and digits only.
_SIDE_OF = {"l": "L", "left": "L", "7771000": "L", "ga101": "L", "r": "R", "right": "R", "24028007": "R", "ga100": "R"}

# pydicom converts an element when it is first read, and raises what its converters raise.
_MALFORMED = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, NotImplementedError)


def vector(dataset: Any, keyword: str) -> np.ndarray | None:
    """All values of a numeric element, float64, or None."""
    try:
        values = np.atleast_1d(np.asarray(dataset.get(keyword), dtype=np.float64))
    except _MALFORMED:
        return None
    return values if values.size and np.isfinite(values).all() else None


def number(dataset: Any, keyword: str) -> float | None:
    """The first value of a numeric element, also where those behind it are malformed."""
    value: Any
    try:
        value = dataset.get(keyword)
    except _MALFORMED:
        value, *others = identifier(dataset, keyword).split("\\")
        value = value if others else None
    try:
        is_one = isinstance(value, str) or not isinstance(value, Iterable)
        first = float(value if is_one else next(iter(value)))
    except (*_MALFORMED, StopIteration):
        return None
    return first if math.isfinite(first) else None


def text(dataset: Any, keyword: str) -> str:
    """A code string in upper case; all values, with backslashes between; empty where there is none."""
    try:
        value = dataset.get(keyword)
    except _MALFORMED:
        return ""
    if value is None:
        return ""
    return (value if isinstance(value, str) else "\\".join(map(str, value))).strip(" \0").upper()


def identifier(dataset: Any, keyword: str) -> str:
    """An element as stored, byte for byte. Unconverted, because pydicom's validation quotes values in its warnings."""
    if keyword not in dataset:
        return ""
    value = dataset.get_item(keyword).value
    if not isinstance(value, bytes):  # converted when it was looked at, or never stored
        value = "" if value is None else value if isinstance(value, str) else "\\".join(map(str, np.atleast_1d(value)))
        if not value.isascii():
            value = value.encode(_encoding(dataset), "replace")
    return (value.decode("latin-1") if isinstance(value, bytes) else value).strip(" \0")


def _encoding(dataset: Any) -> str:
    """Python's name of the first SpecificCharacterSet."""
    import pydicom  # here at the latest: there is a data set

    names = text(dataset, "SpecificCharacterSet").split("\\")
    return pydicom.charset.python_encoding.get(names[0], "utf-8")


def scopes(dataset: Any, frame: int, sequence: str) -> Iterator[Any]:
    """Where a value of a frame may stand: per-frame functional group, shared one (PS3.3 C.7.6.16), top level."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*per_frame[frame : frame + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]):
        yield from (group.get(sequence) or [])[:1]
    yield dataset


def _number_of(dataset: Any, frame: int, sequence: str, keyword: str) -> float | None:
    found = (number(scope, keyword) for scope in scopes(dataset, frame, sequence))
    return next((value for value in found if value is not None), None)


def _vector_of(dataset: Any, frame: int, sequence: str, keyword: str, size: int) -> np.ndarray | None:
    found = (vector(scope, keyword) for scope in scopes(dataset, frame, sequence))
    return next((value for value in found if value is not None and value.size == size), None)


def num_frames(dataset: Any) -> int | None:
    """NumberOfFrames, 1 where it is absent, empty or 0; None where it is no count."""
    if not identifier(dataset, "NumberOfFrames"):
        return 1
    frames = number(dataset, "NumberOfFrames")
    return max(1, int(frames)) if frames is not None and frames >= 0 else None


def kind(dataset: Any, frames: int) -> str:
    """ "ffdm", "synthetic_2d", "dbt" or "unknown", from SOP class, Modality, PositionerType and ImageType."""
    sop, modality = identifier(dataset, "SOPClassUID"), text(dataset, "Modality")
    image_type = re.sub(r"[^A-Z0-9\\]", "_", text(dataset, "ImageType"))
    mammography = modality == "MG" or text(dataset, "PositionerType").startswith("MAMMO")  # no breast CT has either
    breast = sop in _MAMMOGRAPHY or sop == TOMOSYNTHESIS or mammography
    if sop in _MAMMOGRAPHY and _CONTRAST.search(image_type):
        return "unknown"
    if breast and frames == 1:
        volume_rendered = sop in _MAMMOGRAPHY and "VOLUME" in image_type
        if volume_rendered or _SYNTHETIC_2D.search(image_type):
            return "synthetic_2d"
    if sop == TOMOSYNTHESIS:
        return "dbt"
    if mammography and sop not in _PROJECTION and (frames > 1 or sop in _CT):
        return "dbt"
    return "ffdm" if sop in _MAMMOGRAPHY else "unknown"


def series_identity(dataset: Any, frames: int) -> str:
    """What the files of one volume share where each holds one slice (early DBT, CT, MR); else empty."""
    what, series = kind(dataset, frames), identifier(dataset, "SeriesInstanceUID")
    is_of_stack = what == "dbt" or what == "unknown" and identifier(dataset, "SOPClassUID") in _STACK
    return f"{series} {laterality(dataset)} {view(dataset)}" if is_of_stack and frames == 1 and series else ""


def laterality(dataset: Any, frame: int = 0) -> str | None:
    """ "L", "R", or None for both, unpaired and unknown.

    From ImageLaterality, FrameLaterality or Laterality; where none of them has a value, from the modifier of the
    anatomic region, or a letter before the view, as in LCC. PatientOrientation does not tell: a right breast turned by
    half a turn has that of a left one.
    """
    anatomy = list(scopes(dataset, frame, "FrameAnatomySequence"))
    stated = (text(dataset, "ImageLaterality"), *(text(scope, "FrameLaterality") for scope in anatomy))
    for side in (*stated, text(dataset, "Laterality")):
        if side:
            return _SIDE_OF.get(_plain(side))
    for scope in anatomy:
        region = _first(scope, "AnatomicRegionSequence")
        code = _first(region, "AnatomicRegionModifierSequence")
        for words in (text(code, "CodeValue"), text(code, "CodeMeaning")):
            if found := _SIDE_OF.get(_plain(words)):
                return found
    return _side_and_view(anatomy)[0]


def view(dataset: Any, frame: int = 0) -> str | None:
    """A view name of CID 4014 from ViewPosition or ViewCodeSequence, without modifiers such as magnification."""
    return _side_and_view(list(scopes(dataset, frame, "FrameAnatomySequence")))[1]


def _side_and_view(anatomy: list[Any]) -> tuple[str | None, str | None]:
    """The first view found, and the side where a letter before it says so."""
    for scope in anatomy:
        code = _first(scope, "ViewCodeSequence")
        for words in (text(scope, "ViewPosition"), text(code, "CodeValue"), text(code, "CodeMeaning")):
            name = _plain(words)
            if found := _VIEW_OF.get(name):
                return None, found
            if name[:1] in ("l", "r") and (found := _VIEW_OF.get(name[1:])):
                return name[0].upper(), found
    return None, None


def _plain(words: str) -> str:
    return re.sub(r"[^a-z0-9]", "", words.lower())


def _first(dataset: Any, sequence: str) -> Any:
    """The first item of a sequence, or an empty one."""
    return (dataset.get(sequence) or [{}])[0]


def has_burned_in_annotation(dataset: Any) -> bool:
    """Whether the header says so; most say nothing, and some say NO where there is."""
    return text(dataset, "BurnedInAnnotation") == "YES" or text(dataset, "RecognizableVisualFeatures") == "YES"


def pixel_spacing_mm(dataset: Any) -> float | None:
    """Row spacing: PixelSpacing (functional groups, then top level), else that of the detector or the film scanner."""
    found = _number_of(dataset, 0, "PixelMeasuresSequence", "PixelSpacing")
    for keyword in _DETECTOR_SPACINGS:
        found = found or number(dataset, keyword)
    return found if found and found > 0 else None


def pixel_aspect(dataset: Any) -> float:
    """Height of a pixel by its width, 1 where the header has neither spacing nor PixelAspectRatio."""
    spacing = _vector_of(dataset, 0, "PixelMeasuresSequence", "PixelSpacing", 2)
    for sides in (spacing, *(vector(dataset, keyword) for keyword in (*_DETECTOR_SPACINGS, "PixelAspectRatio"))):
        if sides is not None and sides.size == 2 and sides.min() > 0:
            return float(sides[0] / sides[1])
    return 1.0


def positions_mm(dataset: Any, frames: int) -> np.ndarray | None:
    """(frames,) ImagePositionPatient along the slice normal; None where frames lack it or do not differ in it."""
    axes = _vector_of(dataset, 0, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    corners = [_vector_of(dataset, i, "PlanePositionSequence", "ImagePositionPatient", 3) for i in range(frames)]
    if axes is None or any(corner is None for corner in corners):
        return None
    normal = np.cross(axes[:3], axes[3:])
    length = float(np.linalg.norm(normal))
    if not length > 0.5:  # the axes are unit vectors at a right angle, or meaningless
        return None
    along = np.stack([corner for corner in corners if corner is not None]) @ (normal / length)  # (frames,)
    return along if frames == 1 or np.ptp(along) > 1e-6 else None


def order_of_frames(dataset: Any, frames: int, positions: np.ndarray | None) -> list[int]:
    """Frame numbers in order of position, else of StackID and InStackPositionNumber, else as in the file.

    Stacks at the same positions come one behind another, in order of StackID (PS3.3 C.7.6.16.2.2.4).
    """
    if positions is not None and len(np.unique(positions.round(2))) == frames:
        return np.argsort(positions, kind="stable").tolist()
    contents = [next(scopes(dataset, i, "FrameContentSequence")) for i in range(frames)]
    stacks = [text(content, "StackID") for content in contents]
    if positions is not None:
        return sorted(range(frames), key=lambda i: (len(stacks[i]), stacks[i], positions[i]))
    places = [number(content, "InStackPositionNumber") for content in contents]
    if any(place is None for place in places):
        return list(range(frames))
    return sorted(range(frames), key=lambda i: (len(stacks[i]), stacks[i], places[i]))


def slice_spacing_mm(dataset: Any, positions: np.ndarray | None) -> float | None:
    """SpacingBetweenSlices, else the median step of the positions, else SliceThickness."""
    spacing = _number_of(dataset, 0, "PixelMeasuresSequence", "SpacingBetweenSlices")
    if not spacing and positions is not None and len(positions) > 1:
        spacing = float(np.median(np.diff(np.unique(positions))))
    spacing = spacing or _number_of(dataset, 0, "PixelMeasuresSequence", "SliceThickness")
    return abs(spacing) if spacing and math.isfinite(spacing) else None
