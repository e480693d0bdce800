"""From files to images to features: reading in worker processes, frozen encoders, and `embed_files` for whole archives.

Three steps, each of which can be used alone:

- `stream_images` and `read_files` give what a picklable callable makes of each file, or why the file was refused. For
  MammoDINO that callable is a `SliceReader`; for other encoders or for detection it is their own renderer.
- `extract_features` takes images in batches across files and gives one feature an image.
- `embed_files` does both for a MammoDINO checkpoint, one `FileEmbeddings` a file.

Research use only.
"""

import inspect
import logging
import os
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedModel

from ..dicom import Instance, group_files, instance_of, is_dicom
from ..image_io import DICOM_SUFFIXES, IMAGE_SUFFIXES, InvalidImageError
from ..image_processing_mammodino import MammoDinoImageProcessor
from ..modeling_mammodino import pool_tokens
from ..rendering import place_on_canvas
from .files import readable
from .walk import NOT_REGULAR, walk

try:
    import cv2
except ImportError:  # refused by name where an image is rendered
    cv2 = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Key = TypeVar("Key")
Inputs = Mapping[str, np.ndarray]  # of a model's forward, for one image
POOLS = ("class", "patches", "both")
TOKENS = "tokens"  # in place of a pool
PREFETCHED_IMAGES = 8
MANY_FILES = 2000  # headers of fewer are read sooner than workers start
START_METHOD = "spawn"  # a fork of a process in which OpenCV or torch has run threads can hang


class FileEnd(NamedTuple):
    """Follows the last image of a file, or stands where its images break off."""

    file: int  # its position in the list of files
    refused: str | None = None  # the reason, one line


class FileImages(IterableDataset):
    """The images of many files: (position of the file, image), and behind each file's images its `FileEnd`.

    `read` gives the images of one file, and raises InvalidImageError or OSError for one that cannot be used. A file may
    be a path or whatever else `read` takes. In a DataLoader each worker takes its share of the files.
    """

    def __init__(self, files: Sequence[Any], read: Callable[[Any], Iterable[Any]]):
        self.files, self.read = files, read

    def __iter__(self) -> Iterator[tuple[int, Any] | FileEnd]:
        worker = get_worker_info()
        for position in share(len(self.files), *((worker.id, worker.num_workers) if worker else (0, 1))):
            try:
                for image in self.read(self.files[position]):
                    yield position, image
                yield FileEnd(position)
            except (InvalidImageError, OSError) as refusal:
                yield FileEnd(position, " ".join(str(refusal).split()))


def share(num_files: int, worker: int, num_workers: int) -> Iterator[int]:
    """Yield the files of one worker: one of each round of `num_workers`, another place each round, so that where
    mammograms and volumes alternate no worker gets all the volumes."""
    for turn, first in enumerate(range(0, num_files, num_workers)):
        file = first + (worker + turn) % num_workers
        if file < num_files:
            yield file


def stream_images(
    files: Sequence[Any],
    read: Callable[[Any], Iterable[Any]],
    num_workers: int = 0,
    num_ahead: int = PREFETCHED_IMAGES,
) -> Iterable[tuple[int, Any] | FileEnd]:
    """Return the items of `FileImages`, from `num_workers` processes that read about `num_ahead` images ahead; 0: from
    this process.

    Images of a file come in order, and its end behind them; the files of several workers alternate, one item each. A
    volume of any length streams through. Workers are spawned, so `files` and `read` are pickled.
    """
    images = FileImages(files, read)
    num_workers = min(num_workers, len(files))
    if num_workers == 0:
        return images
    return _watched(
        DataLoader(
            images,
            batch_size=None,  # items one by one: batches are made across workers
            collate_fn=_unchanged,  # arrays travel through pipes; tensors need /dev/shm, which containers keep small
            prefetch_factor=max(2, -(-num_ahead // num_workers)),
            **worker_options(num_workers),
        ),
        num_workers,
    )


def _watched(items: Iterable[Item], num_workers: int) -> Iterator[Item]:
    """Yield the items; where a worker was killed, say what that mostly is. Raises RuntimeError."""
    try:
        yield from items
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise RuntimeError(
            f"one of {num_workers} processes that read files was killed, mostly by a system short of memory; take "
            "fewer num_workers, or 0"
        ) from error


def worker_options(num_workers: int) -> dict[str, Any]:
    """Return a DataLoader's options for workers that use OpenCV, one thread each."""
    if not num_workers:
        return {"num_workers": 0}
    return {"num_workers": num_workers, "multiprocessing_context": START_METHOD, "worker_init_fn": _use_one_thread}


def _unchanged(item: Any) -> Any:
    return item


def _use_one_thread(worker: int) -> None:
    if cv2 is not None:
        cv2.setNumThreads(1)


def read_files(
    files: Sequence[Any],
    read: Callable[[Any], Iterable[Any]],
    num_workers: int = 0,
    num_ahead: int = PREFETCHED_IMAGES,
) -> Iterator[list[Any] | str]:
    """Yield for each file, in order, the list of its images, or the reason why it was refused; see `stream_images`.

    A file counts whole or not at all. Images of later files that other workers have read are held meanwhile.
    """
    for images, refused in _in_order(stream_images(files, read, num_workers, num_ahead)):
        yield images if refused is None else refused


def _in_order(items: Iterable[tuple[int, Item] | FileEnd]) -> Iterator[tuple[list[Item], str | None]]:
    """Yield what belongs to each file, and why it was refused, in the order of the files."""
    of_files: dict[int, list[Item]] = defaultdict(list)  # of those that are not out yet
    ends: dict[int, FileEnd] = {}
    turn = 0
    for item in items:
        if isinstance(item, FileEnd):
            ends[item.file] = item
        else:
            of_files[item[0]].append(item[1])
        while turn in ends:
            yield of_files.pop(turn, []), ends.pop(turn).refused
            turn += 1


class RenderedSlice(NamedTuple):
    """One image ready for the encoder, and its place."""

    slice_index: int
    num_slices: int  # of the volume
    pixel_values: np.ndarray  # (1, H, W) float32
    tissue_mask: np.ndarray  # (h, w) float32
    mask_confidence: float  # 0 to 1
    laterality: str | None  # as `dicom.Mammogram` has it, and so the next two
    view: str | None
    patient: str | None

    @property
    def inputs(self) -> Inputs:
        return {"pixel_values": self.pixel_values, "tissue_mask": self.tissue_mask}


@dataclass(frozen=True)
class SliceReader:
    """Files to images, bit for bit as `image_processor(file)` makes them; picklable, for `FileImages`.

    Attributes:
        slices_per_volume: evenly spaced slices of a multi-frame file; 0 takes all.
        hash_key: of the patients' hashes; None: patients are not told.
    """

    image_processor: MammoDinoImageProcessor
    slices_per_volume: int = 0
    hash_key: bytes | None = None

    def __call__(
        self, file: str | Path | Sequence[Path], slices: Sequence[int] | None = None
    ) -> Iterator[RenderedSlice]:
        """Yield the images of one file; `slices` names those wanted, counted in order of position. A list of files is
        one volume, a file a slice, in order: all of them are taken.

        Raises InvalidImageError or OSError, naming the file.
        """
        settings = self.image_processor.render_settings
        for mammogram, rendered in self.image_processor.render_source(
            file,
            settings.canvas,
            slices_per_volume=self.slices_per_volume if not isinstance(file, (list, tuple)) else 0,
            slices=slices,
            hash_key=self.hash_key,
        ):
            placed = place_on_canvas(rendered.image, rendered.tissue, settings, rendered.placement)
            yield RenderedSlice(
                mammogram.slice_index,
                mammogram.num_slices,
                placed.pixel_values,
                placed.tissue_mask,
                rendered.small.confidence,
                mammogram.laterality,
                mammogram.view,
                mammogram.patient if self.hash_key else None,
            )


@dataclass(frozen=True)
class InstanceReader:
    """Files to their places among others, for `group_paths`; picklable, for `FileImages`."""

    hash_key: bytes

    def __call__(self, file: Path) -> Iterator[Instance | None]:
        yield instance_of(file, self.hash_key)


def group_paths(files: Sequence[Path], num_workers: int = 0) -> list[list[int]]:
    """Return the places in `files` of each volume's files, in order of position: as the corpus, by their headers."""
    reader = InstanceReader(secrets.token_bytes(32))
    of_files = read_files(files, reader, num_workers if len(files) > MANY_FILES else 0)
    return group_files([None if isinstance(found, str) else found[0] for found in of_files])


def extract_features(
    models: nn.Module | Sequence[nn.Module],
    images: Iterable[tuple[Key, Inputs] | FileEnd],
    *,
    pool: str | None = "both",
    batch_size: int = 8,
    bf16: bool = False,
    last_layers: int = 1,
) -> Iterator[tuple[Key, np.ndarray] | FileEnd]:
    """Yield (key, feature) of each image in order, the feature (F,) float32; a `FileEnd` among the images comes through
    behind the images before it.

    Args:
        models: an encoder in eval mode, or several whose features stand side by side. They say device and dtype.
        images: each with any key, and the arguments of the model's forward without the batch dimension: pixel_values
            (C, H, W) float32, and for MammoDINO tissue_mask (h, w) float32, without which background is encoded, too.
            A further entry `weights` (h, w) float32 pools in place of the tissue mask, and is not given to the model.
        pool: of MammoDINO's tokens, "class", the class token, F = D; "patches", the mean of the patch tokens weighted
            by breast tissue, F = D; "both", one beside the other, F = 2 * D; "all", and beside these the maximum of
            the patch tokens with a weight above 0, F = 3 * D; "tokens", the patch tokens themselves, row by row,
            F = h * w * D. None: the model's own output is the feature, (B, F).
        batch_size: images that a model takes at a time, of whichever files; the last batch is what is left.
        bf16: autocast to bfloat16.
        last_layers: with 2 or more, and a `pool`, the class tokens of the layers before the last stand before the
            feature, from the earliest; F grows by D for each.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    batch: list[tuple[Key, Inputs]] = []
    ends: list[FileEnd] = []
    for item in images:
        if isinstance(item, FileEnd):
            if not batch:
                yield item
            else:
                ends.append(item)
            continue
        batch.append(item)
        if len(batch) == batch_size:
            yield from _encode_batch(models, batch, pool, bf16, last_layers)
            yield from ends
            batch, ends = [], []
    if batch:
        yield from _encode_batch(models, batch, pool, bf16, last_layers)
    yield from ends


@torch.inference_mode()
def _encode_batch(
    models: Sequence[Any], batch: Sequence[tuple[Key, Inputs]], pool: str | None, bf16: bool, last_layers: int
) -> list[tuple[Key, np.ndarray]]:
    inputs = {name: torch.from_numpy(np.stack([each[name] for _, each in batch])) for name in batch[0][1]}
    features = []
    for model in models:
        parameter = next(model.parameters())
        device, given = parameter.device, {name: value.to(parameter.device) for name, value in inputs.items()}
        given["pixel_values"] = given["pixel_values"].to(parameter.dtype)
        weights = given.pop("weights", None)  # (B, h, w)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(**given, **({"output_hidden_states": True} if last_layers > 1 else {}))
        if pool is not None:
            pooled = _pool(output.last_hidden_state.float(), model.config, given.get("tissue_mask"), weights, pool)
            output = beside_earlier_tokens(pooled, output, getattr(model, "layernorm", None), last_layers)
        features.append(output.float().cpu())
    return list(zip((key for key, _ in batch), torch.cat(features, dim=1).numpy(), strict=True))


def beside_earlier_tokens(pooled: torch.Tensor, outputs: Any, norm: Any, last_layers: int) -> torch.Tensor:
    """Put the class tokens of the last `last_layers` layers but the very last before `pooled` (B, F), from the
    earliest, each behind the encoder's final norm, as in DINOv2's linear evaluation
    (dinov2/eval/linear.py, create_linear_input). `outputs` has the hidden states of all layers, unless there is one."""
    earlier = [norm(states[:, 0]).to(pooled.dtype) for states in (outputs.hidden_states or ())[-last_layers:-1]]
    return torch.cat((*earlier, pooled), dim=1)


def _pool(
    tokens: torch.Tensor, config: Any, tissue: torch.Tensor | None, weights: torch.Tensor | None, pool: str
) -> torch.Tensor:
    """(B, 1 + R + N, D) -> (B, F); see `extract_features`."""
    if pool == TOKENS:
        return tokens[:, 1 + config.num_register_tokens :].flatten(1)
    registers, width, threshold = config.num_register_tokens, config.hidden_size, config.tissue_threshold
    if weights is None:
        weights = tissue
    else:
        threshold = 0.0
    pooled = pool_tokens(tokens, registers, weights, threshold)  # (B, 2 * D)
    if pool == "all":
        patches = tokens[:, 1 + registers :]  # (B, N, D)
        if weights is not None:
            patches = patches.masked_fill(weights.flatten(1)[:, :, None] <= threshold, -torch.inf)
        return torch.cat((pooled, patches.amax(dim=1)), dim=1)
    return {"class": pooled[:, :width], "patches": pooled[:, width:], "both": pooled}[pool]


class FoundFiles(NamedTuple):
    """What `find_files` found."""

    files: list[Path]  # sorted
    ignored: Counter[str]  # number of others, by suffix or by reason
    unlisted: dict[str, str]  # folders that cannot be listed: path -> reason


def find_files(sources: Iterable[Path]) -> FoundFiles:
    """Find every file that may be an image, by an image's or DICOM's suffix or by its content. A file named as a source
    is always taken. Folders that cannot be listed are logged.

    Raises OSError where a source cannot be read, or is neither a folder nor a regular file.
    """
    found: set[Path] = set()
    ignored: Counter[str] = Counter()
    unlisted: dict[str, str] = {}
    for source in sources:
        if not source.is_dir():
            source.stat()  # raises where there is nothing
            if not source.is_file():
                raise OSError(f"{source}: {NOT_REGULAR}; give a folder or a file")
            found.add(source)
            continue
        listed = walk(source)
        unlisted |= listed.unlisted
        ignored.update(listed.passed_over.values())
        for path in map(Path, listed.files):
            suffix = path.suffix.lower()
            is_index = path.name.upper() == "DICOMDIR"  # of a medium, without pixels
            if not is_index and (suffix in (*IMAGE_SUFFIXES, *DICOM_SUFFIXES) or is_dicom(path)):
                found.add(path)
            else:
                ignored[suffix or "no suffix"] += 1
    for folder, reason in unlisted.items():
        logger.warning("left out: %s: %s", folder, reason)
    return FoundFiles(sorted(found), ignored, unlisted)


def paths_below(files: Sequence[Path], folders: Iterable[Path] = ()) -> list[str]:
    """Return the path of each file below the folder that holds all of them, and `folders`: names by which what is made
    of files differs as they do."""
    top = os.path.commonpath([os.path.abspath(each) for each in (*folders, *(file.parent for file in files))])
    return [os.path.relpath(file, top) for file in files]


class FileEmbeddings(NamedTuple):
    """Features of one file, S rows; or why it was refused, and none. A pooled volume has one row, its slice None."""

    path: str
    refused: str | None = None
    volume: str = ""  # path of the volume's first file, its own for a 2-D image or a volume in one file
    slices: list[int | None] = []  # (S,) 0-based in order of position in the volume
    num_slices: int = 0  # of the volume
    embeddings: np.ndarray = np.empty((0, 0), np.float32)  # (S, F) float32
    tissue_fraction: np.ndarray = np.empty(0, np.float32)  # (S,) float32: mean of `tissue_mask`
    mask_confidence: np.ndarray = np.empty(0, np.float32)  # (S,) float32, 0 to 1
    laterality: str | None = None  # L, R; of the header, and so the next two
    view: str | None = None  # CC, MLO, ...
    patient: str | None = None  # keyed hash, where there is a key


def embed_files(
    paths: Sequence[str | os.PathLike[str]],
    model: PreTrainedModel | Sequence[PreTrainedModel],
    image_processor: MammoDinoImageProcessor,
    *,
    pool: str = "class",
    batch_size: int = 8,
    slices_per_volume: int | None = None,
    num_workers: int = 0,
    skip: int = 0,
    last_layers: int = 1,
    hash_key: bytes | None = None,
    volumes: Sequence[Sequence[int]] | None = None,
) -> Iterator[FileEmbeddings]:
    """Return the features of DICOM, PNG, JPEG, PGM and TIFF files, a `FileEmbeddings` each, in the order of `paths`.

    A file that cannot be used comes in its turn too, with the reason in `refused` and without rows: also where only a
    later slice is broken, so that a volume counts whole or not at all. Files that hold one slice each are one volume
    under one crop and window, as in a corpus; all headers are read first to find them.

    Args:
        model: a MammoDINO encoder, or several whose features stand side by side; each file is read once for all.
        pool: "class", "patches", "both" or "tokens"; see `extract_features`.
        batch_size: images that an encoder takes at a time, of whichever files.
        slices_per_volume: evenly spaced slices of a multi-frame file; 0 takes all, None what `image_processor` says. Of
            files that hold one slice each all are taken.
        num_workers: processes that read and render; 0 does it in this one. They are spawned: a script that asks for
            them keeps its own work under `if __name__ == "__main__":`.
        skip: files at the start of `paths` whose features are there already, and do not come again.
        last_layers: see `extract_features`.
        hash_key: of the patients' hashes; None: patients are not told.
        volumes: places in `paths` of each volume's files, as `group_paths` finds them; None: by their headers.

    Raises ValueError for arguments out of range, and for a model that does not fit the image processor.
    """
    if pool not in (*POOLS, TOKENS):
        raise ValueError(f"pool={pool!r}: must be one of {', '.join((*POOLS, TOKENS))}")
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("skip", skip, 0)):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    count = image_processor.slices_per_volume if slices_per_volume is None else slices_per_volume
    if count < 0:
        raise ValueError(f"slices_per_volume={count}: must be at least 0, which takes all slices")
    models = [model] if isinstance(model, nn.Module) else list(model)
    for each in models:
        check_fit(each, image_processor)
        if not 1 <= last_layers <= each.config.num_hidden_layers:
            raise ValueError(
                f"last_layers={last_layers}: must be 1 to {each.config.num_hidden_layers}, of this encoder"
            )
    files = [Path(path) for path in paths]
    reader = SliceReader(image_processor, count, hash_key)
    return _embed(files, reader, models, pool, batch_size, num_workers, skip, last_layers, volumes)


def check_fit(model: PreTrainedModel, image_processor: MammoDinoImageProcessor) -> None:
    """Raise ValueError where the encoder cannot take what the image processor returns."""
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


def _embed(
    files: Sequence[Path],
    reader: SliceReader,
    models: Sequence[PreTrainedModel],
    pool: str,
    batch_size: int,
    num_workers: int,
    skip: int,
    last_layers: int,
    volumes: Sequence[Sequence[int]] | None,
) -> Iterator[FileEmbeddings]:
    volumes = [places for places in volumes or group_paths(files, num_workers) if max(places) >= skip]
    sources = [[files[place] for place in places] if len(places) > 1 else files[places[0]] for places in volumes]
    images = stream_images(sources, reader, num_workers, num_ahead=batch_size)

    # the key holds no pixels, so that they are let go
    def without_pixels(place: int, image: RenderedSlice) -> tuple[tuple[int, RenderedSlice], Any]:
        return (place, image._replace(pixel_values=np.empty(0))), image.inputs

    keyed = (item if isinstance(item, FileEnd) else without_pixels(*item) for item in images)
    features = extract_features(models, keyed, pool=pool, batch_size=batch_size, last_layers=last_layers)
    by_volume = (item if isinstance(item, FileEnd) else (item[0][0], (item[0][1], item[1])) for item in features)
    paths = [readable(file) for file in files]
    ready: dict[int, FileEmbeddings] = {}  # by the file's place, until it is its turn
    turn = skip
    for places, (rows, refused) in zip(volumes, _in_order(by_volume), strict=True):
        volume = paths[min(places)]
        if refused is not None:
            for place in places:
                name = " ".join(str(files[place]).split())  # as in the reason, which is one line
                of_another = "a slice of the same volume as " if len(places) > 1 else ""
                is_named = refused.startswith(f"{name}: ")
                ready[place] = FileEmbeddings(paths[place], refused if is_named else f"{name}: {of_another}{refused}")
        elif len(places) > 1:  # a file a row
            ready |= {place: _of_file(paths[place], volume, [row]) for place, row in zip(places, rows, strict=True)}
        else:
            ready[places[0]] = _of_file(volume, volume, rows)
        for place in places:
            if place < skip:
                del ready[place]
        while turn in ready:
            yield ready.pop(turn)
            turn += 1


def _of_file(path: str, volume: str, rows: Sequence[tuple[RenderedSlice, np.ndarray]]) -> FileEmbeddings:
    slices = [each for each, _ in rows]
    return FileEmbeddings(
        path,
        volume=volume,
        slices=[each.slice_index for each in slices],
        num_slices=slices[0].num_slices,
        embeddings=np.stack([feature for _, feature in rows]),
        tissue_fraction=np.array([each.tissue_mask.mean() for each in slices], np.float32),
        mask_confidence=np.array([each.mask_confidence for each in slices], np.float32),
        laterality=slices[0].laterality,
        view=slices[0].view,
        patient=slices[0].patient,
    )


def pool_volumes(results: Iterable[FileEmbeddings]) -> Iterator[FileEmbeddings]:
    """Yield one row a volume, the mean over its slices, in the order of their first files; refused files come first.

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
            mask_confidence=result.mask_confidence.sum(keepdims=True, dtype=np.float64),
        )
        if before := sums.get(result.volume):
            total = before._replace(
                embeddings=before.embeddings + total.embeddings,
                tissue_fraction=before.tissue_fraction + total.tissue_fraction,
                mask_confidence=before.mask_confidence + total.mask_confidence,
            )
        sums[result.volume] = total
    for volume, total in sums.items():
        yield total._replace(
            embeddings=(total.embeddings / counts[volume]).astype(np.float32),
            tissue_fraction=(total.tissue_fraction / counts[volume]).astype(np.float32),
            mask_confidence=(total.mask_confidence / counts[volume]).astype(np.float32),
        )
