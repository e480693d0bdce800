"""Makes the study's models files of a release: `python -m training.release STUDY --output DIR`.

Of each published configuration the encoder of one seed, a complete Hub folder: its figures go into its card, and the
folder into one archive. `make release` runs the study for it first. Research use only.
"""

import argparse
import gzip
import hashlib
import io
import shutil
import sys
import tarfile
from pathlib import Path

from training.evaluation.run_files import write_whole
from training.studies.design import FULL, PLAIN, SIZES, configurations

from .chain import Chain
from .study import Run, Study

CHECKPOINTS = {"mammodino-phantom-small": FULL, "dinov2-phantom-small": PLAIN}
TASKS = ("density", "lesion", "cancer")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.release", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="output of training.study")
    parser.add_argument("--size", choices=SIZES, default="evening", help="of the study (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the study's seeds (default 0)")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder of the archives (default dist)")
    parser.add_argument("--model_cards", type=Path, help="folder in which to put a copy of each card")
    options = parser.parse_args(arguments)

    study = Study(options.study, SIZES[options.size], options.size, None)
    runs = {each.name: Run(study, each, options.seed) for each in configurations()}
    folders = {name: runs[configuration].encoder for name, configuration in CHECKPOINTS.items()}
    if missing := [runs[CHECKPOINTS[name]].name for name, folder in folders.items() if not folder.is_dir()]:
        raise SystemExit(f"release: {options.study} lacks {'; '.join(missing)}; run training.study with that --output")

    chain, python, results = Chain("release"), sys.executable, options.study / "release_probe.json"
    probe = [python, "-m", "training.probe", "--models", *(f"{name}={folder}" for name, folder in folders.items())]
    probe += ["--labels", study.labels("train"), "--test_labels", study.labels("test"), "--tasks", *TASKS]
    chain.run(*probe, "--slices_per_volume", study.size.slices_per_volume, "--output", results)
    for name, folder in folders.items():
        card = [python, "-m", "training.card", folder, "--results", results, "--dataset", "phantom"]
        chain.run(*card, "--model", name)
        archive = pack(folder, name, options.output)
        content = archive.read_bytes()
        print(f"{hashlib.sha256(content).hexdigest()}  {archive}  {len(content) / 2**20:.1f} MiB")
        if options.model_cards:
            shutil.copyfile(folder / "README.md", options.model_cards / f"{name}.md")


def pack(folder: Path, name: str, output: Path) -> Path:
    """OUTPUT/NAME.tar.gz of a Hub folder, without times and owners: the same folder gives the same bytes."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            about = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
            about.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(about, file)
    path = output / f"{name}.tar.gz"
    write_whole(path, lambda temporary: temporary.write_bytes(packed.getvalue()))
    return path


if __name__ == "__main__":
    main()
