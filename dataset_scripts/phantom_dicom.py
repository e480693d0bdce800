"""DICOM files and labels of simulated breasts: Breast Tomosynthesis and Digital Mammography X-Ray Image objects.

Attributes follow DICOM PS3.3 A.55 and C.8.31 (tomosynthesis, enhanced multi-frame) and A.26 (mammogram, for
presentation). Every file says that it is simulated. UIDs derive from the seed and the patient, dates are fixed, so
the same breast is the same file. `dataset_scripts.phantom_encoding` writes it in other transfer syntaxes.
"""

import csv
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    BreastTomosynthesisImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)
from tqdm import tqdm

from dataset_scripts.phantom_encoding import DEFAULT_SYNTAX, check_encoder, save

LABEL_COLUMNS = (
    *("file", "patient", "laterality", "view", "kind"),  # kind: "dbt" or "ffdm"; file: relative to labels.csv
    *("density", "lesion", "lesion_type", "cancer", "x0", "y0", "x1", "y1", "lesion_slice"),
    *("lesion_first_slice", "lesion_last_slice", "glandular_fraction", "vendor"),  # last: the last with lesion in it
)
DATE, TIME = "20000101", "000000"
SIMULATED = "simulated, not a patient"
VIEW_CODES = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}
PATIENT_ORIENTATION = {"LCC": ["A", "R"], "RCC": ["P", "L"], "LMLO": ["A", "FR"], "RMLO": ["P", "FL"]}


@dataclass(frozen=True)
class BreastLabels:
    """The truth about a breast, in the coordinates of its images."""

    density: str  # BI-RADS class, "A".."D"
    glandular_fraction: float  # of the breast's volume without pectoral muscle
    lesion: int = 0
    lesion_type: str = "none"  # or mass_round, mass_spiculated, calcification, distortion
    cancer: int = 0
    box: tuple[int, int, int, int] | None = None  # x0, y0, x1, y1 in pixels, half-open
    lesion_slice: int | None = None  # slice of the lesion's centre
    lesion_slices: tuple[int, int] | None = None  # first and last + 1


@dataclass(frozen=True)
class BreastInfo:
    """What a header says about a breast."""

    patient: str  # such as "PHANTOM-000012"
    laterality: str  # "L" or "R"
    view: str  # "CC" or "MLO"
    pixel_spacing_mm: float
    slice_spacing_mm: float
    seed: int = 0
    vendor: str = "hologic"  # whose system is simulated

    def uid(self, *role: str) -> str:
        """A UID that is a function of this patient, or for more than the study of this view, and the role."""
        view = () if role == ("study",) else (self.laterality, self.view)
        return generate_uid(entropy_srcs=["MammoDINO phantom", str(self.seed), self.patient, *view, *role])

    def image_orientation(self) -> list[float]:
        """Direction of the columns' and the rows' increase in the patient (L, P, S), PS3.3 C.7.6.2.1.1.

        Columns run from the chest wall forward on the left side, backward on the right; rows run toward the midline,
        in an MLO view at 45 degrees also toward the feet. Slices then follow the beam.
        """
        left = self.laterality == "L"
        medial, down = (1.0, 0.0) if self.view == "CC" else (0.70710678, -0.70710678)
        return [0.0, -1.0 if left else 1.0, 0.0, -medial if left else medial, 0.0, down]


def _sequence(**attributes) -> list[Dataset]:
    """A sequence of one item."""
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return [item]


def _code(value: str, meaning: str, scheme: str = "SCT", **more) -> list[Dataset]:
    return _sequence(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning, **more)


def _header(pixels: np.ndarray, info: BreastInfo, sop_class: str, role: str) -> Dataset:
    """What both kinds of file share: patient, study, series, equipment, acquisition and pixels."""
    if pixels.dtype != np.uint16 or pixels.max(initial=0) > 4095:
        raise ValueError(f"{info.patient}: pixels must be uint16 of 12 bits, not {pixels.dtype} up to {pixels.max()}")
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, info.uid(role, "instance")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = Dataset()
    image.file_meta = meta
    image.SpecificCharacterSet = "ISO_IR 192"
    image.SOPClassUID, image.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    image.PatientName, image.PatientID = f"{info.patient}^SIMULATED", info.patient
    image.PatientBirthDate, image.PatientSex = "", "O"
    image.StudyInstanceUID, image.SeriesInstanceUID = info.uid("study"), info.uid(role, "series")
    image.StudyID, image.AccessionNumber, image.ReferringPhysicianName = "1", "", ""
    image.StudyDate = image.SeriesDate = image.ContentDate = image.AcquisitionDate = DATE
    image.StudyTime = image.SeriesTime = image.ContentTime = image.AcquisitionTime = TIME
    image.AcquisitionDateTime = DATE + TIME
    image.Modality = "MG"
    image.SeriesNumber, image.InstanceNumber, image.AcquisitionNumber = (2 if role == "dbt" else 1), 1, 1
    image.SeriesDescription = f"{info.laterality} {info.view} {role}, {SIMULATED}"
    image.Manufacturer, image.ManufacturerModelName = "MammoDINO phantom", "dataset_scripts.phantom"
    image.DeviceSerialNumber, image.SoftwareVersions = "0", "1"
    image.ImageComments = SIMULATED
    image.PatientOrientation = PATIENT_ORIENTATION[info.laterality + info.view]
    image.BodyPartExamined = "BREAST"
    image.PresentationIntentType = "FOR PRESENTATION"
    image.BurnedInAnnotation, image.LossyImageCompression, image.QualityControlImage = "NO", "00", "NO"
    image.BreastImplantPresent = "NO"
    image.PositionerType = "MAMMOGRAPHIC"
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PresentationLUTShape = 1, "MONOCHROME2", "IDENTITY"
    image.Rows, image.Columns = pixels.shape[-2:]
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.PixelData = pixels.astype("<u2").tobytes()
    return image


def _view_code(info: BreastInfo) -> list[Dataset]:
    return _code(*VIEW_CODES[info.view], ViewModifierCodeSequence=[])


def mammogram_dataset(image: np.ndarray, info: BreastInfo) -> Dataset:
    """A mammogram (H, W) uint16 as Digital Mammography X-Ray Image Storage, For Presentation."""
    dicom = _header(image, info, DigitalMammographyXRayImageStorageForPresentation, "2d")
    dicom.ImageType = ["DERIVED", "PRIMARY"]
    dicom.ImageLaterality, dicom.ViewPosition, dicom.ViewCodeSequence = info.laterality, info.view, _view_code(info)
    dicom.AnatomicRegionSequence = _code("76752008", "Breast")
    dicom.ImagerPixelSpacing = dicom.PixelSpacing = [info.pixel_spacing_mm] * 2
    dicom.OrganExposed, dicom.DetectorType = "BREAST", ""
    dicom.PixelIntensityRelationship, dicom.PixelIntensityRelationshipSign = "LOG", -1
    dicom.RescaleIntercept, dicom.RescaleSlope, dicom.RescaleType = 0, 1, "US"
    dicom.WindowCenter, dicom.WindowWidth, dicom.VOILUTFunction = 2048, 4096, "LINEAR"
    dicom.AcquisitionContextSequence = []
    return dicom


def tomosynthesis_dataset(slices: np.ndarray, info: BreastInfo) -> Dataset:
    """Slices (D, H, W) uint16 as Breast Tomosynthesis Image Storage, one frame a slice, with their positions."""
    dicom = _header(slices, info, BreastTomosynthesisImageStorage, "dbt")
    frame_type = ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"]
    dicom.ImageType, dicom.NumberOfFrames = frame_type, len(slices)
    dicom.PixelPresentation, dicom.VolumetricProperties = "MONOCHROME", "VOLUME"
    dicom.VolumeBasedCalculationTechnique, dicom.ContentQualification = "TOMOSYNTHESIS", "RESEARCH"
    dicom.ViewCodeSequence = _view_code(info)
    dicom.FrameOfReferenceUID, dicom.PositionReferenceIndicator = info.uid("frame of reference"), ""
    dicom.AcquisitionContextSequence = []
    dicom.DimensionOrganizationType, organization = "3D", info.uid("dimensions")
    dicom.DimensionOrganizationSequence = _sequence(DimensionOrganizationUID=organization)
    dicom.DimensionIndexSequence = _sequence(
        DimensionOrganizationUID=organization,
        DimensionIndexPointer=0x00200032,  # Image Position (Patient)
        FunctionalGroupPointer=0x00209113,  # Plane Position Sequence
    )
    orientation = info.image_orientation()
    dicom.SharedFunctionalGroupsSequence = _sequence(
        PixelMeasuresSequence=_sequence(
            PixelSpacing=[info.pixel_spacing_mm] * 2,
            SliceThickness=info.slice_spacing_mm,
            SpacingBetweenSlices=info.slice_spacing_mm,
        ),
        PlaneOrientationSequence=_sequence(ImageOrientationPatient=orientation),
        FrameAnatomySequence=_sequence(
            AnatomicRegionSequence=_code("76752008", "Breast"), FrameLaterality=info.laterality
        ),
        FrameVOILUTSequence=_sequence(WindowCenter=2048, WindowWidth=4096, VOILUTFunction="LINEAR"),
        PixelValueTransformationSequence=_sequence(RescaleIntercept=0, RescaleSlope=1, RescaleType="US"),
        XRay3DFrameTypeSequence=_sequence(
            FrameType=frame_type,
            PixelPresentation="MONOCHROME",
            VolumetricProperties="VOLUME",
            VolumeBasedCalculationTechnique="TOMOSYNTHESIS",
            ReconstructionIndex=1,
        ),
    )
    along_beam = np.cross(orientation[:3], orientation[3:]) * info.slice_spacing_mm
    frames = []
    for number, position in enumerate(np.arange(len(slices))[:, None] * along_beam + 0.0, start=1):
        frames += _sequence(
            FrameContentSequence=_sequence(
                StackID="1", InStackPositionNumber=number, DimensionIndexValues=[number], FrameAcquisitionNumber=1
            ),
            PlanePositionSequence=_sequence(ImagePositionPatient=[f"{value:.9g}" for value in position]),
        )
    dicom.PerFrameFunctionalGroupsSequence = frames
    return dicom


def write_2d(path, image: np.ndarray, info: BreastInfo, transfer_syntax: str = DEFAULT_SYNTAX):
    save(mammogram_dataset(image, info), path, transfer_syntax)


def write_dbt(path, slices: np.ndarray, info: BreastInfo, transfer_syntax: str = DEFAULT_SYNTAX):
    save(tomosynthesis_dataset(slices, info), path, transfer_syntax)


def write_labels(path, rows) -> Path:
    """The labels of an archive, rows of LABEL_COLUMNS with None for nothing, as CSV: written whole or not at all."""
    path = Path(path)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with open(unfinished, "w", newline="") as stream:
        csv.writer(stream).writerows([LABEL_COLUMNS, *rows])
    os.replace(unfinished, path)
    return path


def _write_exposure(exposure: Any, image: Callable, output: Path, transfer_syntax: str) -> list[tuple]:
    info, truth, slices, mammogram = image(exposure)
    (output / info.patient).mkdir(exist_ok=True)
    rows = []
    for kind, suffix, write, pixels in (("dbt", "dbt", write_dbt, slices), ("ffdm", "2d", write_2d, mammogram)):
        file = f"{info.patient}/{info.laterality}_{info.view}_{suffix}.dcm"
        write(output / file, pixels, info, transfer_syntax)
        found = (truth.density, truth.lesion, truth.lesion_type, truth.cancer, *(truth.box or (None,) * 4))
        first, end = truth.lesion_slices or (None, None)
        more = (truth.lesion_slice, first, end and end - 1, f"{truth.glandular_fraction:.4f}", info.vendor)
        rows.append((file, info.patient, info.laterality, info.view, kind, *found, *more))
    return rows


def write_patients(
    output, exposures: Sequence, image: Callable, num_proc: int = 1, transfer_syntax: str = DEFAULT_SYNTAX
) -> Path:
    """Write what `image(exposure)` returns, (BreastInfo, BreastLabels, slices, mammogram), and labels.csv last."""
    check_encoder(transfer_syntax)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write = partial(_write_exposure, image=image, output=output, transfer_syntax=transfer_syntax)
    bar = {"total": len(exposures), "unit": "breast"}
    if num_proc > 1:  # spawn: safe beside threads of the caller
        with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), cv2.setNumThreads, (1,)) as pool:
            rows = list(tqdm(pool.map(write, exposures, chunksize=4), **bar))
    else:
        rows = list(tqdm(map(write, exposures), **bar))
    return write_labels(output / "labels.csv", chain.from_iterable(rows))
