"""Cross-entropy between softmaxes over prototypes, chunk by chunk: no tensor of all rows by all prototypes is made.

Logits are products of features and prototypes, a few hundred numbers a row where prototypes are 65,536; so networks
return these two, and what needs logits multiplies a chunk of rows at a time. The cross-entropy finds its gradients in
the same pass (as Liger Kernel's, Hsu et al. 2024), and these alone are kept for the backward.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 1 << 25  # at once, 128 MiB in float32: enough to keep a GPU busy, few enough for a CPU


class Logits(NamedTuple):
    """What logits are products of."""

    features: torch.Tensor  # (..., n, d)
    prototypes: torch.Tensor  # (K, d)

    def product_dtype(self) -> torch.dtype:
        """Return what the products are computed in: autocast's type where it is on, as of any linear layer."""
        device, dtype = self.features.device.type, torch.promote_types(self.features.dtype, self.prototypes.dtype)
        is_cast = torch.is_autocast_enabled(device) and dtype != torch.float64
        return torch.get_autocast_dtype(device) if is_cast else dtype

    def over(self, temperature: float) -> "Logits":
        return self._replace(features=self.features / temperature)


class Probabilities(NamedTuple):
    """softmax(logits + offset) over prototypes, a teacher's; its logits are over the temperature already."""

    logits: Logits
    offset: torch.Tensor  # (K,) float32

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """Return those of a chunk of the logits (..., c, K), float32."""
        return (self.offset + logits).softmax(dim=-1)

    def dense(self) -> torch.Tensor:
        """Return all of them, (..., n, K) float32; of few rows, for a log line."""
        return self.of(self.logits.features.float() @ self.logits.prototypes.float().T)


def logit_chunks(*several: Logits) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Yield slices of rows, and for them the logits (..., c, K) of each of `several`, which have n rows alike."""
    features = [each.features.to(each.product_dtype()) for each in several]
    prototypes = [each.prototypes.to(each.product_dtype()) for each in several]
    num_rows = features[0].shape[-2]
    of_all_rows = sum(one[..., 0].numel() * len(all_) for one, all_ in zip(features, prototypes, strict=True))
    size = max(1, CHUNK_LOGITS * num_rows // max(of_all_rows, 1))
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        yield rows, [one[..., rows, :] @ all_.T for one, all_ in zip(features, prototypes, strict=True)]


def cross_entropy(
    student: Logits,
    teacher: Probabilities,
    temperature: float,
    weights: torch.Tensor | None = None,
    ignore_diagonal: bool = False,
) -> torch.Tensor:
    """Sum over student crops s, teacher crops t and rows n of the weighted cross-entropy, a scalar float32.

        for s: for t: unless ignore_diagonal and s == t: for n:
            loss += weights[n] * -sum_k p_t[n, k] * log softmax(z_s[n] / temperature)[k]

    Features of the student are (S, n, d), of the teacher (T, n, d), or (n, d) of one crop; weights (n,), without
    gradient, None for ones.
    """
    crops = [each if each.ndim == 3 else each.unsqueeze(0) for each in (student.features, teacher.logits.features)]
    teacher = teacher._replace(logits=teacher.logits._replace(features=crops[1]))
    return _CrossEntropy.apply(crops[0], student.prototypes, teacher, temperature, weights, ignore_diagonal)


class _CrossEntropy(torch.autograd.Function):
    """The gradient of a row's logits is weight / temperature * (pairs * softmax(z_s / temperature) - sum_t p_t)."""

    @staticmethod
    def forward(
        context: Any,
        features: torch.Tensor,
        prototypes: torch.Tensor,
        teacher: Probabilities,
        temperature: float,
        weights: torch.Tensor | None,
        ignore_diagonal: bool,
    ) -> torch.Tensor:
        student = Logits(features, prototypes).over(temperature)
        dtype = student.product_dtype()
        wide = torch.promote_types(dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=features.device)
        gradients = tuple(torch.zeros_like(each, dtype=wide) for each in (features, prototypes))
        pairs = len(teacher.logits.features) - ignore_diagonal  # that each student crop is in
        for rows, (logits, of_teacher) in logit_chunks(student, teacher.logits):
            log_softmax = logits.log_softmax(dim=-1, dtype=wide)  # (S, c, K)
            targets = teacher.of(of_teacher)  # (T, c, K)
            if len(targets) > 1:
                targets = targets.sum(dim=0, keepdim=True) - (targets if ignore_diagonal else 0)
            weight = loss.new_ones(1) if weights is None else weights[rows, None].to(wide)  # (c, 1)
            loss -= ((targets * log_softmax).sum(dim=-1, keepdim=True) * weight).sum()
            if any(context.needs_input_grad):
                descent = targets.sub(log_softmax.exp_(), alpha=pairs).to(dtype)  # (S, c, K)
                scale = -weight / temperature
                gradients[0][:, rows] = (descent @ prototypes.to(dtype)) * scale
                turned, seen = descent.flatten(0, 1).T, (features[:, rows] * scale).to(dtype).flatten(0, 1)
                if dtype == wide:  # in one pass
                    torch.addmm(gradients[1], turned, seen, out=gradients[1])
                else:
                    gradients[1].add_(turned @ seen)
        context.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        of_features, of_prototypes = context.saved_tensors
        return gradient * of_features, gradient * of_prototypes, None, None, None, None
