"""Heads of frozen features: a linear probe of images, and attention pooling of images, breasts and patients.

The linear probe is a multinomial logistic regression whose L2 penalty is chosen on the validation part. Features are
strongly correlated, on which L-BFGS takes hundreds of steps. They are turned to their principal axes once, and each
axis is scaled by the largest curvature that the loss has along it: the minimum is the same, and some twenty steps reach
it.

Attention pooling is gated attention over the slices of a group (Ilse et al. 2018, arXiv 1802.04712, equation 9). It
starts as what is known: every slice weighs the same, and the linear layer is that of the images. What it learns beyond
that counts only if the validation part confirms it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from torch import nn
from torch.nn import functional

PENALTIES = np.logspace(1, -5, 13)  # of the mean loss, from strong to weak
PENALTY_PATIENCE = 2  # weaker penalties that may be worse, before the search ends
MAX_STEPS = 500

HIDDEN, DROPOUT = 64, 0.25  # of attention pooling
NUM_EPOCHS, PATIENCE, BAGS_PER_BATCH = 50, 6, 64
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier of features as they come: weight (C, F) and bias (C,), float64."""

    weight: np.ndarray
    bias: np.ndarray

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return (n, C) float64 of features (n, F)."""
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
    """Return weights (C,) under which every class of `labels` (n,) weighs the same, 1 in the mean over them."""
    counts = np.bincount(labels, minlength=num_classes)
    return len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))


def mean_and_std(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (F,) float64 of features (n, F); that of a constant feature is 1."""
    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    std[std < 1e-6 * (1 + np.abs(mean))] = 1
    return mean, std


def fit_linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    validation_features: np.ndarray,
    validation_labels: np.ndarray,
    class_weights: np.ndarray,
) -> LinearProbe:
    """Fit on features (n, F) float32 with labels (n,) int 0..C-1, for each of PENALTIES from strong to weak until the
    loss on the validation part rises; class_weights (C,) weigh both losses. No randomness."""
    mean, std = mean_and_std(features)
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
        elif min(list(losses.values())[-PENALTY_PATIENCE:]) > losses[best[2]]:
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
    """Minimize mean weighted cross entropy + penalty / 2 * |weight|^2 from a first weight (F, C) and bias (C,)."""
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


@dataclass(frozen=True)
class Bags:
    """Features (N, F) float32 of slices, the group (N,) int 0..G-1 of each, and the labels (G,) int of the groups."""

    features: np.ndarray
    group: np.ndarray
    labels: np.ndarray


class GatedAttention(nn.Module):
    """How much each row of a group counts, from features of some width; at the start all count the same."""

    def __init__(self, width: int):
        super().__init__()
        self.tanh, self.gate = nn.Linear(width, HIDDEN), nn.Linear(width, HIDDEN)
        self.attention = nn.Linear(HIDDEN, 1, bias=False)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.zeros_(self.attention.weight)

    def attention_weights(self, features: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
        """Return (N,): softmax over the rows of each group of w^T (tanh(V h) * sigmoid(U h)); features (N, width)."""
        dropped = self.dropout(features)
        scores = self.attention(torch.tanh(self.tanh(dropped)) * torch.sigmoid(self.gate(dropped)))[:, 0]
        highest = scores.new_full((num_groups,), -torch.inf).scatter_reduce(0, group, scores.detach(), "amax")
        exponentials = (scores - highest[group]).exp()
        return exponentials / scores.new_zeros(num_groups).index_add(0, group, exponentials)[group]


class AttentionPooling(GatedAttention):
    """features (N, F) of G groups -> logits (G, C). `weight` (C, F) and `bias` (C,) are those that it starts with, for
    features as they come; `mean` and `std` (F,) standardize them for the attention."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray):
        super().__init__(weight.shape[1])
        self.register_buffer("mean", torch.from_numpy(mean).float())
        self.register_buffer("std", torch.from_numpy(std).float())
        self.classifier = standardized_layer(weight, bias, mean, std)

    def forward(self, features: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
        standardized = (features - self.mean) / self.std
        return self.classifier(
            weighted_mean(standardized, self.attention_weights(standardized, group, num_groups), group, num_groups)
        )


def standardized_layer(weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray) -> nn.Linear:
    """Return the linear layer (C, F) of features as they come as one of features standardized by mean and std (F,)."""
    return LinearHead(weight * std, bias + weight @ mean).layer()


def weighted_mean(features: torch.Tensor, weights: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the mean (G, F) of features (N, F) by weights (N,) that sum to one in each group."""
    return features.new_zeros(num_groups, features.shape[1]).index_add(0, group, features * weights[:, None])


def empty_pooling(num_features: int, num_classes: int) -> AttentionPooling:
    """Return a head to load weights into."""
    weight, mean = np.zeros((num_classes, num_features)), np.zeros(num_features)
    return AttentionPooling(weight, np.zeros(num_classes), mean, mean + 1)


def fit_attention(
    train: Bags, validation: Bags, weight: np.ndarray, bias: np.ndarray, class_weights: np.ndarray, seed: int
) -> AttentionPooling:
    """Return the pooling of the epoch with the least validation loss, the start included.

    `weight` (C, F) and `bias` (C,) are the linear layer of the images; class_weights (C,) weigh the losses. The same
    numbers give the same result.
    """
    mean, std = mean_and_std(train.features)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.default_generator.manual_seed(seed)
        model = AttentionPooling(weight, bias, mean, std)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        slices_of = np.split(np.argsort(train.group, kind="stable"), np.cumsum(np.bincount(train.group))[:-1])

        def losses() -> Iterator[torch.Tensor]:
            for bags in torch.randperm(len(train.labels)).split(BAGS_PER_BATCH):
                yield _batch_loss(model, train, [slices_of[bag] for bag in bags.tolist()], bags, class_weights)

        keep_best_epoch(model, optimizer, losses, lambda: _loss(model, validation, class_weights))
    return model.eval()


def keep_best_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Callable[[], Iterator[torch.Tensor]],
    validation_loss: Callable[[], float],
) -> None:
    """Train until PATIENCE epochs bring no less loss on the validation part, and leave `model` as it was at the least,
    the start included. `losses` yields those of an epoch's batches."""
    best, best_loss, waited = _copy(model), validation_loss(), 0
    for _ in range(NUM_EPOCHS):
        model.train()
        for batch_loss in losses():
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
        loss = validation_loss()
        waited = 0 if loss < best_loss else waited + 1
        if loss < best_loss:
            best, best_loss = _copy(model), loss
        elif waited == PATIENCE:
            break
    model.load_state_dict(best)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: steps as small as these are several times slower where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batch_loss(
    model: AttentionPooling, train: Bags, slices: list[np.ndarray], bags: torch.Tensor, class_weights: np.ndarray
) -> torch.Tensor:
    """Return the mean weighted cross entropy of some bags and their slices."""
    group = torch.repeat_interleave(torch.tensor([len(each) for each in slices]))
    logits = model(torch.from_numpy(train.features[np.concatenate(slices)]), group, len(bags))
    labels = torch.from_numpy(train.labels)[bags]
    weights = torch.from_numpy(class_weights).float()[labels]
    return (functional.cross_entropy(logits, labels, reduction="none") * weights).mean()


@torch.inference_mode()
def attention_probabilities(model: AttentionPooling, features: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return (G, C) float64 of features (N, F) and group (N,) int 0..G-1."""
    model.eval()
    logits = model(torch.from_numpy(features), torch.from_numpy(group), int(group.max()) + 1)
    return torch.softmax(logits.double(), dim=1).numpy()


def _loss(model: AttentionPooling, bags: Bags, class_weights: np.ndarray) -> float:
    probabilities = attention_probabilities(model, bags.features, bags.group)
    of_label = np.take_along_axis(probabilities, bags.labels[:, None], axis=1)[:, 0]
    return float((-np.log(np.maximum(of_label, 1e-30)) * class_weights[bags.labels]).mean())


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
