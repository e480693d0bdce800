"""What a checkpoint sees of one file, as arrays: the image on its canvas, its breast mask, its tokens; patch features
as colors, which patches are alike, which other images are near. `mammodino inspect` and `mammodino demo` show it.
Research use only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from ..image_processing_mammodino import MammoDinoImageProcessor
from ..rendering import place_on_canvas


class Seen(NamedTuple):
    """One image, or one slice of a volume, as an encoder sees it."""

    image: np.ndarray  # (H, W) uint8, on the canvas
    breast: np.ndarray  # (H, W) bool
    pixel_values: np.ndarray  # (1, H, W) float32
    tissue_mask: np.ndarray  # (h, w) float32, the breast fraction of each patch
    slice_index: int  # in order of position
    num_slices: int
    confidence: float  # of the mask, 0 to 1
    warning: str  # what limits it; empty where nothing does
    px_per_mm: float | None  # on the canvas; None where the file does not say


def look(source: Any, image_processor: MammoDinoImageProcessor, slice_index: int | None = None) -> Seen:
    """Return what an encoder sees of a file, or of a list of DICOM files in order that are one volume. Of a volume, the
    slice of that place in order of position, else the middle one.

    Raises InvalidImageError or OSError, naming the file.
    """
    settings = image_processor.render_settings
    wanted = None if slice_index is None else [slice_index]
    ((mammogram, rendered),) = image_processor.render_source(
        source, settings.canvas, slices_per_volume=1, slices=wanted
    )
    placed = place_on_canvas(rendered.image, rendered.tissue, settings, rendered.placement)
    breast = np.zeros(settings.canvas, bool)
    left = round(placed.placement.shift_x - rendered.placement.shift_x)
    top = round(placed.placement.shift_y - rendered.placement.shift_y)
    breast[top : top + rendered.tissue.shape[0], left : left + rendered.tissue.shape[1]] = rendered.tissue
    spacing_mm = mammogram.pixel_spacing_mm
    return Seen(
        placed.image if placed.image.dtype == np.uint8 else (placed.image >> 8).astype(np.uint8),
        breast,
        placed.pixel_values,
        placed.tissue_mask,
        mammogram.slice_index,
        mammogram.num_slices,
        rendered.small.confidence,
        rendered.small.warning,
        placed.placement.scale_y / spacing_mm if spacing_mm else None,
    )


@dataclass(frozen=True)
class Examined:
    """One image and an encoder's tokens of it."""

    seen: Seen
    kept: np.ndarray  # (h, w) bool, the patches that are encoded
    embedding: np.ndarray  # (D,) float32, the class token: what `mammodino embed` writes
    patches: np.ndarray  # (T, D) float32, of the kept patches in order

    @cached_property
    def axes(self) -> "PrincipalAxes":
        return principal_axes(self.patches)

    def colors(self, axes: "PrincipalAxes | None" = None) -> np.ndarray:
        """The patches as colors, (h, w, 3) float in 0..1, background black; by `axes` of another slice of the volume
        so that alike colors mean alike features in both."""
        return self._on_grid((axes or self.axes).colors(self.patches), 0.0)

    def similarity(self, row: int, column: int) -> np.ndarray:
        """Return the cosine of each patch with that one, (h, w) float, NaN in the background. Raises ValueError where
        that is background."""
        if not self.kept[row, column]:
            raise ValueError(f"patch {row}, {column} is background, which is not encoded")
        units = self.patches / np.linalg.norm(self.patches, axis=1, keepdims=True).clip(1e-12)
        return self._on_grid(units @ units[self.kept[:row].sum() + self.kept[row, :column].sum()], np.nan)

    def _on_grid(self, values: np.ndarray, background: float) -> np.ndarray:
        """(T, ...) -> (h, w, ...)"""
        grid = np.full((*self.kept.shape, *values.shape[1:]), background)
        grid[self.kept] = values
        return grid


@torch.inference_mode()
def examine(
    source: Any, model: PreTrainedModel, image_processor: MammoDinoImageProcessor, slice_index: int | None = None
) -> Examined:
    """Encode what `look` returns."""
    seen = look(source, image_processor, slice_index)
    tissue = torch.from_numpy(seen.tissue_mask)[None]
    tokens, kept = encode(model, torch.from_numpy(seen.pixel_values)[None], tissue)
    return Examined(seen, kept[0], tokens[0, 0].numpy(), tokens[0, 1:][kept.ravel()].numpy())


@torch.inference_mode()
def encode(
    model: PreTrainedModel, pixel_values: torch.Tensor, tissue_mask: torch.Tensor
) -> tuple[torch.Tensor, np.ndarray]:
    """Return tokens (n, 1 + N, D) float32 on the CPU, the class token and the patches; and which patches are encoded,
    (n, h, w) bool. pixel_values (n, 1, H, W), tissue_mask (n, h, w)."""
    sequences = [  # one at a time: a canvas can be large
        model(pixels[None].to(model.device, model.dtype), tissue_mask=tissue[None].to(model.device)).last_hidden_state
        for pixels, tissue in zip(pixel_values, tissue_mask, strict=True)
    ]
    tokens = torch.cat(sequences).float().cpu()  # (n, 1 + R + N, D)
    without_registers = torch.cat((tokens[:, :1], tokens[:, 1 + model.config.num_register_tokens :]), dim=1)
    return without_registers, (tissue_mask > model.config.tissue_threshold).cpu().numpy()


class PrincipalAxes(NamedTuple):
    """The first three principal components of patches, or as many as there are, and the range of each."""

    mean: np.ndarray  # (D,)
    directions: np.ndarray  # (D, 3)
    low: np.ndarray  # (3,) the 1st percentile
    high: np.ndarray  # (3,) the 99th

    def colors(self, patches: np.ndarray) -> np.ndarray:
        """Return patches (T, D) as red, green and blue, (T, 3) float in 0..1."""
        colors = np.zeros((len(patches), 3))
        components = (patches - self.mean) @ self.directions
        colors[:, : len(self.low)] = np.clip((components - self.low) / np.maximum(self.high - self.low, 1e-12), 0, 1)
        return colors


def principal_axes(patches: np.ndarray) -> PrincipalAxes:
    """Fit axes to patches (T, D). Their signs are those of the largest loadings, so that the same patches have the same
    colors."""
    mean = patches.mean(axis=0, dtype=np.float64)
    centered = patches - mean
    directions = np.linalg.eigh(centered.T @ centered)[1][:, : -1 - min(3, *patches.shape) : -1]  # (D, 3)
    directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), range(directions.shape[1])])
    return PrincipalAxes(mean, directions, *np.percentile(centered @ directions, (1, 99), axis=0))


def feature_colors(model: PreTrainedModel, pixel_values: torch.Tensor, tissue_mask: torch.Tensor) -> np.ndarray:
    """Return (n, h, w, 3) float in 0..1: the breast patches of all images as colors by the `principal_axes` of all;
    background black. pixel_values (n, 1, H, W), tissue_mask (n, h, w)."""
    tokens, kept = encode(model, pixel_values, tissue_mask)
    patches = tokens[:, 1:][torch.from_numpy(kept).flatten(1)].numpy()  # (T, D)
    colors = np.zeros((*kept.shape, 3))
    colors[kept] = principal_axes(patches).colors(patches)
    return colors


def nearest(embedding: np.ndarray, others: Mapping[Any, np.ndarray], count: int) -> Sequence[tuple[Any, float]]:
    """Return the `count` keys of the embeddings (D,) most like this one, and how like, the most first: the cosine of
    both less the others' mean, without which all images are alike."""
    mean = np.mean(list(others.values()), axis=0)
    own, length = embedding - mean, np.linalg.norm(embedding - mean)
    cosines = {key: float((each - mean) @ own / max(np.linalg.norm(each - mean) * length, 1e-12))
               for key, each in others.items()}  # fmt: skip
    return sorted(cosines.items(), key=lambda item: -item[1])[:count]
