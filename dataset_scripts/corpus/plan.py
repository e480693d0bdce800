"""First half of a build: the archive is listed, every header is read, and the images are shared out to shards.

Copies of a SOP instance share a place; files that are slices of one volume become one. The plan depends on nothing
but the archive, so that every task, and every start after a stop, makes the same rows.

A build has two folders: `output`, the corpus, and `work` beside it, for its owner's eyes alone. `work` holds what names
the files of the archive, and so perhaps patients: the listing, the headers found, the plan, what was refused, the
engine's logs. A stopped build goes on from it. Elsewhere a file is known by its number.
"""

import json
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from modeling_mammodino.dicom import Instance, keyed_hash, open_dicom, open_if_dicom, read_instance, split_stacks
from modeling_mammodino.dicom_header import kind, text
from modeling_mammodino.image_io import IMAGE_SUFFIXES, InvalidImageError, suffix
from modeling_mammodino.image_processing_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools.command import HASH_KEY_VARIABLE
from modeling_mammodino.tools.engine import die_with_parent
from modeling_mammodino.tools.files import Lines, read_lines, write_json, write_lines

from .archive import ArchiveFile, opened
from .former_volumes import LATE, SHARD, FormerVolumes

MODALITIES = {"breast": ("MG",), "body": ("CT", "MR")}  # by the finder of the tissue
NO_MODALITY = "NONE"  # stands for an element that is missing
SELECTION = ("modalities", "min_mask_confidence")
CUTOUTS = ("CROPPED IMAGES", "ROI MASK IMAGES")
ODD_SHAPE = "another size than most slices of its series, as a scout has; leave it out"
ROWS_PER_SHARD = 1000  # some 200 MB
LEAST_ROWS_PER_SHARD = 16  # a small archive is shared out to all tasks, but not in crumbs


class Volume(NamedTuple):
    """A line of a shard's plan: one image, or the slices of one volume."""

    volume_id: str
    # one, or one a slice in their order; each with its copies, the likeliest first; numbers until files are put in
    places: list[list[Any]]
    num_slices: int
    slice_spacing_mm: float | None  # by the positions of such files
    is_known: bool = False  # the corpus that is extended holds one of this volume_id

    @classmethod
    def from_json(cls, fields: list[Any]) -> "Volume":
        volume_id, places, *others = fields
        return cls(volume_id, [[ArchiveFile(*file) for file in copies] for copies in places], *others)

    def with_files(self, listing: Lines) -> "Volume":
        """Put files in the place of their numbers."""
        return self._replace(places=[[listing[number] for number in copies] for copies in self.places])


@dataclass(frozen=True)
class Job:
    """One build of a corpus: what all its tasks know.

    Attributes:
        fit: (height, width) in pixels that images are fitted into, never enlarged.
        image_processor: settings of the MammoDinoImageProcessor.
        hash_key_file: holds the key of the hashes; else it is in $MAMMODINO_HASH_KEY. The key itself stands nowhere.
        bcs_dbt_paths: BCS-DBT's BCS-DBT-file-paths-*.csv, which correct wrong headers.
        metadata: CSV tables of files without a header (`metadata.FileMetadata`).
        modalities: of DICOM images that enter; see `why_foreign`.
        min_mask_confidence: of an image, of a volume's slices in the median, below which it is left out.
        rows_per_shard: of whole volumes, at which a shard is full; None: ROWS_PER_SHARD, less where tasks lacked work.
        tasks: in which the work is shared out; fixed for the life of a build.
        part: 0, the build itself, or the number of an extension; of what it makes, the other fields are the ranges.
    """

    output: str
    sources: tuple[str, ...]
    fit: tuple[int, int]
    image_processor: dict[str, Any]
    collection: str
    hash_key_file: str | None
    bcs_dbt_paths: tuple[str, ...]
    rows_per_shard: int | None
    tasks: int
    metadata: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ("MG",)
    min_mask_confidence: float = 0.0
    part: int = 0
    first_file: int = 0
    files: int = 0
    first_shard: int = 0

    @property
    def private(self) -> Path:
        return Path(f"{self.output}.private")

    @property
    def work(self) -> Path:
        """Of the part."""
        return self.private / f"extension-{self.part:03d}" if self.part else self.private

    @property
    def begun(self) -> Path:
        """Tells that the archive was listed, and by which settings."""
        return self.work / "job.json"

    @property
    def listing(self) -> Path:
        """Of all parts; the line of a file is its number."""
        return self.private / "files.jsonl"

    @property
    def plan(self) -> Path:
        """Written last: tells that the shards' own plans are there."""
        return self.work / "plan.json"

    @property
    def left_out(self) -> Path:
        """What the listing leaves out: lines of path, reason, and whether it is a folder that cannot be listed."""
        return self.work / "left_out.jsonl"

    def headers(self, task: int) -> Path:
        return self.work / "headers" / f"{task:05d}.jsonl"

    def shard(self, shard: int) -> Path:
        """A shard of an extension enters the corpus at the end, with all others."""
        return (self.work / "data" if self.part else Path(self.output)) / SHARD.format(shard)

    def shard_plan(self, shard: int) -> Path:
        return self.work / "plan" / f"{shard:05d}.jsonl"

    def shard_record(self, shard: int) -> Path:
        return self.work / "shards" / f"{shard:05d}.json"

    def own_files(self, first: int = 0, step: int = 1) -> Iterator[ArchiveFile]:
        """Yield every `step`-th file of the part, from its `first` on."""
        lines = islice(read_lines(self.listing, self.first_file + first, step), max(0, -((first - self.files) // step)))
        yield from (ArchiveFile(*each) for each in lines)

    @property
    def former(self) -> FormerVolumes:
        """What the parts before this one made."""
        return FormerVolumes(Path(self.output), self.first_shard)

    @property
    def hash_key(self) -> bytes:
        return read_hash_key(self.hash_key_file)

    def processor(self) -> MammoDinoImageProcessor:
        return MammoDinoImageProcessor(**self.image_processor)

    def settings(self) -> dict[str, Any]:
        """Return what shapes the rows. One corpus has one set of these."""
        kept = ("sources", "fit", "image_processor", "collection", "bcs_dbt_paths", "metadata", *SELECTION)
        settings = {name: value for name, value in asdict(self).items() if name in kept}
        settings["hash_key_check"] = keyed_hash("corpus", self.hash_key)  # tells two keys apart, reveals neither
        return json.loads(json.dumps(settings))


def read_hash_key(path: str | Path | None) -> bytes:
    """Return the key of the patient hashes, from a file or the environment; empty where there is none."""
    return Path(path).read_bytes().strip() if path else os.environ.get(HASH_KEY_VARIABLE, "").encode()


@dataclass
class ReadHeaders:
    """A task reads the headers of every n-th file: what it is, or why it is refused."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        die_with_parent()
        key = self.job.hash_key
        mine = self.job.own_files(rank, world_size)
        write_lines(self.job.headers(rank), (read_header(file, key, self.job.modalities) for file in mine))


def read_header(file: ArchiveFile, key: bytes, modalities: Sequence[str]) -> dict[str, Any]:
    """Return {"file"} of what is no image, {"file", "refused"}, or {"file", "size", "instance"}."""
    found: dict[str, Any] = {"file": file}
    try:
        size = file.size()
        with opened([file]) as (image,):
            if suffix(image) in IMAGE_SUFFIXES:
                own = keyed_hash(image.identity, key)
                return {**found, "size": size, "instance": Instance(own, own, 1, None, None)}
            dicom = open_dicom(image) if suffix(image) else open_if_dicom(image)
            if dicom is not None:
                instance = read_instance(dicom, key)
                if foreign := why_foreign(dicom.header, instance.num_slices, modalities):
                    return {**found, "refused": foreign}
                return {**found, "size": size, "instance": instance}
    except InvalidImageError as refusal:
        return {**found, "refused": refusal.reason}
    return found


def why_foreign(header: Any, frames: int, modalities: Sequence[str]) -> str | None:
    """Return why an image is none of the corpus', by SOP class, modality and what CBIS-DDSM calls its files; or None.

    With MG among the modalities a SOP class of mammography or tomosynthesis is enough, and so is, of CR and DX, the
    breast as the body part.
    """
    if text(header, "SeriesDescription") in CUTOUTS:
        return "a cropped image or a mask of a region, as CBIS-DDSM's; give whole images"
    modality = text(header, "Modality") or NO_MODALITY
    is_of_breast = kind(header, frames) != "unknown"
    is_of_breast |= modality in ("CR", "DX") and text(header, "BodyPartExamined") == "BREAST"
    if modality in modalities or "MG" in modalities and is_of_breast:
        return None
    named = modality if re.fullmatch("[A-Z]{2,4}", modality) else "another"  # a header may hold anything
    return f"Modality is {named}, not {' or '.join(modalities)}; leave it out, or give --modalities"


@dataclass
class MakePlan:
    """The one task that sees all headers."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        refused: list[tuple[int, str]] = []
        ignored: Counter[str] = Counter()
        found, known = np.fromiter(self._images(refused, ignored), IMAGE), self.job.former.places
        late = np.isin(found["volume_id"], np.array(list(known), "S32")) & (found["volume_id"] != found["sop_instance"])
        refused += [(number, LATE) for number in found["number"][late].tolist()]
        volumes, odd = join_volumes(found[~late], self.job.hash_key)
        refused += [(number, ODD_SHAPE) for number in odd]
        if known:
            volumes = [volume._replace(is_known=volume.volume_id in known) for volume in volumes]
        rows = sum(volume.num_slices for volume in volumes)
        shared_out = min(ROWS_PER_SHARD, max(LEAST_ROWS_PER_SHARD, -(-rows // self.job.tasks)))
        shards, first, listing = 0, self.job.first_shard, Lines(self.job.listing)
        for shard in into_shards(volumes, self.job.rows_per_shard or shared_out):
            write_lines(self.job.shard_plan(first + shards), (volume.with_files(listing) for volume in shard))
            shards += 1
        plan = {"shards": shards, "rows": rows, "refused": sorted(refused), "ignored": dict(ignored.most_common())}
        write_json(self.job.plan, plan)

    def _images(self, refused: list[tuple[int, str]], ignored: Counter[str]) -> Iterator[tuple[Any, ...]]:
        """Yield IMAGE of each image; the other files go to `refused` and `ignored`."""
        for task in range(self.job.tasks):
            for header in read_lines(self.job.headers(task)):
                file = ArchiveFile(*header["file"])
                if "instance" in header:
                    yield file.number, header["size"], *header["instance"]
                elif "refused" in header:
                    refused.append((file.number, sys.intern(header["refused"])))
                else:
                    ignored[PurePosixPath(file.path).suffix.lower() or "no suffix"] += 1


# An image whose header was read: number and size in bytes of its file, and the fields of Instance, NaN for None.
IMAGE = np.dtype(
    [
        *(("number", int), ("size", int), ("sop_instance", "S32"), ("volume_id", "S32"), ("num_slices", np.int32)),
        *(("slice_position_mm", float), ("instance_number", float), ("shape", "S24")),
    ]
)


class Found(NamedTuple):
    """IMAGE of one image."""

    number: int
    size: int
    instance: Instance

    @classmethod
    def from_row(cls, row: tuple[Any, ...]) -> "Found":
        number, size, own, volume_id, num_slices, position, instance_number, shape = row
        position, instance_number = (None if value != value else value for value in (position, instance_number))
        instance = Instance(own.decode(), volume_id.decode(), num_slices, position, instance_number, shape.decode())
        return cls(number, size, instance)


def join_volumes(found: np.ndarray, key: bytes) -> tuple[list[Volume], list[int]]:
    """Return volumes in the order of their first files, a file by its number; and the files of slices of another size
    than the rest of their series. found: (n,) of IMAGE.

    Files of one identity, a SOP instance or a path without one, share a place: which of them is whole, and whether they
    are copies at all, shows when they are rendered.
    """
    found = found[np.argsort(found["number"])]
    _, first, which = np.unique(found["volume_id"], return_index=True, return_inverse=True)
    order = np.argsort(first[which], kind="stable")
    ends = np.cumsum(np.bincount(which)[np.argsort(first)])
    volumes: list[Volume] = []
    odd: list[int] = []
    for start, end in pairwise([0, *ends.tolist()]):
        members = map(Found.from_row, found[order[start:end]].tolist())
        volumes += _volumes(list(members), key, odd)
    return volumes, odd


def _volumes(found: list[Found], key: bytes, odd: list[int]) -> Iterator[Volume]:
    """Yield what images of one volume_id are, several volumes where they are several stacks."""
    places: dict[tuple[Any, ...], list[Found]] = defaultdict(list)
    for each in found:
        places[_identity(each.instance)].append(each)
    members = [sorted(copies, key=lambda each: -each.size) for copies in places.values()]  # cut off, it is smaller
    shapes = Counter(copies[0].instance.shape for copies in members)
    usual = shapes.most_common(1)[0][0]  # a scout is one among many
    odd += [each.number for copies in members if copies[0].instance.shape != usual for each in copies]
    members = [copies for copies in members if copies[0].instance.shape == usual]
    volume_id = found[0].instance.volume_id
    for phase, stack in enumerate(split_stacks([copies[0].instance for copies in members])):
        own = volume_id if phase == 0 else keyed_hash(f"{volume_id} {phase}", key)
        yield _volume(own, [members[place] for place in stack])


def _identity(instance: Instance) -> tuple[Any, ...]:
    """Of a slice in its series, too: some anonymizers give all files one SOP instance."""
    return instance if instance.is_slice else (instance.sop_instance,)


def _volume(volume_id: str, ordered: list[list[Found]]) -> Volume:
    positions = [copies[0].instance.slice_position_mm for copies in ordered]
    known = [position for position in positions if position is not None]
    steps = [high - low for low, high in zip(known, known[1:], strict=False)] if len(known) == len(positions) else []
    num_slices = sum(copies[0].instance.num_slices for copies in ordered)
    spacing = statistics.median(steps) if steps else 0
    return Volume(volume_id, [[each.number for each in copies] for copies in ordered], num_slices, spacing or None)


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
