"""CBIS-DDSM: the real case files' counts; a made-up collection in the layouts of its downloads, with its masks."""

import os

import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_builders import CAPTURE, build, save

from dataset_scripts.benchmarks import cbis_ddsm as cbis_ddsm_boxes
from dataset_scripts.benchmarks.cbis_ddsm import (
    BENCHMARK,
    CACHE,
    FILES,
    locate,
    read_boxes,
    read_cases,
    read_index,
)
from dataset_scripts.benchmarks.task import located

SHAPE = (40, 30)


def test_the_real_files_have_the_published_counts(real):
    assert BENCHMARK.count(real) == BENCHMARK.published


@pytest.mark.slow
def test_the_real_index(real, caplog):
    with caplog.at_level("INFO"):
        index = read_index(real)
    assert "31 patients are in train and in test; removed from train: 64 images, of which 29 stay" in caplog.text
    assert index["split"].value_counts().to_dict() == {"train": 2420 - 64, "test": 641}
    patients = {split: set(of["patient_id"]) for split, of in index.groupby("split")}
    assert not patients["train"] & patients["test"]
    assert len(index) == 3032 - 35 and len(patients["test"]) == 349
    assert index["density"].isna().sum() == 2  # stated as 0
    assert not index["path"].str.contains(r"\s").any()
    labels = {each.name: each.label(index) for each in BENCHMARK.definitions}
    assert labels["malignant"].value_counts().to_dict() == {"malignant": 1332, "benign": 1665}
    assert labels["mass_or_calcification"].isna().sum() == 71  # both


# file, patient, side, view, number, type, assessment, pathology, density
CASES = [
    ("mass", "train", "P_1", "LEFT", "CC", 1, "mass", 4, "BENIGN", 3),
    ("mass", "train", "P_1", "LEFT", "CC", 2, "mass", 5, "MALIGNANT", 3),
    ("calc", "train", "P_1", "LEFT", "CC", 1, "calcification", 2, "BENIGN_WITHOUT_CALLBACK", 3),
    ("mass", "train", "P_2", "RIGHT", "CC", 1, "mass", 3, "BENIGN", 1),
    ("mass", "train", "P_2", "RIGHT", "MLO", 1, "mass", 3, "BENIGN", 1),
    ("calc", "test", "P_2", "RIGHT", "CC", 1, "calcification", 4, "MALIGNANT", 1),
    ("mass", "test", "P_3", "RIGHT", "CC", 1, "mass", 0, "BENIGN", 0),
]


def folder_of(kind, split, patient, side, view):
    return f"{kind.title()}-{'Training' if split == 'train' else 'Test'}_{patient}_{side}_{view}"


def write_cases(folder, cases=CASES):
    for kind, split in FILES:
        density = "breast_density" if kind == "mass" else "breast density"
        lines = [
            f"patient_id,{density},left or right breast,image view,abnormality id,abnormality type,shape,assessment,"
            "pathology,subtlety,image file path,cropped image file path,ROI mask file path"
        ]
        for of_kind, of_split, patient, side, view, number, kind_name, level, pathology, letter in cases:
            if (of_kind, of_split) == (kind, split):
                name = folder_of(kind, split, patient, side, view)
                lines.append(
                    f"{patient},{letter},{side},{view},{number},{kind_name},X,{level},{pathology},3,"
                    f'{name}/1.2/1.3/000000.dcm,{name}_{number}/1.4/1.5/000000.dcm,"{name}_{number}/1.4/1.6/000001.dcm\n"'
                )
        (folder / FILES[kind, split]).write_text("\n".join([*lines, ""]))
    return folder


def test_images_that_are_filed_twice_are_one_and_patients_in_test_leave_train(tmp_path, caplog):
    cases = [*CASES, ("calc", "test", "P_3", "RIGHT", "CC", 1, "calcification", 2, "BENIGN", 0)]
    with caplog.at_level("INFO"):
        index = read_index(write_cases(tmp_path, cases)).set_index("image_id")
    assert "1 patients are in train and in test; removed from train: 2 images, of which 1 stay in test" in caplog.text
    assert dict(index["split"]) == {"P_1_LEFT_CC": "train", "P_2_RIGHT_CC": "test", "P_3_RIGHT_CC": "test"}
    one, two, three = index.loc["P_1_LEFT_CC"], index.loc["P_2_RIGHT_CC"], index.loc["P_3_RIGHT_CC"]
    assert (one["cancer"], one["birads"], one["density"], one["lesion"]) == (1, 5, "C", 1)
    assert one["lesion_types"] == ["calcification", "mass"] and one["breast_id"] == "P_1_L"
    assert (two["cancer"], two["birads"]) == (1, 4)  # of the mass in train, too
    assert two["path"].startswith("Calc-Test_P_2_RIGHT_CC/")
    assert pd.isna(three["density"])  # stated as 0
    assert three["birads"] == 2  # 0, not complete, is not the higher
    counted = BENCHMARK.count(tmp_path)
    assert counted["images"] == 4 and counted["all: full images"] == 7 and counted["patients in train and test"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("pathology", "outcome"), "no column pathology; it has"),
        (("MALIGNANT", "UNKNOWN"), "row 2: pathology is 'UNKNOWN', not one of MALIGNANT, BENIGN"),
        (("P_1,3", "P_1,7"), "row 1: density is '7', not one of 0, 1, 2, 3, 4"),
        ((",LEFT,", ",BOTH,"), "row 1: side is 'BOTH'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, words):
    path = write_cases(tmp_path) / FILES["mass", "train"]
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=words) as caught:
        read_cases(tmp_path)
    assert FILES["mass", "train"] in str(caught.value) and "as downloaded from TCIA" in str(caught.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=FILES["mass", "train"]):
        read_cases(tmp_path)


def capture(folder, name, pixels, description):
    folder.mkdir(parents=True, exist_ok=True)
    return save(build(pixels, bits=8, SOPClassUID=CAPTURE, SeriesDescription=description), folder, name)


def mask_of(rows, columns, shape=SHAPE):
    mask = np.zeros(shape, np.uint8)
    mask[slice(*rows), slice(*columns)] = 255
    return mask


FULL, CROP = np.full(SHAPE, 90, np.uint8), np.full((7, 5), 80, np.uint8)
ROI = "ROI mask images"


@pytest.fixture
def collection(tmp_path):
    """Three images; masks before and after their crops, in one series and in two."""
    data_dir = write_cases(tmp_path, [each for each in CASES if each[2] != "P_2"] + [
        ("calc", "test", "P_4", "LEFT", "CC", 1, "calcification", 4, "BENIGN", 2),
    ])  # fmt: skip
    root = data_dir / "CBIS-DDSM"
    for kind, split, patient, side in (("mass", "train", "P_1", "LEFT"), ("mass", "test", "P_3", "RIGHT")):
        full = root / folder_of(kind, split, patient, side, "CC")
        capture(
            full / "07-20-2016-DDSM-NA-1" / "1.000000-full mammogram images-2", "1-1.dcm", FULL, "full mammogram images"
        )
    capture(
        root / "Calc-Test_P_4_LEFT_CC" / "1.2" / "1.3", "000000.dcm", FULL, "full mammogram images"
    )  # as in the CSV
    one = root / "Mass-Training_P_1_LEFT_CC_1" / "study" / "series"
    capture(one, "1-1.dcm", CROP, ROI)  # one series has one description
    capture(one, "1-2.dcm", mask_of((3, 9), (4, 6)), ROI)
    two = root / "Mass-Training_P_1_LEFT_CC_2" / "study" / "series"
    capture(two, "1-1.dcm", mask_of((0, 40), (29, 30)), ROI)
    capture(two, "1-2.dcm", CROP, ROI)
    apart = root / "Calc-Training_P_1_LEFT_CC_1" / "study"
    capture(apart / "a", "1-1.dcm", FULL, "cropped images")  # as large as the mammogram
    capture(apart / "b", "1-1.dcm", mask_of((5, 6), (7, 9)) // 255, ROI)
    return data_dir


def with_boxes(data_dir):
    return read_boxes(locate(read_index(data_dir), data_dir), data_dir)


def test_files_are_found_and_boxes_are_those_of_the_masks(collection, caplog):
    found = with_boxes(collection).set_index("image_id")
    assert found["path"].map(lambda path: (collection / path).is_file()).all()
    assert found.loc["P_1_LEFT_CC", "path"].endswith("1.000000-full mammogram images-2/1-1.dcm")
    assert found.loc["P_1_LEFT_CC", "boxes"] == [
        {"x0": 4, "y0": 3, "x1": 6, "y1": 9, "slice": -1, "label": "mass"},
        {"x0": 29, "y0": 0, "x1": 30, "y1": 40, "slice": -1, "label": "mass"},
        {"x0": 7, "y0": 5, "x1": 9, "y1": 6, "slice": -1, "label": "calcification"},
    ]
    assert found.loc[["P_3_RIGHT_CC", "P_4_LEFT_CC"], "boxes"].isna().all()  # no masks on disk
    assert "2 of 3 images have no boxes, by mask: 2 not on disk" in caplog.text


def test_masks_are_read_once(collection, monkeypatch):
    index = with_boxes(collection)
    monkeypatch.setattr(cbis_ddsm_boxes, "iter_slices", None)
    assert read_boxes(index, collection)["boxes"].tolist() == index["boxes"].tolist()
    (collection / CACHE).write_text("[damaged")
    with pytest.raises(TypeError):
        read_boxes(index, collection)


def test_only_who_asks_for_boxes_pays_for_the_masks(collection, monkeypatch):
    monkeypatch.setattr(cbis_ddsm_boxes, "iter_slices", None)
    assert located(BENCHMARK, collection)["boxes"].isna().all() and not (collection / CACHE).exists()
    with pytest.raises(TypeError):
        located(BENCHMARK, collection, with_boxes=True)


def test_folders_may_be_called_by_series_and_the_collection_by_any_case(collection):
    """The Imaging Data Commons and TCIA's own Python client; PatientID is what the retriever calls the folder."""
    expected = with_boxes(collection)
    for number, folder in enumerate(sorted((collection / "CBIS-DDSM").iterdir())):
        for file in folder.rglob("*.dcm"):
            dataset = pydicom.dcmread(file)
            dataset.PatientID = folder.name
            dataset.save_as(file)
        folder.rename(collection / "CBIS-DDSM" / f"1.2.{number}")
    (collection / CACHE).unlink()
    (collection / "CBIS-DDSM").rename(collection / "cbis_ddsm")
    found = with_boxes(collection)
    assert found["boxes"].tolist() == expected["boxes"].tolist()
    assert found["path"].map(lambda path: (collection / path).is_file()).all()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (mask_of((1, 2), (1, 2), (80, 60)), "of another size than the mammogram"),
        (np.zeros(SHAPE, np.uint8), "empty"),
        (np.arange(1200, dtype=np.uint32).reshape(SHAPE).astype(np.uint8), "of more than two values"),
    ],
)
def test_a_mask_that_cannot_be_used_costs_the_image_its_boxes_and_is_counted(collection, mask, reason, caplog):
    capture(collection / "CBIS-DDSM/Mass-Training_P_1_LEFT_CC_2/study/series", "1-1.dcm", mask, ROI)
    found = with_boxes(collection).set_index("image_id")
    assert found["boxes"].isna().all() and f"1 {reason}" in caplog.text


def test_two_masks_of_one_size_are_not_guessed(collection, caplog):
    capture(collection / "CBIS-DDSM/Mass-Training_P_1_LEFT_CC_1/study/series", "1-1.dcm", FULL, ROI)
    assert with_boxes(collection)["boxes"].isna().all() and "not told from its crop" in caplog.text


def test_a_replaced_mask_is_read_again(collection):
    index = with_boxes(collection)
    folder = collection / "CBIS-DDSM/Mass-Training_P_1_LEFT_CC_1/study/series"
    capture(folder, "1-1.dcm", np.full((9, 9), 80, np.uint8), ROI)
    capture(folder, "1-2.dcm", mask_of((0, 2), (0, 3)), ROI)
    first = read_boxes(index, collection)["boxes"][0][0]
    assert first == {"x0": 0, "y0": 0, "x1": 3, "y1": 2, "slice": -1, "label": "mass"}
    mask = capture(folder, "1-2.dcm", mask_of((1, 5), (2, 4)), ROI)  # as many bytes
    os.utime(mask, (1e9, 1e9))
    first = read_boxes(index, collection)["boxes"][0][0]
    assert first == {"x0": 2, "y0": 1, "x1": 4, "y1": 5, "slice": -1, "label": "mass"}


def test_a_folder_that_cannot_be_written_is_said(collection, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    found = with_boxes(collection)
    assert found["boxes"].notna().sum() == 1 and "not written (Permission denied)" in caplog.text


@pytest.mark.parametrize("place", ["", "CBIS-DDSM", "manifest-161/CBIS-DDSM"])
def test_where_the_collection_may_lie(tmp_path, place, caplog):
    data_dir = write_cases(
        tmp_path, [*CASES, ("calc", "test", "P_3", "RIGHT", "CC", 1, "calcification", 2, "BENIGN", 0)]
    )
    capture(
        tmp_path / place / "Calc-Training_P_1_LEFT_CC" / "x" / "y", "1-1.dcm", FULL, ""
    )  # the copy with calcifications
    found = locate(read_index(data_dir), data_dir).set_index("image_id")
    assert found.loc["P_1_LEFT_CC", "path"] == (f"{place}/" if place else "") + "Calc-Training_P_1_LEFT_CC/x/y/1-1.dcm"
    assert "cbis_ddsm: 2 of 3 images are not there, first P_2_RIGHT_CC: looked below" in caplog.text
    caplog.clear()
    assert with_boxes(data_dir)["boxes"].isna().all() and "boxes" not in caplog.text  # no masks at all
    assert found.loc["P_2_RIGHT_CC", "path"] == "Calc-Test_P_2_RIGHT_CC/1.2/1.3/000000.dcm"  # not there: as stated
