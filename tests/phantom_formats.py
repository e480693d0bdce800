"""The phantom written otherwise: bit depth, sign, photometric interpretation, form of the window, packing of frames.

A reader must get the same image from each. Every function takes a data set of `dataset_scripts.phantom.dicom` (12 of 16
bits, MONOCHROME2, one full-range window), changes it in place and returns it; encoding comes last. What is legal
follows DICOM PS3.5 8.2 and PS3.3 C.11.2.
"""

import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.pixels import get_decoder
from pydicom.sequence import Sequence as DicomSequence

from dataset_scripts.phantom.dicom import (
    PHANTOM_BITS,
    TRANSFER_SYNTAXES,
    check_encoder,
    encode,
    set_pixels,
    set_rescale,
    stored_values,
)

VOI_FORMS = ("LINEAR", "LINEAR_EXACT", "SIGMOID", "SEVERAL", "LUT", "NONE")
VOI_PLACES = ("top", "shared", "per_frame")
SECONDARY_CAPTURE = {False: uid.SecondaryCaptureImageStorage, True: uid.MultiFrameTrueColorSecondaryCaptureImageStorage}


def set_pixel_format(
    dataset: Dataset,
    bits_stored: int = PHANTOM_BITS,
    bits_allocated: int | None = None,
    signed: bool = False,
    photometric: str = "MONOCHROME2",
) -> Dataset:
    """Change bits, sign or polarity. Rescale slope and intercept lead back to the 12-bit values, so the window stays.

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
    set_pixels(dataset, stored.astype(f"<{'i' if signed else 'u'}{allocated // 8}"), bits_stored)
    dataset.PhotometricInterpretation = photometric
    dataset.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
    set_rescale(dataset, phantom_top / top, offset)
    return dataset


def as_secondary_capture(dataset: Dataset, photometric: str) -> Dataset:
    """Make the image, at 8 bits, an "RGB" or "YBR_FULL" Secondary Capture: gray written as color, without a window."""
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
    set_pixels(dataset, np.stack([gray, neutral, neutral], axis=-1), 8)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, photometric
    return dataset


def set_voi(dataset: Dataset, form: str, place: str = "top", center: float = 2048.0, width: float = 4096.0) -> Dataset:
    """Write the window in another form and place; all but SIGMOID and NONE give the same image.

    Args:
        form: "LINEAR"; "LINEAR_EXACT"; "SIGMOID"; "SEVERAL", the window first and others after it; "LUT", the window
            as a table; "NONE".
        place: "top", or in the functional groups of a volume, "shared" or "per_frame".
        center, width: of the LINEAR window, in modality units (PS3.3 C.11.2.1.2).
    """
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


def encoded(
    dataset: Dataset, transfer_syntax: str, offset_table: str = "basic", fragments_per_frame: int = 1
) -> Dataset:
    """`encode`, with the frames packed as asked; skips where this installation cannot write or read the syntax.

    offset_table: "basic", "none", or "extended" (PS3.3 C.7.6.3.1.8), which is for frames of one fragment (PS3.5 A.4).
    """
    try:
        check_encoder(transfer_syntax)
    except ImportError as error:
        pytest.skip(str(error))
    if not get_decoder(getattr(uid, transfer_syntax)).is_available:
        pytest.skip(f"no decoder of {transfer_syntax}: pip install 'mammodino[codecs]'")
    if dataset.SamplesPerPixel == 3 and transfer_syntax == "JPEGBaseline8Bit":
        return _encode_color_jpeg(dataset)
    encode(dataset, transfer_syntax)
    if TRANSFER_SYNTAXES[transfer_syntax].encoder and (offset_table, fragments_per_frame) != ("basic", 1):
        frames = list(generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames", 1))))
        if offset_table == "extended":
            data, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(frames)
        else:
            data = encapsulate(frames, fragments_per_frame=fragments_per_frame, has_bot=offset_table == "basic")
        _set_encapsulated(dataset, data)
    return dataset


def _encode_color_jpeg(dataset: Dataset) -> Dataset:
    import imagecodecs

    space = {"RGB": "RGB", "YBR_FULL": "YCBCR"}[dataset.PhotometricInterpretation]
    options = {"level": 95, "colorspace": space, "outcolorspace": space, "subsampling": "444"}
    shape = int(dataset.get("NumberOfFrames", 1)), dataset.Rows, dataset.Columns, 3
    pixels = np.frombuffer(dataset.PixelData, np.uint8, int(np.prod(shape))).reshape(shape)
    _set_encapsulated(dataset, encapsulate([imagecodecs.jpeg8_encode(frame, **options) for frame in pixels]))
    dataset.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    return dataset


def _set_encapsulated(dataset: Dataset, data: bytes) -> None:
    dataset.PixelData = data
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
