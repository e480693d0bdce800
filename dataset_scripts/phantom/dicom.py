"""DICOM files and labels of simulated breasts: Breast Tomosynthesis and Digital Mammography X-Ray Image objects.

Attributes follow DICOM PS3.3 A.55 and C.8.31 (tomosynthesis, enhanced multi-frame) and A.26 (mammogram, for
presentation). Every file says that it is simulated. UIDs derive from the seed and the patient, dates are fixed, so
the same breast is the same file. `dataset_scripts.phantom.dicom` writes it in other transfer syntaxes.
"""
# MERGED: The same phantom, written otherwise: transfer syntax, bit depth, photometric interpretation, form of the window.
#
# A reader, or a pipeline of one's own, must get the same image from each. Every function takes a data set of
# `dataset_scripts.phantom.dicom` (12 of 16 bits, MONOCHROME2, one full-range window), changes it in place and returns it;
# `encode` comes last. What is legal follows DICOM PS3.5 8.2 and PS3.3 C.11.2; what is not is refused.
#

import csv
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import get_encoder
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    BreastTomosynthesisImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)
from pydicom.valuerep import DSfloat
from tqdm import tqdm

DEFAULT_SYNTAX = "ExplicitVRLittleEndian"
PHANTOM_BITS = 12
ONE_BYTE_ONLY = ("RLELossless",)  # pydicom writes 8 of 16 bits wrong
VOI_FORMS = ("LINEAR", "LINEAR_EXACT", "SIGMOID", "SEVERAL", "LUT", "NONE")
VOI_PLACES = ("top", "shared", "per_frame")
SECONDARY_CAPTURE = {False: uid.SecondaryCaptureImageStorage, True: uid.MultiFrameTrueColorSecondaryCaptureImageStorage}


class Encoding(NamedTuple):
    """What a transfer syntax can hold and who writes it; the strength of the lossy ones is our choice."""

    encoder: str = "pydicom"  # or "imagecodecs", for what pydicom reads and does not write; "" is uncompressed
    bits: tuple[int, ...] = tuple(range(2, 17))  # BitsStored
    signed: bool = True
    method: str = ""  # LossyImageCompressionMethod of a lossy one


TRANSFER_SYNTAXES = {
    "ImplicitVRLittleEndian": Encoding(""),
    "ExplicitVRLittleEndian": Encoding(""),
    "ExplicitVRBigEndian": Encoding(""),
    "DeflatedExplicitVRLittleEndian": Encoding(""),
    "RLELossless": Encoding(),
    "JPEGBaseline8Bit": Encoding("imagecodecs", (8,), False, "ISO_10918_1"),
    "JPEGExtended12Bit": Encoding("imagecodecs", (12,), False, "ISO_10918_1"),
    "JPEGLossless": Encoding("imagecodecs"),
    "JPEGLosslessSV1": Encoding("imagecodecs"),
    "JPEGLSLossless": Encoding(),
    "JPEGLSNearLossless": Encoding(signed=False, method="ISO_14495_1"),
    "JPEG2000Lossless": Encoding(),
    "JPEG2000": Encoding(method="ISO_15444_1"),
    "HTJ2KLossless": Encoding("imagecodecs"),
    "HTJ2KLosslessRPCL": Encoding("imagecodecs"),
    "HTJ2K": Encoding("imagecodecs", method="ISO_15444_15"),
}


def near_lossless_error(bits_stored: int) -> int:
    """NEAR of JPEG-LS: the largest error of a stored value, 1/1024 of the range."""
    return max(1, 1 << bits_stored >> 10)


def check_encoder(transfer_syntax: str) -> None:
    """Refuse an unknown transfer syntax, or one whose encoder is not installed, before any work."""
    if transfer_syntax not in TRANSFER_SYNTAXES:
        raise ValueError(f"transfer_syntax={transfer_syntax!r}: must be one of {', '.join(TRANSFER_SYNTAXES)}")
    encoder = TRANSFER_SYNTAXES[transfer_syntax].encoder
    if encoder == "imagecodecs":
        try:
            import imagecodecs  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"{transfer_syntax} is written with imagecodecs: pip install 'mammodino[test]'"
            ) from error
    elif encoder and not get_encoder(getattr(uid, transfer_syntax)).is_available:
        raise ImportError(f"{transfer_syntax} needs an encoder: pip install 'mammodino[codecs]'")


def fit_pixel_format(dataset: Dataset, transfer_syntax: str) -> Dataset:
    """Reduced to 8 bits where the transfer syntax holds no 12."""
    if PHANTOM_BITS in TRANSFER_SYNTAXES[transfer_syntax].bits:
        return dataset
    return set_pixel_format(dataset, bits_stored=8)


def stored_values(dataset: Dataset) -> np.ndarray:
    """Of a data set that is not encoded yet: (F, H, W), or (F, H, W, 3) in color; uint8, int8, uint16 or int16."""
    kind = "i" if dataset.PixelRepresentation else "u"
    shape = (int(dataset.get("NumberOfFrames", 1)), dataset.Rows, dataset.Columns)
    shape += (3,) if dataset.SamplesPerPixel == 3 else ()
    dtype = np.dtype(f"<{kind}{dataset.BitsAllocated // 8}")
    return np.frombuffer(dataset.PixelData, dtype, int(np.prod(shape))).reshape(shape)


def set_pixel_format(
    dataset: Dataset,
    bits_stored: int = PHANTOM_BITS,
    bits_allocated: int | None = None,
    signed: bool = False,
    photometric: str = "MONOCHROME2",
) -> Dataset:
    """Other bits, sign or polarity. Rescale slope and intercept lead back to the 12-bit values, so the window stays.

    A value comes back within half a step of `bits_stored`. MONOCHROME1 mirrors the values, and the full-range window
    is its own mirror image; any other window would have to be mirrored too.
    """
    allocated = bits_allocated or (8 if bits_stored <= 8 else 16)
    top, phantom_top = (1 << bits_stored) - 1, (1 << PHANTOM_BITS) - 1
    values = stored_values(dataset).astype(np.float64)  # (F, H, W)
    if photometric == "MONOCHROME1":
        values = phantom_top - values
    offset = 1 << (bits_stored - 1) if signed else 0
    stored = np.rint(values * (top / phantom_top)) - offset
    _set_pixels(dataset, stored.astype(f"<{'i' if signed else 'u'}{allocated // 8}"), bits_stored, photometric)
    dataset.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
    slope = DSfloat(phantom_top / top, auto_format=True)
    rescale = dataset
    if "SharedFunctionalGroupsSequence" in dataset:
        rescale = dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0]
    rescale.RescaleSlope, rescale.RescaleIntercept = slope, DSfloat(float(slope) * offset, auto_format=True)
    return dataset


def as_secondary_capture(dataset: Dataset, photometric: str) -> Dataset:
    """The image at 8 bits as an "RGB" or "YBR_FULL" Secondary Capture: gray written as color, without a window."""
    gray = np.rint(stored_values(dataset) * (255 / ((1 << PHANTOM_BITS) - 1))).astype(np.uint8)  # (F, H, W)
    neutral = gray if photometric == "RGB" else np.full_like(gray, 128)
    _remove_voi(dataset)
    for keyword in ("PresentationLUTShape", "RescaleSlope", "RescaleIntercept", "RescaleType"):
        if keyword in dataset:
            del dataset[keyword]
    if "SharedFunctionalGroupsSequence" in dataset:
        del dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SECONDARY_CAPTURE[len(gray) > 1]
    dataset.ConversionType, dataset.PlanarConfiguration = "WSD", 0
    return _set_pixels(dataset, np.stack([gray, neutral, neutral], axis=-1), 8, photometric)


def set_voi(dataset: Dataset, form: str, place: str = "top", center: float = 2048.0, width: float = 4096.0) -> Dataset:
    """One window in another form and place; all but SIGMOID and NONE give the same image.

    Args:
        form: "LINEAR"; "LINEAR_EXACT"; "SIGMOID"; "SEVERAL", the window first and others after it; "LUT", the window
            as a table; "NONE".
        place: "top", or in the functional groups of a volume, "shared" or "per_frame".
        center, width: of the LINEAR window, in modality units (PS3.3 C.11.2.1.2).
    """
    if form not in VOI_FORMS or place not in VOI_PLACES:
        raise ValueError(f"form={form!r}, place={place!r}: must be of {VOI_FORMS} and {VOI_PLACES}")
    _remove_voi(dataset)
    if form == "NONE":
        return dataset
    groups = [Dataset() for _ in _groups(dataset, place)]
    for group in groups:
        _write_voi(group, form, center, width)
    for owner, group in zip(_groups(dataset, place), groups, strict=True):
        if owner is dataset:
            dataset.update(group)
        else:
            owner.FrameVOILUTSequence = DicomSequence([group])
    return dataset


def _write_voi(group: Dataset, form: str, center: float, width: float) -> None:
    if form == "LUT":
        low, span = center - 0.5 - (width - 1) / 2, width - 1
        entries = np.clip((np.arange(1 << PHANTOM_BITS) - low) / span, 0, 1)
        table = Dataset()
        table.add_new("LUTDescriptor", "US", [len(entries), 0, 16])
        table.add_new("LUTData", "US", np.rint(entries * 65535).astype(int).tolist())
        group.VOILUTSequence = DicomSequence([table])
    elif form == "LINEAR_EXACT":
        group.WindowCenter, group.WindowWidth, group.VOILUTFunction = center - 0.5, width - 1, form
    elif form == "SEVERAL":
        group.WindowCenter, group.WindowWidth = [center, center / 2, center + 9], [width, width / 4, 1]
        group.WindowCenterWidthExplanation = ["NORMAL", "HARDER", "SOFTER"]
    else:
        group.WindowCenter, group.WindowWidth, group.VOILUTFunction = center, width, form


def _groups(dataset: Dataset, place: str) -> list[Dataset]:
    if place == "top":
        return [dataset]
    name = {"shared": "SharedFunctionalGroupsSequence", "per_frame": "PerFrameFunctionalGroupsSequence"}[place]
    if name not in dataset:
        raise ValueError(f"place={place!r}: a single-frame object has no functional groups; use 'top'")
    return list(dataset[name].value)


def _remove_voi(dataset: Dataset) -> None:
    keywords = ("WindowCenter", "WindowWidth", "VOILUTFunction", "WindowCenterWidthExplanation", "VOILUTSequence")
    for keyword in keywords:
        if keyword in dataset:
            del dataset[keyword]
    for place in VOI_PLACES[1:] if "SharedFunctionalGroupsSequence" in dataset else ():
        for group in _groups(dataset, place):
            if "FrameVOILUTSequence" in group:
                del group.FrameVOILUTSequence


def _set_pixels(dataset: Dataset, stored: np.ndarray, bits_stored: int, photometric: str) -> Dataset:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3 if stored.ndim == 4 else 1), photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * stored.itemsize, bits_stored, bits_stored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    data = stored.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    return dataset


def encode(
    dataset: Dataset, transfer_syntax: str, offset_table: str = "basic", fragments_per_frame: int = 1
) -> Dataset:
    """The pixels in another transfer syntax, by its pydicom keyword; a lossy one gets a new SOP Instance UID.

    HTJ2K codestreams say 8 or 16 bits whatever BitsStored is, as the files of BCS-DBT do; that is legal.

    Args:
        offset_table: "basic", "extended" (PS3.3 C.7.6.3.1.8) or "none", of a compressed one.
        fragments_per_frame: over how many fragments a frame is cut, where the frame is long enough.

    Raises:
        ValueError: the transfer syntax cannot hold the bits, the sign or the color; or it is encoded already.
        ImportError: the encoder is not installed; the message names the extra.
    """
    check_encoder(transfer_syntax)
    encoding, syntax = TRANSFER_SYNTAXES[transfer_syntax], getattr(uid, transfer_syntax)
    if (before := dataset.file_meta.TransferSyntaxUID) != uid.ExplicitVRLittleEndian:
        raise ValueError(f"{transfer_syntax}: the data set is {before.name} already; encode once, and last")
    if dataset.BitsStored not in encoding.bits or (dataset.PixelRepresentation and not encoding.signed):
        signed = "signed" if dataset.PixelRepresentation else "unsigned"
        allowed = ", ".join(map(str, encoding.bits)) + (" bits" if encoding.signed else " bits, unsigned")
        raise ValueError(f"{transfer_syntax} holds {allowed}, not {dataset.BitsStored} {signed}: use set_pixel_format")
    if transfer_syntax in ONE_BYTE_ONLY and dataset.BitsStored <= 8 < dataset.BitsAllocated:
        raise ValueError(f"{transfer_syntax}: {dataset.BitsStored} bits must be allocated 8, not 16")
    if not encoding.encoder:
        if syntax == uid.ExplicitVRBigEndian and dataset.BitsAllocated == 16:  # pydicom writes PixelData as it is
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        return dataset
    by = _encode_with_pydicom if encoding.encoder == "pydicom" else _encode_with_imagecodecs
    uncompressed_bytes, frames = len(dataset.PixelData), list(by(dataset, transfer_syntax))
    _set_encapsulated(dataset, frames, offset_table, fragments_per_frame)
    dataset.file_meta.TransferSyntaxUID = syntax
    if encoding.method:
        dataset.LossyImageCompression, dataset.LossyImageCompressionMethod = "01", encoding.method
        dataset.LossyImageCompressionRatio = f"{uncompressed_bytes / sum(map(len, frames)):.3g}"
        instance = uid.generate_uid(entropy_srcs=[dataset.SOPInstanceUID, transfer_syntax])
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = instance
    return dataset


def _set_encapsulated(dataset: Dataset, frames: list[bytes], offset_table: str, fragments: int) -> None:
    if offset_table == "extended":
        if fragments != 1:  # PS3.5 A.4: it is for frames of one fragment
            raise ValueError(f"fragments_per_frame={fragments}: must be 1 with an extended offset table")
        data, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(frames)
    elif offset_table in ("basic", "none"):
        data = encapsulate(frames, fragments_per_frame=fragments, has_bot=offset_table == "basic")
    else:
        raise ValueError(f"offset_table={offset_table!r}: must be 'basic', 'extended' or 'none'")
    dataset.PixelData = data
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True


def _encode_with_pydicom(dataset: Dataset, transfer_syntax: str) -> Iterator[bytes]:
    options: dict = {}
    if transfer_syntax == "JPEGLSNearLossless":
        options = {"jls_error": near_lossless_error(dataset.BitsStored)}
    elif transfer_syntax == "JPEG2000":
        options = {"j2k_psnr": [60]}  # dB
    yield from get_encoder(getattr(uid, transfer_syntax)).iter_encode(dataset, **options)


def _encode_with_imagecodecs(dataset: Dataset, transfer_syntax: str) -> Iterator[bytes]:
    import imagecodecs

    bits, color = dataset.BitsStored, dataset.SamplesPerPixel == 3
    if color and transfer_syntax != "JPEGBaseline8Bit":
        raise ValueError(f"{transfer_syntax}: color is written uncompressed, by pydicom or as JPEGBaseline8Bit")
    for stored in stored_values(dataset):  # (H, W) or (H, W, 3)
        if color:
            space = {"RGB": "RGB", "YBR_FULL": "YCBCR"}[dataset.PhotometricInterpretation]
            yield imagecodecs.jpeg8_encode(stored, level=95, colorspace=space, outcolorspace=space, subsampling="444")
        elif transfer_syntax.startswith("HTJ2K"):
            lossless, depth = "Lossless" in transfer_syntax, 8 if bits <= 8 else 16
            step = None if lossless else 2.0 ** (bits - depth - 10)  # 1/1024 of the values' range, as a share of depth
            values = stored.astype(f"{stored.dtype.kind}{depth // 8}")
            yield imagecodecs.htj2k_encode(
                values, level=step, reversible=lossless, tlm=transfer_syntax.endswith("RPCL")
            )
        else:  # a lossless JPEG takes a signed value as its bit pattern
            values = (stored.astype(np.int32) & ((1 << bits) - 1)).astype(np.uint8 if bits <= 8 else np.uint16)
            if "Lossless" in transfer_syntax:
                predictor = 1 if transfer_syntax == "JPEGLosslessSV1" else 6
                yield imagecodecs.jpeg8_encode(values, lossless=True, predictor=predictor, bitspersample=bits)
            else:
                yield imagecodecs.jpeg8_encode(values, level=95, bitspersample=bits)


def save(dataset: Dataset, path: str | Path, transfer_syntax: str = DEFAULT_SYNTAX) -> None:
    """Encode and write a DICOM file, whole or not at all."""
    encode(fit_pixel_format(dataset, transfer_syntax), transfer_syntax)
    unfinished = Path(path).with_suffix(f".{os.getpid()}.tmp")
    try:
        dataset.save_as(unfinished, enforce_file_format=True)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


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
    lesion_slice: int | None = None  # slice of the lesion's center
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
    image.Manufacturer, image.ManufacturerModelName = "MammoDINO phantom", "dataset_scripts.phantom.archive"
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
