"""Is a corpus whole, and does it hold nothing but what a corpus may hold?

    python -m dataset_scripts.verify CORPUS

Every shard is read and every picture decoded. What is wrong is said with its shard and row; the exit status is then 1.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np

from modeling_mammodino.published_files import check_text

from .corpus_reader import FEATURES, MANIFEST, TISSUE_CELL_PX, decode_png

KNOWN_FILES = {MANIFEST, "state.json", "dataset_info.json", "README.md"}
MANIFEST_FIELDS = {
    *("complete", "mammodino", "tissue_cell_px", "fit", "image_processor", "collection", "hash_key_check"),
    *("files_found", "files_read", "files_refused", "files_ignored", "rows", "volumes", "rows_by_kind"),
    *("doubtful_masks", "burned_in_annotations", "refused_by_reason", "notes", "shards"),
}
SHARD = re.compile(r"data-\d{5}\.arrow")
HASH = re.compile(r"[0-9a-f]{32}")
PNG_CHUNKS = {b"IHDR", b"IDAT", b"IEND"}  # no text, no time, no profile
VIEWS = {"CC", "MLO", "ML", "LM", "LMO", "XCC", "XCCL", "XCCM", "FB", "SIO", "ISO", "AT"}
SHOWN = 50


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def _is_length(value: Any) -> bool:
    return value is None or value > 0 and np.isfinite(value)


# what a value may be, by column; pictures have checks of their own
CHECKS: dict[str, Callable[[Any], bool]] = {
    "volume_id": _is_hash,
    "slice_index": lambda value: value >= 0,
    "num_slices": lambda value: value > 0,
    "slice_spacing_mm": _is_length,
    "pixel_spacing_mm": _is_length,
    "kind": {"ffdm", "synthetic_2d", "dbt", "unknown"}.__contains__,
    "laterality": {"L", "R", None}.__contains__,
    "view": {*VIEWS, None}.__contains__,
    "patient": lambda value: value is None or _is_hash(value),
    "study": lambda value: value is None or _is_hash(value),
    "source": lambda value: isinstance(value, str),
    "mask_confidence": lambda value: 0 <= value <= 1,
    "burned_in_annotation": {"header", "picture", None}.__contains__,
}


def verify_corpus(folder: str | Path, num_proc: int = 1) -> list[str]:
    """What is wrong with a corpus, a line each; empty where nothing is. Raises FileNotFoundError without a manifest."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder}: no {MANIFEST}; go on with the build, python -m dataset_scripts.corpus")
    return list(_verify(folder, num_proc))


def _verify(folder: Path, num_proc: int) -> Iterator[str]:
    text = (folder / MANIFEST).read_text()
    manifest = json.loads(text)
    if missing := sorted(MANIFEST_FIELDS - manifest.keys()):
        yield f"{MANIFEST}: no {', '.join(missing)}; build the corpus again"
        return
    if unknown := sorted(manifest.keys() - MANIFEST_FIELDS):
        yield f"{MANIFEST}: unknown field {', '.join(unknown)}; take it out"
    for name in KNOWN_FILES:
        if (folder / name).is_file():
            yield from (f"{name}: {complaint}" for complaint in check_text((folder / name).read_text()))
    names = [shard["name"] for shard in manifest["shards"]]
    for path in sorted(folder.iterdir()):
        if path.name not in KNOWN_FILES and path.name not in names or path.is_symlink() or not path.is_file():
            yield f"{path.name}: no file of this corpus; take it out"
    state = json.loads((folder / "state.json").read_text()) if (folder / "state.json").is_file() else {}
    if [each.get("filename") for each in state.get("_data_files", [])] != names:
        yield "state.json: does not list the manifest's shards; build the corpus again"

    seen: Counter[str] = Counter()
    rows = 0
    for shard, (complaints, volumes, count) in zip(names, _map(folder, manifest, num_proc), strict=True):
        yield from (f"{shard}: {complaint}" for complaint in complaints)
        seen.update(volumes)
        rows += count
    if copies := sum(count > 1 for count in seen.values()):
        yield f"{copies} volumes stand more than once; build the corpus again"
    for name, found in (("rows", rows), ("volumes", len(seen))):
        if manifest[name] != found:
            yield f"{MANIFEST}: {name} is {manifest[name]}, but there are {found}; build the corpus again"


def _map(folder: Path, manifest: dict[str, Any], num_proc: int) -> Iterator[tuple[list[str], list[str], int]]:
    check = partial(verify_shard, folder=folder, manifest=manifest)
    if num_proc <= 1:
        yield from map(check, manifest["shards"])
        return
    spawn = multiprocessing.get_context("spawn")  # see corpus_engine
    with ProcessPoolExecutor(num_proc, spawn, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.map(check, manifest["shards"])


def verify_shard(shard: dict[str, Any], folder: Path, manifest: dict[str, Any]) -> tuple[list[str], list[str], int]:
    """Complaints, the volumes in order, and the number of rows of one shard."""
    path = folder / str(shard["name"])
    remedy = f"delete it and {folder}.private/shards, and go on with the build"
    if not SHARD.fullmatch(path.name) or not path.is_file():
        return [f"missing; {remedy}"], [], 0
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != shard["sha256"]:
            return [f"its content is not what was written; {remedy}"], [], 0
    rows = datasets.Dataset.from_file(str(path))
    if rows.features != FEATURES:
        columns = sorted(set(rows.features) ^ set(FEATURES)) or [n for n in FEATURES if rows.features[n] != FEATURES[n]]
        return [f"column {', '.join(columns)} is not of a corpus; {remedy}"], [], len(rows)
    for name in ("image", "tissue"):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    complaints = [] if len(rows) == shard["rows"] else [f"{len(rows)} rows, not {shard['rows']}; {remedy}"]
    places: list[tuple[str, int, int]] = []
    for number, row in enumerate(rows):
        complaints += [f"row {number}: {complaint}" for complaint in _check_row(row, manifest)]
        places.append((row["volume_id"], row["slice_index"], row["num_slices"]))
    volumes, first = [], 0
    for volume, slices in groupby(places, key=lambda place: place[0]):
        volumes.append(volume)
        slices = list(slices)
        if [index for _, index, _ in slices] != list(range(len(slices))) or {n for *_, n in slices} != {len(slices)}:
            complaints.append(f"row {first}: the slices of its volume are not complete and in order; {remedy}")
        first += len(slices)
    return complaints, volumes, len(rows)


def _check_row(row: dict[str, Any], manifest: dict[str, Any]) -> Iterator[str]:
    for name, is_allowed in CHECKS.items():
        if not is_allowed(row[name]):
            yield f"{name} is not a value of that column"
    if row["source"] != manifest["collection"]:
        yield "source is not the manifest's collection"
    pictures = {}
    for name in ("image", "tissue"):
        data = row[name]["bytes"]
        if row[name]["path"] is not None:
            yield f"{name} holds a path"
        try:
            if unknown := set(png_chunks(data)) - PNG_CHUNKS:
                yield f"{name} holds {len(unknown)} kinds of PNG chunks beside pixels"
            pictures[name] = decode_png(data)
        except (ValueError, cv2.error, TypeError):
            pictures[name] = None
        if pictures[name] is None:
            yield f"{name} cannot be decoded"
            return
    image, tissue = pictures["image"], pictures["tissue"]
    if image.dtype != (np.uint8 if manifest["image_processor"]["bit_depth"] == 8 else np.uint16) or image.ndim != 2:
        yield f"image is {image.dtype} with {image.ndim} dimensions"
    if any(side > most for side, most in zip(image.shape, manifest["fit"], strict=False)):
        yield f"image of {image.shape[:2]} is larger than {manifest['fit']}"
    if tissue.shape != tuple(-(-side // TISSUE_CELL_PX) for side in image.shape) or tissue.dtype != np.uint8:
        yield f"tissue of {tissue.shape} does not fit image of {image.shape}"


def png_chunks(data: bytes) -> Iterator[bytes]:
    """Names of the chunks of a PNG. Raises ValueError where it is none, or has something behind its end."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("no PNG")
    at = 8
    while at < len(data):
        name = data[at + 4 : at + 8]
        yield name
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        if name == b"IEND" and at != len(data):
            raise ValueError("bytes behind the end")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dataset_scripts.verify", description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    try:
        complaints = verify_corpus(options.corpus, options.num_proc)
    except (OSError, ValueError) as error:
        raise SystemExit(f"verify: {error}") from error
    for complaint in complaints[:SHOWN]:
        print(complaint)
    if complaints:
        raise SystemExit(f"verify: {len(complaints)} faults in {options.corpus}")
    manifest = json.loads((options.corpus / MANIFEST).read_text())
    print(f"{options.corpus}: {manifest['rows']} images of {manifest['volumes']} volumes, as they were built")


if __name__ == "__main__":
    main()
