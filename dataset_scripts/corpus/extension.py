"""Files that came into an archive after its corpus was built: `--extend` makes them shards beside those that stand.

A corpus is built in parts: the build itself, and each extension. All parts share one listing, in which a file's line is
its number; a part has its own ranges of files and shards, and a folder of its own for headers, plan and records. The
shards of an extension enter the corpus when all are there, and then the manifest, which is made anew of all parts. A
file that was refused is tried again, for it may have been fetched again.

Rows are those that one build of all files would have made, but where that would change what stands: late slices of a
volume in the corpus are refused, and of different images under one UID the first in the corpus keeps its volume_id.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from modeling_mammodino.tools.engine import is_complete
from modeling_mammodino.tools.files import read_lines, write_json, write_lines

from .archive import ArchiveFile, Listing, is_address, list_archive
from .former_volumes import IN_CORPUS, LATE
from .plan import Job

logger = logging.getLogger(__name__)

OF_PART = ("tasks", "rows_per_shard", "first_file", "files", "first_shard")


def all_parts(job: Job) -> list[Job]:
    """Return the jobs of the parts that were begun, in their order, with what each began with."""
    parts: list[Job] = []
    # a build from before there were extensions does not say where it starts
    while (part := replace(job, part=len(parts), first_file=0, first_shard=0)).begun.exists():
        saved = json.loads(part.begun.read_text())
        parts.append(replace(part, **{name: saved[name] for name in OF_PART if name in saved}))
    return parts


def is_finished(part: Job) -> bool:
    return is_complete(part.work / "engine" / "manifest")


def begin(job: Job, settings: dict[str, Any], listing: Listing) -> Job:
    """Begin a part by the files of the listing, and return its job. Their numbers go on from the parts before."""
    parts = all_parts(job)
    first = parts[-1].first_file + parts[-1].files if parts else 0
    first_shard = parts[-1].first_shard + num_shards(parts[-1]) if parts else 0
    ranges: dict[str, Any] = {"first_file": first, "files": len(listing.files), "first_shard": first_shard}
    job = replace(job, part=len(parts), tasks=min(job.tasks, len(listing.files)), **ranges)
    job.work.mkdir(exist_ok=True)
    # lines behind those of the parts are of a part that was stopped before it began
    before = islice(read_lines(job.listing), first) if parts else ()
    numbered = (file._replace(number=number) for number, file in enumerate(listing.files, start=first))
    write_lines(job.listing, chain(before, numbered))
    left_out = [(path, reason, True) for path, reason in sorted(listing.unlisted.items())]
    left_out += [(path, reason, False) for path, reason in sorted(listing.passed_over.items())]
    write_lines(job.left_out, left_out)
    write_json(job.begun, {"settings": settings, **{name: getattr(job, name) for name in OF_PART}})
    return job


def new_files(job: Job, tried_again: bool = True) -> Listing:
    """Return the listing of the archive without the files that the parts have, but for those that they refused, where
    these are to be tried again."""
    parts, listing = all_parts(job), list_archive(job.sources)
    new, refused = {_place(file): file for file in listing.files}, refused_files(parts) if tried_again else {}
    for place in (_place(file) for part in parts for file in part.own_files()):
        if place not in refused:
            new.pop(place, None)
    return listing._replace(files=list(new.values()))


def num_shards(part: Job) -> int:
    return int(json.loads(part.plan.read_text())["shards"])


def records(parts: list[Job]) -> Iterator[dict[str, Any]]:
    """Yield what each shard of the parts holds, in the order of shards."""
    for part in parts:
        for shard in range(part.first_shard, part.first_shard + num_shards(part)):
            yield json.loads(part.shard_record(shard).read_text())


def refusals(parts: list[Job]) -> dict[int, str]:
    """Return all reasons, by the number of the file."""
    planned = [json.loads(part.plan.read_text()) for part in parts]
    return {number: reason for each in (*planned, *records(parts)) for number, reason in each["refused"]}


def refused_files(parts: list[Job]) -> dict[tuple[str, str], tuple[int, str, str]]:
    """Return number, path and reason of what was refused, and taken by no later part, by what tells files apart."""
    reasons = refusals(parts)
    found: dict[tuple[str, str], tuple[int, str, str]] = {}
    for file in (file for part in parts for file in part.own_files()):
        before, reason = found.pop(_place(file), None), reasons.get(file.number)
        if before and reason in (LATE, IN_CORPUS):
            reason = before[2]  # which says more
        if reason:
            found[_place(file)] = (file.number, file.path, reason)
    return found


def _place(file: ArchiveFile) -> tuple[str, str]:
    """Return what tells files apart, also where an extension names another folder above them than the build."""
    return (file.source if is_address(file.source) else "", file.path)
