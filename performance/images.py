"""Images to measure on, and a corpus of them: real DBT slices where they are present, else phantoms."""

import hashlib
import json
import os
from pathlib import Path

import cv2
import datasets
import numpy as np

from dataset_scripts.corpus.reader import FEATURES, MANIFEST, make_row
from dataset_scripts.phantom.archive import PhantomParameters, acquire_2d, simulate_breast
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.dicom import Mammogram
from modeling_mammodino.image_io import read_image
from modeling_mammodino.rendering import make_thumbnail, plan_rendering, render

REAL_DATA = Path(os.environ.get("MAMMODINO_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
FIT_PX = (1024, 1024)  # of the corpus builder


def example_images(count: int, paths: list[Path] | None = None) -> tuple[str, list[np.ndarray]]:
    """What they are, and `count` gray planes (H, W): of `paths`, else real slices spread over the folder, else
    phantoms."""
    slices = sorted((REAL_DATA / "bcs_dbt" / "slices").glob("*.jpg"))
    found = paths or [slices[index * len(slices) // count] for index in range(count)] if paths or slices else []
    if found:
        return ", ".join(path.name for path in found), [read_image(path) for path in found]
    parameters = PhantomParameters(num_slices=12, height_px=512, width_px=416, pixel_spacing_mm=0.4)
    return "phantoms", [acquire_2d(simulate_breast(parameters, seed=0, index=index)) for index in range(count)]


def write_corpus(folder: Path, count: int, fit_px: tuple[int, int] = FIT_PX) -> str:
    """Write a corpus of `count` volumes: each image, as large as `fit_px` takes it, stands for two slices, and four
    volumes for the views of a patient. Return what they are."""
    processor = MammoDinoImageProcessor()
    settings = processor.render_settings
    what, planes = example_images(count)
    rows = []
    for number, plane in enumerate(planes):
        scale = fit_px[0] / plane.shape[0]
        if what == "phantoms" and scale > 1:  # they are simulated small; a real image is made smaller, never larger
            plane = cv2.resize(plane, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        small = make_thumbnail(plane)
        rendered = render(plane, small, plan_rendering([small], settings), settings, fit_px)
        row = make_row(Mammogram.from_image(str(number), plane, b"benchmark"), rendered, "benchmark")
        row |= {"patient": str(number // 4), "laterality": "LR"[number % 2], "view": ("CC", "MLO")[number // 2 % 2]}
        rows += [{**row, "kind": "dbt", "slice_index": index, "num_slices": 2} for index in range(2)]
    datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(folder)
    manifest = {"image_processor": {}, "collection": "benchmark", "volumes": len(planes)}  # the default settings
    manifest |= {"rows": len(rows), "rows_by_kind": {"dbt": len(rows)}}
    (shard,) = folder.glob("*.arrow")
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    manifest["shards"] = [{"name": shard.name, "rows": len(rows), "sha256": sha256}]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return "phantoms" if what == "phantoms" else "real DBT slices"
