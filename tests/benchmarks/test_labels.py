"""The label table: one reader for CSV and Parquet, any names of classes as tasks, each fault in one line."""

import json
import logging

import numpy as np
import pandas as pd
import pytest

from dataset_scripts.benchmarks.labels import ABOUT, class_names, read_index, read_labels, table_benchmark
from dataset_scripts.benchmarks.task import load_task, open_benchmark

BOX = {"x0": 1.0, "y0": 2.0, "x1": 3.5, "y1": 4.0, "slice": 7, "label": "mass"}


def write(folder, name="labels.csv", **columns):
    """A table of columns; two patients where nothing else is said."""
    table = {"patient": ["a", "b"], "file": ["a.png", "b.png"], **columns}
    frame = pd.DataFrame({name: cells for name, cells in table.items() if cells is not None})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


def one_line(caught, *parts):
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_csv_and_parquet_are_the_same_index(tmp_path):
    columns = {
        "patient": ["007", "b"],
        "laterality": ["L", None],
        "study": ["s1", "s2"],
        "cancer": [1, None],
        "birads": [5, 0],
        "density": ["A", "D"],
        "split": ["train", "test"],
    }
    csv = read_index(write(tmp_path / "csv", **columns, boxes=[json.dumps([BOX]), "[]"]))
    parquet = read_index(write(tmp_path / "parquet", "labels.parquet", **columns, boxes=[[BOX], []]))
    pd.testing.assert_frame_equal(csv, parquet)
    assert list(csv["patient_id"]) == ["007", "b"] and list(csv["image_id"]) == ["a.png", "b.png"]
    assert list(csv["breast_id"]) == ["007_s1_L", "b.png"]  # of the second the side is not known
    assert csv["cancer"][0] == 1 and pd.isna(csv["cancer"][1]) and list(csv["birads"]) == [5, 0]
    assert csv["boxes"][0] == [BOX] and csv["boxes"][1] == []


def test_a_parquet_of_shuffled_or_filtered_rows_is_read_row_by_row(tmp_path):
    rows = [(f"p{number}", f"p{number}.png", number % 2, [{**BOX, "x0": -number}]) for number in range(12)]
    frame = pd.DataFrame(rows, columns=["patient", "file", "cancer", "boxes"])
    tables = {
        "shuffled": frame.sample(frac=1, random_state=0),
        "filtered": frame[3:],
        "twice": frame.set_axis([0] * 12),
    }
    tables["by_file"] = frame.set_index("file")
    for name, table in tables.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
        index = read_index(tmp_path / f"{name}.parquet")
        number = index["patient_id"].str[1:].astype(int)
        assert len(index) == len(table) and (index["path"] == index["patient_id"] + ".png").all()
        assert (index["cancer"] == number % 2).all() and (index["label:cancer"] == (number % 2).astype(str)).all()
        assert [boxes[0]["x0"] for boxes in index["boxes"]] == [-each for each in number]


def test_a_parquet_of_embeddings_is_a_label_table(tmp_path):
    vectors = list(np.ones((2, 30), np.float32))
    table = read_labels(write(tmp_path, "labels.parquet", cancer=[0, 1], embedding=vectors), ["cancer"])
    assert list(table["cancer"]) == [0, 1]


@pytest.mark.parametrize("words", [("TRUE", "FALSE"), ("true", "false"), ("True", "False"), (1, 0)])
def test_a_boolean_is_with_or_without(tmp_path, words):
    benchmark = table_benchmark(write(tmp_path, recalled=words))
    definition = benchmark.definition("recalled")
    assert definition.classes == ("no recalled", "recalled") and definition.is_ordered
    assert list(definition.label(benchmark.read_index(tmp_path))) == ["recalled", "no recalled"]


def test_of_two_names_the_one_without_comes_first_and_others_are_said(tmp_path, caplog):
    definition = table_benchmark(write(tmp_path, finding=["Normal", "lesion"])).definition("finding")
    assert definition.classes == ("Normal", "lesion") and definition.is_ordered
    files = [f"p{number}.png" for number in range(30)]
    for file in files:
        (tmp_path / file).touch()
    path = write(tmp_path, patient=files, file=files, kind_of=["mass", "calcification"] * 15)
    assert load_task("table", path, "kind_of").classes == ("calcification", "mass")
    assert "kind_of: mass counts as positive; --classes mass,calcification turns it round" in caplog.text


def test_a_breast_is_of_one_patient(tmp_path):
    index = read_index(write(tmp_path, breast=["L", "L"], cancer=[0, 1]))
    assert list(index["breast_id"]) == ["a_L", "b_L"]
    joined = {"patient": ["1_2", "1"], "study": [None, "2"], "laterality": ["L", "L"], "cancer": [0, 1]}
    with pytest.raises(ValueError, match="breast_id '1_2_L' is of 2 patients; rename one of them"):
        read_index(write(tmp_path, **joined))


def test_a_number_that_became_a_float_is_the_same_patient(tmp_path):
    for patients in ([7.0, 8.0], ["7.0", "8.0"], [7, 8]):
        assert list(read_labels(write(tmp_path, patient=patients))["patient"]) == ["7", "8"]
    assert list(read_labels(write(tmp_path, patient=["7.0", "8.1"]))["patient"]) == ["7.0", "8.1"]


def test_an_age_may_be_as_dicom_has_it(tmp_path):
    assert read_index(write(tmp_path, age=["045Y", "61"], cancer=[0, 1]))["age"].tolist() == [45, 61]


def test_cells_that_mean_nothing_are_empty_in_any_case(tmp_path):
    cells = ["n/a", "NULL", "NaN", "mass"]
    table = read_labels(write(tmp_path, patient=list("abcd"), file=list("abcd"), finding=cells))
    assert table["finding"].isna().tolist() == [True, True, True, False]


def test_other_names_and_words_mean_the_same(tmp_path):
    about = {"laterality": ["Left", "r"], "split": ["training", "val"], "breast": ["1", "2"], "view": ["CC", "CC"]}
    ours = read_index(write(tmp_path / "ours", **about))
    about = {"laterality": ["L", "R"], "split": ["train", "validation"], "breast_id": ["1", "2"], "view": ["CC", "CC"]}
    theirs = {"patient": None, "file": None, "patient_id": ["a", "b"], "path": ["a.png", "b.png"], **about}
    pd.testing.assert_frame_equal(ours, read_index(write(tmp_path / "theirs", **theirs)))


def test_cells_are_numbers_where_all_of_a_column_are(tmp_path):
    columns = {"patient": ["007", "b"], "age": [51, None], "site": ["1", "A"], "remark": ["None", ""]}
    table = read_labels(write(tmp_path, **columns), ["site"])
    assert list(table["patient"]) == ["007", "b"] and table["age"][0] == 51 and pd.isna(table["age"][1])
    assert list(table["site"]) == ["1", "A"] and table["remark"][0] == "None" and pd.isna(table["remark"][1])


@pytest.mark.parametrize(
    ("cells", "names"),
    [([1.0, None], ["1", None]), ([True, False], ["1", "0"]), ([0.5, 2.0], ["0.5", "2.0"]), (["a ", ""], ["a", ""])],
)
def test_names_of_classes(cells, names):
    assert [None if pd.isna(each) else each for each in class_names(pd.Series(cells))] == names


def test_a_box_may_stand_in_columns_and_in_json(tmp_path):
    corners = {"x0": [1, None], "y0": [2, None], "x1": [3.5, None], "y1": [4, None], "lesion_slice": [7, None]}
    index = read_index(write(tmp_path, **corners, lesion_type=["mass", "none"]))
    assert list(index["boxes"]) == [[BOX], []]
    flat = read_index(write(tmp_path, **corners, kind=["ffdm", "ffdm"]))["boxes"][0]
    assert flat == [{**BOX, "slice": -1, "label": "lesion"}]
    index = read_index(write(tmp_path, boxes=[None, '[{"x0":0,"y0":0,"x1":1,"y1":1}]']))
    assert index["boxes"][0] is None  # unknown is not none
    assert index["boxes"][1] == [{"x0": 0, "y0": 0, "x1": 1, "y1": 1, "slice": -1, "label": "lesion"}]


def test_each_column_of_classes_is_a_task(tmp_path):
    columns = {
        "patient": list("abcd"), "file": list("abcd"), "birads": [4, 10, None, 4], "density": list("BCAA"),
        "finding": ["normal", "mass", "", "benign"], "recalled": [True, False, False, None], "age": [40.5, 50, 60, 7],
    }  # fmt: skip
    benchmark = table_benchmark(write(tmp_path, **columns))
    index = benchmark.read_index(tmp_path)
    found = {task: benchmark.definition(task) for task in ("birads", "density", "finding", "recalled")}
    classes = {task: (each.classes, each.is_ordered) for task, each in found.items()}
    assert classes == {
        "birads": (("4", "10"), True),
        "density": (("A", "B", "C"), True),
        "finding": (("benign", "mass", "normal"), False),
        "recalled": (("no recalled", "recalled"), True),
    }
    assert found["birads"].label(index).tolist() == ["4", "10", pd.NA, "4"]
    assert found["recalled"].label(index).tolist() == ["recalled", "no recalled", "no recalled", pd.NA]
    assert benchmark.definition("density", "dense").label(index).tolist() == ["not dense", "dense"] + ["not dense"] * 2
    with pytest.raises(ValueError, match="task 'cancer': table has no labels for it; it has birads, density, finding"):
        benchmark.definition("cancer")


def test_classes_are_chosen_and_put_in_order(tmp_path):
    names = [("normal", "mass", "unclear")[number % 3] for number in range(36)]
    files = [f"p{number}.png" for number in range(36)]
    for file in files:
        (tmp_path / file).touch()
    path = write(tmp_path, patient=files, file=files, finding=names)
    loaded = load_task("table", path, "finding", classes=["normal", "mass"])
    assert loaded.classes == ("normal", "mass") and loaded.definition.is_ordered and len(loaded.table) == 24
    assert loaded.counts["left_out"] == {"no label by this definition": 12}
    assert load_task("table", path, "finding").classes == ("mass", "normal", "unclear")
    with pytest.raises(ValueError, match="classes=normal,cyst: must be two or more of mass, normal, unclear"):
        load_task("table", path, "finding", classes=["normal", "cyst"])


def test_what_is_no_task_is_said(tmp_path):
    many = [f"p{number}" for number in range(30)]
    path = write(tmp_path, patient=many, file=many, age=range(30), site=["A"] * 30, cancer=[0, 1] * 15)
    for task, reason in (("age", "30 values; a task has 2 to 20 classes"), ("site", "one class only, A")):
        with pytest.raises(ValueError, match=f"task '{task}': its column has {reason}.*; it has cancer"):
            load_task("table", path, task)


def test_a_file_and_its_folder_are_the_same_table(tmp_path):
    files = [f"p{number}.png" for number in range(30)]
    for file in files:
        (tmp_path / file).touch()
    columns = {"patient": files, "cancer": [number % 2 for number in range(30)]}
    path = write(tmp_path, file=files, **columns)
    of_file, of_folder = (load_task("table", place, "cancer") for place in (path, tmp_path))
    pd.testing.assert_frame_equal(of_file.table, of_folder.table)
    assert of_file.classes == ("no cancer", "cancer")
    assert set(of_file.table["file"]) == {str(tmp_path / file) for file in files}
    elsewhere = write(tmp_path / "elsewhere", file=[str(tmp_path / file) for file in files], **columns)
    assert set(load_task("table", elsewhere, "cancer").table["file"]) == set(of_file.table["file"])


def test_breasts_that_nobody_can_tell_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        read_index(write(tmp_path, cancer=[0, 1]))
    assert "2 images without breast and laterality count as a breast each" in caplog.text


def test_the_phantoms_labels_are_a_label_table(phantom_archive):
    ours = load_task("table", phantom_archive / "labels.csv", "lesion")
    theirs = load_task("phantom", phantom_archive, "lesion")
    assert sorted(ours.table["file"]) == sorted(theirs.table["file"])
    boxes = {row.file: row.boxes for row in theirs.table.itertuples()}
    assert {row.file: row.boxes for row in ours.table.itertuples()} == boxes


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"laterality": ["up", "R"]}, ("row 1: laterality is 'up', not one of L, R",)),
        ({"split": ["holdout", "test"], "cancer": [0, 1]}, ("split is 'holdout', not one of train, validation, test",)),
        ({"patient": ["", "b"]}, ("row 1: patient is '', but must not be empty; fill it, or take the row out",)),
        ({"file": ["a.png", None]}, ("row 2: file is '', but must not be empty",)),
        ({"patient": None, "Patient": ["a", "b"]}, ("no column patient; it has file, Patient",)),
        ({"file": None, "image_path": ["a", "b"]}, ("no column file; it has patient, image_path",)),
        ({}, ("no labels (there is no further column)",)),
        ({"cancer": [None, None]}, ("no labels (cancer: its column has 0 values",)),
        ({"cancer": [1, 1]}, ("no labels (cancer: its column has one class only, 1",)),
    ],
)
def test_what_is_wrong_is_one_line_and_says_where_to_read(tmp_path, columns, parts):
    path = write(tmp_path, **columns)
    with pytest.raises(ValueError) as caught:
        open_benchmark("table", tmp_path)
    one_line(caught, str(path), ABOUT, *parts)


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"file": ["a.png", "a.png"]}, ("image_id 'a.png' occurs more than once; take a row out",)),
        ({"file": ["a.png", "./a.png"]}, ("image_id 'a.png' occurs more than once",)),
        ({"cancer ": [0, 1]}, ("column cancer is there twice",)),
        ({"boxes": ["1, 2, 3, 4", None]}, ("row 1: boxes is '1, 2, 3, 4', not JSON like",)),
        ({"boxes": ['[{"x0": 1}]', None]}, ("row 1: boxes is", "not JSON like")),
        ({"boxes": ['[{"x0":1,"y0":1,"x1":1,"y1":2}]', None]}, ("row 1: boxes is", "x0 must be below x1")),
        ({"x0": [3, 1], "y0": [1, 1], "x1": [2, 2], "y1": [2, 2]}, ("row 1: x0 is '3', but a box has x0 below x1",)),
        ({"x0": [1, 1], "y0": [1, 1], "x1": [2, None], "y1": [2, 2]}, ("row 2: x0 is '1', but a box",)),
    ],
)
def test_a_wrong_box_or_a_repeated_file_is_one_line(tmp_path, columns, parts):
    path = write(tmp_path, cancer=[0, 1], **columns)
    with pytest.raises(ValueError) as caught:
        read_index(tmp_path)
    one_line(caught, str(path), *parts)


def test_what_is_no_table_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no labels\.csv or .*; give a label table; see"):
        read_index(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.csv: no such file; see"):
        read_labels(tmp_path / "gone.csv")
    (tmp_path / "labels.csv").write_bytes(b"patient,file\n\xff\xfe,\x00\n")
    with pytest.raises(ValueError, match="save it as CSV in UTF-8 or as Parquet") as caught:
        read_index(tmp_path)
    one_line(caught)
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(ValueError, match="cannot be read .*; save it as CSV"):
        read_index(tmp_path)
    (tmp_path / "labels.csv").write_text("patient,file\n")
    with pytest.raises(ValueError, match="no rows"):
        read_index(tmp_path)
    (tmp_path / "other.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"other\.parquet: cannot be read") as caught:
        read_index(tmp_path / "other.parquet")
    one_line(caught)
