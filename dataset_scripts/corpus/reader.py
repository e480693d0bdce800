"""A pretraining corpus on disk: its columns, its manifest, memory-mapped access by volume, copies of remote ones."""

import hashlib
import json
import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from fsspec.core import url_to_fs
from huggingface_hub.constants import HF_HOME

from modeling_mammodino.breast_segmentation import patch_tissue
from modeling_mammodino.dicom import Mammogram
from modeling_mammodino.image_processing_mammodino import MammoDinoImageProcessor
from modeling_mammodino.rendering import Rendered
from modeling_mammodino.tools.files import atomic_file

from .burned_in import looks_annotated

logger = logging.getLogger(__name__)

# Everything that a corpus keeps of an image. Nothing else of a DICOM header enters it.
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),  # lossless PNG, 8-bit by default, 16-bit on request
        "tissue": datasets.Image(),  # 8-bit PNG: breast fraction of each cell of TISSUE_CELL_PX pixels
        "volume_id": datasets.Value("string"),  # keyed hash; a 2D image is a volume of one slice
        "slice_index": datasets.Value("int32"),
        "num_slices": datasets.Value("int32"),
        "slice_spacing_mm": datasets.Value("float32"),
        "pixel_spacing_mm": datasets.Value("float32"),  # of the source image
        "kind": datasets.Value("string"),  # ffdm, synthetic_2d, dbt, unknown
        "laterality": datasets.Value("string"),
        "view": datasets.Value("string"),
        "patient": datasets.Value("string"),  # keyed hash
        "study": datasets.Value("string"),  # keyed hash
        "source": datasets.Value("string"),  # name of the collection
        "mask_confidence": datasets.Value("float32"),  # 0 to 1, that `tissue` is the breast
        # "header" says so, "picture": the image looks so, a flag for people; null: neither, which proves nothing
        "burned_in_annotation": datasets.Value("string"),
    }
)
TISSUE_CELL_PX = 4
OF_VOLUME = ("kind", "laterality", "view", "patient", "source")
INDEXED = ("volume_id", "slice_index", "slice_spacing_mm", *OF_VOLUME)  # read at opening; no image
MANIFEST, STATE, INFO = "manifest.json", "state.json", "dataset_info.json"  # the last two are of `datasets`
CACHE_VARIABLE = "MAMMODINO_CACHE"


def make_row(mammogram: Mammogram, rendered: Rendered, collection: str) -> dict[str, Any]:
    """Return the row of an image; of the header only what FEATURES names."""
    height, width = rendered.tissue.shape
    cells = (-(-height // TISSUE_CELL_PX), -(-width // TISSUE_CELL_PX))
    fractions = np.rint(patch_tissue(rendered.tissue, cells) * 255).astype(np.uint8)
    return {
        "image": {"bytes": encode_png(rendered.image), "path": None},
        "tissue": {"bytes": encode_png(fractions), "path": None},
        "source": collection,
        "mask_confidence": rendered.small.confidence,
        "burned_in_annotation": _annotation(mammogram, rendered),
        **{name: getattr(mammogram, name) for name in FEATURES if hasattr(mammogram, name)},
    }


def _annotation(mammogram: Mammogram, rendered: Rendered) -> str | None:
    if mammogram.has_burned_in_annotation:
        return "header"
    # of a volume one slice is looked at: text is drawn on all
    is_looked_at = mammogram.slice_index == mammogram.num_slices // 2
    return "picture" if is_looked_at and looks_annotated(mammogram.pixels, rendered.small.breast) else None


class Corpus:
    """A corpus opened for training. Rows of one volume stand together, in the order of its slices.

    Shards are memory-mapped. What is held of a row are two numbers, and where its record batch lies: opening reads no
    image, and a corpus of millions of rows costs some bytes each, which worker processes share.

    Raises FileNotFoundError or ValueError, with the remedy, where `directory` is not a finished corpus.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not (self.directory / MANIFEST).is_file():
            raise FileNotFoundError(
                f"{self.directory}: no {MANIFEST}, so no corpus, or an unfinished one; build it, or go on with it, "
                "with python -m dataset_scripts.corpus"
            )
        self.manifest = json.loads((self.directory / MANIFEST).read_text())
        names = [each["filename"] for each in json.loads((self.directory / STATE).read_text())["_data_files"]]
        # mapped anew: what the index was read from would count as memory of this process, page by page
        parts = [read_index(map_file(self.directory / name)) for name in names]
        self._shards = [map_file(self.directory / name) for name in names]
        rows = np.concatenate([part.batch_rows for part in parts]) if parts else np.empty(0, int)
        if not rows.sum():
            raise ValueError(
                f"{self.directory}: the corpus has no rows; refused.csv in {self.directory}.private says why"
            )
        self._batch_rows = np.r_[0, np.cumsum(rows)]  # first row of each record batch, and the number of rows
        self._batch_shard = np.repeat(np.arange(len(parts)), [len(part.batch_rows) for part in parts])
        self._batch_offset = np.concatenate([part.batch_offsets for part in parts])
        self._schemas = [part.schema for part in parts]
        self._slice_indices = np.concatenate([part.slice_indices for part in parts])
        self._slice_spacing_mm = np.concatenate([part.slice_spacing_mm for part in parts])
        shard_rows = np.r_[0, np.cumsum([len(part.slice_indices) for part in parts])]
        starts = np.concatenate([part.starts + first for part, first in zip(parts, shard_rows, strict=False)])
        volumes = pa.concat_tables([part.volumes for part in parts])
        is_new = changes(volumes.column("volume_id"))  # not so where a volume goes on in the next shard
        self.volume_bounds = np.r_[starts[is_new], shard_rows[-1]]
        self._of_volume = {name: shared_strings(volumes.column(name).filter(pa.array(is_new))) for name in OF_VOLUME}
        self.image_processor = MammoDinoImageProcessor(**self.manifest["image_processor"])

    def __reduce__(self) -> Any:  # a process that is spawned opens it anew
        return Corpus, (self.directory,)

    @property
    def fingerprints(self) -> list[str]:
        """Hashes of all rows in their order up to the end of each shard, wherever the corpus lies: the last is of the
        whole, which stays among them when it is extended."""
        digest, found = hashlib.sha256(), []
        for shard in self.manifest["shards"]:
            digest.update(shard["sha256"].encode())
            found.append(digest.hexdigest())
        return found

    @cached_property
    def rows(self) -> datasets.Dataset:
        """All columns, images as PNG, for a look: as `datasets` holds them, which costs memory by the row."""
        stored = datasets.Image(decode=False)
        return datasets.load_from_disk(str(self.directory)).cast_column("image", stored).cast_column("tissue", stored)

    @property
    def num_volumes(self) -> int:
        return len(self.volume_bounds) - 1

    @property
    def kinds(self) -> np.ndarray:
        return self.volume_column("kind")

    def volume_column(self, name: str) -> np.ndarray:
        """Return a column of OF_VOLUME by volume, (num_volumes,) str or None, such as `patient`."""
        return self._of_volume[name]

    def rows_of(self, volume: int) -> range:
        """Return the rows of a volume, by its place in the corpus."""
        return range(int(self.volume_bounds[volume]), int(self.volume_bounds[volume + 1]))

    def slice_indices(self, rows: range) -> np.ndarray:
        return self._slice_indices[rows.start : rows.stop]

    def slice_spacing_mm(self, row: int) -> float | None:
        spacing = float(self._slice_spacing_mm[row])
        return spacing if np.isfinite(spacing) and spacing > 0 else None

    def image(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the image (H, W) uint8 or uint16 and the breast fraction (h, w) float32 of its cells."""
        batch = int(np.searchsorted(self._batch_rows, row, side="right")) - 1
        shard = self._shards[self._batch_shard[batch]]
        message = pa.ipc.read_message(shard.slice(self._batch_offset[batch]))
        columns = pa.ipc.read_record_batch(message, self._schemas[self._batch_shard[batch]])
        place = row - int(self._batch_rows[batch])
        pixels, tissue = (
            decode_png(columns.column(name).field("bytes")[place].as_buffer()) for name in ("image", "tissue")
        )
        return pixels, tissue.astype(np.float32) / 255


class ShardIndex(NamedTuple):
    """What is read of a shard at its opening."""

    schema: pa.Schema
    batch_rows: np.ndarray  # rows of each record batch
    batch_offsets: np.ndarray  # where it begins in the file, in bytes
    starts: np.ndarray  # first row of each volume
    volumes: pa.Table  # volume_id and OF_VOLUME of each
    slice_indices: np.ndarray  # of each row, int32
    slice_spacing_mm: np.ndarray  # of each row, float32


def map_file(path: Path) -> pa.Buffer:
    """Map a file into memory, which is read where it is looked at. No descriptor stays open: a corpus may have more
    shards than a process may have files."""
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def read_index(shard: pa.Buffer) -> ShardIndex:
    """Read the small columns of a shard, and where its record batches lie."""
    schema = pa.ipc.read_schema(shard)
    options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in INDEXED])
    source = pa.BufferReader(shard)
    offsets, batches = [], []
    with pa.ipc.open_stream(source, options=options) as stream:
        while True:
            offset = source.tell()
            try:
                batches.append(stream.read_next_batch())
            except StopIteration:
                break
            offsets.append(offset)
    rows = pa.Table.from_batches(batches, stream.schema)
    starts = np.flatnonzero(changes(rows.column("volume_id")))
    return ShardIndex(
        schema,
        batch_rows=np.array([len(each) for each in batches], int),
        batch_offsets=np.array(offsets, int),
        starts=starts,
        volumes=rows.select(["volume_id", *OF_VOLUME]).take(starts),
        slice_indices=rows.column("slice_index").to_numpy().copy(),
        slice_spacing_mm=rows.column("slice_spacing_mm").to_numpy().copy(),
    )


def changes(column: pa.ChunkedArray) -> np.ndarray:
    """Return (n,) bool: whether a value is another than the one before it."""
    return np.r_[True, pc.not_equal(column[1:], column[:-1]).to_numpy()][: len(column)]


def shared_strings(column: pa.ChunkedArray) -> np.ndarray:
    """Return an array of str or None in which equal values are one object."""
    encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    words = np.array([*encoded.dictionary.to_pylist(), None], object)
    return words[encoded.indices.fill_null(len(words) - 1).to_numpy()]


def local_corpus(address: str | Path) -> Path:
    """Return the folder of a corpus: `address` itself, or where it is an fsspec address (`s3://...`,
    `hf://datasets/OWNER/NAME`) a copy under $MAMMODINO_CACHE, by default beside the Hub's own cache.

    Safe to call from several processes at a time: one copies, the others wait. A copy that was cut off goes on with the
    shard it was at. Raises FileNotFoundError where there is no finished corpus, OSError where a shard arrives damaged.
    """
    text = str(address)
    if "://" not in text and "::" not in text:
        return Path(text)
    filesystem, root = url_to_fs(text)
    try:
        content = filesystem.cat_file(f"{root}/{MANIFEST}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{text}: no {MANIFEST}, so no corpus, or an unfinished one") from error
    sha256_of = {shard["name"]: shard["sha256"] for shard in json.loads(content)["shards"]}
    cache = Path(os.environ.get(CACHE_VARIABLE, Path(HF_HOME) / "mammodino"))
    folder = cache / "corpora" / hashlib.sha256(content).hexdigest()[:16]  # another content is another copy
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        # the manifest last: it says that all is there
        for name in (*sha256_of, STATE, INFO, MANIFEST):
            if Path(name).name != name:
                raise ValueError(
                    f"{MANIFEST}: a shard is named {name!r}, which is no plain file name; leave this corpus alone"
                )
            if (folder / name).exists():
                continue
            logger.info("copying %s", name)
            with atomic_file(folder / name) as temporary:
                filesystem.get_file(f"{root}/{name}", str(temporary))
                with temporary.open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
                if found != sha256_of.get(name, found):
                    raise OSError(
                        f"{name}: arrived damaged, or is not the one of the manifest; verify the corpus at its source"
                    )
    return folder


def encode_png(pixels: np.ndarray) -> bytes:
    encoded, data = cv2.imencode(".png", pixels)
    if not encoded:
        raise ValueError(f"OpenCV cannot encode an array of shape {pixels.shape}, {pixels.dtype}")
    return data.tobytes()


def decode_png(data: Any) -> np.ndarray:
    """Return the pixels (H, W) or (H, W, C). Raises ValueError where they cannot be decoded."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("OpenCV cannot decode this image")
    return pixels
