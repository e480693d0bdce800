"""Second half of a build: images, shard by shard. A shard is written atomically."""

import hashlib
import logging
import re
import statistics
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
from datasets.arrow_writer import ArrowWriter

from modeling_mammodino.breast_segmentation import LOW_CONFIDENCE
from modeling_mammodino.dicom import keyed_hash
from modeling_mammodino.image_io import InvalidImageError
from modeling_mammodino.tools.engine import die_with_parent
from modeling_mammodino.tools.files import atomic_file, read_lines, write_json

from .archive import ArchiveFile, opened, unreadable
from .bcs_dbt_volumes import BcsDbtViews
from .former_volumes import IN_CORPUS, LATE, digest_of
from .metadata import FileMetadata
from .plan import Job, Volume
from .reader import FEATURES, make_row

logger = logging.getLogger("modeling_mammodino.corpus")  # below that of the reader, whose notes are kept

COPY = "a copy of file {}; one is enough"
ROWS_A_WRITE = 16  # held in memory; a volume is held whole besides


@dataclass
class RenderShards:
    """A task makes every n-th shard, but for those that are there."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        cv2.setNumThreads(1)  # the tasks share the cores
        die_with_parent()
        first, shards = self.job.first_shard, len(list((self.job.work / "plan").glob("*.jsonl")))
        for shard in range(first + rank, first + shards, world_size):
            if not self.job.shard_record(shard).exists():
                with Notes(self.job.work / "notes" / f"{shard:05d}.log") as notes:
                    render_shard(self.job, shard, notes.counts)


class Notes(logging.Handler):
    """What the reader guesses and warns of, file by file into a private log, and by kind as a count.

    Takes the place of the console in a task: a million files may have as many notes.
    """

    def __init__(self, path: Path):
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a")

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._stream.write(message + "\n")
        if record.exc_info:
            self._stream.writelines(traceback.format_exception(record.exc_info[1]))
        name = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        self.counts[re.sub(r"\d[\d.]*", "#", message.removeprefix(f"{name}: "))] += 1

    def __enter__(self) -> "Notes":
        package = logging.getLogger("modeling_mammodino")
        self._before = package.handlers[:], package.propagate
        package.handlers[:], package.propagate = [self], False
        return self

    def __exit__(self, *_: object) -> None:
        package = logging.getLogger("modeling_mammodino")
        package.handlers[:], package.propagate = self._before
        self._stream.close()


@dataclass
class Record:
    """What a shard holds, and what was left out of it."""

    name: str | None = None  # None where nothing could be read
    rows: int = 0
    volumes: int = 0
    sha256: str | None = None
    refused: list[tuple[int, str]] = field(default_factory=list)  # number of the file, reason
    kinds: dict[str, int] = field(default_factory=Counter)
    doubtful_masks: int = 0
    burned_in_annotations: dict[str, int] = field(default_factory=Counter)
    notes: dict[str, int] = field(default_factory=dict)

    def count(self, rows: list[dict[str, Any]]) -> None:
        self.rows += len(rows)
        self.volumes += 1
        for row in rows:
            self.kinds[row["kind"]] += 1
            self.doubtful_masks += row["mask_confidence"] < LOW_CONFIDENCE
            if row["burned_in_annotation"]:
                self.burned_in_annotations[row["burned_in_annotation"]] += 1


def render_shard(job: Job, shard: int, noted: Counter[str]) -> None:
    """Write the shard, and then its record, which counts it."""
    read, record = VolumeReader(job), Record()
    path = job.shard(shard)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a task that was killed: room, where it is scarce
        leftover.unlink(missing_ok=True)
    with atomic_file(path) as temporary:
        with ArrowWriter(path=str(temporary), features=FEATURES, writer_batch_size=ROWS_A_WRITE) as writer:
            for volume in map(Volume.from_json, read_lines(job.shard_plan(shard))):
                for rows in read.images(volume, record.refused):
                    record.count(rows)
                    for row in rows:
                        writer.write(row)
            writer.finalize()
        with temporary.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if record.rows:
        record.name, record.sha256 = path.name, sha256
    else:
        path.unlink()
    if read.views:
        record.notes = {f"BCS-DBT: {name}": count for name, count in read.views.counts.items()}
    if read.metadata:
        record.notes |= {f"metadata: {name}": count for name, count in read.metadata.counts.items()}
    record.notes |= noted
    write_json(job.shard_record(shard), vars(record))


class VolumeReader:
    """Rows of a volume, by the settings of a job."""

    def __init__(self, job: Job):
        self.job, self.hash_key, self.image_processor = job, job.hash_key, job.processor()
        self.former = job.former
        self.views = BcsDbtViews.from_csv(job.bcs_dbt_paths) if job.bcs_dbt_paths else None
        self.metadata = FileMetadata(job.metadata, self.hash_key) if job.metadata else None

    def images(self, volume: Volume, refused: list[tuple[int, str]]) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of a volume, and of each other image that goes by its name; add to `refused` what does not
        enter, and why. A volume enters whole or not at all."""
        if len(volume.places) > 1:
            if volume.is_known:
                refused += [(file.number, LATE) for copies in volume.places for file in copies]
                return
            yield from self._series(volume, refused)
            return
        made: dict[str, int] = {}  # digest of an image: number of its file
        copies = volume.places[0]
        for file in copies:
            try:
                rows = self._rows([file], volume)
            except InvalidImageError as refusal:
                refused.append((file.number, refusal.reason))
                continue
            digest = digest_of(rows)  # of a lossless copy in another syntax, too
            if digest in made:
                refused.append((file.number, COPY.format(made[digest])))
                continue
            own = keyed_hash(f"{volume.volume_id} {digest}", self.hash_key)
            if volume.is_known and (own in self.former.places or digest == self.former.digest(volume.volume_id)):
                refused.append((file.number, IN_CORPUS))
                continue
            if made or volume.is_known:  # an anonymizer gave one UID to many, or two sources have one relative path
                rows = [row | {"volume_id": own} for row in rows]
            made[digest] = file.number
            yield rows

    def _series(self, volume: Volume, refused: list[tuple[int, str]]) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of a file-a-slice volume; where a file is damaged, its next copy takes its place."""
        places, unusable = [list(copies) for copies in volume.places], []
        while True:
            chosen = [copies[0] for copies in places]
            try:
                rows = self._rows(chosen, volume)
            except InvalidImageError as refusal:
                copies = next((copies for copies in places if copies[0].name == refusal.name), [])
                if len(copies) > 1:
                    unusable.append((copies.pop(0).number, refusal.reason))
                    continue
                refused += unusable + [(file.number, refusal.reason) for copies in places for file in copies]
                return
            refused += unusable
            refused += [(file.number, COPY.format(copies[0].number)) for copies in places for file in copies[1:]]
            yield rows
            return

    def _rows(self, files: list[ArchiveFile], volume: Volume) -> list[dict[str, Any]]:
        """Render a volume. Raises InvalidImageError where a file of it cannot be used, whatever that file provokes."""
        try:
            rows = self._render(files, volume)
        except (InvalidImageError, MemoryError):
            raise
        except OSError as error:
            raise InvalidImageError(files[0].name, unreadable(error)) from error
        except Exception as error:
            logger.exception("%s: cannot be rendered", files[0].name)
            reason = f"cannot be rendered ({type(error).__name__}); leave it out, and report it with the notes"
            raise InvalidImageError(files[0].name, reason) from error
        if statistics.median(row["mask_confidence"] for row in rows) < self.job.min_mask_confidence:
            reason = (
                f"mask confidence below {self.job.min_mask_confidence:g}; lower --min_mask_confidence, or leave it out"
            )
            raise InvalidImageError("the volume", reason)
        return rows

    def _render(self, files: list[ArchiveFile], volume: Volume) -> list[dict[str, Any]]:
        with opened(files) as images:
            source = images if len(images) > 1 else images[0]
            correct = self.views.correction(source) if self.views else None
            slices = self.image_processor.render_source(
                source, self.job.fit, upscale=False, hash_key=self.hash_key, correct=correct
            )
            rows = [make_row(mammogram, rendered, self.job.collection) for mammogram, rendered in slices]
        annotation = next((row["burned_in_annotation"] for row in rows if row["burned_in_annotation"]), None)
        for row in rows:
            row["volume_id"], row["burned_in_annotation"] = volume.volume_id, annotation
            row["slice_spacing_mm"] = volume.slice_spacing_mm or row["slice_spacing_mm"]
        if self.metadata:
            known = self.metadata.of(files[0].path)
            if "source" in known:
                known["source"] = f"{self.job.collection}-{known['source']}"  # a part of the collection
            rows = [row | known for row in rows]
        return rows
