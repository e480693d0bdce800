"""Multinomial logistic regression on frozen features, its L2 penalty chosen on the validation part.

Features are strongly correlated, on which L-BFGS takes hundreds of steps. They are turned to their principal axes once,
and each axis is scaled by the curvature that the loss has along it at most: the minimum is the same, and some twenty
steps reach it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from torch import nn

# of the mean loss, from strong to weak
PENALTIES = np.logspace(1, -5, 13)
PATIENCE = 2  # weaker penalties that may be worse, before the search ends
MAX_STEPS = 500


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier of features as they come: weight (C, F) and bias (C,), float64."""

    weight: np.ndarray
    bias: np.ndarray

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(n, C) float64 of features (n, F)."""
        return softmax(features @ self.weight.T + self.bias, axis=1)

    def layer(self) -> nn.Linear:
        layer = nn.Linear(*self.weight.shape[::-1])
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.weight))
            layer.bias.copy_(torch.from_numpy(self.bias))
        return layer

    @classmethod
    def of(cls, layer: nn.Linear) -> "LinearHead":
        return cls(*(each.detach().cpu().double().numpy() for each in (layer.weight, layer.bias)))


@dataclass(frozen=True)
class LinearProbe:
    """The head, its L2 penalty on standardized features, and the validation loss of each penalty tried."""

    head: LinearHead
    penalty: float
    validation_losses: dict[float, float]


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(C,) weights under which every class of `labels` (n,) weighs the same, 1 in the mean over them."""
    counts = np.bincount(labels, minlength=num_classes)
    return len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))


def fit_linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    validation_features: np.ndarray,
    validation_labels: np.ndarray,
    class_weights: np.ndarray,
) -> LinearProbe:
    """Fits on features (n, F) float32 with labels (n,) int 0..C-1, for each of PENALTIES from strong to weak until the
    loss on the validation part rises; class_weights (C,) weigh both losses. No randomness."""
    mean = features.mean(axis=0, dtype=np.float64)
    std = features.std(axis=0, dtype=np.float64)
    std[std < 1e-6 * (1 + np.abs(mean))] = 1  # a feature that says nothing
    sample_weights = class_weights[labels].astype(np.float32)[:, None]
    standardized = ((features - mean) / std).astype(np.float32)
    curvature, axes = np.linalg.eigh((standardized * sample_weights).T @ standardized / len(labels))
    axes, turned = axes.astype(np.float32), standardized @ axes.astype(np.float32)  # (F, F), (n, F)
    turned_validation = ((validation_features - mean) / std).astype(np.float32) @ axes
    targets = np.eye(len(class_weights), dtype=np.float32)[labels]

    weight, bias = np.zeros((features.shape[1], len(class_weights))), np.zeros(len(class_weights))
    best, losses = (weight, bias, float(PENALTIES[0])), {}
    for penalty in PENALTIES:
        weight, bias = _minimize(turned, targets, sample_weights, float(penalty), curvature, weight, bias)
        log_probabilities = log_softmax(turned_validation @ weight + bias, axis=1)
        of_label = np.take_along_axis(log_probabilities, validation_labels[:, None], axis=1)[:, 0]
        losses[float(penalty)] = float(-(class_weights[validation_labels] * of_label).mean())
        if losses[float(penalty)] == min(losses.values()):
            best = (weight, bias, float(penalty))
        elif min(list(losses.values())[-PATIENCE:]) > losses[best[2]]:
            break
    weight, bias, penalty = best
    weight = (axes.astype(np.float64) @ weight / std[:, None]).T  # back to features as they come
    return LinearProbe(LinearHead(weight, bias - weight @ mean), penalty, losses)


def _minimize(
    features: np.ndarray,
    targets: np.ndarray,
    sample_weights: np.ndarray,
    penalty: float,
    curvature: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean weighted cross entropy + penalty / 2 * |weight|^2 from a first weight (F, C) and bias (C,)."""
    scale = np.append((np.maximum(curvature, 0) / 4 + penalty) ** -0.5, 1)[:, None]  # (F + 1, 1)

    def loss_and_gradient(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        both = scaled.reshape(len(scale), -1) * scale
        inner = both[:-1].astype(np.float32)
        log_probabilities = log_softmax(features @ inner + both[-1].astype(np.float32), axis=1)  # (n, C)
        loss = -float((sample_weights * targets * log_probabilities).sum(dtype=np.float64)) / len(targets)
        residual = sample_weights * (np.exp(log_probabilities) - targets) / np.float32(len(targets))
        gradient = np.vstack((features.T @ residual + penalty * both[:-1], residual.sum(axis=0)))
        return loss + penalty / 2 * float((both[:-1] ** 2).sum()), (gradient * scale).ravel()

    start = (np.vstack((weight, bias)) / scale).ravel()
    found = minimize(
        loss_and_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": MAX_STEPS, "ftol": 1e-8, "gtol": 1e-5},
    )
    both = found.x.reshape(len(scale), -1) * scale
    return both[:-1], both[-1]
