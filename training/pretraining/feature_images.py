"""What patch features see: their first three principal components as red, green and blue (the article's figure).

Colours compare within a picture: one space is fitted to all images shown. Over a run a component keeps its sign as long
as its largest loading does, and may still change places with the next.
"""

import cv2
import numpy as np
import torch
from sklearn.decomposition import PCA

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.breast_segmentation import patch_tissue
from modeling_mammodino.rendering import Rendered, place_on_canvas, standardize
from modeling_mammodino.tools.visualize import draw_sheet

NUM_PICTURES, PAIRS_A_ROW = 6, 3
TILE_HEIGHT_PX, GAP_PX, CAPTION_PX = 320, 4, 22
NOTICE = "colours: first 3 principal components of patch features, no diagnosis. Research use only."


def corpus_pictures(
    corpus: Corpus, image_processor: MammoDinoImageProcessor, count: int = NUM_PICTURES
) -> dict[str, torch.Tensor]:
    """What the encoder takes of a few pictures of a corpus, always the same: the middle slices of volumes spread evenly
    over it. `pixel_values` (n, 1, H, W), `tissue_mask` (n, h, w)."""
    height, width = image_processor.size["height"], image_processor.size["width"]
    grid = (height // image_processor.patch_size, width // image_processor.patch_size)
    pixel_values, tissue_mask = [], []
    for volume in np.unique(np.linspace(0, corpus.num_volumes - 1, count).round().astype(int)):
        rows = corpus.rows_of(int(volume))
        picture, cells = corpus.picture(rows[len(rows) // 2])
        scale = min(height / picture.shape[0], width / picture.shape[1])
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        tissue = cv2.resize(cells, size, interpolation=cv2.INTER_LINEAR) >= 0.5
        canvas = place_on_canvas(Rendered(picture, tissue, None), (height, width), image_processor.chest_wall_side)
        pixel_values.append(standardize(canvas.picture, *image_processor.mean_and_std)[None])
        tissue_mask.append(patch_tissue(canvas.tissue, grid))
    return {
        "pixel_values": torch.from_numpy(np.stack(pixel_values)),
        "tissue_mask": torch.from_numpy(np.stack(tissue_mask)),
    }


@torch.inference_mode()
def feature_colours(
    model: MammoDinoModel, pixel_values: torch.Tensor, tissue_mask: torch.Tensor
) -> np.ndarray:  # (n, 1, H, W), (n, h, w)
    """(n, h, w, 3) float in 0..1: the components of each breast patch, each from its 1st to its 99th percentile;
    background black."""
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
    colours = np.zeros((*inside.shape, 3))
    colours[inside.numpy(), :number] = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours.reshape(*tissue_mask.shape, 3)


def draw_features(
    model: MammoDinoModel, pixel_values: torch.Tensor, tissue_mask: torch.Tensor, title: str
) -> np.ndarray:
    """Each picture beside its features' colours, under a line that says what they are: (H, W, 3) uint8 RGB."""
    pairs = []
    for picture, colours in zip(
        pixel_values[:, 0].cpu().numpy(), feature_colours(model, pixel_values, tissue_mask), strict=True
    ):
        size = (max(1, round(picture.shape[1] * TILE_HEIGHT_PX / picture.shape[0])), TILE_HEIGHT_PX)
        unit = (picture - picture.min()) / max(float(np.ptp(picture)), 1e-12)
        grey = cv2.resize(np.rint(unit * 255).astype(np.uint8), size, interpolation=cv2.INTER_AREA)
        large = cv2.resize(np.rint(colours * 255).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        pair = np.hstack((cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), large))
        pairs.append(np.pad(pair, ((GAP_PX, GAP_PX), (GAP_PX, GAP_PX), (0, 0))))
    sheet = draw_sheet(pairs, PAIRS_A_ROW)
    caption = np.zeros((CAPTION_PX, sheet.shape[1], 3), np.uint8)
    cv2.putText(caption, f"{title}; {NOTICE}", (6, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255,) * 3, 1, cv2.LINE_AA)
    return np.vstack((sheet, caption))
