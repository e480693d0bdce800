"""A custom CSV data set: CSV and Parquet alike, its labels as definitions, each fault in one line."""

import json
import logging

import pandas as pd
import pytest

from dataset_scripts.benchmarks.custom_csv import BENCHMARK, read_index, table_benchmark
from dataset_scripts.benchmarks.task import load_task, open_benchmark

BOX = {"x0": 1.0, "y0": 2.0, "x1": 3.5, "y1": 4.0, "slice": 7, "label": "mass"}


def write(folder, name="index.csv", **columns):
    """A table of columns; two patients where nothing else is said."""
    table = {"patient_id": ["a", "b"], "path": ["a.png", "b.png"], **columns}
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
        "patient_id": ["007", "b"],
        "laterality": ["L", None],
        "study_id": ["s1", "s2"],
        "cancer": [1, None],
        "birads": [5, 0],
        "density": ["A", "D"],
        "split": ["train", "test"],
    }
    lists = {"lesion_types": [["mass", "calcification"], []], "boxes": [[BOX], []]}
    texts = {"lesion_types": ["mass; calcification", "none"], "boxes": [json.dumps([BOX]), "[]"]}
    csv = read_index(write(tmp_path / "csv", **columns, **texts))
    parquet = read_index(write(tmp_path / "parquet", "index.parquet", **columns, **lists))
    pd.testing.assert_frame_equal(csv, parquet)
    assert list(csv["patient_id"]) == ["007", "b"] and list(csv["image_id"]) == ["a.png", "b.png"]
    assert list(csv["breast_id"]) == ["007_s1_L", "b.png"]  # of the second the side is not known
    assert csv["cancer"][0] == 1 and pd.isna(csv["cancer"][1])
    assert list(csv["lesion_types"]) == [["calcification", "mass"], []]
    assert csv["boxes"][0] == [BOX] and csv["boxes"][1] == []


def test_unknown_is_not_none(tmp_path):
    index = read_index(write(tmp_path, lesion_types=["mass", None], boxes=[None, '[{"x0":0,"y0":0,"x1":1,"y1":1}]']))
    assert index["lesion_types"][1] is None and index["boxes"][0] is None
    assert index["boxes"][1] == [{"x0": 0, "y0": 0, "x1": 1, "y1": 1, "slice": -1, "label": "lesion"}]


def test_definitions_are_of_the_labels_that_are_there(tmp_path):
    columns = {"birads": [6, 2], "density": ["B", "C"], "lesion_types": ["mass", "mass;cyst"]}
    benchmark = table_benchmark(write(tmp_path, **columns))
    assert {each.task for each in benchmark.definitions} == {"birads", "density", "lesion_type"}
    index = benchmark.read_index(tmp_path)
    birads, density, types = (benchmark.definition(task) for task in ("birads", "density", "lesion_type"))
    assert birads.classes == ("2",) and birads.label(index).tolist() == [pd.NA, "2"]
    assert density.classes == ("B", "C") and density.label(index).tolist() == ["B", "C"]
    assert types.classes == ("cyst", "mass") and types.label(index).tolist() == ["mass", pd.NA]
    assert benchmark.definition("density", "dense").label(index).tolist() == ["not dense", "dense"]
    with pytest.raises(ValueError, match="task 'cancer': table has no labels for it; it has birads, density, lesion_t"):
        benchmark.definition("cancer")
    general = {(each.task, each.name) for each in BENCHMARK.definitions}  # of any table, before it is read
    assert {(each.task, each.name) for each in benchmark.definitions} <= general


def test_a_file_and_its_folder_are_the_same_table(tmp_path):
    files = [f"p{number}.png" for number in range(30)]
    for file in files:
        (tmp_path / file).touch()
    columns = {"patient_id": files, "cancer": [number % 2 for number in range(30)]}
    path = write(tmp_path, path=files, **columns)
    of_file, of_folder = (load_task("table", place, "cancer") for place in (path, tmp_path))
    pd.testing.assert_frame_equal(of_file.table, of_folder.table)
    assert set(of_file.table["file"]) == {str(tmp_path / file) for file in files}
    elsewhere = write(tmp_path / "elsewhere", path=[str(tmp_path / file) for file in files], **columns)
    assert set(load_task("table", elsewhere, "cancer").table["file"]) == set(of_file.table["file"])


def test_other_columns_are_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        read_index(write(tmp_path, cancer=[0, 1], Cancer_site=["x", "y"]))
    assert "not read, as no columns of the schema: Cancer_site" in caplog.text
    assert "2 images without breast_id and laterality count as a breast each" in caplog.text


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"cancer": [0, 2]}, ("b.png", "cancer is 2, not one of 0, 1", "1 such rows")),
        ({"birads": [1, 300]}, ("row 2: birads is '300', out of range",)),
        ({"birads": [1, -1]}, ("b.png", "birads is -1, not one of 0, 1, 2")),
        ({"cancer": ["0", "yes"]}, ("row 2: cancer is 'yes', not a number", "correct it in the table")),
        ({"birads": ["4a", "1"]}, ("row 1: birads is '4a', not a number",)),
        ({"birads": [0.5, 1]}, ("row 1: birads is '0.5', not a whole number",)),
        ({"density": ["b", "A"]}, ("a.png", "density is b, not one of A, B, C, D")),
        ({"laterality": ["left", "R"]}, ("a.png", "laterality is left, not one of L, R")),
        ({"split": ["training", "test"], "cancer": [0, 1]}, ("split is training, not one of train, validation, test",)),
        ({"patient_id": ["", "b"]}, ("row 1: patient_id is '', but must not be empty",)),
        ({"path": ["a.png", None]}, ("row 2: path is '', but must not be empty",)),
        ({"path": ["a.png", "a.png"]}, ("image_id 'a.png' occurs more than once",)),
        ({"boxes": ["1, 2, 3, 4", None]}, ("row 1: boxes is '1, 2, 3, 4', not JSON like",)),
        ({"boxes": ['[{"x0": 1}]', None]}, ("row 1: boxes is", "not JSON like")),
        ({"boxes": ['[{"x0":1,"y0":1,"x1":1,"y1":2}]', None]}, ("row 1: boxes is", "x0 must be below x1")),
        ({"patient_id": None, "patient": ["a", "b"]}, ("no column patient_id; it has", "patient", "SCHEMA")),
        ({"path": None, "file": ["a", "b"]}, ("no column path; it has patient_id, file",)),
        ({}, ("no labels; fill one or more of the columns cancer, lesion, birads, density, lesion_types",)),
        ({"cancer": [None, None]}, ("no labels",)),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, columns, parts):
    path = write(tmp_path, **columns)
    with pytest.raises(ValueError) as caught:
        open_benchmark("table", tmp_path)
    one_line(caught, str(path), *parts)


def test_what_is_no_table_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no index\.csv or index\.parquet; give a table"):
        read_index(tmp_path)
    (tmp_path / "index.csv").write_bytes(b"patient_id,path\n\xff\xfe,\x00\n")
    with pytest.raises(ValueError, match="save it as CSV in UTF-8 or as Parquet") as caught:
        read_index(tmp_path)
    one_line(caught)
    (tmp_path / "index.csv").write_text("")
    with pytest.raises(ValueError, match="cannot be read .*; save it as CSV"):
        read_index(tmp_path)
    (tmp_path / "index.csv").write_text("patient_id,path\n")
    with pytest.raises(ValueError, match="no rows"):
        read_index(tmp_path)
    (tmp_path / "other.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"other\.parquet: cannot be read") as caught:
        read_index(tmp_path / "other.parquet")
    one_line(caught)
