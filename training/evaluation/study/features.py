"""Frozen features for the study: the held-out pictures are read and rendered once, then seen by every encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.modeling_mammodino import pool_tokens
from modeling_mammodino.picture_stream import FileEnd, Picture, PictureStream

BATCH_SIZE = 64


class Example(NamedTuple):
    """What an encoder sees of one row of a table, and which patches its feature is of."""

    row: int
    pixel_values: np.ndarray  # (1, H, W) float32
    tissue_mask: np.ndarray  # (h, w) float32
    weights: np.ndarray  # (h, w) float32, of the mean over patches


def whole_slices(paths: Sequence[Path], image_processor: MammoDinoImageProcessor, slices: int) -> list[Example]:
    """So many evenly spaced slices of each file, all where it is 0; patches weigh as much as there is breast in them.

    Raises ValueError for a file that cannot be used: scores of other files are others.
    """
    items = list(PictureStream(paths, image_processor, slices))
    if refused := [item.refused for item in items if isinstance(item, FileEnd) and item.refused]:
        raise ValueError(f"{len(refused)} of {len(paths)} files cannot be used: {refused[0]}")
    pictures = (item for item in items if isinstance(item, Picture))
    return [Example(each.file, each.pixel_values, each.tissue_mask, each.tissue_mask) for each in pictures]


@torch.inference_mode()
def features_of(encoder: MammoDinoModel, examples: Sequence[Example], drops_background: bool) -> np.ndarray:
    """(n, 3 * D) float32, a row a row of the table: class token, weighted mean of the patch tokens and their maximum
    where the weight is not 0; the mean over its examples. An encoder sees background where it did in pretraining."""
    features = []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        pixel_values, tissue, weights = (
            torch.from_numpy(np.stack(arrays))
            for arrays in zip(*((each.pixel_values, each.tissue_mask, each.weights) for each in batch), strict=True)
        )
        tokens = encoder(pixel_values, tissue_mask=tissue if drops_background else None).last_hidden_state
        registers = encoder.config.num_register_tokens
        patches = tokens[:, 1 + registers :]  # (B, N, D)
        highest = patches.masked_fill(weights.flatten(1)[:, :, None] == 0, -torch.inf).amax(dim=1)
        features.append(torch.cat((pool_tokens(tokens, registers, weights), highest), dim=1).numpy())
    return mean_of_rows(examples, np.concatenate(features))


def mean_of_rows(examples: Sequence[Example], features: np.ndarray) -> np.ndarray:
    """(n, D) float32 of (examples, D): the mean over the examples of each row."""
    rows = np.array([each.row for each in examples])
    sums = np.zeros((rows.max() + 1, features.shape[1]))
    np.add.at(sums, rows, features.astype(np.float64))
    return (sums / np.bincount(rows)[:, None]).astype(np.float32)
