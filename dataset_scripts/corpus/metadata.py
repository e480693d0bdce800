"""What a table says of files that have no header, such as PNG and JPEG exports: patient, side, view, source."""

import csv
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modeling_mammodino.dicom import keyed_hash

HASHED = ("patient", "study")
COLUMNS = (*HASHED, "laterality", "view", "kind", "source")
SIDES = {"L": "L", "LEFT": "L", "R": "R", "RIGHT": "R", "": None}
KINDS = ("ffdm", "synthetic_2d", "dbt", "unknown")


class FileMetadata:
    """Columns of a corpus by file, from CSV tables with a column `file`, relative to the table, and any of COLUMNS.

    Patient and study enter as keyed hashes, as those of DICOM headers do; other columns are not looked at. `counts`
    tells how many files were found in a table and how many were not. Raises ValueError naming the table and the value.
    """

    def __init__(self, paths: Iterable[str | Path], hash_key: bytes):
        self.rows: dict[str, dict[str, Any]] = {}
        self.counts = {"known": 0, "unknown": 0}
        for path in map(Path, paths):
            with path.open(newline="", encoding="utf-8-sig") as stream:
                table = csv.DictReader(stream)
                given = [name for name in COLUMNS if name in (table.fieldnames or ())]
                if "file" not in (table.fieldnames or ()) or not given:
                    raise ValueError(f"{path}: needs a column `file` and at least one of {', '.join(COLUMNS)}")
                for line, row in enumerate(table, start=2):
                    if not row["file"]:
                        raise ValueError(f"{path}, line {line}: `file` is empty")
                    values = {name: clean(path, line, name, row[name] or "", hash_key) for name in given}
                    if self.rows.setdefault(_place(path.parent / row["file"]), values) != values:
                        raise ValueError(f"{path}, line {line}: another row says otherwise of {row['file']}; keep one")

    def of(self, file: str) -> dict[str, Any]:
        """Return the columns that the tables give for a file, by its path; empty where they do not name it."""
        found = self.rows.get(_place(file))
        self.counts["unknown" if found is None else "known"] += 1
        return {} if found is None else {name: value for name, value in found.items() if value is not None}


def _place(file: str | Path) -> str:
    """Return the one name of a file, however its path is written: without `..`, in composed letters."""
    return unicodedata.normalize("NFC", os.path.abspath(file))


def clean(path: Path, line: int, name: str, value: str, hash_key: bytes) -> str | None:
    """Return a cell as a corpus holds it; None where it is empty. Raises ValueError for what is no side or kind."""
    value = value.strip()
    if name == "laterality":
        if value.upper() not in SIDES:
            raise ValueError(f"{path}, line {line}: laterality {value!r}: must be L, R, LEFT or RIGHT, or empty")
        return SIDES[value.upper()]
    if name == "kind" and value and value not in KINDS:
        raise ValueError(f"{path}, line {line}: kind {value!r}: must be one of {', '.join(KINDS)}, or empty")
    if not value:
        return None
    return keyed_hash(value, hash_key) if name in HASHED else value.upper() if name == "view" else value
