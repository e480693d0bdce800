"""A custom CSV data set, `table`: any hospital's images and labels, by the columns of the schema.

data_dir is a CSV or Parquet file, or a folder with index.csv or index.parquet. It needs the columns `patient_id` and
`path` (relative to the table, or absolute) and one label or more; whatever else of `index.SCHEMA` it has is read
too. Empty cells are unknown. In a CSV, `lesion_types` is names with ";" between, or `none` where a reader found
none, and `boxes` is JSON: [{"x0": 10, "y0": 20, "x1": 50, "y1": 60, "slice": 12, "label": "mass"}], or [].

    patient_id,path,laterality,view,cancer,density
    p001,p001/left_cc.dcm,L,CC,0,B

Without `image_id` an image goes by its path, without `breast_id` by patient, study and laterality; an image whose
laterality is not known counts as a breast of its own.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from .index import (
    SCHEMA,
    Benchmark,
    Box,
    MetadataTable,
    find_file,
    make_box,
    make_index,
)

logger = logging.getLogger(__name__)

FILES = ("index.csv", "index.parquet")
REMEDY = "correct it in the table"
NEEDED = ("patient_id", "path")
LABELS = ("cancer", "lesion", "birads", "density", "lesion_types")
NO_LESION = "none"
CORNERS = ("x0", "y0", "x1", "y1")


def read_index(data_dir: Path) -> pd.DataFrame:
    """Return the index of a table. Raises FileNotFoundError, ValueError naming file, row, column and remedy."""
    table = _read(table_file(data_dir))
    columns = {name: _cells(table, name) for name in SCHEMA if name in table.rows}
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    alone = 0
    for row in rows:
        side = row.get("laterality")
        row["image_id"] = row.get("image_id") or row["path"]
        if not row.get("breast_id"):
            alone += side is None
            of = filter(None, (row["patient_id"], row.get("study_id"), side))
            row["breast_id"] = "_".join(of) if side else row["image_id"]
    if alone:
        logger.info("%s: %d images without breast_id and laterality count as a breast each", table.path, alone)
    return make_index(rows, str(table.path))


def table_file(data_dir: Path) -> Path:
    """Return the file of a table. Raises FileNotFoundError where there is none."""
    if Path(data_dir).is_file():
        return Path(data_dir)
    return find_file(data_dir, FILES, "give a table, or the folder of one of these names")


def table_benchmark(data_dir: Path) -> Benchmark:
    """Return the data set of a table, with the definitions that its labels allow and the classes that occur.

    Raises as `read_index`, and ValueError where there are no labels.
    """
    index = read_index(data_dir)
    definitions = []
    for each in BENCHMARK.definitions:
        cells, values = index[each.column], each.values
        if cells.isna().all():
            continue
        if each.column == "lesion_types":
            values = {name: name for name in sorted({name for names in cells for name in names or ()})}
        elif each.name == "column" and each.column in ("birads", "density"):
            values = {value: name for value, name in values.items() if (cells == value).any()}
        definitions.append(replace(each, values=values))
    if not definitions:
        raise ValueError(f"{table_file(data_dir)}: no labels; fill one or more of the columns {', '.join(LABELS)}")
    return replace(BENCHMARK, definitions=tuple(definitions))


def _read(path: Path) -> MetadataTable:
    try:
        if path.suffix.lower() == ".parquet":
            frame = pd.read_parquet(path)
            frame = frame.apply(lambda column: [_as_text(cell) for cell in column]) if len(frame) else frame
        else:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, OSError) as error:  # pandas' parser and pyarrow raise kinds of both
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason}); save it as CSV in UTF-8 or as Parquet") from error
    if missing := [name for name in NEEDED if name not in frame]:
        raise ValueError(
            f"{path}: no column {' and '.join(missing)}; it has {', '.join(map(str, frame.columns))}; name its columns "
            "as dataset_scripts.benchmarks.index.SCHEMA does"
        )
    if frame.empty:
        raise ValueError(f"{path}: no rows")
    if ignored := [str(name) for name in frame if name not in SCHEMA]:
        logger.info("%s: not read, as no columns of the schema: %s", path, ", ".join(ignored))
    known = [name for name in frame if name in SCHEMA]
    return MetadataTable(path, frame[known].apply(lambda column: column.str.strip()), REMEDY)


def _as_text(cell: Any) -> str:
    """Return a cell of a Parquet file as a CSV would have it."""
    if isinstance(cell, str) or not hasattr(cell, "__len__"):
        return "" if cell is None or cell is pd.NA or cell != cell else str(cell)
    if all(isinstance(each, str) for each in cell):
        return ";".join(cell) or NO_LESION
    return json.dumps(list(cell))


def _cells(table: MetadataTable, name: str) -> list[Any]:
    """Return the cells of a column as the schema wants them, None where unknown."""
    if SCHEMA[name] == "Int8":
        numbers = table.whole(name)
        if (beyond := numbers.abs() > 127).any():
            raise table.fault(int(beyond.fillna(False).argmax()), name, "out of range")
        return _none_where_missing(numbers)
    cells = _none_where_missing(table.text(name, required=name in NEEDED))
    if name == "lesion_types":
        return [
            None if cell is None else sorted({each.strip() for each in cell.split(";")} - {"", NO_LESION})
            for cell in cells
        ]
    if name == "boxes":
        return [None if cell is None else _boxes(table, row, cell) for row, cell in enumerate(cells)]
    return cells


def _none_where_missing(cells: pd.Series) -> list[Any]:
    return [None if pd.isna(cell) else cell for cell in cells]


def _boxes(table: MetadataTable, row: int, cell: str) -> list[Box]:
    if cell == NO_LESION:
        return []
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


# before a table is read: all that one may have
BENCHMARK = Benchmark.from_yaml(__file__, read_index=read_index)
