"""CMMD: the real clinical file's and manifest's counts; a made-up collection whose headers say which view is where."""

import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_builders import build, item, save

from dataset_scripts.benchmarks.cmmd import BENCHMARK, CLINICAL, COLUMNS, MANIFEST, locate, read_index

VIEW = {"CC": "cranio-caudal", "MLO": "medio-lateral oblique"}
# ID1, side, age, number, abnormality, classification, subtype
CLINICAL_ROWS = [
    ("D1-0001", "R", 44, 2, "calcification", "Benign", None),
    ("D1-0002", "L", 40, 2, "both", "Malignant", None),
    ("D1-0002", "R", 40, 2, "mass", "Benign", None),
    ("D2-0001", "L", 60, 2, "mass", "Malignant", "Luminal A"),
]
MANIFEST_ROWS = [("D1-0001", 2), ("D1-0002", 4), ("D2-0001", 4)]


def test_the_real_files_have_the_published_counts(real):
    assert BENCHMARK.count(real) == BENCHMARK.published


def test_the_real_index(real):
    index = read_index(real)
    assert len(index) == 5202 and index["path"].isna().all() and index["split"].isna().all()
    assert index["patient_id"].nunique() == 1775
    labels = {(each.task, each.name): each.label(index) for each in BENCHMARK.definitions}
    assert labels["cancer", "malignant"].value_counts().to_dict() == {"malignant": 2632, "benign": 1112}
    assert labels["cancer", "contralateral_negative"].value_counts()["not malignant"] == 1112 + 1458
    assert labels["lesion", "contralateral_negative"].value_counts().to_dict() == {"lesion": 3744, "unlabeled": 1458}
    assert labels["lesion_type", "mass_or_calcification"].value_counts().to_dict() == {
        "mass": 2 * 1149,
        "calcification": 2 * 262,
    }


def write(folder, clinical=CLINICAL_ROWS, manifest=MANIFEST_ROWS):
    pd.DataFrame(clinical, columns=list(COLUMNS)).to_excel(folder / CLINICAL, sheet_name="Sheet1", index=False)
    if manifest:
        lines = [f"{patient},{number},.\\CMMD\\{patient}\\study\\1.0-NA" for patient, number in manifest]
        (folder / MANIFEST).write_text("\n".join(["Subject ID,Number of Images,File Location", *lines, ""]))
    return folder


def mammogram(folder, name, side, view):
    folder.mkdir(parents=True, exist_ok=True)
    dataset = build(np.full((4, 4), 9, np.uint16), ImageLaterality=side)
    dataset.ViewCodeSequence = [item(CodeMeaning=VIEW[view])]
    return save(dataset, folder, name)


def test_rows(tmp_path):
    index = read_index(write(tmp_path)).set_index("image_id")
    assert list(index.index) == [
        "D1-0001_R_CC", "D1-0001_R_MLO",
        "D1-0002_L_CC", "D1-0002_L_MLO", "D1-0002_R_CC", "D1-0002_R_MLO",
        "D2-0001_L_CC", "D2-0001_L_MLO", "D2-0001_R_CC", "D2-0001_R_MLO",
    ]  # fmt: skip
    both = index.loc["D1-0002_L_MLO"]
    assert (both["breast_id"], both["view"], both["cancer"], both["lesion"]) == ("D1-0002_L", "MLO", 1, 1)
    assert both["lesion_types"] == ["calcification", "mass"]
    assert index.loc["D1-0002_R_CC"]["cancer"] == 0
    unlabeled = index.loc[["D2-0001_R_CC", "D2-0001_R_MLO"], ["cancer", "lesion", "lesion_types"]]
    assert unlabeled.isna().all(axis=None)
    assert index[["birads", "density", "boxes", "split", "path"]].isna().all(axis=None)


def test_without_the_manifest_only_labeled_breasts_are_known(tmp_path, caplog):
    index = read_index(write(tmp_path, manifest=None))
    assert len(index) == 8 and index["cancer"].notna().all()
    assert "no metadata.csv, so unlabeled breasts are not known; the index has the 8 labeled images only" in caplog.text
    counted = BENCHMARK.count(tmp_path)
    assert counted["labeled breasts"] == 4 and not any("images" in name for name in counted)


@pytest.mark.parametrize("place", ["CMMD", "", "manifest-1/CMMD"])
def test_headers_say_which_file_is_which(tmp_path, place, caplog):
    folder = write(tmp_path) / place
    mammogram(folder / "D1-0001" / "07-18-2010-NA-NA-79377" / "1.0", "1-1.dcm", "R", "MLO")
    mammogram(folder / "D1-0001" / "07-18-2010-NA-NA-79377" / "1.0", "1-2.dcm", "R", "CC")
    for number, (side, view) in enumerate([("R", "CC"), ("R", "CC"), ("L", "MLO"), ("L", "CC")]):  # R_CC twice
        mammogram(folder / "D2-0001" / "x" / "y", f"1-{number}.dcm", side, view)
    paths = locate(read_index(tmp_path), tmp_path).set_index("image_id")["path"].dropna()
    prefix = f"{place}/" if place else ""
    assert paths.to_dict() == {
        "D1-0001_R_CC": f"{prefix}D1-0001/07-18-2010-NA-NA-79377/1.0/1-2.dcm",
        "D1-0001_R_MLO": f"{prefix}D1-0001/07-18-2010-NA-NA-79377/1.0/1-1.dcm",
        "D2-0001_L_MLO": f"{prefix}D2-0001/x/y/1-2.dcm",
        "D2-0001_L_CC": f"{prefix}D2-0001/x/y/1-3.dcm",
    }
    assert "files of 1 patients share side and view" in caplog.text and "first D2-0001" in caplog.text


@pytest.mark.parametrize("layout", ["cmmd/{patient}/1.2.3/MG_1.2.4", "tciaDownload/1.2.{number}"])
def test_todays_clients_are_found_and_where_was_looked_is_said(tmp_path, layout, caplog):
    """idc-index writes the collection in lower case, tcia_utils a folder for each series."""
    write(tmp_path)
    for number, view in enumerate(VIEW):
        folder = tmp_path / layout.format(patient="D1-0001", number=number)
        dataset = pydicom.dcmread(mammogram(folder, f"{number}.dcm", "R", view))
        dataset.PatientID = "D1-0001"
        dataset.save_as(folder / f"{number}.dcm")
    paths = locate(read_index(tmp_path), tmp_path).set_index("image_id")["path"]
    assert paths[["D1-0001_R_CC", "D1-0001_R_MLO"]].notna().all() and paths.notna().sum() == 2
    assert f"cmmd: 8 of 10 images are not there, first D1-0002_L_CC: looked below {tmp_path}" in caplog.text
    assert "and for PatientID in the headers" in caplog.text


def test_a_location_with_backslashes(tmp_path):
    """Where folders are not called by patients."""
    write(tmp_path)
    (tmp_path / MANIFEST).write_text(
        "Subject ID,Number of Images,File Location\nD1-0001,2,.\\data\\a b\\1.0-NA\nD1-0002,4,x\nD2-0001,4,x\n"
    )
    mammogram(tmp_path / "data" / "a b" / "1.0-NA", "1-1.dcm", "R", "MLO")
    paths = locate(read_index(tmp_path), tmp_path).set_index("image_id")["path"].dropna()
    assert paths.to_dict() == {"D1-0001_R_MLO": "data/a b/1.0-NA/1-1.dcm"}


@pytest.mark.parametrize(
    ("clinical", "manifest", "words"),
    [
        ([*CLINICAL_ROWS, CLINICAL_ROWS[0]], MANIFEST_ROWS, "row 5: ID1 is 'D1-0001', which has a row for R before"),
        ([("D1-1", "R", 4, 2, "scar", "Benign", "")], MANIFEST_ROWS, "abnormality is 'scar', not one of mass"),
        ([("D1-1", "R", 4, 2, "mass", "Normal", "")], MANIFEST_ROWS, "classification is 'Normal'"),
        (CLINICAL_ROWS, [("D1-0001", 2), ("D1-0002", 2), ("D2-0001", 4)], "D1-0002 has 2 rows, but 2 images"),
        (CLINICAL_ROWS, [("D1-0001", 3), ("D1-0002", 4), ("D2-0001", 4)], "D1-0001 has 1 rows, but 3 images"),
        (CLINICAL_ROWS, MANIFEST_ROWS[:2], "no line for 1 patients, first D2-0001"),
        (CLINICAL_ROWS, [*MANIFEST_ROWS, ("D2-0002", 4)], "D2-0002 has 0 rows, but 4 images"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, clinical, manifest, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_index(write(tmp_path, clinical, manifest))
    assert "as downloaded from TCIA" in str(caught.value)


def test_there_is_no_birads_and_no_density():
    for task in ("birads", "density"):
        with pytest.raises(ValueError, match="no labels for it; it has cancer, lesion, lesion_type"):
            BENCHMARK.definition(task)
    assert any("3,728" in note and "3,744" in note for note in BENCHMARK.notes) and not BENCHMARK.no_sharing
