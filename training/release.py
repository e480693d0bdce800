"""Package the study's models as files of a release: `python -m training.release STUDY --output DIR`.

Of each published configuration the encoder of one seed, a complete Hub folder: its results go into its card, and the
folder into one archive. `make release` runs the study for it first. Research use only.
"""

import argparse
import gzip
import hashlib
import shutil
import tarfile
from pathlib import Path

from modeling_mammodino.tools.command import command_line, user_path
from modeling_mammodino.tools.files import atomic_file
from training.studies.design import FULL, PLAIN, SIZES, configurations

from .commands import run
from .demo import TASKS
from .study import Run, Study

CHECKPOINTS = {"mammodino-phantom-small": FULL, "dinov2-phantom-small": PLAIN}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.release", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=user_path, help="output of training.study")
    parser.add_argument("--size", choices=SIZES, default="evening", help="of the study (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the study's seeds (default 0)")
    parser.add_argument("--output", type=user_path, default=Path("dist"), help="folder of the archives (default dist)")
    parser.add_argument("--model_cards", type=user_path, help="folder in which to put a copy of each card")
    options = parser.parse_args(arguments)
    with command_line("release"):
        study = Study(options.study, SIZES[options.size], options.size, None)
        runs = {each.name: Run(study, each, options.seed) for each in configurations()}
        folders = {name: runs[configuration].encoder for name, configuration in CHECKPOINTS.items()}
        if missing := [runs[CHECKPOINTS[name]].name for name, folder in folders.items() if not folder.is_dir()]:
            raise ValueError(f"{study.output} lacks {'; '.join(missing)}; run training.study with that --output")
        results = study.output / "release_probe.json"
        run(
            "training.probe", "--models", *(f"{name}={folder}" for name, folder in folders.items()),
            "--labels", study.labels("train"), "--test_labels", study.labels("test"), "--tasks", *TASKS,
            "--slices_per_volume", study.size.slices_per_volume, "--output", results,
        )  # fmt: skip
        for name, folder in folders.items():
            run("training.card", folder, "--results", results, "--dataset", "phantom", "--model", name)
            archive = pack(folder, name, options.output)
            content = archive.read_bytes()
            print(f"{hashlib.sha256(content).hexdigest()}  {archive}  {len(content) / 2**20:.1f} MiB")
            if options.model_cards:
                shutil.copyfile(folder / "README.md", options.model_cards / f"{name}.md")


def pack(folder: Path, name: str, output: Path) -> Path:
    """Write OUTPUT/NAME.tar.gz of a Hub folder, without times and owners: the same folder gives the same bytes."""
    path = output / f"{name}.tar.gz"
    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for member in sorted(each for each in folder.rglob("*") if each.is_file()):
            about = tarfile.TarInfo(f"{name}/{member.relative_to(folder).as_posix()}")
            about.size = member.stat().st_size
            with member.open("rb") as content:
                archive.addfile(about, content)
    return path


if __name__ == "__main__":
    main()
