"""The images of a corpus whose patch features a run draws, always the same (the paper's figure).

Colors compare within a figure: one space is fitted to all images shown. Over a run a component keeps its sign as long
as its largest loading does, and may still change places with the next.
"""

import cv2
import numpy as np
import torch

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.rendering import place_on_canvas

NUM_IMAGES = 6


def corpus_images(
    corpus: Corpus, image_processor: MammoDinoImageProcessor, count: int = NUM_IMAGES
) -> dict[str, torch.Tensor]:
    """Return what the encoder takes of a few images of a corpus, always the same: the middle slices of volumes spread
    evenly over it. `pixel_values` (n, 1, H, W), `tissue_mask` (n, h, w)."""
    settings = image_processor.render_settings
    height, width = settings.canvas
    pixel_values, tissue_mask = [], []
    for volume in np.unique(np.linspace(0, corpus.num_volumes - 1, count).round().astype(int)):
        rows = corpus.rows_of(int(volume))
        image, cells = corpus.image(rows[len(rows) // 2])
        scale = min(height / image.shape[0], width / image.shape[1])
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        tissue = cv2.resize(cells, size, interpolation=cv2.INTER_LINEAR) >= 0.5
        canvas = place_on_canvas(image, tissue, settings)
        pixel_values.append(canvas.pixel_values)
        tissue_mask.append(canvas.tissue_mask)
    return {
        "pixel_values": torch.from_numpy(np.stack(pixel_values)),
        "tissue_mask": torch.from_numpy(np.stack(tissue_mask)),
    }
