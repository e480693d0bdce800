"""Made-up DICOM data sets for tests: any pixels, any element, legal or not; phantoms; refusals."""

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import set_pixel_data

from dataset_scripts.phantom.archive import PhantomParameters, acquire_2d, acquire_dbt, simulate_breast
from dataset_scripts.phantom.dicom import BreastInfo, mammogram_dataset, tomosynthesis_dataset
from modeling_mammodino.dicom import read_mammogram
from modeling_mammodino.dicom_pixels import AS_STORED
from modeling_mammodino.image_io import InvalidImageError

SOP = "1.2.840.10008.5.1.4.1.1."
MAMMOGRAPHY, PROCESSING, TOMOSYNTHESIS, PROJECTION, CT, CAPTURE = (
    SOP + end for end in ("1.2", "1.2.1", "13.1.3", "13.1.4", "2", "7")
)
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
RAW = {"settings": AS_STORED}
BREAST = simulate_breast(PhantomParameters(4, 65, 47, pixel_spacing_mm=2.5, slice_spacing_mm=8.0), seed=0, index=1)
SLICES, MAMMOGRAM = acquire_dbt(BREAST), acquire_2d(BREAST)  # (4, 65, 47), (65, 47); 12 bits, an odd number of pixels


def item(**elements):
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def build(pixels=RAMP, bits=12, photometric="MONOCHROME2", syntax=uid.ExplicitVRLittleEndian, **elements):
    """A data set with the given pixels, (H, W) or (F, H, W), and further elements by keyword, legal or not."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = MAMMOGRAPHY
    dataset.Modality = "MG"
    set_pixel_data(dataset, np.ascontiguousarray(pixels), photometric, bits, generate_instance_uid=False)
    dataset.SOPInstanceUID = "1.2.3.4"
    with pydicom.config.disable_value_validation():
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
    if syntax != uid.ExplicitVRLittleEndian:
        dataset.file_meta.TransferSyntaxUID = syntax
        if uid.UID(syntax).is_compressed:
            dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
            dataset.compress(syntax, generate_instance_uid=False)
    return dataset


def save(dataset, folder, name="image.dcm"):
    path = folder / name
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.save_as(path, enforce_file_format=True)
    return path


def volume(levels=(0, 1, 2, 3), positions=None, shape=(8, 8), syntax=uid.ExplicitVRLittleEndian, **elements):
    """A DBT volume; frame i of the file holds 100 * levels[i] + 7 and stands at positions[i] mm."""
    pixels = np.stack([np.full(shape, 100 * level + 7, np.uint16) for level in levels])
    groups = [Dataset() for _ in levels]
    shared = Dataset()
    if positions is not None:
        for group, z in zip(groups, positions, strict=True):
            group.PlanePositionSequence = [item(ImagePositionPatient=[5.0, -3.0, float(z)])]
        shared.PlaneOrientationSequence = [item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    dataset = build(pixels, syntax=syntax, SOPClassUID=TOMOSYNTHESIS)
    dataset.PerFrameFunctionalGroupsSequence = groups
    dataset.SharedFunctionalGroupsSequence = [shared]
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def refused(source, *words, read=read_mammogram, **options):
    with pytest.raises(InvalidImageError) as caught:
        read(source, **options)
    for word in (*words, ";"):
        assert word in str(caught.value)


def phantom(multi_frame):
    """The breast above as the phantom writes it: a volume or a mammogram, not encoded, and its values (F, H, W)."""
    info = BreastInfo("PHANTOM", BREAST.laterality, BREAST.view, 2.5, 8.0)
    if multi_frame:
        return tomosynthesis_dataset(SLICES, info), SLICES
    return mammogram_dataset(MAMMOGRAM, info), MAMMOGRAM[None]
