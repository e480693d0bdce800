"""Does the way to a step hold 1.4 million images, the size of the paper's corpus?

    python -m performance.scale --folder DIR [--patients 10000] [--slices 45] [--workers 2] [--keep]

A made-up archive of so many patients, each three DBT volumes of one file a slice and five mammograms (10,000 are
1,400,000 files), goes through the corpus' own build, listing, headers, plan, shards and manifest, and then through
opening, views, first batch and verify, each in a process of its own. Made up are three things, so that what is timed
is not DICOM: the walk over folders, what a header says, and the pixels (16 x 16). The price of a true header is
measured beside it, on `--files` true files. Memory is beyond what the process had with its imports; "private" is what
a worker does not share with others.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from accelerate import Accelerator
from pydicom.uid import UID

from dataset_scripts.corpus import archive, build, plan, shards
from dataset_scripts.corpus.archive import ArchiveFile
from dataset_scripts.corpus.reader import Corpus, encode_png
from dataset_scripts.corpus.verify import verify_corpus
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.dicom import Instance, keyed_hash
from modeling_mammodino.tools.command import HASH_KEY_VARIABLE, user_path
from modeling_mammodino.tools.walk import Walk
from training.pretraining.recipe import load_recipe
from training.pretraining.views.sample import PretrainingViews, load_batches

from .corpus import write
from .encoder import resident_bytes
from .images import example_images

UNITS, VOLUMES = 8, 3  # images and volumes of a patient; volumes among them
SIDE_PX, POOL = 16, 64  # different images
RESUME_STEP = 100_000
KEY = b"the key of a benchmark"
RECIPE = ["mammodino", "--per_device_train_batch_size", "4", "--image_height", "224", "--image_width", "168"]
MIB = 2**20


@dataclass
class Pretended:
    """A step of the build on the made-up archive; notes what it took in a file of its own."""

    step: Any
    notes: str

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        pretend()
        with measured() as found:
            self.step(data, rank, world_size)
        name = type(self.step).__name__
        Path(self.notes, f"{name}-{rank}.json").write_text(json.dumps({"name": name, **found}))


def pretend() -> None:
    """Put the made-up archive in the place of folders, headers and pixels, in this process."""
    os.environ[HASH_KEY_VARIABLE] = KEY.decode()
    archive.walk = made_walk  # type: ignore[assignment]
    plan.read_header = made_header  # type: ignore[assignment]
    shards.VolumeReader = MadeReader  # type: ignore[assignment, misc]


def made_walk(root: str) -> Walk:
    patients, slices = map(int, Path(root).name.split("x"))
    units = ((unit, slices if unit % UNITS < VOLUMES else 1) for unit in range(patients * UNITS))
    files = [
        f"{root}/{unit // UNITS:06d}/1.2.840.113619.2.{unit:07d}/1.2.840.113619.2.{unit:07d}.{place:04d}.dcm"
        for unit, count in units
        for place in range(count)
    ]
    return Walk(files, {}, {})


def made_header(file: ArchiveFile, key: bytes, modalities: Any) -> dict[str, Any]:
    series, place = file.relative.split("/")[1], int(file.relative[-8:-4])
    is_volume = int(series[-7:]) % UNITS < VOLUMES
    own = keyed_hash(file.relative, key)
    instance = Instance(own, keyed_hash(series, key), 1, 1.0 * place, place + 1.0, "2048.0 x 1664.0")
    if not is_volume:
        instance = Instance(own, own, 1, None, 1.0, "2048.0 x 1664.0")
    return {"file": file, "size": 7_000_000 + place, "instance": instance}


class MadeReader:
    """Rows of a volume, as `shards.VolumeReader` gives them."""

    views = metadata = None

    def __init__(self, job: plan.Job):
        rng = np.random.default_rng(0)
        self.pngs = [encode_png(rng.integers(0, 255, (SIDE_PX, SIDE_PX), np.uint8)) for _ in range(POOL)]
        self.tissue = encode_png(np.full((SIDE_PX // 4, SIDE_PX // 4), 255, np.uint8))
        self.collection, self.key = job.collection, job.hash_key

    def images(self, volume: plan.Volume, refused: Any) -> Iterator[list[dict[str, Any]]]:
        patient, series, _ = volume.places[0][0].relative.split("/")
        unit = int(series[-7:])
        common = {
            "tissue": {"bytes": self.tissue, "path": None},
            "volume_id": volume.volume_id,
            "num_slices": len(volume.places),
            "slice_spacing_mm": volume.slice_spacing_mm,
            "pixel_spacing_mm": 0.1,
            "kind": "dbt" if len(volume.places) > 1 else "ffdm",
            "laterality": "LR"[unit % 2],
            "view": ("CC", "MLO")[unit // 2 % 2],
            "patient": keyed_hash(patient, self.key),
            "study": keyed_hash(f"{patient} {unit % 2}", self.key),
            "source": self.collection,
            "mask_confidence": 1.0,
            "burned_in_annotation": None,
        }
        yield [
            {**common, "image": {"bytes": self.pngs[file.number % POOL], "path": None}, "slice_index": place}
            for place, (file,) in enumerate(volume.places)
        ]


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fill a dict with wall and CPU seconds, and with the peak and what stays of memory, MiB beyond what was there."""
    found: dict[str, float] = {}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, anonymous = resident_bytes("VmRSS"), resident_bytes("RssAnon")
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found["seconds"], found["cpu_seconds"] = time.perf_counter() - wall, time.process_time() - cpu
    found["peak_mib"] = (resident_bytes("VmHWM") - before) / MIB
    found["process_mib"] = resident_bytes("VmHWM") / MIB
    found["mib"] = (resident_bytes("VmRSS") - before) / MIB
    found["anonymous_mib"] = (resident_bytes("RssAnon") - anonymous) / MIB  # without pages of mapped files


def private_mib(pid: int) -> dict[str, float]:
    """What a process shares with nobody, and its share of all (PSS)."""
    fields = dict(re.findall(r"(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text()))
    private = int(fields["Private_Clean"]) + int(fields["Private_Dirty"])
    return {"private_mib": private / 1024, "pss_mib": int(fields["Pss"]) / 1024}


def build_made(folder: Path, patients: int, slices: int, workers: int, tasks: int) -> None:
    """Build the corpus of the made-up archive by the project's command, its three sources replaced."""
    root, notes = folder / f"{patients}x{slices}", folder / "notes"
    root.mkdir(parents=True, exist_ok=True)
    notes.mkdir(exist_ok=True)
    pretend()
    for name in ("ReadHeaders", "MakePlan", "RenderShards", "Finish"):
        step = getattr(build, name)
        setattr(build, name, lambda job, step=step: Pretended(step(job), str(notes)))
    begin = build._begin

    def begin_measured(job: plan.Job, extend: bool) -> plan.Job:
        with measured() as found:
            job = begin(job, extend)
        (notes / "list.json").write_text(json.dumps({"name": "list", **found}))
        return job

    build._begin = begin_measured
    build.build_corpus(
        [root], folder / "corpus", (SIDE_PX, SIDE_PX), MammoDinoImageProcessor(), "made", num_proc=workers, tasks=tasks
    )


def open_corpus(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    with measured() as found:
        corpus = Corpus(folder / "corpus")
    return found | {"rows": int(corpus.volume_bounds[-1])}


def draw(folder: Path, options: argparse.Namespace, first_step: int = 0) -> dict[str, float]:
    """Tables of order and neighbors, then the first batch, of workers that read ahead. Four images a process: of
    more, memory is crops in flight."""
    recipe = load_recipe(
        [*RECIPE, "--corpus", str(folder / "corpus"), "--output_dir", "none", "--dataloader_num_workers", "0"]
    )
    recipe.run.dataloader_num_workers = options.workers
    corpus = Corpus(folder / "corpus")
    batch = recipe.run.per_device_train_batch_size
    with measured() as tables:
        views = PretrainingViews(corpus, recipe.views, recipe.model.patch_size, 0, batch, canvas=(224, 168))
    accelerator = Accelerator(cpu=True)
    with measured() as first:
        batches = load_batches(views, recipe, first_step, accelerator)
        next(batches)
    later = time.perf_counter()
    for _ in range(4):
        next(batches)
    found = {f"tables_{name}": value for name, value in tables.items()}
    found |= {"first_batch_seconds": first["seconds"], "batch_seconds": (time.perf_counter() - later) / 4}
    of_workers = [private_mib(each.pid or 0) for each in multiprocessing.active_children()]
    for name in ("private_mib", "pss_mib"):
        found[f"worker_{name}"] = max((each[name] for each in of_workers), default=0.0)
    return found


def resume(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    return draw(folder, options, RESUME_STEP)


def verify(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    with measured() as found:
        complaints = verify_corpus(folder / "corpus", options.workers)
    if complaints:
        raise SystemExit("\n".join(complaints[:10]))
    return found | {"worker_peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}


def read_headers(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Read headers of true files: one slice each, 4 KiB of pixels."""
    true, number = folder / "true", options.files
    true.mkdir(exist_ok=True)
    write(true / "template.dcm", example_images(1)[1][0], (64, 32), 1, "ExplicitVRLittleEndian", 0)
    dataset = pydicom.dcmread(true / "template.dcm")
    for place in range(number):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{place}")
        dataset.save_as(true / f"{place:06d}.dcm")
    (true / "template.dcm").unlink()
    with measured() as listed:
        files = archive.list_archive([str(true)]).files
    with measured() as found:
        assert all("instance" in plan.read_header(file, KEY, ("MG",)) for file in files)
    shutil.rmtree(true)
    return {"list_ms_a_file": listed["seconds"] / number * 1e3, "header_ms_a_file": found["cpu_seconds"] / number * 1e3}


PHASES: dict[str, Callable[[Path, argparse.Namespace], dict[str, float]]] = {
    "headers of true files": read_headers,
    "open": open_corpus,
    "draw": draw,
    "resume": resume,
    "verify": verify,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=user_path, required=True, help="for the corpus; about 1.5 KB an image")
    parser.add_argument("--patients", type=int, default=10_000, help="of 140 images each (default 10000)")
    parser.add_argument("--slices", type=int, default=45, help="of a volume (default 45)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the build, the loader and verify")
    parser.add_argument("--tasks", type=int, default=build.TASKS, help="of the build")
    parser.add_argument("--files", type=int, default=3000, help="true files whose headers are read (default 3000)")
    parser.add_argument("--keep", action="store_true", help="leave the corpus there; else it goes at the end")
    parser.add_argument("--phases", nargs="+", choices=("build", *PHASES), default=["build", *PHASES])
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    os.environ.setdefault(HASH_KEY_VARIABLE, KEY.decode())
    if options.alone:
        (phase,) = options.phases
        if phase == "build":
            from performance.scale import build_made  # by its name, by which worker processes import it

            return build_made(options.folder, options.patients, options.slices, options.workers, options.tasks)
        return print(json.dumps(PHASES[phase](options.folder, options)))
    for phase in options.phases:
        began = time.perf_counter()
        command = [sys.executable, "-m", "performance.scale", *sys.argv[1:], "--alone", "--phases", phase]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{phase}: failed")
        if phase == "build":
            for name, found in built(options.folder / "notes").items():
                show(name, found)
            show("build", {"seconds": time.perf_counter() - began})
        else:
            show(phase, json.loads(done.stdout.splitlines()[-1]))
    if not options.keep:
        shutil.rmtree(options.folder)


def built(notes: Path) -> dict[str, dict[str, float]]:
    """Of each stage of the build: seconds of all its tasks, and the largest peak of a task."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(notes.iterdir()):
        task = json.loads(path.read_text())
        of = found.setdefault(
            task["name"], {"tasks": 0, "seconds": 0.0, "cpu_seconds": 0.0, "peak_mib": 0.0, "process_mib": 0.0}
        )
        of["tasks"] += 1
        for name in ("seconds", "cpu_seconds"):
            of[name] += task[name]
        for name in ("peak_mib", "process_mib"):
            of[name] = max(of[name], task[name])
    return found


def show(name: str, found: dict[str, float]) -> None:
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
