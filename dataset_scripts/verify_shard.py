"""One shard of a corpus, row by row and picture by picture: is it what the builder writes, and nothing beside?

What is found wrong is said without the value, which may be what should not be there.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from modeling_mammodino.tissue import LOW_CONFIDENCE

from .corpus_reader import FEATURES, TISSUE_CELL_PX, decode_png

HASH = re.compile(r"[0-9a-f]{32}")
KINDS = {"ffdm", "synthetic_2d", "dbt", "unknown"}
VIEWS = {"CC", "MLO", "ML", "LM", "LMO", "XCC", "XCCL", "XCCM", "FB", "SIO", "ISO", "AT"}
ANNOTATIONS = {"header", "picture"}
ROUNDING = 1e-6  # of mask_confidence, which the builder compares before it becomes float32
REMAKE = "make it again (python -m dataset_scripts.verify --help)"


def is_hash(value: Any) -> bool:
    return HASH.fullmatch(value) is not None


def _is_hash_or_null(value: Any) -> bool:
    return value is None or is_hash(value)


def _is_length_or_null(value: Any) -> bool:
    return value is None or 0 < value < math.inf


def is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def allows(is_allowed: Callable[[Any], Any], value: Any) -> bool:
    try:
        return bool(is_allowed(value))
    except (TypeError, ValueError, KeyError, AttributeError):  # of another type altogether
        return False


# What a value may be, by column; pictures have checks of their own.
COLUMN_CHECKS: dict[str, Callable[[Any], bool]] = {
    "volume_id": is_hash,
    "slice_index": lambda value: value >= 0,
    "num_slices": lambda value: value > 0,
    "slice_spacing_mm": _is_length_or_null,
    "pixel_spacing_mm": _is_length_or_null,
    "kind": KINDS.__contains__,
    "laterality": {"L", "R", None}.__contains__,
    "view": {*VIEWS, None}.__contains__,
    "patient": _is_hash_or_null,
    "study": _is_hash_or_null,
    "source": is_name,
    "mask_confidence": lambda value: 0 <= value <= 1,
    "burned_in_annotation": {*ANNOTATIONS, None}.__contains__,
}


class ShardReport(NamedTuple):
    complaints: list[str]
    volumes: list[str]  # in their order
    counts: Counter[Any]  # of rows, by what the manifest counts


def verify_shard(shard: dict[str, Any], folder: Path, manifest: dict[str, Any]) -> ShardReport:
    """A shard, held against its line in the manifest and the settings there. Rows are read a record batch at a time."""
    report = ShardReport([], [], Counter())
    path = folder / shard["name"]
    try:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != shard["sha256"]:
                report.complaints.append(f"sha256: not what was written; {REMAKE}")
                return report
        report.complaints.extend(_check_shard(path, shard, manifest, report))
    except (OSError, pa.ArrowException) as error:
        report.complaints.append(f"cannot be read ({type(error).__name__}); {REMAKE}")
    return report


def _check_shard(path: Path, shard: dict[str, Any], manifest: dict[str, Any], report: ShardReport) -> Iterator[str]:
    places: list[tuple[str, int, int]] = []
    with pa.memory_map(str(path)) as stream, pa.ipc.open_stream(stream) as batches:
        # metadata too: beside the columns they could hold anything
        if not batches.schema.equals(FEATURES.arrow_schema, check_metadata=True):
            ours = {field.name: field.type for field in FEATURES.arrow_schema}
            theirs = {field.name: field.type for field in batches.schema}
            missing = [name for name in ours if theirs.get(name) != ours[name]]
            yield (
                f"schema: {len(theirs.keys() - ours.keys())} columns too many, missing or of another type: "
                f"{', '.join(missing) or 'none'}; metadata, types or order are not a corpus'; {REMAKE}"
            )
            return
        while True:
            try:
                batch, metadata = batches.read_next_batch_with_custom_metadata()
            except StopIteration:
                break
            if metadata:
                yield f"row {len(places)}: metadata of a record batch; {REMAKE}"
            for row in batch.to_pylist():
                yield from (f"row {len(places)}, {complaint}; {REMAKE}" for complaint in _check_row(row, manifest))
                places.append((row["volume_id"], row["slice_index"], row["num_slices"]))
                _count(row, report.counts)
        if stream.tell() != stream.size():
            yield f"{stream.size() - stream.tell()} bytes behind its last row; {REMAKE}"
    if len(places) != shard["rows"]:
        yield f"{len(places)} rows, where the manifest says {shard['rows']}; {REMAKE}"
    first = 0
    for volume, members in groupby(places, key=lambda place: place[0]):
        slices = [(index, count) for _, index, count in members]
        report.volumes.append(volume)
        if slices != [(index, len(slices)) for index in range(len(slices))]:
            yield f"row {first}, slice_index: the slices of its volume are not complete and in order; {REMAKE}"
        first += len(slices)


def _count(row: dict[str, Any], counts: Counter[Any]) -> None:
    counts["rows"] += 1
    counts["kind", row["kind"]] += 1
    counts["annotation", row["burned_in_annotation"]] += 1
    if row["mask_confidence"] is not None and row["mask_confidence"] < LOW_CONFIDENCE + ROUNDING:
        counts["on the line" if row["mask_confidence"] > LOW_CONFIDENCE - ROUNDING else "doubtful"] += 1


def _check_row(row: dict[str, Any], manifest: dict[str, Any]) -> Iterator[str]:
    for name, is_allowed in COLUMN_CHECKS.items():
        if not allows(is_allowed, row[name]):
            yield f"{name}: not a value of that column"
    if row["source"] != manifest["collection"]:
        yield "source: not the manifest's collection"
    height, width = manifest["fit"]
    image, complaint = _picture(row["image"], height, width)
    if image is None or complaint:
        yield f"image: {complaint}"
        return
    if image.dtype != (np.uint8 if manifest["image_processor"]["bit_depth"] == 8 else np.uint16) or image.ndim != 2:
        yield f"image: {image.dtype} of {image.ndim} dimensions, not as the settings say"
    cells = tuple(-(-side // TISSUE_CELL_PX) for side in image.shape[:2])
    tissue, complaint = _picture(row["tissue"], *cells)
    if tissue is None or complaint:
        yield f"tissue: {complaint}"
    elif tissue.shape != cells or tissue.dtype != np.uint8:
        yield f"tissue: {tissue.dtype} of shape {tissue.shape}, where the image has {cells} cells"


def _picture(stored: Any, height: int, width: int) -> tuple[np.ndarray | None, str]:
    """A PNG decoded, if it is one of pixels alone and no larger than that; else the complaint."""
    if not stored or stored["path"] is not None or not stored["bytes"]:
        return None, "a path, or no picture"
    data = stored["bytes"]
    try:
        (first, size), *middle, last = png_chunks(data)
    except ValueError:
        return None, "not a whole PNG, or more than one"
    if (first, size) != (b"IHDR", 13) or {name for name, _ in middle} != {b"IDAT"} or last != (b"IEND", 0):
        return None, "PNG chunks beside pixels, such as text"
    found = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    if found[0] > height or found[1] > width:  # before it is decoded: a header can claim anything
        return None, f"{found[0]} x {found[1]}, larger than {height} x {width}"
    try:
        pixels = decode_png(data)
    except cv2.error:
        pixels = None
    return (None, "cannot be decoded") if pixels is None else (pixels, "")


def png_chunks(data: bytes) -> list[tuple[bytes, int]]:
    """Names and sizes of a PNG's chunks. Raises ValueError where it is none, cut off, or goes on behind its end."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("no PNG")
    chunks, at = [], 8
    while at < len(data):
        chunks.append((data[at + 4 : at + 8], int.from_bytes(data[at : at + 4], "big")))
        at += 12 + chunks[-1][1]
        if chunks[-1][0] == b"IEND":
            break
    if at != len(data) or len(chunks) < 2:
        raise ValueError("cut off, or bytes behind its end")
    return chunks
