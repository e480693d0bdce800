"""A labeled data set for `datasets`, its images embedded as lossless PNG.

    builder = BenchmarkBuilder(dataset_name="vindr_mammo", config_name="density", data_dir="vindr-mammo")
    builder.download_and_prepare(num_proc=8)
    rows = builder.as_dataset(split="train")  # or builder.as_streaming_dataset()

or, after `import dataset_scripts.benchmarks`, `load_dataset("vindr_mammo", "density", data_dir="vindr-mammo")`.

The configuration `default` has every image with a label column for each definition, in its official split, or all in
train where there is none. A task's configuration has the images with a label of it, in the splits of `load_task`.

An image is what the reader makes of a file, before crop, contrast and size. DICOM: modality LUT, padding, VOI,
MONOCHROME1 inversion, as `modeling_mammodino.dicom` does them. An image after a window is a fraction of full scale and
goes into 16 bits; stored values of 8 to 16 bits stay as they are. Of other images the one gray plane is kept, at its
depth. Nothing else of a file travels.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd

import modeling_mammodino
from dataset_scripts.corpus.bcs_dbt_volumes import BcsDbtViews
from dataset_scripts.corpus.reader import encode_png
from modeling_mammodino.dicom import frame_order, is_dicom, iter_slices
from modeling_mammodino.image_io import InvalidImageError, read_image

from .index import SPLITS, TASKS, Box
from .task import (
    INDEX_FEATURES,
    MISSING,
    class_numbers,
    find_files,
    load_task,
    located,
    official_splits,
    open_benchmark,
    to_rows,
)

logger = logging.getLogger(__name__)

FULL_SCALE = 65535
DEFAULT = "default"
REFUSED = "refused.jsonl"  # beside the data: a line an image that could not be read


class SliceImage(NamedTuple):
    png: bytes  # gray, 8 or 16 bits
    slice_index: int  # as boxes count: frames of the file from 0; -1 in a file of one image
    num_slices: int
    boxes: list[Box] | None  # of this slice; None where nobody looked


@dataclass(frozen=True)
class BenchmarkImageReader:
    """Images of files.

    Attributes:
        slices_per_volume: evenly spaced through a volume; 0 takes all.
        boxed_slices: of a volume with boxes the slices that have one, in place of evenly spaced ones.
        views: sets BCS-DBT's sides and orientations right, in whose coordinates its boxes are.
    """

    slices_per_volume: int = 4
    boxed_slices: bool = False
    views: BcsDbtViews | None = field(default=None, repr=False)

    def read(self, file: str | Path, boxes: list[Box] | None = None) -> list[SliceImage]:
        """Return all images of a file, or none. Raises InvalidImageError or OSError where one cannot be read."""
        if not is_dicom(file):
            return [SliceImage(as_png(read_image(file), str(file)), -1, 1, boxes)]
        order = frame_order(file)
        slices = iter_slices(file, indices=self._positions(str(file), order, boxes or ()))
        if self.views is not None:
            slices = self.views.correct(file, slices)
        images = []
        for each in slices:
            place = order[each.slice_index] if len(order) > 1 else -1
            of_slice = boxes if boxes is None or place == -1 else [box for box in boxes if box["slice"] == place]
            images.append(SliceImage(as_png(each.pixels, str(file)), place, len(order), of_slice))
        return images

    def _positions(self, file: str, order: tuple[int, ...], boxes: Iterable[Box]) -> list[int]:
        """Return which slices to read, counted in order of position."""
        boxed = sorted({box["slice"] for box in boxes})
        if len(order) > 1 and (outside := [place for place in boxed if not 0 <= place < len(order)]):
            raise InvalidImageError(file, f"a box is on slice {outside[0]} of {len(order)}; correct the boxes")
        if self.boxed_slices and boxed and len(order) > 1:
            return sorted(order.index(place) for place in boxed)
        count = min(self.slices_per_volume or len(order), len(order))
        return ((np.arange(count) + 0.5) * len(order) / count).astype(int).tolist()


def as_png(pixels: np.ndarray, name: str = "image") -> bytes:
    """Encode a gray plane (H, W): uint8 and uint16 as they are, float32 in 0..1 in 16 bits, to the nearest 1/65535.

    Raises InvalidImageError for other values: without a window they have no full scale.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise InvalidImageError(
                name, f"values from {low:g} to {high:g} without a window or VOI LUT; give it one, or stored values"
            )
        pixels = np.rint(pixels.astype(np.float64) * FULL_SCALE).astype(np.uint16)
    return encode_png(pixels)


@dataclass
class BenchmarkConfig(datasets.BuilderConfig):
    """How a data set becomes rows.

    Attributes:
        definition: of the task that is the configuration's name; the data set's default where None.
        seed, validation_fraction, test_fraction: of the splits of a task, see `load_task`.
        slices_per_volume: of a volume, evenly spaced; 0 takes all. Each is a row.
        boxed_slices: of a volume with boxes the slices that have one instead. What such slices have in common, their
            depth among it, then tells them from the slices of other volumes: meant for boxes, not for a volume's label.
        allow_missing: leave images out whose file is not there.
    """

    definition: str | None = None
    seed: int = 0
    validation_fraction: float = 0.15
    test_fraction: float = 0.2
    slices_per_volume: int = 4
    boxed_slices: bool = False
    allow_missing: bool = False


class BenchmarkBuilder(datasets.GeneratorBasedBuilder):
    """Rows of a data set: `image`, labels, `slice_index`, `num_slices` and the columns of the index.

    Attributes:
        benchmark: the data set, named by `dataset_name`.
        table: its images, with their files and labels.
        definitions: of the label columns, by their names.
        official: the splits that the data set itself has.
        left_out: images that are not in the table, by reason.

    An image that cannot be read is left out, logged, and counted by `refused`. Metadata are read at once: raises
    ValueError or OSError as `load_task`.
    """

    BUILDER_CONFIG_CLASS = BenchmarkConfig
    BUILDER_CONFIGS = [BenchmarkConfig(name=name) for name in (DEFAULT, *TASKS)]
    DEFAULT_CONFIG_NAME = DEFAULT
    DEFAULT_WRITER_BATCH_SIZE = 16  # images are large

    _log: str | None = None  # where refusals are noted while building
    _place: str | None = None  # of the finished build

    def _info(self) -> datasets.DatasetInfo:
        if not self.config.data_dir:
            raise ValueError(f"{self.dataset_name}: give data_dir, the folder of the data set as downloaded")
        if self.config.slices_per_volume < 0:
            raise ValueError(f"slices_per_volume={self.config.slices_per_volume}: must be 0 (all slices) or more")
        data_dir = Path(self.config.data_dir).expanduser().absolute()
        self.benchmark = open_benchmark(self.dataset_name, data_dir)
        if self.config.name == DEFAULT:
            self._read_all(data_dir)
        else:
            self._read_task(data_dir)
        # `datasets` would take other contents of the same folder for the same data
        self.hash = fingerprint(self.table, {name: of.classes for name, of in self.definitions.items()})
        return datasets.DatasetInfo(
            description=self.benchmark.title,
            citation=self.benchmark.citation,
            homepage=self.benchmark.homepage,
            license=self.benchmark.license,
            features=datasets.Features(
                {
                    "image": datasets.Image(),
                    **{name: datasets.ClassLabel(names=list(of.classes)) for name, of in self.definitions.items()},
                    "slice_index": datasets.Value("int32"),  # frame of the file, as boxes count; -1 in a 2-D image
                    "num_slices": datasets.Value("int32"),
                    **INDEX_FEATURES,
                }
            ),
        )

    def _read_task(self, data_dir: Path) -> None:
        config = self.config
        task = load_task(
            self.dataset_name,
            data_dir,
            config.name,
            config.definition,
            seed=config.seed,
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
            allow_missing=config.allow_missing,
            with_boxes=True,
        )
        self.table, self.official, self.left_out = task.table, task.official, task.counts["left_out"]
        self.definitions = {"label": task.definition}

    def _read_all(self, data_dir: Path) -> None:
        index = located(self.benchmark, data_dir, with_boxes=True)
        self.definitions = {f"{each.task}_{each.name}": each for each in self.benchmark.definitions}
        self.official = official_splits(index)
        is_there = find_files(index, data_dir, self.config.allow_missing)
        self.left_out = {MISSING: int((~is_there).sum())} if not is_there.all() else {}
        labels = {name: class_numbers(each, index) for name, each in self.definitions.items()}
        index = index.assign(split=index["split"].fillna("train"), **labels)
        self.table = index[is_there].reset_index(drop=True)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        rows = {split: to_rows(self.table[self.table["split"] == split]) for split in SPLITS}
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"rows": of_split})  # a list is shared out
            for split, of_split in rows.items()
            if of_split
        ]

    def _generate_examples(self, rows: list[dict]) -> Iterator[tuple[str, dict[str, Any]]]:
        read_views = self.benchmark.read_views
        reader = BenchmarkImageReader(
            self.config.slices_per_volume,
            self.config.boxed_slices,
            read_views(Path(self.config.data_dir).expanduser()) if read_views else None,
        )
        for row in rows:
            try:
                images = reader.read(row["file"], row["boxes"])  # a volume enters whole or not at all
            except (InvalidImageError, OSError) as error:
                reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
                logger.warning("%s is left out: %s", row["image_id"], reason)
                if self._log:  # not while streaming
                    note = {"image_id": row["image_id"], "split": row["split"], "reason": reason}
                    with open(self._log, "a") as log:  # one write a line: processes do not mix theirs
                        log.write(json.dumps(note) + "\n")
                continue
            for each in images:
                image = {"bytes": each.png, "path": None}
                about = {"slice_index": each.slice_index, "num_slices": each.num_slices, "boxes": each.boxes}
                cells = row | about | {"image": image}
                yield f"{row['image_id']} {each.slice_index}", {name: cells[name] for name in self.info.features}

    def download_and_prepare(self, output_dir: str | None = None, **options: Any) -> None:
        """Build as `datasets` does, and say how many images were left out.

        Raises ValueError where none can be read.
        """
        self._place = output_dir or self.cache_dir
        with tempfile.TemporaryDirectory() as folder:  # `datasets` renames the place when it is done
            self._log = str(Path(folder) / REFUSED)
            try:
                super().download_and_prepare(output_dir, **options)
            except datasets.exceptions.DatasetGenerationError as error:  # a worker process tells no more than this
                cause = error.__cause__ if isinstance(error.__cause__, (OSError, ValueError)) else None
                raise cause or OSError(f"{error}; with num_proc=1 it says why") from error
            if Path(self._log).exists():
                shutil.move(self._log, Path(self._place) / REFUSED)
            self._log = None
        if refused := self.refused():
            reasons = Counter(each["reason"] for each in refused)
            logger.warning(
                "%s: %d of %d images could not be read and are left out, most often: %s",
                *(self.dataset_name, len(refused), len(self.table), reasons.most_common(1)[0][0]),
            )
        if len(refused) == len(self.table):
            raise ValueError(f"{self.dataset_name}: none of {len(refused)} images can be read: {refused[0]['reason']}")

    def refused(self) -> list[dict[str, str]]:
        """Return what a finished build left out: image_id, split and reason of each."""
        log = Path(self._place or self.cache_dir) / REFUSED
        return sorted(map(json.loads, log.read_text().splitlines()), key=str) if log.is_file() else []


def fingerprint(table: pd.DataFrame, classes: dict[str, tuple[str, ...]]) -> str:
    """Return a hash that changes with any cell of the table, with the classes, and with size or time of any file."""
    digest = hashlib.sha256(json.dumps([modeling_mammodino.__version__, classes]).encode())
    for row in to_rows(table):
        found = os.stat(row["file"])
        digest.update(json.dumps([row, found.st_size, found.st_mtime_ns], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
