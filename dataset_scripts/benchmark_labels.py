"""Labels that data sets define alike: by the value of a column, by density, by the one type of lesion."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas

from .benchmark_index import DENSITIES, Definition


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
