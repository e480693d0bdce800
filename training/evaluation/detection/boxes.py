"""A data set's images for detection: those with boxes, those known to hold no lesion, and splits by patient.

The class of a task plays no part: CBIS-DDSM, where every image has a lesion, will do. Every box is a lesion, whatever
its label; depth is kept for volumes.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dataset_scripts.benchmarks import bcs_dbt as bcs_dbt_index
from dataset_scripts.benchmarks import get_benchmark
from dataset_scripts.benchmarks.index import SPLITS, Benchmark
from dataset_scripts.benchmarks.labels import ABOUT, TABLE
from dataset_scripts.benchmarks.task import MISSING, complete_splits, find_files, located
from dataset_scripts.corpus.bcs_dbt_volumes import BcsDbtViews

logger = logging.getLogger(__name__)


class BoxedImage(NamedTuple):
    """A mammogram or a volume with its lesions, in pixels of the source; none where it is known to hold none."""

    image_id: str
    patient_id: str
    file: str
    lesions: np.ndarray  # (g, 4) float: x0, y0, x1, y1
    lesion_slices: np.ndarray  # (g,) int: frames of the file from 0; -1 in a mammogram


@dataclass(frozen=True, eq=False)
class DetectionTable:
    """Images by split, in order of image_id.

    Attributes:
        views: sets BCS-DBT's orientations right, in whose coordinates its boxes are; None elsewhere.
        counts: per split "images", "patients", "images with lesions" and "lesions"; "left_out": images by reason.
    """

    images: dict[str, list[BoxedImage]]
    benchmark: Benchmark
    views: BcsDbtViews | None
    counts: dict[str, Any]


def load_boxes(
    name: str,
    data_dir: str | Path,
    *,
    seed: int = 0,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.2,
    allow_missing: bool = False,
) -> DetectionTable:
    """Load the images of a data set that detection can learn from and be evaluated on.

    An image whose boxes nobody noted is left out, unless it is known to hold no lesion; so is one that has a lesion
    and no box, or the other way round. Official splits stay; the others are held out as for any task. Arguments as
    those of `dataset_scripts.benchmarks.task.load_task`.

    Raises FileNotFoundError or ValueError, before an image is opened, where there are no boxes, a split has none, or
    files are missing.
    """
    data_dir = Path(data_dir).absolute()
    benchmark = get_benchmark(name)
    index = located(benchmark, data_dir, with_boxes=True)
    lesion, boxes = index["lesion"], index["boxes"]
    number = boxes.map(lambda each: pd.NA if each is None else len(each)).astype("Int64")
    left_out = {
        "a lesion without a box": (lesion == 1) & (number.fillna(0) == 0),
        "a box without a lesion": (lesion == 0) & (number.fillna(0) > 0),
        "nobody looked for lesions": lesion.isna() & number.isna(),
        "a box of no extent": boxes.map(_has_empty_box),
        "no official split": index["split"].isna() & index["split"].notna().any(),
    }
    reason = pd.Series("", index=index.index)
    for why, where in left_out.items():
        reason = reason.mask((reason == "") & where.fillna(False).astype(bool), why)
    table = index[reason == ""]
    if table["boxes"].map(lambda each: each is None or not len(each)).all():
        needs = f"box columns; {ABOUT}" if name == TABLE else "data_dir's files that note boxes"
        raise ValueError(f"{benchmark.name}: no image has a box; detection needs {needs}")
    has_lesion = table["boxes"].map(lambda each: each is not None and len(each) > 0).astype(int)
    table = table.assign(
        split=complete_splits(
            table["patient_id"],
            has_lesion,
            table["split"],
            seed=seed,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
        )
    )
    is_there = find_files(table, data_dir, allow_missing)
    counted = reason[reason != ""].value_counts().to_dict() | {MISSING: int((~is_there).sum())}
    table = table[is_there]
    images = {split: [_image(row) for row in table[table["split"] == split].itertuples()] for split in SPLITS}
    counts: dict[str, Any] = {split: _counts(of) for split, of in images.items()}
    counts["left_out"] = {why: int(number) for why, number in counted.items() if number}
    for split, of in counts.items():
        if split in SPLITS and not of["lesions"]:
            raise ValueError(
                f"{benchmark.name}: no lesion in {split}; add patients with boxes, or choose another split"
            )
    logger.info("%s, boxes: %s", benchmark.name, counts)
    return DetectionTable(images, benchmark, _views(benchmark, data_dir), counts)


def _has_empty_box(boxes: list | None) -> bool:
    return any(not (box["x0"] < box["x1"] and box["y0"] < box["y1"]) for box in boxes or ())


def _image(row: Any) -> BoxedImage:
    boxes = [] if row.boxes is None else list(row.boxes)
    corners = [[box[side] for side in ("x0", "y0", "x1", "y1")] for box in boxes]
    return BoxedImage(
        row.image_id,
        row.patient_id,
        row.file,
        np.array(corners, float).reshape(-1, 4),
        np.array([box["slice"] for box in boxes], int),
    )


def _counts(images: list[BoxedImage]) -> dict[str, int]:
    return {
        "images": len(images),
        "patients": len({each.patient_id for each in images}),
        "images with lesions": sum(len(each.lesions) > 0 for each in images),
        "lesions": sum(len(each.lesions) for each in images),
    }


def _views(benchmark: Benchmark, data_dir: Path) -> BcsDbtViews | None:
    if benchmark.name != bcs_dbt_index.BENCHMARK.name:
        return None
    lists = sorted(data_dir.glob("BCS-DBT?file-paths-*.csv"))
    if not lists:
        raise ValueError(
            f"{data_dir}: no BCS-DBT-file-paths-*.csv, which say how volumes lie that the boxes refer to; download them"
        )
    return BcsDbtViews.from_csv(lists)
