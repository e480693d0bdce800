"""What patch features see: their first three principal components as red, green and blue (the paper's figure).

Colors compare within an image: one space is fitted to all images shown. Over a run a component keeps its sign as long
as its largest loading does, and may still change places with the next.
"""

import cv2
import numpy as np
import torch
from sklearn.decomposition import PCA
from transformers import PreTrainedModel

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.rendering import place_on_canvas
from modeling_mammodino.tools.files import readable
from modeling_mammodino.tools.visualize import draw_sheet

NUM_IMAGES, PAIRS_A_ROW = 6, 3
TILE_HEIGHT_PX, GAP_PX, CAPTION_PX = 320, 4, 22
NOTICE = "colors: first 3 principal components of patch features, no diagnosis. Research use only."


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


@torch.inference_mode()
def feature_colors(model: PreTrainedModel, pixel_values: torch.Tensor, tissue_mask: torch.Tensor) -> np.ndarray:
    """Return (n, h, w, 3) float in 0..1: the components of each breast patch, each from its 1st to its 99th percentile;
    background black. pixel_values (n, 1, H, W), tissue_mask (n, h, w)."""
    sequences = [  # one at a time: a canvas can be large
        model(pixels[None].to(model.device, model.dtype), tissue_mask=tissue[None].to(model.device)).last_hidden_state
        for pixels, tissue in zip(pixel_values, tissue_mask, strict=True)
    ]
    patches = torch.cat(sequences)[:, 1 + model.config.num_register_tokens :].float().cpu()  # (n, N, D)
    inside = (tissue_mask > model.config.tissue_threshold).flatten(1)  # (n, N)
    features = patches[inside].double().numpy()  # (T, D)
    number = min(3, *features.shape)
    components = PCA(number, svd_solver="full").fit_transform(features)  # signs by the largest loading
    low, high = np.percentile(components, (1, 99), axis=0)
    colors = np.zeros((*inside.shape, 3))
    colors[inside.numpy(), :number] = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colors.reshape(*tissue_mask.shape, 3)


def draw_features(
    model: PreTrainedModel, pixel_values: torch.Tensor, tissue_mask: torch.Tensor, title: str
) -> np.ndarray:
    """Draw each image beside its features' colors, under a line that says what they are: (H, W, 3) uint8 RGB."""
    pairs = []
    for image, colors in zip(
        pixel_values[:, 0].cpu().numpy(), feature_colors(model, pixel_values, tissue_mask), strict=True
    ):
        size = (max(1, round(image.shape[1] * TILE_HEIGHT_PX / image.shape[0])), TILE_HEIGHT_PX)
        unit = (image - image.min()) / max(float(np.ptp(image)), 1e-12)
        gray = cv2.resize(np.rint(unit * 255).astype(np.uint8), size, interpolation=cv2.INTER_AREA)
        large = cv2.resize(np.rint(colors * 255).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        pair = np.hstack((cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), large))
        pairs.append(np.pad(pair, ((GAP_PX, GAP_PX), (GAP_PX, GAP_PX), (0, 0))))
    sheet = draw_sheet(pairs, PAIRS_A_ROW)
    caption = np.zeros((CAPTION_PX, sheet.shape[1], 3), np.uint8)
    cv2.putText(
        caption, f"{readable(title)}; {NOTICE}", (6, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255,) * 3, 1, cv2.LINE_AA
    )
    return np.vstack((sheet, caption))
