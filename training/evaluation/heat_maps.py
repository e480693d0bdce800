"""Heat maps from an encoder's patches, without training: what it looks at, and what is unlike the rest of the breast.

For a look: none of these has been validated to show lesions. Research use only.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from modeling_mammodino import MammoDinoModel

NUM_COMPONENTS = 8  # of a breast's patches, that count as usual; our choice


class HeatMap(NamedTuple):
    name: str
    values: np.ndarray  # (h, w) float, NaN where there is no breast
    is_signed: bool = False  # 0 has a meaning
    scale: str = ""  # what the numbers are


class Patches(NamedTuple):
    """One image's tokens."""

    class_token: np.ndarray  # (D,) float64
    breast: np.ndarray  # (T, D) float64, the patches with breast
    weights: np.ndarray  # (T,) their breast fractions, as shares of 1
    is_breast: np.ndarray  # (h, w) bool
    attention: np.ndarray  # (T,) of the class token in the last block, mean over heads, as a multiple of even attention


@torch.inference_mode()
def encode(model: MammoDinoModel, pixel_values: torch.Tensor, tissue_mask: torch.Tensor) -> Patches:
    """Return the tokens of pixel_values (1, 1, H, W) and tissue_mask (1, h, w). Sets the model to eager attention,
    which returns its weights."""
    model.set_attn_implementation("eager")
    outputs = model(
        pixel_values.to(model.device, model.dtype), tissue_mask=tissue_mask.to(model.device), output_attentions=True
    )
    num_prefix = 1 + model.config.num_register_tokens
    sequence = outputs.last_hidden_state[0].double().cpu().numpy()  # (1 + R + N, D)
    tissue = tissue_mask[0].numpy()
    is_breast = tissue > model.config.tissue_threshold
    fractions = tissue[is_breast].astype(float)
    # attentions cover the tokens that were encoded: the prefix, then the breast's patches in order
    attention = outputs.attentions[-1][0, :, 0, num_prefix:].double().mean(dim=0).cpu().numpy()  # (T,)
    return Patches(
        sequence[0],
        sequence[num_prefix:][is_breast.ravel()],
        fractions / fractions.sum(),
        is_breast,
        attention / attention.mean(),
    )


def heat_maps(patches: Patches, classifier: nn.Linear | None = None, classes: tuple[str, ...] = ()) -> list[HeatMap]:
    """Return attention, distance from the mean patch, PCA residual, and with a classifier the evidence for its
    classes."""
    drawn = (
        ("attention of the class token", patches.attention, "times even attention"),
        ("distance from the breast's mean patch", distance_from_mean(patches.breast), "1 - cosine"),
        (f"outside the {NUM_COMPONENTS} main components", residual(patches.breast), "length of what is left"),
    )
    maps = [HeatMap(name, _on_grid(values, patches), scale=scale) for name, values, scale in drawn]
    if classifier is not None:
        evidence = class_evidence(patches, classifier)  # (T, C)
        shown = [1] if len(classes) == 2 else range(len(classes))
        maps += [HeatMap(f"evidence for {classes[k]}", _on_grid(evidence[:, k], patches), True, "logit") for k in shown]
    return maps


def distance_from_mean(breast: np.ndarray) -> np.ndarray:
    """Return 1 - cosine of each patch (T, D) with their mean."""
    mean = breast.mean(axis=0)
    return 1 - breast @ mean / (np.linalg.norm(breast, axis=1) * np.linalg.norm(mean))


def residual(breast: np.ndarray) -> np.ndarray:
    """Return the length of what the main components of the patches (T, D) leave of each: the reconstruction error of
    PCA, which is large where a patch varies in ways that the others do not."""
    centered = breast - breast.mean(axis=0)
    components = np.linalg.svd(centered, full_matrices=False)[2][:NUM_COMPONENTS]  # (k, D)
    return np.linalg.norm(centered - centered @ components.T @ components, axis=1)


def class_evidence(patches: Patches, classifier: nn.Linear) -> np.ndarray:
    """Return (T, C), what `MammoDinoForImageClassification` would answer if every patch of the breast were like this
    one.

    A class's logit less the mean of the others'. The head is linear in the mean patch, so that the mean of these,
    weighted by breast fraction, is what it does answer.
    """
    weight = classifier.weight.detach().double().cpu().numpy()  # (C, 2 D)
    bias = classifier.bias.detach().double().cpu().numpy()
    width = patches.breast.shape[1]
    logits = patches.breast @ weight[:, width:].T + weight[:, :width] @ patches.class_token + bias  # (T, C)
    others = (logits.sum(axis=1, keepdims=True) - logits) / max(1, len(bias) - 1)
    return logits - others


def _on_grid(values: np.ndarray, patches: Patches) -> np.ndarray:
    grid = np.full(patches.is_breast.shape, np.nan)
    grid[patches.is_breast] = values
    return grid
