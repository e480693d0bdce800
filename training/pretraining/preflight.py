"""Before a run: what the views that are to agree share. In its first hundred steps: whether anything is learned.

Self-distillation and agreement can learn no more than what two views have in common. An estimate of that, in seconds
and without a network: the mutual information of a dozen simple statistics of the two views, taken as jointly Gaussian;
statistics that nobody thought of may be shared as well. In nats, and for losses with prototypes in the unit of the
log's `target_information` too, a fraction of ln K. Ours, not the paper's. Views are the run's own samples, functions of
seed and index, so that the run is the same with it and without.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
from scipy.special import digamma
from torch.nn import functional

from .losses.dense_regression import gaussian_matrix, sobel
from .recipe import Recipe
from .views.sample import PretrainingViews

logger = logging.getLogger(__name__)

NUM_PAIRS, FEWEST_PAIRS = 200, 64  # from so many images; of fewer nothing is said
SIDE_PX = 128  # to which larger views are shrunk
SCALES_PX = (0.7, 1.4, 2.8, 5.6, 11.2)  # standard deviations; four bands between them, and what lies below the first
RIDGE = 1e-6  # of a statistic's variance, so that equal views have a large number instead of infinity
LEAST_NATS = {"global_crops": 1.0, "slices": 1.0, "breast": 0.3, "patient": 0.2}  # below: a warning; our choice
REMEDIES = {
    "global_crops": "raise global_crop_scale (0.32 to 1), lower brightness, contrast and blur_probability, or learn "
    "densely (dense_statistics_weight)",
    "slices": "lower slice_max_distance_mm or brightness, or raise slice_crop_scale",
    "breast": "raise canvas_tokens or canvas_scatter_probability, lower canvas_gain, canvas_field and canvas_gamma, or "
    "set breast_weight to 0",
    "patient": "as for a breast, check that the corpus' patients are people, or set patient_weight to 0",
}
CHUNK = 50  # images whose statistics are taken together
FIRST_STEPS = 100
LEAST_FALL = 0.01  # of a loss over these steps,
DEVIATIONS = 3  # and more than so many standard errors


Seen = tuple[np.ndarray, np.ndarray]  # a view (H, W) and what the encoder sees of it (H, W) bool


def shared_information(views: PretrainingViews, recipe: Recipe) -> dict[str, float]:
    """Return nats that two views share, by the kind of views that the recipe's losses compare; empty for a corpus of
    too few images, or where nothing is compared."""
    cv2.setNumThreads(1)  # workers are forked later
    return {
        kind: gaussian_information(*(statistics_of(each) for each in zip(*pairs, strict=True)))
        for kind, pairs in view_pairs(views, recipe)
    }


def view_pairs(views: PretrainingViews, recipe: Recipe) -> Iterator[tuple[str, list[tuple[Seen, Seen]]]]:
    """Yield kinds of views that agree, and both views of each of NUM_PAIRS images."""
    loss, group = recipe.loss, recipe.views.views_per_patient
    images = views.patients.num_patients if views.patients else views.corpus.num_volumes
    if (count := min(NUM_PAIRS, images)) < FEWEST_PAIRS:
        logger.info("preflight: %d images are too few to say what two views share", images)
        return
    if recipe.uses_crops:
        drawn = replace_locals(views)
        samples = [drawn[index * max(group, 1)] for index in range(count)]
        if loss.dino_weight:
            yield "global_crops", [both(each["global_crops"]) for each in samples]
        pairs = [both(each["slice_pair"]["pixels"]) for each in samples if each["slice_pair"]]
        if recipe.uses_slice_pairs and len(pairs) >= FEWEST_PAIRS:
            yield "slices", pairs
    if recipe.uses_view_groups:
        drawn = replace_locals(views, crops=False)
        first = [of_canvas(drawn[slot * group]) for slot in range(count)]
        for kind, other in (("breast", 1), ("patient", group // 2)):
            if getattr(loss, f"{kind}_weight") and (kind == "patient" or group > 2):
                second = (of_canvas(drawn[slot * group + other]) for slot in range(count))
                yield kind, list(zip(first, second, strict=True))


def replace_locals(views: PretrainingViews, crops: bool = True) -> PretrainingViews:
    """Return views of the same images without what is not compared here, to draw them fast."""
    recipe, canvas = replace(views.recipe, num_local_crops=0), None if crops else views.canvas
    with_pairs, batch = crops and views.with_slice_pairs, views.global_batch_size
    return PretrainingViews(views.corpus, recipe, views.patch_size, views.seed, batch, with_pairs, crops, canvas)


def both(crops: np.ndarray) -> tuple[Seen, Seen]:
    """Of two crops (2, 1, S, S), all of them."""
    seen = np.ones(crops.shape[2:], bool)
    return (crops[0, 0], seen), (crops[1, 0], seen)


def of_canvas(sample: dict[str, Any]) -> Seen:
    """Of a canvas, the breast in the tokens that the encoder sees."""
    inside, tokens = sample["canvas_tissue"], sample["canvas_tokens"]
    patch = inside.shape[0] // tokens.shape[0]
    tokens = np.kron(tokens, np.ones((patch, patch), bool))
    return sample["canvas"][0], tokens & inside if (tokens & inside).any() else tokens


def statistics_of(views: Sequence[Seen]) -> np.ndarray:
    """Return (n, 12) float64."""
    chunks = (views[start : start + CHUNK] for start in range(0, len(views), CHUNK))
    return np.concatenate([
        view_statistics(*(torch.from_numpy(np.stack(part)) for part in zip(*chunk, strict=True))).numpy()
        for chunk in chunks
    ])  # fmt: skip


def view_statistics(images: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return (n, 12) float64 of images (n, H, W) of any range where `seen` (n, H, W) bool: mean, log deviation,
    skewness and log kurtosis of brightness; log mean square of five bands; direction (2) and coherence of gradients."""
    shrink = max(images.shape[1:]) / SIDE_PX
    images, weights = images.float(), seen.float()
    if shrink > 1:
        size = tuple(max(1, round(side / shrink)) for side in images.shape[1:])
        images, weights = (functional.interpolate(each[:, None], size, mode="area")[:, 0] for each in (images, weights))
    weights = weights / weights.sum((1, 2), keepdim=True)

    def mean(values: torch.Tensor) -> torch.Tensor:  # (n, H, W) -> (n,)
        return (values * weights).sum((1, 2))

    average = mean(images)
    centered = images - average[:, None, None]
    deviation = mean(centered.square()).sqrt().clamp_min(1e-4)
    scaled = centered / deviation[:, None, None]
    found = [average, deviation.log(), mean(scaled**3), (mean(scaled**4) + 1e-4).log()]
    smooth = [centered]
    for scale in SCALES_PX:
        down, across = (gaussian_matrix(side, scale) for side in centered.shape[1:])
        smooth.append(down @ centered @ across.T)
    found += [
        (mean((finer - coarser).square()) + 1e-9).log() for finer, coarser in zip(smooth[:-1], smooth[1:], strict=True)
    ]
    x, y = sobel(smooth[2])
    xx, yy, xy = mean(x * x), mean(y * y), mean(x * y)
    total = xx + yy + 1e-9
    found += [(xx - yy) / total, 2 * xy / total, ((xx - yy).square() + 4 * xy.square()).sqrt() / total]
    return torch.stack(found, dim=1).double()


def gaussian_information(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mutual information in nats of (n, k) and (n, l) as if jointly Gaussian, unbiased for those: 1/2 (ln
    det S1 + ln det S2 - ln det S12), less the expectation of the sample's log determinants (of Wishart matrices:
    Bishop 2006, B.81).

    Raises ValueError for too few rows.
    """
    rows, both = len(first), np.hstack((first, second))
    if rows < both.shape[1] + 2:
        raise ValueError(f"{rows} pairs of views for {both.shape[1]} statistics; give more")
    scaled = (both - both.mean(axis=0)) / np.maximum(both.std(axis=0), 1e-12)
    covariance = scaled.T @ scaled / rows + RIDGE * np.eye(both.shape[1])
    split = first.shape[1]

    def log_determinant(block: np.ndarray) -> float:
        size = len(block)
        bias = digamma((rows - 1 - np.arange(size)) / 2).sum() - size * math.log((rows - 1) / 2)
        return float(np.linalg.slogdet(block)[1] - bias)

    parts = covariance[:split, :split], covariance[split:, split:], covariance
    one, other, together = map(log_determinant, parts)
    return (one + other - together) / 2


def describe(shared: dict[str, float], recipe: Recipe) -> tuple[dict[str, float], list[str]]:
    """Return values for the log, and a warning for each kind of views that share too little."""
    scale = math.log(recipe.model.num_prototypes)
    values, warnings = {}, []
    for kind, nats in shared.items():
        values[f"shared_nats_{kind}"] = nats
        unit = ""
        if kind in ("global_crops", "slices"):
            values[f"shared_information_{kind}"] = nats / scale
            unit = f", {nats / scale:.3f} in the unit of target_information"
        if nats < LEAST_NATS[kind]:
            warnings.append(
                f"two views ({kind.replace('_', ' ')}) share {max(nats, 0):.2f} nats{unit}; to learn from their "
                f"agreement takes {LEAST_NATS[kind]} or more: {REMEDIES[kind]}"
            )
    return values, warnings


def learned_nothing(lines: Sequence[dict[str, float]]) -> str | None:
    """Return a warning where no loss has fallen from the first to the second half of the log's `lines` of the first
    steps, by LEAST_FALL and by more than chance; None where one has, and for fewer than six lines."""
    lines = [line for line in lines if "loss" in line and line["step"] <= FIRST_STEPS]
    half = len(lines) // 2
    if half < 3 or any(_falls([line[name] for line in lines], half) for name in lines[0] if name.startswith("loss_")):
        return None
    return (
        f"nothing is learned: no loss has fallen by {LEAST_FALL:.0%} within {lines[-1]['step']} steps. Unless the "
        "warm-up is far longer: raise learning_rate, lower warmup_steps; of prototypes lower teacher_temperature and "
        "teacher_temperature_start; look at the views with training.preview"
    )


def _falls(values: Sequence[float], half: int) -> bool:
    first = float(np.mean(values[:half]))
    noise = float(np.square(np.diff(values)).mean()) / 2  # variance about whatever trend there is (von Neumann 1941)
    least = max(LEAST_FALL * abs(first), DEVIATIONS * math.sqrt(2 * noise / half))
    return first - float(np.mean(values[-half:])) > least
