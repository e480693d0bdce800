"""The end of a build: what makes a folder of shards a corpus, and the private list of what was refused."""

import csv
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

import modeling_mammodino
from modeling_mammodino.dicom import keyed_hash

from .archive import ArchiveFile
from .corpus_job import Job, read_lines, write_json
from .corpus_reader import FEATURES, MANIFEST, TISSUE_CELL_PX


@dataclass
class Finish:
    """The last task, when all shards are there."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        job, output = self.job, Path(self.job.output)
        plan = json.loads(job.plan.read_text())
        records = [json.loads(job.shard_record(shard).read_text()) for shard in range(plan["shards"])]
        refused = sorted(plan["refused"] + [each for record in records for each in record["refused"]])
        self._write_refused(dict(map(tuple, refused)))
        for leftover in output.glob(".*.tmp"):  # of tasks that were killed
            leftover.unlink(missing_ok=True)
        files = json.loads((job.work / "job.json").read_text())["files"]
        shards = [{name: record[name] for name in ("name", "rows", "sha256")} for record in records if record["name"]]
        settings = {"tissue_cell_px": TISSUE_CELL_PX, **job.settings()}
        del settings["sources"], settings["bcs_dbt_paths"]  # places of this machine
        _write_state(output, [shard["name"] for shard in shards], settings)
        manifest = {
            "complete": True,
            "mammodino": modeling_mammodino.__version__,
            **settings,
            "files_found": files,
            "files_read": files - plan["files_ignored"] - len(refused),
            "files_refused": len(refused),
            "files_ignored": plan["files_ignored"],
            "rows": sum(record["rows"] for record in records),
            "volumes": sum(record["volumes"] for record in records),
            "rows_by_kind": dict(sorted(_sum(record["kinds"] for record in records).items())),
            "doubtful_masks": sum(record["doubtful_masks"] for record in records),
            "burned_in_annotations": dict(_sum(record["burned_in_annotations"] for record in records)),
            "refused_by_reason": dict(Counter(reason for _, reason in refused).most_common(20)),
            "notes": dict(_sum(record["notes"] for record in records).most_common(20)),
            "shards": shards,
        }
        write_json(output / MANIFEST, manifest)

    def _write_refused(self, reasons: dict[int, str]) -> None:
        target = self.job.work / "refused.csv"
        temporary = target.with_suffix(".tmp")
        with temporary.open("w", newline="", errors="surrogateescape") as stream:
            writer = csv.writer(stream)
            writer.writerow(["number", "file", "reason"])
            for file in (ArchiveFile(*line) for line in read_lines(self.job.listing)):
                if file.number in reasons:
                    writer.writerow([file.number, file.path, reasons[file.number]])
        os.replace(temporary, target)


def _sum(counts: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total


def _write_state(output: Path, names: list[str], settings: dict[str, Any]) -> None:
    """The two files by which `datasets.load_from_disk` finds the shards."""
    datasets.DatasetInfo(features=FEATURES).write_to_directory(str(output))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": keyed_hash(json.dumps([names, settings]), b"fingerprint"),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(output / "state.json", state)
