"""Remakes the published checkpoints: `python -m training.release --output runs/release`, which `make release` calls.

Phantom archives -> corpus -> a pretraining each -> probe -> card -> one archive each, in OUTPUT/files. What is done is
not done again. On the same machine and versions the weights are the same to the last digit. Research use only.
"""

import argparse
import gzip
import hashlib
import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

from .chain import Chain
from .evaluation.study.design import FULL, PLAIN, configurations

PATIENTS = {"train": (1000, 0), "test": (1000, 1_000_000)}  # how many, and the number of the first
RECIPE, STEPS = "study_small", 600
TASKS = ("density", "lesion", "cancer")
CHECKPOINTS = {"mammodino-phantom-small": FULL, "dinov2-phantom-small": PLAIN}  # configurations of the study


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.release", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/release"))
    parser.add_argument("--model_cards", type=Path, help="folder in which to put a copy of each card")
    options = parser.parse_args(arguments)
    output, python, chain = options.output, sys.executable, Chain("release")
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # sums in one order
    output.mkdir(parents=True, exist_ok=True)

    for part, (count, first) in PATIENTS.items():
        if not (output / part / "labels.csv").is_file():  # written last
            phantom = [python, "-m", "dataset_scripts.phantom", "--output", output / part, "--num_patients", count]
            chain.run(*phantom, "--first_patient", first, "--num_proc", os.cpu_count() or 1)
    if not (output / "corpus").exists():
        corpus = [python, "-m", "dataset_scripts.corpus", output / "train", "--output", output / "corpus"]
        chain.run(*corpus, "--collection", "phantom")
    overrides = {each.name: each.overrides() for each in configurations()}
    for name, configuration in CHECKPOINTS.items():
        if not (output / name / "encoder").exists():
            pretrain = [python, "-m", "training.pretrain", RECIPE, "--corpus", output / "corpus"]
            pretrain += ["--output_dir", output / name, "--max_steps", STEPS, "--report_to", "none"]
            chain.run(*pretrain, *overrides[configuration])
    probe = [python, "-m", "training.probe", "--output", output / "probe.json", "--tasks", *TASKS]
    probe += ["--models", *(f"{name}={output / name / 'encoder'}" for name in CHECKPOINTS)]
    probe += ["--labels", output / "train" / "labels.csv", "--test_labels", output / "test" / "labels.csv"]
    chain.run(*probe, "--slices_per_volume", 1)
    for name in CHECKPOINTS:
        encoder = output / name / "encoder"
        card = [python, "-m", "training.card", encoder, "--results", output / "probe.json", "--dataset", "phantom"]
        chain.run(*card, "--model", name)
        archive = pack(encoder, name, output / "files")
        print(
            f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive}  {archive.stat().st_size / 2**20:.1f} MiB"
        )
        if options.model_cards:
            shutil.copyfile(encoder / "README.md", options.model_cards / f"{name}.md")


def pack(folder: Path, name: str, output: Path) -> Path:
    """OUTPUT/NAME.tar.gz of a Hub folder, without times and owners: the same folder gives the same bytes."""
    output.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            about = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
            about.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(about, file)
    temporary = output / f".{name}.tmp"
    temporary.write_bytes(packed.getvalue())
    os.replace(temporary, output / f"{name}.tar.gz")
    return output / f"{name}.tar.gz"


if __name__ == "__main__":
    main()
