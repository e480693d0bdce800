"""VISReg, SIGReg, the coding rate and view agreement against oracles written from their formulas, in float64 numpy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import erfinv

from training.pretraining.losses.coding_rate import coding_rate_loss
from training.pretraining.losses.sigreg import sigreg_loss
from training.pretraining.losses.view_agreement import view_agreement_loss
from training.pretraining.losses.visreg import visreg_loss


def embeddings(count=24, width=6, seed=0, scale=1.7, shift=0.3) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


def drawn_directions(width, count) -> np.ndarray:
    """The directions that a loss draws after manual_seed(5), (D, K) of unit length."""
    torch.manual_seed(5)
    raw = torch.randn(width, count).double().numpy()
    return raw / np.linalg.norm(raw, axis=0)


def test_visreg_is_its_formula():
    z = embeddings().double().numpy()
    mean, scale = z.mean(0), z.std(0, ddof=1) + 1e-4
    a = drawn_directions(6, 8)
    shape = 0.0
    for k in range(8):
        ordered = sorted(((z - mean) / scale) @ a[:, k])
        shape += sum((x - math.sqrt(2) * erfinv(2 * (i + 1) / 25 - 1)) ** 2 for i, x in enumerate(ordered))
    expected = np.mean(mean**2) + np.mean((scale - 1) ** 2) + shape / (8 * 24)
    torch.manual_seed(5)
    assert visreg_loss(embeddings(), num_directions=8).item() == pytest.approx(expected, rel=1e-4)


def test_sigreg_is_its_formula():
    z, a = embeddings().double().numpy(), drawn_directions(6, 8)
    knots = np.linspace(0, 3, 17)
    total = 0.0
    for k in range(8):
        x = z @ a[:, k]
        values = [
            math.exp(-(t**2) / 2) * ((np.cos(t * x).mean() - math.exp(-(t**2) / 2)) ** 2 + np.sin(t * x).mean() ** 2)
            for t in knots
        ]
        total += sum((values[i] + values[i + 1]) / 2 * (knots[i + 1] - knots[i]) for i in range(16))
    torch.manual_seed(5)
    assert sigreg_loss(embeddings(), num_directions=8).item() == pytest.approx(total / 8, rel=1e-4)


@pytest.mark.parametrize(("count", "width"), [(24, 6), (5, 9)])
def test_the_coding_rate_is_the_sum_of_log_eigenvalues(count, width):
    z = embeddings(count, width).double().numpy()
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(z.T @ z)
    expected = -(width + count) / (width * count) / 2 * np.log1p(width / (count * 0.05) * eigenvalues).sum()
    assert coding_rate_loss(embeddings(count, width)).item() == pytest.approx(expected, rel=1e-5)


def test_view_agreement_is_the_double_loop():
    z, groups = embeddings(6, 3), torch.tensor([7, 2, 7, 2, 2, 9])
    expected = 0.0
    for b in range(6):
        members = [z[c].double() for c in range(6) if groups[c] == groups[b]]
        expected += float(((z[b].double() - sum(members) / len(members)) ** 2).sum())
    assert view_agreement_loss(z, groups).item() == pytest.approx(expected / 18, rel=1e-5)
    assert view_agreement_loss(z, torch.arange(6)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [visreg_loss, sigreg_loss])
def test_normal_embeddings_score_lower_than_collapsed_or_shifted_ones(loss):
    normal = embeddings(512, 16, scale=1, shift=0)
    torch.manual_seed(0)
    best = loss(normal).item()
    assert best < 0.1 * loss(torch.zeros(512, 16)).item() and best < 0.1 * loss(normal + 2).item()


def test_visreg_has_a_gradient_at_collapse():
    z = (1e-6 * embeddings(32, 8)).requires_grad_()
    visreg_loss(z).backward()
    assert z.grad.abs().max() > 1e-3


@pytest.mark.parametrize("loss", [visreg_loss, sigreg_loss, coding_rate_loss])
def test_losses_are_float32_under_autocast(loss):
    z = embeddings(32, 8)
    torch.manual_seed(0)
    plain = loss(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        assert torch.equal(loss(z), plain)
