"""Is a labeled data set whole? What is on disk against what was published, and against its own metadata.

    python -m dataset_scripts.benchmarks.verify NAME --data-dir DIR

Exit status 1 where there are faults.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modeling_mammodino.image_io import DICOM_SUFFIXES, IMAGE_SUFFIXES
from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from modeling_mammodino.tools.walk import walk

from . import BENCHMARKS
from .index import Benchmark
from .task import files_there, located, open_benchmark

SHOWN = 5


@dataclass(frozen=True)
class BenchmarkReport:
    """What was compared, by the names of `Benchmark.published`.

    Attributes:
        counts: what is here, of what the metadata files that are here can tell.
        images: in the index.
        missing: images whose file is not here, by path, else by image_id.
        shared: paths that more than one image has.
        extra: image files that are not in the index, by path; masks, crops and other parts are among them.
    """

    benchmark: Benchmark
    data_dir: Path
    counts: dict[str, int]
    images: int
    missing: list[str]
    shared: list[str]
    extra: list[str]

    @property
    def faults(self) -> list[str]:
        """A line each; empty where the data set is whole as far as it is there."""
        faults = [
            f"{name}: {self.counts[name]} here, {published} published"
            for name, published in self.benchmark.published.items()
            if self.counts.get(name, published) != published
        ]
        if len(self.missing) == self.images:
            faults.append(f"none of the {self.images} image files is here: {_first(self.missing)}")
        elif self.missing:
            faults.append(f"{len(self.missing)} of {self.images} image files are missing: {_first(self.missing)}")
        if self.shared:
            faults.append(f"{len(self.shared)} files are those of several images: {_first(self.shared)}")
        return faults

    @property
    def lines(self) -> list[str]:
        """What is as it should be, and what is no fault but good to know."""
        published = self.benchmark.published
        equal = [name for name in published if self.counts.get(name) == published[name]]
        unknown = [name for name in published if name not in self.counts]
        beside = [f"{name} {count}" for name, count in self.counts.items() if name not in published]
        lines = [f"{self.benchmark.title}: {len(equal)} of {len(published)} published counts are found here"]
        if unknown:
            lines.append(f"{len(unknown)} are of metadata files that are not here: {_first(unknown)}")
        if beside:
            lines.append(f"{len(beside)} more were counted: {_first(beside)}")
        lines.append(f"{self.images - len(self.missing)} of {self.images} image files of the index are here")
        if self.extra:
            lines.append(f"{len(self.extra)} image files are not in the index: {_first(self.extra)}")
        return [*lines, *(f"note: {note}" for note in self.benchmark.notes)]


def verify_benchmark(benchmark: str | Benchmark, data_dir: str | Path) -> BenchmarkReport:
    """Read the metadata, look for every image and, where only headers tell which file is which, read those.

    Raises ValueError for an unknown name or metadata that cannot be read as such, OSError where there are none.
    """
    data_dir = Path(data_dir).absolute()
    if isinstance(benchmark, str):
        benchmark = open_benchmark(benchmark, data_dir)
    counts = benchmark.count(data_dir)
    index = located(benchmark, data_dir)
    is_there = files_there(index)
    paths = index["path"].fillna("")
    found = paths[is_there]
    root = data_dir if data_dir.is_dir() else data_dir.parent
    known = {os.path.normpath(file) for file in index["file"][is_there]}
    extra = [path.relative_to(root).as_posix() for path in _image_files(root) if os.path.normpath(path) not in known]
    return BenchmarkReport(
        benchmark=benchmark,
        data_dir=data_dir,
        counts=counts,
        images=len(index),
        missing=paths.where(paths != "", index["image_id"])[~is_there].tolist(),
        shared=found[found.duplicated()].unique().tolist(),
        extra=sorted(extra),
    )


def _image_files(data_dir: Path) -> Iterator[Path]:
    for path in map(Path, walk(data_dir).files):
        if path.suffix.lower().strip() in (*DICOM_SUFFIXES, *IMAGE_SUFFIXES):
            yield path


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m dataset_scripts.benchmarks.verify", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("name", help=f"data set: {', '.join(BENCHMARKS)}")
    parser.add_argument("--data-dir", "--data_dir", type=user_path, required=True, help="its folder as downloaded")
    options = parser.parse_args(arguments)
    with command_line("verify"):
        report = verify_benchmark(options.name, options.data_dir)
    for line in (*report.lines, *report.faults):
        print(line)
    if faults := len(report.faults):
        raise SystemExit(f"verify: {faults} fault{'s' * (faults > 1)} in {options.data_dir}")


if __name__ == "__main__":
    main()
