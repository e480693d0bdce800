"""Frozen features of files: the image processor and the encoder, as a user would call them."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from modeling_mammodino import ImageRefused, MammoDinoImageProcessor, MammoDinoModel, pool_tokens


@torch.inference_mode()
def embed(model: MammoDinoModel, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """(S, 2 * D) float32: class token beside the tissue-weighted mean of the patch tokens, an image a row."""
    inputs = {name: values.to(model.device) for name, values in inputs.items()}
    sequence = model(**inputs).last_hidden_state
    return pool_tokens(sequence, model.config.num_register_tokens, inputs["tissue_mask"]).float().cpu().numpy()


def embed_files(
    paths: list[Path],
    models: dict[str, MammoDinoModel],
    image_processor: MammoDinoImageProcessor,
    slices_per_volume: int,
) -> tuple[dict[str, np.ndarray], dict[Path, str]]:
    """One feature per file and model, the mean over its slices: {model: (n, 2 * D)}, and why files were refused.

    Refused files are left out of the rows, which keep the order of `paths`. Each file is read once for all models.
    """
    features: dict[str, list[np.ndarray]] = {name: [] for name in models}
    refused: dict[Path, str] = {}
    for path in tqdm(paths, desc="features", unit="file"):
        try:
            inputs = image_processor(path, slices_per_volume=slices_per_volume, return_tensors="pt")
        except ImageRefused as refusal:
            refused[path] = str(refusal)
            continue
        for name, model in models.items():
            features[name].append(embed(model, inputs).mean(axis=0))
    return {name: np.stack(rows) for name, rows in features.items()}, refused
