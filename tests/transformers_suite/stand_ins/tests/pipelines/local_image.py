"""A local image in place of those that transformers' tests fetch: a made-up breast."""

import pathlib
import tempfile

import numpy as np
from PIL import Image

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="transformers_suite"))


def breast(height=96, width=64, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = ((y - height / 2) / (0.42 * height)) ** 2 + (x / (0.7 * width)) ** 2 < 1
    image = np.where(inside, 130 + 20 * rng.normal(size=inside.shape), 3 + 0.5 * rng.normal(size=inside.shape))
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


PATH = str(FOLDER / "breast.png")
breast().save(PATH)
