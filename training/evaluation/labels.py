"""A label table: one row a file, with its patient and a column a task."""

from pathlib import Path

import pandas


def read_labels(labels: Path, tasks: list[str]) -> pandas.DataFrame:
    """The table of a CSV with the columns `file` (relative to it), `patient` and the tasks; empty cells are NaN.

    Raises ValueError for a missing column, OSError where there is no such file.
    """
    table = pandas.read_csv(labels, dtype={"patient": str}, keep_default_na=True)
    if missing := [column for column in ("file", "patient", *tasks) if column not in table]:
        raise ValueError(f"{labels}: no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    return table
