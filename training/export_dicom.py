"""Boxes, heat maps and breast masks as DICOM for viewers: structured reports and segmentations. Research use only.

    python -m training.export_dicom RUN FILES... --output FOLDER [--min_score 0.3] [--slice N]

FILES: DICOM files, or folders of them. RUN is the output_dir of a finished training.detect run: its boxes become
NAME.boxes.dcm, a measurement report (PS3.16 TID 1500). Or it is that of a training.finetune run, or an encoder, a
folder or Hub id: its heat maps become NAME.heat_maps.dcm, a fractional segmentation with a segment a map, and the
breast that it sees NAME.breast.dcm, a binary one (PS3.3 A.51). NAME is the path of the file below the folder given. A
file that cannot be used is left out, and so is one whose result would replace that of another image.

All of it lies in rows, columns and frames of the file as it is stored, not in the image that an encoder sees, and
refers to its SOP instance. **It carries the patient and study of the file, as viewers need it**, and names itself for
research use only. Needs the extra `clinical`.
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from pydicom.valuerep import DA, TM
from torch import nn

import modeling_mammodino
from modeling_mammodino.dicom import NO_HEADER, is_image, open_dicom, open_if_dicom, refusing
from modeling_mammodino.dicom_header import identifier, laterality, num_frames, number, scopes, vector
from modeling_mammodino.image_io import DICOM_SUFFIXES, InvalidImageError, suffix
from modeling_mammodino.tools.command import CommandParser, command_line, show_progress, user_model, user_path
from modeling_mammodino.tools.embed import find_device, weights_sha256
from modeling_mammodino.tools.features import find_files, paths_below
from modeling_mammodino.tools.files import atomic_file
from training.evaluation.backbones.registry import Backbone, load_backbone
from training.evaluation.detection.boxes import BoxedImage
from training.evaluation.detection.data import LesionImage, LesionImageRenderer
from training.evaluation.detection.detector import load_detector
from training.evaluation.detection.find_lesions import find_in_slices
from training.evaluation.finetuning.image_classifier import open_classifier
from training.evaluation.finetuning.multiple_instance import MultipleInstanceHead
from training.evaluation.heat_maps import HeatMap
from training.evaluation.run_settings import DetectionSettings
from training.evaluation.runs import MODEL_FOLDER, RESULT_FILE

from .heat_map import check_drawable, map_file, own_classifier
from .predict import open_run

try:
    import highdicom as hd
except ImportError:  # said where it is needed
    hd = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NOTICE = "RESEARCH USE ONLY"
SERIES_NUMBER = 900  # behind the images' own
TYPE_2 = (  # needed in what is written, may be empty
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
VALUES: dict[str, Callable[[str], Any]] = {  # what highdicom or who reads the result raises ValueError of
    "PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM, "PatientSex": ("F", "M", "O").index,
    "PatientSize": float, "PatientWeight": float,
}  # fmt: skip
PLACES = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")  # of a volume's frames
LESION, BREAST = Code("52988006", "SCT", "Lesion"), Code("76752008", "SCT", "Breast")
BREAST_MASK = (Code("123037004", "SCT", "Anatomical Structure"), BREAST)
HEAT_MAP = (  # not of a lesion: none of these maps has been validated to show one
    Code("309825002", "SCT", "Spatial and Relational Concept"), Code("HEATMAP", "99MAMMODINO", "Heat map, relative")
)  # fmt: skip
MAMMOGRAPHY = Code("71651007", "SCT", "Mammography")
CERTAINTY = Code("111012", "DCM", "Certainty of Finding")  # 0 to 100: the score, which is no probability of cancer
FAMILY = Code("123110", "DCM", "Artificial Intelligence")

Exporter = Callable[[Path, str], Iterator[Path]]  # of a file, and the path that its results begin with


@dataclass(frozen=True)
class Algorithm:
    """What made a result; `weights`: their SHA-256."""

    name: str
    weights: str

    @property
    def title(self) -> str:
        """Name and notice in at most 64 characters, as descriptions hold."""
        return f"{NOTICE}: {self.name}"[:64]

    @property
    def about(self) -> dict[str, Any]:
        """Arguments that both kinds of objects share."""
        version = modeling_mammodino.__version__
        return {
            "series_instance_uid": hd.UID(),
            "series_number": SERIES_NUMBER,
            "sop_instance_uid": hd.UID(),
            "instance_number": 1,
            "manufacturer": "MammoDINO (research)",
            "manufacturer_model_name": self.name[:64],
            "software_versions": version,
            "device_serial_number": self.weights[:16],
            "specific_character_set": None,  # `_save` sets the file's; highdicom does not know all
            "series_description": self.title,
        }


def source_header(file: str | Path) -> Dataset:
    """Return the header of a DICOM image, with what may be empty filled in, and blank what results carry but cannot be
    read. Raises InvalidImageError where there is no instance to refer to, ImportError without highdicom."""
    if hd is None:
        raise ImportError("structured reports and segmentations need highdicom: pip install -e '.[clinical]'")
    header, blank = open_dicom(file).header, []
    for keyword in ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"):
        if not header.get(keyword):
            raise InvalidImageError(str(file), f"has no {keyword}, to which a result could refer; export it again")
    with refusing(str(file), *NO_HEADER):
        for keyword, read in VALUES.items():
            if value := identifier(header, keyword).upper():
                try:
                    read(value)
                except ValueError:
                    blank.append(keyword)
                    value = ""
                setattr(header, keyword, value)
        for keyword in TYPE_2:
            if keyword not in header:
                setattr(header, keyword, "")
    if blank:
        logger.warning("%s: %s: not as DICOM writes it; left blank in what is written", file, ", ".join(blank))
    return header


def write_sr(
    path: Path, header: Dataset, boxes: np.ndarray, frames: np.ndarray, scores: np.ndarray, algorithm: Algorithm
) -> None:
    """Write boxes (n, 4), x0, y0, x1, y1 half-open in pixels of the source, as a measurement report, atomically.

    frames (n,): of the file, from 0.  scores (n,) from 0 to 1. Each box is a closed polyline in the coordinates of
    PS3.3 C.18.6, in which the upper left corner of the first pixel is 0, 0. Raises ValueError where there is none: a
    report without a finding could be read as a normal one.
    """
    if not len(boxes):
        raise ValueError(f"{path.name}: no box; a report needs one")
    _save(path, header, partial(_report, header, boxes, frames, scores, algorithm))


def _report(
    header: Dataset, boxes: np.ndarray, frames: np.ndarray, scores: np.ndarray, algorithm: Algorithm
) -> Dataset:
    side = {"L": Code("7771000", "SCT", "Left"), "R": Code("24028007", "SCT", "Right")}.get(laterality(header) or "")
    by = hd.sr.AlgorithmIdentification(
        name=algorithm.title, version=modeling_mammodino.__version__, parameters=[f"weights {algorithm.weights}"]
    )
    findings = []
    for index, (box, frame, score) in enumerate(zip(boxes.astype(float), frames.tolist(), scores, strict=True), 1):
        x0, y0, x1, y1 = box
        shown = [frame + 1] if (num_frames(header) or 1) > 1 else None
        findings.append(
            hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=hd.sr.TrackingIdentifier(hd.UID(), f"{algorithm.name} {index}"),
                referenced_region=hd.sr.ImageRegion(
                    hd.sr.GraphicTypeValues.POLYLINE,
                    np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]),
                    hd.sr.SourceImageForRegion(header.SOPClassUID, header.SOPInstanceUID, shown),
                ),
                finding_type=LESION,
                finding_sites=[hd.sr.FindingSite(BREAST, laterality=side)],
                algorithm_id=by,
                measurements=[hd.sr.Measurement(CERTAINTY, round(100 * float(score), 2), Code("%", "UCUM", "Percent"))],
            )
        )
    about = algorithm.about
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        hd.UID(), name=algorithm.title, manufacturer_name=about["manufacturer"], serial_number=algorithm.weights[:16]
    )
    described = None
    with suppress(Exception):  # asks for spacing and orientation, each SOP class for its own
        hd.sr.ImageLibrary([header])
        described = [header]
    report = hd.sr.MeasurementReport(
        hd.sr.ObservationContext(hd.sr.ObserverContext(hd.sr.CodedConcept("121007", "DCM", "Device"), device)),
        MAMMOGRAPHY,
        findings,
        referenced_images=described,
    )
    named = {name: about[name] for name in about if name not in ("software_versions", "device_serial_number")}
    return hd.sr.ComprehensiveSR([header], report[0], **named)


def write_seg(
    path: Path, header: Dataset, planes: np.ndarray, labels: Sequence[str], frame: int, algorithm: Algorithm
) -> None:
    """Write planes (S, H, W), as large as the source, as segments of a segmentation, atomically.

    bool: masks of the breast, binary. float32 from 0 to 1: maps, fractional in 255 steps.  labels: a name a segment.
    frame: of the file, from 0. Raises InvalidImageError where a volume does not say where its frames lie.
    """
    size = (header.Rows, header.Columns)
    if planes.shape[1:] != size or len(labels) != len(planes):
        raise ValueError(f"{path.name}: {len(labels)} labels of planes {planes.shape}; the source has {size}")
    _save(path, header, partial(_segmentation, path, header, planes, labels, frame, algorithm))


def _segmentation(
    path: Path, header: Dataset, planes: np.ndarray, labels: Sequence[str], frame: int, algorithm: Algorithm
) -> Dataset:
    is_mask, about = planes.dtype == bool, algorithm.about
    category, kind = BREAST_MASK if is_mask else HEAT_MAP
    by = hd.AlgorithmIdentificationSequence(
        algorithm.title, FAMILY, modeling_mammodino.__version__, parameters={"weights": algorithm.weights}
    )
    segments = [
        hd.seg.SegmentDescription(
            number, f"{NOTICE}: {label}"[:64], category, kind, hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, by
        )
        for number, label in enumerate(labels, 1)
    ]
    where: dict[str, Any] = {}
    if (count := num_frames(header) or 1) > 1:
        groups = header.get("PerFrameFunctionalGroupsSequence") or []
        found = {name: next(scopes(header, frame, name)) for name in PLACES}
        lacking = [name for name, each in found.items() if each is header or len(groups) != count]
        if lacking:
            raise InvalidImageError(path, f"no {', '.join(lacking)} of the {count} frames; give the file as it was")
        position = found.pop("PlanePositionSequence").ImagePositionPatient
        shared = Dataset()  # where highdicom looks for them; they may stand in the frames
        for name, each in found.items():
            setattr(shared, name, [each])
        header.SharedFunctionalGroupsSequence = [shared]
        where["plane_positions"] = [hd.PlanePositionSequence(hd.CoordinateSystemNames.PATIENT, position)]
    else:
        spacings = (vector(header, keyword) for keyword in ("PixelSpacing", "ImagerPixelSpacing"))
        if known := [each.tolist() for each in spacings if each is not None and each.size == 2 and each.min() > 0]:
            # a projection has no slices, but readers ask for a thickness: of the compressed breast, or else a unit
            where["pixel_measures"] = hd.PixelMeasuresSequence(known[0], number(header, "BodyPartThickness") or 1)
    stacked = np.moveaxis(planes, 0, -1)[None]  # (1, H, W, S)
    segmentation = hd.seg.Segmentation(
        [header],
        stacked.astype(np.uint8) if is_mask else stacked,
        "BINARY" if is_mask else "FRACTIONAL",
        segments,
        content_label="RESEARCH_ONLY",
        content_description=algorithm.title,
        transfer_syntax_uid=ExplicitVRLittleEndian if is_mask else RLELossless,
        omit_empty_frames=False,
        **where,
        **about,
    )
    if count == 1:
        segmentation.PatientOrientation = header.get("PatientOrientation")
    return segmentation


def _save(path: Path, header: Dataset, make: Callable[[], Dataset]) -> None:
    """Write what `make` returns. Raises InvalidImageError where it cannot be made of such a header, or `path` holds the
    result of another image."""
    if path.exists():
        former = open_dicom(path)
        with former.refusing(*NO_HEADER):
            of = {each.value for each in former.header.iterall() if each.keyword == "ReferencedSOPInstanceUID"}
        if header.SOPInstanceUID not in of:
            raise InvalidImageError(path, "belongs to another image; give another --output, or remove it first")
    content = io.BytesIO()
    with refusing(str(path), *NO_HEADER):
        dataset = make()
        if names := header.get("SpecificCharacterSet"):
            dataset.SpecificCharacterSet = names
        dataset.save_as(content, enforce_file_format=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.getvalue())


def on_source(values: np.ndarray, image: LesionImage) -> np.ndarray:
    """Return a map of patches (h, w) as large as the source, each pixel with the value of its patch; 0 outside."""
    patch = image.image.shape[0] // values.shape[0]
    scale_x, shift_x, scale_y, shift_y = image.placement
    centers = np.array(  # OpenCV counts from pixels' centers
        [
            [scale_x / patch, 0, (shift_x + scale_x / 2) / patch - 0.5],
            [0, scale_y / patch, (shift_y + scale_y / 2) / patch - 0.5],
        ]
    )
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(values.astype(np.float32), centers, image.source_shape[::-1], flags=flags)


def to_unit(heat_map: HeatMap) -> np.ndarray:
    """Return a map (h, w) from 0 to 1 of its own largest value: a signed one from 0 up, another from its least; 0 where
    there is no breast."""
    values = heat_map.values
    least = 0.0 if heat_map.is_signed else float(np.nanmin(values))
    most = max(float(np.nanmax(values)) - least, 1e-12)
    return np.nan_to_num(np.clip((values - least) / most, 0, 1))


def export_files(files: dict[Path, str], export: Exporter) -> list[str]:
    """Write the results of each file, given with the path that they begin with, and print theirs. Return why files were
    refused. Raises ValueError where all were."""
    refused = []
    for file, start in show_progress(files.items(), "export", unit="file", disable=None):
        try:
            for path in export(file, start):
                print(path)
        except ValueError as error:
            refused.append(str(error) if str(file) in str(error) else f"{file}: {error}")
            logger.warning("left out: %s", refused[-1])
    if len(refused) == len(files):
        raise ValueError(f"none of {len(files)} files can be used; the first: {refused[0]}")
    return refused


def boxes_exporter(run: Path, settings: DetectionSettings, min_score: float) -> Exporter:
    """Return what writes the boxes of at least `min_score` that a detector finds in a file, as a report."""
    detector: Any
    detector, processor = load_detector(run / MODEL_FOLDER)
    algorithm = Algorithm("MammoDINO lesion detector", weights_sha256(detector))
    detector.to(find_device("auto")).eval()
    renderer = LesionImageRenderer(processor)

    def export(file: Path, start: str) -> Iterator[Path]:
        header, path = source_header(file), Path(f"{start}.boxes.dcm")
        image = BoxedImage(str(file), "", str(file), np.empty((0, 4)), np.empty(0, int))
        slices = list(renderer(str(file), slices_per_volume=settings.test_slices_per_volume))
        found = find_in_slices(detector, image, slices, renderer, settings)
        kept = found.scores >= min_score
        if kept.any():
            write_sr(path, header, found.boxes[kept], found.slices[kept], found.scores[kept], algorithm)
            yield path
        else:
            logger.info("%s: no box of score %g or more; no report", file, min_score)

    return export


def maps_exporter(frame: int | None, backbone: Backbone, head: nn.Module | None, classes: Sequence[str]) -> Exporter:
    """Return what writes heat maps and breast mask of one frame of a file, by default the middle one."""
    weights = backbone.settings()["weights"]

    def export(file: Path, start: str) -> Iterator[Path]:
        header = source_header(file)
        image, maps = map_file(str(file), frame, backbone, head, tuple(classes))
        planes = np.stack([on_source(to_unit(each), image) for each in maps])
        breast = on_source(image.tissue, image)[None] >= 0.5
        names = [f"{each.name}, relative" for each in maps]
        for kind, content, labels in (("heat_maps", planes, names), ("breast", breast, ["breast"])):
            path, algorithm = Path(f"{start}.{kind}.dcm"), Algorithm(f"MammoDINO {kind}", weights)
            write_seg(path, header, content, labels, image.frame, algorithm)
            yield path

    return export


def open_maps(run: str, source: str | None) -> tuple[Backbone, nn.Module | None, Sequence[str]]:
    """Return backbone, head and classes of a training.finetune run or of an encoder. Raises ValueError where its heat
    maps cannot be placed on the source."""
    if not (Path(run) / RESULT_FILE).is_file():
        return load_backbone("mammodino", run), *own_classifier(run)
    opened = open_classifier(Path(run) / MODEL_FOLDER, source)
    check_drawable(*opened[:2], run)
    if isinstance(opened[1], MultipleInstanceHead):
        raise ValueError(f"{run}: attention over tiles is drawn by training.heat_map alone")
    return opened


def find_results(sources: Sequence[Path], output: Path) -> dict[Path, str]:
    """Return the files to export, and for each the path that its results begin with: below `output` as the file below
    the sources. Raises ValueError where there is none."""
    found = find_files(sources).files
    files = [file for file in found if file in sources or not holds_other_object(file)]
    if ignored := len(found) - len(files):
        logger.info("ignored: %d DICOM files that hold no image", ignored)
    if not files:
        raise ValueError(f"{sources[0]}: no DICOM image found")
    names = paths_below(files, [source for source in sources if source.is_dir()])
    stems = [name[: -len(suffix(name))] if suffix(name) in DICOM_SUFFIXES else name for name in names]
    return {file: str(output / stem) for file, stem in zip(files, stems, strict=True)}


def holds_other_object(file: Path) -> bool:
    """Whether it is DICOM, but no image, as reports, segmentations and what this module writes."""
    with suppress(InvalidImageError):  # raised again where the file is exported
        return (opened := open_if_dicom(file)) is not None and not is_image(opened.header)
    return False


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.export_dicom", description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", type=user_model, help="output_dir of training.detect or training.finetune; or an encoder"
    )
    parser.add_argument("files", nargs="+", type=user_path, help="DICOM files, or folders of them")
    parser.add_argument("--output", type=user_path, required=True, help="folder for the results")
    parser.add_argument("--min_score", type=float, default=0.3, help="least score of a box (default 0.3)")
    parser.add_argument(
        "--slice", type=int, help="of heat maps of a volume, a frame of the file from 0 (default: middle)"
    )
    parser.add_argument("--source", type=user_model, help="where the run's frozen encoder is now, if it was moved")
    options = parser.parse_args(arguments)
    with command_line("export_dicom"):
        run = Path(options.run)
        settings = open_run(run)[0] if (run / RESULT_FILE).is_file() else None
        files = find_results(options.files, options.output)
        if isinstance(settings, DetectionSettings):
            export = boxes_exporter(run, settings, options.min_score)
        else:
            export = maps_exporter(options.slice, *open_maps(options.run, options.source))
        refused = export_files(files, export)
        print(f"{options.output}: {len(files) - len(refused)} files; {len(refused)} refused. {NOTICE}.")


if __name__ == "__main__":
    main()
