"""A data set for one task: its labelled images with their files, classes and splits.

task = load_task("phantom", "runs/demo/phantom", "cancer")
task.table[task.table["split"] == "train"][["file", "label"]]
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas

from .benchmark_features import INDEX_FEATURES, to_rows
from .benchmark_index import SPLITS, Benchmark, Definition
from .benchmark_splits import complete_splits
from .benchmarks import get_benchmark
from .own_table import BENCHMARK as OWN_TABLE
from .own_table import table_benchmark

logger = logging.getLogger(__name__)

MISSING = "image file missing"


@dataclass(frozen=True, eq=False)
class TaskTable:
    """The labelled images of a task.

    Attributes:
        table: SCHEMA's columns, `file` (absolute path, str) and `label` (int, place in `classes`), a row an image, in
            order of image_id. `split` is one of SPLITS in every row, and no patient is in two.
        counts: per split "images", "breasts", "patients" and "classes" (images by class); "left_out": images by reason.
        official: the splits that the data set itself has; the others were held out here.
    """

    table: pandas.DataFrame
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
    seed: int = 0,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.2,
    allow_missing: bool = False,
) -> TaskTable:
    """The images of a data set that have a label of the task, split by patient.

    Official splits stay; what is missing of them is held out of train by `complete_splits`, a function of `seed`, the
    patients and their labels.

    Args:
        name: one of `BENCHMARKS`, or "table" for a table of one's own (`own_table`).
        data_dir: its folder as downloaded, or the table.
        task: one of TASKS. definition: what its classes mean; the data set's default where None.
        allow_missing: leave images out whose file is not there, after the split, so that it stays the same.

    Raises FileNotFoundError or ValueError, before an image is opened: for what cannot be read of the metadata, an
    unknown name, missing image files, or a class that a split has no image of.
    """
    data_dir = Path(data_dir).absolute()
    benchmark = open_benchmark(name, data_dir)
    chosen = benchmark.definition(task, definition)
    index = located(benchmark, data_dir)
    label = class_numbers(chosen, index, benchmark.name)
    has_split = index["split"].notna() | index["split"].isna().all()
    left_out = {
        "no label by this definition": int(label.isna().sum()),
        "no official split": int((label.notna() & ~has_split).sum()),
    }
    kept = label.notna() & has_split
    table = index[kept].assign(label=label[kept].astype("int64"))
    table["split"] = complete_splits(
        table["patient_id"],
        table["label"],
        table["split"],
        seed=seed,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
    )
    is_there = find_files(table, data_dir, allow_missing)
    left_out[MISSING] = int((~is_there).sum())
    table = table[is_there].sort_values("image_id").reset_index(drop=True)
    counts = _counts(table, chosen.classes) | {"left_out": {why: n for why, n in left_out.items() if n}}
    _check_classes(counts, chosen, benchmark.name)
    logger.info("%s, %s (%s): %s", benchmark.name, task, chosen.name, counts)
    return TaskTable(table, chosen.classes, benchmark, chosen, counts, official_splits(index))


def load_benchmark(
    name: str, data_dir: str | Path, task: str, definition: str | None = None, **options: Any
) -> datasets.DatasetDict:
    """The same for code that takes `datasets`: train, validation and test, each with `file`, `label` (ClassLabel) and
    SCHEMA's columns. Options and errors are those of `load_task`. For the pictures themselves: `benchmark_builder`."""
    loaded = load_task(name, data_dir, task, definition, **options)
    features = datasets.Features(
        {"file": datasets.Value("string"), "label": datasets.ClassLabel(names=list(loaded.classes)), **INDEX_FEATURES}
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(to_rows(loaded.table[loaded.table["split"] == split]), features=features)
            for split in SPLITS
        }
    )


def open_benchmark(name: str, data_dir: Path) -> Benchmark:
    """The data set of a name; for a table of one's own, with the definitions that its columns allow."""
    return table_benchmark(data_dir) if name == OWN_TABLE.name else get_benchmark(name)


def located(benchmark: Benchmark, data_dir: Path) -> pandas.DataFrame:
    """The index, in order of image_id, with the column `file`: absolute paths, missing where no file is known."""
    index = benchmark.read_index(data_dir)
    if benchmark.locate is not None:
        index = benchmark.locate(index, data_dir)
    root = data_dir if data_dir.is_dir() else data_dir.parent
    file = index["path"].map(lambda path: str(root / path), na_action="ignore").astype("string")
    return index.assign(file=file).sort_values("image_id", ignore_index=True)


def official_splits(index: pandas.DataFrame) -> tuple[str, ...]:
    return tuple(split for split in SPLITS if (index["split"] == split).any())


def find_files(table: pandas.DataFrame, data_dir: Path, allow_missing: bool) -> pandas.Series:
    """Whether the file of each row is there. Raises ValueError where one is not, unless `allow_missing`."""
    is_there = table["file"].map(lambda file: not pandas.isna(file) and Path(file).is_file()).astype(bool)
    if not is_there.all() and not allow_missing:
        first = table[~is_there].iloc[0]
        where = f"of image {first['image_id']}" if pandas.isna(first["file"]) else first["file"]
        raise ValueError(
            f"{data_dir}: {int((~is_there).sum())} of {len(table)} image files are missing, first {where}; complete "
            "the download, or leave them out with allow_missing"
        )
    return is_there


def class_numbers(definition: Definition, index: pandas.DataFrame, name: str) -> pandas.Series:
    """Place in the definition's classes of each row, Int64, missing where it has no label."""
    label = definition.label(index)
    if unknown := sorted(set(label.dropna()) - set(definition.classes)):
        raise ValueError(f"{name}, {definition.task} ({definition.name}): {unknown[0]!r} is none of its classes")
    places = {each: place for place, each in enumerate(definition.classes)}
    return label.map(places, na_action="ignore").astype("Int64")


def _counts(table: pandas.DataFrame, classes: tuple[str, ...]) -> dict[str, Any]:
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
