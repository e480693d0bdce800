"""The same phantom, written otherwise: transfer syntax, bit depth, photometric interpretation, form of the window.

A reader, or a pipeline of one's own, must get the same picture from each. Every function takes a data set of
`dataset_scripts.phantom_dicom` (12 of 16 bits, MONOCHROME2, one full-range window), changes it in place and returns it;
`encode` comes last. What is legal follows DICOM PS3.5 8.2 and PS3.3 C.11.2; what is not is refused.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import get_encoder
from pydicom.sequence import Sequence
from pydicom.valuerep import DSfloat

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
    """Of a data set that is not encoded yet: (F, H, W), or (F, H, W, 3) in colour; uint8, int8, uint16 or int16."""
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
    """The picture at 8 bits as an "RGB" or "YBR_FULL" Secondary Capture: grey written as colour, without a window."""
    grey = np.rint(stored_values(dataset) * (255 / ((1 << PHANTOM_BITS) - 1))).astype(np.uint8)  # (F, H, W)
    neutral = grey if photometric == "RGB" else np.full_like(grey, 128)
    _remove_voi(dataset)
    for keyword in ("PresentationLUTShape", "RescaleSlope", "RescaleIntercept", "RescaleType"):
        if keyword in dataset:
            del dataset[keyword]
    if "SharedFunctionalGroupsSequence" in dataset:
        del dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SECONDARY_CAPTURE[len(grey) > 1]
    dataset.ConversionType, dataset.PlanarConfiguration = "WSD", 0
    return _set_pixels(dataset, np.stack([grey, neutral, neutral], axis=-1), 8, photometric)


def set_voi(dataset: Dataset, form: str, place: str = "top", center: float = 2048.0, width: float = 4096.0) -> Dataset:
    """One window in another form and place; all but SIGMOID and NONE give the same picture.

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
            owner.FrameVOILUTSequence = Sequence([group])
    return dataset


def _write_voi(group: Dataset, form: str, center: float, width: float) -> None:
    if form == "LUT":
        low, span = center - 0.5 - (width - 1) / 2, width - 1
        entries = np.clip((np.arange(1 << PHANTOM_BITS) - low) / span, 0, 1)
        table = Dataset()
        table.add_new("LUTDescriptor", "US", [len(entries), 0, 16])
        table.add_new("LUTData", "US", np.rint(entries * 65535).astype(int).tolist())
        group.VOILUTSequence = Sequence([table])
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
        ValueError: the transfer syntax cannot hold the bits, the sign or the colour; or it is encoded already.
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

    bits, colour = dataset.BitsStored, dataset.SamplesPerPixel == 3
    if colour and transfer_syntax != "JPEGBaseline8Bit":
        raise ValueError(f"{transfer_syntax}: colour is written uncompressed, by pydicom or as JPEGBaseline8Bit")
    for stored in stored_values(dataset):  # (H, W) or (H, W, 3)
        if colour:
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
