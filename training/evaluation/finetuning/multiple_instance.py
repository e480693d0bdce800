"""A two-branch multiple-instance head: whole views beside tissue tiles, on frozen features.

After MIL-PF (arXiv 2603.09374), from its description: gated attention over projected tiles, beside a branch for the
whole view, some 40,000 trained parameters, the maximum over views. Our choices: the logits of the branches add up; the
whole view's start as the linear probe, the tiles' at zero, and what they learn beyond that counts only if the
validation part confirms it; the loss is the mean over images, breasts and patients, each as far as the data set names
them. Features of tiles stay on disk: a step reads those of its patients.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from training.evaluation.heat_maps import HeatMap

from .aggregation import GROUPS, group_labels, groups_of, most_suspicious
from .feature_cache import SliceFeatures
from .heads import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    GatedAttention,
    LinearHead,
    balanced_weights,
    keep_best_epoch,
    mean_and_std,
    one_thread,
    standardized_layer,
    weighted_mean,
)
from .tiles import TiledSlice, Tiling

NUM_PROJECTED, MIN_WIDTH, MAX_WIDTH = 40_000, 16, 64  # parameters of the projection, and its width
PATIENTS_PER_BATCH = 16
WHOLE_LEARNING_RATE = LEARNING_RATE / 10  # it starts as what is best for it
LEAST = 1e-6  # probability in the loss


class MultipleInstanceHead(nn.Module):
    """Features of whole slices (S, F) and of tiles (T, F) of n images -> probabilities of the images (n, C).

    Args:
        num_features: F.  num_classes: C.
        ordered: whether classes are, for the maximum over views.
        tiling: of the tiles that it learned from.
    """

    mean: torch.Tensor
    std: torch.Tensor
    tile_mean: torch.Tensor
    tile_std: torch.Tensor

    def __init__(self, num_features: int, num_classes: int, ordered: bool, tiling: Tiling):
        super().__init__()
        self.ordered, self.tiling = ordered, tiling
        for name in ("mean", "std", "tile_mean", "tile_std"):
            self.register_buffer(name, torch.zeros(num_features))
        self.whole = nn.Linear(num_features, num_classes)
        width = min(max(NUM_PROJECTED // num_features, MIN_WIDTH), MAX_WIDTH)
        self.project = nn.Linear(num_features, width)
        self.attention = GatedAttention(width)
        self.classifier = nn.Linear(width, num_classes, bias=False)
        nn.init.zeros_(self.classifier.weight)

    def start(
        self, probe: LinearHead, slices: tuple[np.ndarray, np.ndarray], tiles: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Start as `probe`; mean and standard deviation (F,) of either branch's features standardize them."""
        self.whole = standardized_layer(probe.weight, probe.bias, *slices)
        for name, values in zip(("mean", "std", "tile_mean", "tile_std"), (*slices, *tiles), strict=True):
            getattr(self, name).copy_(torch.from_numpy(values))

    def forward(
        self, slices: torch.Tensor, slice_image: torch.Tensor, tiles: torch.Tensor, tile_image: torch.Tensor
    ) -> torch.Tensor:
        """slice_image (S,) and tile_image (T,) int64 0..n-1 say whose they are. A volume's slices count the same."""
        num_images = int(slice_image.max()) + 1
        shares = (1 / torch.bincount(slice_image))[slice_image]
        whole = weighted_mean((slices - self.mean) / self.std, shares, slice_image, num_images)
        projected, attention = self.look(tiles, tile_image, num_images)
        pooled = weighted_mean(projected, attention, tile_image, num_images)
        return torch.softmax(self.whole(whole) + self.classifier(pooled), dim=1)

    def look(self, tiles: torch.Tensor, tile_image: torch.Tensor, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the projected tiles (T, width) and their attention (T,), which sums to one in each image."""
        projected = functional.gelu(self.project((tiles - self.tile_mean) / self.tile_std))
        return projected, self.attention.attention_weights(projected, tile_image, num_images)

    @torch.inference_mode()
    def tile_map(self, tiled: TiledSlice, tiles: np.ndarray) -> HeatMap:
        """Return the attention of the tiles (T, F) of a slice on its pixels (H, W): the mean over those that cover a
        pixel, as a multiple of even attention, NaN outside the breast and its tiles."""
        _, attention = self.look(torch.from_numpy(tiles).float(), torch.zeros(len(tiles), dtype=torch.int64), 1)
        sums, counts = np.zeros(tiled.image.shape), np.zeros(tiled.image.shape)
        for place, weight in zip(tiled.places, attention.tolist(), strict=True):
            covered = (slice(place.y, place.y + place.size), slice(place.x, place.x + place.size))
            sums[covered] += weight * len(tiles)
            counts[covered] += 1
        values = np.where(tiled.tissue & (counts > 0), sums / np.maximum(counts, 1), np.nan)
        return HeatMap("attention over tiles", values, scale="times even attention")


def fit_head(
    slices: SliceFeatures,
    tiles: SliceFeatures,
    probe: LinearHead,
    tiling: Tiling,
    ordered: bool,
    balanced: bool,
    seed: int,
) -> MultipleInstanceHead:
    """Return the head of the epoch with the least validation loss, the start included; `slices` and `tiles` are of the
    same images, `balanced`: with classes that weigh the same. The same numbers give the same result."""
    num_classes, num_features = probe.weight.shape
    split, patient = slices.table["split"].to_numpy(), slices.table["patient_id"].to_numpy(str)
    train, validation = (np.flatnonzero(split == name) for name in ("train", "validation"))
    levels, weights = _levels(slices.table, ordered), {}
    for level, (group, of_groups) in levels.items():
        learned = of_groups[np.unique(group[train][group[train] >= 0])]
        of_classes = balanced_weights(learned, num_classes) if balanced else np.ones(num_classes)
        weights[level] = torch.from_numpy(of_classes[of_groups]).float()  # (G,)

    def losses(rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the weighted cross entropies (G,) of the images, breasts and patients of some rows."""
        probabilities, found = _probabilities(head, slices, tiles, rows), {}
        for level, (group, of_groups) in levels.items():
            known = np.flatnonzero(group[rows] >= 0)
            if len(known):
                names, own = np.unique(group[rows[known]], return_inverse=True)
                largest = most_suspicious(probabilities[known], torch.from_numpy(own), len(names), ordered)
                of_label = largest[torch.arange(len(names)), torch.from_numpy(of_groups[names])]
                found[level] = -of_label.clamp_min(LEAST).log() * weights[level][names]
        return found

    def of_batches() -> Iterator[torch.Tensor]:
        for rows in _batches(patient, train, shuffled=True):
            yield torch.stack([each.mean() for each in losses(rows).values()]).mean()

    def on_validation() -> float:
        head.eval()
        found = [losses(rows) for rows in _batches(patient, validation)]
        parts = [[each[level] for each in found if level in each] for level in levels]
        return float(torch.stack([torch.cat(each).mean() for each in parts if each]).mean())

    with torch.random.fork_rng(devices=[]), one_thread():
        torch.default_generator.manual_seed(seed)
        head = MultipleInstanceHead(num_features, num_classes, ordered, tiling)
        own = np.concatenate([slices.rows[row] for row in train])
        head.start(probe, mean_and_std(own), streamed_mean_and_std([tiles.rows[row] for row in train]))
        others = [part for name, part in head.named_parameters() if not name.startswith("whole.")]
        parts: list[dict[str, Any]] = [
            {"params": others},
            {"params": head.whole.parameters(), "lr": WHOLE_LEARNING_RATE},
        ]
        optimizer = torch.optim.AdamW(parts, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        keep_best_epoch(head, optimizer, of_batches, on_validation)
    return head.eval()


def image_probabilities(head: MultipleInstanceHead, slices: SliceFeatures, tiles: SliceFeatures) -> np.ndarray:
    """Return (n, C) float64 of the images, 64 at a time."""
    rows = np.arange(len(slices.rows))
    parts = [_probabilities(head, slices, tiles, part) for part in np.array_split(rows, len(rows) // 64 + 1)]
    probabilities = torch.cat(parts).double()
    return (probabilities / probabilities.sum(dim=1, keepdim=True)).numpy()


def streamed_mean_and_std(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return `heads.mean_and_std` of all rows (S, F) together, an image at a time."""
    count, sums, squares = 0, np.zeros(rows[0].shape[1]), np.zeros(rows[0].shape[1])
    for each in rows:
        values = each.astype(np.float64)
        count, sums, squares = count + len(values), sums + values.sum(axis=0), squares + (values**2).sum(axis=0)
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std[std < 1e-6 * (1 + np.abs(mean))] = 1
    return mean, std


def _levels(table: pd.DataFrame, ordered: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the group (n,) of each row, -1 where it is not known, and the labels (G,) of the groups: of images,
    breasts and patients, as far as the data set names them."""
    labels = table["label"].to_numpy().copy()
    levels = {"image": (np.arange(len(table)), labels)}
    for level in GROUPS:
        names, group = groups_of(table, level)
        if len(names):
            known = group >= 0
            levels[level] = group, group_labels(labels[known], group[known], len(names), ordered)
    return levels


def _batches(patient: np.ndarray, rows: np.ndarray, shuffled: bool = False) -> Iterator[np.ndarray]:
    """Yield the rows of PATIENTS_PER_BATCH patients, whole."""
    _, number = np.unique(patient[rows], return_inverse=True)
    order = torch.randperm(number.max() + 1) if shuffled else torch.arange(number.max() + 1)
    for chosen in order.split(PATIENTS_PER_BATCH):
        yield rows[np.isin(number, chosen.numpy())]


def _probabilities(
    head: MultipleInstanceHead, slices: SliceFeatures, tiles: SliceFeatures, rows: np.ndarray
) -> torch.Tensor:
    """Return (n, C) of some images, whose features are read now."""
    inputs: list[torch.Tensor] = []
    for features in (slices, tiles):
        own = [features.rows[row] for row in rows]
        inputs.append(torch.from_numpy(np.concatenate(own).astype(np.float32)))
        inputs.append(torch.repeat_interleave(torch.tensor([len(each) for each in own])))
    with torch.set_grad_enabled(head.training):
        return head(*inputs)
