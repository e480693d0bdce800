"""Fine-tune a backbone for a task of a label table or data set, evaluate it on held-out patients. Research use only.

    python -m training.finetune --labels LABELS.csv --task COLUMN --source MODEL --mode frozen|full|lora
        [--head linear|attention|mil] --output_dir RUN
    python -m training.finetune --dataset NAME --data_dir DIR --task TASK --backbone KIND --output_dir RUN

frozen: a linear probe on cached features, or with --head a light head that starts from it; full: all weights learn;
lora: low-rank adapters; both start from the probe, and share their training over several GPUs as
`accelerate launch -m training.finetune ...`.
In output_dir: predictions.parquet, the model, the trust sheet trust.md, and at last result.json, with scores of
images, breasts and patients and 95 % intervals over patients. Started again after a kill, a run resumes; when it is
finished, it returns its result.
"""

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dataset_scripts.benchmarks.index import SPLITS
from dataset_scripts.benchmarks.task import TaskTable, load_task
from modeling_mammodino.tools.command import command_line
from modeling_mammodino.tools.embed import find_device
from modeling_mammodino.tools.files import write_json
from training.evaluation.backbones.registry import BACKBONES, Backbone, load_backbone
from training.evaluation.finetuning.aggregation import score_levels
from training.evaluation.finetuning.feature_cache import SliceFeatures, cached_features
from training.evaluation.finetuning.heads import LinearHead, balanced_weights
from training.evaluation.finetuning.image_classifier import ImageClassifier, add_adapters, save_classifier
from training.evaluation.finetuning.predictor import encoding_of, fit_predictor, fit_probe, tiling_of
from training.evaluation.finetuning.tuning import LabeledImages, MammographyScores, train_classifier
from training.evaluation.metrics import metric_names
from training.evaluation.reports import format_interval, markdown_table
from training.evaluation.run_settings import FinetuneSettings
from training.evaluation.runs import (
    MODEL_FOLDER,
    NOTICE,
    PREDICTIONS_FILE,
    SETTINGS_FILE,
    how_it_was_run,
    refuse_torchrun,
    run_once,
    this_process,
    write_parquet,
)
from training.evaluation.seeded_trainer import prepare_encoder
from training.evaluation.trust_sheet import SHEET, write_sheet
from training.pretraining.compute import keep_freed_memory

from .trust import evaluate_external, examine

CHECKPOINTS, TUNED_FEATURES = "checkpoints", "tuned_features"  # removed when the result is written


def finetune(settings: FinetuneSettings) -> dict[str, Any]:
    """Run, resume, or return at once what `settings` ask for: the content of result.json.

    Raises ValueError or OSError, one line, for what cannot be used. Processes that accelerate launches share the
    training of full and lora; the main one does all else, and the others return nothing.
    """
    if settings.mode == "frozen":
        refuse_torchrun("a run with a frozen encoder")
    return run_once(settings, lambda: run(settings), (CHECKPOINTS, TUNED_FEATURES))


def run(settings: FinetuneSettings) -> dict[str, Any]:
    started, output = time.monotonic(), Path(settings.output_dir)
    task = open_task(settings)
    process = this_process()
    backbone = load_backbone(
        settings.backbone, settings.source or None, seed=settings.seed, last_layers=settings.last_layers
    ).to(find_device("auto"))
    prepare_encoder(backbone.model, settings)
    about_backbone = {
        "kind": backbone.kind,
        "source": backbone.source,
        "license": BACKBONES[backbone.kind].license,
        "width": backbone.width,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "weights": backbone.settings()["weights"],  # their hash, before any training
    }
    if process.is_main_process:
        write_json(output / SETTINGS_FILE, settings.what_is_computed())

    cache = Path(settings.cache_dir or output / "features")
    with process.main_process_first():
        features = encode(backbone, task, cache, settings)
    probe, learned = fit_probe(features, len(task.classes), settings)
    if settings.mode != "frozen":
        probe, learned["training"] = train(backbone, probe, features, task, settings, output / CHECKPOINTS)
        this_process().wait_for_everyone()
        if not this_process().is_main_process:
            return {}
        features = encode(backbone, task, output / TUNED_FEATURES, settings)
    tiles = encode_tiles(backbone, task, features, cache, settings) if settings.head == "mil" else None
    predictor = fit_predictor(features, tiles, probe, task.definition.is_ordered, settings)
    predictions = predictor.predict(features.of("test"), tiles and tiles.of("test"))
    learned["parameters"] = sum(parameter.numel() for parameter in predictor.head.parameters())

    write_parquet(output / PREDICTIONS_FILE, predictions)
    if settings.save_model:
        meaning = f"{settings.task} on {task.benchmark.title}: {task.definition.meaning}"
        save_classifier(output / MODEL_FOLDER, backbone, predictor, task.classes, meaning, settings.mode == "frozen")
    metrics = score_levels(predictions, task.definition.is_ordered, settings.num_resamples, settings.seed)
    trust = examine(settings, task, backbone, features, predictor, predictions, cache)
    write_sheet(output, trust, metrics)
    return {
        "notice": NOTICE,
        "dataset": task.benchmark.name,
        "task": settings.task,
        "definition": task.definition.name,
        "meaning": task.definition.meaning,
        "classes": list(task.classes),
        "backbone": about_backbone,
        "mode": settings.mode,
        "seed": settings.seed,
        "counts": task.counts | {"refused": len(features.refused)},
        "table": hash_table(task.table),
        **how_it_was_run(settings),
        "learned": learned,
        "metrics": metrics,
        "seconds": round(time.monotonic() - started, 1),
    }


def open_task(settings: FinetuneSettings) -> TaskTable:
    task = load_task(
        settings.dataset,
        settings.data_dir,
        settings.task,
        settings.definition or None,
        classes=[each.strip() for each in settings.classes.split(",")] if settings.classes else (),
        seed=settings.seed,
        validation_fraction=settings.validation_fraction,
        test_fraction=settings.test_fraction,
        allow_missing=settings.allow_missing,
    )
    has = metric_names(len(task.classes), task.definition.is_ordered)
    if settings.metric_for_best_model not in has:
        raise ValueError(
            f"metric_for_best_model={settings.metric_for_best_model}: {settings.task} with {len(task.classes)} classes "
            f"has {', '.join(has)}"
        )
    return task


def encode(backbone: Backbone, task: TaskTable, cache: Path, settings: FinetuneSettings) -> SliceFeatures:
    """Return features of all images that can be used. Raises ValueError where a class is lost with the others."""
    features = cached_features(backbone, task.table, cache, task.benchmark.name, encoding_of(settings))
    for split in SPLITS:
        left = set(features.table["label"][features.table["split"] == split])
        for number, name in enumerate(task.classes):
            if number not in left:
                raise ValueError(
                    f"{split}: every image of class {name!r} was refused; {len(features.refused)} images in all, the "
                    f"first: {next(iter(features.refused.values()), '')}"
                )
    return features


def encode_tiles(
    backbone: Backbone, task: TaskTable, features: SliceFeatures, cache: Path, settings: FinetuneSettings
) -> SliceFeatures:
    """Return features of the tiles of the images that have `features`."""
    encoding = encoding_of(settings, tiling_of(settings))
    tiles = cached_features(backbone, features.table, cache, task.benchmark.name, encoding)
    if tiles.refused:
        raise ValueError(f"{next(iter(tiles.refused.values()))}: could be read a moment ago; start the run again")
    return tiles


def train(
    backbone: Backbone,
    head: LinearHead,
    features: SliceFeatures,
    task: TaskTable,
    settings: FinetuneSettings,
    folder: Path,
) -> tuple[LinearHead, dict[str, Any]]:
    """Tune `backbone` in place under a head that starts as the linear probe (Kumar et al. 2022, arXiv 2202.10054)."""
    if find_device("auto").type == "cpu":
        keep_freed_memory()
    parts = {}
    for split in ("train", "validation"):
        rows = features.table[features.table["split"] == split]
        files, labels = rows["file"].tolist(), rows["label"].to_numpy()
        parts[split] = LabeledImages(backbone.preprocess, files, labels, settings.slices_per_volume, settings.seed)
    balanced = balanced_weights(parts["train"].labels, len(task.classes))
    in_loss = balanced if settings.class_imbalance == "class_weights" else np.ones(len(task.classes))
    in_drawing = balanced[parts["train"].labels] if settings.class_imbalance == "sampler" else None
    scores = MammographyScores(len(task.classes), task.definition.is_ordered)
    encoder: Any = add_adapters(backbone, settings) if settings.mode == "lora" else backbone
    classifier = ImageClassifier(encoder, head.layer(), in_loss)
    learned = train_classifier(classifier, parts["train"], parts["validation"], in_drawing, scores, settings, folder)
    if settings.mode == "lora":
        encoder.merge_and_unload()
    return LinearHead.of(classifier.head), learned


def hash_table(table: pd.DataFrame) -> str:
    """Return the SHA-256 of images, splits and labels: runs with the same one learned and were tested on the same."""
    lines = [f"{row.image_id}\t{row.split}\t{row.label}\n" for row in table.itertuples()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def format_result(result: dict[str, Any]) -> str:
    """Return the scores as a Markdown table, a row a level."""
    metrics = list(next(iter(result["metrics"].values())))
    rows = [
        [level, *(format_interval(scores[metric]) for metric in metrics)] for level, scores in result["metrics"].items()
    ]
    return "\n".join(markdown_table(["level", *metrics], rows))


def main(arguments: list[str] | None = None) -> None:
    with command_line("finetune"):
        settings = FinetuneSettings.parse(sys.argv[1:] if arguments is None else arguments)
        result = finetune(settings)
        if this_process().is_main_process:
            for external in filter(None, settings.external.split(",")):
                evaluate_external(Path(settings.output_dir), external.strip(), settings.allow_missing)
            print(format_result(result))
            print(f"\n{Path(settings.output_dir) / SHEET} says what they are worth")


if __name__ == "__main__":
    main()
