"""Fine-tunes a backbone for one task of one data set and judges it on held-out patients. Research use only.

    python -m training.finetune --dataset NAME --data_dir DIR --task TASK --backbone KIND --source MODEL
        --mode frozen|full|lora --output_dir DIR [--name value ...]

frozen: a linear probe on cached features; full: all weights learn; lora: low-rank adapters. In output_dir:
predictions.parquet, the model, and at last result.json, with scores and 95 % intervals over patients of images, breasts
and patients. Started again after a kill, a run goes on; started again when it is finished, it returns its result.
"""

import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset_scripts.benchmark_task import TaskTable, load_task
from modeling_mammodino.embed import find_device

from .engine.cpu_memory import keep_freed_memory
from .evaluation.aggregation import is_ordered
from .evaluation.backbones import Backbone, load_backbone
from .evaluation.evaluate_metrics import MammographyScores
from .evaluation.feature_cache import Encoding, SliceFeatures, cached_features
from .evaluation.finetune_settings import FinetuneSettings, parse_settings
from .evaluation.image_classifier import ImageClassifier, add_adapters, linear_head, save_classifier, save_head
from .evaluation.linear_probe import balanced_weights, fit_linear_probe
from .evaluation.metrics import metric_names
from .evaluation.predictions import predict_levels, score_levels
from .evaluation.result import describe_run, format_result
from .evaluation.run_files import check_same_settings, one_run_alone, read_json, write_json, write_parquet
from .evaluation.trainer_finetune import train_classifier
from .evaluation.training_pictures import LabelledImages

logger = logging.getLogger(__name__)


def finetune(settings: FinetuneSettings) -> dict[str, Any]:
    """Runs, goes on with, or returns at once what `settings` ask for: the content of result.json.

    Raises ValueError or OSError, one line, for what cannot be used; nothing is left half-written.
    """
    output = Path(settings.output_dir)
    with one_run_alone(output):
        check_same_settings(output, settings.what_is_computed())
        if (result := read_json(output / "result.json")) is not None:
            return result
        started = time.monotonic()
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
        check_metric(settings, task)
        backbone = load_backbone(settings.backbone, settings.source or None, seed=settings.seed)
        backbone.to(find_device("auto"))
        weights = backbone.settings()  # of the encoder as it comes

        cache = Path(settings.cache_dir) if settings.cache_dir else output / "features"
        features = features_of(backbone, task, cache, settings)
        head, learned = fit_head(features, task, settings)
        if settings.mode != "frozen":
            tuned = train(backbone, head, features, task, settings, output / "checkpoints")
            learned |= tuned
            features = features_of(backbone, task, output / "tuned_features", settings)

        predictions = predict_levels(features, head, task, seed)
        ...


if __name__ == "__main__":
    main()
