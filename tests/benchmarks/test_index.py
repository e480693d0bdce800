"""Metadata files: cells are stripped text, names of columns and sheets match loosely, faults are one line. Counts."""

from dataclasses import replace

import pandas as pd
import pytest

from dataset_scripts.benchmarks.index import Count, Definition, find_file, make_index, read_csv, read_sheets

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


def test_counts_of_rows_values_and_parts():
    rows = pd.DataFrame({"part": ["a", "a", "all", "all"], "view": ["CC", None] * 2, "age": [40, 50] * 2})
    tables = {"rows": rows, "plain": rows[["view", "age"]].assign(view=pd.Categorical(rows["view"], ["CC", "MLO"]))}
    for count, counted in (
        (Count("rows"), {"rows": 2}),  # of the part "all"
        (Count("of {part}", published={"a": 9, "b": 9}), {"of a": 2, "of all": 2}),  # b is not here: unknown
        (Count("view {view}", published={"AT": 3}), {"view AT": 0, "view CC": 1, "view missing": 1}),
        (Count("{view}", table="plain"), {"CC": 2, "MLO": 0, "missing": 2}),
        (Count("{part}: {view}", where="age < 50"), {"a: CC": 1, "all: CC": 1}),
        (Count("oldest", count="max age"), {"oldest": 50}),
        (Count("ages", count="distinct age", table="plain"), {"ages": 2}),
        (Count("years of {part}", count="sum age"), {"years of a": 90, "years of all": 90}),
        (Count("boxes", table="boxes", published=1), {}),
    ):
        assert count.of(tables) == counted
    assert Count("{part}: {view}", published={"a": {"CC": 1}, "b": {1: 2}}).published_counts() == {
        "a: CC": 1,
        "b: 1": 2,
    }


def test_labels_of_a_definition():
    index = make_index(
        [
            {"patient_id": "p", "image_id": "1", "cancer": 1, "lesion_types": ["mass", "cyst"], "density": "A"},
            {"patient_id": "p", "image_id": "2", "cancer": 0, "lesion_types": ["mass"]},
            {"patient_id": "p", "image_id": "3", "lesion_types": []},
        ],
        "made up",
    )
    plain = Definition("cancer", "x", "", "cancer", {0: "no", 1: "yes"})
    assert plain.classes == ("no", "yes") and plain.label(index).tolist() == ["yes", "no", pd.NA]
    assert replace(plain, otherwise="no").label(index).tolist() == ["yes", "no", "no"]
    assert replace(plain, needs="density").label(index).tolist() == ["yes", pd.NA, pd.NA]
    types = Definition("lesion_type", "x", "", "lesion_types", {"mass": "solid", "cyst": "liquid"})
    assert types.label(index).tolist() == [pd.NA, "solid", pd.NA]
    assert replace(types, values={"mass": "any", "cyst": "any"}).label(index).tolist() == ["any", "any", pd.NA]
