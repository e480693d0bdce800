"""The phantom (`dataset_scripts.phantom.archive`) as a benchmark: every task has labels, all of them simulated.

data_dir holds the archive that `python -m dataset_scripts.phantom --output DIR` wrote, or archives in its folders
train, validation and test, which then are the official split. A row of the index is a file: a volume or a mammogram.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas

from dataset_scripts.phantom.anatomy import LESION_TYPES

from .index import DENSITIES, SPLITS, Benchmark, Box, by_value, dense, four_densities, make_index, single_type
from .tables import MetadataTable, read_csv

LABELS = "labels.csv"
COLUMNS = (
    *("file", "patient", "laterality", "view", "kind", "density", "lesion", "lesion_type", "cancer"),
    *("x0", "y0", "x1", "y1", "lesion_slice"),
)
REMEDY = "write it again with python -m dataset_scripts.phantom"


def read_index(data_dir: Path) -> pandas.DataFrame:
    """SCHEMA rows of the files. Raises FileNotFoundError, and ValueError naming file, row and column.

    A lesion's box carries its central slice in a volume, -1 in a mammogram. Patients of two folders must differ: the
    same number is the same breast, unless the seeds differ, which the labels do not say.
    """
    rows, split_of = [], {}
    for split, folder in _archives(Path(data_dir)):
        of_archive = _rows(read_csv(folder / LABELS, COLUMNS, REMEDY), split)
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
    if not (data_dir / LABELS).is_file():
        if not parts:
            raise FileNotFoundError(
                f"{data_dir}: no {LABELS}, neither here nor in train/ and test/; write an archive with python -m "
                f"dataset_scripts.phantom.archive --output {data_dir}"
            )
        return parts
    if parts:
        raise ValueError(f"{data_dir}: {LABELS} here and in {parts[0][1].name}/; keep one of them")
    return [(None, data_dir)]


def _rows(table: MetadataTable, split: str | None) -> list[dict]:
    file, patient, side = (table.text(name, required=True) for name in ("file", "patient", "laterality"))
    flags = {name: table.choice(name, {"0": 0, "1": 1}) for name in ("lesion", "cancer")}
    density = table.choice("density", {letter: letter for letter in DENSITIES})
    return [
        {
            "patient_id": patient[row],
            "study_id": patient[row],  # one study a patient
            "breast_id": f"{patient[row]}_{side[row]}",
            "image_id": file[row].removesuffix(".dcm"),
            "laterality": side[row],
            "view": table.rows["view"][row],
            "split": split,
            "path": f"{split}/{file[row]}" if split else file[row],
            "cancer": flags["cancer"][row],
            "lesion": flags["lesion"][row],
            "lesion_types": [table.rows["lesion_type"][row]] if flags["lesion"][row] else [],
            "birads": 5 if flags["cancer"][row] else 2 if flags["lesion"][row] else 1,
            "density": density[row],
            "boxes": boxes,
        }
        for row, boxes in enumerate(_boxes(table, flags["lesion"]))
    ]


def _boxes(table: MetadataTable, lesion: pandas.Series) -> Iterator[list[Box]]:
    """Of each row: one where there is a lesion."""
    is_volume = table.choice("kind", {"dbt": True, "ffdm": False})
    at, *corners = (table.whole(name) for name in ("lesion_slice", "x0", "y0", "x1", "y1"))
    for row, has_lesion in enumerate(lesion):
        x0, y0, x1, y1 = (corner[row] for corner in corners)
        if not has_lesion:
            yield []
        elif pandas.isna([x0, y0, x1, y1, at[row]]).any() or not (x0 < x1 and y0 < y1):
            raise table.fault(row, "x0", "but a lesion has a box and a slice")
        else:
            place = int(at[row]) if is_volume[row] else -1
            label = table.rows["lesion_type"][row]
            yield [Box(x0=float(x0), y0=float(y0), x1=float(x1), y1=float(y1), slice=place, label=label)]


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


BENCHMARK = Benchmark(
    name="phantom",
    title="MammoDINO phantom: simulated breasts",
    homepage="",
    license="CC0 1.0",
    citation="Simulated with dataset_scripts.phantom.archive of MammoDINO",
    read_index=read_index,
    definitions=(
        by_value(
            "cancer",
            "simulated",
            "positive: the breast has a lesion drawn as cancer, which spiculated masses mostly are",
            "cancer",
            {0: "no cancer", 1: "cancer"},
        ),
        by_value(
            "lesion",
            "simulated",
            "positive: the breast has a lesion, which may be too faint to see",
            "lesion",
            {0: "no lesion", 1: "lesion"},
        ),
        by_value(
            "birads",
            "simulated",
            "no reader assessed anything: 1 no lesion, 2 benign lesion, 5 cancer, by the truth of the simulation",
            "birads",
            {1: "1", 2: "2", 5: "5"},
        ),
        four_densities("the class drawn for the simulated breast"),
        dense("the class drawn for the simulated breast"),
        single_type(
            "simulated",
            "the shape drawn for the lesion; left out: breasts without one",
            {each: each for each in LESION_TYPES},
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
