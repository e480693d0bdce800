"""Voxel breasts of others: codes become attenuation, the mass is where the labels say, wrong headers are named."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pydicom
import pytest
from made_inputs import REAL_DATA

from dataset_scripts.phantom.acquisition import acquire_2d
from dataset_scripts.phantom.anatomy import ADIPOSE, CARCINOMA, FIBROGLANDULAR, PhantomParameters
from dataset_scripts.phantom.archive import main
from dataset_scripts.phantom.voxels import voxel_breast

HEADER = """ObjectType = Image
NDims = 3
DimSize = 80 96 24
ElementSpacing = 1 1 1
ElementType = MET_UCHAR
ElementDataFile = breast.raw
"""
COARSE = PhantomParameters(pixel_spacing_mm=2.0, slice_spacing_mm=3.0)


def codes() -> np.ndarray:
    """A half ellipsoid of fat with a block of gland, a mass in the lower third, and a paddle over all, (z, y, x)."""
    z, y, x = np.mgrid[:24, :96, :80]
    breast = ((y - 48) / 44) ** 2 + (x / 70) ** 2 + ((z - 11.5) / 14) ** 2 < 1
    made = np.where(breast, 1, 0).astype(np.uint8)
    made[8:16, 40:56, 4:14] = 29
    made[4:8, 60:66, 6:12] = 200
    made[23] = 50
    return made


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "breast.mhd").write_text(HEADER)
    (tmp_path / "breast.raw.gz").write_bytes(gzip.compress(codes().tobytes()))
    return tmp_path / "breast.mhd"


def test_attenuation_is_that_of_the_codes_and_none_is_lost_on_coarser_voxels(file):
    breast, made = voxel_breast(file, COARSE), codes()
    assert breast.volume.shape == (8, 48, 40) and breast.parameters.voxel_mm == (3.0, 2.0, 2.0)
    of_codes = {0: 0, 50: 0, 1: ADIPOSE, 29: FIBROGLANDULAR, 200: CARCINOMA}
    wanted = np.vectorize(of_codes.get, [float])(made[::-1]).reshape(8, 3, 48, 2, 40, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(breast.volume, wanted, atol=1e-6)
    inside = np.isin(made[::-1], (1, 29, 200)).reshape(8, 3, 48, 2, 40, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(breast.body, inside, atol=1e-6)


def test_spacings_that_do_not_divide_the_field_keep_its_mass(file):
    breast = voxel_breast(file, PhantomParameters(pixel_spacing_mm=1.7, slice_spacing_mm=2.3))
    of_voxel = (24 / 10) * (96 / 56) * (80 / 47)
    assert breast.parameters.voxel_mm == pytest.approx((24 / 10, 80 / 47, 80 / 47))
    wanted = voxel_breast(file, PhantomParameters(pixel_spacing_mm=1, slice_spacing_mm=1)).volume.sum()
    assert breast.volume.shape == (10, 56, 47) and abs(breast.volume.sum() * of_voxel / wanted - 1) < 1e-4


def test_labels_are_those_of_the_codes(file):
    labels, made = voxel_breast(file, COARSE).labels, codes()
    assert (labels.lesion, labels.lesion_type, labels.cancer) == (1, "mass_spiculated", 1)
    assert labels.box == (3, 30, 6, 33)
    assert labels.lesion_slices == (5, 7) and labels.lesion_slice == 6  # planes 4 to 7 from below are 16 to 19 of 24
    tissue = np.isin(made, (29, 200)).sum() / np.isin(made, (1, 29, 200)).sum()
    assert labels.glandular_fraction == pytest.approx(tissue) and labels.density == "A"
    without = np.where(made == 200, 1, made)
    (file.parent / "breast.raw").write_bytes(without.tobytes())  # the plain file goes before the packed one
    labels = voxel_breast(file, COARSE).labels
    assert (labels.lesion, labels.cancer, labels.box) == (0, 0, None)


def test_the_command_writes_a_mammogram_and_a_volume(file, tmp_path):
    spacing = ["--pixel_spacing_mm", "2", "--slice_spacing_mm", "3"]
    main(["--output", str(tmp_path / "out"), "--voxels", str(file), *spacing])
    with (tmp_path / "out" / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["kind"], row["patient"], row["x0"], row["y1"]) for row in rows] == [
        ("dbt", "PHANTOM-breast", "3", "33"),
        ("ffdm", "PHANTOM-breast", "3", "33"),
    ]
    volume, image = (pydicom.dcmread(tmp_path / "out" / row["file"]) for row in rows)
    assert volume.pixel_array.shape == (8, 48, 40) and volume.ImageComments == "simulated, not a patient"
    np.testing.assert_array_equal(image.pixel_array, acquire_2d(voxel_breast(file, COARSE)))
    assert image.pixel_array[24, 2] > 0 == image.pixel_array[24, 39]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("NDims = 3", "NDims = 2", "NDims = 2, must be 3"),
        ("MET_UCHAR", "MET_SHORT", "ElementType = MET_SHORT, must be MET_UCHAR"),
        ("ElementType", "CompressedData = True\nElementType", "CompressedData = True, must be False"),
        ("80 96 24", "80 96", "DimSize and ElementSpacing must hold three numbers"),
        ("80 96 24", "80 96 25", r"breast.raw: 184320 bytes, breast.mhd says 80 x 96 x 25"),
    ],
)
def test_a_header_that_is_not_supported_is_refused_by_its_field(file, old, new, named):
    file.write_text(HEADER.replace(old, new))
    with pytest.raises(ValueError, match=named):
        voxel_breast(file, COARSE)


def test_an_unknown_code_an_empty_field_and_a_missing_file_are_refused(file):
    for made, named in ((np.where(codes() == 29, 30, codes()), "unknown tissue code 30"),
                        (np.where(codes() == 50, 50, 0), "holds no breast")):  # fmt: skip
        (file.parent / "breast.raw").write_bytes(made.astype(np.uint8).tobytes())
        with pytest.raises(ValueError, match=named):
            voxel_breast(file, COARSE)
    for raw in file.parent.glob("breast.raw*"):
        raw.unlink()
    with pytest.raises(FileNotFoundError, match="breast.raw"):
        voxel_breast(file, COARSE)


def test_the_public_breast_has_its_mass_in_the_breast():
    path = REAL_DATA / "victre" / "pcl_1.mhd"
    if not path.is_file():
        pytest.skip("the VICTRE breast (shared/data/victre) is not here")
    breast = voxel_breast(path, PhantomParameters())
    (x0, y0, x1, y1), (d0, d1) = breast.labels.box, breast.labels.lesion_slices
    assert breast.volume.shape == (21, 135, 83) and breast.labels.density == "D"
    denser = breast.volume > FIBROGLANDULAR + 1e-6  # nothing but the mass is
    assert denser[d0:d1, y0:y1, x0:x1].sum() == denser.sum() > 0
