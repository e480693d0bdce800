"""CDD-CESM: the real annotation file's counts; a made-up one with its quirks, in both names and spellings."""

import pandas as pd
import pytest

from dataset_scripts.benchmarks.cdd_cesm import (
    ANNOTATIONS,
    BENCHMARK,
    FOLDERS,
    LESION_SHEETS,
    OTHER_SHEETS,
    locate,
    read_index,
)
from dataset_scripts.benchmarks.export import main as export

LOW = FOLDERS["DM"]


def test_the_real_file_has_the_published_counts(real):
    assert BENCHMARK.count(real) == BENCHMARK.published


def test_the_real_index(real, caplog):
    with caplog.at_level("INFO"):
        index = read_index(real)
    assert "2 rows repeat a name and its labels" in caplog.text
    assert len(index) == 1001 and index["patient_id"].nunique() == 326 and index["cancer"].sum() == 331
    assert not index["path"].str.contains(r" \.|\s$").any()
    labels = {(each.task, each.name): each.label(index) for each in BENCHMARK.definitions}
    assert labels["lesion", "described"].value_counts().to_dict() == {"lesion": 577, "no lesion": 328}
    assert labels["birads", "highest"].isna().sum() == 4 and labels["density", "ab_c_d"].isna().sum() == 81
    assert labels["lesion_type", "four"].value_counts()["architectural distortion"] == 16
    assert "16 alone" in BENCHMARK.definition("lesion_type").meaning
    subtracted = read_index(real, "CESM")
    assert len(subtracted) == 1001 and subtracted["cancer"].sum() == 331
    assert subtracted["density"].notna().sum() > 900  # stated with the low-energy images of the breast
    names = {path.name for path in (real / "subtracted_512").rglob("*.png")}
    assert names <= {f"{name}.png" for name in subtracted["image_id"]}


COLUMNS = [
    "Image_name", "Patient_ID", "Side", "Type", "Breast density (ACR)", "BIRADS", "View", "Machine",
    "Pathology Classification/ Follow up",
]  # fmt: skip
ROWS = [
    ("P1_L_DM_CC ", 1, "L", "DM", "C", "4$2", "CC", 1, "Malignant"),
    ("P1_L_DM_MLO", 1, "L", "DM", "_", "2$4", "MLO", 1, "Malignant"),
    ("P1_L_CM_CC", 1, "L", "CESM", "_", "5", "CC", 1, "Malignant"),
    ("P2_R_DM_CC", 2, "R", "DM", "B", "1", "CC", 1, "Normal "),
    ("P2_R_DM_CC", 2, "R", "DM", "B", "1", "CC", 1, "Normal"),  # twice
    ("P2_R_DM_MLO", 2, "R", "DM", "B", "2", "MLO", 1, "Benign"),
    ("P3_L_DM_CC", 3, "L", "DM", "_", "6", "CC", 2, "Normal"),
]
SHEETS = {
    "mass_description": ["P1_L_DM_CC", "P1_L_DM_MLO "],
    "calcifications": ["P1_L_DM_MLO"],
    "mass enhancement_description": ["P1_L_CM_CC"],
}


def write(folder, rows=ROWS, columns=COLUMNS, name=ANNOTATIONS[0], without=()):
    with pd.ExcelWriter(folder / name) as writer:
        pd.DataFrame(rows, columns=columns).to_excel(writer, sheet_name="all", index=False)
        for sheet in (*LESION_SHEETS, *OTHER_SHEETS):
            if sheet not in without:
                names = SHEETS.get(sheet, ["P9_L_DM_CC"])
                pd.DataFrame({"Image_name": names}).to_excel(writer, sheet_name=sheet, index=False)
    return folder


def test_rows(tmp_path, caplog):
    with caplog.at_level("INFO"):
        index = read_index(write(tmp_path)).set_index("image_id")
    assert list(index.index) == ["P1_L_DM_CC", "P1_L_DM_MLO", "P2_R_DM_CC", "P2_R_DM_MLO", "P3_L_DM_CC"]
    assert "1 rows repeat a name" in caplog.text
    assert list(index["birads"]) == [4, 4, 1, 2, 6]  # the highest of a compound
    assert list(index["density"].fillna("-")) == ["C", "C", "B", "B", "-"]  # filled in of the same breast
    assert list(index["cancer"]) == [1, 1, 0, 0, 0]
    assert list(index["lesion"].fillna(-1)) == [1, 1, 0, -1, 0]  # Benign without a described finding: unclear
    assert list(index["lesion_types"]) == [["mass"], ["calcification", "mass"], [], [], []]
    assert index.loc["P1_L_DM_CC", "path"] == f"{LOW}/P1_L_DM_CC.jpg"
    assert index.loc["P1_L_DM_CC", "breast_id"] == "P1_L" and index["split"].isna().all()


def test_the_subtracted_images_are_another_index(tmp_path):
    (row,) = read_index(write(tmp_path), "CESM").to_dict("records")
    assert row["path"] == f"{FOLDERS['CESM']}/P1_L_CM_CC.jpg" and row["lesion_types"] == ["mass enhancement"]
    assert row["density"] == "C"
    with pytest.raises(ValueError, match="image_type 'CM': not one of DM, CESM"):
        read_index(tmp_path, "CM")


def test_the_older_name_and_other_spellings_of_columns(tmp_path):
    columns = [*COLUMNS[:4], "ACR", *COLUMNS[5:8], "Pathology"]
    index = read_index(write(tmp_path, columns=columns, name=ANNOTATIONS[1]))
    assert list(index["density"].fillna("-")) == ["C", "C", "B", "B", "-"] and index["cancer"].sum() == 2


def test_without_any_image_there_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"export: .*: 5 of 5 image files are missing, first .*jpg; give the folder"):
        export(["cdd_cesm", "--data-dir", str(write(tmp_path)), "--output", str(tmp_path / "out"), "--allow-missing"])


@pytest.mark.parametrize("place", ["", "cdd_cesm/"])
def test_names_on_disk_with_stray_blanks(tmp_path, place, caplog):
    folder = tmp_path / place / LOW
    folder.mkdir(parents=True)
    for name in ("P1_L_DM_CC .jpg", "P1_L_DM_MLO.JPG", "P2_R_DM_CC.jpg"):
        (folder / name).touch()
    paths = locate(read_index(write(tmp_path)), tmp_path)["path"]
    where = f"{place}{LOW}"
    assert list(paths)[:3] == [f"{where}/P1_L_DM_CC .jpg", f"{where}/P1_L_DM_MLO.JPG", f"{where}/P2_R_DM_CC.jpg"]
    assert list(paths)[3] == f"{LOW}/P2_R_DM_MLO.jpg"  # not there: as the file names it
    assert f"first {LOW}/P2_R_DM_MLO.jpg: looked below {tmp_path}" in caplog.text


def test_labels(tmp_path):
    index = read_index(write(tmp_path)).set_index("image_id")

    def label(*definition):
        return list(BENCHMARK.definition(*definition).label(index).fillna("-"))

    assert label("birads") == ["4", "4", "1", "2", "-"]
    assert label("density") == ["C", "C", "A or B", "A or B", "-"]
    assert label("lesion_type") == ["mass", "-", "-", "-", "-"]
    assert label("lesion") == ["lesion", "lesion", "no lesion", "-", "no lesion"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("P4_L_DM_CC", 5, "L", "DM", "_", "1", "CC", 1, "Normal"), "row 8: name is 'P4_L_DM_CC', not P<patient>"),
        (("P4_L_CESM_CC", 4, "L", "CESM", "_", "1", "CC", 1, "Normal"), "row 8: name"),
        (("P4_L_DM_CC", 4, "L", "DM", "_", "4-2", "CC", 1, "Normal"), "row 8: birads is '4-2', not levels"),
        (("P4_L_DM_CC", 4, "L", "DM", "E", "1", "CC", 1, "Normal"), "row 8: density is 'E'"),
        (("P4_L_DM_CC", 4, "L", "DM", "A", "1", "CC", 1, "Unknown"), "row 8: pathology is 'Unknown'"),
        (("P2_R_DM_CC", 2, "R", "DM", "B", "4", "CC", 1, "Benign"), "earlier row with other labels"),
        (("P2_R_CM_CC", 2, "R", "CESM", "A", "4", "CC", 1, "Benign"), "density is 'A', but another image .* has B"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, row, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_index(write(tmp_path, [*ROWS, row]))
    assert "sheet 'all'" in str(caught.value)


def test_a_missing_sheet_and_a_missing_column(tmp_path):
    with pytest.raises(ValueError, match="no sheet 'asymmetry'; it has 'all'"):
        read_index(write(tmp_path, without=["asymmetry"]))
    with pytest.raises(ValueError, match="sheet 'all': no column BIRADS; it has"):
        read_index(write(tmp_path, columns=[each.replace("BIRADS", "RADS") for each in COLUMNS]))
