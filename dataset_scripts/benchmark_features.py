"""The columns of an index as `datasets` knows them."""

from typing import Any

import datasets
import pandas

from .benchmark_index import SCHEMA, Box

_KINDS = {"string": datasets.Value("string"), "Int8": datasets.Value("int8")}
_BOX = {int: datasets.Value("int32"), float: datasets.Value("float64"), str: datasets.Value("string")}
_LISTS = {
    "lesion_types": datasets.List(datasets.Value("string")),
    "boxes": datasets.List({name: _BOX[kind] for name, kind in Box.__annotations__.items()}),
}
INDEX_FEATURES = datasets.Features(
    {column: _LISTS[column] if kind == "object" else _KINDS[kind] for column, kind in SCHEMA.items()}
)


def to_rows(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """The rows of an index as dicts; missing cells are None."""
    cells = table.astype(object)
    return cells.where(table.notna(), None).to_dict("records")
