"""A table of one's own as a data set: any hospital's images and labels, by the columns of the schema.

data_dir is a CSV or Parquet file, or a folder with index.csv or index.parquet. It needs `patient_id` and `path`
(relative to the table, or absolute), and one label column or more; what else of benchmark_index.SCHEMA it has is read
too, other columns are not. Empty cells are unknown. In a CSV `lesion_types` is names with ";" between, or `none` where
a reader found none, and `boxes` is JSON: [{"x0": 10, "y0": 20, "x1": 50, "y1": 60, "slice": 12, "label": "mass"}].

    patient_id,path,laterality,view,cancer,density
    p001,p001/left_cc.dcm,L,CC,0,B

Without `image_id` an image goes by its path, without `breast_id` by patient, study and laterality, and an image whose
laterality is not known counts as a breast of its own.
"""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from .benchmark_index import DENSITIES, SCHEMA, Benchmark, Box, Definition, make_index

logger = logging.getLogger(__name__)

NAME = "table"
FILES = ("index.csv", "index.parquet")
NEEDED = ("patient_id", "path")
LABELS = ("cancer", "lesion", "birads", "density", "lesion_types")
LEVELS = ("1", "2", "3", "4", "5")  # assessments 0 (incomplete) and 6 (known cancer) are no classes
NO_LESION = "none"


def table_benchmark(data_dir: Path) -> Benchmark:
    """The data set of a table, with the definitions that its columns allow.

    Raises FileNotFoundError where there is none, ValueError naming file, row, column and remedy.
    """
    index = read_index(data_dir)
    of_column = {name: sorted(index[name].dropna().astype(str).unique()) for name in ("birads", "density")}
    types = sorted({each for each in _single_types(index).dropna()})
    has = [name for name in LABELS if index[name].notna().any()]
    if not has:
        raise ValueError(f"{table_file(data_dir)}: no labels; fill one or more of the columns {', '.join(LABELS)}")
    return _benchmark(has, [level for level in LEVELS if level in of_column["birads"]], of_column["density"], types)


def table_file(data_dir: Path) -> Path:
    data_dir = Path(data_dir)
    if data_dir.is_file():
        return data_dir
    for name in FILES:
        if (data_dir / name).is_file():
            return data_dir / name
    raise FileNotFoundError(f"{data_dir}: no {' or '.join(FILES)}; give the folder of a table, or the table itself")


def read_index(data_dir: Path) -> pandas.DataFrame:
    """SCHEMA rows of a table. Raises FileNotFoundError, ValueError naming file, row, column and remedy."""
    path = table_file(data_dir)
    table = _read(path)
    if missing := [name for name in NEEDED if name not in table]:
        raise ValueError(
            f"{path}: no column {' and '.join(missing)}; it has {', '.join(map(str, table.columns))}; name its columns "
            "as benchmark_index.SCHEMA does"
        )
    if ignored := [str(name) for name in table if name not in SCHEMA]:
        logger.info("%s: not read, as no column of the schema: %s", path, ", ".join(ignored))
    if table.empty:
        raise ValueError(f"{path}: no rows")
    columns = {name: _column(path, table, name) for name in SCHEMA if name in table}
    for name in NEEDED:
        if empty := [row for row, cell in enumerate(columns[name], start=1) if cell is None]:
            raise ValueError(f"{path}, row {empty[0]}: {name} is empty; {len(empty)} such rows; fill it")
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    alone = 0
    for row in rows:
        row["image_id"] = row.get("image_id") or row["path"]
        if not row.get("breast_id"):
            alone += not row.get("laterality")
            known = [row["patient_id"], row.get("study_id"), row.get("laterality")]
            row["breast_id"] = "_".join(filter(None, known)) if row.get("laterality") else row["image_id"]
    if alone:
        logger.info("%s: %d images without breast_id and laterality count as a breast each", path, alone)
    return make_index(rows, str(path))


def _read(path: Path) -> pandas.DataFrame:
    try:
        if path.suffix.lower() == ".parquet":
            return pandas.read_parquet(path)
        return pandas.read_csv(path, dtype=str, encoding="utf-8-sig")
    except (ValueError, OSError) as error:  # pandas' parser and pyarrow raise kinds of ValueError
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason}); save it as CSV in UTF-8 or as Parquet") from error


def _column(path: Path, table: pandas.DataFrame, name: str) -> list[Any]:
    """The cells of a column as the schema wants them, None where unknown."""
    convert = {"Int8": _whole, "string": str, "object": {"lesion_types": _names, "boxes": _boxes}.get(name)}
    cells: list[Any] = []
    for row, cell in enumerate(table[name], start=1):
        cell = cell.strip() if isinstance(cell, str) else cell
        if cell is None or (not _is_list(cell) and (pandas.isna(cell) or cell == "")):
            cells.append(None)
            continue
        try:
            cells.append(convert[SCHEMA[name]](cell))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ValueError(f"{path}, row {row}: {name} is {cell!r}: {reason}") from error
    return cells


def _is_list(cell: Any) -> bool:
    return not isinstance(cell, str) and hasattr(cell, "__len__")  # Parquet's lists arrive as arrays


def _whole(cell: Any) -> int:
    number = float(cell)
    if not number.is_integer() or abs(number) > 127:
        raise ValueError("must be a small whole number")
    return int(number)


def _names(cell: Any) -> list[str]:
    names = list(cell) if _is_list(cell) else str(cell).split(";")
    return sorted({name.strip() for name in names} - {"", NO_LESION})


def _boxes(cell: Any) -> list[Box]:
    return [_box(each) for each in (cell if _is_list(cell) else json.loads(cell))]


def _box(given: Any) -> Box:
    if not isinstance(given, dict):
        raise ValueError('must be a list of {"x0": ..., "y0": ..., "x1": ..., "y1": ...}')
    x0, y0, x1, y1 = (float(given[name]) for name in ("x0", "y0", "x1", "y1"))
    if not (x0 < x1 and y0 < y1):
        raise ValueError("x0 must be below x1, and y0 below y1")
    return Box(x0=x0, y0=y0, x1=x1, y1=y1, slice=int(given.get("slice", -1)), label=str(given.get("label", "lesion")))


def _single_types(index: pandas.DataFrame) -> pandas.Series:
    one = index["lesion_types"].map(lambda types: types[0] if types is not None and len(types) == 1 else None)
    return one.astype("string")


def _values(column: str, classes: dict[str, str], index: pandas.DataFrame) -> pandas.Series:
    return index[column].astype("string").map(classes).astype("string")


def _benchmark(has: list[str], levels: list[str], densities: list[str], types: list[str]) -> Benchmark:
    def by_value(task: str, name: str, meaning: str, column: str, classes: dict[str, str]) -> Definition:
        names = tuple(dict.fromkeys(classes.values()))
        return Definition(
            task, name, f"{meaning}, by the table's column `{column}`", names, partial(_values, column, classes)
        )

    dense = {"A": "not dense", "B": "not dense", "C": "dense", "D": "dense"}
    definitions: dict[str, list[Definition]] = {
        "cancer": [by_value("cancer", "column", "positive: 1", "cancer", {"0": "no cancer", "1": "cancer"})],
        "lesion": [by_value("lesion", "column", "positive: 1", "lesion", {"0": "no lesion", "1": "lesion"})],
        "birads": [
            by_value("birads", "column", "left out: 0 and 6", "birads", {level: level for level in levels}),
        ],
        "density": [
            by_value("density", "column", "the classes that occur", "density", {each: each for each in densities}),
            by_value("density", "dense", "dense: C or D", "density", dense),
        ],
        "lesion_types": [
            Definition(
                "lesion_type",
                "column",
                "left out: images with several types or none, by the table's column `lesion_types`",
                tuple(types),
                _single_types,
            )
        ],
    }
    return Benchmark(
        name=NAME,
        title="A table of one's own",
        homepage="",
        license="of whoever owns the images",
        citation="",
        read_index=read_index,
        definitions=tuple(each for name in has for each in definitions[name]),
        count=count,
        published={},
        no_sharing="it is your own: its ids and file names may name patients, and its licence is not known here",
        notes=("The labels mean what whoever made the table meant.",),
    )


def count(data_dir: Path) -> dict[str, int]:
    index = read_index(data_dir)
    return {"images": len(index), "patients": int(index["patient_id"].nunique())}


# before a table is read: every definition that one may have
BENCHMARK = _benchmark(list(LABELS), list(LEVELS), list(DENSITIES), [])
