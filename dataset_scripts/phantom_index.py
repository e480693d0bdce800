"""The phantom (`dataset_scripts.phantom`) as a benchmark: every task has labels, all of them simulated.

data_dir holds the archive that `python -m dataset_scripts.phantom --output DIR` wrote, or archives in its folders
train, validation and test, which then are the official split. A row of the index is a file: a volume or a mammogram.
"""

import csv
from functools import partial
from pathlib import Path

import pandas

from .benchmark_index import DENSITIES, SPLITS, Benchmark, Box, Definition, make_index

LABELS = "labels.csv"
COLUMNS = (
    *("file", "patient", "laterality", "view", "kind", "density", "lesion", "lesion_type", "cancer"),
    *("x0", "y0", "x1", "y1", "lesion_slice"),
)
LESION_TYPES = ("mass_round", "mass_spiculated", "calcification")
REMEDY = "write it again with python -m dataset_scripts.phantom"


def read_index(data_dir: Path) -> pandas.DataFrame:
    """SCHEMA rows of the files. Raises FileNotFoundError, and ValueError naming file, line and column.

    A lesion's box carries its central slice in a volume, -1 in a mammogram. Patients of two folders must differ: the
    same number is the same breast, unless the seeds differ, which the labels do not say.
    """
    rows, split_of = [], {}
    for split, folder in _archives(Path(data_dir)):
        of_archive = [_row(folder / LABELS, line, split, each) for line, each in _read(folder / LABELS)]
        for patient in {row["patient_id"] for row in of_archive}:
            if split_of.setdefault(patient, split) != split:
                raise ValueError(
                    f"{data_dir}: {patient} is in {split_of[patient]} and in {split}; write one of them with another "
                    "--first_patient"
                )
        rows += of_archive
    return make_index(rows, "phantom")


def _archives(data_dir: Path) -> list[tuple[str | None, Path]]:
    """Split and folder of each archive."""
    parts = [(split, data_dir / split) for split in SPLITS if (data_dir / split / LABELS).is_file()]
    if (data_dir / LABELS).is_file():
        if parts:
            raise ValueError(f"{data_dir}: {LABELS} here and in {parts[0][1].name}/; keep one of them")
        return [(None, data_dir)]
    if not parts:
        raise FileNotFoundError(
            f"{data_dir}: no {LABELS}, neither here nor in train/ and test/; write an archive with python -m "
            f"dataset_scripts.phantom --output {data_dir}"
        )
    return parts


def _read(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells of each row."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            has = ", ".join(reader.fieldnames or ())
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {has}; {REMEDY}")
        rows = [(reader.line_num, row) for row in reader]
    if not rows:
        raise ValueError(f"{path}: no rows; {REMEDY}")
    return rows


def _row(path: Path, line: int, split: str | None, cells: dict[str, str]) -> dict:
    def number(name: str) -> int:
        try:
            return int(cells[name])
        except (TypeError, ValueError):
            raise ValueError(f"{path}, line {line}: {name} is {cells[name]!r}, not a whole number; {REMEDY}") from None

    patient, lesion, cancer = cells["patient"], number("lesion"), number("cancer")
    boxes = []
    if lesion:
        at = number("lesion_slice") if cells["kind"] == "dbt" else -1
        corners = {name: float(number(name)) for name in ("x0", "y0", "x1", "y1")}
        boxes.append(Box(**corners, slice=at, label=cells["lesion_type"]))
    return {
        "patient_id": patient,
        "study_id": patient,  # one study a patient
        "breast_id": f"{patient}_{cells['laterality']}",
        "image_id": cells["file"].removesuffix(".dcm"),
        "laterality": cells["laterality"],
        "view": cells["view"],
        "split": split,
        "path": f"{split}/{cells['file']}" if split else cells["file"],
        "cancer": cancer,
        "lesion": lesion,
        "lesion_types": [cells["lesion_type"]] if lesion else [],
        "birads": 5 if cancer else 2 if lesion else 1,
        "density": cells["density"],
        "boxes": boxes,
    }


def count(data_dir: Path) -> dict[str, int]:
    """What an archive holds; nothing is published that it should be, as it is whatever was asked for."""
    index = read_index(data_dir)
    counts = {
        "images": len(index),
        "patients": index["patient_id"].nunique(),
        "images with a lesion": index["lesion"].sum(),
        "images of cancer": index["cancer"].sum(),
        **{f"images of density {letter}": (index["density"] == letter).sum() for letter in DENSITIES},
    }
    return {name: int(value) for name, value in counts.items()}


def _by_value(column: str, classes: dict, index: pandas.DataFrame) -> pandas.Series:
    return index[column].map(classes).astype("string")


def _definition(task: str, name: str, meaning: str, column: str, classes: dict) -> Definition:
    names = tuple(dict.fromkeys(classes.values()))
    return Definition(task, name, f"simulated; {meaning}", names, partial(_by_value, column, classes))


def _lesion_type(index: pandas.DataFrame) -> pandas.Series:
    return index["lesion_types"].map(lambda types: types[0] if types else None).astype("string")


BENCHMARK = Benchmark(
    name="phantom",
    title="MammoDINO phantom: simulated breasts",
    homepage="",
    license="CC0 1.0",
    citation="Simulated with dataset_scripts.phantom of MammoDINO",
    read_index=read_index,
    definitions=(
        _definition(
            "cancer",
            "cancer",
            "positive: the breast has a lesion drawn as cancer, which spiculated masses mostly are",
            "cancer",
            {0: "no cancer", 1: "cancer"},
        ),
        _definition(
            "lesion",
            "lesion",
            "positive: the breast has a lesion, which may be too faint to see",
            "lesion",
            {0: "no lesion", 1: "lesion"},
        ),
        _definition(
            "birads",
            "from_truth",
            "no reader assessed anything: 1 no lesion, 2 benign lesion, 5 cancer, by the truth of the simulation",
            "birads",
            {1: "1", 2: "2", 5: "5"},
        ),
        _definition("density", "four", "the class drawn for the breast", "density", {each: each for each in DENSITIES}),
        _definition(
            "density",
            "dense",
            "dense: the class drawn for the breast is C or D",
            "density",
            {"A": "not dense", "B": "not dense", "C": "dense", "D": "dense"},
        ),
        Definition(
            "lesion_type",
            "type",
            "simulated; the shape drawn for the lesion; left out: breasts without one",
            LESION_TYPES,
            _lesion_type,
        ),
    ),
    count=count,
    published={},
    notes=(
        "Simulated breasts: results say nothing about patients.",
        "BI-RADS is derived from the truth of the simulation, which no reader has: it is cancer and lesion once more.",
        "The volume and the mammogram of a breast have the same labels.",
    ),
)
