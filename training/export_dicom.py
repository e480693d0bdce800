"""Boxes, heat maps and breast masks as DICOM for viewers: structured reports and segmentations. Research use only.

    python -m training.export_dicom RUN FILES... --output FOLDER [--min_score 0.3] [--slice N]

FILES: DICOM files, or folders of them. RUN is the output_dir of a finished training.detect run: its boxes become
NAME.boxes.dcm, a measurement report (PS3.16 TID 1500). Or it is that of a training.finetune run, or an encoder, a
folder or Hub id: its heat maps become NAME.heat_maps.dcm, a fractional segmentation with a segment a map, and the
breast that it sees NAME.breast.dcm, a binary one (PS3.3 A.51).

All of it lies in rows, columns and frames of the file as it is stored, not in the image that an encoder sees, and
refers to its SOP instance. **It carries the patient and study of the file, as viewers need it**, and names itself for
research use only. Needs the extra `clinical`.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from torch import nn

import modeling_mammodino
from modeling_mammodino.dicom import open_dicom
from modeling_mammodino.dicom_header import laterality, num_frames
from modeling_mammodino.image_io import InvalidImageError
from modeling_mammodino.tools.command import CommandParser, command_line, user_model, user_path
from modeling_mammodino.tools.embed import find_device, weights_sha256
from modeling_mammodino.tools.features import find_files
from modeling_mammodino.tools.files import atomic_file
from training.evaluation.backbones.registry import Backbone, load_backbone
from training.evaluation.detection.boxes import BoxedImage
from training.evaluation.detection.data import LesionImage, LesionImageRenderer
from training.evaluation.detection.detector import load_detector
from training.evaluation.detection.find_lesions import find_lesions
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
LESION, BREAST = Code("52988006", "SCT", "Lesion"), Code("76752008", "SCT", "Breast")
BREAST_MASK = (Code("123037004", "SCT", "Anatomical Structure"), BREAST)
HEAT_MAP = (  # not of a lesion: none of these maps has been validated to show one
    Code("309825002", "SCT", "Spatial and Relational Concept"), Code("HEATMAP", "99MAMMODINO", "Heat map, relative")
)  # fmt: skip
MAMMOGRAPHY = Code("71651007", "SCT", "Mammography")
CERTAINTY = Code("111012", "DCM", "Certainty of Finding")  # 0 to 100: the score, which is no probability of cancer
FAMILY = Code("123110", "DCM", "Artificial Intelligence")


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
            "series_description": self.title,
        }


def source_header(file: str | Path) -> Dataset:
    """Return the header of a DICOM image, with what may be empty filled in. Raises InvalidImageError where there is no
    instance to refer to, ImportError without highdicom."""
    if hd is None:
        raise ImportError("structured reports and segmentations need highdicom: pip install -e '.[clinical]'")
    header = copy.copy(open_dicom(file).header)
    for keyword in ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"):
        if not header.get(keyword):
            raise InvalidImageError(str(file), f"has no {keyword}, to which a result could refer; export it again")
    for keyword in TYPE_2:
        if keyword not in header:
            setattr(header, keyword, "")
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
    side = {"L": Code("7771000", "SCT", "Left"), "R": Code("24028007", "SCT", "Right")}.get(laterality(header) or "")
    by = hd.sr.AlgorithmIdentification(
        name=algorithm.title, version=modeling_mammodino.__version__, parameters=[f"weights {algorithm.weights}"]
    )
    findings = []
    for number, (box, frame, score) in enumerate(zip(boxes.astype(float), frames.tolist(), scores, strict=True), 1):
        x0, y0, x1, y1 = box
        shown = [frame + 1] if (num_frames(header) or 1) > 1 else None
        findings.append(
            hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=hd.sr.TrackingIdentifier(hd.UID(), f"{algorithm.name} {number}"),
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
    report = hd.sr.MeasurementReport(
        hd.sr.ObservationContext(hd.sr.ObserverContext(hd.sr.CodedConcept("121007", "DCM", "Device"), device)),
        MAMMOGRAPHY,
        findings,
        referenced_images=[header] if "ImagerPixelSpacing" in header else None,  # highdicom asks for it, of volumes too
    )
    named = {name: about[name] for name in about if name not in ("software_versions", "device_serial_number")}
    _save(path, hd.sr.ComprehensiveSR([header], report[0], **named))


def write_seg(
    path: Path, header: Dataset, planes: np.ndarray, labels: Sequence[str], frame: int, algorithm: Algorithm
) -> None:
    """Write planes (S, H, W), as large as the source, as segments of a segmentation, atomically.

    bool: masks of the breast, binary. float32 from 0 to 1: maps, fractional in 255 steps.  labels: a name a segment.
    frame: of the file, from 0. Raises ValueError where a volume has no positions of its frames.
    """
    size = (header.Rows, header.Columns)
    if planes.shape[1:] != size or len(labels) != len(planes):
        raise ValueError(f"{path.name}: {len(labels)} labels of planes {planes.shape}; the source has {size}")
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
        if len(groups) != count or "PlanePositionSequence" not in groups[frame]:
            raise ValueError(
                f"{path.name}: the header says no positions of the {count} frames; give the file as it was"
            )
        position = groups[frame].PlanePositionSequence[0].ImagePositionPatient
        where["plane_positions"] = [hd.PlanePositionSequence(hd.CoordinateSystemNames.PATIENT, position)]
    elif all(spacing := header.get("PixelSpacing") or header.get("ImagerPixelSpacing") or [0]):
        # a projection has no slices, but readers ask for a thickness: of the compressed breast, or where unknown a unit
        where["pixel_measures"] = hd.PixelMeasuresSequence(list(spacing), header.get("BodyPartThickness") or 1)
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
    _save(path, segmentation)


def _save(path: Path, dataset: Dataset) -> None:
    with atomic_file(path) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)


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


def export_boxes(files: Sequence[Path], run: Path, settings: DetectionSettings, min_score: float, output: Path) -> None:
    """Write the boxes of at least `min_score` that a detector finds, a report a file that has any."""
    detector: Any
    detector, processor = load_detector(run / MODEL_FOLDER)
    algorithm = Algorithm("MammoDINO lesion detector", weights_sha256(detector))
    detector.to(find_device("auto"))
    for file in files:
        image = BoxedImage(str(file), "", str(file), np.empty((0, 4)), np.empty(0, int))
        found, refused = find_lesions(detector, [image], LesionImageRenderer(processor), settings)
        if refused:
            raise ValueError(refused[str(file)])
        (of_file,) = found
        kept, path = of_file.scores >= min_score, output / f"{file.stem}.boxes.dcm"
        if kept.any():
            parts = of_file.boxes[kept], of_file.slices[kept], of_file.scores[kept]
            write_sr(path, source_header(file), *parts, algorithm)
            print(path)
        else:
            logger.info("%s: no box of score %g or more; no report", file, min_score)


def export_maps(
    files: Sequence[Path],
    frame: int | None,
    backbone: Backbone,
    head: nn.Module | None,
    classes: Sequence[str],
    output: Path,
) -> None:
    """Write heat maps and breast mask of one frame of each file, by default the middle one."""
    weights = backbone.settings()["weights"]
    for file in files:
        header = source_header(file)
        image, maps = map_file(str(file), frame, backbone, head, tuple(classes))
        planes = np.stack([on_source(to_unit(each), image) for each in maps])
        breast = on_source(image.tissue, image)[None] >= 0.5
        names = [f"{each.name}, relative" for each in maps]
        for kind, content, labels in (("heat_maps", planes, names), ("breast", breast, ["breast"])):
            path, algorithm = output / f"{file.stem}.{kind}.dcm", Algorithm(f"MammoDINO {kind}", weights)
            write_seg(path, header, content, labels, image.frame, algorithm)
            print(path)


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
        files = find_files(options.files).files
        if not files:
            raise ValueError(f"{options.files[0]}: no DICOM file found")
        stems = [file.stem for file in files]
        if twice := next((file for file in files if stems.count(file.stem) > 1), None):
            raise ValueError(f"{twice}: another file has this name, too, and so would the result; export it by itself")
        for file in files:
            source_header(file)
        run = Path(options.run)
        settings = open_run(run)[0] if (run / RESULT_FILE).is_file() else None
        if isinstance(settings, DetectionSettings):
            export_boxes(files, run, settings, options.min_score, options.output)
        else:
            export_maps(files, options.slice, *open_maps(options.run, options.source), options.output)


if __name__ == "__main__":
    main()
