"""Any tree of DICOM, PNG, JPEG and PGM files -> a pretraining corpus.

    python -m dataset_scripts.corpus SOURCE... --output DIR

The pictures are made by the image processor's own steps, so that pretraining and inference see the same thing. A file
that cannot be used is refused with its reason and the rest is built. Shards are whole or absent; started again on the
same output, the work goes on after the last whole shard.
"""

import argparse
import csv
import json
import logging
import multiprocessing
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from modeling_mammodino.dicom import keyed_hash
from modeling_mammodino.errors import ImageRefused
from modeling_mammodino.image_processing_mammodino import MammoDinoImageProcessor
from modeling_mammodino.picture_stream import find_files
from modeling_mammodino.tissue import patch_tissue

from .corpus_reader import FEATURES, MANIFEST, TISSUE_CELL_PX, encode_png

logger = logging.getLogger(__name__)

HASH_KEY_VARIABLE = "MAMMODINO_HASH_KEY"
SHARD_BYTES = 256 * 2**20


class FileResult(NamedTuple):
    path: str
    rows: list[dict[str, Any]]
    refused: str | None  # the reason


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dataset_scripts.corpus", description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="+", type=Path, help="folders or files")
    parser.add_argument("--output", required=True, type=Path, help="folder of the corpus")
    parser.add_argument("--height", type=int, default=1024, help="pictures are fitted into this height (default 1024)")
    parser.add_argument("--width", type=int, default=1024, help="... and this width, never enlarged (default 1024)")
    parser.add_argument("--bit_depth", type=int, default=8, choices=(8, 16), help="bits a pixel (default 8)")
    parser.add_argument("--collection", default="", help="name for the column `source` (default: the folder's name)")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--hash_key_file", type=Path, help=f"key of the patient hashes (default: ${HASH_KEY_VARIABLE})")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for source in options.source:
        if not source.exists():
            parser.error(f"SOURCE {source}: no such file or folder")
    try:
        report = run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"corpus: {error}") from error
    print(
        f"{options.output}: {report['rows']} images of {report['volumes']} volumes from {report['files_read']} files; "
        f"{report['files_refused']} refused, see refused.csv"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    return build_corpus(
        options.source,
        options.output,
        fit=(options.height, options.width),
        image_processor=MammoDinoImageProcessor(bit_depth=options.bit_depth),
        collection=options.collection or options.source[0].resolve().name,
        hash_key=read_hash_key(options.hash_key_file),
        num_proc=options.num_proc,
    )


def read_hash_key(path: Path | None) -> bytes:
    """The key of the patient hashes; it is never stored. Without one a random key is made for this run, and said."""
    if path is not None:
        key = path.read_bytes().strip()
    else:
        key = os.environ.get(HASH_KEY_VARIABLE, "").encode()
    if not key:
        logger.warning(
            "no key for the patient hashes (--hash_key_file or $%s): a random one is used, so this corpus can neither "
            "be continued after a stop nor linked to another",
            HASH_KEY_VARIABLE,
        )
        return secrets.token_bytes(32)
    return key


def build_corpus(
    sources: list[Path],
    output: Path,
    fit: tuple[int, int],
    image_processor: MammoDinoImageProcessor,
    collection: str,
    hash_key: bytes,
    num_proc: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Build or go on with the corpus in `output`; returns the report, which is also written to report.json.

    Pictures are as large as `fit` = (height, width) in pixels allows, never enlarged. Raises ValueError where `output`
    holds a corpus of other settings or another key.
    """
    started = time.monotonic()
    settings = {
        "fit": list(fit),
        "tissue_cell_px": TISSUE_CELL_PX,
        "image_processor": corpus_settings(image_processor),
        "hash_key_check": keyed_hash("corpus", hash_key),  # tells two keys apart, reveals neither
    }
    _check_same_settings(output, settings)
    files, ignored = find_files(sources)
    if not files:
        raise ValueError(
            f"{', '.join(map(str, sources))}: nothing to read; give folders with DICOM, PNG, JPEG or PGM files"
        )
    output.mkdir(parents=True, exist_ok=True)
    shards = Shards(output, shard_bytes)
    pending = [path for path in files if str(path) not in shards.finished_files]
    _write_json(output / MANIFEST, {"complete": False, **settings})

    read = partial(read_file, image_processor=image_processor, fit=fit, hash_key=hash_key, collection=collection)
    with tqdm(total=len(files), initial=len(files) - len(pending), unit="file", desc="corpus") as progress:
        for result in _map(read, pending, num_proc):
            shards.add(result)
            progress.update()
            progress.set_postfix(images=shards.num_rows, refresh=False)
    shards.close()

    _write_state(output, shards.names, settings)
    report = {
        "files_found": len(files),
        "files_read": len(files) - len(shards.refused),
        "files_refused": len(shards.refused),
        "files_ignored": dict(sorted(ignored.items())),
        "rows": shards.num_rows,
        "volumes": len(shards.volumes),
        "rows_by_kind": dict(sorted(shards.kinds.items())),
        "refused_by_reason": dict(Counter(reason for _, reason in shards.refused).most_common(20)),
        "seconds": round(time.monotonic() - started, 1),
    }
    _write_refused(output / "refused.csv", shards.refused)
    _write_json(output / "report.json", report)
    _write_json(output / MANIFEST, {"complete": True, **settings, **report, "shards": shards.names})
    return report


def corpus_settings(image_processor: MammoDinoImageProcessor) -> dict[str, Any]:
    """The processor's settings that shape the pictures and how they are standardised."""
    saved = image_processor.to_dict()
    return {key: saved[key] for key in sorted(saved) if key.startswith(_PICTURE_SETTINGS)}


_PICTURE_SETTINGS = ("do_", "intensity_", "chest_", "crop_margin", "clahe_", "bit_depth", "image_mean", "image_std")


def read_file(
    path: Path,
    image_processor: MammoDinoImageProcessor,
    fit: tuple[int, int],
    hash_key: bytes,
    collection: str,
) -> FileResult:
    """All rows of one file, or the reason why it is refused: a volume enters whole or not at all."""
    rows = []
    try:
        for mammogram, rendered in image_processor.render_source(path, fit, upscale=False, hash_key=hash_key):
            height, width = rendered.tissue.shape
            cells = (-(-height // TISSUE_CELL_PX), -(-width // TISSUE_CELL_PX))
            fractions = np.rint(patch_tissue(rendered.tissue, cells) * 255).astype(np.uint8)
            rows.append(
                {
                    "image": {"bytes": encode_png(rendered.picture), "path": None},
                    "tissue": {"bytes": encode_png(fractions), "path": None},
                    "source": collection,
                    **{name: getattr(mammogram, name) for name in FEATURES if hasattr(mammogram, name)},
                }
            )
    except (ImageRefused, OSError) as refusal:
        return FileResult(str(path), [], str(refusal).replace("\n", " "))
    return FileResult(str(path), rows, None)


def _map(read, paths: list[Path], num_proc: int) -> Iterator[FileResult]:
    """`read` over the paths, in their order, on `num_proc` processes."""
    if num_proc <= 1 or len(paths) <= 1:
        yield from map(read, paths)
        return
    # spawned, not forked: a fork of a process in which OpenCV or torch has run threads can hang
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, spawn, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.map(read, paths)


class Shards:
    """Arrow shards under construction: each appears under its name when it is whole, with a list of its files."""

    def __init__(self, directory: Path, shard_bytes: int):
        self.directory, self.shard_bytes = directory, shard_bytes
        self.names: list[str] = []
        self.finished_files: set[str] = set()
        self.refused: list[tuple[str, str]] = []
        self.volumes: set[str] = set()
        self.kinds: Counter[str] = Counter()
        self.num_rows = 0
        self._open: list[FileResult] = []
        self._open_bytes = 0
        for record in sorted(directory.glob("shard-*.json")):
            self._count(json.loads(record.read_text()))

    def add(self, result: FileResult) -> None:
        """Takes the rows of one file; a second copy of an image already here is refused."""
        if result.rows and result.rows[0]["volume_id"] in self.volumes:
            result = FileResult(result.path, [], f"{result.path}: the same SOP instance is already in the corpus")
        self.volumes.update(row["volume_id"] for row in result.rows)
        self._open.append(result)
        self._open_bytes += sum(len(row["image"]["bytes"]) + len(row["tissue"]["bytes"]) for row in result.rows)
        if self._open_bytes >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Writes the open shard under a temporary name and renames it; its record follows, and counts it."""
        if not self._open:
            return
        rows = [row for result in self._open for row in result.rows]
        number = len(list(self.directory.glob("shard-*.json")))
        name = f"data-{number:05d}.arrow"
        if rows:
            temporary = self.directory / f".{name}.tmp"
            with ArrowWriter(path=str(temporary), features=FEATURES) as writer:
                for row in rows:
                    writer.write(row)
                writer.finalize()
            os.replace(temporary, self.directory / name)
        record = {
            "name": name if rows else None,
            "files": [result.path for result in self._open],
            "refused": [[result.path, result.refused] for result in self._open if result.refused],
            "volumes": sorted({row["volume_id"] for row in rows}),
            "kinds": Counter(row["kind"] for row in rows),
        }
        _write_json(self.directory / f"shard-{number:05d}.json", record)
        self._open, self._open_bytes = [], 0
        self._count(record)

    def _count(self, record: dict[str, Any]) -> None:
        self.names += [record["name"]] if record["name"] else []
        self.finished_files.update(record["files"])
        self.refused += [(path, reason) for path, reason in record["refused"]]
        self.volumes.update(record["volumes"])
        self.kinds.update(record["kinds"])
        self.num_rows += sum(record["kinds"].values())


def _check_same_settings(output: Path, settings: dict[str, Any]) -> None:
    manifest = output / MANIFEST
    if not manifest.is_file():
        return
    found = json.loads(manifest.read_text())
    wanted = json.loads(json.dumps(settings))
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        raise ValueError(
            f"{output}: holds a corpus made with other settings ({', '.join(differing)}); one corpus has one set of "
            "settings: choose another --output, or give the same settings and the same key"
        )


def _write_state(output: Path, names: list[str], settings: dict[str, Any]) -> None:
    """The two files by which `datasets.load_from_disk` finds the shards."""
    datasets.DatasetInfo(features=FEATURES).write_to_directory(str(output))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": keyed_hash(json.dumps([names, settings]), b"fingerprint"),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    _write_json(output / "state.json", state)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def _write_refused(path: Path, refused: list[tuple[str, str]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "reason"])
        writer.writerows(refused)


if __name__ == "__main__":
    main()
