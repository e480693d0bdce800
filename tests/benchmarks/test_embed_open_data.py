"""EMBED: made-up tables of the released ones' columns, with their quirks; boxes against pixels of made-up files."""

import json

import numpy as np
import pandas as pd
import pytest
from dicom_builders import build, save

from dataset_scripts.benchmarks.embed_open_data import (
    BENCHMARK,
    DESCRIPTORS,
    FINDING_COLUMNS,
    IMAGE_COLUMNS,
    read_index,
)
from dataset_scripts.benchmarks.task import load_task, located

BOTH, SCREENING = "MG Diagnostic Mammo Bilateral", "MG Screening Bilateral w/CAD"
# examination, description, side, assessment, density, severity, side of the biopsy, descriptors
FINDINGS = [
    ("e1", SCREENING, "", "N", "2.0", "", "", {}),  # no side: both
    ("e2", SCREENING, "L", "A", "3.0", "", "", {"massshape": "S"}),  # of the right breast nothing is said: negative
    ("e3", BOTH, "L", "S", "4.0", "0.0", "L", {"massshape": "X", "massmargin": "I"}),
    ("e3", BOTH, "L", "B", "4.0", "", "", {"calcfind": "V"}),
    ("e3", BOTH, "R", "P", "4.0", "", "", {"massshape": "Q"}),
    ("e4", "MG Diagnostic Left", "L", "S", "5.0", "4.0", "", {"calcdistri": "G"}),  # a man; the right is not imaged
    ("e5", BOTH, "B", "M", "", "1.0", "R", {"massdens": "="}),  # described on both, taken from the right
    ("e6", BOTH, "L", "X", "1.0", "6.0", "", {}),
    ("e7", SCREENING, "R", "B", "1.0", "", "", {"calcnumber": "3"}),
]


def image(exam, side, view="CC", kind="2D", spot="", boxes="()", patient=None):
    name = f"1.2.{exam[1:]}.{side}.{view}.{kind}{spot}"
    path = f"./images/cohort_1/{patient or 'p' + exam}/{exam}/1.2.3/{name}.dcm"
    return (patient or "p" + exam, exam, path, kind, side, view, spot, boxes)


IMAGES = [
    *(image(exam, side) for exam in ("e1", "e2", "e3", "e5", "e6", "e7") for side in "LR"),
    image("e4", "L", "MLO", patient="pe3"),
    image("e3", "L", kind="cview", boxes="((10, 4, 19, 11), (30, 2, 39, 7))"),
    image("e3", "L", spot="1.0"),
    image("e3", "L", kind="ROI_SSC"),
]


def write(folder, findings=FINDINGS, images=IMAGES, reduced=False, **more):
    """tables/ of findings and images, with columns that nobody reads."""
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    rows = [dict(zip(FINDING_COLUMNS, ("p" + exam, exam, *rest), strict=True)) | dict.fromkeys(DESCRIPTORS, "") | of
            for exam, *rest, of in findings]  # fmt: skip
    clinical = pd.DataFrame(rows).assign(GENDER_DESC="Female").drop(columns=list(DESCRIPTORS) if reduced else [])
    ending = "_reduced" if reduced else ""
    clinical.to_csv(folder / "tables" / f"EMBED_OpenData_clinical{ending}.csv", index=False)
    metadata = pd.DataFrame(images, columns=IMAGE_COLUMNS).assign(num_roi=0, **more)
    metadata.to_csv(folder / "tables" / f"EMBED_OpenData_metadata{ending}.csv")
    return folder


def of_breasts(index, column):
    """Cells by examination and side, of the first image of each."""
    first = index.drop_duplicates("breast_id").set_index("breast_id")[column]
    return {name: None if isinstance(cell, type(pd.NA)) else cell for name, cell in first.items()}


def test_findings_belong_to_their_breast(tmp_path):
    index = read_index(write(tmp_path))
    assert of_breasts(index, "birads") == {
        "e1_L": 1, "e1_R": 1, "e2_L": 0, "e2_R": 1, "e3_L": 4, "e3_R": 3, "e4_L": 4, "e5_L": 5, "e5_R": 5, "e6_L": None,
        "e6_R": 1, "e7_L": 1, "e7_R": 2,
    }  # fmt: skip
    assert of_breasts(index, "cancer") == {
        "e1_L": 0, "e1_R": 0, "e2_L": None, "e2_R": 0, "e3_L": 1, "e3_R": 0, "e4_L": 0, "e5_L": None, "e5_R": 1,
        "e6_L": None, "e6_R": 0, "e7_L": 0, "e7_R": 0,
    }  # fmt: skip
    types = of_breasts(index, "lesion_types")
    assert types["e3_L"] == ["calcification", "mass"] and types["e3_R"] == ["architectural distortion"]
    assert types["e2_L"] == ["asymmetry"] and types["e5_L"] == types["e5_R"] == ["mass"] and types["e1_L"] == []
    assert types["e7_R"] == ["calcification"] and types["e6_L"] is None
    assert of_breasts(index, "density") == {
        **{f"{exam}_{side}": letter for exam, letter in zip(("e1", "e2", "e3", "e6", "e7"), "BCDAA", strict=True)
           for side in "LR"}, "e4_L": None, "e5_L": None, "e5_R": None,
    }  # fmt: skip


def test_images_are_mammograms_and_c_views_of_patients(tmp_path):
    index = read_index(write(tmp_path))
    assert len(index) == len(IMAGES) - 2 and index["path"].str.startswith("images/cohort_1/p").all()
    assert index["patient_id"].nunique() == 6 and set(index["view"]) == {"CC", "MLO"}
    older = [(*each[:2], each[2].replace("./images", "/mnt/NAS2/mammo/anon_dicom"), *each[3:]) for each in IMAGES]
    pd.testing.assert_frame_equal(read_index(write(tmp_path / "older", images=older)), index)
    one = write(tmp_path / "one")
    (one / "images").rmdir()
    assert read_index(one)["path"].str.startswith("cohort_1/p").all()


def test_definitions(tmp_path):
    index = read_index(write(tmp_path)).drop_duplicates("breast_id").set_index("breast_id")
    label = {(each.task, each.name): each.label(index).dropna().to_dict() for each in BENCHMARK.definitions}
    assert label["cancer", "biopsied"] == {"e3_L": "cancer", "e4_L": "benign", "e5_R": "cancer"}
    assert label["birads", "recall"]["e2_L"] == "recall" and "e3_L" not in label["birads", "recall"]
    assert label["lesion", "described"]["e2_R"] == "no lesion" and label["lesion", "described"]["e7_R"] == "lesion"
    assert "e3_L" not in label["lesion_type", "lexicon"] and label["lesion_type", "lexicon"]["e5_L"] == "mass"
    assert BENCHMARK.definition("cancer").name == "pathology_or_negative" and "clause 4" in BENCHMARK.no_sharing
    assert any("Clause 5" in note for note in BENCHMARK.notes)


def test_the_short_tables_say_less(tmp_path):
    index = read_index(write(tmp_path, reduced=True))
    assert of_breasts(index, "lesion_types")["e3_L"] is None and of_breasts(index, "lesion")["e1_L"] == 0
    assert of_breasts(index, "cancer")["e3_L"] == 1
    assert "masses with A" not in BENCHMARK.count(tmp_path)


def test_counts_are_those_of_the_tables(tmp_path):
    counts = BENCHMARK.count(write(tmp_path))
    assert counts["images"] == len(IMAGES) and counts["images of cview"] == 1 and counts["findings"] == len(FINDINGS)
    assert counts["examinations with findings"] == 7 and counts["examinations of screening"] == 3
    assert counts["findings of screening with N or B"] == 2 and counts["findings with A"] == 1
    assert counts["asymmetries with A"] == 1 and counts["masses with A"] == 0
    assert set(BENCHMARK.published) <= set(counts)


@pytest.mark.parametrize("orientation,side", [("P\\L", "L"), ("A\\R", "L"), ("", "L"), ("", "R"), ("P\\L", "R")])
def test_boxes_lie_on_what_they_were_drawn_around(tmp_path, orientation, side):
    """A bright box in the publisher's PNG file, which is the DICOM turned where its rows run to the back."""
    turned = orientation.startswith("P") or (not orientation and side == "R")
    png = np.zeros((60, 48), np.uint16)
    png[10:20, 4:12] = 4000
    rows = [*IMAGES, image("e5", side, "MLO", boxes="((10, 4, 19, 11),)")]
    folder = write(tmp_path, images=rows)
    path = folder / rows[-1][2].removeprefix("./")
    path.parent.mkdir(parents=True)
    about = {"PatientOrientation": orientation.split("\\")} if orientation else {}
    dicom = np.ascontiguousarray(png[:, ::-1]) if turned else png
    save(build(dicom, ViewPosition="MLO", **about), path.parent, path.name)
    index = located(BENCHMARK, folder, with_boxes=True).set_index("image_id")
    (box,) = index["boxes"][path.stem]
    inside = np.zeros_like(dicom)
    inside[int(box["y0"]) : int(box["y1"]), int(box["x0"]) : int(box["x1"])] = 4000
    np.testing.assert_array_equal(inside, dicom)
    assert box["label"] == "mass" and box["slice"] == -1
    assert index["boxes"].notna().sum() == 1  # the other image with boxes is not there


def test_boxes_in_pixels_of_the_dicom_are_taken_as_they_are(tmp_path):
    folder = write(tmp_path, DCM_ROI_coords=["[[[1, 2, 3, 4]]]", *[""] * (len(IMAGES) - 1)])
    index = located(BENCHMARK, folder, with_boxes=True).set_index("image_id")
    assert index["boxes"]["1.2.1.L.CC.2D"] == [{"x0": 2, "y0": 1, "x1": 5, "y1": 4, "slice": -1, "label": "lesion"}]
    assert index["boxes"].notna().sum() == 1


def test_a_task(tmp_path):
    findings = [(f"e{n}", SCREENING, "", "N", str(1 + n % 4), "", "", {}) for n in range(40)]
    images = [image(f"e{n}", side) for n in range(40) for side in "LR"]
    folder = write(tmp_path, findings, images)
    for each in images:
        path = folder / each[2].removeprefix("./")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    loaded = load_task("embed_open_data", folder, "density")
    assert loaded.classes == ("A", "B", "C", "D") and loaded.official == () and len(loaded.table) == 80
    assert json.dumps(loaded.counts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"side": "left"}, "clinical.csv, row 1: side is 'left', not one of L, R, B, empty"),
        ({"asses": "Z"}, "row 1: asses is 'Z', not one of N, B"),
        ({"path_severity": "7"}, "row 1: path_severity is '7', not 0 to 6"),
        ({"tissueden": "dense"}, "row 1: tissueden is 'dense', not a number"),
    ],
)
def test_a_finding_that_makes_no_sense_is_named(tmp_path, change, words):
    path = write(tmp_path) / "tables" / "EMBED_OpenData_clinical.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[0, list(change)] = list(change.values())
    table.to_csv(path, index=False)
    with pytest.raises(ValueError, match=words):
        read_index(tmp_path)


def test_what_is_not_there_or_no_box_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tables/EMBED_OpenData_metadata_reduced.csv or .*; give the folder"):
        read_index(tmp_path)
    write(tmp_path, DCM_ROI_coords=["((1, 2, 3),)", *[""] * (len(IMAGES) - 1)])
    with pytest.raises(ValueError, match="row 1: DCM_ROI_coords is .*not boxes of four numbers"):
        read_index(tmp_path)
    write(tmp_path, DCM_ROI_coords=["((5, 2, 3, 4),)", *[""] * (len(IMAGES) - 1)])
    with pytest.raises(ValueError, match="ymin and xmin must not be above"):
        read_index(tmp_path)
