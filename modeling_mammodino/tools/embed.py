"""The command `mammodino embed`: features of files in a Parquet table. Research use only.

Columns of the table, a row an image:

- path, volume (string): the file, and the first file of its volume, its own for a 2-D image or a volume in one file
- slice, num_slices (int32): place of the slice in its volume, 0-based, null in a pooled volume; slices of the volume
- embedding (F float32): the feature; with --patches the features of all patches, F = h * w * D, row by row, of the
  grid (h, w) that the table's metadata give
- tissue_fraction (float32): share of the canvas that is breast
- mask_confidence (float32): of the breast mask, 0 to 1; look at files below 0.5 with `mammodino inspect`
- laterality, view (string): L or R, CC, MLO and so on, of the header; null where it does not say
- patient (string): keyed hash of PatientID, the same as in a corpus of that key, with $MAMMODINO_HASH_KEY; else null

The table's own metadata say what the features come from (`provenance`), the SHA-256 of the weights among it.
"""

import csv
import hashlib
import json
import logging
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .. import __version__
from ..image_processing_mammodino import MammoDinoImageProcessor
from .command import HASH_KEY_VARIABLE, SHIPPED, add_model_option, show_progress, user_path
from .convert import load_encoder, own_processor, processor_settings
from .features import POOLS, TOKENS, FileEmbeddings, embed_files, find_files, pool_volumes
from .files import atomic_file, check_output, readable, write_json

try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

logger = logging.getLogger(__name__)

ROW_GROUP_BYTES = 16 * 2**20  # of features
MAX_DEFAULT_WORKERS = 8
PART_SECONDS = 60  # of work at most are lost with a run
PART_BYTES = 256 * 2**20  # of features are held in memory
ABOUT_FILE = ("laterality", "view", "patient")
NO_ROWS = FileEmbeddings("", embeddings=np.empty((0, 1), np.float32))


def require_pyarrow() -> None:
    if pyarrow is None:
        raise ImportError("writing a table of features needs pyarrow: pip install mammodino[embed]")


def write_table(results: Iterable[FileEmbeddings], output: Path, metadata: Mapping[str, str]) -> int:
    """Write the rows of all files to `output`, atomically, and return their number; without any nothing is written.

    Columns: see the module."""
    require_pyarrow()
    tables = _row_groups(results)
    if (first := next(tables, None)) is None:
        return 0
    num_rows, schema = 0, first.schema.with_metadata(dict(metadata))
    with (
        atomic_file(output) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema, use_dictionary=["path", "volume"]) as writer,
    ):
        for table in chain((first,), tables):
            writer.write_table(table)
            num_rows += len(table)
    return num_rows


def _row_groups(results: Iterable[FileEmbeddings]):
    """Yield Arrow tables of about ROW_GROUP_BYTES of features, files whole."""
    held: list[FileEmbeddings] = []
    for result in results:
        if result.refused is None:
            held.append(result)
        if sum(each.embeddings.nbytes for each in held) >= ROW_GROUP_BYTES:
            yield _to_arrow(held)
            held = []
    if held:
        yield _to_arrow(held)


def _to_arrow(results: list[FileEmbeddings]):
    embeddings = np.concatenate([each.embeddings for each in results])  # (n, F)
    counts = [len(each.slices) for each in results]
    columns = {
        "path": np.repeat([each.path for each in results], counts),
        "volume": np.repeat([each.volume for each in results], counts),
        "slice": pyarrow.array([index for each in results for index in each.slices], pyarrow.int32()),
        "num_slices": pyarrow.array(np.repeat([each.num_slices for each in results], counts), pyarrow.int32()),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(embeddings.ravel(), embeddings.shape[1]),
        "tissue_fraction": np.concatenate([each.tissue_fraction for each in results]),
        "mask_confidence": np.concatenate([each.mask_confidence for each in results]),
    }
    for name in ABOUT_FILE:
        values = [getattr(each, name) for each, count in zip(results, counts, strict=True) for _ in range(count)]
        columns[name] = pyarrow.array(values, pyarrow.string())
    return pyarrow.table(columns)


@dataclass(frozen=True)
class Parts:
    """The finished files of a run, in a folder beside the table that they will become, so that a run that was stopped
    goes on: each part, whole or not at all, holds the next files of the list."""

    folder: Path

    @classmethod
    @contextmanager
    def open(cls, output: Path, run: dict[str, str]) -> Iterator["Parts"]:
        """Yield the parts of a table; they go when the block ends without error.

        Raises ValueError where those of another `run` are there, or where another process is at work on them.
        """
        parts = cls(output.with_name(f"{output.name}.parts"))
        parts.folder.mkdir(exist_ok=True)
        try:
            with FileLock(parts.folder / "lock").acquire(timeout=0):
                noted = parts.folder / "run.json"
                if parts.num_files and json.loads(noted.read_text()) != run:
                    raise ValueError(
                        f"{parts.folder}: holds the beginning of a run with other files or options; give the same to "
                        "go on, or remove the folder"
                    )
                write_json(noted, run)
                try:
                    yield parts
                except BaseException:
                    if parts.num_files:
                        logger.warning("what is finished stands in %s; the same command goes on", parts.folder)
                    else:
                        shutil.rmtree(parts.folder)
                    raise
        except Timeout as error:
            raise ValueError(f"{output}: another process is writing it; wait for it, or give another") from error
        shutil.rmtree(parts.folder)

    @property
    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.parquet"))

    @property
    def num_files(self) -> int:
        return sum(int(pyarrow.parquet.read_schema(path).metadata[b"files"]) for path in self._paths)

    def keep(self, results: Iterable[FileEmbeddings]) -> None:
        """Write all results, every PART_SECONDS or PART_BYTES, and what there is where they break off."""
        held: list[FileEmbeddings] = []
        written, num_bytes = time.monotonic(), 0
        try:
            for result in results:
                held.append(result)
                num_bytes += result.embeddings.nbytes
                if time.monotonic() - written > PART_SECONDS or num_bytes > PART_BYTES:
                    self._write(held)
                    held, written, num_bytes = [], time.monotonic(), 0
        finally:
            if held:
                self._write(held)

    def _write(self, results: list[FileEmbeddings]) -> None:
        refused = {result.path: readable(result.refused) for result in results if result.refused is not None}
        rows = [result for result in results if result.refused is None]
        table = _to_arrow(rows or [NO_ROWS])
        table = table.replace_schema_metadata({"files": str(len(results)), "refused": json.dumps(refused)})
        with atomic_file(self.folder / f"{len(self._paths):06d}.parquet") as temporary:
            pyarrow.parquet.write_table(table, temporary)

    def read(self, refused: dict[str, str]) -> Iterator[FileEmbeddings]:
        """Yield the results of all parts in order; refused files are noted in `refused`."""
        for path in self._paths:
            table = pyarrow.parquet.read_table(path)
            refused |= json.loads(table.schema.metadata[b"refused"])
            columns = {name: table[name].to_pylist() for name in ("path", "volume", "slice", "num_slices", *ABOUT_FILE)}
            width = table.schema.field("embedding").type.list_size
            embeddings = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, width)
            fractions, confidences = (table[name].to_numpy() for name in ("tissue_fraction", "mask_confidence"))
            starts = [row for row, path in enumerate(columns["path"]) if not row or path != columns["path"][row - 1]]
            for start, end in pairwise([*starts, len(table)]):
                yield FileEmbeddings(
                    columns["path"][start],
                    volume=columns["volume"][start],
                    slices=columns["slice"][start:end],
                    num_slices=columns["num_slices"][start],
                    embeddings=embeddings[start:end],
                    tissue_fraction=fractions[start:end],
                    mask_confidence=confidences[start:end],
                    **{name: columns[name][start] for name in ABOUT_FILE},
                )


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the SHA-256 of names, types, shapes and values of a model's parameters and buffers, as in memory, in order
    of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def stamp(files: Iterable[Path]) -> str:
    """Return what changes with a list of files, their sizes and their times."""
    digest = hashlib.sha256()
    for file in files:
        found = file.stat()
        digest.update(f"{readable(file)}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def write_refused(path: Path, refused: Mapping[str, str]) -> None:
    """Write a CSV of files and reasons; without any an earlier run's list goes."""
    if not refused:
        path.unlink(missing_ok=True)
        return
    with (
        atomic_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        rows = ((readable(file), readable(reason)) for file, reason in refused.items())
        csv.writer(stream).writerows([("file", "reason"), *rows])


def add_command(commands) -> None:
    """Add the subcommand `embed`; `commands` is argparse's action of subparsers."""
    parser = commands.add_parser(
        "embed",
        help="write features of mammograms and tomosynthesis to a Parquet file",
        description="Writes features of mammograms and tomosynthesis slices to a Parquet file, one row an image. The "
        "columns path and volume hold paths as they are given: where a folder's name is private, name files from "
        "within it. Research use only.",
    )
    parser.add_argument(
        "paths", nargs="+", type=user_path, metavar="PATH", help="DICOM or image files, or folders of them"
    )
    add_model_option(parser)
    parser.add_argument("--output", type=user_path, required=True, help="Parquet file to write, NAME.parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it exists")
    parser.add_argument("--pool", choices=POOLS, default="class", help="class token, tissue-weighted mean of patch "
                        "tokens, or both side by side (default class)")  # fmt: skip
    parser.add_argument("--patches", action="store_true", help="in place of a pool the features of all patches, row by "
                        "row; megabytes an image")  # fmt: skip
    parser.add_argument("--pool_volumes", action="store_true", help="one row a volume: the mean over its slices")
    parser.add_argument("--slices_per_volume", type=int, help="evenly spaced slices of a volume, 0 for all (default: "
                        "as the checkpoint's image processor says)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=8, help="images encoded at a time (default 8)")
    parser.add_argument("--num_workers", type=int, help="processes that read and render; 0: none beside the encoder's "
                        f"(default: one a core up to {MAX_DEFAULT_WORKERS}, on the CPU 0)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the encoder")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the checkpoint brings")
    parser.set_defaults(run=run)


def run(options: Namespace) -> None:
    require_pyarrow()
    output: Path = options.output
    check_output(output, ".parquet", ".pq")
    if output.exists() and not options.overwrite:
        raise FileExistsError(f"{output} exists; give another --output, or --overwrite")
    files, ignored, unlisted = find_files(options.paths)
    if ignored:
        logger.info("ignored: %s", ", ".join(f"{count} {suffix}" for suffix, count in ignored.most_common()))
    if not files:
        raise ValueError(f"{', '.join(map(str, options.paths))}: no DICOM file or image found")
    device = find_device(options.device)
    model, image_processor = open_encoder(options.model, options.trust_remote_code)
    num_workers = options.num_workers
    if num_workers is None:  # on the CPU the encoder is the slower part, and takes all cores
        num_workers = 0 if device.type == "cpu" else min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    about = provenance(options, model, image_processor)
    model = model.to(device=device, dtype=getattr(torch, options.dtype))  # type: ignore[call-arg]
    refused = dict(unlisted)
    with Parts.open(output, {**about, "files": stamp(files)}) as parts:
        results = embed_files(
            files,
            model,
            image_processor,
            pool=TOKENS if options.patches else options.pool,
            batch_size=options.batch_size,
            slices_per_volume=options.slices_per_volume,
            num_workers=num_workers,
            skip=parts.num_files,
            hash_key=os.environ.get(HASH_KEY_VARIABLE, "").encode() or None,
        )
        parts.keep(_watch(results, len(files), parts.num_files))
        results = parts.read(refused)
        rows = write_table(pool_volumes(results) if options.pool_volumes else results, output, about)
        write_refused(refused_path := output.with_suffix(".refused.csv"), refused)
    if not rows:
        raise ValueError(f"none of {len(files)} files could be used: the reasons are in {refused_path}")
    print(f"{output}: {rows} rows of {len(files) + len(unlisted) - len(refused)} files; {len(refused)} refused"
          + (f", see {refused_path}" if refused else ""))  # fmt: skip


def _watch(results: Iterable[FileEmbeddings], num_files: int, num_done: int) -> Iterator[FileEmbeddings]:
    """Yield the results, with progress on stderr; refused files are logged."""
    images = refused = 0
    with show_progress(total=num_files, initial=num_done, desc="embed", unit="file") as progress:
        for result in results:
            if result.refused is not None:
                logger.warning("refused: %s", readable(result.refused))
                refused += 1
            images += len(result.slices)
            progress.set_postfix(images=images, refused=refused, refresh=False)
            progress.update()
            yield result


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # not a device, or one that is not here
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def open_encoder(name: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, MammoDinoImageProcessor]:
    """Open encoder, for inference, and image processor of a folder or Hub id; of a classifier its encoder.

    With `trust_remote_code` also what brings its own code, where that takes a `tissue_mask`. Raises ValueError for
    another kind of checkpoint and for weights that are missing, OSError where there is none.
    """
    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise FileNotFoundError(f"{name}: no such folder, and no Hub id (OWNER/NAME)") from error
    if not trust_remote_code:
        if (image_processor := own_processor(processor_settings(name))) is None:
            raise ValueError(
                f"{name}: has no preprocessor_config.json of a MammoDinoImageProcessor, which the features depend on; "
                "give a MammoDINO encoder's folder or Hub id, `mammodino convert` makes one from DINOv2's"
            )
        return load_encoder(name), image_processor
    model, loading = AutoModel.from_pretrained(name, trust_remote_code=True, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{name}: {len(missing)} weights are missing, {missing[0]} first; fetch or convert it again")
    return model.eval(), AutoImageProcessor.from_pretrained(name, trust_remote_code=True)


def provenance(options: Namespace, model: PreTrainedModel, image_processor: MammoDinoImageProcessor) -> dict[str, str]:
    """Return the table's metadata: what the features come from."""
    slices = options.slices_per_volume
    return {
        "notice": "Research use only: not a medical device.",
        "model": SHIPPED.name if options.model == str(SHIPPED) else options.model,
        "weights_sha256": weights_sha256(model),
        "model_revision": getattr(model.config, "_commit_hash", None) or "",
        "mammodino_version": __version__,
        "image_processor": json.dumps(image_processor.to_dict(), sort_keys=True),
        "pool": TOKENS if options.patches else options.pool,
        "grid": json.dumps([side // image_processor.patch_size for side in image_processor.render_settings.canvas]),
        "pool_volumes": json.dumps(options.pool_volumes),
        "slices_per_volume": str(image_processor.slices_per_volume if slices is None else slices),
        "dtype": options.dtype,
    }
