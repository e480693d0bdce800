"""The trust sheet of a finished run of training.finetune, and how it does on other data. Research use only.

    python -m training.trust RUN [--external LABELS.csv DATASET=FOLDER ...]

Every run leaves the sheet, trust.md with trust.png, in its folder. --external evaluates it as it is, nothing fitted, on
other data with the same task and classes, a label table or a data set of dataset_scripts.benchmarks, and puts the
figure beside the internal one.
"""

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from dataset_scripts.benchmarks.labels import TABLE
from dataset_scripts.benchmarks.task import TaskTable, labeled_images, open_benchmark
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from modeling_mammodino.tools.embed import find_device
from training.evaluation.backbones.preprocessing import MammoDinoImages
from training.evaluation.backbones.registry import Backbone, load_backbone
from training.evaluation.calibration import Calibration, measure
from training.evaluation.finetuning.feature_cache import SliceFeatures, cached_features
from training.evaluation.finetuning.predictor import Predictor, encoding_of, fit_probe
from training.evaluation.metrics import bootstrap
from training.evaluation.run_settings import FinetuneSettings
from training.evaluation.runs import RESULT_FILE, read_json
from training.evaluation.subgroups import (
    HEADLINE_METRICS,
    at_level,
    headline_level,
    identifier_of,
    probe_source,
    score_headline,
    score_subgroups,
)
from training.evaluation.trust_sheet import TRUST_FILE, write_sheet
from training.studies.hand_crafted import HandCraftedReader

from .predict import open_run, predict_classes

logger = logging.getLogger(__name__)

UNTRAINED, HAND_CRAFTED = "untrained", "hand-crafted"


class HandCrafted(nn.Module):
    """Hand-crafted features in the place of a backbone."""

    kind, source = "hand_crafted", HAND_CRAFTED

    def __init__(self, image_processor: MammoDinoImageProcessor):
        super().__init__()
        self.preprocess, self.processor = MammoDinoImages(image_processor), image_processor
        size = image_processor.size
        self.reader = HandCraftedReader((size["height"], size["width"]), image_processor.patch_size)
        self.device_and_dtype = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: torch.Tensor, tissue_mask: torch.Tensor) -> torch.Tensor:
        mean, std = self.processor.mean_and_std
        return self.reader.whole(pixel_values * std + mean, tissue_mask)

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "images": self.preprocess.settings()}


def examine(
    settings: FinetuneSettings,
    task: TaskTable,
    backbone: Backbone,
    features: SliceFeatures,
    predictor: Predictor,
    predictions: pd.DataFrame,
    cache: Path,
) -> dict[str, Any]:
    """Return what trust.json holds of a run: its test `predictions`, on `features` of all splits."""
    level = headline_level(settings.task, predictions["level"].unique().tolist())
    metric, resampling = HEADLINE_METRICS.get(settings.task, "auc"), (settings.num_resamples, settings.seed)
    baselines = baseline_predictions(settings, task, backbone, features.table, cache) if settings.baselines else {}
    score, rows = score_headline(predictions, baselines, level, metric, *resampling)
    of_level, labels, before = at_level(predictions, level, "p_")
    patients, unchanged = of_level["patient_id"].to_numpy(str), Calibration(1.0, (0.0,) * len(task.classes))
    calibration = predictor.calibrations.get(level, unchanged)
    validation = features.of("validation").table
    return {
        "title": f"{settings.task} on {name_of(settings)}, {backbone.kind}, {settings.mode} {settings.head}",
        "meaning": f"{task.definition.meaning[:1].upper()}{task.definition.meaning[1:]}.".replace("..", "."),
        "command": settings.command(),
        "headline": {
            "level": level,
            "metric": metric,
            "score": score,
            "units": len(labels),
            "patients": len(set(patients)),
            "classes": {name: int((labels == number).sum()) for number, name in enumerate(task.classes)},
        },
        "rows": rows,
        "external": {},
        "calibration": {
            "temperature": calibration.temperature,
            "bias": calibration.bias,
            "validation_units": int(validation[identifier_of(level)].nunique()),
            "before": measure(labels, before, patients, *resampling),
            "after": measure(labels, at_level(predictions, level, "calibrated_")[2], patients, *resampling),
        },
        "subgroups": score_subgroups(predictions, features.table, settings.task, level, metric, *resampling),
        "source_probe": probe_source(features, *resampling),
    }


def name_of(settings: FinetuneSettings) -> str:
    return f"{Path(settings.data_dir).stem}, a label table" if settings.dataset == TABLE else settings.dataset


def baseline_predictions(
    settings: FinetuneSettings, task: TaskTable, backbone: Backbone, table: pd.DataFrame, cache: Path
) -> dict[str, pd.DataFrame]:
    """Return test predictions of a linear probe on untrained and on hand-crafted features of the images of `table`."""
    own = backbone.preprocess.image_processor if isinstance(backbone.preprocess, MammoDinoImages) else None
    source = backbone.source if own is not None else None
    models: dict[str, Any] = {HAND_CRAFTED: HandCrafted(own or MammoDinoImageProcessor())}
    if backbone.kind != UNTRAINED:
        name, last_layers = (UNTRAINED, backbone.last_layers) if own else (f"{UNTRAINED} ViT-S/14", 1)
        twin = load_backbone(UNTRAINED, source, seed=settings.seed, last_layers=last_layers)
        models = {name: twin.to(find_device("auto")), **models}
    found = {}
    for name, model in models.items():
        features = cached_features(model, table, cache, task.benchmark.name, encoding_of(settings))
        if features.refused:  # not the same patients
            logger.warning("%s features: %d images were refused; left out of the sheet", name, len(features.refused))
            continue
        probe, _ = fit_probe(features, len(task.classes), settings)
        predictor = Predictor(probe.layer(), task.definition.is_ordered, {"breast": None, "patient": None})
        found[name] = predictor.predict(features.of("test"))
    return found


def evaluate_external(run: Path, external: str, allow_missing: bool = False) -> dict[str, Any]:
    """Evaluate a finished run as it is on other data, DATASET=FOLDER or a label table, and write it into its sheet.

    Raises ValueError where the data have other classes, or the run kept no model or no sheet.
    """
    settings, classes = open_run(run)
    if not isinstance(settings, FinetuneSettings):
        raise ValueError(f"{run}: is a run of training.detect; trust sheets are of training.finetune")
    trust, result = read_json(run / TRUST_FILE), read_json(run / RESULT_FILE)
    if trust is None or result is None:
        raise ValueError(f"{run}: has no {TRUST_FILE}; run it again, into another folder")
    dataset, _, folder = ("", "", external) if user_path(external).exists() else external.rpartition("=")
    where = dataset or TABLE, user_path(folder)
    images, definition = labeled_images(
        *where, settings.task, same_definition(*where, settings.task, result["definition"]),
        classes=classes if settings.classes else (), allow_missing=allow_missing,
    )  # fmt: skip
    if list(definition.classes) != classes:
        raise ValueError(
            f"--external {external}: its classes are {', '.join(definition.classes)}, those of the run "
            f"{', '.join(classes)}; name them alike, in the same order"
        )
    rows, refused, _ = predict_classes(run, images, settings, classes)
    level = trust["headline"]["level"]
    level = level if (rows["level"] == level).any() else "image"
    of_level, labels, probabilities = at_level(rows, level, "p_")
    patients, metric = of_level["patient_id"].to_numpy(str), trust["headline"]["metric"]
    score = bootstrap(labels, probabilities, patients, [metric], settings.num_resamples, settings.seed)[metric]
    calibrated = at_level(rows, level, "calibrated_")[2]
    name = dataset or Path(folder).stem
    if trust["external"].get(name, {}).get("data", external) != external:  # two tables of one name
        name = external
    trust["external"][name] = {
        "data": external,
        "level": level,
        "units": len(labels),
        "patients": len(set(patients)),
        "refused": len(refused),
        "score": list(score),
        "calibration": measure(labels, calibrated, patients, settings.num_resamples, settings.seed),
    }
    write_sheet(run, trust, result["metrics"])
    return trust


def same_definition(dataset: str, folder: Path, task: str, name: str) -> str | None:
    """Return the name of a definition where the data have one of that name, else None, their own, which is said."""
    has = [each.name for each in open_benchmark(dataset, folder).definitions if each.task == task]
    if name in has or not has:
        return name if has else None
    logger.info("%s: has no definition %r of %s; taken as %r", folder, name, task, has[0])
    return None


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.trust", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=user_path, help="output_dir of training.finetune")
    parser.add_argument("--external", nargs="+", default=[], help="other data: label tables, or DATASET=FOLDER")
    parser.add_argument("--allow_missing", action="store_true", help="leave images out whose file is not there")
    options = parser.parse_args(arguments)
    with command_line("trust"):
        for external in options.external:
            evaluate_external(options.run, external, options.allow_missing)
        if not (sheet := options.run / "trust.md").is_file():
            raise ValueError(f"{sheet}: no such file; give the output_dir of a finished run of training.finetune")
        print(sheet.read_text())


if __name__ == "__main__":
    main()
