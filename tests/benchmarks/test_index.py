"""Metadata files: cells are stripped text, names of columns and sheets are matched kindly, faults are one line."""

import pandas as pd
import pytest

from dataset_scripts.benchmarks.index import find_file, read_csv, read_sheets

REMEDY = "download it again"


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_cells_columns_and_empty_cells(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffBreast Density,note,n\n B ,"a\n",2.0\n_,,\n')
    table = read_csv(path, {"density": ("ACR", "breast_density"), "note": ("note",), "n": ("n",)}, REMEDY)
    assert list(table.rows.columns) == ["density", "note", "n"]
    assert table.rows.to_dict("list") == {"density": ["B", "_"], "note": ["a", ""], "n": ["2.0", ""]}
    assert table.choice("density", {"B": 2, "_": None}).tolist() == [2, None]
    assert table.whole("n").tolist() == [2, pd.NA]
    assert table.text("note").isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "read", "words"),
    [
        ("b\n1\n", lambda table: table, ("no column a", "it has b")),
        ("", lambda table: table, ("not a CSV file",)),
        ("a\n", lambda table: table, ("no rows",)),
        ("a\n1\nx\n", lambda table: table.number("a"), ("row 2", "a is 'x'", "not a number")),
        ("a\n1\ninf\n", lambda table: table.number("a"), ("row 2", "not a number")),
        ("a\n1.5\n", lambda table: table.whole("a"), ("row 1", "not a whole number")),
        ("a,b\n,1\n", lambda table: table.whole("a", required=True), ("row 1", "must not be empty")),
        ("a\n1\n3\n", lambda table: table.choice("a", {"1": 1, "2": 2}), ("row 2", "a is '3'", "1, 2")),
    ],
)
def test_a_fault_is_one_line_with_file_column_and_remedy(tmp_path, text, read, words):
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(ValueError) as caught:
        read(read_csv(path, ["a"], REMEDY))
    for word in (*words, str(path), REMEDY):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_and_folders_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no new.csv or old.csv; {REMEDY}"):
        find_file(tmp_path, ["new.csv", "old.csv"], REMEDY)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_file(tmp_path / "gone", ["new.csv"], REMEDY)
    for name in ("old.csv", "new.csv"):
        write(tmp_path / name, "a")
        assert find_file(tmp_path, ["new.csv", "old.csv"], REMEDY).name == name


def test_sheets(tmp_path):
    path = tmp_path / "a.xlsx"
    with pd.ExcelWriter(path) as writer:
        pd.DataFrame({"ID 1": [7, None, 9]}).to_excel(writer, sheet_name="All", index=False)
    (table,) = read_sheets(path, {"all": {"id": ("id1",)}}, REMEDY).values()
    assert table.whole("id").tolist() == [7, pd.NA, 9]
    with pytest.raises(ValueError, match="a.xlsx, sheet 'all': no column x; it has ID 1"):
        read_sheets(path, {"all": ["x"]}, REMEDY)
    with pytest.raises(ValueError, match="no sheet 'mass'; it has 'All'"):
        read_sheets(path, {"mass": ["x"]}, REMEDY)
    with pytest.raises(ValueError, match="not a readable Excel file"):
        read_sheets(write(tmp_path / "b.xlsx", "no zip"), {"all": ["x"]}, REMEDY)
