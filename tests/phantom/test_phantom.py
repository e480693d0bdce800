"""The phantom: a pure function of its key, labels that agree with the volume, real DBT blur, DICOM files that read."""

import csv
from dataclasses import replace

import cv2
import numpy as np
import pydicom
import pytest

from dataset_scripts.phantom import archive
from dataset_scripts.phantom.acquisition import GEOMETRIES, acquire_2d, acquire_dbt
from dataset_scripts.phantom.anatomy import (
    ADIPOSE,
    DENSITY_CLASSES,
    LESION,
    LESION_TYPES,
    Breast,
    PhantomParameters,
    random_generator,
)
from dataset_scripts.phantom.archive import main, simulate_breast, write_archive
from dataset_scripts.phantom.lesions import draw_lesion

SMALL = PhantomParameters(num_slices=10, height_px=96, width_px=64, pixel_spacing_mm=1.8, slice_spacing_mm=4.0)


@pytest.fixture(scope="module")
def breasts() -> list[Breast]:
    return [simulate_breast(SMALL, seed=3, index=index) for index in range(60)]


def test_a_breast_is_a_pure_function_of_seed_and_index(breasts):
    again = simulate_breast(SMALL, seed=3, index=5)
    assert again.labels == breasts[5].labels
    np.testing.assert_array_equal(again.volume, breasts[5].volume)
    np.testing.assert_array_equal(acquire_dbt(again), acquire_dbt(breasts[5]))
    np.testing.assert_array_equal(acquire_2d(again), acquire_2d(breasts[5]))
    for seed, index in ((3, 6), (4, 5)):
        assert not np.array_equal(simulate_breast(SMALL, seed, index).volume, breasts[5].volume)


def test_box_and_slices_are_those_of_the_lesion(breasts):
    seen = set()
    for breast in breasts:
        plain = simulate_breast(SMALL, breast.seed, breast.index, lesion=False)
        assert plain.labels.lesion == 0 and plain.labels.cancer == 0 and plain.labels.box is None
        added = breast.volume != plain.volume
        seen.add(breast.labels.lesion_type)
        if not breast.labels.lesion:
            assert not added.any() and breast.labels.lesion_slice is None
            continue
        (x0, y0, x1, y1), (d0, d1) = breast.labels.box, breast.labels.lesion_slices
        assert 0 <= x0 < x1 <= SMALL.width_px and 0 <= y0 < y1 <= SMALL.height_px
        assert d0 <= breast.labels.lesion_slice < d1
        assert added[d0:d1, y0:y1, x0:x1].sum() == added.sum() > 0
        assert (breast.volume * added).max() > ADIPOSE
    assert seen == {"none", *LESION_TYPES}


@pytest.mark.parametrize("view", ["CC", "MLO"])
@pytest.mark.parametrize("kind", LESION_TYPES)
def test_every_kind_of_lesion_is_where_its_labels_say_and_differs_by_malignancy(kind, view):
    """In CC and MLO views, benign and malignant: attenuation, what is outside the box, and how big it is."""
    parameters, seen = replace(SMALL, lesion_probability=1.0), set()
    for index in range(200):
        found = draw_lesion(random_generator(11, index, LESION), 1.0)
        if found.lesion_type != kind or found.malignant in seen:
            continue
        seen.add(found.malignant)
        breast = simulate_breast(parameters, 11, index, view=view)
        plain = simulate_breast(parameters, 11, index, lesion=False, view=view)
        labels, difference = breast.labels, breast.volume - plain.volume
        assert (labels.lesion_type, labels.cancer) == (kind, found.malignant)
        spans = [np.flatnonzero(difference.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        (d0, d1), (y0, y1), (x0, x1) = ((span[0], span[-1] + 1) for span in spans)
        assert labels.lesion_slices == (d0, d1) and labels.box == (x0, y0, x1, y1)
        weight = np.abs(difference).sum(axis=(1, 2))
        assert labels.lesion_slice == round(weight @ np.arange(len(weight)) / weight.sum())
        assert breast.body[difference != 0].min() > 0.5
        assert (x1 - x0) * 1.8 <= 2 * 2.4 * found.radius_mm + 4 * 1.8  # window of a lesion
        np.testing.assert_array_equal(breast.body, plain.body)
        if seen == {False, True}:
            break
    assert seen == {False, True}


def test_benign_and_malignant_differ_in_what_the_lexicon_names():
    """Of 400 lesions: the suspicious look goes with malignancy but not always; such masses are denser."""
    lesions = [draw_lesion(random_generator(0, index, LESION), 1.0) for index in range(400)]
    malignant, suspicious = (np.array([getattr(one, name) for one in lesions]) for name in ("malignant", "suspicious"))
    assert 0.78 < (malignant == suspicious).mean() < 0.92
    contrast, radius = (np.array([getattr(one, name) for one in lesions]) for name in ("contrast", "radius_mm"))
    assert contrast[suspicious].mean() > 1.05 * contrast[~suspicious].mean()
    assert contrast[suspicious].min() < contrast[~suspicious].max()  # easy to hard
    assert radius.min() < 5 and radius.max() > 13


def test_the_views_of_a_patient_share_density_build_and_lesion(tmp_path):
    parameters, found = replace(SMALL, lesion_probability=1.0), []
    labels = write_archive(tmp_path, 2, seed=4, parameters=parameters, views_per_patient=4)
    with open(labels, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 4 * 2 and len({pydicom.dcmread(tmp_path / r["file"]).SOPInstanceUID for r in rows}) == 16
    for patient in {row["patient"] for row in rows}:
        mine = [row for row in rows if row["patient"] == patient]
        assert {(row["laterality"], row["view"]) for row in mine} == {(s, v) for s in "LR" for v in ("CC", "MLO")}
        assert len({row["density"] for row in mine}) == 1
        assert len({pydicom.dcmread(tmp_path / row["file"]).StudyInstanceUID for row in mine}) == 1
        with_lesion = {(row["laterality"], row["lesion_type"], row["cancer"]) for row in mine if row["lesion"] == "1"}
        assert len(with_lesion) == 1 and sum(row["lesion"] == "1" for row in mine) == 4
        found += [{row["view"]: row for row in mine if row["lesion"] == "1" and row["kind"] == "dbt"}]
    own = simulate_breast(parameters, 4, 0)
    again = simulate_breast(parameters, 4, 0, laterality=own.laterality, view=own.view)
    np.testing.assert_array_equal(own.volume, again.volume)
    other = simulate_breast(parameters, 4, 0, laterality="R" if own.laterality == "L" else "L")
    assert other.labels.lesion == 0 and not np.array_equal(other.volume[:, :, ::-1], own.volume)
    assert [set(each) for each in found] == [{"CC", "MLO"}] * 2
    with pytest.raises(ValueError, match="views_per_patient=3: must be one of"):
        write_archive(tmp_path, 1, parameters=SMALL, views_per_patient=3)
    with pytest.raises(ValueError, match="must be L or R, and CC or MLO"):
        simulate_breast(SMALL, 0, 0, view="LM")


def test_a_lesion_lies_as_far_behind_the_nipple_in_both_views():
    """The rule by which radiologists match views; to the room that each view leaves."""
    parameters, depths = replace(SMALL, lesion_probability=1.0), []
    for index in range(30):
        depths.append([])
        for view in ("CC", "MLO"):
            breast = simulate_breast(parameters, 1, index, view=view)
            x0, _, x1, _ = breast.labels.box
            x = (x0 + x1) / 2 if breast.laterality == "L" else SMALL.width_px - (x0 + x1) / 2
            depths[-1].append(np.flatnonzero(breast.body.any(axis=(0, 1))).size - x)
    assert np.corrcoef(np.transpose(depths))[0, 1] > 0.6


def test_systems_may_be_mixed():
    mixed = replace(SMALL, vendor="mixed")
    vendors = {simulate_breast(mixed, 0, index).vendor for index in range(12)}
    assert vendors == set(GEOMETRIES)
    one = simulate_breast(SMALL, 0, 0)
    for vendor in GEOMETRIES:
        other = simulate_breast(replace(SMALL, vendor=vendor), 0, 0)
        np.testing.assert_array_equal(other.volume, one.volume)  # the same breast on another system
        assert np.array_equal(acquire_dbt(other), acquire_dbt(one)) == (vendor == "hologic")


def test_cancer_follows_the_kind_of_lesion_but_not_always(breasts):
    many = [simulate_breast(replace(SMALL, lesion_probability=1.0), 0, index).labels for index in range(60)]
    share = {kind: np.mean([one.cancer for one in many if one.lesion_type == kind]) for kind in LESION_TYPES}
    assert share["mass_spiculated"] > 0.7 and share["mass_round"] < 0.3
    assert 0 < share["calcification"] < 1


def test_neighboring_slices_are_more_alike_than_distant_ones(breasts):
    for breast in breasts[:6]:
        inside = (breast.body[2] > 0.9) & (breast.body[7] > 0.9)
        slices = acquire_dbt(breast).astype(np.float32)
        fine = [(one - cv2.GaussianBlur(one, (0, 0), 2.5))[inside] for one in slices]  # without wide structures
        near, far = (np.corrcoef(fine[2], fine[other])[0, 1] for other in (3, 6))
        assert near > 0.9 and near > far + 0.02
        whole = [np.corrcoef(slices[2][inside], slices[other][inside])[0, 1] for other in (3, 4, 6)]  # 4, 8, 16 mm
        assert whole[0] > 0.98 and whole == sorted(whole, reverse=True)


def test_one_mm_apart_slices_correlate_as_real_ones_do():
    """Above 0.99: 0.998 of real slices 1 mm apart, 0.985 at 3 mm; and a voxel's share changes far more than that."""
    parameters = PhantomParameters(40, 256, 160, pixel_spacing_mm=0.8, slice_spacing_mm=1.0)
    for index in (0, 1):
        breast = simulate_breast(parameters, 0, index)
        inside, slices = breast.body[20] > 0.9, acquire_dbt(breast).astype(np.float32)
        near, further = (np.corrcoef(slices[20][inside], slices[20 + step][inside])[0, 1] for step in (1, 3))
        assert near > 0.99 and near > further > 0.95


def test_density_classes_are_ordered_and_overlap(breasts):
    fractions = {
        density: [b.labels.glandular_fraction for b in breasts if b.labels.density == density]
        for density in DENSITY_CLASSES
    }
    medians = [np.median(fractions[density]) for density in DENSITY_CLASSES]
    assert medians == sorted(medians) and medians[3] > 3 * medians[0]
    assert all(0 < fraction < 0.8 for values in fractions.values() for fraction in values)


def test_images_are_bright_on_black_air_with_the_chest_wall_on_the_side_of_the_breast(breasts):
    for breast in breasts[:12]:
        outside = breast.body.max(axis=0) == 0
        for image in (acquire_dbt(breast)[5], acquire_2d(breast)):
            assert image.dtype == np.uint16 and image.max() < 4096
            assert image[outside].max() == 0 and np.median(image[breast.body[5] > 0.9]) > 200
            left, right = (image[:, :8] > 0).mean(), (image[:, -8:] > 0).mean()
            assert left > right if breast.laterality == "L" else right > left


def test_archive_reads_back(tmp_path):
    labels = write_archive(tmp_path, 3, seed=1, parameters=SMALL, first_patient=7)
    with open(labels, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"PHANTOM-{i:06d}" for i in (7, 8, 9)), "labels.csv"]
    assert [row["kind"] for row in rows] == ["dbt", "ffdm"] * 3
    uids = set()
    for row in rows:
        breast = simulate_breast(SMALL, 1, int(row["patient"][-6:]))
        dicom = pydicom.dcmread(tmp_path / row["file"])
        uids.add(dicom.SOPInstanceUID)
        pixels = acquire_dbt(breast) if row["kind"] == "dbt" else acquire_2d(breast)
        np.testing.assert_array_equal(dicom.pixel_array, pixels)
        assert (row["laterality"], row["view"], row["density"]) == (
            breast.laterality,
            breast.view,
            breast.labels.density,
        )
        if breast.labels.lesion:
            assert tuple(int(row[name]) for name in ("x0", "y0", "x1", "y1")) == breast.labels.box
            assert int(row["lesion_slice"]) == breast.labels.lesion_slice
            first, last = (int(row[f"lesion_{name}_slice"]) for name in ("first", "last"))
            assert (first, last + 1) == breast.labels.lesion_slices
        else:
            assert row["x0"] == row["lesion_slice"] == row["lesion_first_slice"] == "" and row["lesion_type"] == "none"
        assert float(row["glandular_fraction"]) == pytest.approx(breast.labels.glandular_fraction, abs=1e-4)
        assert row["vendor"] == "hologic"
        assert dicom.PatientID == row["patient"] and "not a patient" in dicom.ImageComments
        assert (dicom.BitsAllocated, dicom.BitsStored, dicom.PhotometricInterpretation) == (16, 12, "MONOCHROME2")
        assert dicom.PresentationIntentType == "FOR PRESENTATION"
        meaning = {"CC": "cranio-caudal", "MLO": "medio-lateral oblique"}[row["view"]]
        assert dicom.ViewCodeSequence[0].CodeMeaning == meaning
    assert len(uids) == 6


def test_geometry_of_a_tomosynthesis_file(tmp_path):
    write_archive(tmp_path, 4, seed=2, parameters=SMALL)
    for path in sorted(tmp_path.glob("*/*_dbt.dcm")):
        dicom = pydicom.dcmread(path)
        assert dicom.SOPClassUID == "1.2.840.10008.5.1.4.1.1.13.1.3" and dicom.NumberOfFrames == 10
        shared = dicom.SharedFunctionalGroupsSequence[0]
        assert shared.PixelMeasuresSequence[0].PixelSpacing == [1.8, 1.8]
        assert shared.PixelMeasuresSequence[0].SpacingBetweenSlices == 4.0
        assert shared.FrameAnatomySequence[0].FrameLaterality == path.name[0]
        assert shared.FrameVOILUTSequence[0].WindowWidth == 4096
        row, column = np.reshape([float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient], (2, 3))
        normal = np.cross(row, column)
        np.testing.assert_allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-6)
        assert row[1] == (-1 if path.name[0] == "L" else 1)  # nipple on the right of a left breast
        assert normal[2] < -0.7  # slices go down, from the paddle to the detector
        positions = [g.PlanePositionSequence[0].ImagePositionPatient for g in dicom.PerFrameFunctionalGroupsSequence]
        along = np.array(positions, float) @ normal
        np.testing.assert_allclose(np.diff(along), 4.0, atol=1e-4)
    mammogram = pydicom.dcmread(min(tmp_path.glob("*/*_2d.dcm")))
    assert mammogram.SOPClassUID == "1.2.840.10008.5.1.4.1.1.1.2" and mammogram.ImagerPixelSpacing == [1.8, 1.8]
    assert mammogram.ImageLaterality in "LR" and mammogram.ViewPosition in ("CC", "MLO")


@pytest.mark.slow
def test_archive_is_the_same_whatever_the_number_of_processes(tmp_path):
    """Compressed, too: each process has its encoder."""
    pytest.importorskip("imagecodecs")
    options = ["--num_slices", "6", "--height_px", "64", "--width_px", "48", "--pixel_spacing_mm", "2.5"]
    options += ["--num_patients", "3", "--transfer_syntax", "JPEGBaseline8Bit"]
    for name, processes in (("one", "1"), ("two", "2")):
        main(["--output", str(tmp_path / name), "--num_proc", processes, *options])
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 7 and files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*.*"))
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_labels_are_written_last_and_whole(tmp_path, monkeypatch):
    def save_until_full(dataset, path, transfer_syntax):
        if path.name.endswith("_2d.dcm"):
            raise OSError("disk full")
        save(dataset, path, transfer_syntax)

    save = archive.save
    monkeypatch.setattr(archive, "save", save_until_full)
    with pytest.raises(OSError, match="disk full"):
        write_archive(tmp_path, 1, parameters=SMALL)
    assert [path.name[-8:] for path in tmp_path.rglob("*.*")] == ["_dbt.dcm"]


def test_parameters_out_of_range_are_named():
    with pytest.raises(ValueError, match="num_slices=0 is outside 4 to 200"):
        PhantomParameters(num_slices=0)
    with pytest.raises(ValueError, match="vendor='kodak' must be one of hologic, siemens, ge, mixed"):
        PhantomParameters(vendor="kodak")
    with pytest.raises(ValueError, match="a field of 4 x 102.4 x 64 mm holds no breast: raise slices"):
        PhantomParameters(4, 256, 160, pixel_spacing_mm=0.4, slice_spacing_mm=1.0)
    with pytest.raises(SystemExit, match=r"^phantom: dose=0.0 is outside 0.01 to 100$"):
        main(["--output", "nowhere", "--dose", "0"])


@pytest.mark.parametrize(
    "shape",
    [(4, 48, 32, 4.0, 10.0), (10, 80, 38, 0.5, 1.0), (9, 131, 77, 1.5, 5.5), (60, 100, 60, 2.0, 1.0)],
)
@pytest.mark.filterwarnings("error")
def test_odd_shapes_have_breasts_and_lesions_too(shape):
    for vendor in GEOMETRIES:
        parameters = PhantomParameters(*shape, lesion_probability=1.0, vendor=vendor, dose=0.01)
        for index in range(4):
            breast = simulate_breast(parameters, 9, index)
            assert breast.labels.box is not None and np.isfinite(breast.volume).all()
            assert acquire_dbt(breast).shape == shape[:3] and acquire_2d(breast).max() > 500
