"""A labeled data set as Parquet with its images and a card: `datasets.load_dataset` opens it without code.

    python -m dataset_scripts.benchmarks.export cmmd --data-dir DIR --output FOLDER
    python -m dataset_scripts.benchmarks.export cmmd --data-dir DIR --push-to-hub OWNER/NAME

Without --task every image is exported, with a label column for each definition and the official splits; with it the
images that have a label of the task, in its splits. Refused where a license forbids passing the data on. Writing a
folder is atomic. On the Hub an export is private unless --public is given. Research use only.
"""

import argparse
import hashlib
import logging
import os
import re
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pandas as pd

import modeling_mammodino
from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from modeling_mammodino.tools.files import atomic_folder
from modeling_mammodino.tools.privacy import without_private
from modeling_mammodino.tools.publish import size_category, upload

from . import BENCHMARKS, get_benchmark
from .builder import DEFAULT, BenchmarkBuilder, BenchmarkConfig
from .index import SPLITS, TASKS

TEMPLATE = Path(__file__).parents[2] / "model_cards" / "dataset_template.md"
CREATIVE_COMMONS = re.compile(r"CC0 1\.0|CC BY(-NC)?(-SA|-ND)? [1-4]\.0")
CARD, DATA = "README.md", "data"
SHARD_SIZE = "500MB"
FIELDS = [
    each for each in fields(BenchmarkConfig) if each.name not in {of.name for of in fields(datasets.BuilderConfig)}
]


def make_card(builder: BenchmarkBuilder, data: Path, left_out: dict[str, int], place: str) -> str:
    """Return the card of the Parquet files in `data`, whose rows it counts; `place` is the name that opens them."""
    columns = ["split", "image_id", "breast_id", "patient_id", "boxes", *builder.definitions]
    rows = pd.read_parquet(data, columns=columns)
    split_rows = {split: of for split in SPLITS if len(of := rows[rows["split"] == split])}
    template = jinja2.Template(TEMPLATE.read_text(), keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return template.render(
        benchmark=builder.benchmark,
        license_id=license_id(builder.benchmark.license),
        version=modeling_mammodino.__version__,
        size_category=size_category(len(rows)),
        place=place,
        splits={split: _counts(of) for split, of in split_rows.items()},
        config=builder.config,
        official=builder.official,
        shared_patients=int((rows.groupby("patient_id")["split"].nunique() > 1).sum()),
        has_boxes=any(boxes is not None and len(boxes) for boxes in rows["boxes"]),
        definitions=builder.definitions,
        class_counts={
            name: [[(of[name] == place).sum() for of in split_rows.values()] for place in range(len(each.classes))]
            for name, each in builder.definitions.items()
        },
        left_out=left_out,
    )


def license_id(license: str) -> str:
    """Return the Hub's identifier of a Creative Commons license, such as cc-by-nc-4.0 of CC BY-NC 4.0; else "other"."""
    return license.lower().replace(" ", "-") if CREATIVE_COMMONS.fullmatch(license) else "other"


def _counts(rows: pd.DataFrame) -> dict[str, Any]:
    return {"rows": len(rows)} | {f"{name}s": rows[f"{name}_id"].nunique() for name in ("image", "breast", "patient")}


def push_export(folder: str | Path, repo_id: str, *, public: bool = False, token: str | None = None) -> str:
    """Send data/*.parquet, then the card, and return the repository's address.

    public: else the repository must be private; it is made so where it does not exist, and a public one is refused.

    Raises as `upload`; ValueError, too, where the repository holds Parquet files of another export.
    """
    parquet: dict[str, tuple[Path, str]] = {}
    for path in sorted((Path(folder) / DATA).glob("*.parquet")):
        with path.open("rb") as stream:
            parquet[f"{DATA}/{path.name}"] = path, hashlib.file_digest(stream, "sha256").hexdigest()
    commit = upload(
        repo_id,
        {CARD: Path(folder) / CARD},
        shards=parquet,
        shard_pattern="*.parquet",  # a card reads by a pattern: the files of two exports would be read as one
        repo_type="dataset",
        private=not public,
        commit_message="Add card",
        token=token,
    )
    return str(commit.repo_url)


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
    """Write the folder `output`, data/*.parquet and README.md, and return it.

    place: as what the card opens it; the folder's name where None. settings: fields of `BenchmarkConfig`.

    Raises ValueError where the data set may not be passed on, FileExistsError where `output` holds files already, else
    as `BenchmarkBuilder`.
    """
    check_sharing(name)
    output = Path(output)
    with atomic_folder(output) as folder:
        data = folder / DATA
        data.mkdir()
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            builder = BenchmarkBuilder(
                cache_dir=f"{scratch}/cache",
                dataset_name=name,
                config_name=task or DEFAULT,
                data_dir=str(data_dir),
                **settings,
            )
            built = Path(scratch) / "built"
            builder.download_and_prepare(
                str(built), file_format="parquet", num_proc=num_proc, max_shard_size=SHARD_SIZE
            )
            for split in builder.info.splits:  # without the notes that lie beside
                shards = sorted(built.glob(f"*-{split}*.parquet"))
                for number, shard in enumerate(shards):
                    os.rename(shard, data / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
            reasons = Counter(builder.left_out) + Counter(each["reason"] for each in builder.refused())
        (folder / CARD).write_text(make_card(builder, data, without_private(reasons), place or output.name))
    return output


def check_sharing(name: str) -> None:
    """Raise ValueError, with the reason, where a data set may not be passed on."""
    if reason := get_benchmark(name).no_sharing:
        raise ValueError(
            f"{name} is not exported: {reason}. For your own use read it where it lies, after import "
            f"dataset_scripts.benchmarks: datasets.load_dataset({name!r}, data_dir=...)"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        "python -m dataset_scripts.benchmarks.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help=f"data set: {', '.join(BENCHMARKS)}")
    parser.add_argument("--data-dir", "--data_dir", type=user_path, required=True, help="its folder as downloaded")
    parser.add_argument("--output", type=user_path, help="new folder")
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
    settings = {each.name: getattr(options, each.name) for each in FIELDS}
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with command_line("export"), ExitStack() as stack:
        output = options.output or Path(stack.enter_context(tempfile.TemporaryDirectory())) / options.name
        place = options.push_to_hub or options.output.name
        export(options.name, options.data_dir, output, options.task, num_proc=options.num_proc, place=place, **settings)
        if options.output:
            print(options.output)
        if options.push_to_hub:
            print(push_export(output, options.push_to_hub, public=options.public))


if __name__ == "__main__":
    main()
