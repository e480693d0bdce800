"""A data set for one task: its labeled images with their files, classes and splits.

Splits are by patient: official ones stay, what is missing is held out of train, with every class in its share. Who is
held out is a function of seed, patients and their labels: patients of a class are ordered by a hash of seed and id, so
that neither the order of rows nor the version of a library matters, and a patient more moves few others.

task = load_task("phantom", "runs/demo/phantom", "cancer")
task.table[task.table["split"] == "train"][["file", "label"]]
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from . import get_benchmark
from .index import ABOUT_IMAGE, SCHEMA, SPLITS, Benchmark, Box, Definition
from .labels import ABOUT, TABLE, table_benchmark

logger = logging.getLogger(__name__)

MISSING = "image file missing"
_KINDS = {"string": datasets.Value("string"), "Int8": datasets.Value("int8")}
_BOX = {int: datasets.Value("int32"), float: datasets.Value("float64"), str: datasets.Value("string")}
_LISTS = {
    "lesion_types": datasets.List(datasets.Value("string")),
    "boxes": datasets.List({name: _BOX[kind] for name, kind in Box.__annotations__.items()}),
}
INDEX_FEATURES = datasets.Features(
    {column: _LISTS[column] if kind == "object" else _KINDS[kind] for column, kind in SCHEMA.items()}
)


def to_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of an index as dicts; missing cells are None."""
    cells = table.astype(object)
    return cells.where(table.notna(), None).to_dict("records")


def complete_splits(
    patients: pd.Series,
    labels: pd.Series,
    official: pd.Series,
    *,
    seed: int,
    validation_fraction: float,
    test_fraction: float,
) -> pd.Series:
    """Return the split of each row, one of SPLITS.

    official: split of a row, all missing where the data set has none. test_fraction is of all patients, or of those in
    train where only test is missing; validation_fraction is of the patients that then are in train.

    Raises ValueError for a fraction outside 0..1, for rows with and without an official split, and where an official
    split has a patient twice.
    """
    fractions = {"test": test_fraction, "validation": validation_fraction}
    for name, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise ValueError(f"{name}_fraction={fraction}: must be between 0 and 1")
    if official.notna().any() and official.isna().any():
        raise ValueError(f"split: {int(official.isna().sum())} rows without one beside rows with one; fill all or none")
    split = official.astype("string").fillna("train")
    for name, fraction in fractions.items():
        if not (split == name).any():
            rest = split == "train"
            held_out = _held_out(patients[rest], labels[rest], fraction, seed)
            split = split.mask(rest & patients.isin(held_out), name)
    of_patient = split.groupby(patients).nunique()
    if (of_patient > 1).any():
        shared = of_patient.index[of_patient > 1]
        raise ValueError(
            f"split: {len(shared)} patients are in more than one of {', '.join(SPLITS)}, first {shared[0]}; "
            "a patient belongs in one"
        )
    return split


def _held_out(patients: pd.Series, labels: pd.Series, fraction: float, seed: int) -> set[str]:
    """Return a share of each class' patients, at least one, never the last; a patient counts for its rarest class."""
    by_label = patients.groupby(labels).nunique()
    rarity = by_label.sort_index().sort_values(kind="stable").index
    held_out: set[str] = set()
    free = set(patients)
    for label in rarity:
        of_class = sorted(free & set(patients[labels == label]), key=lambda patient: _rank(seed, patient))
        free -= set(of_class)
        held_out.update(of_class[: min(max(1, round(fraction * len(of_class))), len(of_class) - 1)])
    return held_out


def _rank(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed} {patient}".encode()).digest()


@dataclass(frozen=True, eq=False)
class TaskTable:
    """The labeled images of a task.

    Attributes:
        table: SCHEMA's columns, `file` (absolute path, str), `label` (int, place in `classes`), and what is known of
            ABOUT_IMAGE, a row an image, in
            order of image_id. `split` is one of SPLITS in every row, and no patient is in two.
        counts: per split "images", "breasts", "patients" and "classes" (images by class); "left_out": images by reason.
        official: the splits that the data set itself has; the others were held out here.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    benchmark: Benchmark
    definition: Definition
    counts: dict[str, Any]
    official: tuple[str, ...]


def load_task(
    name: str,
    data_dir: str | Path,
    task: str,
    definition: str | None = None,
    *,
    classes: Sequence[str] = (),
    seed: int = 0,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.2,
    allow_missing: bool = False,
    with_boxes: bool = False,
) -> TaskTable:
    """Return the images of a data set that have a label of the task, split by patient.

    Official splits stay; what is missing of them is held out of train by `complete_splits`, a function of `seed`, the
    patients and their labels.

    Args:
        name: one of `BENCHMARKS`, or "table" for a label table (`labels`).
        data_dir: its folder as downloaded, or the table.
        task: one of TASKS, or a column. definition: what its classes mean; the data set's default where None.
        classes: those that count, in order, the worst last; all of the definition where empty.
        allow_missing: leave images out whose file is not there, after the split, so that it stays the same.
        with_boxes: read boxes, too, where they are in the pixels of masks (CBIS-DDSM).

    Raises FileNotFoundError or ValueError, before an image is opened: for what cannot be read of the metadata, an
    unknown name, missing image files, or a class that a split has no image of.
    """
    data_dir = Path(data_dir).absolute()
    benchmark, chosen, index, label = _labels(name, data_dir, task, definition, classes)
    has_split = index["split"].notna() | index["split"].isna().all()
    left_out = {
        "no label by this definition": int(label.isna().sum()),
        "no official split": int((label.notna() & ~has_split).sum()),
    }
    kept = label.notna() & has_split
    table = index[kept].assign(label=label[kept].astype("int64"))
    fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    try:
        table["split"] = complete_splits(table["patient_id"], table["label"], table["split"], seed=seed, **fractions)
    except ValueError as error:
        raise (ValueError(f"{data_dir}: {error}") if name == TABLE else error) from None
    is_there = find_files(table, data_dir, allow_missing)
    left_out[MISSING] = int((~is_there).sum())
    table = table.loc[is_there, _columns(table)].sort_values("image_id").reset_index(drop=True)
    if with_boxes and benchmark.read_boxes is not None:
        table = benchmark.read_boxes(table, data_dir)
    counts = _counts(table, chosen.classes) | {"left_out": {why: n for why, n in left_out.items() if n}}
    _check_classes(counts, chosen, str(data_dir) if name == TABLE else name)
    logger.info("%s, %s (%s): %s", benchmark.name, task, chosen.name, counts)
    return TaskTable(table, chosen.classes, benchmark, chosen, counts, official_splits(index))


def labeled_images(
    name: str,
    data_dir: str | Path,
    task: str,
    definition: str | None = None,
    *,
    classes: Sequence[str] = (),
    allow_missing: bool = False,
) -> tuple[pd.DataFrame, Definition]:
    """Return all images that have a label of the task, whatever their split, as `TaskTable.table`, to be tested on.
    Arguments and errors as those of `load_task`."""
    data_dir = Path(data_dir).absolute()
    _, chosen, index, label = _labels(name, data_dir, task, definition, classes)
    table = index[label.notna()].assign(label=label[label.notna()].astype("int64"))
    table = table[find_files(table, data_dir, allow_missing)]
    return table[_columns(table)].reset_index(drop=True), chosen


def _labels(
    name: str, data_dir: Path, task: str, definition: str | None, classes: Sequence[str]
) -> tuple[Benchmark, Definition, pd.DataFrame, pd.Series]:
    """Return data set, definition, index with files, and the place in the classes of each row, missing without one."""
    benchmark = open_benchmark(name, data_dir)
    try:
        chosen = benchmark.definition(task, definition)
        chosen = chosen.in_order(classes) if classes else chosen
    except ValueError as error:
        raise (ValueError(f"{data_dir}: {error}; {ABOUT}") if name == TABLE else error) from None
    if name == TABLE and len(chosen.classes) == 2 and not chosen.is_ordered:
        negative, positive = chosen.classes
        logger.warning("%s: %s counts as positive; --classes %s,%s turns it round", task, positive, positive, negative)
    index = located(benchmark, data_dir)
    return benchmark, chosen, index, class_numbers(chosen, index)


def _columns(table: pd.DataFrame) -> list[str]:
    return [*SCHEMA, "file", "label", *(name for name in ABOUT_IMAGE if name in table)]


def load_benchmark(
    name: str, data_dir: str | Path, task: str, definition: str | None = None, **options: Any
) -> datasets.DatasetDict:
    """Return the same as `datasets` has it: train, validation and test, each with `file`, `label` and SCHEMA's columns.

    Options and errors are those of `load_task`. For the images themselves: `builder`.
    """
    loaded = load_task(name, data_dir, task, definition, **options)
    features = datasets.Features(
        {"file": datasets.Value("string"), "label": datasets.ClassLabel(names=list(loaded.classes)), **INDEX_FEATURES}
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(
                to_rows(loaded.table.loc[loaded.table["split"] == split, list(features)]), features=features
            )
            for split in SPLITS
        }
    )


def open_benchmark(name: str, data_dir: Path) -> Benchmark:
    """Return the data set of a name; of a label table with the tasks that its columns are."""
    return table_benchmark(data_dir) if name == TABLE else get_benchmark(name)


def located(benchmark: Benchmark, data_dir: Path, with_boxes: bool = False) -> pd.DataFrame:
    """Return the index, in order of image_id, with `file`: absolute paths, missing where no file is known.

    Boxes that are in the pixels of masks are read only `with_boxes`: each costs an image.
    """
    index = benchmark.read_index(data_dir)
    if benchmark.locate is not None:
        index = benchmark.locate(index, data_dir)
    if with_boxes and benchmark.read_boxes is not None:
        index = benchmark.read_boxes(index, data_dir)
    root = data_dir if data_dir.is_dir() else data_dir.parent
    file = index["path"].map(lambda path: str(root / path), na_action="ignore").astype("string")
    return index.assign(file=file).sort_values("image_id", ignore_index=True)


def official_splits(index: pd.DataFrame) -> tuple[str, ...]:
    return tuple(split for split in SPLITS if (index["split"] == split).any())


def files_there(table: pd.DataFrame) -> pd.Series:
    """Return whether the file of each row is there, bool."""
    return table["file"].map(lambda file: not pd.isna(file) and Path(file).is_file()).astype(bool)


def find_files(table: pd.DataFrame, data_dir: Path, allow_missing: bool) -> pd.Series:
    """Return whether the file of each row is there. Raises ValueError where one is not, with `allow_missing` where none
    is."""
    is_there = files_there(table)
    if not is_there.all() and not (allow_missing and is_there.any()):
        first = table[~is_there].iloc[0]
        remedy = "complete the download, or leave them out with allow_missing"
        remedy = "give the folder that holds them" if allow_missing else remedy
        where = f"of image {first['image_id']}" if pd.isna(first["file"]) else first["file"]
        raise ValueError(
            f"{data_dir}: {int((~is_there).sum())} of {len(table)} image files are missing, first {where}; {remedy}"
        )
    return is_there


def class_numbers(definition: Definition, index: pd.DataFrame) -> pd.Series:
    """Return the place in the definition's classes of each row, Int64, missing where it has no label."""
    places = {each: place for place, each in enumerate(definition.classes)}
    return definition.label(index).map(places, na_action="ignore").astype("Int64")


def _counts(table: pd.DataFrame, classes: tuple[str, ...]) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    for split in SPLITS:
        of = table[table["split"] == split]
        counts[split] = {
            "images": len(of),
            "breasts": of["breast_id"].nunique(),
            "patients": of["patient_id"].nunique(),
            "classes": {name: int((of["label"] == place).sum()) for place, name in enumerate(classes)},
        }
    return counts


def _check_classes(counts: dict[str, Any], definition: Definition, name: str) -> None:
    for split in SPLITS:
        for each, images in counts[split]["classes"].items():
            if not images:
                patients = sum(counts[other]["classes"][each] for other in SPLITS)
                raise ValueError(
                    f"{name}, {definition.task} ({definition.name}): no image of class {each!r} in {split}, "
                    f"{patients} elsewhere; add patients of that class, or choose another definition or split"
                )
