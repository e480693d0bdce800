"""Second half of a build: images, shard by shard. A shard is written atomically."""

import hashlib
import logging
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
from datasets.arrow_writer import ArrowWriter

from modeling_mammodino.breast_segmentation import LOW_CONFIDENCE
from modeling_mammodino.image_io import InvalidImageError
from modeling_mammodino.tools.files import atomic_file, write_json

from .bcs_dbt_volumes import BcsDbtViews
from .engine import die_with_parent
from .metadata import FileMetadata
from .plan import Job, Volume, read_lines, unreadable
from .reader import FEATURES, make_row

ROWS_A_WRITE = 16  # held in memory; a volume is held whole besides
SHARD = "data-{:05d}.arrow"


@dataclass
class RenderShards:
    """A task makes every n-th shard, but for those that are there."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        cv2.setNumThreads(1)  # the tasks share the cores
        die_with_parent()
        shards = len(list((self.job.work / "plan").glob("*.jsonl")))
        for shard in range(rank, shards, world_size):
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
    path = Path(job.output) / SHARD.format(shard)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a task that was killed: room, where it is scarce
        leftover.unlink(missing_ok=True)
    with atomic_file(path) as temporary:
        with ArrowWriter(path=str(temporary), features=FEATURES, writer_batch_size=ROWS_A_WRITE) as writer:
            for volume in map(Volume.from_json, read_lines(job.shard_plan(shard))):
                try:
                    rows = read.rows(volume)  # a volume enters whole or not at all
                except (InvalidImageError, OSError) as error:
                    reason = error.reason if isinstance(error, InvalidImageError) else unreadable(error)
                    record.refused += [(file.number, reason) for file in volume.files]
                    continue
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
        self.views = BcsDbtViews.from_csv(job.bcs_dbt_paths) if job.bcs_dbt_paths else None
        self.metadata = FileMetadata(job.metadata, self.hash_key) if job.metadata else None

    def rows(self, volume: Volume) -> list[dict[str, Any]]:
        """Render a volume. Raises InvalidImageError or OSError where a file of it cannot be used."""
        with ExitStack() as opened:
            files = [opened.enter_context(file.open()) for file in volume.files]
            source = files if len(files) > 1 else files[0]
            correct = self.views.correction(source) if self.views else None
            slices = self.image_processor.render_source(
                source, self.job.fit, upscale=False, hash_key=self.hash_key, correct=correct
            )
            rows = [make_row(mammogram, rendered, self.job.collection) for mammogram, rendered in slices]
        annotation = next((row["burned_in_annotation"] for row in rows if row["burned_in_annotation"]), None)
        for row in rows:
            row["volume_id"], row["burned_in_annotation"] = volume.volume_id, annotation
            row["slice_spacing_mm"] = row["slice_spacing_mm"] or volume.slice_spacing_mm
        if self.metadata:
            known = self.metadata.of(volume.files[0].path)
            if "source" in known:
                known["source"] = f"{self.job.collection}-{known['source']}"  # a part of the collection
            rows = [row | known for row in rows]
        return rows
