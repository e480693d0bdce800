"""A labeled data set as Parquet with its images and a card: `datasets.load_dataset` opens it without code.

    python -m dataset_scripts.benchmarks.export cmmd --data-dir DIR --output FOLDER
    python -m dataset_scripts.benchmarks.export cmmd --data-dir DIR --push-to-hub OWNER/NAME

Without --task every image is exported, with a label column for each definition and the official splits; with it the
images that have a label of the task, in its splits. Refused where a license forbids passing the data on. Writing a
folder is atomic. On the Hub an export is private unless --public is given. Research use only.
"""

import argparse
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
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

import modeling_mammodino
from modeling_mammodino.tools.command import command_line
from modeling_mammodino.tools.files import atomic_folder

from . import BENCHMARKS, get_benchmark
from .builder import DEFAULT, BenchmarkBuilder, BenchmarkConfig
from .index import SPLITS, TASKS

TEMPLATE = Path(__file__).parents[2] / "model_cards" / "dataset_template.md"
CREATIVE_COMMONS = re.compile(r"CC0 1\.0|CC BY(-NC)?(-SA|-ND)? [1-4]\.0")
CARD, DATA = "README.md", "data"
SHARD_SIZE = "500MB"
FILES_A_COMMIT = 20  # some 10 GB; the Hub limits commits an hour
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
        place=place,
        splits={split: _counts(of) for split, of in split_rows.items()},
        split_rule=_split_rule(builder),
        shared_patients=int((rows.groupby("patient_id")["split"].nunique() > 1).sum()),
        volume_rule=_volume_rule(builder.config),
        has_boxes=any(boxes is not None and len(boxes) for boxes in rows["boxes"]),
        definitions=builder.definitions,
        class_counts={
            name: [[int((of[name] == place).sum()) for of in split_rows.values()] for place in range(len(each.classes))]
            for name, each in builder.definitions.items()
        },
        left_out=left_out,
    )


def license_id(license: str) -> str:
    """Return the Hub's identifier of a Creative Commons license, such as cc-by-nc-4.0 of CC BY-NC 4.0; else "other"."""
    return license.lower().replace(" ", "-") if CREATIVE_COMMONS.fullmatch(license) else "other"


def _counts(rows: pd.DataFrame) -> dict[str, Any]:
    return {"rows": len(rows)} | {f"{name}s": rows[f"{name}_id"].nunique() for name in ("image", "breast", "patient")}


def _volume_rule(config: BenchmarkConfig) -> str:
    evenly = f"up to {config.slices_per_volume} slices, evenly spaced" if config.slices_per_volume else "all slices"
    return f"the slices that have a box, and where it has none {evenly}" if config.boxed_slices else evenly


def _split_rule(builder: BenchmarkBuilder) -> str:
    official = builder.official
    ours = [split for split in ("validation", "test") if split not in official]
    if builder.config.name == DEFAULT:
        return "Splits are official." if official else "There is no official split: all is in train; hold out patients."
    of_data_set = f"Official: {', '.join(official)}. " if official else "There is no official split. "
    if not ours:
        return of_data_set.strip()
    return f"{of_data_set}Held out here by patient, stratified, with seed {builder.config.seed}: {' and '.join(ours)}."


def push_export(folder: str | Path, repo_id: str, *, public: bool = False, token: str | None = None) -> str:
    """Sends data/*.parquet, then the card; returns the repository's address.

    public: else the repository must be private; it is made so where it does not exist, and a public one is refused.

    Raises ValueError where the repository is public or holds Parquet files of another export; ConnectionError where the
    Hub is out of reach; huggingface_hub's HfHubHTTPError where it refuses.
    """
    api = HfApi(token=token, library_name="mammodino")
    try:
        return _push(api, Path(folder), repo_id, public)
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):  # says itself what is wrong
            raise
        raise ConnectionError(f"the Hub cannot be reached ({error}); check the network and HF_ENDPOINT") from error


def _push(api: HfApi, folder: Path, repo_id: str, public: bool) -> str:
    repo = api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
    repo_id = repo.repo_id
    if not public and not api.repo_info(repo_id, repo_type="dataset").private:
        raise ValueError(f"{repo_id} exists and is public; nothing was sent. Make it private there, or pass --public")
    ours = {f"{DATA}/{path.name}": path for path in sorted((folder / DATA).glob("*.parquet"))}
    there = _parquet_files(api, repo_id)
    additions = {name: CommitOperationAdd(name, path) for name, path in ours.items()}
    # a card reads by a pattern: the files of two exports would be read as one
    others = [
        name for name, sha256 in there.items() if name not in ours or additions[name].upload_info.sha256.hex() != sha256
    ]
    if others:
        raise ValueError(
            f"{repo_id} holds {len(others)} files of another export, {min(others)} first; nothing was sent. Push to "
            "another name, or delete them there"
        )
    missing = [addition for name, addition in additions.items() if name not in there]
    for start in range(0, len(missing), FILES_A_COMMIT):
        _commit(api, repo_id, missing[start : start + FILES_A_COMMIT], "Add rows")
    _commit(api, repo_id, [CommitOperationAdd(CARD, folder / CARD)], "Add card")
    return str(repo)


def _commit(api: HfApi, repo_id: str, additions: list[CommitOperationAdd], message: str) -> None:
    api.create_commit(repo_id, additions, commit_message=message, repo_type="dataset")


def _parquet_files(api: HfApi, repo_id: str) -> dict[str, str | None]:
    """sha256 of each, by path."""
    entries = api.list_repo_tree(repo_id, repo_type="dataset", recursive=True)
    return {each.path: each.lfs.sha256 if each.lfs else None for each in entries if each.path.endswith(".parquet")}


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
            left_out = Counter(builder.left_out) + Counter(each["reason"] for each in builder.refused())
        (folder / CARD).write_text(make_card(builder, data, left_out, place or output.name))
    return output


def check_sharing(name: str) -> None:
    """Raise ValueError, with the reason, where a data set may not be passed on."""
    if reason := get_benchmark(name).no_sharing:
        raise ValueError(
            f"{name} is not exported: {reason}. For your own use read it where it lies, after import "
            f"dataset_scripts.benchmarks: datasets.load_dataset({name!r}, data_dir=...)"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m dataset_scripts.benchmarks.export",
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
