"""Signs of collapse: what teacher and student say of images, in numbers, and in words once they are bad.

A self-distilled network can fail at two ends. At the entropy wall the teacher's targets are uniform and say nothing; in
collapse every image gets the same target. `target_information` is 0 at both ends.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

NUM_RANKED = 1024  # rows of which the rank is taken: singular values of more take seconds


@torch.no_grad()
def target_statistics(
    probabilities: torch.Tensor, mean_over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda mean: mean
) -> dict[str, float]:
    """Entropies of teacher targets (n, K), as fractions of ln K.

    `target_entropy`: of each sample's target, averaged; 1 means that the teacher says nothing (the entropy wall).
    `prototype_entropy`: of the mean target; 0 means that every sample has the same, sharp target (collapse).
    `target_information`: their difference, what a target tells of its image (mutual information); 0 at both ends, at
    most ln n / ln K.
    """
    probabilities = probabilities.float().flatten(0, -2)
    entropy = -torch.xlogy(probabilities, probabilities).sum(-1).mean()
    together = mean_over_processes(torch.cat((probabilities.mean(0), entropy[None])))  # (K + 1,)
    mean, scale = together[:-1], math.log(len(together) - 1)
    target, prototype = float(together[-1]) / scale, float(-torch.xlogy(mean, mean).sum()) / scale
    return {"target_entropy": target, "prototype_entropy": prototype, "target_information": prototype - target}


@torch.no_grad()
def feature_rank(features: torch.Tensor) -> float:
    """RankMe (Garrido et al. 2023): exp of the entropy of the singular values of features (n, D), at most min(n, D)."""
    values = torch.linalg.svdvals(features[:NUM_RANKED].float())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


class Sign(NamedTuple):
    name: str
    is_normal_at_first: bool  # a fresh network shows it, too: bad where it lasts
    holds: Callable[[dict[str, float]], bool]
    words: str  # what it means, and the remedy


SIGNS = (
    Sign(
        "collapse",
        False,
        lambda values: values["prototype_entropy"] < 0.1,
        "every image gets the same few prototypes; stop, and start again with a lower learning_rate, a longer "
        "warmup_steps, or teacher_targets sinkhorn_knopp",
    ),
    Sign(
        "entropy wall",
        True,
        lambda values: values["target_entropy"] > 0.98,
        "the teacher's targets are uniform and teach nothing; lower teacher_temperature and teacher_temperature_start, "
        "take fewer num_prototypes or a larger batch",
    ),
    Sign(
        "collapse of information",
        True,
        lambda values: values["target_information"] < 0.01 and values["target_entropy"] <= 0.98,
        "every image gets the same broad target; lower learning_rate, take teacher_targets sinkhorn_knopp, or a higher "
        "teacher_momentum",
    ),
    Sign(
        "collapse of features",
        True,
        lambda values: values["feature_rank"] < 2,
        "class tokens lie along one direction; raise koleo_weight, or lower learning_rate or weight_decay_end",
    ),
)


class CollapseWatch:
    """Names each sign when it comes, once, and again only after it went.

    patience_steps: how long a sign that is normal in a fresh network must last before it is called bad.
    """

    def __init__(self, patience_steps: int):
        self.patience_steps = patience_steps
        self.since: dict[str, int] = {}  # step at which a sign was first seen
        self.told: set[str] = set()

    def check(self, step: int, values: dict[str, float]) -> list[str]:
        """What is to be said of this log line's values."""
        messages = []
        for sign in SIGNS:
            if not sign.holds(values):
                self.since.pop(sign.name, None)
                if sign.name in self.told:
                    self.told.remove(sign.name)
                    messages.append(f"step {step}: {sign.name}: over")
                continue
            lasted = step - self.since.setdefault(sign.name, step)
            if sign.name not in self.told and lasted >= self.patience_steps * sign.is_normal_at_first:
                self.told.add(sign.name)
                messages.append(f"step {step}: {sign.name}, since step {self.since[sign.name]}: {sign.words}")
        return messages
