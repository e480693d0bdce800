"""Teacher targets by Sinkhorn-Knopp (Caron et al. 2020, SwAV; used by DINOv2's long recipe)."""

import torch

from .processes import max_over_processes, sum_over_processes


@torch.no_grad()
def sinkhorn_knopp(logits: torch.Tensor, temperature: float, num_iterations: int = 3) -> torch.Tensor:
    """Soft assignments of n samples to K prototypes, every prototype used equally over all processes.

    logits (n, K) -> probabilities (n, K) float32, rows summing to 1. Every process must call it, also with n = 0.
    Row sums and totals are global, so the result does not depend on how samples are spread over processes.
    """
    scores = logits.float() / temperature
    largest = scores.max() if scores.numel() else scores.new_tensor(-torch.inf)
    largest = max_over_processes(largest)  # one shift for all: exact, and exp() cannot overflow
    assignment = torch.exp(scores - largest)  # (n, K)
    num_samples = sum_over_processes(torch.tensor(float(assignment.shape[0]), device=assignment.device))
    num_prototypes = assignment.shape[1]
    for _ in range(num_iterations):
        prototype_mass = sum_over_processes(assignment.sum(dim=0, keepdim=True))  # (1, K)
        assignment /= prototype_mass.clamp_min(torch.finfo(torch.float32).tiny) * num_prototypes
        assignment /= assignment.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) * num_samples
    return assignment * num_samples
