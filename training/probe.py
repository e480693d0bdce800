"""A first evaluation of encoders by their frozen features: k-NN and logistic regression on held-out patients.

    python -m training.probe --models NAME=FOLDER... --labels LABELS.csv --tasks density lesion --output PROBE.json

LABELS.csv is a label table (docs/finetuning.md); empty cells are left out. Without --test_labels patients are held out:
those of its `split`, or else a part. An untrained encoder of the first model's architecture is always evaluated beside.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedGroupKFold

from dataset_scripts.benchmarks.labels import ABOUT, class_names, read_labels
from dataset_scripts.benchmarks.task import find_files
from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.command import CommandParser, command_line, show_progress, user_model, user_path
from modeling_mammodino.tools.features import POOLS, embed_files
from modeling_mammodino.tools.files import check_output, write_text
from training.evaluation.metrics import bootstrap_auc
from training.evaluation.probes import FOLDS_OF_PENALTY, logistic_regression, nearest_neighbors
from training.evaluation.reports import format_interval, markdown_table

logger = logging.getLogger(__name__)

UNTRAINED = "untrained"
HEADS = ("knn", "logistic")


class Features(NamedTuple):
    """Features of the files of one label table: {model: (n, F)}, in the order of the table's rows."""

    table: pd.DataFrame
    by_model: dict[str, np.ndarray]


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.probe", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="encoders to evaluate")
    parser.add_argument(
        "--labels", type=user_path, required=True, help="CSV of the patients that the probes learn from"
    )
    parser.add_argument("--test_labels", type=user_path, help="CSV of held-out patients (default: a part of --labels)")
    parser.add_argument("--tasks", nargs="+", required=True, help="columns to predict")
    parser.add_argument("--output", type=user_path, required=True, help="JSON file of the results")
    parser.add_argument(
        "--pool",
        choices=POOLS,
        default="both",
        help="class token, tissue-weighted mean of patch tokens, or (default) both",
    )
    parser.add_argument(
        "--last_layers", type=int, default=1, help="class tokens of so many last layers side by side (default 1)"
    )
    parser.add_argument("--slices_per_volume", type=int, default=4, help="slices averaged of a volume (default 4)")
    parser.add_argument("--test_fraction", type=float, default=0.4, help="patients held out without --test_labels")
    parser.add_argument("--allow_missing", action="store_true", help="leave images out whose file is not there")
    parser.add_argument("--num_resamples", type=int, default=1000, help="bootstrap resamples (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with command_line("probe"):
        check_output(options.output)
        results = probe(options)
        write_text(options.output, json.dumps(results, indent=2) + "\n")
    print(format_results(results))


def probe(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the command writes: settings, and by task and head the AUCs and their differences."""
    tables = read_tables(options)
    folders = dict(item.split("=", 1) if "=" in item else (Path(item).name, item) for item in options.models)
    folders = {name: user_model(folder) for name, folder in folders.items()}
    models = {name: MammoDinoModel.from_pretrained(folder).eval() for name, folder in folders.items()}
    torch.manual_seed(options.seed)
    models = {UNTRAINED: MammoDinoModel(next(iter(models.values())).config).eval(), **models}
    processors = {name: MammoDinoImageProcessor.from_pretrained(folder) for name, folder in folders.items()}
    image_processor = next(iter(processors.values()))
    for name, other in processors.items():
        if other.to_dict() != image_processor.to_dict():
            raise ValueError(f"{name}: its image processor has other settings; evaluate it in a run of its own")

    features = [
        read_features(
            path, table, models, image_processor, options.pool, options.slices_per_volume, options.last_layers
        )
        for path, table in tables
    ]
    split = (options.tasks[0], options.test_fraction, options.seed)
    learn, test = features if options.test_labels else split_patients(features[0], *split)
    return {
        "seed": options.seed,
        "num_resamples": options.num_resamples,
        "models": folders,
        "tasks": {task: evaluate(learn, test, task, options.num_resamples, options.seed) for task in options.tasks},
    }


def read_tables(options: argparse.Namespace) -> list[tuple[Path, pd.DataFrame]]:
    """Return path and content of --labels and --test_labels, once it is known that the tasks can be evaluated on them.

    Raises ValueError naming the table, before any image is read.
    """
    if options.last_layers > 1 and options.pool == "patches":
        raise ValueError(f"--last_layers {options.last_layers}: are of class tokens; give --pool class or both")
    paths = [path for path in (options.labels, options.test_labels) if path]
    tables = [read_usable_labels(path, options.tasks, options.allow_missing) for path in paths]
    if options.test_labels:
        learn, test = tables
        if shared := set(learn["patient"]) & set(test["patient"]):
            raise ValueError(f"{options.test_labels}: {len(shared)} patients are in both tables, {min(shared)} first")
    else:
        (table,) = tables
        try:
            learn, test = (
                table.iloc[rows] for rows in split_rows(table, options.tasks[0], options.test_fraction, options.seed)
            )
        except ValueError as error:
            raise ValueError(f"{options.labels}: {error}") from error
    for task in options.tasks:
        check_task(learn, test, task)
    return list(zip(paths, tables, strict=True))


def read_usable_labels(path: Path, tasks: list[str], allow_missing: bool) -> pd.DataFrame:
    """Return the rows whose files are there, cells of `tasks` as names of classes. Raises as `read_labels`, and
    ValueError where a file is missing, unless `allow_missing`."""
    table = read_labels(path, tasks)
    table = table.assign(**{task: class_names(table[task]) for task in tasks})
    files = table["file"].map(lambda file: str(path.parent / file))
    return table[find_files(table.assign(image_id=table["file"], file=files), path, allow_missing)].reset_index(
        drop=True
    )


def read_features(
    labels: Path,
    table: pd.DataFrame,
    models: dict[str, MammoDinoModel],
    image_processor: MammoDinoImageProcessor,
    pool: str,
    slices_per_volume: int,
    last_layers: int = 1,
) -> Features:
    """Return the features of the files that can be used, the mean over a file's slices. Each file is read once for all
    models; why others are left out is logged."""
    paths = [labels.parent / file for file in table["file"]]
    files = embed_files(
        paths,
        list(models.values()),
        image_processor,
        pool=pool,
        slices_per_volume=slices_per_volume,
        last_layers=last_layers,
    )
    rows, kept = [], []
    for result in show_progress(files, desc="features", unit="file", total=len(paths)):
        kept.append(result.refused is None)
        if result.refused is None:
            rows.append(result.embeddings.mean(axis=0))  # (F,), the models side by side
        else:
            logger.warning("left out: %s", result.refused)
    if not rows:
        raise ValueError(f"{labels}: none of its {len(paths)} files can be used; the reasons stand above")
    if "split" in table and "test" in set(table["split"]) - set(table["split"][kept]):  # else others would be held out
        raise ValueError(f"{labels}: none of its files of split test can be used; the reasons stand above")
    num_tokens = (2 if pool == "both" else 1) + last_layers - 1
    ends = np.cumsum([num_tokens * model.config.hidden_size for model in models.values()])
    features = np.split(np.stack(rows), ends[:-1], axis=1)
    return Features(table[kept].reset_index(drop=True), dict(zip(models, features, strict=True)))


def split_patients(features: Features, task: str, test_fraction: float, seed: int) -> tuple[Features, Features]:
    """Return a learning and a held-out part, by patient, stratified by the first task."""
    table = features.table
    return tuple(  # type: ignore[return-value]
        Features(table.iloc[rows].reset_index(drop=True), {k: v[rows] for k, v in features.by_model.items()})
        for rows in split_rows(table, task, test_fraction, seed)
    )


def split_rows(table: pd.DataFrame, task: str, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to learn from and those held out: test of `split`, against its train and validation, where the
    table has any; else a fraction, and rows without a label are shared out as a class of their own.

    Raises ValueError where a patient is in both, where there are too few patients, or no class that has as many images
    as there are parts.
    """
    if "split" in table and (held_out := table["split"] == "test").any():
        learn = table["split"].isin(["train", "validation"])
        if shared := set(table["patient"][learn]) & set(table["patient"][held_out]):
            raise ValueError(f"split: {len(shared)} patients are in train and in test, {min(shared)} first; {ABOUT}")
        return np.flatnonzero(learn), np.flatnonzero(held_out)
    num_folds = max(2, round(1 / test_fraction))
    classes = table[task].astype(str).where(table[task].notna(), "")
    if (num_patients := table["patient"].nunique()) < num_folds:
        raise ValueError(f"{num_patients} patients; a held-out part needs {num_folds} at least, or give --test_labels")
    if classes[classes != ""].value_counts().max() < num_folds:
        raise ValueError(f"task {task}: no value occurs {num_folds} times; give a column of classes, not of numbers")
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    return next(folds.split(table, classes, table["patient"]))


def check_task(learn: pd.DataFrame, test: pd.DataFrame, task: str) -> None:
    """Raise ValueError where a task cannot be evaluated on these label tables."""
    learn, test = (table[table[task].notna()] for table in (learn, test))
    classes, held_out = (sorted(set(table[task].astype(str))) for table in (learn, test))
    if len(classes) < 2 or held_out != classes:
        raise ValueError(
            f"task {task}: learning patients have {classes}, held-out ones {held_out}; each class must occur in both, "
            "and two at least: empty the cells of a class that is too rare"
        )
    if (num_patients := learn["patient"].nunique()) < FOLDS_OF_PENALTY:
        raise ValueError(f"task {task}: {num_patients} learning patients; logistic regression needs {FOLDS_OF_PENALTY}")


def evaluate(learn: Features, test: Features, task: str, num_resamples: int, seed: int) -> dict[str, Any]:
    """Return the AUC on held-out patients of each model under k-NN and logistic regression, and differences of models.

    Raises ValueError as `check_task`.
    """
    check_task(learn.table, test.table, task)
    learn_rows = learn.table[task].notna().to_numpy()
    test_rows = test.table[task].notna().to_numpy()
    classes, y = np.unique(learn.table[task][learn_rows].astype(str), return_inverse=True)
    test_labels = test.table[task][test_rows].astype(str).to_numpy()
    test_y = np.searchsorted(classes, test_labels)
    patients, test_patients = learn.table["patient"][learn_rows], test.table["patient"][test_rows].to_numpy()
    heads = {"knn": lambda: nearest_neighbors(len(y)), "logistic": lambda: logistic_regression(y, patients)}
    result: dict[str, Any] = {
        "classes": classes.tolist(),
        "learning_images": int(learn_rows.sum()),
        "test_images": int(test_rows.sum()),
        "test_patients": int(len(set(test_patients))),
    }
    for head, make in heads.items():
        probabilities = {
            name: make().fit(learn.by_model[name][learn_rows], y).predict_proba(test.by_model[name][test_rows])
            for name in learn.by_model
        }
        scores, differences = bootstrap_auc(test_y, probabilities, test_patients, num_resamples, seed)
        result[head] = {
            "auc": {name: list(score) for name, score in scores.items()},
            "difference": {f"{a} - {b}": list(value) for (a, b), value in differences.items()},
        }
    return result


def format_results(results: dict[str, Any]) -> str:
    """Return the AUCs as a Markdown table, a row a task and head."""
    names = [UNTRAINED, *results["models"]]
    rows = [
        [task, head, *(format_interval(result[head]["auc"][name]) for name in names)]
        for task, result in results["tasks"].items()
        for head in HEADS
    ]
    return "\n".join(markdown_table(["task", "head", *names], rows))


if __name__ == "__main__":
    main()
