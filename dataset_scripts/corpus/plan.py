"""First half of a build: the header of every file is read, and the images are shared out to shards.

A second copy of a SOP instance is left out; files that are slices of one volume become one. The plan depends on nothing
but the archive, so that every task, and every start after a stop, makes the same rows.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from modeling_mammodino.dicom import Instance, keyed_hash, order_of_files, read_instance
from modeling_mammodino.image_io import IMAGE_SUFFIXES, InvalidImageError, suffix

from .archive import ArchiveFile
from .engine import Job, die_with_parent, read_lines, write_json, write_lines

LEAST_ROWS_PER_SHARD = 16  # a small archive is shared out to all tasks, but not in crumbs


class Volume(NamedTuple):
    """A line of a shard's plan: one image, or the slices of one volume."""

    volume_id: str
    files: list[ArchiveFile]  # more than one where each slice is a file
    num_slices: int
    slice_spacing_mm: float | None  # by the positions of such files

    @classmethod
    def from_json(cls, fields: list[Any]) -> "Volume":
        volume_id, files, *others = fields
        return cls(volume_id, [ArchiveFile(*file) for file in files], *others)


@dataclass
class ReadHeaders:
    """A task reads the headers of every n-th file: what it is, or why it is refused."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        die_with_parent()
        key = self.job.hash_key
        files = (ArchiveFile(*each) for each in read_lines(self.job.listing))
        mine = (file for file in files if file.number % world_size == rank)
        write_lines(self.job.headers(rank), (json.dumps(read_header(file, key)) for file in mine))


def read_header(file: ArchiveFile, key: bytes) -> dict[str, Any]:
    """{"file"} of what is no image, {"file", "refused"}, or {"file", "size", "instance"}."""
    found: dict[str, Any] = {"file": file}
    try:
        with file.open() as image:
            size = image.stream.seek(0, 2)
            image.stream.seek(0)
            if suffix(image) in IMAGE_SUFFIXES:
                own = keyed_hash(image.identity, key)
                return {**found, "size": size, "instance": Instance(own, own, 1, None, None)}
            if suffix(image) or image.stream.read(132)[128:] == b"DICM":  # by a suffix that is known
                return {**found, "size": size, "instance": read_instance(image, key)}
    except InvalidImageError as refusal:
        return {**found, "refused": refusal.reason}
    except OSError as error:
        return {**found, "refused": unreadable(error)}
    return found


def unreadable(error: OSError) -> str:
    """Without the path that the message of an OSError quotes."""
    return f"cannot be opened ({error.strerror or type(error).__name__}); check the file and its permissions"


@dataclass
class MakePlan:
    """The one task that sees all headers."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        found, refused, ignored = [], [], 0
        for task in range(self.job.tasks):
            for header in read_lines(self.job.headers(task)):
                file = ArchiveFile(*header["file"])
                if "instance" in header:
                    found.append((file, header["size"], Instance(*header["instance"])))
                elif "refused" in header:
                    refused.append((file.number, header["refused"]))
                else:
                    ignored += 1
        volumes, copies = join_volumes(found)
        refused += [(copy, f"the same SOP instance as file {first}; one is enough") for copy, first in copies]
        rows = sum(volume.num_slices for volume in volumes)
        rows_per_shard = min(self.job.rows_per_shard, max(LEAST_ROWS_PER_SHARD, -(-rows // self.job.tasks)))
        shards = list(into_shards(volumes, rows_per_shard))
        for number, shard in enumerate(shards):
            write_lines(self.job.shard_plan(number), map(json.dumps, shard))
        plan = {"shards": len(shards), "rows": rows, "refused": sorted(refused), "files_ignored": ignored}
        write_json(self.job.plan, plan)


def join_volumes(
    found: list[tuple[ArchiveFile, int, Instance]],
) -> tuple[list[Volume], list[tuple[int, int]]]:
    """Volumes in the order of their first files; and the copies left out, with the file that was taken."""
    taken: dict[str, tuple[ArchiveFile, int, Instance]] = {}
    copies: list[tuple[int, int]] = []
    for file, size, instance in sorted(found, key=lambda each: each[0].number):
        first = taken.setdefault(instance.sop_instance, (file, size, instance))
        if first[0] is file:
            continue
        if size > first[1]:  # a copy that was cut off is smaller
            taken[instance.sop_instance], file = (file, size, instance), first[0]
        copies.append((file.number, taken[instance.sop_instance][0].number))
    together: dict[str, list[tuple[ArchiveFile, Instance]]] = defaultdict(list)
    for file, _, instance in taken.values():
        together[instance.volume_id].append((file, instance))
    return [_volume(volume_id, members) for volume_id, members in together.items()], copies


def _volume(volume_id: str, members: list[tuple[ArchiveFile, Instance]]) -> Volume:
    instances = [instance for _, instance in members]
    ordered = [members[place] for place in order_of_files(instances)]
    positions = [instance.slice_position_mm for _, instance in ordered]
    known = [position for position in positions if position is not None]
    steps = [high - low for low, high in zip(known, known[1:], strict=False)] if len(known) == len(positions) else []
    spacing_mm = statistics.median(steps) if steps else None
    return Volume(volume_id, [file for file, _ in ordered], sum(each.num_slices for each in instances), spacing_mm)


def into_shards(volumes: Iterable[Volume], rows_per_shard: int) -> Iterator[list[Volume]]:
    """Whole volumes, until a shard has so many rows."""
    shard: list[Volume] = []
    rows = 0
    for volume in volumes:
        shard.append(volume)
        rows += volume.num_slices
        if rows >= rows_per_shard:
            yield shard
            shard, rows = [], 0
    if shard:
        yield shard
