"""Fine-tunes a backbone for one task of one data set and evaluates it on held-out patients. Research use only.

    python -m training.finetune --dataset NAME --data_dir DIR --task TASK --backbone KIND --source MODEL
        --mode frozen|full|lora --output_dir DIR [--name value ...]

frozen: a linear probe on cached features; full: all weights learn; lora: low-rank adapters; both start from the probe.
In output_dir: predictions.parquet, the model, and at last result.json, with scores of images, breasts and patients and
95 % intervals over patients. Started again after a kill, a run goes on; when it is finished, it returns its result.
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dataset_scripts.benchmarks.index import SPLITS
from dataset_scripts.benchmarks.task import TaskTable, load_task
from modeling_mammodino.tools.embed import find_device
from training.evaluation.backbones.registry import Backbone, load_backbone
from training.evaluation.evaluate_metrics import MammographyScores
from training.evaluation.finetuning.aggregation import is_ordered
from training.evaluation.finetuning.feature_cache import Encoding, SliceFeatures, cached_features
from training.evaluation.finetuning.image_classifier import ImageClassifier, add_adapters, save_classifier
from training.evaluation.finetuning.images import LabeledImages
from training.evaluation.finetuning.linear_probe import LinearHead, balanced_weights, fit_linear_probe
from training.evaluation.finetuning.settings import FinetuneSettings, parse_settings
from training.evaluation.finetuning.train import train_classifier
from training.evaluation.metrics import metric_names
from training.evaluation.predictions import predict_levels, score_levels
from training.evaluation.result import describe_run, format_result
from training.evaluation.run_files import PREDICTIONS_FILE, SETTINGS_FILE, run_once, write_json, write_parquet
from training.pretraining.compute import keep_freed_memory

logger = logging.getLogger(__name__)

CHECKPOINTS, TUNED_FEATURES = "checkpoints", "tuned_features"  # gone when the result stands


def finetune(settings: FinetuneSettings) -> dict[str, Any]:
    """Runs, or goes on with, or returns at once what `settings` ask for: the content of result.json.

    Raises ValueError or OSError, one line, for what cannot be used. One process a run.
    """
    output = Path(settings.output_dir)
    leftovers = (CHECKPOINTS, TUNED_FEATURES)
    return run_once(output, settings.what_is_computed(), lambda: run(settings, output), leftovers)


def run(settings: FinetuneSettings, output: Path) -> dict[str, Any]:
    started = time.monotonic()
    task = open_task(settings)
    backbone = load_backbone(settings.backbone, settings.source or None, seed=settings.seed).to(find_device("auto"))
    weights = backbone.settings()["weights"]  # as it comes
    write_json(output / SETTINGS_FILE, settings.what_is_computed())

    cache = Path(settings.cache_dir or output / "features")
    features = encode(backbone, task, cache, settings)
    head, learned = fit_head(features, task, settings)
    if settings.mode != "frozen":
        head, learned["training"] = train(backbone, head, features, task, settings, output / CHECKPOINTS)
        features = encode(backbone, task, output / TUNED_FEATURES, settings)
    ordered, balanced = is_ordered(settings.task), settings.class_imbalance != "none"
    predictions = predict_levels(features, head, len(task.classes), ordered, balanced, settings.seed)

    write_parquet(output / PREDICTIONS_FILE, predictions)
    if settings.save_model:
        meaning = f"{settings.task} on {task.benchmark.title}: {task.definition.meaning}"
        head_alone = settings.mode == "frozen"
        save_classifier(output / "model", backbone, head.layer(), task.classes, meaning, head_alone)
    return {
        **describe_run(settings, task, backbone, weights, features.refused),
        "learned": learned,
        "metrics": score_levels(predictions, ordered, settings.num_resamples, settings.seed),
        "seconds": round(time.monotonic() - started, 1),
    }


def open_task(settings: FinetuneSettings) -> TaskTable:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a run is one process: start it without torchrun, and other runs beside it")
    task = load_task(
        settings.dataset,
        settings.data_dir,
        settings.task,
        settings.definition or None,
        seed=settings.seed,
        validation_fraction=settings.validation_fraction,
        test_fraction=settings.test_fraction,
        allow_missing=settings.allow_missing,
    )
    has = metric_names(len(task.classes), is_ordered(settings.task))
    if settings.metric_for_best_model not in has:
        raise ValueError(
            f"metric_for_best_model={settings.metric_for_best_model}: {settings.task} with {len(task.classes)} classes "
            f"has {', '.join(has)}"
        )
    return task


def encode(backbone: Backbone, task: TaskTable, cache: Path, settings: FinetuneSettings) -> SliceFeatures:
    """Features of all images that can be used. Raises ValueError where a class is lost with the others."""
    encoding = Encoding(
        settings.slices_per_volume,
        settings.per_device_eval_batch_size,
        settings.dataloader_num_workers,
        settings.bf16,
    )
    features = cached_features(backbone, task.table, cache, task.benchmark.name, encoding)
    for split in SPLITS:
        left = set(features.table["label"][features.table["split"] == split])
        for number, name in enumerate(task.classes):
            if number not in left:
                raise ValueError(
                    f"{split}: every image of class {name!r} was refused; {len(features.refused)} images in all, the "
                    f"first: {next(iter(features.refused.values()), '')}"
                )
    return features


def fit_head(features: SliceFeatures, task: TaskTable, settings: FinetuneSettings) -> tuple[LinearHead, dict[str, Any]]:
    """The linear probe: every slice counts with the label of its image."""
    label, split = features.table["label"].to_numpy(), features.table["split"].to_numpy()
    labels, of = label[features.image], split[features.image]
    part = {name: (features.values[of == name], labels[of == name]) for name in ("train", "validation")}
    balanced = settings.class_imbalance != "none"
    weights = balanced_weights(part["train"][1], len(task.classes)) if balanced else np.ones(len(task.classes))
    probe = fit_linear_probe(*part["train"], *part["validation"], weights)
    return probe.head, {"penalty": probe.penalty, "validation_losses": probe.validation_losses}


def train(
    backbone: Backbone,
    head: LinearHead,
    features: SliceFeatures,
    task: TaskTable,
    settings: FinetuneSettings,
    folder: Path,
) -> tuple[LinearHead, dict[str, Any]]:
    """Tunes `backbone` in place under a head that starts as the linear probe (Kumar et al. 2022, arXiv 2202.10054)."""
    if find_device("auto").type == "cpu":
        keep_freed_memory()
    parts = {}
    for split in ("train", "validation"):
        rows = features.table[features.table["split"] == split]
        parts[split] = LabeledImages(
            backbone.lesion_image_renderer, rows["file"].tolist(), rows["label"].to_numpy(), settings.slices_per_volume,
            settings.seed,
        )  # fmt: skip
    balanced = balanced_weights(parts["train"].labels, len(task.classes))
    in_loss = balanced if settings.class_imbalance == "class_weights" else np.ones(len(task.classes))
    in_drawing = balanced[parts["train"].labels] if settings.class_imbalance == "sampler" else None
    scores = MammographyScores(len(task.classes), is_ordered(settings.task))
    encoder = add_adapters(backbone, settings) if settings.mode == "lora" else backbone
    classifier = ImageClassifier(encoder, head.layer(), in_loss)
    learned = train_classifier(classifier, parts["train"], parts["validation"], in_drawing, scores, settings, folder)
    if settings.mode == "lora":
        encoder.merge_and_unload()
    return LinearHead.of(classifier.head), learned


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        settings = parse_settings(sys.argv[1:] if arguments is None else arguments)
        result = finetune(settings)
    except (ValueError, OSError) as error:
        raise SystemExit(f"finetune: {' '.join(str(error).split())}") from error
    print(format_result(result))


if __name__ == "__main__":
    main()
