"""Features of files in Python: `embed_files`. Research use only.

Worker processes read and render a picture at a time, the encoder takes them in batches across files, and each file's
features come out in its turn: a volume of any length streams through.
"""

import inspect
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from .image_processing_mammodino import MammoDinoImageProcessor
from .modeling_mammodino import pool_tokens
from .picture_stream import FileEnd, Picture, PictureStream, open_stream

POOLS = ("class", "patches", "both")


class FileEmbeddings(NamedTuple):
    """Features of one file, S rows; or why it was refused, and none. A pooled volume has one row, its slice None."""

    path: str
    refused: str | None = None
    volume: str = ""  # path of the volume's first file, its own for a 2-D image or a volume in one file
    slices: list[int | None] = []  # (S,) 0-based in order of position
    num_slices: int = 0  # of the file, or of the pooled volume
    embeddings: np.ndarray = np.empty((0, 0), np.float32)  # (S, F) float32
    tissue_fraction: np.ndarray = np.empty(0, np.float32)  # (S,) float32: mean of `tissue_mask`


def embed_files(
    paths: Sequence[str | os.PathLike[str]],
    model: PreTrainedModel | Sequence[PreTrainedModel],
    image_processor: MammoDinoImageProcessor,
    *,
    pool: str = "class",
    batch_size: int = 8,
    slices_per_volume: int | None = None,
    num_workers: int = 0,
) -> Iterator[FileEmbeddings]:
    """Features of DICOM, PNG, JPEG, PGM and TIFF files, a `FileEmbeddings` each, in the order of `paths`.

    A file that cannot be used comes in its turn too, with the reason in `refused` and without rows: also where only a
    later slice is broken, so that a file counts whole or not at all.

    Args:
        model: a MammoDINO encoder, or several whose features stand side by side; each file is read once for all.
        pool: "class", the class token, F = D; "patches", the mean of the patch tokens weighted by breast tissue, F = D;
            "both", one beside the other, F = 2 * D.
        batch_size: pictures that an encoder takes at a time, of whichever files.
        slices_per_volume: evenly spaced slices of a multi-frame file; 0 takes all, None what `image_processor` says.
        num_workers: processes that read and render; 0 does it in this one. They are spawned: a script that asks for
            them keeps its own work under `if __name__ == "__main__":`.

    Raises ValueError for arguments out of range, and for a model that does not fit the image processor.
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r}: must be one of {', '.join(POOLS)}")
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    count = image_processor.slices_per_volume if slices_per_volume is None else slices_per_volume
    if count < 0:
        raise ValueError(f"slices_per_volume={count}: must be at least 0, which takes all slices")
    models = [model] if isinstance(model, torch.nn.Module) else list(model)
    for each in models:
        check_fit(each, image_processor)
    stream = PictureStream([Path(path) for path in paths], image_processor, count)
    return _embed_stream(stream, models, pool, batch_size, min(num_workers, len(stream.paths)))


def check_fit(model: PreTrainedModel, image_processor: MammoDinoImageProcessor) -> None:
    """Raises ValueError where the encoder cannot take what the image processor returns."""
    if "tissue_mask" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no tissue_mask; give a MammoDINO encoder")
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode, where features are random; call model.eval()")
    if model.config.num_channels != 1:
        raise ValueError(
            f"the encoder takes {model.config.num_channels} channels, mammograms have 1; `mammodino convert` folds them"
        )
    if model.config.patch_size != image_processor.patch_size:
        raise ValueError(
            f"patch_size: {model.config.patch_size} in the encoder, {image_processor.patch_size} in the image "
            "processor; use the image processor that was saved with the encoder"
        )


def _embed_stream(
    stream: PictureStream, models: list[PreTrainedModel], pool: str, batch_size: int, num_workers: int
) -> Iterator[FileEmbeddings]:
    rows: dict[int, list[tuple[Picture, np.ndarray]]] = defaultdict(list)  # of files that are not out yet
    ends: dict[int, FileEnd] = {}
    first_paths: dict[str, str] = {}
    turn = 0
    for pictures, ended in _batches(open_stream(stream, num_workers, num_ahead=batch_size), batch_size):
        for picture, features in zip(pictures, encode(models, pictures, pool) if pictures else (), strict=True):
            rows[picture.file].append((picture._replace(pixel_values=np.empty(0)), features))  # pixels are let go
        ends.update((end.file, end) for end in ended)
        while turn in ends:
            # a name that is not UTF-8 is escaped: no table holds it otherwise
            path = str(stream.paths[turn]).encode("utf-8", "backslashreplace").decode()
            yield _gather(path, rows.pop(turn, []), ends.pop(turn).refused, first_paths)
            turn += 1


def _batches(items: Iterable[Picture | FileEnd], batch_size: int) -> Iterator[tuple[list[Picture], list[FileEnd]]]:
    """Batches of `batch_size` pictures, the last of what is left, each with the ends of files that it reached."""
    pictures: list[Picture] = []
    ended: list[FileEnd] = []
    for item in items:
        if isinstance(item, FileEnd):
            ended.append(item)
            continue
        pictures.append(item)
        if len(pictures) == batch_size:
            yield pictures, ended
            pictures, ended = [], []
    yield pictures, ended


@torch.inference_mode()
def encode(models: Sequence[PreTrainedModel], pictures: Sequence[Picture], pool: str) -> np.ndarray:
    """(B, F) float32: the pooled tokens of each picture, the models side by side."""
    pixel_values = torch.from_numpy(np.stack([each.pixel_values for each in pictures]))  # (B, 1, H, W)
    tissue_mask = torch.from_numpy(np.stack([each.tissue_mask for each in pictures]))  # (B, h, w)
    features = []
    for model in models:
        tissue, width = tissue_mask.to(model.device), model.config.hidden_size
        sequence = model(pixel_values.to(model.device, model.dtype), tissue_mask=tissue).last_hidden_state
        registers, threshold = model.config.num_register_tokens, model.config.tissue_threshold
        pooled = pool_tokens(sequence.float(), registers, tissue, threshold)  # (B, 2 * D)
        features.append({"class": pooled[:, :width], "patches": pooled[:, width:], "both": pooled}[pool].cpu())
    return torch.cat(features, dim=1).numpy()


def _gather(
    path: str, rows: list[tuple[Picture, np.ndarray]], refused: str | None, first_paths: dict[str, str]
) -> FileEmbeddings:
    if refused is not None:
        return FileEmbeddings(path, refused)
    pictures = [picture for picture, _ in rows]
    series = pictures[0].volume_id
    return FileEmbeddings(
        path,
        volume=path if series is None else first_paths.setdefault(series, path),
        slices=[picture.slice_index for picture in pictures],
        num_slices=pictures[0].num_slices,
        embeddings=np.stack([features for _, features in rows]),
        tissue_fraction=np.array([picture.tissue_mask.mean() for picture in pictures], np.float32),
    )


def pool_volumes(results: Iterable[FileEmbeddings]) -> Iterator[FileEmbeddings]:
    """One row a volume, the mean over its slices, in the order of their first files; refused files come first.

    A volume that is stored as one file a slice may go on in any later file, so nothing comes out before all are read:
    one row a volume is held until then.
    """
    sums: dict[str, FileEmbeddings] = {}  # of the slices so far, in float64
    counts: dict[str, int] = defaultdict(int)
    for result in results:
        if result.refused is not None:
            yield result
            continue
        counts[result.volume] += len(result.slices)
        total = result._replace(
            slices=result.slices if result.num_slices == 1 else [None],
            embeddings=result.embeddings.sum(axis=0, keepdims=True, dtype=np.float64),
            tissue_fraction=result.tissue_fraction.sum(keepdims=True, dtype=np.float64),
        )
        if before := sums.get(result.volume):
            total = before._replace(
                slices=[None],
                num_slices=before.num_slices + total.num_slices,
                embeddings=before.embeddings + total.embeddings,
                tissue_fraction=before.tissue_fraction + total.tissue_fraction,
            )
        sums[result.volume] = total
    for volume, total in sums.items():
        yield total._replace(
            embeddings=(total.embeddings / counts[volume]).astype(np.float32),
            tissue_fraction=(total.tissue_fraction / counts[volume]).astype(np.float32),
        )
