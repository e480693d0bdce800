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
}
UNTRAINED, PLAIN, FULL = "untrained", "plain DINOv2", "MammoDINO"
HAND_CRAFTED = "hand-crafted"  # features without an encoder: how much there is to see
FULL_EQUAL_IMAGES = "MammoDINO, equal images"
PLAIN_LARGER_CROPS = "plain DINOv2, larger crops"
# the recipe's crops are chosen for all ideas together; by trials, plain DINOv2 does better with these
LARGER_CROPS = ("--global_crop_scale", "0.15", "0.6", "--local_crop_scale", "0.03", "0.15")
COUNTED_STEPS = 12  # batches from which a configuration's mean cost of a step is counted


@dataclass(frozen=True)
class Size:
    """How much is simulated and trained."""

    recipe: str  # of training/recipes, every idea on
    pretraining_patients: int  # simulated; the probes learn from the same
    test_patients: int
    plain_steps: int  # of plain DINOv2; the others get as many as its compute allows
    seeds: tuple[int, ...] = (0, 1, 2)
    phantom: dict[str, Any] = field(default_factory=dict)  # PhantomParameters other than the defaults
    slices_per_volume: int = 1  # that the probes see of a whole breast


SIZES = {
    "minutes": Size("study_small", 24, 16, 4, (0,), {"num_slices": 6, "height_px": 128, "width_px": 96}),
    "hour": Size("study_small", 1000, 1000, 200),
    "evening": Size("study_small", 1000, 1000, 1000),
    "night": Size("vits14_single_gpu", 4000, 1500, 5000, phantom={"num_slices": 40, "height_px": 512, "width_px": 320}),
}


@dataclass(frozen=True)
class Configuration:
    """One row of the study."""

    name: str
    on: frozenset[str]  # of FACTORS
    equal_images: bool = False  # as many steps as plain DINOv2, whatever they cost
    is_trained: bool = True
    more: tuple[str, ...] = ()  # arguments of its own, beside what switches ideas off

    def overrides(self) -> list[str]:
        """Return the recipe's overrides on the command line."""
        off = [setting for factor, settings in FACTORS.items() if factor not in self.on for setting in settings.items()]
        return [part for name, value in off for part in (f"--{name}", value)] + list(self.more)


def configurations() -> Iterator[Configuration]:
    """Yield all in the order in which they are run: what answers the main question first."""
    everything = frozenset(FACTORS)
    yield Configuration(PLAIN, frozenset())
    yield Configuration(FULL, everything)
    yield Configuration(PLAIN_LARGER_CROPS, frozenset(), more=LARGER_CROPS)
    yield from (Configuration(f"without {factor}", everything - {factor}) for factor in FACTORS)
    yield from (Configuration(f"only {factor}", frozenset({factor})) for factor in FACTORS)
    yield Configuration(UNTRAINED, everything, is_trained=False)  # random weights: what looking at pixels gives
    yield Configuration(HAND_CRAFTED, frozenset(), is_trained=False)
    yield Configuration(FULL_EQUAL_IMAGES, everything, equal_images=True)


def equal_compute_steps(size: Size, configuration: Configuration, recipe_arguments: list[str]) -> int:
    """Return the steps that cost as much as `size.plain_steps` of plain DINOv2, by their matrix products."""
    if not configuration.is_trained:
        return 0
    if configuration.equal_images:
        return size.plain_steps
    plain = Configuration(PLAIN, frozenset())
    costs = [mean_step_flops(load_recipe(recipe_arguments + each.overrides())) for each in (plain, configuration)]
    return round(size.plain_steps * costs[0] / costs[1])


def mean_step_flops(recipe: Recipe) -> float:
    """Return the cost of a forward in FLOP, the mean over this recipe's first batches; nothing is trained."""
    run, loss, batch_size = recipe.run, recipe.loss, recipe.run.per_device_train_batch_size
    slice_pairs = loss.adjacent_slice_weight > 0 or loss.adjacent_patch_weight > 0
    views = PretrainingViews(
        Corpus(run.corpus), recipe.views, recipe.model.patch_size, run.seed, batch_size, slice_pairs
    )
    config, costs = random_backbone(recipe).config, []
    for forward in range(run.max_steps * run.gradient_accumulation_steps)[:COUNTED_STEPS]:
        batch = collate([views[forward * batch_size + index] for index in range(batch_size)])
        costs.append(step_flops(batch, config, recipe))
    return float(np.mean(costs))
