"""Adjacent-slice loss: the student's view of a DBT slice is trained toward the teacher's view of its neighbor.

The paper publishes the idea, not the formula. Our choice: the cross-entropy of DINO between prototypes, on the class
token, and on tissue patches at the same place of the shared crop.
"""

import torch

from .cross_entropy import Logits, Probabilities, cross_entropy
from .distributed import num_processes, sum_over_processes


def adjacent_slice_loss(
    student_logits: Logits,
    teacher_probabilities: Probabilities,
    weights: torch.Tensor | None = None,
    student_temperature: float = 0.1,
) -> torch.Tensor:
    """Weighted mean over tokens of the cross-entropy between neighbor (teacher) and slice (student).

    student_logits (n, K), teacher_probabilities (n, K); weights (n,), such as the breast fraction of each patch, or
    None for equal ones. Returns a scalar float32, zero where n = 0 (a batch without volumes). Processes hold unequal
    numbers of slices, so the weights are summed over all: the mean over processes is the loss of the whole batch.
    """
    weights = torch.ones_like(student_logits.features[:, 0]) if weights is None else weights.float()
    total_weight = sum_over_processes(weights.sum()).clamp_min(1e-6)
    total = cross_entropy(student_logits, teacher_probabilities, student_temperature, weights)
    return total * num_processes() / total_weight
