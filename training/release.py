"""Publish a run's encoder: as a folder of the checkout, half as large, and as an archive of everything.

    python -m training.release RUN model_cards/NAME --results RESULTS.json --row NAME --beside untrained
    python -m training.release RUN model_cards/NAME --archive dist/NAME.tar.gz

RUN is the output_dir of training.pretrain. The folder is a complete one for the Hub: weights as float16, which open as
float32; of the package's code, links. Its card is the run's, with the results of training.leaderboard. What the card
that is there says of data, limits and license is written by hand, and stays. The archive holds the same card, the
encoder in full precision, and what the last checkpoint has beside it: student, heads, targets. Research use only.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file, save_file

from dataset_scripts.phantom.acquisition import acquire_2d
from dataset_scripts.phantom.anatomy import PhantomParameters
from dataset_scripts.phantom.archive import simulate_breast, write_archive
from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from modeling_mammodino.tools.figure import write_figure
from modeling_mammodino.tools.files import atomic_file, atomic_folder, write_json
from modeling_mammodino.tools.model_files import CARD, CONFIG, EVAL_RESULTS, PROCESSOR, RECIPE, check_folder, model_code
from modeling_mammodino.tools.visualize import inspect_file
from training.evaluation.reports import format_interval, markdown_table
from training.pretraining.checkpoints import list_checkpoints
from training.pretraining.export import FIGURE, ROOT

from .card import evaluation, index, section

WEIGHTS, SEEN = "model.safetensors", "seen.png"
BY_HAND = ("Data", "Limits", "License")
TRIED_BREASTS = 8
OF_ONE_RUN = "optimizer.safetensors"  # of a checkpoint: no other run takes it up
PICTURE = f"""
![A simulated mammogram on the encoder's canvas, the outline of its breast mask, the patches that are encoded, and their
features as colors]({SEEN})

*What it sees of a simulated mammogram.*

## Use
"""
RESULTS = """\
AUC of frozen features, with 95 % intervals over patients (of several classes the mean of one against the rest). The
held-out patients under Data were not learned from; phantoms are simulated. `docs/leaderboard.md` of the checkout says
how each task is read, and has more encoders."""


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.release", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=user_path, help="output_dir of training.pretrain")
    parser.add_argument("folder", type=user_path, help="folder to make anew; what its card says by hand stays")
    parser.add_argument("--results", nargs="+", type=user_path, default=[], help="JSON files of training.leaderboard")
    parser.add_argument("--row", help="the encoder's name in the results (default: the card's results stay)")
    parser.add_argument("--beside", nargs="+", default=[], help="other rows to show, such as untrained")
    parser.add_argument("--archive", type=user_path, help="NAME.tar.gz to write")
    options = parser.parse_args(arguments)
    with command_line("release"):
        if not (options.run / "encoder" / WEIGHTS).is_file():
            raise ValueError(
                f"{options.run}: holds no encoder/{WEIGHTS}; give a finished run, or make it of its last "
                f"checkpoint: python -m training.export {options.run} --output {options.run}/encoder"
            )
        rows, names = read_rows(options.results), [options.row, *options.beside] if options.row else []
        if missing := [name for name in names if name not in rows]:
            raise ValueError(f"--results: no row {missing[0]!r}, but {', '.join(map(repr, rows)) or 'none'}")
        ship(options.run / "encoder", options.folder.resolve(), {name: rows[name] for name in names})
        print(f"{options.folder}: {(options.folder / WEIGHTS).stat().st_size / 1e6:.1f} MB of weights")
        if options.archive:
            files = members(options.run) | {CARD: options.folder / CARD}
            content = pack(files, options.archive).read_bytes()
            print(f"{hashlib.sha256(content).hexdigest()}  {options.archive}  {len(content) / 2**20:.1f} MiB")


def read_rows(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Return {row: {task: {auc, images, patients}}} of all files."""
    rows = (each for file in files for each in json.loads(file.read_text())["rows"].items())
    return {name: row.get("scores", row) for name, row in rows}


def ship(encoder: Path, folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Make `folder` of an exported encoder, atomically; `rows` are its results and those beside it.

    Raises ValueError, before the folder is touched, where a weight is not finite as float16, where the results that
    would stay are of other weights, or where the folder could not be published.
    """
    weights = {name: tensor.half() for name, tensor in load_file(encoder / WEIGHTS).items()}
    if large := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{encoder}: {large[0]} is not finite as float16; it cannot be shipped in half precision")
    config = json.loads((encoder / CONFIG).read_text()) | {"dtype": "float32"}  # as which the weights open
    before = ModelCard.load(folder / CARD) if (folder / CARD).is_file() else None
    with atomic_folder(folder, replace=True) as temporary:
        save_file(weights, temporary / WEIGHTS, {"format": "pt"})
        write_json(temporary / CONFIG, config)
        for name in (PROCESSOR, RECIPE, *([FIGURE] if (encoder / FIGURE).is_file() else [])):
            shutil.copyfile(encoder / name, temporary / name)
        for name, content in model_code(config).items():
            if folder.is_relative_to(ROOT):  # a checkout has its code once; `mammodino push` sends what links lead to
                (temporary / name).symlink_to(os.path.relpath(ROOT / "modeling_mammodino" / name, folder))
            else:
                (temporary / name).write_bytes(content)
        card = ModelCard.load(encoder / CARD)
        if before:
            keep(BY_HAND, card, before, folder / CARD)
        if rows:
            text = f"{results_section(rows)}\n\n{rounding(encoder, temporary)}"
            card.text = section("Results").sub(lambda _: f"\n{text}\n\n", card.text)
            index(card, evaluations(next(iter(rows.values()))))
            draw_seen(encoder, temporary / SEEN)
        elif before and (folder / WEIGHTS).is_file():
            if (folder / WEIGHTS).read_bytes() != (temporary / WEIGHTS).read_bytes():
                raise ValueError(f"{folder}: its results are of other weights; give --results and --row")
            keep(("Results",), card, before, folder / CARD)
            index(card, before.data.eval_results or [])
            for name in (SEEN, EVAL_RESULTS):
                if (folder / name).exists():
                    copy = shutil.copytree if (folder / name).is_dir() else shutil.copyfile
                    copy(folder / name, temporary / name)
        if (temporary / SEEN).exists():
            card.text = card.text.replace("\n## Use\n", PICTURE, 1)
        card.save(temporary / CARD)
        if complaints := check_folder(temporary):
            listed = "\n".join(f"  {complaint}" for complaint in complaints)
            raise ValueError(f"{folder}: stays as it was, for this could not be published.\n{listed}")


def draw_seen(encoder: Path, output: Path) -> None:
    """Draw what `mammodino inspect` shows of the simulated mammogram of README's quick start."""
    model, processor = MammoDinoModel.from_pretrained(encoder).eval(), MammoDinoImageProcessor.from_pretrained(encoder)
    with tempfile.TemporaryDirectory() as folder:
        write_archive(folder, num_patients=1)
        (mammogram,) = Path(folder).rglob("*_2d.dcm")
        write_figure(inspect_file(mammogram, processor, model), output)


def keep(names: Iterable[str], card: ModelCard, before: ModelCard, file: Path) -> None:
    """Take over sections, license and emissions of an earlier card. Raises ValueError where a section is missing, or
    where its data are others than the run's, by the number of images."""
    count = re.search(r"\| pretraining data \| (\d+) images", card.text)
    for name in names:
        if not (found := section(name).search(before.text)):
            raise ValueError(f"{file}: has no section `## {name}`; write it, and it stays from one release to the next")
        if name == "Data" and count and not {count[1], f"{int(count[1]):,}"} & set(re.findall(r"[\d,]*\d", found[0])):
            raise ValueError(f"{file}: its data are not the {count[1]} images of this run; correct its `## Data`")
        if place := section(name).search(card.text):
            card.text = card.text[: place.start()] + found[0] + card.text[place.end() :]
    for name, value in before.data.to_dict().items():
        if name.startswith(("license", "co2_eq_emissions")):
            card.data[name] = value


def results_section(rows: dict[str, dict[str, Any]]) -> str:
    """Return a table of AUCs, a row a task and a column an encoder, first the one that is published."""
    lines, (own, *others) = [], rows
    for task, of_task in rows[own].items():
        cells = [format_interval(row[task]["auc"]) if task in row else "-" for row in rows.values()]
        lines.append([task, f"{of_task['images']} images, {of_task['patients']} patients", *cells])
    table = markdown_table(["task", "evaluated on", "this encoder", *others], lines)
    return "\n".join([RESULTS, "", *table])


def evaluations(scores: dict[str, dict[str, Any]]) -> list[EvalResult]:
    """Return an encoder's AUCs as the Hub's model-index takes them, but for those without an interval, and those of
    which less is better, which an index cannot say."""
    return [
        evaluation(task, "AUC", of_task["auc"], of_task["patients"])
        for task, of_task in scores.items()
        if None not in of_task["auc"] and "lower is better" not in task
    ]


def rounding(encoder: Path, shipped: Path) -> str:
    """Say how far class tokens move by half precision on disk, on simulated mammograms."""
    processor, p = MammoDinoImageProcessor.from_pretrained(encoder), PhantomParameters()
    images = [acquire_2d(simulate_breast(p, seed=0, index=index)) for index in range(TRIED_BREASTS)]
    inputs = processor(images, return_tensors="pt")
    with torch.inference_mode():
        tokens, moved = (
            MammoDinoModel.from_pretrained(folder).eval()(**inputs).pooler_output for folder in (encoder, shipped)
        )
    share = float((tokens - moved).abs().max() / tokens.std(dim=0).mean())
    return (
        "In `model_cards/` of the checkout the weights are float16, and open as float32. By that no component of the\n"
        f"class token moves by more than {100 * share:.1g} % of what it varies by, on {TRIED_BREASTS} phantom images."
    )


def members(run: Path) -> dict[str, Path]:
    """Return what an archive of a run holds: its encoder, and of its last checkpoint what another run goes on from."""
    encoder = run / "encoder"
    files = {path.name: path for path in encoder.iterdir() if path.is_file()}
    for path in sorted(list_checkpoints(run)[-1].iterdir()) if list_checkpoints(run) else []:
        if path.name != OF_ONE_RUN:  # its recipe names folders, the encoder's does not
            files[f"{path.parent.name}/{path.name}"] = encoder / RECIPE if path.name == RECIPE else path
    return files


def pack(files: Mapping[str, Path], archive: Path) -> Path:
    """Write NAME.tar.gz of files by their names in it, in a folder NAME, without times and owners: the same files give
    the same bytes."""
    folder = archive.name.removesuffix(".tar.gz")
    with (
        atomic_file(archive) as temporary,
        temporary.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as written,
    ):
        for name, path in sorted(files.items()):
            about = tarfile.TarInfo(f"{folder}/{name}")
            about.size = path.stat().st_size
            with path.open("rb") as content:
                written.addfile(about, content)
    return archive


if __name__ == "__main__":
    main()
