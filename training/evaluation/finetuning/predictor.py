"""The heads of a run, from features to probabilities of images, breasts and patients: fitted, saved, opened, applied.

Everything that a run predicts, of its own test part and of new files, goes through one `Predictor`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file, save_file
from torch import nn

from training.evaluation.calibration import Calibration, fit_calibration, undo_weights
from training.evaluation.run_settings import FinetuneSettings

from .aggregation import GROUPS, bags_of, groups_of, level_rows, max_probabilities, mean_probabilities
from .feature_cache import Encoding, SliceFeatures
from .heads import (
    AttentionPooling,
    Bags,
    LinearHead,
    attention_probabilities,
    balanced_weights,
    empty_pooling,
    fit_attention,
    fit_linear_probe,
)
from .multiple_instance import MultipleInstanceHead, fit_head, image_probabilities
from .tiles import Tiling

GROUP_HEADS_FILE, CALIBRATION_FILE = "groups.safetensors", "calibration.json"
CALIBRATED = "calibrated_"  # before the number of a class; p_ is what the head says


@dataclass(frozen=True)
class Predictor:
    """What makes probabilities of features.

    Attributes:
        head: of images. A linear one is of slices: an image is their mean.
        ordered: whether a breast or patient has the class of its worst image.
        groups: attention over the slices of a breast and of a patient; none where the data set does not name them, and
            none of tiles; None: mean and maximum only.
        calibrations: by level.
    """

    head: nn.Module
    ordered: bool
    groups: Mapping[str, AttentionPooling | None] = field(default_factory=dict)
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def predict(self, slices: SliceFeatures, tiles: SliceFeatures | None = None) -> pd.DataFrame:
        """Return a row an image (level `image`), and a row a breast and a patient for each way of aggregation
        (`breast_mean`, `breast_max`, `breast_attention`, `patient_mean`, ..., of tiles `breast_max` and `patient_max`);
        columns level, IDENTIFIERS, label where `slices` have one, p_0 .. p_{C-1} and calibrated_0 .. ."""
        return self.levels(slices, self.of_images(slices, tiles))

    def of_images(self, slices: SliceFeatures, tiles: SliceFeatures | None = None) -> np.ndarray:
        """Return (n, C) float64, not calibrated."""
        if isinstance(self.head, MultipleInstanceHead):
            assert tiles is not None
            return image_probabilities(self.head, slices, tiles)
        if isinstance(self.head, AttentionPooling):
            return attention_probabilities(self.head, slices.values, slices.image)
        assert isinstance(self.head, nn.Linear)
        of_slices = LinearHead.of(self.head).probabilities(slices.values)
        return mean_probabilities(of_slices, slices.image, len(slices.table))

    def levels(self, slices: SliceFeatures, probabilities: np.ndarray) -> pd.DataFrame:
        """Return what `predict` does, of the probabilities (n, C) of the images."""
        labels = slices.table["label"].to_numpy() if "label" in slices.table else None
        found = [level_rows("image", slices.table, labels, probabilities)]
        for level in GROUPS:
            names, bags = bags_of(slices, level, self.ordered)
            if not len(names) or not (level in self.groups or isinstance(self.head, MultipleInstanceHead)):
                continue
            _, group = groups_of(slices.table, level)
            chosen, own = probabilities[group >= 0], group[group >= 0]
            ways = {"max": max_probabilities(chosen, own, len(names), self.ordered)}
            if level in self.groups:
                ways = {"mean": mean_probabilities(chosen, own, len(names)), **ways}
            if pooling := self.groups.get(level):
                ways["attention"] = attention_probabilities(pooling, bags.features, bags.group)
            of_groups = bags.labels if labels is not None else None
            found += [level_rows(f"{level}_{way}", names, of_groups, each) for way, each in ways.items()]
        rows = pd.concat(found, ignore_index=True)
        return pd.concat([rows, self._calibrated(rows)], axis=1)

    def _calibrated(self, rows: pd.DataFrame) -> pd.DataFrame:
        columns = [name for name in rows if name.startswith("p_")]
        calibrated = rows[columns].to_numpy(copy=True)
        for level, calibration in self.calibrations.items():
            of_level = (rows["level"] == level).to_numpy()
            calibrated[of_level] = calibration.apply(calibrated[of_level])
        return pd.DataFrame(calibrated, rows.index, [CALIBRATED + name[2:] for name in columns])

    def calibrated_on(
        self, slices: SliceFeatures, tiles: SliceFeatures | None = None, prior: Calibration | None = None
    ) -> "Predictor":
        """Return the predictor calibrated on a validation part, images about `prior`, groups about them."""
        calibrations: dict[str, Calibration] = {}
        for level, rows in self.predict(slices, tiles).groupby("level", sort=False):
            probabilities = rows[[name for name in rows if name.startswith("p_")]].to_numpy()
            about = calibrations.get("image") or prior or Calibration(1.0, (0.0,) * probabilities.shape[1])
            calibrations[str(level)] = fit_calibration(rows["label"].to_numpy(int), probabilities, about)
        return Predictor(self.head, self.ordered, self.groups, calibrations)

    def save(self, folder: Path) -> None:
        """Write all but the head of images into a folder of `save_classifier`."""
        state = {f"{level}.{name}": each for level, pooling in self.groups.items() if pooling
                 for name, each in pooling.state_dict().items()}  # fmt: skip
        if state:
            save_file(state, folder / GROUP_HEADS_FILE)
        about = {
            "ordered": self.ordered,
            "calibrations": {level: each._asdict() for level, each in self.calibrations.items()},
        }
        (folder / CALIBRATION_FILE).write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def open(cls, folder: Path, head: nn.Module) -> "Predictor":
        """Return what `save` wrote beside `head`. Raises OSError where there is nothing of it."""
        about = json.loads((folder / CALIBRATION_FILE).read_text())
        path, groups = folder / GROUP_HEADS_FILE, {}
        state = load_file(path) if path.is_file() else {}
        for level in dict.fromkeys(name.partition(".")[0] for name in state):
            own = {name.partition(".")[2]: each for name, each in state.items() if name.startswith(f"{level}.")}
            groups[level] = empty_pooling(*own["classifier.weight"].shape[::-1])
            groups[level].load_state_dict(own)
        calibrations = {level: Calibration.of(each) for level, each in about["calibrations"].items()}
        return cls(head.eval(), about["ordered"], groups, calibrations)


def fit_predictor(
    slices: SliceFeatures,
    tiles: SliceFeatures | None,
    probe: LinearHead,
    ordered: bool,
    settings: FinetuneSettings,
) -> Predictor:
    """Return the heads that `settings` ask for, which start from the linear probe, calibrated on the validation part.

    Attention pooling of groups learns from the training part, with classes that weigh the same unless
    `class_imbalance` is none.
    """
    balanced, seed, num_classes = settings.class_imbalance != "none", settings.seed, len(probe.bias)
    labels = slices.of("train").table["label"].to_numpy(int)
    prior = undo_weights(labels, num_classes) if balanced else None
    if tiles is not None:
        predictor = Predictor(fit_head(slices, tiles, probe, tiling_of(settings), ordered, balanced, seed), ordered)
        return predictor.calibrated_on(slices.of("validation"), tiles.of("validation"), prior)
    parts = {name: slices.of(name) for name in ("train", "validation")}

    def attention(bags: dict[str, Bags]) -> AttentionPooling:
        weights = balanced_weights(bags["train"].labels, num_classes) if balanced else np.ones(num_classes)
        return fit_attention(bags["train"], bags["validation"], probe.weight, probe.bias, weights, seed)

    head: nn.Module = probe.layer()
    if settings.head == "attention":
        head = attention(
            {
                name: Bags(each.values, each.image, each.table["label"].to_numpy(copy=True))
                for name, each in parts.items()
            }
        )
    groups = {}
    for level in GROUPS:
        bags = {name: bags_of(each, level, ordered)[1] for name, each in parts.items()}
        if all(len(each.labels) for each in bags.values()):  # else the data set does not say which breast
            groups[level] = attention(bags)
    return Predictor(head, ordered, groups).calibrated_on(parts["validation"], prior=prior)


def fit_probe(
    features: SliceFeatures, num_classes: int, settings: FinetuneSettings
) -> tuple[LinearHead, dict[str, Any]]:
    """Fit the linear probe: every slice counts with the label of its image. Return it and what there is to say."""
    parts = {name: features.of(name) for name in ("train", "validation")}
    part = {name: (each.values, each.table["label"].to_numpy()[each.image]) for name, each in parts.items()}
    balanced = settings.class_imbalance != "none"
    weights = balanced_weights(part["train"][1], num_classes) if balanced else np.ones(num_classes)
    probe = fit_linear_probe(*part["train"], *part["validation"], weights)
    head = LinearHead.of(probe.head.layer())  # as it is saved
    return head, {"penalty": probe.penalty, "validation_losses": probe.validation_losses}


def encoding_of(settings: FinetuneSettings, tiling: Tiling | None = None) -> Encoding:
    return Encoding(
        settings.slices_per_volume,
        settings.per_device_eval_batch_size,
        settings.dataloader_num_workers,
        settings.bf16,
        tiling,
    )


def tiling_of(settings: FinetuneSettings) -> Tiling:
    return Tiling(settings.canvas_height, settings.tile_size, settings.tile_overlap, settings.min_tissue)
