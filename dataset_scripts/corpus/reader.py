"""A pretraining corpus on disk: its columns, its manifest, memory-mapped access by volume, copies of remote ones."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
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
MANIFEST = "manifest.json"
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
        rows = datasets.load_from_disk(str(self.directory))
        if len(rows) == 0:
            raise ValueError(
                f"{self.directory}: the corpus has no rows; refused.csv in {self.directory}.private says why"
            )
        self.rows = rows.cast_column("image", datasets.Image(decode=False)).cast_column(
            "tissue", datasets.Image(decode=False)
        )
        volume_ids = np.asarray(self.rows.data.column("volume_id"))
        starts = np.flatnonzero(np.r_[True, volume_ids[1:] != volume_ids[:-1]])
        self.volume_bounds = np.r_[starts, len(volume_ids)]
        self.kinds = np.asarray(self.rows.data.column("kind").take(starts))  # (num_volumes,) str
        self._starts = starts
        self._slice_indices = np.asarray(self.rows.data.column("slice_index"))
        self._slice_spacing_mm = np.asarray(self.rows.data.column("slice_spacing_mm"), dtype=float)
        self.image_processor = MammoDinoImageProcessor(**self.manifest["image_processor"])

    @property
    def num_volumes(self) -> int:
        return len(self.volume_bounds) - 1

    def volume_column(self, name: str) -> list[str | None]:
        """Return a column of FEATURES by volume, (num_volumes,), such as `patient`."""
        return self.rows.data.column(name).take(self._starts).to_pylist()

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
        record = self.rows[row]
        pixels, tissue = (decode_png(record[name]["bytes"]) for name in ("image", "tissue"))
        return pixels, tissue.astype(np.float32) / 255


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
        for name in (*sha256_of, "state.json", "dataset_info.json", MANIFEST):
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


def decode_png(data: bytes) -> np.ndarray:
    """Return the pixels (H, W) or (H, W, C). Raises ValueError where they cannot be decoded."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("OpenCV cannot decode this image")
    return pixels
