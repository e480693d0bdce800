"""The phantom as a benchmark: its index says what labels.csv says, and odd archives are refused in one line."""

import csv

import pytest

from dataset_scripts.benchmarks.phantom import BENCHMARK, COLUMNS, read_index
from dataset_scripts.phantom.anatomy import LESION_TYPES

DBT = ("PHANTOM-{n:06d}/L_CC_dbt.dcm", "PHANTOM-{n:06d}", "L", "CC", "dbt")
FFDM = ("PHANTOM-{n:06d}/L_CC_2d.dcm", "PHANTOM-{n:06d}", "L", "CC", "ffdm")
HEALTHY = ("B", "0", "none", "0", "", "", "", "", "")
BENIGN = ("C", "1", "mass_round", "0", "10", "20", "30", "45", "3")
CANCER = ("D", "1", "mass_spiculated", "1", "1", "2", "3", "4", "5")


def write(folder, *rows, columns=COLUMNS):
    """labels.csv of rows as (number, file and header, truth)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "labels.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows([*(cell.format(n=n) for cell in file), *truth] for n, file, truth in rows)
    return folder


def test_an_archive(phantom_archive):
    with open(phantom_archive / "labels.csv", newline="") as stream:
        labels = {row["file"]: row for row in csv.DictReader(stream)}
    index = read_index(phantom_archive)
    assert len(index) == len(labels) == 24 and index["patient_id"].nunique() == index["breast_id"].nunique() == 12
    assert index["split"].isna().all() and set(index["path"]) == set(labels)
    for row in index.to_dict("records"):
        of = labels[row["path"]]
        assert (phantom_archive / row["path"]).is_file()
        shared = ("laterality", "view", "density")
        assert [row[name] for name in shared] == [of[name] for name in shared]
        assert row["breast_id"] == f"{of['patient']}_{of['laterality']}"
        assert (row["lesion"], row["cancer"]) == (int(of["lesion"]), int(of["cancer"]))
        assert row["lesion_types"] == ([of["lesion_type"]] if of["lesion"] == "1" else [])
        if of["lesion"] == "0":
            assert row["boxes"] == []
        else:
            place = int(of["lesion_slice"]) if of["kind"] == "dbt" else -1
            corners = {name: float(of[name]) for name in ("x0", "y0", "x1", "y1")}
            assert row["boxes"] == [{**corners, "slice": place, "label": of["lesion_type"]}]


def test_labels_of_every_task(tmp_path):
    write(tmp_path, (0, DBT, HEALTHY), (1, DBT, BENIGN), (1, FFDM, BENIGN), (2, FFDM, CANCER))
    index = read_index(tmp_path)
    expected = {
        "cancer": ["no cancer", "no cancer", "no cancer", "cancer"],
        "lesion": ["no lesion", "lesion", "lesion", "lesion"],
        "birads": ["1", "2", "2", "5"],
        "density": ["B", "C", "C", "D"],
        "lesion_type": [None, "mass_round", "mass_round", "mass_spiculated"],
    }
    for task, labels in expected.items():
        definition = BENCHMARK.definition(task)
        assert list(definition.label(index).astype(object).where(lambda cells: cells.notna(), None)) == labels
        assert {each for each in labels if each} <= set(definition.classes)
    assert list(BENCHMARK.definition("density", "dense").label(index)) == ["not dense", "dense", "dense", "dense"]
    assert "no reader" in BENCHMARK.definition("birads").meaning
    assert BENCHMARK.definition("lesion_type").classes == LESION_TYPES
    assert index["boxes"][1] == [{"x0": 10, "y0": 20, "x1": 30, "y1": 45, "slice": 3, "label": "mass_round"}]
    assert index["boxes"][2][0]["slice"] == -1
    counts = BENCHMARK.count(tmp_path)
    assert (counts["images"], counts["patients"], counts["images of cancer"]) == (4, 3, 1)
    assert counts["images of density C"] == 2


def test_folders_are_the_official_split(tmp_path):
    write(tmp_path / "train", (0, DBT, HEALTHY), (1, DBT, BENIGN))
    write(tmp_path / "test", (2, FFDM, CANCER))
    index = read_index(tmp_path)
    assert list(index["split"]) == ["train", "train", "test"]
    assert index["path"][2] == "test/PHANTOM-000002/L_CC_2d.dcm"
    write(tmp_path / "validation", (1, FFDM, BENIGN))
    with pytest.raises(ValueError, match=r"PHANTOM-000001 is in train and in validation; .*--first_patient$"):
        read_index(tmp_path)


def test_columns_are_read_by_name(tmp_path):
    order = [*range(len(COLUMNS) - 1, -1, -1)]
    rows = [(1, [[*DBT, *BENIGN][place] for place in order], ["more"])]
    write(tmp_path / "turned", *rows, columns=[*(COLUMNS[place] for place in order), "thickness_mm"])
    write(tmp_path / "plain", (1, DBT, BENIGN))
    assert read_index(tmp_path / "turned").equals(read_index(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("density", "E", "row 2: density is 'E', not one of A, B, C, D; write it again"),
        ("lesion", "", "row 2: lesion is '', not one of 0, 1; write it again"),
        ("kind", "ct", "row 2: kind is 'ct', not one of dbt, ffdm"),
        ("x0", "", "row 2: x0 is '', but a lesion has a box and a slice"),
        ("x0", "wide", "row 2: x0 is 'wide', not a number"),
        ("lesion_slice", "1.5", "row 2: lesion_slice is '1.5', not a whole number"),
        ("patient", "", "row 2: patient is '', but must not be empty"),
    ],
)
def test_a_cell_that_makes_no_sense_is_named(tmp_path, column, value, message):
    cells = dict(zip(COLUMNS, [*DBT, *BENIGN], strict=True)) | {column: value}
    write(tmp_path, (0, DBT, HEALTHY), (1, list(cells.values()), ()))
    with pytest.raises(ValueError, match=r"labels\.csv, ") as caught:
        read_index(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_archive_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no labels\.csv, .* dataset_scripts\.phantom --output"):
        read_index(tmp_path)
    write(tmp_path, (0, DBT, HEALTHY))
    write(tmp_path / "test", (1, DBT, HEALTHY))
    with pytest.raises(ValueError, match=r"labels\.csv here and in test/; keep one"):
        read_index(tmp_path)
    write(tmp_path / "other", (0, DBT, HEALTHY), columns=["file", "patient_name", *COLUMNS[2:]])
    with pytest.raises(ValueError, match=r"no column patient; it has file, patient_name, .*; write it again"):
        read_index(tmp_path / "other")
