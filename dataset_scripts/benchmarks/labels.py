"""The label table: one's own images and labels, in one form for every command that learns or measures.

A CSV or Parquet file with a row an image. docs/finetuning.md describes it, and every error points there. As a data set
it is called `table`: `load_task("table", "labels.csv", "finding")` knows each column of classes as a task.

    file,patient,laterality,view,finding
    p001/left_cc.dcm,p001,L,CC,benign
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .index import (
    ALLOWED,
    DENSITIES,
    SCHEMA,
    Benchmark,
    Box,
    Count,
    Definition,
    MetadataTable,
    find_file,
    make_box,
    make_index,
)

logger = logging.getLogger(__name__)

TABLE = "table"
FILES = ("labels.csv", "labels.parquet", "index.csv", "index.parquet")  # of a folder
ABOUT = 'see "Label tables" in docs/finetuning.md'
NEEDED = ("file", "patient")
# column: how it is called in the index, and may be in a table
IDENTITY = {
    "file": "path",
    "patient": "patient_id",
    "study": "study_id",
    "breast": "breast_id",
    "image": "image_id",
    "laterality": "laterality",
    "view": "view",
    "split": "split",
}
WORDS = {
    "laterality": {"l": "L", "left": "L", "r": "R", "right": "R"},
    "split": {
        **dict.fromkeys(("train", "training"), "train"),
        **dict.fromkeys(("validation", "valid", "val"), "validation"),
        **dict.fromkeys(("test", "testing"), "test"),
    },
}
CORNERS = ("x0", "y0", "x1", "y1")
BOX_COLUMNS = ("boxes", *CORNERS, "lesion_slice")
EMPTY = ("", "na", "n/a", "nan", "null", "<na>")  # in any case; None may be a class
LABELS_OF_SCHEMA: tuple[str, ...] = ("cancer", "lesion", "birads", "density")
MAX_CLASSES = 20  # a column of more values is of numbers or of names
SPELLED = {  # what is known of an image beside its labels, for subgroups, and how tables may call it
    "site": ("site", "site_id", "hospital"),
    "machine": ("machine", "machine_id", "scanner", "digitizer", "manufacturer"),
    "age": ("age",),
}
WITHOUT = ("normal", "negative", "none", "no", "healthy", "control", "absent")  # of two classes the one without it
LABEL = "label:"  # before the name of a task's column in the index: there may be one of the schema's


def read_labels(path: Path, tasks: Sequence[str] = ()) -> pd.DataFrame:
    """Return the rows of a label table that has the columns `tasks`: those of IDENTITY as str, others as numbers where
    all cells are; missing where empty.

    Raises ValueError for a missing column, an empty table and a row without file or patient, OSError where there is no
    such file.
    """
    table = open_table(path, tasks)
    _report_split(table)
    return pd.DataFrame({name: _typed(table, name) for name in table.rows})


def open_table(path: Path, tasks: Sequence[str] = (), needed: Sequence[str] = NEEDED) -> MetadataTable:
    """Return a label table as text, its columns by the names of IDENTITY. Raises as `read_labels`."""
    try:
        if path.suffix.lower() == ".parquet":
            rows = pd.read_parquet(path)
            rows = rows.reset_index(drop=rows.index.names == [None]).map(_as_text)  # a shuffled table has its old order
        else:
            rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; {ABOUT}") from error
    except (ValueError, OSError) as error:  # pandas' parser and pyarrow raise kinds of both
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: cannot be read ({reason}); save it as CSV in UTF-8 or as Parquet; {ABOUT}"
        ) from error
    ours = {name: ours for ours, name in IDENTITY.items() if ours not in rows}
    rows = rows.rename(columns=lambda name: ours.get(str(name).strip(), str(name).strip()))
    if not rows.columns.is_unique:
        raise ValueError(f"{path}: column {rows.columns[rows.columns.duplicated()][0]} is there twice; {ABOUT}")
    if missing := [name for name in (*needed, *tasks) if name not in rows]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(rows)}; {ABOUT}")
    if rows.empty:
        raise ValueError(f"{path}: no rows; {ABOUT}")
    rows = rows.apply(lambda cells: cells.str.strip())
    table = MetadataTable(
        path,
        rows.mask(rows.apply(lambda cells: cells.str.lower().isin(EMPTY)), ""),
        f"fill it, or take the row out; {ABOUT}",
    )
    for name in needed:
        table.text(name, required=True)
    for name in table.rows.columns.intersection(["patient", "study", "breast", "image"]):
        cells = table.rows[name]
        if cells[cells != ""].str.fullmatch(r"\d+\.0").all():  # numbers that pandas has made floats of
            table.rows[name] = cells.str.removesuffix(".0")
    for name, words in WORDS.items():
        if name in rows:
            cells = table.rows[name] = table.rows[name].map(lambda cell, words=words: words.get(cell.lower(), cell))
            if (wrong := ~cells.isin(["", *words.values()])).any():
                raise table.fault(int(wrong.argmax()), name, f"not one of {', '.join(dict.fromkeys(words.values()))}")
    return table


def _as_text(cell: Any) -> str:
    """Return a cell of a Parquet file as a CSV would have it."""
    if isinstance(cell, list | np.ndarray):
        return json.dumps(list(cell), default=lambda each: each.tolist())  # numbers and arrays of numpy
    return "" if pd.isna(cell) else str(cell)


def _typed(table: MetadataTable, name: str) -> pd.Series:
    cells = table.rows[name].astype(object)
    filled = cells.where(cells != "", np.nan)
    if name in IDENTITY:
        return filled
    numbers = pd.to_numeric(filled, errors="coerce")
    return numbers if numbers.notna().equals(filled.notna()) else filled


def class_names(column: pd.Series) -> pd.Series:
    """Return each cell as the name of its class, of type string, missing where empty: 1.0 is "1", TRUE is "1"."""
    if pd.api.types.is_numeric_dtype(column) and (column.dropna() % 1 == 0).all():
        return column.astype("Int64").astype("string")
    names = column.astype("string").str.strip()
    lower = names.str.lower()
    return lower.replace({"false": "0", "true": "1"}) if set(lower.dropna()) <= {"false", "true"} else names


# ---- as a data set -----------------------------------------------------------------------------------------------


def table_file(data_dir: Path) -> Path:
    """Return the file of a label table, or of a folder with one of FILES. Raises FileNotFoundError."""
    return Path(data_dir) if Path(data_dir).is_file() else find_file(data_dir, FILES, f"give a label table; {ABOUT}")


def read_images(path: Path) -> pd.DataFrame:
    """Return what a table says of its images, whose patients need not be known: columns as IDENTITY calls them in the
    index, `path`, `image_id` and `breast_id` among them. Raises as `read_labels`."""
    return pd.DataFrame(_identity(open_table(path, needed=("file",))))


def _identity(table: MetadataTable) -> dict[str, pd.Series]:
    """Return the columns of IDENTITY that there are, by their names in the index, with image_id and breast_id."""
    nothing = pd.Series(pd.NA, table.rows.index, "string")
    about = {ours: table.text(name) for name, ours in IDENTITY.items() if name in table.rows}
    about["path"] = about["path"].map(os.path.normpath).astype("string")  # ./a.png is a.png
    image, side = about.get("image_id", nothing).fillna(about["path"]), about.get("laterality", nothing)
    patient, breast = about.get("patient_id", nothing), about.get("breast_id", nothing)
    of_patient = patient + ("_" + about.get("study_id", nothing)).fillna("") + "_"
    if (patient.groupby(breast).nunique() > 1).any():
        logger.info("%s: several patients have a breast of one name; each counts as the patient's own", table.path)
        breast = of_patient + breast
    breast = breast.fillna(of_patient + side)
    return {**about, "patient_id": patient, "image_id": image, "breast_id": breast.fillna(image.where(patient.notna()))}


def read_index(data_dir: Path) -> pd.DataFrame:
    """Return the index of a label table, and a column LABEL + NAME for each task. Raises as `read_labels`, and
    ValueError for a box that is none.

    An image goes by its file where it has no name. A breast is a side of a patient's study; an image whose side is not
    known counts as a breast of its own. What the schema has of a label is filled where all cells are of its kind.
    """
    table = open_table(table_file(data_dir))
    _report_split(table)
    about = _identity(table)
    if alone := int((about["breast_id"] == about["image_id"]).sum()):
        logger.info("%s: %d images without breast and laterality count as a breast each", table.path, alone)
    labels = {name: class_names(_typed(table, name)) for name in _tasks(table)}
    of_schema = {name: _of_schema(name, labels[name]) for name in LABELS_OF_SCHEMA if name in labels}
    known = {name: next((each for each in names if each in table.rows), None) for name, names in SPELLED.items()}
    about |= {name: _typed(table, column) for name, column in known.items() if column}
    if "age" in about:
        years = about["age"].astype("string").str.removesuffix("Y")  # DICOM's 045Y
        about["age"] = pd.to_numeric(years, errors="coerce")
    rows: dict[str, Any] = {**about, **of_schema, "boxes": pd.Series(list(_boxes(table)), dtype=object)}
    index = make_index(pd.DataFrame(rows), str(table.path))
    return index.assign(**{LABEL + name: cells.to_numpy() for name, cells in labels.items()})


def _report_split(table: MetadataTable) -> None:
    """Log how many rows have no split where others have one, for what asks for a part leaves them out."""
    if "split" in table.rows and 0 < (empty := int((table.rows["split"] == "").sum())) < len(table.rows):
        logger.warning(
            "%s: %d rows without a split beside rows with one: left out wherever a part is asked for", table.path, empty
        )


def _tasks(table: MetadataTable) -> list[str]:
    return [name for name in table.rows if name not in IDENTITY and name not in BOX_COLUMNS]


def _of_schema(name: str, cells: pd.Series) -> pd.Series:
    is_one = cells.isin([str(value) for value in ALLOWED[name]])
    if not is_one[cells.notna()].all():
        return pd.Series(pd.NA, cells.index, SCHEMA[name])
    return cells if name == "density" else cells.astype("Int8")


def _boxes(table: MetadataTable) -> Iterator[list[Box] | None]:
    """Yield the boxes of each row: of JSON in `boxes`, or one or none of CORNERS; None where nobody looked."""
    if "boxes" in table.rows:
        yield from (_from_json(table, row, cell) for row, cell in enumerate(table.rows["boxes"]))
        return
    if not set(CORNERS) <= set(table.rows):
        yield from [None] * len(table.rows)
        return
    corners = pd.DataFrame({name: table.number(name) for name in CORNERS})
    at = table.whole("lesion_slice").fillna(-1) if "lesion_slice" in table.rows else pd.Series(-1, corners.index)
    names = table.rows["lesion_type"] if "lesion_type" in table.rows else pd.Series("lesion", corners.index)
    for row, box in enumerate(corners.itertuples(index=False, name=None)):
        if pd.isna(pd.Series(box)).all():
            yield []
            continue
        if pd.isna(pd.Series(box)).any() or not (box[0] < box[2] and box[1] < box[3]):
            raise table.fault(row, "x0", "but a box has x0 below x1 and y0 below y1")
        is_flat = "kind" in table.rows and table.rows["kind"][row] == "ffdm"  # the phantom's: lesions are in a volume
        yield [make_box(box, names[row], -1 if is_flat else int(at[row]))]


def _from_json(table: MetadataTable, row: int, cell: str) -> list[Box] | None:
    if not cell:
        return None
    try:
        boxes = [
            make_box([box[name] for name in CORNERS], str(box.get("label", "lesion")), int(box.get("slice", -1)))
            for box in json.loads(cell)
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise table.fault(row, "boxes", 'not JSON like [{"x0": 1, "y0": 2, "x1": 3, "y1": 4}]') from None
    if not all(box["x0"] < box["x1"] and box["y0"] < box["y1"] for box in boxes):
        raise table.fault(row, "boxes", "but x0 must be below x1 and y0 below y1")
    return boxes


def table_benchmark(data_dir: Path) -> Benchmark:
    """Return the data set of a label table, a task for each of its columns of classes. Raises as `read_labels`, and
    ValueError where there is none."""
    table = open_table(table_file(data_dir))
    definitions: list[Definition] = []
    refused: dict[str, str] = {}
    for task in _tasks(table):
        classes = set(class_names(_typed(table, task)).dropna())
        if not 2 <= len(classes) <= MAX_CLASSES:
            found = f"one class only, {next(iter(classes))}" if len(classes) == 1 else f"{len(classes)} values"
            refused[task] = f"its column has {found}; a task has 2 to {MAX_CLASSES} classes"
            continue
        values, ordered = _in_order(task, classes)
        definitions.append(
            Definition(task, "column", f"the table's column `{task}`", LABEL + task, values, ordered=ordered)
        )
        if task == "density" and classes <= set(DENSITIES):
            dense = {each: "dense" if each in "CD" else "not dense" for each in DENSITIES}
            definitions.append(Definition(task, "dense", "dense: C or D, by the table", LABEL + task, dense))
    if not definitions:
        why = "; ".join(f"{task}: {reason}" for task, reason in refused.items()) or "there is no further column"
        raise ValueError(f"{table.path}: no labels ({why}); {ABOUT}")
    return Benchmark(**ABOUT_TABLE, definitions=tuple(definitions), refused=refused)


def _in_order(task: str, classes: set[str]) -> tuple[dict[str, str], bool]:
    """Return the class of each value, in order, and whether that order means something: of numbers and single letters
    it does, of names the alphabet's does not. 0 and 1 are without and with it, and so are two names of which one is
    in WITHOUT."""
    if classes == {"0", "1"}:
        return {"0": f"no {task}", "1": task}, True
    numbers = pd.to_numeric(pd.Series(sorted(classes)), errors="coerce")
    if numbers.notna().all():
        return {each: each for each in sorted(classes, key=float)}, True
    without = [each for each in classes if each.lower() in WITHOUT]
    if len(classes) == 2 and len(without) == 1:
        return {each: each for each in (*without, *(classes - set(without)))}, True
    return {each: each for each in sorted(classes)}, all(len(each) == 1 for each in classes)


ABOUT_TABLE: dict[str, Any] = {
    "name": TABLE,
    "title": "A label table",
    "homepage": "",
    "license": "that of the images",
    "citation": "",
    "no_sharing": "its names may be those of patients, and it does not say whose images they are",
    "notes": ("Labels mean what whoever made the table meant.",),
    "counts": (Count("images"), Count("patients", count="distinct patient_id")),
    "read_index": read_index,
}
BENCHMARK = Benchmark(**ABOUT_TABLE, definitions=())  # before a table is read
