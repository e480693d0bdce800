"""What does a corpus cost beside the bare decoding of its files?

    python -m performance.corpus [--volumes 2] [--slices 12] [--repeats 5] [--scale 100 1000 10000]

Three questions, each answered in one run on files made here: the time of the whole path from DICOM to rows as a ratio
to `pydicom.pixels.iter_pixels` over the same files (CPU and wall time of one process, OpenCV on one thread); the peak
memory of a 60-slice volume above a process that has imported the same modules; the cost of an image as an archive
grows.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pydicom

from dataset_scripts.corpus.archive import ArchiveFile
from dataset_scripts.corpus.plan import HASH_KEY_VARIABLE, Job, Volume
from dataset_scripts.corpus.shards import render_shard
from dataset_scripts.phantom.dicom import BreastInfo, mammogram_dataset, save, tomosynthesis_dataset
from modeling_mammodino.tools.files import write_lines

from .encoder import resident_bytes
from .images import example_images

SLICE_PX, MAMMOGRAM_PX = (2048, 1664), (4096, 3328)
SYNTAXES = {"JPEG2000Lossless": 1.5, "JPEGLosslessSV1": 3.0}  # and the bar of each
MEMORY_SLICES, MEMORY_BAR_MIB = 60, 250
NOISE = 8  # standard deviation, in gray levels of 12 bits


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.corpus", description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=2, help="of each transfer syntax (default 2)")
    parser.add_argument("--slices", type=int, default=12, help="of each volume (default 12)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=int, nargs="*", default=[100, 1000, 10_000], help="numbers of small images")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault(HASH_KEY_VARIABLE, "the key of a benchmark")
    cv2.setNumThreads(1)
    if options.peak:
        return print_peak(options.peak)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs; pydicom {pydicom.__version__}, OpenCV {cv2.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options.volumes, options.slices, options.repeats)
        measure_memory(Path(folder))
        start = min(build_small(Path(folder), 2, str(turn)) for turn in range(3))  # the first fills the disk's cache
        print(f"\nstart and end of the command, on 2 images: {start:.1f} s")
        for count in options.scale:
            seconds = build_small(Path(folder), count)
            print(f"{count} images of 512 x 416 on 2 processes: {seconds:.1f} s, "
                  f"{(seconds - start) / count * 1e3:.1f} ms an image beyond the start", flush=True)  # fmt: skip


def compare(folder: Path, volumes: int, slices: int, repeats: int) -> None:
    source, images = example_images(max(volumes, 2))
    print(f"images: {source}\n")
    print("| files | images | decoding, CPU ms an image | corpus | images/s and core | CPU ratio | wall ratio |")
    print("|---" * 7 + "|")
    for syntax, bar in SYNTAXES.items():
        for kind, size, frames in (("DBT", SLICE_PX, slices), ("2D", MAMMOGRAM_PX, 1)):
            paths = [folder / f"{syntax}_{kind}_{number}.dcm" for number in range(volumes)]
            for number, path in enumerate(paths):
                write(path, images[number % len(images)], size, frames, syntax, number)
            job = make_job(folder / f"{syntax}_{kind}", paths, frames)
            images = frames * volumes

            def build(job: Job = job) -> None:
                job.shard_record(0).unlink(missing_ok=True)
                render_shard(job, 0, Counter())

            def bare(paths: list[Path] = paths) -> None:
                for path in paths:
                    for _ in pydicom.pixels.iter_pixels(path, raw=True):
                        pass

            cpu, wall = [], []  # each (repeats, 2)
            for _ in range(repeats + 1):
                times = [stopwatch(bare), stopwatch(build)]
                wall.append([one for one, _ in times])
                cpu.append([one for _, one in times])
            seconds, ratios = np.array(cpu[1:]), np.array(cpu[1:])[:, 1] / np.array(cpu[1:])[:, 0]
            walls = np.array(wall[1:])[:, 1] / np.array(wall[1:])[:, 0]
            decoding, corpus = np.median(seconds, axis=0) / images * 1e3
            median = np.median(ratios)
            verdict = "within" if median <= bar else "OVER"
            print(
                f"| {kind} {size[0]} x {size[1]}, {syntax} | {images} | {decoding:.0f} | {corpus:.0f} "
                f"| {1e3 / corpus:.1f} | {median:.2f} ({ratios.min():.2f}, {ratios.max():.2f}), {verdict} {bar:g} "
                f"| {np.median(walls):.2f} |",
                flush=True,
            )
            for path in paths:
                path.unlink()


def write(path: Path, image: np.ndarray, size: tuple[int, int], frames: int, syntax: str, number: int) -> None:
    """A volume or a mammogram of 12 bits in 16, with noise of its own in each slice."""
    gray = image if image.dtype == np.uint8 else (image >> 4).astype(np.uint8)
    large = cv2.resize(gray.astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC) * 16
    rng = np.random.default_rng(number)
    values = [np.clip(large + rng.normal(0, NOISE, size), 0, 4095).astype(np.uint16) for _ in range(frames)]
    info = BreastInfo(f"PHANTOM-{number:06d}", "L", "CC", 0.1, 1.0)
    plain = mammogram_dataset(values[0], info) if frames == 1 else tomosynthesis_dataset(np.stack(values), info)
    save(plain, path, syntax)


def make_job(output: Path, paths: list[Path], frames: int) -> Job:
    """A build with its plan made: one shard."""
    job = Job(str(output), (str(output.parent),), (1024, 1024), {}, "benchmark", None, (), 10**9, 1)
    output.mkdir(parents=True, exist_ok=True)
    volumes = []
    for number, path in enumerate(paths):
        file = ArchiveFile(number, str(path), str(path), path.name)
        volumes.append(Volume(f"{number:032x}", [[file]], frames, None))
    write_lines(job.shard_plan(0), volumes)
    return job


def stopwatch(step: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_memory(folder: Path) -> None:
    """In fresh processes: one that makes a shard of a large volume, one that makes nothing."""
    _, images = example_images(1)
    for syntax in SYNTAXES:
        path = folder / "volume.dcm"
        write(path, images[0], SLICE_PX, MEMORY_SLICES, syntax, 0)
        peaks = []
        for job_path in (path, folder / "nothing"):
            command = [sys.executable, "-m", "performance.corpus", "--peak", str(job_path)]
            peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        path.unlink()
        mib = (peaks[0] - peaks[1]) / 2**20
        verdict = "within" if mib <= MEMORY_BAR_MIB else "OVER"
        print(f"\npeak memory, {MEMORY_SLICES} slices of {SLICE_PX[0]} x {SLICE_PX[1]}, {syntax}: {mib:.0f} MiB above "
              f"{peaks[1] / 2**20:.0f} MiB with imports; {verdict} {MEMORY_BAR_MIB}", flush=True)  # fmt: skip


def print_peak(path: Path) -> None:
    if path.exists():
        render_shard(make_job(path.parent / "peak", [path], MEMORY_SLICES), 0, Counter())
        (path.parent / "peak.private" / "shards" / "00000.json").unlink()
    print(resident_bytes("VmHWM"))  # getrusage would give the parent's peak where that is larger


def build_small(folder: Path, count: int, turn: str = "") -> float:
    """Seconds of the command, on small mammograms that differ in their SOP instance and patient only."""
    archive, output = folder / f"small_{count}{turn}", folder / f"corpus_{count}{turn}"
    archive.mkdir()
    _, images = example_images(1)
    template = folder / "template.dcm"
    write(template, images[0], (512, 416), 1, "ExplicitVRLittleEndian", 0)
    dataset = pydicom.dcmread(template)
    for number in range(count):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        dataset.PatientID = f"PHANTOM-{number // 4:06d}"
        dataset.save_as(archive / f"{number:06d}.dcm")
    command = [sys.executable, "-m", "dataset_scripts.corpus", str(archive), "--output", str(output)]
    started = time.perf_counter()
    subprocess.run([*command, "--num_proc", "2"], capture_output=True, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
