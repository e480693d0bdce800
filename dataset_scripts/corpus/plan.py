"""First half of a build: the archive is listed, every header is read, and the images are shared out to shards.

A second copy of a SOP instance is left out; files that are slices of one volume become one. The plan depends on nothing
but the archive, so that every task, and every start after a stop, makes the same rows.

A build has two folders: `output`, the corpus, and `work` beside it, for its owner's eyes alone. `work` holds what names
the files of the archive, and so perhaps patients: the listing, the headers found, the plan, what was refused, the
engine's logs. A stopped build goes on from it. Elsewhere a file is known by its number.
"""

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fsspec.core import url_to_fs

from modeling_mammodino.dicom import Instance, keyed_hash, order_of_files, read_instance
from modeling_mammodino.image_io import DICOM_SUFFIXES, IMAGE_SUFFIXES, ImageFile, InvalidImageError, suffix
from modeling_mammodino.image_processing_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools.files import atomic_file, write_json

from .engine import die_with_parent

HASH_KEY_VARIABLE = "MAMMODINO_HASH_KEY"
LEAST_ROWS_PER_SHARD = 16  # a small archive is shared out to all tasks, but not in crumbs


class ArchiveFile(NamedTuple):
    """A file of an archive; as a list, a line of the private listing."""

    number: int  # its place in the listing
    source: str  # address of the archive
    path: str  # in the file system of that address
    relative: str  # to the archive's root, with slashes

    @property
    def name(self) -> str:
        """What may be logged."""
        suffix = PurePosixPath(self.path).suffix.lower()
        return f"file {self.number}{suffix if suffix in (*DICOM_SUFFIXES, *IMAGE_SUFFIXES) else ''}"

    @contextmanager
    def open(self) -> Iterator[ImageFile]:
        filesystem, _ = url_to_fs(self.source)
        with filesystem.open(self.path, "rb") as stream:
            yield ImageFile(stream, self.name, identity=self.relative)


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


@dataclass(frozen=True)
class Job:
    """One build of a corpus: what all its tasks know.

    Attributes:
        fit: (height, width) in pixels that images are fitted into, never enlarged.
        image_processor: settings of the MammoDinoImageProcessor.
        hash_key_file: holds the key of the hashes; else it is in $MAMMODINO_HASH_KEY. The key itself stands nowhere.
        bcs_dbt_paths: BCS-DBT's BCS-DBT-file-paths-*.csv, which correct wrong headers.
        metadata: CSV tables of files without a header (`metadata.FileMetadata`).
        tasks: in which the work is shared out; fixed for the life of a build.
    """

    output: str
    sources: tuple[str, ...]
    fit: tuple[int, int]
    image_processor: dict[str, Any]
    collection: str
    hash_key_file: str | None
    bcs_dbt_paths: tuple[str, ...]
    rows_per_shard: int
    tasks: int
    metadata: tuple[str, ...] = ()

    @property
    def work(self) -> Path:
        return Path(f"{self.output}.private")

    @property
    def listing(self) -> Path:
        return self.work / "files.jsonl"

    @property
    def plan(self) -> Path:
        """Written last: tells that the shards' own plans are there."""
        return self.work / "plan.json"

    def headers(self, task: int) -> Path:
        return self.work / "headers" / f"{task:05d}.jsonl"

    def shard_plan(self, shard: int) -> Path:
        return self.work / "plan" / f"{shard:05d}.jsonl"

    def shard_record(self, shard: int) -> Path:
        return self.work / "shards" / f"{shard:05d}.json"

    @property
    def hash_key(self) -> bytes:
        return read_hash_key(self.hash_key_file)

    def processor(self) -> MammoDinoImageProcessor:
        return MammoDinoImageProcessor(**self.image_processor)

    def settings(self) -> dict[str, Any]:
        """Return what shapes the rows. One corpus has one set of these."""
        kept = ("sources", "fit", "image_processor", "collection", "bcs_dbt_paths", "metadata")
        settings = {name: value for name, value in asdict(self).items() if name in kept}
        settings["hash_key_check"] = keyed_hash("corpus", self.hash_key)  # tells two keys apart, reveals neither
        return json.loads(json.dumps(settings))


def read_hash_key(path: str | Path | None) -> bytes:
    """Return the key of the patient hashes, from a file or the environment; empty where there is none."""
    return Path(path).read_bytes().strip() if path else os.environ.get(HASH_KEY_VARIABLE, "").encode()


def read_lines(path: Path) -> Iterator[Any]:
    """Yield the values of a JSON lines file."""
    with path.open() as stream:
        yield from map(json.loads, stream)


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON lines file, atomically."""
    with atomic_file(path) as temporary, temporary.open("w") as stream:
        stream.writelines(json.dumps(value) + "\n" for value in values)


def list_archive(sources: Sequence[str]) -> list[ArchiveFile]:
    """List every file of the addresses, sorted; linked folders are not entered.

    Credentials come from fsspec's configuration and environment. Raises OSError where something cannot be listed.
    """
    found: set[tuple[str, str, str]] = set()
    for source in sources:
        filesystem, root = url_to_fs(source)
        if filesystem.isfile(root):
            found.add((source, root, PurePosixPath(root).name))
            continue
        if not filesystem.isdir(root):
            raise FileNotFoundError(f"{source}: no such file or folder")
        start = len(root.rstrip("/")) + 1 if root else 0
        for _, _, files in filesystem.walk(root, detail=True, on_error="raise"):
            for about in files.values():
                path = about["name"]
                if not (about.get("islink") and Path(path).is_dir()):  # a link to a folder is listed as a file
                    found.add((source, path, path[start:]))
    return [ArchiveFile(number, *each) for number, each in enumerate(sorted(found))]


@dataclass
class ReadHeaders:
    """A task reads the headers of every n-th file: what it is, or why it is refused."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        die_with_parent()
        key = self.job.hash_key
        files = (ArchiveFile(*each) for each in read_lines(self.job.listing))
        mine = (file for file in files if file.number % world_size == rank)
        write_lines(self.job.headers(rank), (read_header(file, key) for file in mine))


def read_header(file: ArchiveFile, key: bytes) -> dict[str, Any]:
    """Return {"file"} of what is no image, {"file", "refused"}, or {"file", "size", "instance"}."""
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
    """Return the reason without the path that the message of an OSError quotes."""
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
            write_lines(self.job.shard_plan(number), shard)
        plan = {"shards": len(shards), "rows": rows, "refused": sorted(refused), "files_ignored": ignored}
        write_json(self.job.plan, plan)


def join_volumes(
    found: list[tuple[ArchiveFile, int, Instance]],
) -> tuple[list[Volume], list[tuple[int, int]]]:
    """Return volumes in the order of their first files; and the copies left out, with the file that was taken."""
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
    ordered = [members[place] for place in order_of_files([instance for _, instance in members])]
    positions = [instance.slice_position_mm for _, instance in ordered]
    known = [position for position in positions if position is not None]
    steps = [high - low for low, high in zip(known, known[1:], strict=False)] if len(known) == len(positions) else []
    num_slices = sum(instance.num_slices for _, instance in members)
    return Volume(volume_id, [file for file, _ in ordered], num_slices, statistics.median(steps) if steps else None)


def into_shards(volumes: Iterable[Volume], rows_per_shard: int) -> Iterator[list[Volume]]:
    """Yield whole volumes, until a shard has so many rows."""
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
