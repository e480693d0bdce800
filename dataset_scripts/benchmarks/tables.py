"""Where NBIA's data retriever puts a TCIA collection, and what one folder of it holds."""
# MERGED: Metadata files of the data sets, CSV or Excel: every cell stripped text, every fault one line with its remedy.

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from modeling_mammodino.dicom import open_header
from modeling_mammodino.image_io import InvalidImageError

Columns = Sequence[str] | Mapping[str, Sequence[str]]  # names; or our name for a column, and how files spell it


@dataclass(frozen=True)
class MetadataTable:
    path: Path
    rows: pandas.DataFrame  # of str, stripped, "" where empty; a RangeIndex
    remedy: str
    sheet: str = ""

    def fault(self, row: int, column: str, expected: str) -> ValueError:
        """What is wrong with a cell; rows count from 1, without the header."""
        value = self.rows[column].iloc[row]
        return ValueError(
            f"{self.path}{self._of_sheet}, row {row + 1}: {column} is {value!r}, {expected}; {self.remedy}"
        )

    @property
    def _of_sheet(self) -> str:
        return f", sheet {self.sheet!r}" if self.sheet else ""

    def text(self, column: str, required: bool = False) -> pandas.Series:
        """Of type string, missing where empty. Raises ValueError for an empty cell that is `required`."""
        cells = self.rows[column].astype("string")
        empty = cells == ""
        if required and empty.any():
            raise self.fault(int(empty.argmax()), column, "but must not be empty")
        return cells.mask(empty)

    def number(self, column: str, required: bool = False) -> pandas.Series:
        """Of type Float64, missing where empty. Raises ValueError for what is no finite number."""
        cells = self.text(column, required)
        numbers = pandas.to_numeric(cells, errors="coerce").astype("Float64")
        wrong = cells.notna() & ~numbers.abs().lt(float("inf")).fillna(False)
        if wrong.any():
            raise self.fault(int(wrong.argmax()), column, "not a number")
        return numbers

    def whole(self, column: str, required: bool = False) -> pandas.Series:
        """Of type Int64, missing where empty; "2.0" is 2. Raises ValueError for what is no whole number."""
        numbers = self.number(column, required)
        broken = (numbers % 1 != 0).fillna(False)
        if broken.any():
            raise self.fault(int(broken.argmax()), column, "not a whole number")
        return numbers.astype("Int64")

    def choice(self, column: str, meanings: Mapping[str, Any]) -> pandas.Series:
        """What each cell means, objects. Raises ValueError for a cell that is not a key; "" is an empty cell."""
        cells = self.rows[column]
        unknown = ~cells.isin(list(meanings))
        if unknown.any():
            names = ", ".join(key or "empty" for key in meanings)
            raise self.fault(int(unknown.argmax()), column, f"not one of {names}")
        return pandas.Series([meanings[cell] for cell in cells], index=cells.index, dtype=object)


def find_file(data_dir: Path, names: Sequence[str], remedy: str) -> Path:
    """The first of `names` in the folder. Raises FileNotFoundError that names folder, file and remedy."""
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder; {remedy}")
    for name in names:
        if (path := Path(data_dir) / name).is_file():
            return path
    raise FileNotFoundError(f"{data_dir}: no {' or '.join(names)}; {remedy}")


def read_csv(path: Path, columns: Columns, remedy: str, optional: Columns = ()) -> MetadataTable:
    """A CSV file with at least `columns`; other columns are left out. Raises ValueError naming file, column, remedy."""
    try:
        table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, pandas.errors.ParserError) as error:  # empty file, broken quotes, not text
        raise ValueError(f"{path}: not a CSV file ({type(error).__name__}); {remedy}") from error
    return _select(MetadataTable(path, table, remedy), columns, optional)


def read_sheets(path: Path, columns: Mapping[str, Columns], remedy: str) -> dict[str, MetadataTable]:
    """Sheets of an Excel file by the names in `columns`, as `read_csv`; names of sheets are matched like columns."""
    try:
        sheets = pandas.read_excel(path, sheet_name=None, dtype=str, keep_default_na=False, engine="openpyxl")
    except ImportError as error:
        raise ImportError(f"{path}: reading Excel needs openpyxl: pip install openpyxl") from error
    except Exception as error:  # openpyxl raises what zip, XML and its own checks raise
        raise ValueError(f"{path}: not a readable Excel file ({type(error).__name__}); {remedy}") from error
    found = {}
    for name, of_sheet in columns.items():
        matching = [sheet for sheet in sheets if _plain(sheet) == _plain(name)]
        if not matching:
            raise ValueError(f"{path}: no sheet {name!r}; it has {', '.join(map(repr, sheets))}; {remedy}")
        found[name] = _select(MetadataTable(path, sheets[matching[0]], remedy, name), of_sheet)
    return found


def _select(table: MetadataTable, columns: Columns, optional: Columns = ()) -> MetadataTable:
    spelt = {_plain(name): name for name in reversed(table.rows.columns)}  # the first where two are alike
    kept = {}
    for wanted, is_required in ((columns, True), (optional, False)):
        for name, spellings in (wanted if isinstance(wanted, Mapping) else {each: [each] for each in wanted}).items():
            source = next((spelt[_plain(each)] for each in spellings if _plain(each) in spelt), None)
            if source is not None:
                kept[name] = table.rows[source].fillna("").astype(str).str.strip()
            elif is_required:
                has = ", ".join(map(str, table.rows.columns))
                raise ValueError(
                    f"{table.path}{table._of_sheet}: no column {' or '.join(spellings)}; it has {has}; {table.remedy}"
                )
    rows = pandas.DataFrame(kept).reset_index(drop=True)
    if rows.empty:
        raise ValueError(f"{table.path}{table._of_sheet}: no rows; {table.remedy}")
    return MetadataTable(table.path, rows, table.remedy, table.sheet)


def _plain(name: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def tally(cells: pandas.Series, name: str = "{}") -> dict[str, int]:
    """How often each value occurs, by `name` with the value in its braces; missing cells as "missing"."""
    counts = cells.value_counts(dropna=False)
    return {name.format("missing" if pandas.isna(value) else value): int(count) for value, count in counts.items()}


def collection_roots(data_dir: Path, collection: str) -> list[Path]:
    """data_dir itself, its folder of the collection, and that of the retriever's manifest-* folders."""
    data_dir = Path(data_dir)
    roots = [data_dir, data_dir / collection, *sorted(data_dir.glob(f"manifest-*/{collection}"))]
    return [root for root in roots if root.is_dir()]


def subject_folders(data_dir: Path, collection: str) -> dict[str, Path]:
    """The folders directly below the roots, by name; of two with a name the first."""
    folders: dict[str, Path] = {}
    for root in collection_roots(data_dir, collection):
        for entry in sorted(os.scandir(root), key=lambda each: each.name):
            if entry.is_dir():
                folders.setdefault(entry.name, Path(entry.path))
    return folders


def dicom_files(folder: Path) -> list[Path]:
    """Below a subject's folder, whatever study and series are called, in order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".dcm" and path.is_file())


def read_headers(paths: list[Path]) -> dict[Path, Any]:
    """A pydicom Dataset without pixels for each file; without those that are no readable DICOM."""
    headers = {}
    for path in paths:
        try:
            headers[path] = open_header(path).header
        except InvalidImageError:  # whoever reads its pixels says why
            continue
    return headers


def relative(path: Path, data_dir: Path) -> str:
    """As the index has it: relative to data_dir, forward slashes."""
    return path.relative_to(data_dir).as_posix()
