"""Second half of a build: images, shard by shard. A shard is whole or absent."""

import hashlib
import os
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
from datasets.arrow_writer import ArrowWriter

from modeling_mammodino.breast_segmentation import LOW_CONFIDENCE
from modeling_mammodino.image_io import InvalidImageError

from .bcs_dbt_volumes import BcsDbtViews
from .engine import Job, Notes, die_with_parent, read_lines, write_json
from .plan import Volume, unreadable
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


def render_shard(job: Job, shard: int, noted: Counter[str]) -> None:
    """Writes the shard under a temporary name and renames it; its record follows, and counts it."""
    read = VolumeReader(job)
    record = Record()
    path = Path(job.output) / SHARD.format(shard)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a task that was killed: room, where it is scarce
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with ArrowWriter(path=str(temporary), features=FEATURES, writer_batch_size=ROWS_A_WRITE) as writer:
            for line in read_lines(job.shard_plan(shard)):
                volume = Volume.from_json(line)
                try:
                    rows = read.rows(volume)  # a volume enters whole or not at all
                except InvalidImageError as refusal:
                    record.refuse(volume, refusal.reason)
                except OSError as error:
                    record.refuse(volume, unreadable(error))
                else:
                    record.count(rows)
                    for row in rows:
                        writer.write(row)
            if record.rows:
                writer.finalize()
        if record.rows:
            with temporary.open("rb") as stream:
                record.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            os.replace(temporary, path)
            record.name = path.name
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    if read.views:
        record.notes = {f"BCS-DBT: {name}": count for name, count in read.views.counts.items()}
    record.notes |= noted
    write_json(job.shard_record(shard), vars(record))


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

    def refuse(self, volume: Volume, reason: str) -> None:
        self.refused += [(file.number, reason) for file in volume.files]


class VolumeReader:
    """Rows of a volume, by the settings of a job."""

    def __init__(self, job: Job):
        self.job, self.hash_key, self.image_processor = job, job.hash_key, job.processor()
        self.views = BcsDbtViews.from_csv(job.bcs_dbt_paths) if job.bcs_dbt_paths else None

    def rows(self, volume: Volume) -> list[dict[str, Any]]:
        """Raises InvalidImageError or OSError where a file of the volume cannot be used."""
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
        return rows
