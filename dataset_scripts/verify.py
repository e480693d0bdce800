"""Is a corpus whole, and does it hold nothing but what a corpus may hold? Is a labelled data set as published?

    python -m dataset_scripts.verify CORPUS
    python -m dataset_scripts.verify NAME --data-dir DIR

Every shard is read and every picture decoded. What is wrong is said with its shard, row, field and remedy, and the exit
status is then 1. To make shard 00042 again, delete data-00042.arrow, and in CORPUS.private shards/00042.json,
engine/shards and engine/manifest; then give the command of the build once more, with the same key.

NAME is a data set, such as cbis_ddsm: its counts are compared with the published ones, its files with its metadata.
"""

import argparse
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import datasets

from modeling_mammodino.published_files import check_image_processor, check_text, read_settings

from . import verify_benchmark
from .corpus_reader import FEATURES, MANIFEST, TISSUE_CELL_PX
from .verify_shard import ANNOTATIONS, KINDS, ShardReport, allows, is_hash, is_name, verify_shard

STATE, INFO, CARD = "state.json", "dataset_info.json", "README.md"
SHARD, SHA256 = re.compile(r"data-\d{5}\.arrow"), re.compile(r"[0-9a-f]{64}")
CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")  # left by `map` of datasets; no part, and never sent
SHOWN = 50
REBUILD = "build the corpus again"


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


# What a value may be, by field of the JSON files: all of these, and no other.
MANIFEST_CHECKS: dict[str, Callable[[Any], bool]] = {
    "complete": lambda value: value is True,
    "mammodino": re.compile(r"[\w.+-]+").fullmatch,
    "tissue_cell_px": lambda value: value == TISSUE_CELL_PX,
    "fit": lambda value: len(value) == 2 and all(type(side) is int and side > 0 for side in value),
    "image_processor": lambda value: "bit_depth" in value and not any(check_image_processor(value)),
    "collection": is_name,
    "hash_key_check": is_hash,
    **dict.fromkeys(("files_found", "files_read", "files_refused", "files_ignored", "rows", "volumes"), _is_count),
    "rows_by_kind": _are_counts(KINDS.__contains__),
    "doubtful_masks": _is_count,
    "burned_in_annotations": _are_counts(ANNOTATIONS.__contains__),
    "refused_by_reason": _are_counts(_is_text),
    "notes": _are_counts(_is_text),
    "shards": _is_shard_list,
}
STATE_CHECKS: dict[str, Callable[[Any], bool]] = {
    "_data_files": lambda value: all(each.keys() == {"filename"} for each in value),  # and see _check_folder
    "_fingerprint": is_hash,
    "_format_kwargs": lambda value: value == {},
    "_output_all_columns": lambda value: value is False,
    **dict.fromkeys(("_format_columns", "_format_type", "_split"), lambda value: value is None),
}
INFO_CHECKS: dict[str, Callable[[Any], bool]] = {
    "features": lambda value: datasets.Features.from_dict(value) == FEATURES,
    **dict.fromkeys(("description", "citation", "homepage", "license"), lambda value: value == ""),
}


def verify_corpus(folder: str | Path, num_proc: int = 1) -> list[str]:
    """What is wrong with a corpus, a line each; empty where nothing is.

    Values of rows are not repeated in these lines. Raises FileNotFoundError without a manifest,
    ChildProcessError where a process was killed.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder}: no {MANIFEST}; go on with the build, python -m dataset_scripts.corpus; "
            "or if this names a data set, give its --data-dir"
        )
    return list(_verify(folder, num_proc))


def _verify(folder: Path, num_proc: int) -> Iterator[str]:
    complaints = list(_check_document(folder / MANIFEST, MANIFEST_CHECKS))
    yield from complaints
    if complaints:
        return  # nothing can be compared with it
    manifest = read_settings((folder / MANIFEST).read_bytes())
    complaints = list(_check_folder(folder, manifest))
    yield from complaints
    is_whole = not complaints
    seen: set[str] = set()
    counts: Counter[Any] = Counter()
    copies = 0
    for shard, report in zip(manifest["shards"], _reports(folder, manifest, num_proc), strict=True):
        is_whole &= not report.complaints
        yield from (f"{shard['name']}, {complaint}" for complaint in report.complaints)
        copies += len(report.volumes) - len(set(report.volumes) - seen)
        seen.update(report.volumes)
        counts += report.counts
    if copies:
        yield f"{copies} volumes stand more than once; {REBUILD}"
    yield from (f"{MANIFEST}, {complaint}" for complaint in _check_totals(manifest, len(seen), counts))
    if is_whole and len(datasets.load_from_disk(str(folder))) != counts["rows"]:
        yield f"{STATE}: datasets.load_from_disk finds other rows than the shards hold; {REBUILD}"


def _check_document(path: Path, checks: dict[str, Callable[[Any], bool]]) -> Iterator[str]:
    """A JSON file of ours: all fields of `checks`, and no other."""
    try:
        content = read_settings(path.read_bytes())
    except (OSError, ValueError) as error:
        yield f"{path.name}: cannot be read ({type(error).__name__}); {REBUILD}"
        return
    if unknown := content.keys() - checks.keys():
        yield f"{path.name}: {len(unknown)} unknown fields beside {', '.join(checks)}; take them out"
    for name, is_allowed in checks.items():
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
    parser = argparse.ArgumentParser(
        prog="python -m dataset_scripts.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", type=Path, metavar="CORPUS|NAME")
    parser.add_argument("--data-dir", "--data_dir", type=Path, metavar="DIR", help="folder of the data set NAME")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    try:
        if options.data_dir is not None:
            return verify_benchmark.main(str(options.corpus), options.data_dir)
        complaints = verify_corpus(options.corpus, options.num_proc)
    except (OSError, ValueError) as error:
        raise SystemExit(f"verify: {error}") from error
    for complaint in complaints[:SHOWN]:
        print(complaint)
    if len(complaints) > SHOWN:
        print(f"... and {len(complaints) - SHOWN} more")
    if complaints:
        raise SystemExit(f"verify: {len(complaints)} faults in {options.corpus}")
    manifest = json.loads((options.corpus / MANIFEST).read_text())
    print(f"{options.corpus}: {manifest['rows']} images of {manifest['volumes']} volumes, as they were built")


if __name__ == "__main__":
    main()
