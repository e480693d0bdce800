"""Any archive of DICOM, PNG, JPEG and PGM files -> a pretraining corpus.

    python -m dataset_scripts.corpus SOURCE... --output DIR

SOURCE is a folder, a file or any fsspec address. The images are made by the image processor's own steps, so that
pretraining and inference see the same thing. A file that cannot be used is refused with its reason and the rest is
built. Shards are written atomically; the same command goes on after a stop, and with --extend adds what is new. What
names files stays in DIR.private.
"""

import csv
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout

import modeling_mammodino
from modeling_mammodino.breast_segmentation import TISSUE_FINDERS
from modeling_mammodino.dicom import keyed_hash
from modeling_mammodino.image_processing_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools.command import HASH_KEY_VARIABLE, CommandParser, command_line, user_path
from modeling_mammodino.tools.engine import ENGINES, Stage, parse_arguments, progress_bar, run_stages
from modeling_mammodino.tools.files import atomic_file, read_lines, write_json
from modeling_mammodino.tools.privacy import check_text, without_private

from . import extension
from .archive import is_address, list_archive
from .plan import (
    MODALITIES,
    ROWS_PER_SHARD,
    Job,
    MakePlan,
    ReadHeaders,
    read_hash_key,
)
from .reader import FEATURES, MANIFEST, STATE, TISSUE_CELL_PX
from .shards import RenderShards

logger = logging.getLogger(__name__)

TASKS = 64
LOCK_SECONDS = 5  # for the processes of a build that was killed just now
SHORT_KEY_BYTES = 16
PLACES = ("sources", "bcs_dbt_paths", "metadata", "metadata_content")  # of this machine, among the settings
SETTINGS = ("tissue_", "do_", "intensity_", "chest_", "crop_margin", "clahe_", "bit_depth", "image_mean", "image_std")
README = """\
This folder names files of an archive, and so perhaps patients: do not share it. From it a stopped build of the corpus
beside it goes on, and a finished one is extended. refused.csv says which files were left out, and why.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m dataset_scripts.corpus", description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="+", help="folders, files, or fsspec addresses such as s3://bucket/folder")
    parser.add_argument("--output", required=True, type=user_path, help="folder of the corpus")
    parser.add_argument("--height", type=int, default=1024, help="images are fitted into this height (default 1024)")
    parser.add_argument("--width", type=int, default=1024, help="... and this width, never enlarged (default 1024)")
    parser.add_argument(
        "--tissue_finder", default="breast", choices=tuple(TISSUE_FINDERS), help="body: axial slices of CT or MR"
    )
    parser.add_argument(
        "--modalities",
        nargs="+",
        help="of DICOM images that enter (default: MG, which takes in mammography and tomosynthesis of any name and CR "
        "and DX of the breast; for body CT MR); NONE: those that state none",
    )
    parser.add_argument(
        "--min_mask_confidence", type=float, default=0.0, help="images with less are left out (default 0, none is)"
    )
    parser.add_argument("--bit_depth", type=int, default=8, choices=(8, 16), help="bits a pixel (default 8)")
    parser.add_argument("--collection", default="unnamed", help="name for the column `source`; it is published")
    parser.add_argument("--bcs_dbt_paths", nargs="+", default=(), help="BCS-DBT-file-paths-*.csv: its wrong headers")
    parser.add_argument(
        "--metadata",
        nargs="+",
        default=(),
        help="CSV of files without a header: columns file (relative to it) and patient, study, laterality, view, kind, "
        "source as far as known",
    )
    parser.add_argument(
        "--hash_key_file", type=user_path, help=f"key of the patient hashes (default: ${HASH_KEY_VARIABLE})"
    )
    parser.add_argument(
        "--rows_per_shard",
        type=int,
        help=f"at which a shard is full; volumes stay whole (default {ROWS_PER_SHARD}, less where tasks lacked work)",
    )
    parser.add_argument(
        "--num_proc", type=int, default=os.cpu_count() or 1, help="processes at a time (default: cores)"
    )
    parser.add_argument("--tasks", type=int, default=TASKS, help=f"parts that the work is shared out in ({TASKS})")
    parser.add_argument(
        "--extend", action="store_true", help="add the files that are new to a finished corpus; what stands stays"
    )
    parser.add_argument("--engine", default="local", choices=ENGINES, help="where tasks run (default: this machine)")
    parser.add_argument("--engine_args", nargs="+", default=[], metavar="NAME=VALUE", help="of datatrove's executor")
    options = vars(parser.parse_args(arguments))
    with command_line("corpus"):
        fit = options.pop("height"), options.pop("width")
        settings = {name: options.pop(name) for name in ("bit_depth", "tissue_finder")}
        sources, engine_arguments = options.pop("source"), options.pop("engine_args")
        options["engine_arguments"] = parse_arguments(options["engine"], engine_arguments)
        try:
            manifest = build_corpus(sources, fit=fit, image_processor=MammoDinoImageProcessor(**settings), **options)
        except FileNotFoundError:
            raise
        except OSError as error:  # a full disk, a worker that died
            raise OSError(f"{error}; what is finished stands, the same command goes on") from error
        except subprocess.CalledProcessError as error:  # of sbatch, which has said why
            raise RuntimeError(f"{error.cmd[0]} refused the job; the same command goes on") from error
        except KeyboardInterrupt:
            raise SystemExit("corpus: stopped; the same command goes on") from None
    output = options["output"]
    if manifest is None:
        print(f"sent off; {output} is complete when {output / MANIFEST} is there")
        return
    unlisted = f" and {manifest['folders_unlisted']} folders" if manifest["folders_unlisted"] else ""
    print(
        f"{output}: {manifest['rows']} images of {manifest['volumes']} volumes from {manifest['files_read']} "
        f"files; {manifest['files_refused']} files{unlisted} refused, see {output}.private/refused.csv"
    )


def build_corpus(
    sources: Sequence[str | Path],
    output: Path,
    fit: tuple[int, int],
    image_processor: MammoDinoImageProcessor,
    collection: str = "unnamed",
    hash_key_file: str | Path | None = None,
    bcs_dbt_paths: Sequence[str | Path] = (),
    metadata: Sequence[str | Path] = (),
    modalities: Sequence[str] | None = None,
    min_mask_confidence: float = 0.0,
    num_proc: int = 1,
    rows_per_shard: int | None = None,
    tasks: int = TASKS,
    extend: bool = False,
    engine: str = "local",
    engine_arguments: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Build or go on with the corpus in `output`; return its manifest, None where a cluster has yet to make it.

    extend: of a finished corpus, add what is new in `sources`, which may be other folders than those it was built of.

    Images are as large as `fit` = (height, width) in pixels allows, never enlarged. The key of the hashes is in
    `hash_key_file` or $MAMMODINO_HASH_KEY. `modalities` and `min_mask_confidence` say what enters, see `Job`. Raises
    ValueError where `output` holds a corpus of other settings or another key, where another build is at work, or where
    no file can be used; OSError where the archive cannot be listed or the corpus not be written.
    """
    if not 0 <= min_mask_confidence <= 1:
        raise ValueError(f"min_mask_confidence={min_mask_confidence}: must be from 0 to 1")
    if min(*fit, num_proc, 1 if rows_per_shard is None else rows_per_shard, tasks) < 1:
        raise ValueError("height, width, num_proc, rows_per_shard and tasks must be at least 1")
    if complaint := next(check_text(collection), None):
        raise ValueError(f"collection={collection!r}: {complaint}, for it is published")
    _provide_hash_key(hash_key_file)
    if engine == "ray" and not hash_key_file:
        raise ValueError(
            "--engine ray: give --hash_key_file, where all nodes can read it; they do not share a variable"
        )
    if num_proc > 1 and threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "several processes are watched by signals, which only the main thread receives: build there, in a process "
            "of its own, or with num_proc=1"
        )
    job = Job(
        output=str(Path(output).absolute()),
        sources=tuple(map(_absolute, sources)),
        fit=fit,
        image_processor=corpus_settings(image_processor),
        collection=collection,
        hash_key_file=str(Path(hash_key_file).absolute()) if hash_key_file else None,
        bcs_dbt_paths=tuple(map(_absolute, bcs_dbt_paths)),
        metadata=tuple(map(_absolute, metadata)),
        modalities=tuple(sorted(modalities or MODALITIES[image_processor.tissue_finder])),
        min_mask_confidence=min_mask_confidence,
        rows_per_shard=rows_per_shard,
        tasks=tasks,
    )
    with _one_at_a_time(job):
        job = _begin(job, extend)
        headers = progress_bar("headers", "task", job.work / "headers", lambda: job.tasks)
        images = progress_bar("images", "shard", job.work / "shards", lambda: len(list(job.work.glob("plan/*"))))
        stages = [
            Stage("headers", ReadHeaders(job), job.tasks, headers),
            Stage("plan", MakePlan(job), 1),
            Stage("shards", RenderShards(job), job.tasks, images),
            Stage("manifest", Finish(job), 1),
        ]
        if not run_stages(stages, engine, num_proc, job.work / "engine", engine_arguments or {}):
            return None
    manifest = json.loads((Path(job.output) / MANIFEST).read_text())
    if not manifest["rows"]:
        ignored = json.loads(job.plan.read_text())["ignored"]
        others = "; ignored: " + ", ".join(f"{count} {suffix}" for suffix, count in ignored.items()) if ignored else ""
        raise ValueError(
            f"none of {manifest['files_found']} files could be used: {manifest['files_refused']} were refused, the "
            f"reasons are in {job.private / 'refused.csv'}{others}"
        )
    return manifest


@contextmanager
def _one_at_a_time(job: Job) -> Iterator[None]:
    """Hold the folder of a build. Raises ValueError where another process has it, which would delete what this one
    writes."""
    is_new = not job.private.exists()
    job.private.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(job.private / ".lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)  # released by the system when the process dies
    except Timeout as error:
        raise ValueError(f"{job.output}: another build is at work there; wait for it, or give another") from error
    except NotImplementedError:
        logger.warning("the file system has no locks: start no second build of %s while this one runs", job.output)
    try:
        yield
    finally:
        lock.release()
        if is_new and not job.begun.exists():  # refused before it began
            shutil.rmtree(job.private, ignore_errors=True)


def corpus_settings(image_processor: MammoDinoImageProcessor) -> dict[str, Any]:
    """Return the processor's settings that shape the images and how they are standardized."""
    saved = image_processor.to_dict()
    return {key: saved[key] for key in sorted(saved) if key.startswith(SETTINGS)}


def _provide_hash_key(path: str | Path | None) -> None:
    """See to it that there is a key, for this process and its children; a made-up one is said."""
    key = read_hash_key(path)
    if key and len(key) < SHORT_KEY_BYTES:
        logger.warning(
            "the key of the patient hashes is short (%d bytes): it can be guessed, give 16 or more", len(key)
        )
    if not key and path:
        raise ValueError(f"--hash_key_file {path}: the file is empty; write a secret of 16 bytes or more into it")
    if not key:
        logger.warning(
            "no key for the patient hashes (--hash_key_file or $%s): a random one is used, so this corpus can neither "
            "be continued after a stop nor linked to another",
            HASH_KEY_VARIABLE,
        )
        os.environ[HASH_KEY_VARIABLE] = secrets.token_hex(16)


def _absolute(source: str | Path) -> str:
    """Return an address that means the same in every process."""
    text = str(source)
    return text if is_address(text) else str(user_path(text).absolute())


def _begin(job: Job, extend: bool) -> Job:
    """List the archive, or find the part of the corpus that is gone on with."""
    output = Path(job.output)
    wanted = {"mammodino": modeling_mammodino.__version__, **job.settings()}
    if job.metadata:
        wanted["metadata_content"] = [hashlib.sha256(Path(table).read_bytes()).hexdigest() for table in job.metadata]
    if parts := extension.all_parts(job):
        unfinished = [part for part in parts if not extension.is_finished(part)]
        is_new = extend and not unfinished
        part = (unfinished or parts[-1:])[0] if extend else parts[0]
        saved = json.loads(part.begun.read_text())["settings"]
        differing = [name for name in wanted if saved.get(name) != wanted[name] and not (is_new and name in PLACES)]
        if differing:
            raise ValueError(
                f"{output}: holds a corpus made with other settings ({', '.join(differing)}), and one corpus has one "
                "set of them: choose another --output, or give the same settings and the same key"
            )
        if not is_new:
            logger.info("going on with the %d files that were listed at the start", part.files)
            _tell_later_files(job, extend)
            return part
        job = replace(job, rows_per_shard=job.rows_per_shard or part.rows_per_shard)
        listing = extension.new_files(job)
        if not listing.files:
            logger.info("nothing in the archive is new")
            return part
        logger.info("%d files are new, or were refused and are tried again", len(listing.files))
        return extension.begin(job, wanted, listing)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: not empty, and no build of ours to go on with; choose another --output")
    listing = list_archive(job.sources)
    files = listing.files
    for reason, count in Counter((listing.unlisted | listing.passed_over).values()).items():
        logger.warning("left out: %d, %s", count, reason)
    if not files:
        raise ValueError(f"{', '.join(job.sources)}: nothing to read; give folders with DICOM, PNG, JPEG or PGM files")
    output.mkdir(parents=True, exist_ok=True)
    (job.private / "README.txt").write_text(README)
    (job.private / ".gitignore").write_text("*\n")
    logger.info("%d files listed", len(files))
    return extension.begin(job, wanted, listing)


def _tell_later_files(job: Job, extend: bool) -> None:
    """Say how many files came into the archive after it was listed, and whether an extension by such was stopped."""
    parts = extension.all_parts(job)
    if len(parts) > 1 and not extend and not extension.is_finished(parts[-1]):
        logger.warning("an extension was stopped: --extend goes on with it")
    try:
        later = len(extension.new_files(job, tried_again=False).files)
    except OSError:  # what is to be read is known; an archive that is gone is said where a file is read
        return
    if later:
        logger.warning(
            "%d files are new in the archive and do not enter; --extend adds them to the finished corpus", later
        )


@dataclass
class Finish:
    """The last task, when all shards are there: what makes a folder of shards a corpus, and the list of refusals."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        job, output = self.job, Path(self.job.output)
        parts = [part for part in extension.all_parts(job) if part.part == job.part or extension.is_finished(part)]
        records, refused = list(extension.records(parts)), extension.refused_files(parts)
        left_out = {path: of for part in parts for path, *of in read_lines(part.left_out)}
        unlisted = [(path, reason) for path, (reason, is_folder) in left_out.items() if is_folder]
        self._write_refused(unlisted, refused.values())
        for leftover in output.glob(".*.tmp"):  # of tasks that were killed
            leftover.unlink(missing_ok=True)
        ignored = sum(sum(json.loads(part.plan.read_text())["ignored"].values()) for part in parts)
        read = sum(part.files for part in parts) - ignored - len(extension.refusals(parts))
        shards = [{name: record[name] for name in ("name", "rows", "sha256")} for record in records if record["name"]]
        if job.part:
            for shard in job.shard(0).parent.glob("data-*.arrow"):
                shard.replace(output / shard.name)
        notes = _sum(record["notes"] for record in records)
        if unknown := notes.get("metadata: unknown"):
            logger.warning("%d files are in none of the tables of --metadata, and have no patient", unknown)
        settings = {"tissue_cell_px": TISSUE_CELL_PX, **job.settings()}
        for place in PLACES:
            settings.pop(place, None)
        _write_state(output, [shard["name"] for shard in shards], settings)
        manifest = {
            "complete": True,
            "mammodino": modeling_mammodino.__version__,
            **settings,
            "files_found": read + len(refused) + ignored,
            "files_read": read,
            "files_refused": len(refused),
            "files_ignored": ignored,
            "folders_unlisted": len(unlisted),
            "passed_over": without_private(Counter(reason for reason, is_folder in left_out.values() if not is_folder)),
            "rows": sum(record["rows"] for record in records),
            "volumes": sum(record["volumes"] for record in records),
            "rows_by_kind": dict(sorted(_sum(record["kinds"] for record in records).items())),
            "doubtful_masks": sum(record["doubtful_masks"] for record in records),
            "burned_in_annotations": dict(_sum(record["burned_in_annotations"] for record in records)),
            "refused_by_reason": _most_frequent(
                Counter(re.sub(r"file \d+", "another file", reason) for _, _, reason in refused.values())
            ),
            "notes": _most_frequent(notes),
            "shards": shards,
        }
        write_json(output / MANIFEST, manifest)

    def _write_refused(self, unlisted: list[tuple[str, str]], refused: Iterable[tuple[int, str, str]]) -> None:
        """Write the private list; a folder has no number, and a name that is not UTF-8 is escaped."""
        target = self.job.private / "refused.csv"
        with (
            atomic_file(target) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
        ):
            writer = csv.writer(stream)
            writer.writerow(["number", "file", "reason"])
            writer.writerows(("", *each) for each in unlisted)
            writer.writerows(sorted(refused))


def _most_frequent(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(list(without_private(counts).items())[:20])


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total


def _write_state(output: Path, names: list[str], settings: dict[str, Any]) -> None:
    """Write the two files by which `datasets.load_from_disk` finds the shards."""
    datasets.DatasetInfo(features=FEATURES).write_to_directory(str(output))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": keyed_hash(json.dumps([names, settings]), b"fingerprint"),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(output / STATE, state)
