"""Is a corpus whole, and does it hold nothing but what a corpus may hold?

    python -m dataset_scripts.corpus.verify CORPUS

Every shard is read and every image decoded. What is wrong is said with its shard, row, field and remedy, and the exit
status is then 1. To make shard 00042 again, delete data-00042.arrow, and in CORPUS.private shards/00042.json,
engine/shards and engine/manifest (of an extension's shard, in the extension's folder there); then give the command of
the build, or of the extension, once more, with the same key.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import datasets
import numpy as np
import pyarrow as pa

from modeling_mammodino.breast_segmentation import LOW_CONFIDENCE
from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from modeling_mammodino.tools.model_files import check_image_processor, read_settings
from modeling_mammodino.tools.privacy import check_text, png_chunks

from .reader import FEATURES, INFO, MANIFEST, STATE, TISSUE_CELL_PX, decode_png

CARD = "README.md"
SHARD, SHA256 = re.compile(r"data-\d{5}\.arrow"), re.compile(r"[0-9a-f]{64}")
CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")  # left by `map` of datasets; no part, and never sent
HASH = re.compile(r"[0-9a-f]{32}")
KINDS = {"ffdm", "synthetic_2d", "dbt", "unknown"}
VIEWS = {"CC", "MLO", "ML", "LM", "LMO", "XCC", "XCCL", "XCCM", "FB", "SIO", "ISO", "AT"}
ANNOTATIONS = {"header", "picture"}
ROUNDING = 1e-6  # of mask_confidence, which the builder compares before it becomes float32
SHOWN = 50
REBUILD = "build the corpus again"
REMAKE = "make it again (python -m dataset_scripts.corpus.verify --help)"


def allows(is_allowed: Callable[[Any], Any], value: Any) -> bool:
    """Tell whether a check holds; of a value of another type altogether it does not."""
    try:
        return bool(is_allowed(value))
    except (TypeError, ValueError, KeyError, AttributeError):
        return False


def _is_hash(value: Any) -> bool:
    return HASH.fullmatch(value) is not None


def _is_hash_or_null(value: Any) -> bool:
    return value is None or _is_hash(value)


def _is_length_or_null(value: Any) -> bool:
    return value is None or 0 < value < math.inf


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_counts(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: all(of(name) and _is_count(count) for name, count in value.items())


def _is_shard_list(value: Any) -> bool:
    return all(
        shard.keys() == {"name", "rows", "sha256"}
        and SHARD.fullmatch(shard["name"])
        and _is_count(shard["rows"])
        and SHA256.fullmatch(shard["sha256"])
        for shard in value
    ) and len({shard["name"] for shard in value}) == len(value)


# What a value may be, by column; images have checks of their own.
COLUMN_CHECKS: dict[str, Callable[[Any], bool]] = {
    "volume_id": _is_hash,
    "slice_index": lambda value: value >= 0,
    "num_slices": lambda value: value > 0,
    "slice_spacing_mm": _is_length_or_null,
    "pixel_spacing_mm": _is_length_or_null,
    "kind": KINDS.__contains__,
    "laterality": {"L", "R", None}.__contains__,
    "view": {*VIEWS, None}.__contains__,
    "patient": _is_hash_or_null,
    "study": _is_hash_or_null,
    "source": _is_name,
    "mask_confidence": lambda value: 0 <= value <= 1,
    "burned_in_annotation": {*ANNOTATIONS, None}.__contains__,
}


# What a value may be, by field of the JSON files: all of these, and no other.
MANIFEST_CHECKS: dict[str, Callable[[Any], bool]] = {
    "complete": lambda value: value is True,
    "mammodino": lambda value: bool(re.fullmatch(r"[\w.+-]+", value)),
    "tissue_cell_px": lambda value: value == TISSUE_CELL_PX,
    "fit": lambda value: len(value) == 2 and all(type(side) is int and side > 0 for side in value),
    "image_processor": lambda value: "bit_depth" in value and not any(check_image_processor(value)),
    "collection": _is_name,
    "hash_key_check": _is_hash,
    **dict.fromkeys(("files_found", "files_read", "files_refused", "files_ignored", "rows", "volumes"), _is_count),
    "rows_by_kind": _are_counts(KINDS.__contains__),
    "modalities": lambda value: all(re.fullmatch("[A-Z]{2,4}", each) for each in value),
    "min_mask_confidence": lambda value: 0 <= value <= 1,
    "folders_unlisted": _is_count,
    "passed_over": _are_counts(_is_text),
    "doubtful_masks": _is_count,
    "burned_in_annotations": _are_counts(ANNOTATIONS.__contains__),
    "refused_by_reason": _are_counts(_is_text),
    "notes": _are_counts(_is_text),
    "shards": _is_shard_list,
}
LATER_FIELDS = {"modalities", "min_mask_confidence", "folders_unlisted", "passed_over"}  # not in the first corpora
STATE_CHECKS: dict[str, Callable[[Any], bool]] = {
    "_data_files": lambda value: all(each.keys() == {"filename"} for each in value),  # and see _check_folder
    "_fingerprint": _is_hash,
    "_format_kwargs": lambda value: value == {},
    "_output_all_columns": lambda value: value is False,
    **dict.fromkeys(("_format_columns", "_format_type", "_split"), lambda value: value is None),
}
INFO_CHECKS: dict[str, Callable[[Any], bool]] = {
    "features": lambda value: datasets.Features.from_dict(value) == FEATURES,
    **dict.fromkeys(("description", "citation", "homepage", "license"), lambda value: value == ""),
}


class ShardReport(NamedTuple):
    complaints: list[str]
    volumes: list[str]  # in their order
    counts: Counter[Any]  # of rows, by what the manifest counts


def verify_shard(shard: dict[str, Any], folder: Path, manifest: dict[str, Any]) -> ShardReport:
    """Check a shard against its line in the manifest and the settings there, a record batch at a time.

    What is found wrong is said without the value, which may be what should not be there.
    """
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
    if row["source"] != manifest["collection"] and not str(row["source"]).startswith(f"{manifest['collection']}-"):
        yield "source: not the manifest's collection"
    height, width = manifest["fit"]
    image, complaint = _image(row["image"], height, width)
    if image is None or complaint:
        yield f"image: {complaint}"
        return
    if image.dtype != (np.uint8 if manifest["image_processor"]["bit_depth"] == 8 else np.uint16) or image.ndim != 2:
        yield f"image: {image.dtype} of {image.ndim} dimensions, not as the settings say"
    cells = tuple(-(-side // TISSUE_CELL_PX) for side in image.shape[:2])
    tissue, complaint = _image(row["tissue"], *cells)
    if tissue is None or complaint:
        yield f"tissue: {complaint}"
    elif tissue.shape != cells or tissue.dtype != np.uint8:
        yield f"tissue: {tissue.dtype} of shape {tissue.shape}, where the image has {cells} cells"


def _image(stored: Any, height: int, width: int) -> tuple[np.ndarray | None, str]:
    """Return a PNG decoded, if it is one of pixels alone and no larger than that; else the complaint."""
    if not stored or stored["path"] is not None or not stored["bytes"]:
        return None, "a path, or no image"
    data = stored["bytes"]
    try:
        names = png_chunks(data)
    except ValueError:
        return None, "not a whole PNG, or more than one"
    if names[:1] != ["IHDR"] or set(names[1:]) != {"IDAT"}:
        return None, "PNG chunks beside pixels, such as text"
    found = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    if found[0] > height or found[1] > width:  # before it is decoded: a header can claim anything
        return None, f"{found[0]} x {found[1]}, larger than {height} x {width}"
    try:
        return decode_png(data), ""
    except (ValueError, cv2.error):
        return None, "cannot be decoded"


def verify_corpus(folder: str | Path, num_proc: int = 1) -> list[str]:
    """Return what is wrong with a corpus, a line each; empty where nothing is.

    Values of rows are not repeated in these lines. Raises FileNotFoundError without a manifest,
    ChildProcessError where a process was killed.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder}: no {MANIFEST}; go on with the build, python -m dataset_scripts.corpus; "
            "a labeled data set is verified by python -m dataset_scripts.benchmarks.verify NAME --data-dir DIR"
        )
    return list(_verify(folder, num_proc))


def _verify(folder: Path, num_proc: int) -> Iterator[str]:
    complaints = list(_check_document(folder / MANIFEST, MANIFEST_CHECKS))
    yield from complaints
    if complaints:
        return  # nothing can be compared with it
    manifest = read_settings((folder / MANIFEST).read_bytes())
    yield from _check_folder(folder, manifest)
    seen: set[str] = set()
    counts: Counter[Any] = Counter()
    copies = 0
    for shard, report in zip(manifest["shards"], _reports(folder, manifest, num_proc), strict=True):
        yield from (f"{shard['name']}, {complaint}" for complaint in report.complaints)
        copies += len(report.volumes) - len(set(report.volumes) - seen)
        seen.update(report.volumes)
        counts += report.counts
    if copies:
        yield f"{copies} volumes stand more than once; {REBUILD}"
    yield from (f"{MANIFEST}, {complaint}" for complaint in _check_totals(manifest, len(seen), counts))


def _check_document(path: Path, checks: dict[str, Callable[[Any], bool]]) -> Iterator[str]:
    """Check a JSON file of ours: all fields of `checks`, and no other."""
    try:
        content = read_settings(path.read_bytes())
    except (OSError, ValueError) as error:
        yield f"{path.name}: cannot be read ({type(error).__name__}); {REBUILD}"
        return
    if unknown := content.keys() - checks.keys():
        yield f"{path.name}: {len(unknown)} unknown fields beside {', '.join(checks)}; take them out"
    for name, is_allowed in checks.items():
        if name not in content and name in LATER_FIELDS:
            continue
        if name not in content or not allows(is_allowed, content[name]):
            yield f"{path.name}, {name}: missing, or not a value of that field; {REBUILD}"


def _check_folder(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    names = [shard["name"] for shard in manifest["shards"]]
    known = {MANIFEST, STATE, INFO, CARD, *names}
    for path in sorted(folder.iterdir()):
        if CACHE.fullmatch(path.name):
            continue
        if path.is_symlink():
            yield f"{path.name}: a link; put the file itself there, or remove it"
        elif path.name not in known or not path.is_file():
            yield f"{path.name}: no file of this corpus; remove it"
    yield from _check_document(folder / STATE, STATE_CHECKS)
    yield from _check_document(folder / INFO, INFO_CHECKS)
    for path in (folder / name for name in (MANIFEST, STATE, INFO, CARD)):
        if path.is_file():  # places, tokens and UIDs in what is text
            yield from (f"{path.name}: {complaint}" for complaint in check_text(path.read_text(errors="replace")))
    try:
        listed = [each["filename"] for each in json.loads((folder / STATE).read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return  # said above
    if listed != names:
        yield f"{STATE}, _data_files: not the manifest's shards; {REBUILD}"


def _check_totals(manifest: dict[str, Any], volumes: int, counts: Counter[Any]) -> Iterator[str]:
    by_kind = {kind: counts["kind", kind] for kind in KINDS if counts["kind", kind]}
    annotated = {name: counts["annotation", name] for name in ANNOTATIONS if counts["annotation", name]}
    found = {"rows": counts["rows"], "volumes": volumes, "rows_by_kind": by_kind, "burned_in_annotations": annotated}
    for name, value in found.items():
        if manifest[name] != value:
            yield f"{name}: {manifest[name]}, but there are {value}; {REBUILD}"
    if not counts["doubtful"] <= manifest["doubtful_masks"] <= counts["doubtful"] + counts["on the line"]:
        yield f"doubtful_masks: {manifest['doubtful_masks']}, but there are {counts['doubtful']}; {REBUILD}"
    if not counts["rows"]:
        yield "rows: none; refused.csv in the private folder of the build says why"
    if manifest["files_found"] != sum(manifest[f"files_{what}"] for what in ("read", "refused", "ignored")):
        yield f"files_found: not the sum of those read, refused and ignored; {REBUILD}"


def _reports(folder: Path, manifest: dict[str, Any], num_proc: int) -> Iterator[ShardReport]:
    verify = partial(verify_shard, folder=folder, manifest={**manifest, "shards": None})  # sent with each shard
    if num_proc <= 1:
        yield from map(verify, manifest["shards"])
        return
    # spawn: a fork of a process in which OpenCV has run threads can hang; one thread each, as they share the cores
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), cv2.setNumThreads, (1,)) as pool:
        try:
            yield from pool.map(verify, manifest["shards"])
        except BrokenProcessPool as error:
            raise ChildProcessError("a process died, often for lack of memory; give a smaller --num_proc") from error


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m dataset_scripts.corpus.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", type=user_path)
    parser.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    with command_line("verify"):
        complaints = verify_corpus(options.corpus, options.num_proc)
    print(listed(complaints), end="")
    if complaints:
        raise SystemExit(f"verify: {len(complaints)} faults in {options.corpus}")
    manifest = json.loads((options.corpus / MANIFEST).read_text())
    print(f"{options.corpus}: {manifest['rows']} images of {manifest['volumes']} volumes, as they were built")


def listed(complaints: list[str]) -> str:
    """Return the first of them, a line each."""
    more = [f"... and {len(complaints) - SHOWN} more"] if len(complaints) > SHOWN else []
    return "".join(f"{line}\n" for line in complaints[:SHOWN] + more)


if __name__ == "__main__":
    main()
