"""The command `mammodino embed`: features of files in a Parquet table (`feature_table`), here or on an engine that
shares out a large archive to processes, Slurm or Ray. Research use only."""

import hashlib
import json
import logging
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .. import __version__
from ..dicom import Instance, group_files, instance_of, keyed_hash
from ..image_processing_mammodino import MammoDinoImageProcessor
from .command import HASH_KEY_VARIABLE, SHIPPED, add_model_option, show_progress, user_path
from .convert import load_encoder, own_processor, processor_settings
from .engine import ENGINES, Stage, die_with_parent, parse_arguments, progress_bar, run_stages
from .feature_table import Parts, require_pyarrow, stamp, unfinished, write_refused, write_table
from .features import MANY_FILES, POOLS, TOKENS, FileEmbeddings, embed_files, find_files, pool_volumes
from .files import Lines, check_output, read_lines, readable, write_json, write_lines

logger = logging.getLogger(__name__)

MAX_DEFAULT_WORKERS = 8
IMAGES_PER_SHARE = 2000  # of --engine


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the SHA-256 of names, types, shapes and values of a model's parameters and buffers, as in memory, in order
    of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def add_command(commands) -> None:
    """Add the subcommand `embed`; `commands` is argparse's action of subparsers."""
    parser = commands.add_parser(
        "embed",
        help="write features of mammograms and tomosynthesis to a Parquet file",
        description="Writes features of mammograms and tomosynthesis slices to a Parquet file, one row an image. The "
        "columns path and volume hold paths as they are given: where a folder's name is private, name files from "
        "within it. Research use only.",
    )
    parser.add_argument(
        "paths", nargs="+", type=user_path, metavar="PATH", help="DICOM or image files, or folders of them"
    )
    add_model_option(parser)
    parser.add_argument("--output", type=user_path, required=True, help="Parquet file to write, NAME.parquet; with "
                        "--engine a folder of them")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it exists")
    parser.add_argument("--pool", choices=POOLS, default="class", help="class token, tissue-weighted mean of patch "
                        "tokens, or both side by side (default class)")  # fmt: skip
    parser.add_argument("--patches", action="store_true", help="in place of a pool the features of all patches, row by "
                        "row; megabytes an image")  # fmt: skip
    parser.add_argument("--pool_volumes", action="store_true", help="one row a volume: the mean over its slices")
    parser.add_argument("--slices_per_volume", type=int, help="evenly spaced slices of a volume, 0 for all (default: "
                        "as the checkpoint's image processor says)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=8, help="images encoded at a time (default 8)")
    parser.add_argument("--num_workers", type=int, help="processes that read and render; 0: none beside the encoder's "
                        f"(default: one a core up to {MAX_DEFAULT_WORKERS}, on the CPU 0)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the encoder")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the checkpoint brings")
    parser.add_argument("--engine", choices=ENGINES, help="share out the files to processes of this machine, Slurm or "
                        "Ray (default: one process, one table)")  # fmt: skip
    parser.add_argument("--num_proc", type=int, help="shares of --engine at a time (default: one a GPU, "
                        f"on the CPU one a core up to {MAX_DEFAULT_WORKERS})")  # fmt: skip
    parser.add_argument("--engine_args", nargs="+", default=[], metavar="NAME=VALUE", help="of datatrove's executor")
    parser.set_defaults(run=run)


def run(options: Namespace) -> None:
    require_pyarrow()
    output: Path = options.output
    if options.engine:
        check_folder(output, options.overwrite)
    else:
        check_output(output, ".parquet", ".pq")
        if output.exists() and not options.overwrite:
            raise FileExistsError(f"{output} exists; give another --output, or --overwrite")
    files, ignored, unlisted = find_files(options.paths)
    if ignored:
        logger.info("ignored: %s", ", ".join(f"{count} {suffix}" for suffix, count in ignored.most_common()))
    if not files:
        raise ValueError(f"{', '.join(map(str, options.paths))}: no DICOM file or image found")
    if options.engine:
        found = embed_archive(files, unlisted, options)
        if found is None:
            print(f"sent off; {output} is complete when it is there")
            return
        rows, refused = found
    else:
        encoder = _prepare(options, find_device(options.device))
        rows, refused = write_features(files, output, *encoder, options, unlisted)
    refused_path = output.with_suffix(".refused.csv")
    if not rows:
        raise ValueError(f"none of {len(files)} files could be used: the reasons are in {refused_path}")
    print(f"{output}: {rows} rows of {len(files) + len(unlisted) - len(refused)} files; {len(refused)} refused"
          + (f", see {refused_path}" if refused else ""))  # fmt: skip


def _prepare(
    options: Namespace, device: torch.device
) -> tuple[PreTrainedModel, MammoDinoImageProcessor, dict[str, str]]:
    """Open the encoder on a device: return it, its image processor, and what features of it come from."""
    model, image_processor = open_encoder(options.model, options.trust_remote_code)
    about = provenance(options, model, image_processor)
    return model.to(device=device, dtype=getattr(torch, options.dtype)), image_processor, about  # type: ignore[call-arg]


def write_features(
    files: Sequence[Path],
    output: Path,
    model: PreTrainedModel,
    image_processor: MammoDinoImageProcessor,
    about: dict[str, str],
    options: Namespace,
    unlisted: Mapping[str, str] = MappingProxyType({}),
    volumes: Sequence[Sequence[int]] | None = None,
) -> tuple[int, dict[str, str]]:
    """Write the table of some files and the list of the refused ones, or go on with them; return the number of rows,
    and what was refused, with reasons.

    unlisted: folders that were refused before. volumes: places in `files` of each volume's, where they are known.
    """
    num_workers = options.num_workers
    if num_workers is None:  # on the CPU the encoder is the slower part, and takes all cores
        num_workers = 0 if model.device.type == "cpu" else min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    refused = dict(unlisted)
    with Parts.open(output, {**about, **_key_check(), "files": stamp(files)}) as parts:
        results = embed_files(
            files,
            model,
            image_processor,
            pool=TOKENS if options.patches else options.pool,
            batch_size=options.batch_size,
            slices_per_volume=options.slices_per_volume,
            num_workers=num_workers,
            skip=parts.num_files,
            hash_key=_hash_key() or None,
            volumes=volumes,
        )
        parts.keep(_watch(results, len(files), parts.num_files, is_shown=not options.engine))
        results = parts.read(refused)
        rows = write_table(pool_volumes(results) if options.pool_volumes else results, output, about)
        write_refused(output.with_suffix(".refused.csv"), refused)
    return rows, refused


def _hash_key() -> bytes:
    return os.environ.get(HASH_KEY_VARIABLE, "").encode()


@dataclass(frozen=True)
class Archive:
    """An archive that is embedded on an engine: what all its tasks know, and the folder in which it goes on.

    Attributes:
        options: of the command.
        about: what the features come from; a task that finds another checkpoint or key refuses.
        files: `stamp` of the listing.
    """

    options: Namespace
    about: dict[str, str]
    files: str
    folder: Path

    @property
    def listing(self) -> Path:
        return self.folder / "files.jsonl"

    @property
    def shares(self) -> Path:
        """Whole volumes of some IMAGES_PER_SHARE images: a line a share, of the numbers of each volume's files."""
        return self.folder / "shares.jsonl"

    def instances(self, task: int, tasks: int) -> Path:
        return self.folder / "headers" / f"{task:05d}-of-{tasks:05d}.jsonl"

    def table(self, share: int) -> Path:
        return self.folder / "table" / f"part-{share:05d}.parquet"

    def record(self, share: int) -> Path:
        """Tells that a share is done, its rows, and what was refused."""
        return self.folder / "done" / f"{share:05d}.json"


@dataclass
class ReadPlaces:
    """A task reads of every n-th file which volume it belongs to."""

    archive: Archive

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        die_with_parent()
        key = self.archive.files.encode()  # the same in all tasks; these hashes stay in the folder
        files = map(Path, read_lines(self.archive.listing, rank, world_size))
        write_lines(self.archive.instances(rank, world_size), (instance_of(file, key) for file in files))


@dataclass
class ShareOut:
    """The one task that knows all files' places: whole volumes in the order of their first files make shares."""

    archive: Archive
    tasks: int

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        of_tasks = [read_lines(self.archive.instances(task, self.tasks)) for task in range(self.tasks)]
        in_turn = chain.from_iterable(zip_longest(*of_tasks, fillvalue=...))
        found = [each and Instance(*map(_interned, each)) for each in in_turn if each is not ...]
        shares: list[list[list[int]]] = []
        images = IMAGES_PER_SHARE
        for volume in group_files(found):
            if images >= IMAGES_PER_SHARE:
                shares.append([])
                images = 0
            shares[-1].append(volume)
            images += sum(instance.num_slices if (instance := found[place]) else 1 for place in volume)
        write_lines(self.archive.shares, shares)


def _interned(value: Any) -> Any:
    return sys.intern(value) if isinstance(value, str) else value


@dataclass
class EmbedShares:
    """A task embeds every n-th share, but for those that are done. Tasks of one machine take its GPUs in turn."""

    archive: Archive
    at_a_time: int  # on one machine

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        die_with_parent()
        archive, options = self.archive, self.archive.options
        mine = range(rank, sum(1 for _ in archive.shares.open()), world_size)
        if all(archive.record(share).exists() for share in mine):
            return
        device = find_device(options.device)
        if device.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // self.at_a_time))
        elif device.index is None:  # Slurm shows each task its own
            device = torch.device(device.type, rank % torch.accelerator.device_count())
        model, image_processor, about = _prepare(options, device)
        if about | _key_check() != archive.about:
            raise ValueError(f"{options.model} or ${HASH_KEY_VARIABLE}: not what it was when the run began")
        listing, shares = Lines(archive.listing), Lines(archive.shares)
        for share in mine:
            if archive.record(share).exists():
                continue
            numbers = sorted(chain.from_iterable(shares[share]))
            places = {number: place for place, number in enumerate(numbers)}
            volumes = [[places[number] for number in volume] for volume in shares[share]]
            files = [Path(listing[number]) for number in numbers]
            table = archive.table(share)
            table.parent.mkdir(exist_ok=True)
            rows, refused = write_features(files, table, model, image_processor, about, options, volumes=volumes)
            write_json(archive.record(share), {"rows": rows, "refused": refused})


@dataclass
class Gather:
    """The last task, when all shares are done: the tables become the data set."""

    archive: Archive
    unlisted: dict[str, str]

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        output: Path = self.archive.options.output
        records = [json.loads(path.read_text()) for path in sorted(self.archive.record(0).parent.glob("[0-9]*.json"))]
        refused = self.unlisted | dict(chain.from_iterable(record["refused"].items() for record in records))
        tables = self.archive.table(0).parent
        for path in tables.glob("*.refused.csv"):
            path.unlink()
        write_refused(output.with_suffix(".refused.csv"), refused)
        rows = sum(record["rows"] for record in records)
        write_json(self.archive.folder / "all.json", {"rows": rows, "refused": refused})
        if rows and tables.exists():  # else a Gather that was killed has moved them already
            if output.exists():  # was asked for with --overwrite, and holds tables alone
                shutil.rmtree(output)
            tables.rename(output)


def embed_archive(
    files: Sequence[Path], unlisted: dict[str, str], options: Namespace
) -> tuple[int, dict[str, str]] | None:
    """Embed files on an engine; return the number of rows and what was refused, or None where jobs were sent off."""
    arguments = parse_arguments(options.engine, options.engine_args)
    options.output = options.output.absolute()
    if options.engine == "ray":
        if _hash_key():
            raise ValueError(f"--engine ray: nodes do not share ${HASH_KEY_VARIABLE}; take it out, or another engine")
        if not all(file.is_absolute() for file in files) or Path(options.model).is_dir() and options.model[0] != "/":
            raise ValueError("--engine ray: nodes do not share a working directory; give absolute paths")
    tasks = options.num_proc or torch.accelerator.device_count() or min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    about = provenance(options, *open_encoder(options.model, options.trust_remote_code)) | _key_check()
    files_stamp = stamp(files)
    with unfinished(
        options.output, {**about, "files": files_stamp}, lambda folder: (folder / "files.jsonl").exists()
    ) as folder:
        archive = Archive(
            Namespace(**{name: value for name, value in vars(options).items() if name != "run"}),
            about,
            files_stamp,
            folder,
        )
        if not archive.listing.exists():
            write_lines(archive.listing, map(str, files))
        readers = tasks if len(files) > MANY_FILES else 1
        stages = [
            Stage(f"headers-{readers}", ReadPlaces(archive), readers),
            Stage("shares", ShareOut(archive, readers), 1),
            Stage(
                f"embed-{tasks}",
                EmbedShares(archive, tasks if options.engine == "local" else 1),
                tasks,
                progress_bar("embed", "part", archive.record(0).parent, lambda: sum(1 for _ in archive.shares.open())),
            ),
            Stage("gather", Gather(archive, unlisted), 1),
        ]
        if archive.shares.exists():
            del stages[:2]
        if not run_stages(stages, options.engine, tasks, folder / "engine", arguments):
            return None
        found = json.loads((folder / "all.json").read_text())
    shutil.rmtree(folder)
    return found["rows"], found["refused"]


def _key_check() -> dict[str, str]:
    """Return what tells two keys apart and reveals neither."""
    return {"hash_key_check": keyed_hash("embed", _hash_key())}


def check_folder(output: Path, overwrite: bool) -> None:
    """See to it that a data set can be written as a folder. Raises FileExistsError where something is in its place."""
    if output.exists() and not (
        overwrite and output.is_dir() and all(path.suffix == ".parquet" for path in output.iterdir())
    ):
        raise FileExistsError(f"{output} exists; give another --output, or --overwrite for a folder of Parquet files")
    output.parent.mkdir(parents=True, exist_ok=True)


def _watch(
    results: Iterable[FileEmbeddings], num_files: int, num_done: int, is_shown: bool
) -> Iterator[FileEmbeddings]:
    """Yield the results, with progress on stderr; refused files are logged."""
    images = refused = 0
    with show_progress(total=num_files, initial=num_done, desc="embed", unit="file", disable=not is_shown) as progress:
        for result in results:
            if result.refused is not None:
                logger.warning("refused: %s", readable(result.refused))
                refused += 1
            images += len(result.slices)
            progress.set_postfix(images=images, refused=refused, refresh=False)
            progress.update()
            yield result


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # not a device, or one that is not here
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def open_encoder(name: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, MammoDinoImageProcessor]:
    """Open encoder, for inference, and image processor of a folder or Hub id; of a classifier its encoder.

    With `trust_remote_code` also what brings its own code, where that takes a `tissue_mask`. Raises ValueError for
    another kind of checkpoint and for weights that are missing, OSError where there is none.
    """
    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise FileNotFoundError(f"{name}: no such folder, and no Hub id (OWNER/NAME)") from error
    if not trust_remote_code:
        if (image_processor := own_processor(processor_settings(name))) is None:
            raise ValueError(
                f"{name}: has no preprocessor_config.json of a MammoDinoImageProcessor, which the features depend on; "
                "give a MammoDINO encoder's folder or Hub id, `mammodino convert` makes one from DINOv2's"
            )
        return load_encoder(name), image_processor
    model, loading = AutoModel.from_pretrained(name, trust_remote_code=True, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{name}: {len(missing)} weights are missing, {missing[0]} first; fetch or convert it again")
    return model.eval(), AutoImageProcessor.from_pretrained(name, trust_remote_code=True)


def provenance(options: Namespace, model: PreTrainedModel, image_processor: MammoDinoImageProcessor) -> dict[str, str]:
    """Return the table's metadata: what the features come from."""
    slices = options.slices_per_volume
    return {
        "notice": "Research use only: not a medical device.",
        "model": SHIPPED.name if options.model == str(SHIPPED) else options.model,
        "weights_sha256": weights_sha256(model),
        "model_revision": getattr(model.config, "_commit_hash", None) or "",
        "mammodino_version": __version__,
        "image_processor": json.dumps(image_processor.to_dict(), sort_keys=True),
        "pool": TOKENS if options.patches else options.pool,
        "grid": json.dumps([side // image_processor.patch_size for side in image_processor.render_settings.canvas]),
        "pool_volumes": json.dumps(options.pool_volumes),
        "slices_per_volume": str(image_processor.slices_per_volume if slices is None else slices),
        "dtype": options.dtype,
    }
