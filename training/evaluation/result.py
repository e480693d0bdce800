"""The result of a run: what it says, and all that it takes to repeat it."""

import hashlib
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pandas

import modeling_mammodino
from dataset_scripts.benchmarks.task import TaskTable
from training.evaluation.backbones.registry import Backbone
from training.evaluation.finetuning.settings import FinetuneSettings
from training.evaluation.reports import format_interval, markdown_table

PACKAGES = ("torch", "transformers", "peft", "datasets", "numpy", "scipy", "pandas")


def describe_run(
    settings: FinetuneSettings, task: TaskTable, backbone: Backbone, weights: str, refused: dict[str, str]
) -> dict[str, Any]:
    """Everything of result.json but what was learned and scored. `weights`: hash of the backbone's, as it came."""
    counts = task.counts | {"refused": len(refused)}
    return {
        "notice": "Research use only: not a medical device.",
        "dataset": task.benchmark.name,
        "task": settings.task,
        "definition": task.definition.name,
        "meaning": task.definition.meaning,
        "classes": list(task.classes),
        "backbone": {
            "kind": backbone.kind,
            "source": backbone.source,
            "width": backbone.width,
            "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
            "weights": weights,
        },
        "mode": settings.mode,
        "seed": settings.seed,
        "counts": counts,
        "table": hash_table(task.table),
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "mammodino": modeling_mammodino.__version__,
            **{name: version(name) for name in PACKAGES},
        },
        "command": settings.command(),
    }


def hash_table(table: pandas.DataFrame) -> str:
    """SHA-256 of images, splits and labels: two runs with the same one learned and were evaluated on the same."""
    lines = [f"{row.image_id}\t{row.split}\t{row.label}\n" for row in table.itertuples()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def format_result(result: dict[str, Any]) -> str:
    """The scores as a Markdown table, a row a level."""
    metrics = list(next(iter(result["metrics"].values())))
    rows = [
        [level, *(format_interval(scores[metric]) for metric in metrics)] for level, scores in result["metrics"].items()
    ]
    return "\n".join(markdown_table(["level", *metrics], rows))
