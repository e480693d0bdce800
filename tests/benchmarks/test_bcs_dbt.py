"""BCS-DBT as a benchmark: the real label files' counts; made-up lists in the names of both releases."""

import pytest
from dicom_builders import build, save

from dataset_scripts.benchmarks.bcs_dbt import BENCHMARK, locate, read_index, read_views


def test_the_real_files_have_the_published_counts(real):
    assert BENCHMARK.count(real) == {
        name: number for name, number in BENCHMARK.published.items() if name.startswith("train: ")
    }


def test_the_real_index(real, caplog):
    with caplog.at_level("INFO"):
        index = read_index(real)
    assert "no labels of validation and test: a part of the collection" in caplog.text
    assert "from BCS-DBT-labels-train-v2.csv, BCS-DBT-boxes-train-v2.csv; what other lists say" in caplog.text
    assert len(index) == 19148 and set(index["split"]) == {"train"} and index["path"].isna().all()
    assert set(index["view"]) == {"CC", "MLO"} and index["patient_id"].nunique() == 4362
    assert index["boxes"].dropna().map(len).sum() == 224 and (index["boxes"].dropna().map(len) > 0).sum() == 200
    assert index["boxes"].isna().sum() == 716  # actionable
    labels = {each.task: each.label(index) for each in BENCHMARK.definitions}
    assert labels["cancer"].value_counts().to_dict() == {"no cancer": 19072, "cancer": 76}
    assert labels["lesion"].value_counts().to_dict() == {"normal": 18232, "lesion": 200}
    types = labels["lesion_type"].value_counts().to_dict()
    assert types == {"mass": 128, "architectural distortion": 68}  # and four views with both


LABELS = "PatientID,StudyUID,View,Normal,Actionable,Benign,Cancer"
BOXES = "PatientID,StudyUID,View,Subject,Slice,X,Y,Width,Height,Class,AD,VolumeSlices"
PATHS = "PatientID,StudyUID,View,descriptive_path,classic_path"
ROWS = {
    "labels-train-v2": [LABELS, "P1,S1,lcc,0,0,0,1", "P1,S1,lmlo2,1,0,0,0", "P1,S1,rcc,0,1,0,0"],
    "boxes-train-v2": [BOXES, "P1,S1,lcc,0,16,10,20,30,40,cancer,0,49", "P1,S1,lcc,0,0,1,2,3,4,benign,1,49"],
    "file-paths-train-v2": [
        PATHS,
        "P1,S1,lcc,C/P1/d-S1/e-1/1-1.dcm,C/P1/1.2/1.3/1-1.dcm",
        "P1,S1,lmlo2,C\\P1\\d-S1\\e-2\\1-1.dcm,C\\P1\\1.2\\1.4\\1-1.dcm",
        "P1,S1,rcc,C/P1/d-S1/e-3/1-1.dcm,C/P1/1.2/1.5/1-1.dcm",
    ],
    "labels-validation-PHASE-2-Jan-2024": [LABELS, "P2,S2,rmlo,0,0,1,0"],
    "boxes-validation-v2-PHASE-2-Jan-2024": [BOXES.replace(",AD", ""), "P2,S2,rmlo,0,3,10,20,30,40,benign,5"],
    "labels-test": [LABELS, "P3,S3,rcc,1,0,0,0"],
}


def write(folder, **changes):
    for name, lines in {**ROWS, **{name.replace("__", "-"): lines for name, lines in changes.items()}}.items():
        (folder / f"BCS-DBT-{name}.csv").write_text("\n".join([*lines, ""]))
    return folder


def test_rows(tmp_path):
    index = read_index(write(tmp_path)).set_index("image_id")
    assert dict(index["split"]) == {
        "S1_lcc": "train", "S1_lmlo2": "train", "S1_rcc": "train", "S2_rmlo": "validation", "S3_rcc": "test",
    }  # fmt: skip
    cancer, normal, actionable, benign, untold = (index.iloc[row] for row in range(5))
    assert (cancer["breast_id"], cancer["laterality"], cancer["view"]) == ("S1_L", "L", "CC")
    assert (cancer["cancer"], cancer["lesion"]) == (1, 1)
    assert cancer["boxes"] == [
        {"x0": 10, "y0": 20, "x1": 40, "y1": 60, "slice": 16, "label": "cancer"},
        {"x0": 1, "y0": 2, "x1": 4, "y1": 6, "slice": 0, "label": "benign"},
    ]
    assert cancer["lesion_types"] == ["architectural distortion", "mass"]
    assert cancer["path"] == "C/P1/d-S1/e-1/1-1.dcm"
    assert (normal["view"], normal["lesion"], normal["boxes"], normal["lesion_types"]) == ("MLO", 0, [], [])
    assert normal["path"] == "C/P1/d-S1/e-2/1-1.dcm"
    assert actionable["cancer"] == 0 and actionable[["lesion", "boxes", "lesion_types"]].isna().all()
    assert benign["cancer"] == 0 and len(benign["boxes"]) == 1
    assert benign["lesion_types"] is None  # this list has no AD
    assert untold["lesion"] == 0 and untold["boxes"] is None  # no list of boxes


def test_counts(tmp_path):
    counted = {name: number for name, number in BENCHMARK.count(write(tmp_path)).items() if number}
    assert {name.removeprefix("all: "): number for name, number in counted.items() if name.startswith("all: ")} == {
        "volumes": 5, "studies": 3, "patients": 3, "Normal": 2, "Actionable": 1, "Benign": 1, "Cancer": 1,
        "studies Normal": 1, "studies Benign": 1, "studies Cancer": 1,
    }  # fmt: skip
    assert counted["train: boxes"] == 2 and counted["validation: boxes of benign"] == 1 and "test: boxes" not in counted
    (tmp_path / "BCS-DBT-labels-test.csv").unlink()
    assert not any(name.startswith(("all: ", "test: ")) for name in BENCHMARK.count(tmp_path))


def test_the_published_counts_are_whole():
    def of(name):
        return [BENCHMARK.published[f"{split}: {name}"] for split in ("train", "validation", "test")]

    groups = ("Normal", "Actionable", "Benign", "Cancer")
    assert sum(of("volumes")) == BENCHMARK.published["all: volumes"]
    assert of("volumes") == [sum(each) for each in zip(*(of(group) for group in groups), strict=True)]
    for split in ("train", "all"):
        assert (
            sum(BENCHMARK.published[f"{split}: studies {group}"] for group in groups)
            == BENCHMARK.published[f"{split}: studies"]
        )


def test_of_two_releases_the_newer_is_read(tmp_path):
    old = [LABELS, "P2,S2,rmlo,1,0,0,0"]
    other_side = ROWS["file-paths-train-v2"][1].replace("lcc", "rcc")  # which the newer release corrected
    write(tmp_path, **{
        "labels-validation": old, "labels-validation-v2": old, "file-paths-train": [PATHS, other_side]
    })  # fmt: skip
    assert BENCHMARK.count(tmp_path)["validation: Benign"] == 1
    assert read_views(tmp_path).by_series["1.3"] == ("L", "CC")


def test_a_volume_is_found_by_its_series_and_the_collection_by_any_case(tmp_path, caplog):
    """The Imaging Data Commons and TCIA's own Python client; and the collection's folder itself as data_dir."""
    write(tmp_path)
    (tmp_path / "breast_cancer_screening_dbt" / "P1").mkdir(parents=True)
    save(build(SeriesInstanceUID="1.3"), tmp_path / "breast_cancer_screening_dbt" / "P1", "x.dcm")
    (tmp_path / "P1" / "d-S1" / "e-3").mkdir(parents=True)
    (tmp_path / "P1" / "d-S1" / "e-3" / "1-1.dcm").touch()
    paths = locate(read_index(tmp_path), tmp_path).set_index("image_id")["path"]
    assert paths["S1_lcc"] == "breast_cancer_screening_dbt/P1/x.dcm"
    assert paths["S1_rcc"] == "P1/d-S1/e-3/1-1.dcm"
    assert "bcs_dbt: 1 of 5 images are not there, first S1_lmlo2: looked below" in caplog.text


@pytest.mark.parametrize("place", ["", "manifest-161/Breast-Cancer-Screening-DBT/../"])
@pytest.mark.parametrize("path", ["C/P1/d-S1/e-1/1-1.dcm", "C/P1/1.2/1.3/1-1.dcm"])
def test_either_layout_is_found(tmp_path, place, path):
    if place:
        (tmp_path / place).parent.mkdir(parents=True)
    file = (tmp_path / place / path).resolve()
    file.parent.mkdir(parents=True)
    file.touch()
    paths = locate(read_index(write(tmp_path)), tmp_path).set_index("image_id")["path"]
    assert paths["S1_lcc"] == file.relative_to(tmp_path).as_posix()
    assert paths["S1_rcc"] == "C/P1/d-S1/e-3/1-1.dcm" and paths.isna()["S3_rcc"]  # not there; not listed


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("labels-train-v2", "P1,S1,rmlo,1,1,0,0", "row 4: Normal is '1', but one of Normal, Actionable"),
        ("labels-train-v2", "P1,S1,lcc,1,0,0,0", "row 4: View is 'lcc', which the study has in an earlier row"),
        ("labels-train-v2", "P1,S1,lat,1,0,0,0", "row 4: View is 'lat', not one of lcc"),
        ("labels-train-v2", "P1,S1,rmlo,x,1,0,0", "row 4: Normal is 'x', not one of 0, 1"),
        ("boxes-train-v2", "P1,S9,lcc,0,1,1,1,1,1,benign,0,9", "row 3: View is 'lcc', of S9, which has no row in"),
        ("boxes-train-v2", "P1,S1,lcc,0,9,1,1,1,1,benign,0,9", "row 3: Slice is '9', not in 0..8"),
        ("boxes-train-v2", "P1,S1,lcc,0,1,1,1,0,1,benign,0,9", "row 3: Width is '0', and Width and Height"),
        ("boxes-train-v2", "P1,S1,lcc,0,1,1,1,1,1,maybe,0,9", "row 3: Class is 'maybe'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, line, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_index(write(tmp_path, **{name: [*ROWS[name], line]}))
    assert f"BCS-DBT-{name}.csv" in str(caught.value)


def test_without_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match="no BCS-DBT-labels"):
        read_index(tmp_path)
    with pytest.raises(ValueError, match="no column Cancer; it has PatientID"):
        read_index(write(tmp_path, **{"labels-test": [LABELS.replace("Cancer", "Malignant"), "P3,S3,rcc,1,0,0,0"]}))


def test_sharing_is_allowed_with_attribution():
    assert not BENCHMARK.no_sharing and any("attribution" in note for note in BENCHMARK.notes)
