"""Gated attention over the slices of a breast or patient (Ilse et al. 2018, arXiv 1802.04712, equation 9), on features.

It starts as what is known: every slice weighs the same, and the linear layer is that of the images. What it learns
beyond that counts only if the validation part confirms it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

HIDDEN, DROPOUT = 64, 0.25
NUM_EPOCHS, PATIENCE, BAGS_PER_BATCH = 50, 6, 64
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2


@dataclass(frozen=True)
class Bags:
    """Features (N, F) float32 of slices, the group (N,) int 0..G-1 of each, and the labels (G,) int of the groups."""

    features: np.ndarray
    group: np.ndarray
    labels: np.ndarray


class AttentionPooling(nn.Module):
    """features (N, F) of G groups -> logits (G, C). `weight` (C, F) and `bias` (C,) are those that it starts with, for
    features as they come; `mean` and `std` (F,) standardize them for the attention."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray):
        super().__init__()
        num_classes, width = weight.shape
        self.register_buffer("mean", torch.from_numpy(mean).float())
        self.register_buffer("std", torch.from_numpy(std).float())
        self.tanh, self.gate = nn.Linear(width, HIDDEN), nn.Linear(width, HIDDEN)
        self.attention = nn.Linear(HIDDEN, 1, bias=False)
        self.dropout = nn.Dropout(DROPOUT)
        self.classifier = nn.Linear(width, num_classes)
        with torch.no_grad():
            nn.init.zeros_(self.attention.weight)
            self.classifier.weight.copy_(torch.from_numpy(weight * std))
            self.classifier.bias.copy_(torch.from_numpy(bias + weight @ mean))

    def forward(self, features: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
        standardized = (features - self.mean) / self.std
        return self.classifier(
            weighted_mean(standardized, self.attention_weights(standardized, group, num_groups), group, num_groups)
        )

    def attention_weights(self, standardized: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
        """(N,): softmax over the slices of each group of w^T (tanh(V h) * sigmoid(U h))."""
        dropped = self.dropout(standardized)
        scores = self.attention(torch.tanh(self.tanh(dropped)) * torch.sigmoid(self.gate(dropped)))[:, 0]
        highest = scores.new_full((num_groups,), -torch.inf).scatter_reduce(0, group, scores.detach(), "amax")
        exponentials = (scores - highest[group]).exp()
        return exponentials / scores.new_zeros(num_groups).index_add(0, group, exponentials)[group]


def weighted_mean(features: torch.Tensor, weights: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(G, F) of features (N, F) and weights (N,) that sum to one in each group."""
    return features.new_zeros(num_groups, features.shape[1]).index_add(0, group, features * weights[:, None])


def fit_attention(
    train: Bags, validation: Bags, weight: np.ndarray, bias: np.ndarray, class_weights: np.ndarray, seed: int
) -> AttentionPooling:
    """The pooling of the epoch with the least validation loss, the start included; class_weights (C,) weigh the losses.

    `weight` (C, F) and `bias` (C,) are the linear layer of the images. The same numbers give the same result.
    """
    mean, std = train.features.mean(axis=0, dtype=np.float64), train.features.std(axis=0, dtype=np.float64)
    std[std < 1e-6 * (1 + np.abs(mean))] = 1
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.default_generator.manual_seed(seed)
        model = AttentionPooling(weight, bias, mean, std)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        slices_of = np.split(np.argsort(train.group, kind="stable"), np.cumsum(np.bincount(train.group))[:-1])
        best, best_loss, waited = _copy(model), _loss(model, validation, class_weights), 0
        for _ in range(NUM_EPOCHS):
            model.train()
            for bags in torch.randperm(len(train.labels)).split(BAGS_PER_BATCH):
                optimizer.zero_grad()
                _batch_loss(model, train, [slices_of[bag] for bag in bags.tolist()], bags, class_weights).backward()
                optimizer.step()
            loss = _loss(model, validation, class_weights)
            waited = 0 if loss < best_loss else waited + 1
            if loss < best_loss:
                best, best_loss = _copy(model), loss
            elif waited == PATIENCE:
                break
    model.load_state_dict(best)
    return model.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """Steps as small as these are slower where threads wait for each other, several times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batch_loss(
    model: AttentionPooling, train: Bags, slices: list[np.ndarray], bags: torch.Tensor, class_weights: np.ndarray
) -> torch.Tensor:
    """Of some bags and their slices: the mean weighted cross entropy."""
    group = torch.repeat_interleave(torch.tensor([len(each) for each in slices]))
    logits = model(torch.from_numpy(train.features[np.concatenate(slices)]), group, len(bags))
    labels = torch.from_numpy(train.labels)[bags]
    weights = torch.from_numpy(class_weights).float()[labels]
    return (functional.cross_entropy(logits, labels, reduction="none") * weights).mean()


@torch.inference_mode()
def attention_probabilities(model: AttentionPooling, features: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(G, C) float64 of features (N, F) and group (N,) int 0..G-1."""
    model.eval()
    logits = model(torch.from_numpy(features), torch.from_numpy(group), int(group.max()) + 1)
    return torch.softmax(logits.double(), dim=1).numpy()


def _loss(model: AttentionPooling, bags: Bags, class_weights: np.ndarray) -> float:
    probabilities = attention_probabilities(model, bags.features, bags.group)
    of_label = np.take_along_axis(probabilities, bags.labels[:, None], axis=1)[:, 0]
    return float((-np.log(np.maximum(of_label, 1e-30)) * class_weights[bags.labels]).mean())


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
