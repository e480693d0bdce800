"""What do the views of an image cost? From a corpus row to 2 global and 8 local crops, masks and tissue grids, a core.

python -m performance.crops [--images 16] [--repeats 7] [--recipe NAME]

Beside a PIL pipeline that makes the same crops from the same row, with a mean and a deviation at the end, but knows no
tissue, no masks and no slices: RandomResizedCrop (bicubic), flip, brightness and contrast, Gaussian blur. Both draw
the same sample again at each repeat, in turn; shown is the mean over images of each image's least CPU time.
"""

import argparse
import io
import platform
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import datasets
import numpy as np
import PIL
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dataset_scripts.corpus.reader import Corpus
from training.pretraining.recipe import ViewsRecipe, load_recipe
from training.pretraining.views.crops import sample_boxes
from training.pretraining.views.sample import NUM_GLOBAL_CROPS, PretrainingViews
from training.settings import VIEWS_STREAM, generator

from .images import write_corpus

BARS_MS = {"views": 5.0, "views and decode": 12.0}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.crops", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="images (default 16)")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each (default 7)")
    parser.add_argument("--recipe", default="mammodino", help="whose views (default: mammodino)")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    recipe = load_recipe([options.recipe, "--corpus", "none", "--output_dir", "none"])
    with TemporaryDirectory() as folder:
        what = write_corpus(Path(folder), options.images)
        corpus = Corpus(folder)
        views, paired = (
            PretrainingViews(corpus, recipe.views, recipe.model.patch_size, 0, options.images, pairs)
            for pairs in (False, True)
        )
        print(f"{len(corpus.rows) // 2} images ({what}), {options.repeats} repeats, one thread, {platform.machine()}")
        versions = {"OpenCV": cv2, "numpy": np, "Pillow": PIL, "datasets": datasets}
        print(", ".join(f"{name} {module.__version__}" for name, module in versions.items()))
        rows = [int(views[index]["row"]) for index in range(options.images)]
        decoded = [views.image(row) for row in rows]
        opened = [Image.fromarray(corpus.image(row)[0]) for row in rows]
        sizes = np.array([image.pixels.shape for image in decoded])
        print(f"height x width: median {' x '.join(f'{side:.0f}' for side in np.median(sizes, axis=0))} px")
        steps: dict[str, Callable[[int], object]] = {
            "decode": lambda index: views.image(rows[index]),
            "views": lambda index: views.draw(generator(0, VIEWS_STREAM, index), decoded[index], index),
            "views and decode": lambda index: views[index],
            "views and decode, with slice pairs": lambda index: paired[index],
            "PIL, decode": lambda index: pil_decode(corpus, rows[index]),
            "PIL, crops": lambda index: pil_crops(index, opened[index], recipe.views),
            "PIL, crops and decode": lambda index: pil_crops(index, pil_decode(corpus, rows[index]), recipe.views),
        }
        least = measure(steps, options.images, options.repeats)
    peers = {"decode": "PIL, decode", "views": "PIL, crops"}
    print("| step | CPU ms an image: mean (min, max) | beside PIL's | bar |")
    print("|---|---|---|---|")
    for name, times in least.items():
        peer = least[peers.get(name, "PIL, crops and decode")].mean()
        ratio = "" if name.startswith("PIL") else f"{times.mean() / peer:.2f}"
        bar = BARS_MS.get(name)
        verdict = f"{'within' if times.mean() <= bar else 'OVER'} {bar:g}" if bar else ""
        print(f"| {name} | {times.mean():.2f} ({times.min():.2f}, {times.max():.2f}) | {ratio} | {verdict} |")


def measure(steps: dict[str, Callable[[int], object]], images: int, repeats: int) -> dict[str, np.ndarray]:
    """Least CPU milliseconds (images,) of each step."""
    found = {name: np.full(images, np.inf) for name in steps}
    for _ in range(repeats):
        for index in range(images):
            for name, step in steps.items():
                start = time.process_time()
                step(index)
                found[name][index] = min(found[name][index], 1e3 * (time.process_time() - start))
    return found


def pil_decode(corpus: Corpus, row: int) -> Image.Image:
    image = Image.open(io.BytesIO(corpus.rows[row]["image"]["bytes"]))
    image.load()
    return image


def pil_crops(index: int, image: Image.Image, recipe: ViewsRecipe) -> list[np.ndarray]:
    """Crops (S, S) float32, as DINOv2's DataAugmentationDINO makes them of a gray image."""
    rng, crops = generator(0, 0, index), []
    kinds = [(recipe.global_crop_size, recipe.global_crop_scale)] * NUM_GLOBAL_CROPS
    kinds += [(recipe.local_crop_size, recipe.local_crop_scale)] * recipe.num_local_crops
    for number, (size, scale) in enumerate(kinds):
        boxes = sample_boxes(rng, 10, (image.height, image.width), (scale[0], scale[1]), tuple(recipe.crop_ratio))
        y0, x0, y1, x1 = boxes[0].tolist()
        crop = image.crop((x0, y0, x1, y1)).resize((size, size), Image.Resampling.BICUBIC)
        if rng.random() < recipe.horizontal_flip_probability:
            crop = ImageOps.mirror(crop)
        if rng.random() < recipe.jitter_probability:
            crop = ImageEnhance.Brightness(crop).enhance(1 + recipe.brightness * rng.uniform(-1, 1))
            crop = ImageEnhance.Contrast(crop).enhance(1 + recipe.contrast * rng.uniform(-1, 1))
        if rng.random() < recipe.blur_probability[min(number, NUM_GLOBAL_CROPS)]:
            crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(*recipe.blur_sigma_px)))
        crops.append((np.asarray(crop, np.float32) / 255 - 0.5) / 0.25)
    return crops


if __name__ == "__main__":
    main()
