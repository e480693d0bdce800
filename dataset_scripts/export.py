"""A labelled data set as Parquet with its pictures and a card: `datasets.load_dataset` opens it without code.

    python -m dataset_scripts.export cmmd --data-dir DIR --output FOLDER
    python -m dataset_scripts.export cmmd --data-dir DIR --push-to-hub OWNER/NAME

Without --task every image is exported, with a label column for each definition and the official splits; with it the
images that have a label of the task, in its splits. Refused where a licence forbids passing the data on. A folder is
written whole or not at all. Research use only.
"""

import argparse
import logging
import os
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.errors import HfHubHTTPError

from .benchmark_builder import DEFAULT, BenchmarkBuilder, BenchmarkConfig
from .benchmark_card import make_card
from .benchmark_index import TASKS
from .benchmarks import BENCHMARKS, get_benchmark
from .push_export import CARD, DATA, push_export

SHARD_SIZE = "500MB"
FIELDS = [
    each for each in fields(BenchmarkConfig) if each.name not in {of.name for of in fields(datasets.BuilderConfig)}
]


def export(
    name: str,
    data_dir: str | Path,
    output: str | Path,
    task: str | None = None,
    *,
    num_proc: int = 1,
    place: str | None = None,
    **settings: Any,
) -> Path:
    """Writes the folder `output`: data/*.parquet and README.md; returns it.

    place: as what the card opens it; the folder's name where None. settings: fields of `BenchmarkConfig`.

    Raises ValueError where the data set may not be passed on or `output` is there already, and as `BenchmarkBuilder`.
    """
    output = Path(output)
    check_sharing(name)
    if output.exists():
        raise ValueError(f"{output}: exists already; give a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        builder = BenchmarkBuilder(
            cache_dir=str(Path(temporary) / "cache"),
            dataset_name=name,
            config_name=task or DEFAULT,
            data_dir=str(data_dir),
            **settings,
        )
        built, folder = Path(temporary) / "built", Path(temporary) / "export"
        builder.download_and_prepare(str(built), file_format="parquet", num_proc=num_proc, max_shard_size=SHARD_SIZE)
        (folder / DATA).mkdir(parents=True)
        for split in builder.info.splits:  # without the notes that lie beside
            shards = sorted(built.glob(f"*-{split}*.parquet"))
            for number, shard in enumerate(shards):
                os.rename(shard, folder / DATA / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
        left_out = Counter(builder.left_out) + Counter(each["reason"] for each in builder.refused())
        (folder / CARD).write_text(make_card(builder, folder / DATA, left_out, place or output.name))
        os.rename(folder, output)
    return output


def check_sharing(name: str) -> None:
    """Raises ValueError, with the reason, where a data set may not be passed on."""
    if reason := get_benchmark(name).no_sharing:
        raise ValueError(
            f"{name} is not exported: {reason}. For your own use read it where it lies, after import "
            f"dataset_scripts.benchmarks: datasets.load_dataset({name!r}, data_dir=...)"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dataset_scripts.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help=f"data set: {', '.join(BENCHMARKS)}")
    parser.add_argument("--data-dir", "--data_dir", type=Path, required=True, help="its folder as downloaded")
    parser.add_argument("--output", type=Path, help="new folder")
    parser.add_argument("--push-to-hub", "--push_to_hub", metavar="OWNER/NAME", help="made where it does not exist")
    parser.add_argument("--public", action="store_true", help="on the Hub for everybody (default: only with access)")
    parser.add_argument("--task", choices=TASKS, help="only images with a label of it, in train, validation and test")
    for each in FIELDS:
        spellings = dict.fromkeys((f"--{each.name.replace('_', '-')}", f"--{each.name}"))
        if each.type is bool:
            parser.add_argument(*spellings, action="store_true")
        else:
            kind = str if each.default is None else type(each.default)
            parser.add_argument(*spellings, type=kind, default=each.default, help="default %(default)s")
    parser.add_argument(
        "--num-proc", "--num_proc", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    options = parser.parse_args(arguments)
    if not (options.output or options.push_to_hub):
        parser.error("give --output, --push-to-hub or both")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings = {each.name: getattr(options, each.name) for each in FIELDS}
    try:
        with ExitStack() as stack:
            output = options.output or Path(stack.enter_context(tempfile.TemporaryDirectory())) / options.name
            place = options.push_to_hub or options.output.name
            export(
                options.name,
                options.data_dir,
                output,
                options.task,
                num_proc=options.num_proc,
                place=place,
                **settings,
            )
            if options.output:
                print(options.output)
            if options.push_to_hub:
                print(push_export(output, options.push_to_hub, public=options.public))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise SystemExit(f"export: {error}") from error


if __name__ == "__main__":
    main()
