"""Frozen encoders on real images, one readout for all: evaluates encoders, and writes the table of committed results.

    python -m training.leaderboard --labels LABELS.csv --tasks TASKS.yaml --models NAME=FOLDER... --output RESULTS.json
    python -m training.leaderboard --results RESULTS.json... --output docs/leaderboard.md

LABELS.csv has the columns `file` (relative to it), `patient` and what the tasks name, of patients that no encoder has
learned from. A task of TASKS.yaml is a name with `label`, the column to predict; `where`, values that other columns
must have; `difference`, columns by whose values the mean of features is subtracted, such as patient and view, so that
what remains is one breast against the other. Features are the class token; each task's probabilities come from
logistic regression on standardized features in five folds of patients, penalty chosen inside. An untrained encoder of
each architecture stands beside it. Research use only.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from sklearn.model_selection import StratifiedGroupKFold

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.command import command_line
from modeling_mammodino.tools.features import embed_files
from modeling_mammodino.tools.files import write_json, write_text
from training.evaluation.metrics import bootstrap_auc
from training.evaluation.probes import logistic_regression, read_labels
from training.evaluation.reports import format_interval, markdown_table

logger = logging.getLogger(__name__)

FOLDS = 5
TASK_FIELDS = {"label", "where", "difference"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.leaderboard", description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, help="CSV of held-out patients")
    parser.add_argument("--tasks", type=Path, help="YAML of what is predicted")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=FOLDER", help="encoders to evaluate")
    parser.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="NAME=PARQUET",
        help="features made elsewhere: columns file, as in the labels, and embedding",
    )
    parser.add_argument("--results", nargs="+", type=Path, default=[], help="JSON files to make the table from")
    parser.add_argument("--num_resamples", type=int, default=1000, help="bootstrap resamples (default 1000)")
    parser.add_argument("--output", type=Path, required=True, help="JSON of results, or the page")
    options = parser.parse_args(arguments)
    with command_line("leaderboard"):
        if options.results:
            write_text(options.output, page([json.loads(path.read_text()) for path in options.results]))
        elif options.labels and options.tasks and (options.models or options.features):
            write_json(options.output, evaluate(options))
        else:
            raise ValueError("give --labels, --tasks and --models or --features, or --results")


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Return the tasks, and by encoder and task the AUC, its interval and the difference to the same, untrained."""
    tasks = read_tasks(options.tasks)
    table = read_labels(options.labels, sorted({task["label"] for task in tasks.values()}))
    rows = {}
    for name, folder in (item.split("=", 1) for item in options.models):
        pair = {"untrained": untrained(folder), "": MammoDinoModel.from_pretrained(folder).eval()}
        features = class_tokens(folder, list(pair.values()), options.labels.parent, table)
        halves = np.split(features, 2, axis=1)
        own = probabilities(table, halves[1], tasks)
        other = probabilities(table, halves[0], tasks)
        rows[name] = {task: score(own[task], other[task], options.num_resamples) for task in tasks}
        rows[f"untrained {name}"] = {task: score(other[task], None, options.num_resamples) for task in tasks}
    for name, path in (item.split("=", 1) for item in options.features):
        known = pd.read_parquet(path).set_index("file")["embedding"]
        width = len(known.iloc[0])
        features = np.stack([known.get(file, np.full(width, np.nan)) for file in table["file"]])
        own = probabilities(table, features, tasks)
        rows[name] = {task: score(own[task], None, options.num_resamples) for task in tasks}
    return {"tasks": tasks, "folds": FOLDS, "num_resamples": options.num_resamples, "rows": rows}


def read_tasks(path: Path) -> dict[str, dict[str, Any]]:
    """Return the tasks of a YAML file. Raises ValueError naming the task whose fields are wrong."""
    tasks = yaml.safe_load(path.read_text()) or {}
    for name, task in tasks.items():
        if not isinstance(task, dict) or "label" not in task or set(task) - TASK_FIELDS:
            raise ValueError(f"{path}: task {name!r} must have `label`, and may have `where` and `difference`")
    return tasks


def untrained(folder: str) -> MammoDinoModel:
    """Make a random encoder of a checkpoint's architecture, as MammoDinoModel initializes it, seed 0."""
    torch.manual_seed(0)
    return MammoDinoModel(MammoDinoModel.config_class.from_pretrained(folder)).eval()


def class_tokens(folder: str, models: list[MammoDinoModel], root: Path, table: pd.DataFrame) -> np.ndarray:
    """Return the class tokens (n, F) of the table's files, the models side by side; NaN where a file cannot be used."""
    processor = MammoDinoImageProcessor.from_pretrained(folder)
    features = np.full((len(table), sum(model.config.hidden_size for model in models)), np.nan)
    files = embed_files([root / file for file in table["file"]], models, processor, pool="class")
    for row, result in enumerate(files):
        if result.refused is None:
            features[row] = result.embeddings.mean(axis=0)
        else:
            logger.warning("left out: %s", result.refused)
    return features


def probabilities(
    table: pd.DataFrame, features: np.ndarray, tasks: dict[str, dict[str, Any]]
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return labels (n,), out-of-fold probabilities (n, classes) and patients (n,) by task.

    Raises ValueError for a task that fewer than two classes or fewer patients than folds are left of.
    """
    found = {}
    for name, task in tasks.items():
        chosen = table[task["label"]].notna() & ~np.isnan(features).any(axis=1)
        for column, value in task.get("where", {}).items():
            chosen &= table[column].astype(str) == str(value)
        rows, part = table[chosen], features[chosen]
        classes, labels = np.unique(rows[task["label"]].astype(str), return_inverse=True)
        if len(classes) < 2 or rows["patient"].nunique() < FOLDS:
            raise ValueError(f"task {name}: {len(classes)} classes of {rows['patient'].nunique()} patients; too few")
        if keys := task.get("difference"):
            groups = rows.groupby(list(keys), dropna=False).ngroup().to_numpy()
            part = part - pd.DataFrame(part).groupby(groups).transform("mean").to_numpy()
        patients = rows["patient"].to_numpy()
        predicted = np.zeros((len(labels), len(classes)))
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
        for learn, test in folds.split(part, labels, patients):
            head = logistic_regression(labels[learn], patients[learn]).fit(part[learn], labels[learn])
            predicted[test] = head.predict_proba(part[test])
        found[name] = labels, predicted, patients
    return found


def score(own: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...] | None, num_resamples: int) -> dict[str, Any]:
    """Return AUC and interval, counts, and the difference to another encoder's probabilities with its interval."""
    labels, predicted, patients = own
    by_name = {"own": predicted} | ({} if other is None else {"other": other[1]})
    intervals, differences = bootstrap_auc(labels, by_name, patients, num_resamples, 0)
    result: dict[str, Any] = {"auc": list(intervals["own"]), "images": len(labels), "patients": len(set(patients))}
    if other is not None:
        result["minus_untrained"] = list(differences["own", "other"])
    return result


def page(results: list[dict[str, Any]]) -> str:
    """Return the page: a row an encoder, a column a task; behind the AUC the difference to the same, untrained."""
    tasks = results[0]["tasks"]
    lines = []
    for name, row in (item for result in results for item in result["rows"].items()):
        cells = []
        for task in tasks:
            text = format_interval(row[task]["auc"])
            if difference := row[task].get("minus_untrained"):
                text += f"; {format_interval(difference, signed=True)}"
            cells.append(text)
        lines.append([name, *cells])
    first = next(iter(results[0]["rows"].values()))
    sizes = [f"{first[task]['images']} images of {first[task]['patients']} patients" for task in tasks]
    return "\n".join(
        [
            "# Leaderboard: frozen encoders on real images",
            "",
            "AUC (one class against the rest, mean over classes) with 95 % intervals over patients; behind a semicolon",
            "the difference to the same architecture, untrained. Patients that no row has learned from. One readout:",
            "the class token, standardized, logistic regression in five folds of patients. Made by",
            "`python -m training.leaderboard`; [docs/trials.md](trials.md) says what was tried. Research use only.",
            "",
            *markdown_table(["encoder", *tasks], [["", *sizes], *lines]),
            "",
        ]
    )


if __name__ == "__main__":
    main()
