"""Adjacent-slice loss: the student's view of a DBT slice is trained toward the teacher's view of its neighbor.

The paper publishes the idea, not the formula. Our choice: the cross-entropy of DINO between prototypes, on the class
token, and on tissue patches at the same place of the shared crop.
"""

import torch

from .distributed import num_processes, sum_over_processes


def adjacent_slice_loss(
    student_logits: torch.Tensor,
    teacher_probabilities: torch.Tensor,
    weights: torch.Tensor | None = None,
    student_temperature: float = 0.1,
) -> torch.Tensor:
    """Weighted mean over tokens of the cross-entropy between neighbor (teacher) and slice (student).

    student_logits (n, K), teacher_probabilities (n, K); weights (n,), such as the breast fraction of each patch, or
    None for equal ones. Returns a scalar float32, zero where n = 0 (a batch without volumes). Processes hold unequal
    numbers of slices, so the weights are summed over all: the mean over processes is the loss of the whole batch.
    """
    log_probabilities = torch.log_softmax(student_logits.float() / student_temperature, dim=-1)
    cross_entropy = -(teacher_probabilities * log_probabilities).sum(dim=-1)  # (n,)
    weights = torch.ones_like(cross_entropy) if weights is None else weights.float()
    total_weight = sum_over_processes(weights.sum()).clamp_min(1e-6)
    return (cross_entropy * weights).sum() * num_processes() / total_weight
