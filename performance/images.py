"""Images to measure on: real DBT slices where they are present, else phantoms."""

import os
from pathlib import Path

import numpy as np

from dataset_scripts.phantom.archive import PhantomParameters, acquire_2d, simulate_breast
from modeling_mammodino.image_io import read_image

REAL_DATA = Path(os.environ.get("MAMMODINO_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def example_images(count: int, paths: list[Path] | None = None) -> tuple[str, list[np.ndarray]]:
    """What they are, and `count` gray planes (H, W): of `paths`, else real slices spread over the folder, else
    phantoms."""
    slices = sorted((REAL_DATA / "bcs_dbt" / "slices").glob("*.jpg"))
    found = paths or [slices[index * len(slices) // count] for index in range(count)] if paths or slices else []
    if found:
        return ", ".join(path.name for path in found), [read_image(path) for path in found]
    parameters = PhantomParameters(num_slices=12, height_px=512, width_px=416, pixel_spacing_mm=0.4)
    return "phantoms", [acquire_2d(simulate_breast(parameters, seed=0, index=index)) for index in range(count)]
