"""Labels that data sets define alike: by the value of a column, by density, by the one type of lesion."""
# MERGED: One schema for every labeled data set, and what a data set must say to be a benchmark.
#
# A data set is one file here with a `BENCHMARK`: where it comes from, how its metadata become an index, what counts as
# positive, and what was published about its size. `dataset_scripts.benchmarks` lists them.
#

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import pandas

TASKS = ("cancer", "lesion", "birads", "density", "lesion_type")
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


class Box(TypedDict):
    """A lesion's box in pixels of the image as stored in the coordinates of the data set, half-open."""

    x0: float
    y0: float
    x1: float
    y1: float
    slice: int  # 0-based, in the order of the data set; -1 in a 2-D image
    label: str  # as the data set names the finding


@dataclass(frozen=True)
class Definition:
    """What a task means on a data set: a class for each image, or none where the case is unclear."""

    task: str  # one of TASKS
    name: str  # chosen by --definition
    meaning: str  # what counts as positive, and which cases are left out
    classes: tuple[str, ...]  # in order; of two the second is positive
    label: Callable[[pandas.DataFrame], pandas.Series]  # index -> class name or missing, a row an image


@dataclass(frozen=True)
class Benchmark:
    name: str
    title: str
    homepage: str
    license: str
    citation: str
    read_index: Callable[[Path], pandas.DataFrame]  # needs the metadata files only
    definitions: tuple[Definition, ...]  # the first of a task is its default
    count: Callable[[Path], dict[str, int]]  # what verification compares with `published`; metadata files only
    published: dict[str, int]  # same keys
    locate: Callable[[pandas.DataFrame, Path], pandas.DataFrame] | None = None  # fills `path` from the files on disk
    no_sharing: str = ""  # why an export is refused; empty where the license allows sharing
    notes: tuple[str, ...] = field(default=())  # what a user must know: unclear labels, leaks removed

    def definition(self, task: str, name: str | None = None) -> Definition:
        """The definition of a task by name, or its default. Raises ValueError that says what there is."""
        of_task = {each.name: each for each in self.definitions if each.task == task}
        if not of_task:
            has = ", ".join(dict.fromkeys(each.task for each in self.definitions))
            raise ValueError(f"task {task!r}: {self.name} has no labels for it; it has {has}")
        if name is None:
            return next(iter(of_task.values()))
        if name not in of_task:
            raise ValueError(f"definition {name!r}: {self.name} defines {task} as {', '.join(of_task)}")
        return of_task[name]


def make_index(rows: list[dict], name: str) -> pandas.DataFrame:
    """An index of SCHEMA's columns and types from one dict an image; keys that a row lacks are missing cells.

    Raises ValueError for an unknown key, a repeated image_id or a value out of range, naming image and column.
    """
    index = pandas.DataFrame(rows, columns=[*SCHEMA, *({key for row in rows for key in row} - set(SCHEMA))])
    if extra := [column for column in index if column not in SCHEMA]:
        raise ValueError(f"{name}: {', '.join(map(str, extra))}: no column of the schema")
    for column in ("lesion_types", "boxes"):
        index[column] = index[column].astype(object).where(index[column].notna(), None)
    index = index.astype({column: kind for column, kind in SCHEMA.items() if kind != "object"})
    ranges = {
        "laterality": ("L", "R"),
        "split": SPLITS,
        "cancer": (0, 1),
        "lesion": (0, 1),
        "birads": tuple(range(7)),
        "density": DENSITIES,
    }
    for column, allowed in ranges.items():
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
        raise ValueError(f"{name}: image_id {index['image_id'][repeated].iloc[0]!r} occurs more than once")
    return index


def by_value(task: str, name: str, meaning: str, column: str, classes: Mapping[Any, str]) -> Definition:
    """A definition that gives each value of an index column its class; values not named are left out."""
    return Definition(task, name, meaning, tuple(dict.fromkeys(classes.values())), partial(_by_value, column, classes))


def _by_value(column: str, classes: Mapping[Any, str], index: pandas.DataFrame) -> pandas.Series:
    values = index[column].astype(object)
    return values.map(lambda value: None if pandas.isna(value) else classes.get(value)).astype("string")


def four_densities(source: str) -> Definition:
    """ACR densities A to D as they are."""
    classes = {letter: letter for letter in DENSITIES}
    return by_value("density", "four", f"{source}; images without it are left out", "density", classes)


def dense(source: str) -> Definition:
    """Heterogeneously or extremely dense against the rest, as breast density notification laws divide."""
    classes = {"A": "not dense", "B": "not dense", "C": "dense", "D": "dense"}
    return by_value("density", "dense", f"dense: C or D, {source}; images without it are left out", "density", classes)


def single_type(name: str, meaning: str, classes: Mapping[str, str]) -> Definition:
    """The lesion's type among images with types of one class only; `classes` by the names in `lesion_types`.

    Images without a lesion, with types of several classes or with a type that is not named are left out.
    """
    of_types = partial(_single_type, classes)
    return Definition("lesion_type", name, meaning, tuple(dict.fromkeys(classes.values())), of_types)


def _single_type(classes: Mapping[str, str], index: pandas.DataFrame) -> pandas.Series:
    def one(types: list[str] | None) -> str | None:
        found = {classes.get(each) for each in types or ()}
        return found.pop() if len(found) == 1 else None

    return index["lesion_types"].map(one).astype("string")
