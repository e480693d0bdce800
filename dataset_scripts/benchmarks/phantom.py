"""The phantom (`dataset_scripts.phantom`) as a benchmark: every task has labels, all of them simulated.

data_dir holds the archive that `python -m dataset_scripts.phantom --output DIR` wrote, or archives in its folders
train, validation and test, which then are the official split. A row of the index is a file: a volume or a mammogram.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from .index import DENSITIES, SPLITS, Benchmark, Box, MetadataTable, make_box, make_index, read_csv

LABELS = "labels.csv"
COLUMNS = (
    *("file", "patient", "laterality", "view", "kind", "density", "lesion", "lesion_type", "cancer"),
    *("x0", "y0", "x1", "y1", "lesion_slice"),
)
REMEDY = "write it again with python -m dataset_scripts.phantom"


def read_index(data_dir: Path) -> pd.DataFrame:
    """Return the index of the files. Raises FileNotFoundError, and ValueError naming file, row and column.

    A lesion's box carries its central slice in a volume, -1 in a mammogram. Patients of two folders must differ: the
    same number is the same breast, unless the seeds differ, which the labels do not say.
    """
    rows: list[dict] = []
    split_of: dict[str, str | None] = {}
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
    """Return split and folder of each archive."""
    places: list[tuple[str | None, Path]] = [(None, data_dir), *((split, data_dir / split) for split in SPLITS)]
    archives = [(split, folder) for split, folder in places if (folder / LABELS).is_file()]
    if not archives:
        raise FileNotFoundError(
            f"{data_dir}: no {LABELS}, neither here nor in train/ and test/; write an archive with python -m "
            f"dataset_scripts.phantom --output {data_dir}"
        )
    if len(archives) > 1 and archives[0][0] is None:
        raise ValueError(f"{data_dir}: {LABELS} here and in {archives[1][1].name}/; keep one of them")
    return archives


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


def _boxes(table: MetadataTable, lesion: pd.Series) -> Iterator[list[Box]]:
    """Yield the boxes of each row: one where there is a lesion."""
    is_volume = table.choice("kind", {"dbt": True, "ffdm": False})
    at, *corners = (table.whole(name) for name in ("lesion_slice", "x0", "y0", "x1", "y1"))
    for row, has_lesion in enumerate(lesion):
        x0, y0, x1, y1 = (corner[row] for corner in corners)
        if not has_lesion:
            yield []
        elif pd.isna([x0, y0, x1, y1, at[row]]).any() or not (x0 < x1 and y0 < y1):
            raise table.fault(row, "x0", "but a lesion has a box and a slice")
        else:
            place = int(at[row]) if is_volume[row] else -1
            label = table.rows["lesion_type"][row]
            yield [make_box((x0, y0, x1, y1), label, place)]


BENCHMARK = Benchmark.from_yaml(__file__, read_index=read_index)
