"""Frozen encoders on held-out patients, one readout for all: evaluates rows, and writes the page of committed results.

    python -m training.leaderboard --labels LABELS.csv... --tasks TASKS.yaml --models NAME=SOURCE... --output JSON
    python -m training.leaderboard --phantom LEARN TEST --models NAME=SOURCE... --output JSON
    python -m training.leaderboard --results JSON... --output docs/leaderboard.md

A SOURCE is an encoder's folder, `untrained:FOLDER` (its architecture with random weights), `hand-crafted` or `lite0`
(EfficientNet-Lite0, ImageNet weights). LABELS.csv, one or several that stand below each other, has the columns `file`
(relative to it), `patient` and what the tasks name. A task of TASKS.yaml is a name with `label`, the column to predict;
`where`, values that other columns must have; `difference`, columns by whose values the mean of features is subtracted,
such as patient and view, so that what remains is one breast against the other. The head (logistic regression on
standardized features, penalty chosen on held-out patients) learns from the patients of `train` and is scored on those
of `test`, whom no encoder may have learned from: by `held_out` of TASKS.yaml (`is_held_out`), or by a column `split`,
other rows being left out; else in five folds of patients. --dbt adds real DBT slices, --phantom an archive of simulated
breasts, or two, to learn from and to test on. Research use only.
"""

import argparse
import hashlib
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.torch import load_file

from dataset_scripts.benchmarks.labels import read_labels
from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from modeling_mammodino.tools.files import atomic_file, write_json, write_text
from training.evaluation.backbones.efficientnet_lite0 import Lite0Reader
from training.evaluation.backbones.registry import PROVENANCE
from training.evaluation.metrics import bootstrap_auc
from training.evaluation.readout import (
    Answers,
    Canvas,
    EncoderReader,
    Reader,
    breast_differences,
    file_stamps,
    held_out_answers,
    render_once,
    whole_features,
)
from training.evaluation.reports import format_interval, markdown_table
from training.pretraining.checkpoints import CONFIG_FILE, RECIPE_FILE, list_checkpoints, read_recipe, step_of
from training.studies.hand_crafted import HandCraftedReader
from training.studies.phantom_tasks import TASKS as PHANTOM_TASKS
from training.studies.phantom_tasks import PhantomImages
from training.studies.real_slices import RealSlices

logger = logging.getLogger(__name__)

TASK_FIELDS = {"label", "where", "difference"}
HELD_OUT, HELD_OUT_FIELDS = "held_out", {"salt", "percent"}  # beside the tasks
NEIGHBORS, BOXED = "real DBT neighbors, ordering", "real DBT, boxed places against others"
ABOUT = {"configuration": "", "minutes": "CPU-minutes", "note": ""}
SPEEDRUN_AUC = 0.80
UNTRAINED, TEACHER = "untrained:", "teacher.safetensors"


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.leaderboard", description=__doc__.splitlines()[0])
    parser.add_argument("--labels", nargs="+", type=user_path, default=[], help="CSV of images and labels")
    parser.add_argument("--tasks", type=user_path, help="YAML of what is predicted, and of whom")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=SOURCE", help="rows to evaluate")
    parser.add_argument("--dbt", type=user_path, help="BCS-DBT slices: a folder with slices.csv and slices/")
    parser.add_argument("--phantom", nargs="+", type=user_path, help="one or two archives of simulated breasts")
    for name in ("configuration", "minutes", "note"):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="NAME=TEXT", help="a column of these rows")
    parser.add_argument(
        "--speedrun", metavar="RUN=MINUTES", help="a run's output_dir with its checkpoints, and its cost"
    )
    parser.add_argument("--canvas", help="folder whose image processor serves lite0 and hand-crafted features")
    parser.add_argument("--cache", type=user_path, help="folder that keeps images and features for the next call")
    parser.add_argument("--bf16", action="store_true", help="encoders in bfloat16 autocast: half the time on some CPUs")
    parser.add_argument("--results", nargs="+", type=user_path, default=[], help="JSON files to make the page from")
    parser.add_argument("--num_resamples", type=int, default=1000, help="bootstrap resamples (default 1000)")
    parser.add_argument("--output", type=user_path, required=True, help="JSON of results, or the page")
    options = parser.parse_args(arguments)
    with command_line("leaderboard"):
        if options.results:
            write_text(options.output, page([json.loads(path.read_text()) for path in options.results]))
            return
        if not (options.models or options.speedrun) or bool(options.labels) != bool(options.tasks):
            raise ValueError("give --labels and --tasks, or --phantom, and --models or --speedrun; or give --results")
        if not (options.labels or options.phantom or options.dbt):
            raise ValueError("nothing to evaluate on: give --labels with --tasks, --phantom or --dbt")
        write_json(options.output, Leaderboard(options).evaluate())


class Leaderboard:
    """The images of every task, rendered once for all rows with an equal image processor."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.tasks, held_out = read_tasks(options.tasks) if options.tasks else ({}, None)
        if options.labels:
            self.table = read_tables(options.labels, set().union(*map(columns_of, self.tasks.values())), held_out)
            self.files = list(self.table["file"])
        self.processors: dict[str, MammoDinoImageProcessor] = {}
        self.images = cache(self._images)

    def evaluate(self) -> dict[str, Any]:
        """Return by row its description, and by task AUC, interval, counts and the difference to untrained."""
        options, rows = self.options, {}
        described = {each: dict(item.split("=", 1) for item in getattr(options, each)) for each in ABOUT}
        for name, source in (item.split("=", 1) for item in options.models):
            own, other = self.answers(source), {}
            if self.is_encoder(source):
                other = self.answers(UNTRAINED + source)
            about = {"configuration": self.configuration(source)}
            about |= {each: said[name] for each, said in described.items() if name in said}
            rows[name] = {"about": about, "scores": self.scores(own, other)}
            logger.info("%s: %s", name, {task: each["auc"][0] for task, each in rows[name]["scores"].items()})
        result: dict[str, Any] = {"rows": rows}
        if options.speedrun:
            run, total = options.speedrun.rsplit("=", 1)
            task, curve = next(iter(self.tasks)), []
            for checkpoint in list_checkpoints(Path(run)):
                step = step_of(checkpoint)
                steps = read_recipe(checkpoint)["max_steps"]
                found = self.score(self.answers(str(checkpoint), (task,))[task], None)["auc"][0]
                curve.append([round(float(total) * step / steps, 1), found])
            result["speedrun"] = {"run": Path(run).name, "task": task, "curve": curve}
        return result

    def answers(self, source: str, only: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Return the answers of a row by task, of all or of some of the labels' tasks alone."""
        tasks = {name: self.tasks[name] for name in only or self.tasks}
        found: dict[str, Any] = {}
        if tasks:
            found = probabilities(self.table, self.features(source, "labels")["whole"], tasks)
        if self.options.dbt and not only:
            real, features = self.images(self.processor_of(source), "dbt"), self.features(source, "dbt")
            found[NEIGHBORS] = real.orderings(features["whole"])
            labels, patients = real.has_lesion.astype(int), real.table["PatientID"].to_numpy()
            found[BOXED] = held_out_answers(features["region"], labels, patients)
        if self.options.phantom and not only:
            archives, features = self.images(self.processor_of(source), "phantom"), self.features(source, "phantom")
            for name, task in PHANTOM_TASKS.items():
                parts = [
                    archive.of_task(task, {seen: features[f"{seen} {number}"] for seen in ("breast", "region")})
                    for number, archive in enumerate(archives)
                ]
                rows, seen = pd.concat([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
                is_train = np.arange(len(rows)) < len(parts[0][0]) if len(parts) == 2 else None
                _, labels = np.unique(rows[task.column].astype(str), return_inverse=True)
                found[f"phantom {name}"] = held_out_answers(seen, labels, rows["patient"].to_numpy(), is_train)
        return found

    def features(self, source: str, part: str) -> dict[str, np.ndarray]:
        """Return features of the images of "labels" (NaN where a file cannot be used), "dbt" or "phantom"; from the
        cache where they are there."""
        folder, key = self.options.cache, self.processor_of(source)
        settings = json.dumps([identity(source), key, file_stamps(self.files_of(part)), self.options.bf16])
        path = folder / f"features-{part}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.npz" if folder else None
        if path and path.is_file():
            with np.load(path) as kept:
                return dict(kept)
        reader, images = open_reader(source, self.processors[key], self.options.bf16), self.images(key, part)
        if part == "labels":
            found = {"whole": features_of_files(reader, images)}
        elif part == "dbt":
            found = images.features(reader)
        else:
            archives = [archive.features(reader) for archive in images]
            found = {f"{seen} {number}": each for number, of in enumerate(archives) for seen, each in of.items()}
        if path:
            with atomic_file(path) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **found)  # type: ignore[arg-type]
        return found

    def files_of(self, part: str) -> list[Path]:
        """Return the files of which features of a part are, or the tables that name them."""
        options = self.options
        tables = {"dbt": [options.dbt / "slices.csv"]} if options.dbt else {}
        tables |= {"phantom": [each / "labels.csv" for each in options.phantom]} if options.phantom else {}
        return self.files if part == "labels" else tables[part]

    def processor_of(self, source: str) -> str:
        """Return the key of a row's image processor: its own, or that of --canvas, or of the first encoder."""
        folder = source.removeprefix(UNTRAINED)
        if not Path(folder).is_dir():
            others = [item.split("=", 1)[1].removeprefix(UNTRAINED) for item in self.options.models]
            folder = self.options.canvas or next((each for each in others if Path(each).is_dir()), "")
            if folder == "" or source not in ("hand-crafted", "lite0"):
                raise ValueError(f"{source}: no such folder; give an encoder's, hand-crafted or lite0 (with --canvas)")
        if (Path(folder) / TEACHER).is_file():  # a checkpoint of a run
            folder = str(Path(folder).parent / "encoder")
        processor = MammoDinoImageProcessor.from_pretrained(folder)
        key = json.dumps(processor.to_dict(), sort_keys=True, default=str)
        self.processors.setdefault(key, processor)
        return key

    def _images(self, key: str, part: str) -> Any:
        options, processor = self.options, self.processors[key]
        if part == "dbt":
            return RealSlices(options.dbt, processor, options.cache)
        if part == "phantom":
            return [PhantomImages(each / "labels.csv", processor, options.cache) for each in options.phantom]
        canvases = render_once(self.files, processor, options.cache)
        for each in (each for each in canvases if isinstance(each, str)):
            logger.warning("left out: %s", each)
        return canvases

    @staticmethod
    def is_encoder(source: str) -> bool:
        return Path(source).is_dir()

    def configuration(self, source: str) -> str:
        """Return width, depth, patch, canvas and training of an encoder in a few words."""
        if not Path(source.removeprefix(UNTRAINED)).is_dir():
            return ""
        folder = Path(source.removeprefix(UNTRAINED))
        config, size = (
            MammoDinoModel.config_class.from_pretrained(folder),
            self.processors[self.processor_of(source)].size,
        )
        said = f"{config.hidden_size} x {config.num_hidden_layers}, patch {config.patch_size}, "
        said += f"{size['height']} x {size['width']} px"
        if self.is_encoder(source) and (folder / RECIPE_FILE).is_file():
            values = read_recipe(folder)
            said += f"; {values['max_steps']:,} steps of {values['per_device_train_batch_size']}"
        return said

    def scores(self, own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        return {task: self.score(each, other.get(task)) for task, each in own.items()}

    def score(self, own: Any, other: Any) -> dict[str, Any]:
        """Return AUC and interval, counts, and the difference to another row's with its interval. Orderings of true
        neighbors, of few patients, have no interval."""
        if isinstance(own, pd.DataFrame):
            value = float(own["ordering_auc"].mean())
            return {"auc": [value, None, None], "images": len(own), "patients": int(own["patient"].nunique())}
        by_name = {"own": own.probabilities} | ({} if other is None else {"other": other.probabilities})
        drawn = own.patients, self.options.num_resamples, 0
        intervals, differences = bootstrap_auc(own.labels, by_name, *drawn)
        count = len(set(own.patients))
        result: dict[str, Any] = {"auc": list(intervals["own"]), "images": len(own.labels), "patients": count}
        if other is not None:
            result["minus_untrained"] = list(differences["own", "other"])
        return result


def read_tasks(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Return the tasks of a YAML file, and salt and percent of `held_out` where it has them. Raises ValueError naming
    what is wrong."""
    tasks = yaml.safe_load(path.read_text()) or {}
    if (held_out := tasks.pop(HELD_OUT, None)) is not None:
        is_whole = isinstance(held_out, dict) and set(held_out) == HELD_OUT_FIELDS
        if not is_whole or held_out["percent"] not in range(1, 100):
            raise ValueError(f"{path}: {HELD_OUT} must have `salt`, a text, and `percent` of the patients, 1 to 99")
    for name, task in tasks.items():
        if not isinstance(task, dict) or "label" not in task or set(task) - TASK_FIELDS:
            raise ValueError(f"{path}: task {name!r} must have `label`, and may have `where` and `difference`")
    return tasks, held_out


def is_held_out(patient: str, salt: str, percent: int) -> bool:
    """Return whether a patient is of the share that no encoder learns from: by its name alone, so that no list of
    them can be lost; the salt, for names that differ in a few digits are not spread evenly by every hash."""
    return int(hashlib.sha256(f"{salt} {patient}".encode()).hexdigest(), 16) % 100 < percent


def read_tables(paths: list[Path], columns: set[str], held_out: dict[str, Any] | None) -> pd.DataFrame:
    """Return label tables below each other, `file` with its folder, what a table lacks missing; `split` by `held_out`
    where that is given. Raises ValueError for a column that none has and for two ways to split."""
    tables = [read_labels(path) for path in paths]
    for path, each in zip(paths, tables, strict=True):
        each["file"] = [path.parent / file for file in each["file"]]
    table = pd.concat(tables, ignore_index=True)
    if missing := sorted(columns - set(table)):
        raise ValueError(f"{' and '.join(map(str, paths))}: no column {', '.join(missing)}; it has {', '.join(table)}")
    if held_out:
        if "split" in table:
            raise ValueError(f"{paths[0]} has a column split, and the tasks {HELD_OUT}; leave one out")
        is_test = table["patient"].map(lambda patient: is_held_out(patient, **held_out))
        table["split"] = np.where(is_test, "test", "train")
    return table


def columns_of(task: dict[str, Any]) -> set[str]:
    """Return the columns of a label table that a task names."""
    return {task["label"], *task.get("where", {}), *task.get("difference", ())}


def open_reader(source: str, processor: MammoDinoImageProcessor, bf16: bool = False) -> Reader:
    """Return what makes a row's features."""
    if source == "hand-crafted":
        return HandCraftedReader((processor.size["height"], processor.size["width"]), processor.patch_size)
    if source == "lite0":
        return Lite0Reader(processor.patch_size)
    if source.startswith(UNTRAINED):
        torch.manual_seed(0)
        config = MammoDinoModel.config_class.from_pretrained(source.removeprefix(UNTRAINED))
        return EncoderReader(MammoDinoModel(config), processor, bf16)
    if (teacher := Path(source) / TEACHER).is_file():
        encoder = MammoDinoModel(MammoDinoModel.config_class.from_json_file(teacher.with_name(CONFIG_FILE)))
        weights = {name.removeprefix("backbone."): each for name, each in load_file(teacher).items()}
        encoder.load_state_dict({name: each for name, each in weights.items() if name in encoder.state_dict()})
        return EncoderReader(encoder, processor, bf16)
    return EncoderReader(MammoDinoModel.from_pretrained(source), processor, bf16)


def identity(source: str) -> str:
    """Return what a row's features depend on beside its images: weights, or architecture, or its name."""
    if source.startswith(UNTRAINED):
        config = MammoDinoModel.config_class.from_pretrained(source.removeprefix(UNTRAINED)).to_dict()
        return json.dumps({name: each for name, each in config.items() if name not in PROVENANCE}, default=str)
    found = (Path(source) / name for name in ("model.safetensors", TEACHER) if (Path(source) / name).is_file())
    return next((hashlib.sha256(weights.read_bytes()).hexdigest() for weights in found), source)


def features_of_files(reader: Reader, canvases: list[Canvas | str]) -> np.ndarray:
    """Return features (n, F) of files; NaN where one cannot be used."""
    is_usable = np.array([isinstance(each, Canvas) for each in canvases])
    found = whole_features(reader, [each for each in canvases if isinstance(each, Canvas)])
    features = np.full((len(canvases), found.shape[1]), np.nan, np.float32)
    features[is_usable] = found
    return features


def probabilities(table: pd.DataFrame, features: np.ndarray, tasks: dict[str, dict[str, Any]]) -> dict[str, Answers]:
    """Return the answers by task. Raises ValueError for a task of which too little is left."""
    found = {}
    for name, task in tasks.items():
        chosen = table[task["label"]].notna() & ~np.isnan(features).any(axis=1)
        if "split" in table:
            chosen &= table["split"].isin(["train", "test"])
        for column, value in task.get("where", {}).items():
            chosen &= table[column].astype(str) == str(value)
        rows, part = table[chosen], features[chosen]
        _, labels = np.unique(rows[task["label"]].astype(str), return_inverse=True)
        patients = rows["patient"].to_numpy()
        if keys := task.get("difference"):
            part = breast_differences(part, rows.groupby(list(keys), dropna=False).ngroup().to_numpy())
        is_train = (rows["split"] == "train").to_numpy() if "split" in table else None
        try:
            found[name] = held_out_answers(part, labels, patients, is_train)
        except ValueError as error:
            raise ValueError(f"task {name}: {error}") from error
    return found


def page(results: list[dict[str, Any]]) -> str:
    """Return the page: a row an encoder, a column a task; behind the AUC the difference to the same, untrained. What a
    result says in `about` stands above."""
    rows: dict[str, dict[str, Any]] = {}
    for result in results:
        rows |= result["rows"]
    tasks = list(dict.fromkeys(task for row in rows.values() for task in row["scores"]))
    tables = [[task for task in tasks if task.startswith("phantom") == phantom] for phantom in (False, True)]
    about = [[name, *(str(row["about"].get(each) or "-") for each in ABOUT)] for name, row in rows.items()]
    return "\n".join(
        [
            "# Leaderboard: frozen encoders, one readout",
            "",
            "AUC (one class against the rest, mean over classes) with 95 % intervals over patients; after a semicolon",
            "the difference to the same architecture, untrained. Of films and CESM no row has learned from these",
            "patients, unless its note says so. A whole image is read by its class token (Lite0: the mean of the last",
            "map; hand-crafted: mean, deviation and quantiles of local statistics), a region by rings around its",
            "center, one breast by its difference to the other; logistic regression, which learns from the",
            "labels of patients that encoders learned from without labels, and is scored on the others.",
            "Neighbors: how often two slices of a volume are more alike than slices of others of like density. Made by",
            "`python -m training.leaderboard`; [trials.md](trials.md) says what was tried. Research use only.",
            "",
            *(line for result in results if "about" in result for line in (result["about"], "")),
            *markdown_table(["row", "configuration", "CPU-minutes", "note"], about),
            *(line for each in tables if each for line in ["", *score_table(rows, each)]),
            *speedrun_lines(results),
            "",
        ]
    )


def score_table(rows: dict[str, dict[str, Any]], tasks: list[str]) -> list[str]:
    """Return a table with a column for each task."""
    lines = []
    for name, row in rows.items():
        found = [row["scores"].get(task) for task in tasks]
        lines.append([name, *("-" if each is None else cell(each) for each in found)])
    sizes = []
    for task in tasks:
        first = next(row["scores"][task] for row in rows.values() if task in row["scores"])
        sizes.append(f"{first['images']} {'pairs' if task == NEIGHBORS else 'images'} of {first['patients']} patients")
    return markdown_table(["row", *tasks], [["", *sizes], *lines])


def cell(score: dict[str, Any]) -> str:
    if score["auc"][0] is not None and score["auc"][1] is None:
        return f"{score['auc'][0]:.3f}"
    difference = score.get("minus_untrained")
    return format_interval(score["auc"]) + (f"; {format_interval(difference, signed=True)}" if difference else "")


def speedrun_lines(results: list[dict[str, Any]]) -> list[str]:
    """Return a line for each run that was followed: when it first reached SPEEDRUN_AUC."""
    lines = []
    for speedrun in (result["speedrun"] for result in results if "speedrun" in result):
        reached = next((minutes for minutes, value in speedrun["curve"] if value >= SPEEDRUN_AUC), None)
        said = "not reached" if reached is None else f"{reached:g} CPU-minutes"
        curve = ", ".join(f"{value:.3f} after {minutes:g}" for minutes, value in speedrun["curve"])
        lines += ["", f"**Speedrun**, {speedrun['run']}: {speedrun['task']}, AUC {SPEEDRUN_AUC:.2f}: {said} ({curve})."]
    return lines


if __name__ == "__main__":
    main()
