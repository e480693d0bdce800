"""What the study compares: plain DINOv2, every idea together, each idea alone and each left out, at equal compute."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataset_scripts.corpus.reader import Corpus
from training.pretraining.compute import step_flops
from training.pretraining.networks import random_backbone
from training.pretraining.recipe import Recipe, load_recipe
from training.pretraining.views.sample import PretrainingViews, collate

# what switches an idea off; the study's recipe has all of them on
FACTORS = {
    "tissue-aware crops": {"tissue_aware_crops": "false"},
    "tissue-aware masks": {"tissue_aware_masks": "false"},
    "adjacent slices": {"adjacent_slice_weight": "0", "adjacent_patch_weight": "0"},
    "tissue tokens": {"tissue_tokens": "false"},
    "dense regression": {"dense_statistics_weight": "0", "dense_components_weight": "0"},
    "agreement of views": {"breast_weight": "0", "patient_weight": "0", "views_per_patient": "0"},
}
UNTRAINED, PLAIN, FULL = "untrained", "plain DINOv2", "MammoDINO"
HAND_CRAFTED = "hand-crafted"  # features without an encoder: how much there is to see
CANVAS_ALONE = "without DINO and iBOT"  # as the recipe small_data learns
WITHOUT_CROPS = {"dino_weight": "0", "ibot_weight": "0", "koleo_weight": "0", **FACTORS["adjacent slices"]}
COUNTED_STEPS = 12  # batches from which a configuration's mean cost of a step is counted


@dataclass(frozen=True)
class Size:
    """How much is simulated and trained."""

    recipe: str  # of training/recipes, every idea on
    pretraining_patients: int  # simulated, both views of a breast
    learn_patients: int  # that the probes learn from, both views of a breast
    test_patients: int  # a view each
    plain_steps: int  # of plain DINOv2; the others get as many as its compute allows
    seeds: tuple[int, ...] = (0, 1, 2)
    phantom: dict[str, Any] = field(default_factory=dict)  # PhantomParameters other than the defaults


SIZES = {
    "minutes": Size("study_small", 24, 16, 16, 4, (0,), {"num_slices": 6, "height_px": 128, "width_px": 96}),
    "hour": Size("study_small", 200, 300, 600, 200),
    "evening": Size("study_small", 500, 500, 1000, 1000),
    "night": Size(
        "vits14_single_gpu", 2000, 2000, 1500, 5000, phantom={"num_slices": 40, "height_px": 512, "width_px": 320}
    ),
}


@dataclass(frozen=True)
class Configuration:
    """One row of the study."""

    name: str
    on: frozenset[str]  # of FACTORS
    is_trained: bool = True
    without_crops: bool = False  # no DINO, iBOT and KoLeo: what is learned from canvases alone

    def overrides(self) -> list[str]:
        """Return the recipe's overrides on the command line."""
        off = [setting for factor, settings in FACTORS.items() if factor not in self.on for setting in settings.items()]
        off += WITHOUT_CROPS.items() if self.without_crops else ()
        return [part for name, value in off for part in (f"--{name}", value)]


def configurations() -> Iterator[Configuration]:
    """Yield all in the order in which they are run: what answers the main question first."""
    everything = frozenset(FACTORS)
    yield Configuration(PLAIN, frozenset())
    yield Configuration(FULL, everything)
    yield Configuration(CANVAS_ALONE, everything - {"adjacent slices"}, without_crops=True)
    yield from (Configuration(f"without {factor}", everything - {factor}) for factor in FACTORS)
    yield from (Configuration(f"only {factor}", frozenset({factor})) for factor in FACTORS)
    yield Configuration(UNTRAINED, everything, is_trained=False)  # random weights: what looking at pixels gives
    yield Configuration(HAND_CRAFTED, frozenset(), is_trained=False)


def equal_compute_steps(size: Size, configuration: Configuration, recipe_arguments: list[str]) -> int:
    """Return the steps that cost as much as `size.plain_steps` of plain DINOv2, by their matrix products."""
    if not configuration.is_trained:
        return 0
    plain = Configuration(PLAIN, frozenset())
    costs = [mean_step_flops(load_recipe(recipe_arguments + each.overrides())) for each in (plain, configuration)]
    return round(size.plain_steps * costs[0] / costs[1])


def mean_step_flops(recipe: Recipe) -> float:
    """Return the cost of a forward in FLOP, the mean over this recipe's first batches; nothing is trained."""
    run, model, batch_size = recipe.run, recipe.model, recipe.run.per_device_train_batch_size
    canvas = (model.image_height, model.image_width) if recipe.uses_canvas else None
    drawn = recipe.uses_slice_pairs, recipe.uses_crops, canvas
    views = PretrainingViews(Corpus(run.corpus), recipe.views, model.patch_size, run.seed, batch_size, *drawn)
    config, costs = random_backbone(recipe).config, []
    for forward in range(run.max_steps * run.gradient_accumulation_steps)[:COUNTED_STEPS]:
        batch = collate([views[forward * batch_size + index] for index in range(batch_size)])
        costs.append(step_flops(batch, config, recipe))
    return float(np.mean(costs))
