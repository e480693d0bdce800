"""One schema for all labeled data sets, what a data set must say to be a benchmark, and how its metadata are read.

A data set is two files of one name. `NAME.py` reads its metadata into an index, a table of SCHEMA with a row an image.
`NAME.yaml` says what it is: its terms, what a user must know, what its tasks mean, and which counts were published.
"""

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from types import MappingProxyType
from typing import Any, TypedDict

import pandas as pd
import yaml

from modeling_mammodino.dicom import open_dicom
from modeling_mammodino.dicom_header import identifier
from modeling_mammodino.image_io import InvalidImageError
from modeling_mammodino.tools.walk import walk

logger = logging.getLogger(__name__)

TASKS = ("cancer", "lesion", "birads", "density", "lesion_type")
BY_HEADER = ", and for PatientID in the headers"  # where `subject_files` looks, too
SPLITS = ("train", "validation", "test")
DENSITIES = ("A", "B", "C", "D")

# Column: pandas type. Cells are missing where the data set has nothing to say. `lesion_types` and `boxes` hold lists:
# empty where a reader found none, missing where nobody looked.
SCHEMA = {
    "patient_id": "string",
    "study_id": "string",
    "breast_id": "string",  # one breast of one study
    "image_id": "string",  # unique; a volume is one image
    "laterality": "string",  # L or R
    "view": "string",  # CC, MLO and whatever else the data set has
    "split": "string",  # official: one of SPLITS; missing where the data set has none
    "path": "string",  # relative to data_dir, with forward slashes; missing where the metadata do not name the file
    "cancer": "Int8",  # 0 or 1
    "lesion": "Int8",  # 0 or 1
    "lesion_types": "object",  # list of names, sorted
    "birads": "Int8",  # 0 to 6
    "density": "string",  # A to D
    "boxes": "object",  # list of Box
}
# further columns, where they are known: for subgroups, no task's labels, never exported
ABOUT_IMAGE = {"site": "string", "machine": "string", "age": "Float64"}
ALLOWED: dict[str, tuple[Any, ...]] = {
    "laterality": ("L", "R"),
    "split": SPLITS,
    "cancer": (0, 1),
    "lesion": (0, 1),
    "birads": tuple(range(7)),
    "density": DENSITIES,
}


class Box(TypedDict):
    """A lesion's box in pixels of the image as stored in the coordinates of the data set, half-open."""

    x0: float
    y0: float
    x1: float
    y1: float
    slice: int  # 0-based, in the order of the data set; -1 in a 2-D image
    label: str  # as the data set names the finding


def make_box(corners: Sequence[Any], label: str, at: int = -1) -> Box:
    """Return the box of (x0, y0, x1, y1) on slice `at`."""
    x0, y0, x1, y1 = map(float, corners)
    return Box(x0=x0, y0=y0, x1=x1, y1=y1, slice=at, label=label)


def make_index(rows: pd.DataFrame | list[dict], name: str) -> pd.DataFrame:
    """Return an index of SCHEMA's columns and types, and those of ABOUT_IMAGE that are given, from a row or dict an
    image; what a row lacks is a missing cell.

    Raises ValueError for an unknown key, a repeated image_id or a value out of range, naming image and column.
    """
    table = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows)
    types = SCHEMA | {name: kind for name, kind in ABOUT_IMAGE.items() if name in table}
    if extra := [column for column in table if column not in types]:
        raise ValueError(f"{name}: {', '.join(map(str, extra))}: no column of the schema")
    index = table.reindex(columns=list(types)).reset_index(drop=True)
    for column in ("lesion_types", "boxes"):
        cells = index[column].tolist()  # lists, also where pandas keeps them as arrays
        index[column] = pd.Series([cell if isinstance(cell, list) else None for cell in cells], dtype=object)
    index = index.astype({column: kind for column, kind in types.items() if kind != "object"})
    for column, allowed in ALLOWED.items():
        wrong = index[column].notna() & ~index[column].isin(allowed)
        if wrong.any():
            first = index[wrong].iloc[0]
            raise ValueError(
                f"{name}, image {first['image_id']}: {column} is {first[column]}, not one of "
                f"{', '.join(map(str, allowed))}; {int(wrong.sum())} such rows"
            )
    for column in ("patient_id", "image_id"):
        if index[column].isna().any():
            raise ValueError(f"{name}: {int(index[column].isna().sum())} rows without {column}")
    if (repeated := index["image_id"].duplicated()).any():
        raise ValueError(
            f"{name}: image_id {index['image_id'][repeated].iloc[0]!r} occurs more than once; take a row out"
        )
    if ((patients := index.groupby("breast_id")["patient_id"].nunique()) > 1).any():
        raise ValueError(f"{name}: breast_id {patients.idxmax()!r} is of {patients.max()} patients; rename one of them")
    return index


# ---- what a data set says of itself -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Definition:
    """What a task means on a data set: a class for each image, or none where the case is unclear.

    Attributes:
        task: one of TASKS; of a label table a column.
        name: chosen by --definition.
        meaning: what counts as positive, and which cases are left out.
        column: of the index. An image with `lesion_types` has the one class of all its types, or none.
        values: class of each value of the column; others are left out. Of two classes the second is positive.
        otherwise: class of the images whose value is missing, in place of leaving them out.
        needs: another column; images where it is missing are left out.
        ordered: whether a later class is worse, so that a breast has that of its worst view; known of TASKS.
    """

    task: str
    name: str
    meaning: str
    column: str
    values: Mapping[Any, str]
    otherwise: str | None = None
    needs: str | None = None
    ordered: bool | None = None

    @property
    def is_ordered(self) -> bool:
        return self.task != "lesion_type" if self.ordered is None else self.ordered

    def in_order(self, classes: Sequence[str]) -> "Definition":
        """Return the definition with these of its classes in this order, the worst last; images of others are left
        out. Raises ValueError for a name that it does not have, or fewer than two."""
        if len(set(classes)) < 2 or set(classes) - set(self.classes):
            raise ValueError(f"classes={','.join(classes)}: must be two or more of {', '.join(self.classes)}")
        values = {value: name for each in classes for value, name in self.values.items() if name == each}
        return replace(self, values=values, ordered=True)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.values.values()))

    def label(self, index: pd.DataFrame) -> pd.Series:
        """Return the name of each row's class, of type string, missing where it has none."""
        label = index[self.column].astype(object).map(self._class_of).astype("string")
        if self.otherwise is not None:
            label = label.fillna(self.otherwise)
        return label if self.needs is None else label.where(index[self.needs].notna())

    def _class_of(self, cell: Any) -> str | None:
        if isinstance(cell, list):
            found = {self.values.get(each) for each in cell}
            return found.pop() if len(found) == 1 else None
        return None if pd.isna(cell) else self.values.get(cell)


@dataclass(frozen=True)
class Count:
    """How often something occurs in the metadata of a data set, and how often it does by what was published.

    Attributes:
        name: with columns in braces, as in "view {view}", one count for each of their values, a missing one included. A
            value that was published and does not occur counts 0; a {part} of the data set that is not here is unknown.
        table: by its name in `Benchmark.read_tables`; unknown where that is not here. The first where None. Where rows
            stand in a `part` and in the part "all", a name without {part} is of the latter.
        where: which rows, as a pandas query.
        count: rows, or distinct, sum, min or max and the column that is meant.
        published: the number, or numbers by the values of the columns in braces, one level each.
    """

    name: str
    table: str | None = None
    where: str | None = None
    count: str = "rows"
    published: Any = None

    @property
    def columns(self) -> list[str]:
        return [column for _, column, _, _ in Formatter().parse(self.name) if column]

    def of(self, tables: dict[str, pd.DataFrame]) -> dict[str, int]:
        """Return each count by its name; none of what the tables cannot tell."""
        rows = next(iter(tables.values())) if self.table is None else tables.get(self.table)
        if rows is None:
            return {}
        if "part" in rows and "part" not in self.columns:
            rows = rows[rows["part"] == "all"]
        parts = set(rows["part"]) if "part" in self.columns else None
        counts = {self._name(of): 0 for of, _ in _leaves(self.published) if parts is None or of[0] in parts}
        rows = rows if self.where is None else rows.query(self.where, engine="python")
        how, _, column = self.count.partition(" ")
        how = "nunique" if how == "distinct" else how
        if not self.columns:
            return {self.name: int(len(rows) if how == "rows" else rows[column].agg(how))}
        groups = rows.groupby(self.columns, sort=False, dropna=False, observed=False)
        counted = groups.size() if how == "rows" else groups[column].agg(how)
        for key, number in counted.items():
            values = ["missing" if pd.isna(each) else str(each) for each in (key if isinstance(key, tuple) else [key])]
            counts[self._name(values)] = int(number)
        return counts

    def published_counts(self) -> dict[str, int]:
        """Return each number that was published, by the name of its count."""
        return {self._name(values): number for values, number in _leaves(self.published)}

    def _name(self, values: Sequence[str]) -> str:
        return self.name.format(**dict(zip(self.columns, values, strict=True)))


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(tree, Mapping):
        for key, below in tree.items():
            yield from _leaves(below, (*path, str(key)))
    elif tree is not None:
        yield path, tree


@dataclass(frozen=True)
class Benchmark:
    """A labeled data set.

    Attributes:
        definitions: of its tasks; the first of a task is its default.
        notes: what a user must know: unclear labels, leaks removed.
        read_index: folder of the data set -> index; needs the metadata files only.
        read_tables: folder -> tables by name, in which `counts` are counted; needs the metadata files only. The index
            alone where None.
        locate: (index, folder) -> index with `path` from the files on disk, where the metadata do not name them.
        read_boxes: (index as located, folder) -> index with `boxes`, where they are in the pixels of masks.
        read_views: folder -> what sets right the volumes in whose true orientation the boxes are.
        no_sharing: why an export is refused; empty where the license allows sharing.
        refused: of a label table, why a column is no task.
    """

    name: str
    title: str
    homepage: str
    license: str
    citation: str
    definitions: tuple[Definition, ...]
    notes: tuple[str, ...]
    read_index: Callable[[Path], pd.DataFrame]
    counts: tuple[Count, ...] = ()
    read_tables: Callable[[Path], dict[str, pd.DataFrame]] | None = None
    locate: Callable[[pd.DataFrame, Path], pd.DataFrame] | None = None
    read_boxes: Callable[[pd.DataFrame, Path], pd.DataFrame] | None = None
    read_views: Callable[[Path], Any] | None = None
    no_sharing: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_yaml(cls, module: str, **functions: Any) -> "Benchmark":
        """Return the data set that the YAML file beside a module describes; `functions` are its callables."""
        path = Path(module).with_suffix(".yaml")
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
        for each in about["definitions"]:
            each["values"] = {value: str(name) for value, name in each["values"].items()}
        about["definitions"] = tuple(Definition(**each) for each in about["definitions"])
        about["counts"] = tuple(Count(**each) for each in about["counts"])
        return cls(**{"name": path.stem, **about, "notes": tuple(about["notes"])}, **functions)

    @property
    def published(self) -> dict[str, int]:
        """What was published about its size, by the names of `count`."""
        return {name: number for each in self.counts for name, number in each.published_counts().items()}

    def count(self, data_dir: Path) -> dict[str, int]:
        """Return what is here, of what its metadata files that are here can tell. Raises as `read_index`."""
        if self.read_tables is None:
            index = self.read_index(data_dir)
            tables = {"images": index.assign(density=pd.Categorical(index["density"], DENSITIES))}
        else:
            tables = self.read_tables(data_dir)
        return {name: number for each in self.counts for name, number in each.of(tables).items()}

    def definition(self, task: str, name: str | None = None) -> Definition:
        """Return the definition of a task by name, or its default. Raises ValueError that says what there is."""
        of_task = {each.name: each for each in self.definitions if each.task == task}
        if not of_task:
            has = ", ".join(dict.fromkeys(each.task for each in self.definitions))
            why = self.refused.get(task, f"{self.name} has no labels for it")
            raise ValueError(f"task {task!r}: {why}; it has {has}")
        if name is None:
            return next(iter(of_task.values()))
        if name not in of_task:
            raise ValueError(f"definition {name!r}: {self.name} defines {task} as {', '.join(of_task)}")
        return of_task[name]


# ---- metadata files, CSV or Excel: every cell stripped text, every fault one line with its remedy ----------------

Columns = Sequence[str] | Mapping[str, Sequence[str]]  # names; or our name for a column, and how files spell it


@dataclass(frozen=True)
class MetadataTable:
    path: Path
    rows: pd.DataFrame  # of str, stripped, "" where empty; a RangeIndex
    remedy: str
    sheet: str = ""

    def fault(self, row: int, column: str, expected: str) -> ValueError:
        """Return an error that says what is wrong with a cell; rows count from 1, without the header."""
        value = self.rows[column].iloc[row]
        return ValueError(f"{self.place}, row {row + 1}: {column} is {value!r}, {expected}; {self.remedy}")

    @property
    def place(self) -> str:
        return f"{self.path}, sheet {self.sheet!r}" if self.sheet else str(self.path)

    def text(self, column: str, required: bool = False) -> pd.Series:
        """Return cells of type string, missing where empty. Raises ValueError for an empty cell that is `required`."""
        cells = self.rows[column].astype("string")
        empty = cells == ""
        if required and empty.any():
            raise self.fault(int(empty.argmax()), column, "but must not be empty")
        return cells.mask(empty)

    def number(self, column: str, required: bool = False) -> pd.Series:
        """Return cells of type Float64, missing where empty. Raises ValueError for what is no finite number."""
        cells = self.text(column, required)
        numbers = pd.to_numeric(cells, errors="coerce").astype("Float64")
        wrong = cells.notna() & ~numbers.abs().lt(float("inf")).fillna(False)
        if wrong.any():
            raise self.fault(int(wrong.argmax()), column, "not a number")
        return numbers

    def whole(self, column: str, required: bool = False) -> pd.Series:
        """Return cells of type Int64, missing where empty; "2.0" is 2. Raises ValueError for other numbers."""
        numbers = self.number(column, required)
        broken = (numbers % 1 != 0).fillna(False)
        if broken.any():
            raise self.fault(int(broken.argmax()), column, "not a whole number")
        return numbers.astype("Int64")

    def choice(self, column: str, meanings: Mapping[str, Any]) -> pd.Series:
        """Return what each cell means, objects; "" is an empty cell. Raises ValueError for a cell that is no key."""
        cells = self.rows[column]
        unknown = ~cells.isin(list(meanings))
        if unknown.any():
            names = ", ".join(key or "empty" for key in meanings)
            raise self.fault(int(unknown.argmax()), column, f"not one of {names}")
        return pd.Series([meanings[cell] for cell in cells], index=cells.index, dtype=object)


def in_parts(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table once in their `part` and once in the part "all", as `Count` wants them."""
    return pd.concat([table, table.assign(part="all")], ignore_index=True)


def find_file(data_dir: Path, names: Sequence[str], remedy: str) -> Path:
    """Return the first of `names` in the folder. Raises FileNotFoundError that names folder, file and remedy."""
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder; {remedy}")
    for name in names:
        if (path := Path(data_dir) / name).is_file():
            return path
    raise FileNotFoundError(f"{data_dir}: no {' or '.join(names)}; {remedy}")


def read_csv(path: Path, columns: Columns, remedy: str, optional: Columns = ()) -> MetadataTable:
    """Read a CSV file with at least `columns`; of wide files, columns that are not named are not read.

    Raises ValueError naming file, column and remedy.
    """

    def read(**options: Any) -> MetadataTable:
        try:
            rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", **options)
        except (ValueError, pd.errors.ParserError) as error:  # empty file, broken quotes, not text
            raise ValueError(f"{path}: not a CSV file ({type(error).__name__}); {remedy}") from error
        return MetadataTable(path, rows, remedy)

    sources = _sources(read(nrows=0), columns, optional)
    return _select(read(usecols=list(set(sources.values()))), sources)


def read_sheets(path: Path, columns: Mapping[str, Columns], remedy: str) -> dict[str, MetadataTable]:
    """Read sheets of an Excel file by the names in `columns`, as `read_csv`; names of sheets match as columns do."""
    try:
        sheets = pd.read_excel(path, sheet_name=None, dtype=str, keep_default_na=False, engine="openpyxl")
    except ImportError as error:
        raise ImportError(f"{path}: reading Excel needs openpyxl: pip install openpyxl") from error
    except Exception as error:  # openpyxl raises what zip, XML and its own checks raise
        raise ValueError(f"{path}: not a readable Excel file ({type(error).__name__}); {remedy}") from error
    found = {}
    for name, of_sheet in columns.items():
        matching = [sheet for sheet in sheets if _plain(sheet) == _plain(name)]
        if not matching:
            raise ValueError(f"{path}: no sheet {name!r}; it has {', '.join(map(repr, sheets))}; {remedy}")
        sheet = MetadataTable(path, sheets[matching[0]], remedy, name)
        found[name] = _select(sheet, _sources(sheet, of_sheet))
    return found


def _sources(table: MetadataTable, columns: Columns, optional: Columns = ()) -> dict[str, str]:
    """Return the table's name of each column. Raises ValueError where one is not there that is not optional."""
    spelt = {_plain(name): name for name in reversed(table.rows.columns)}  # the first where two are alike
    sources = {}
    for wanted, is_required in ((columns, True), (optional, False)):
        for name, spellings in (wanted if isinstance(wanted, Mapping) else {each: [each] for each in wanted}).items():
            source = next((spelt[_plain(each)] for each in spellings if _plain(each) in spelt), None)
            if source is not None:
                sources[name] = source
            elif is_required:
                has = ", ".join(map(str, table.rows.columns))
                raise ValueError(f"{table.place}: no column {' or '.join(spellings)}; it has {has}; {table.remedy}")
    return sources


def _select(table: MetadataTable, sources: Mapping[str, str]) -> MetadataTable:
    kept = {name: table.rows[source].fillna("").astype(str).str.strip() for name, source in sources.items()}
    rows = pd.DataFrame(kept).reset_index(drop=True)
    if rows.empty:
        raise ValueError(f"{table.place}: no rows; {table.remedy}")
    return MetadataTable(table.path, rows, table.remedy, table.sheet)


def _plain(name: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


# ---- where the clients of TCIA and of the Imaging Data Commons put a collection ----------------------------------


def collection_roots(data_dir: Path, collection: str) -> list[Path]:
    """Return data_dir itself, its folder of the collection, and that of the retriever's manifest-* folders.

    The folder's name counts without case and signs: the Imaging Data Commons writes cbis_ddsm for CBIS-DDSM.
    """
    data_dir = Path(data_dir)
    inside = [path for pattern in ("*", "manifest-*/*") for path in sorted(data_dir.glob(pattern))]
    return [data_dir, *(path for path in inside if _plain(path.name) == _plain(collection) and path.is_dir())]


def subject_files(
    data_dir: Path, collection: str, subjects: Iterable[str], stated: Mapping[str, Path] = MappingProxyType({})
) -> dict[str, list[Path]]:
    """Return the DICOM files of the subjects that are found, in order of their paths.

    A subject's files are those in the folder of its name below a root, or in a folder that is `stated`; where there is
    none, those below data_dir whose header has it as PatientID, as clients name folders by series, too.
    """
    folders: dict[str, Path] = {}
    for root in collection_roots(data_dir, collection):
        for entry in sorted(os.scandir(root), key=lambda each: each.name):
            if entry.is_dir():
                folders.setdefault(entry.name, Path(entry.path))
    folders = {**stated, **folders}
    wanted = dict.fromkeys(subjects)
    found = {subject: dicom_files(folders[subject]) for subject in wanted if subject in folders}
    if unnamed := [subject for subject in wanted if subject not in found]:
        by_header = files_by_element(data_dir, "PatientID", set().union(*found.values()))
        found |= {subject: by_header[subject] for subject in unnamed if subject in by_header}
    return found


def say_where(name: str, data_dir: Path, collection: str, absent: Sequence[str], of: int, also: str = "") -> None:
    """Log which images of a collection were not found, and where was looked for them."""
    if absent:
        roots = ", ".join(map(str, collection_roots(data_dir, collection)))
        logger.warning(
            "%s: %d of %d images are not there, first %s: looked below %s%s",
            name,
            len(absent),
            of,
            absent[0],
            roots,
            also,
        )


def files_by_element(data_dir: Path, keyword: str, known: Collection[Path] = ()) -> dict[str, list[Path]]:
    """Return the DICOM files below data_dir, without the `known`, by an identifier in their headers."""
    found: dict[str, list[Path]] = {}
    others = [path for path in dicom_files(Path(data_dir)) if path not in known]
    for path, header in read_headers(others).items():
        found.setdefault(identifier(header, keyword), []).append(path)
    return found


def dicom_files(folder: Path) -> list[Path]:
    """Return the files below a subject's folder, whatever study and series are called, in order of their paths."""
    return sorted(path for path in map(Path, walk(folder).files) if path.suffix.lower() == ".dcm")


def read_headers(paths: list[Path]) -> dict[Path, Any]:
    """Return a pydicom Dataset without pixels for each file; without those that are no readable DICOM."""
    headers = {}
    for path in paths:
        try:
            headers[path] = open_dicom(path).header
        except InvalidImageError:  # whoever reads its pixels says why
            continue
    return headers


def relative(path: Path, data_dir: Path) -> str:
    """Return the path as the index has it: relative to data_dir, forward slashes."""
    return path.relative_to(data_dir).as_posix()
