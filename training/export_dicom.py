"""Boxes, heat maps and breast masks as DICOM for viewers: structured reports and segmentations. Research use only.

    python -m training.export_dicom FILES... --detector RUN --output FOLDER [--min_score 0.3]
    python -m training.export_dicom FILES... --model MODEL --output FOLDER [--slice N]

FILES: DICOM files, or folders of them. RUN: the folder of a training.detect run; its boxes become NAME.boxes.dcm, a
measurement report (PS3.16 TID 1500). MODEL: an encoder or classifier; its heat maps become NAME.heat_maps.dcm, a
fractional segmentation with a segment a map, and the breast that it sees NAME.breast.dcm, a binary one (PS3.3 A.51).

All of it lies in rows, columns and frames of the file as it is stored, not in the image that an encoder sees, and
refers to its SOP instance. **It carries the patient and study of the file, as viewers need it**, and names itself for
research use only. Needs the extra `clinical`.
"""

import argparse
import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

import modeling_mammodino
from modeling_mammodino.dicom import open_dicom
from modeling_mammodino.dicom_header import laterality, num_frames
from modeling_mammodino.image_io import InvalidImageError
from modeling_mammodino.tools.command import command_line, user_model, user_path
from modeling_mammodino.tools.embed import find_device, open_encoder
from modeling_mammodino.tools.features import find_files
from modeling_mammodino.tools.files import atomic_file
from training.evaluation.backbones.registry import hash_weights
from training.evaluation.detection.boxes import BoxedImage
from training.evaluation.detection.data import LesionImage, LesionImageRenderer
from training.evaluation.detection.detector import load_detector
from training.evaluation.detection.find_lesions import find_lesions
from training.evaluation.heat_maps import HeatMap, encode, heat_maps
from training.evaluation.run_settings import DetectionSettings
from training.evaluation.runs import SETTINGS_FILE, read_json
from training.heat_map import own_classifier

try:
    import highdicom as hd
except ImportError:  # said where it is needed
    hd = None

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
        hd.sr.ObservationContext(hd.sr.ObserverContext(Code("121007", "DCM", "Device"), device)),
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


def export_boxes(files: Sequence[Path], run: Path, min_score: float, output: Path) -> list[Path]:
    """Write the boxes of at least `min_score` that a training.detect run finds, a report a file; return their paths."""
    if (noted := read_json(run / SETTINGS_FILE)) is None:
        raise ValueError(f"--detector {run}: has no {SETTINGS_FILE}; give the folder of a training.detect run")
    settings = DetectionSettings(**{**noted, "data_dir": ".", "output_dir": str(run), "dataloader_num_workers": 0})
    detector: Any
    detector, processor = load_detector(run / "model")
    algorithm = Algorithm("MammoDINO lesion detector", hash_weights(detector))
    detector.to(find_device("auto"))
    written = []
    for file in files:
        none = np.empty((0, 4)), np.empty(0, int)
        found, refused = find_lesions(
            detector, [BoxedImage(str(file), "", str(file), *none)], LesionImageRenderer(processor), settings
        )
        if refused:
            raise ValueError(refused[str(file)])
        kept = found[0].scores >= min_score
        if not kept.any():
            logger.info("%s: no box of score %g or more; no report", file, min_score)
            continue
        written.append(output / f"{file.stem}.boxes.dcm")
        parts = (found[0].boxes[kept], found[0].slices[kept], found[0].scores[kept])
        write_sr(written[-1], source_header(file), *parts, algorithm)
    return written


def export_maps(files: Sequence[Path], model_name: str, frame: int | None, output: Path) -> list[Path]:
    """Write heat maps and breast mask of one frame of each file, by default the middle one; return their paths."""
    model: Any
    model, processor = open_encoder(model_name)
    classifier, classes = own_classifier(model_name)
    renderer, weights = LesionImageRenderer(processor), hash_weights(model)
    written = []
    for file in files:
        header = source_header(file)
        (image,) = renderer(str(file), None if frame is None else [frame], slices_per_volume=1)
        pixel_values = torch.from_numpy(renderer.inputs(image.image, image.tissue)[None, :1])
        maps = heat_maps(encode(model, pixel_values, torch.from_numpy(image.tissue[None])), classifier, classes)
        planes = np.stack([on_source(to_unit(each), image) for each in maps])
        names = [f"{each.name}, relative" for each in maps]
        breast = on_source(image.tissue, image)[None] >= 0.5
        for kind, content, labels in (("heat_maps", planes, names), ("breast", breast, ["breast"])):
            written.append(output / f"{file.stem}.{kind}.dcm")
            algorithm = Algorithm(f"MammoDINO {kind.replace('_', ' ')}", weights)
            write_seg(written[-1], header, content, labels, image.frame, algorithm)
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export_dicom", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=user_path, help="DICOM files, or folders of them")
    parser.add_argument("--output", type=user_path, required=True, help="folder for the results")
    parser.add_argument("--detector", type=user_path, help="folder of a training.detect run: boxes")
    parser.add_argument("--min_score", type=float, default=0.3, help="least score of a box (default 0.3)")
    parser.add_argument("--model", type=user_model, help="encoder or classifier, folder or Hub id: heat maps, breast")
    parser.add_argument("--slice", type=int, help="of a volume, a frame of the file from 0 (default: the middle one)")
    options = parser.parse_args(arguments)
    with command_line("export_dicom"):
        if not (options.detector or options.model):
            raise ValueError("--detector RUN for boxes, or --model MODEL for heat maps: give one, or both")
        files = find_files(options.files).files
        if not files:
            raise ValueError(f"{options.files[0]}: no DICOM file found")
        stems = [file.stem for file in files]
        if twice := next((file for file in files if stems.count(file.stem) > 1), None):
            raise ValueError(f"{twice}: another file has this name, too, and so would the result; export it by itself")
        for file in files:
            source_header(file)
        written = export_boxes(files, options.detector, options.min_score, options.output) if options.detector else []
        written += export_maps(files, options.model, options.slice, options.output) if options.model else []
        print("\n".join(map(str, written)) or "nothing was found")


if __name__ == "__main__":
    main()
