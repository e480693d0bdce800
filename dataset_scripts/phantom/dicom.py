"""DICOM files of simulated breasts: Breast Tomosynthesis and Digital Mammography X-Ray Image objects.

Attributes follow DICOM PS3.3 A.55 and C.8.31 (tomosynthesis, enhanced multi-frame) and A.26 (mammogram, for
presentation); pixels are 12 of 16 bits, MONOCHROME2, under one full-range window. Every file says that it is
simulated. UIDs derive from the seed and the patient, dates are fixed, so the same breast is the same file. `save`
encodes it in any transfer syntax (PS3.5 8.2).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from pydicom.uid import (
    BreastTomosynthesisImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)
from pydicom.valuerep import DSfloat

from modeling_mammodino.tools.files import atomic_file

DEFAULT_SYNTAX = "ExplicitVRLittleEndian"
PHANTOM_BITS = 12
ONE_BYTE_ONLY = ("RLELossless",)  # pydicom writes 8 of 16 bits wrong
DATE, TIME = "20000101", "000000"
SIMULATED = "simulated, not a patient"
VIEW_CODES = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}
PATIENT_ORIENTATION = {"LCC": ["A", "R"], "RCC": ["P", "L"], "LMLO": ["A", "FR"], "RMLO": ["P", "FL"]}


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

    def uid(self, *role: str) -> uid.UID:
        """Return a UID that is a function of the patient and the role, and but for the study of the view."""
        view = () if role == ("study",) else (self.laterality, self.view)
        return generate_uid(entropy_srcs=["MammoDINO phantom", str(self.seed), self.patient, *view, *role])

    def image_orientation(self) -> list[float]:
        """Return the directions of increasing columns and rows in the patient (L, P, S), PS3.3 C.7.6.2.1.1.

        Columns run from the chest wall forward on the left side, backward on the right; rows run toward the midline,
        in an MLO view at 45 degrees also toward the feet. Slices then follow the beam.
        """
        left = self.laterality == "L"
        medial, down = (1.0, 0.0) if self.view == "CC" else (0.70710678, -0.70710678)
        return [0.0, -1.0 if left else 1.0, 0.0, -medial if left else medial, 0.0, down]


def _sequence(**attributes) -> list[Dataset]:
    """Return a sequence of one item."""
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return [item]


def _code(value: str, meaning: str, scheme: str = "SCT", **more) -> list[Dataset]:
    return _sequence(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning, **more)


def _header(pixels: np.ndarray, info: BreastInfo, sop_class: str, role: str) -> Dataset:
    """Return what both kinds of file share: patient, study, series, equipment, acquisition and pixels."""
    if pixels.dtype != np.uint16 or pixels.max(initial=0) > 4095:
        raise ValueError(f"{info.patient}: pixels must be uint16 of 12 bits, not {pixels.dtype} up to {pixels.max()}")
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.UID(sop_class), info.uid(role, "instance")
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
    """Return a mammogram (H, W) uint16 as Digital Mammography X-Ray Image Storage, For Presentation."""
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
    """Return slices (D, H, W) uint16 as Breast Tomosynthesis Image Storage, one frame a slice, with positions."""
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


class Encoding(NamedTuple):
    """What a transfer syntax can hold and who encodes it; the strength of the lossy ones is our choice."""

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
    """Return NEAR of JPEG-LS: the largest error of a stored value, 1/1024 of the range."""
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


def stored_values(dataset: Dataset) -> np.ndarray:
    """Return the gray values (F, H, W) of a data set that is not encoded yet; uint8, int8, uint16 or int16."""
    dtype = np.dtype(f"<{'i' if dataset.PixelRepresentation else 'u'}{dataset.BitsAllocated // 8}")
    shape = int(dataset.get("NumberOfFrames", 1)), dataset.Rows, dataset.Columns
    return np.frombuffer(dataset.PixelData, dtype, int(np.prod(shape))).reshape(shape)


def set_pixels(dataset: Dataset, stored: np.ndarray, bits_stored: int) -> None:
    """Replace the pixels by values of any integer type of one or two bytes."""
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * stored.itemsize, bits_stored, bits_stored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    data = stored.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"


def set_rescale(dataset: Dataset, slope: float, offset: int = 0) -> None:
    """Set slope and intercept so that (stored + offset) * slope are the values that the window is for."""
    group = dataset
    if "SharedFunctionalGroupsSequence" in dataset:
        group = dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0]
    group.RescaleSlope = DSfloat(slope, auto_format=True)
    group.RescaleIntercept = DSfloat(float(group.RescaleSlope) * offset, auto_format=True)


def fit_pixel_format(dataset: Dataset, transfer_syntax: str) -> Dataset:
    """Reduce the pixels to 8 bits where the transfer syntax holds no 12; a rescale leads back to the 12-bit values."""
    if PHANTOM_BITS not in TRANSFER_SYNTAXES[transfer_syntax].bits:
        top = (1 << PHANTOM_BITS) - 1
        set_pixels(dataset, np.rint(stored_values(dataset) * (255 / top)).astype(np.uint8), bits_stored=8)
        set_rescale(dataset, top / 255)
    return dataset


def encode(dataset: Dataset, transfer_syntax: str) -> Dataset:
    """Encode the pixels in place, by a transfer syntax's pydicom keyword; a lossy one gets a new SOP Instance UID.

    HTJ2K codestreams say 8 or 16 bits whatever BitsStored is, as the files of BCS-DBT do; that is legal.

    Raises:
        ValueError: the transfer syntax cannot hold the bits or the sign; or the data set is encoded already.
        ImportError: the encoder is not installed; the message names the extra.
    """
    check_encoder(transfer_syntax)
    encoding, syntax = TRANSFER_SYNTAXES[transfer_syntax], getattr(uid, transfer_syntax)
    if (before := dataset.file_meta.TransferSyntaxUID) != uid.ExplicitVRLittleEndian:
        raise ValueError(f"{transfer_syntax}: the data set is {before.name} already; encode once, and last")
    if dataset.BitsStored not in encoding.bits or (dataset.PixelRepresentation and not encoding.signed):
        signed = "signed" if dataset.PixelRepresentation else "unsigned"
        allowed = ", ".join(map(str, encoding.bits)) + (" bits" if encoding.signed else " bits, unsigned")
        raise ValueError(f"{transfer_syntax} holds {allowed}, not {dataset.BitsStored} {signed}: see fit_pixel_format")
    if transfer_syntax in ONE_BYTE_ONLY and dataset.BitsStored <= 8 < dataset.BitsAllocated:
        raise ValueError(f"{transfer_syntax}: {dataset.BitsStored} bits must be allocated 8, not 16")
    if not encoding.encoder:
        if syntax == uid.ExplicitVRBigEndian and dataset.BitsAllocated == 16:  # pydicom writes PixelData as it is
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        return dataset
    by = _encode_with_pydicom if encoding.encoder == "pydicom" else _encode_with_imagecodecs
    uncompressed_bytes, frames = len(dataset.PixelData), list(map(bytes, by(dataset, transfer_syntax)))
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = syntax
    if encoding.method:
        dataset.LossyImageCompression, dataset.LossyImageCompressionMethod = "01", encoding.method
        dataset.LossyImageCompressionRatio = f"{uncompressed_bytes / sum(map(len, frames)):.3g}"
        instance = uid.generate_uid(entropy_srcs=[dataset.SOPInstanceUID, transfer_syntax])
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = instance
    return dataset


def _encode_with_pydicom(dataset: Dataset, transfer_syntax: str) -> Iterator[bytes | bytearray]:
    options: dict = {}
    if transfer_syntax == "JPEGLSNearLossless":
        options = {"jls_error": near_lossless_error(dataset.BitsStored)}
    elif transfer_syntax == "JPEG2000":
        options = {"j2k_psnr": [60]}  # dB
    yield from get_encoder(getattr(uid, transfer_syntax)).iter_encode(dataset, **options)


def _encode_with_imagecodecs(dataset: Dataset, transfer_syntax: str) -> Iterator[bytes | bytearray]:
    import imagecodecs

    bits = dataset.BitsStored
    for stored in stored_values(dataset):  # (H, W)
        if transfer_syntax.startswith("HTJ2K"):
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
    """Encode and write a DICOM file, atomically; 8 bits where the transfer syntax holds no 12."""
    encode(fit_pixel_format(dataset, transfer_syntax), transfer_syntax)
    with atomic_file(path) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)
