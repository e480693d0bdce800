"""Frozen features for the study: the held-out pictures are read and rendered once, then seen by every encoder."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.file_embeddings import encode
from modeling_mammodino.picture_stream import FileEnd, Picture, PictureStream

from .labels import read_labels

MAX_CACHE_BYTES = 4 * 2**30  # of a larger set the pictures are read and rendered for each encoder
BATCH_SIZE = 64


@dataclass
class LabelledPictures:
    """The files of a label table and their pictures, in memory where they fit."""

    table: pandas.DataFrame  # file, patient, and a column a task
    pictures: Iterable[Picture | FileEnd]

    @classmethod
    def read(cls, labels: Path, tasks: list[str], image_processor: MammoDinoImageProcessor, slices_per_volume: int):
        """Raises ValueError for a table that lacks a column."""
        table = read_labels(labels, tasks)
        paths = [labels.parent / file for file in table["file"]]
        stream = PictureStream(paths, image_processor, slices_per_volume)
        canvas = image_processor.size["height"] * image_processor.size["width"]
        fits = 4 * len(paths) * slices_per_volume * canvas <= MAX_CACHE_BYTES
        return cls(table, list(stream) if fits else stream)

    def features(self, encoder: MammoDinoModel) -> np.ndarray:
        """(n, 2 * D) float32, a row a file of the table: class token beside the tissue-weighted mean of its patches,
        the mean over its slices. Raises ValueError for a file that cannot be used: scores of other files are others."""
        sums = np.zeros((len(self.table), 2 * encoder.config.hidden_size))
        counts = np.zeros((len(self.table), 1))
        pictures = self._usable()
        while batch := list(islice(pictures, BATCH_SIZE)):
            for picture, feature in zip(batch, encode([encoder], batch, pool="both"), strict=True):
                sums[picture.file] += feature
                counts[picture.file] += 1
        return (sums / counts).astype(np.float32)

    def _usable(self) -> Iterator[Picture]:
        for item in self.pictures:
            if isinstance(item, Picture):
                yield item
            elif item.refused is not None:
                raise ValueError(item.refused)
