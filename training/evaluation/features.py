"""Frozen features of files for probes: one feature a file, of several encoders at once."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.features import embed_files


def mean_features(
    paths: list[Path],
    models: dict[str, MammoDinoModel],
    image_processor: MammoDinoImageProcessor,
    slices_per_volume: int,
) -> tuple[dict[str, np.ndarray], dict[Path, str]]:
    """One feature per file and model, the mean over its slices: {model: (n, 2 * D)}, and why files were refused.

    A feature is the class token beside the tissue-weighted mean of the patch tokens. Refused files are left out of the
    rows, which keep the order of `paths`. Each file is read once for all models.
    """
    rows: list[np.ndarray] = []
    refused: dict[Path, str] = {}
    results = embed_files(
        paths, list(models.values()), image_processor, pool="both", slices_per_volume=slices_per_volume
    )
    for path, result in tqdm(zip(paths, results, strict=True), desc="features", unit="file", total=len(paths)):
        if result.refused is not None:
            refused[path] = result.refused
        else:
            rows.append(result.embeddings.mean(axis=0))  # (F,), the models side by side
    ends = np.cumsum([2 * model.config.hidden_size for model in models.values()])
    return dict(zip(models, np.split(np.stack(rows), ends[:-1], axis=1), strict=True)), refused
