"""The card of an exported data set: what it is, what its labels mean, what it holds, what was left out."""

import re
from pathlib import Path
from typing import Any

import jinja2
import pandas

import modeling_mammodino

from .benchmark_builder import DEFAULT, BenchmarkBuilder, BenchmarkConfig
from .benchmark_index import SPLITS

TEMPLATE = Path(__file__).parents[1] / "model_cards" / "dataset_template.md"
CREATIVE_COMMONS = re.compile(r"CC0 1\.0|CC BY(-NC)?(-SA|-ND)? [1-4]\.0")


def make_card(builder: BenchmarkBuilder, data: Path, left_out: dict[str, int], place: str) -> str:
    """Of the Parquet files in `data`, whose rows it counts; `place` is by what name they are opened."""
    columns = ["split", "image_id", "breast_id", "patient_id", "boxes", *builder.definitions]
    rows = pandas.read_parquet(data, columns=columns)
    split_rows = {split: of for split in SPLITS if len(of := rows[rows["split"] == split])}
    template = jinja2.Template(TEMPLATE.read_text(), keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return template.render(
        benchmark=builder.benchmark,
        license_id=license_id(builder.benchmark.license),
        version=modeling_mammodino.__version__,
        place=place,
        splits={split: _counts(of) for split, of in split_rows.items()},
        split_rule=_split_rule(builder),
        shared_patients=int((rows.groupby("patient_id")["split"].nunique() > 1).sum()),
        volume_rule=_volume_rule(builder.config),
        has_boxes=any(boxes is not None and len(boxes) for boxes in rows["boxes"]),
        definitions=builder.definitions,
        class_counts={
            name: [[int((of[name] == place).sum()) for of in split_rows.values()] for place in range(len(each.classes))]
            for name, each in builder.definitions.items()
        },
        left_out=left_out,
    )


def license_id(license: str) -> str:
    """The Hub's identifier of a Creative Commons licence, such as cc-by-nc-4.0 of CC BY-NC 4.0; else "other"."""
    return license.lower().replace(" ", "-") if CREATIVE_COMMONS.fullmatch(license) else "other"


def _counts(rows: pandas.DataFrame) -> dict[str, Any]:
    return {"rows": len(rows)} | {f"{name}s": rows[f"{name}_id"].nunique() for name in ("image", "breast", "patient")}


def _volume_rule(config: BenchmarkConfig) -> str:
    evenly = f"up to {config.slices_per_volume} slices, evenly spaced" if config.slices_per_volume else "all slices"
    return f"the slices that have a box, and where it has none {evenly}" if config.boxed_slices else evenly


def _split_rule(builder: BenchmarkBuilder) -> str:
    official = builder.official
    ours = [split for split in ("validation", "test") if split not in official]
    if builder.config.name == DEFAULT:
        return "Splits are official." if official else "There is no official split: all is in train; hold out patients."
    of_data_set = f"Official: {', '.join(official)}. " if official else "There is no official split. "
    if not ours:
        return of_data_set.strip()
    return f"{of_data_set}Held out here by patient, stratified, with seed {builder.config.seed}: {' and '.join(ours)}."
