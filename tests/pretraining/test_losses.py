"""Each loss against a slow oracle written from its formula, and what its docstring promises."""

import math

import numpy as np
import pytest
import torch

from training.pretraining.losses import cross_entropy as cross_entropy_module
from training.pretraining.losses import targets as targets_module
from training.pretraining.losses.adjacent_slice import adjacent_slice_loss
from training.pretraining.losses.coding_rate import coding_rate_loss
from training.pretraining.losses.cross_entropy import Logits, Probabilities
from training.pretraining.losses.dense_regression import dense_regression_loss
from training.pretraining.losses.dino import dino_loss
from training.pretraining.losses.gram import gram_loss
from training.pretraining.losses.ibot import ibot_loss
from training.pretraining.losses.koleo import koleo_loss
from training.pretraining.losses.sigreg import sigreg_loss
from training.pretraining.losses.targets import Centering, sinkhorn_knopp
from training.pretraining.losses.view_agreement import view_agreement_loss
from training.pretraining.losses.visreg import visreg_loss


def cross_entropy(student, teacher, temperature=0.1):
    """-sum_k p_t log softmax(z_s / tau), in plain Python numbers."""
    scaled = [float(value) / temperature for value in student]
    log_sum = math.log(sum(math.exp(value - max(scaled)) for value in scaled)) + max(scaled)
    return -sum(float(p) * (value - log_sum) for p, value in zip(teacher, scaled, strict=True))


def random_inputs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.rand(*shape, generator=generator).softmax(-1)


def logits(values):
    """As products with unit vectors."""
    return Logits(values, torch.eye(values.shape[-1], dtype=values.dtype))


def probabilities(values):
    return Probabilities(logits(values.log()), torch.zeros(values.shape[-1]))


def sinkhorn(values, temperature, iterations=3):
    given = logits(values)
    return Probabilities(given.over(temperature), sinkhorn_knopp(given, temperature, iterations)).dense()


@pytest.mark.parametrize("num_student,ignore_diagonal", [(5, False), (2, True)])
def test_dino_is_the_double_loop(num_student, ignore_diagonal):
    student, _ = random_inputs(num_student, 3, 7)
    _, teacher = random_inputs(2, 3, 7, seed=1)
    expected = sum(
        np.mean([cross_entropy(student[s, b], teacher[t, b]) for b in range(3)])
        for s in range(num_student)
        for t in range(2)
        if not (ignore_diagonal and s == t)
    )
    found = dino_loss(logits(student), probabilities(teacher), ignore_diagonal=ignore_diagonal)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.fixture(params=[None, 5, 1 << 24], ids=["a row at a time", "several chunks", "one chunk"])
def chunk(request, monkeypatch) -> None:
    rows = 1 if request.param is None else request.param
    monkeypatch.setattr(cross_entropy_module, "CHUNK_LOGITS", rows * (2 + 3) * 11)


def random_products(crops: int, rows: int = 13, dtype=torch.float64, seed: int = 0) -> Logits:
    """(crops, rows, 4) against 11 prototypes."""
    generator = torch.Generator().manual_seed(seed)
    return Logits(*(torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((crops, rows, 4), (11, 4))))


@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_chunks_have_the_value_and_the_gradients_of_the_direct_formula(chunk, ignore_diagonal):
    """By autograd through all logits at once, in float64."""
    student, teacher = random_products(3), random_products(3 if ignore_diagonal else 2, seed=1)
    weights, offset = torch.rand(13, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    leaves = [each.requires_grad_() for each in student]
    targets = (teacher.features @ teacher.prototypes.T / 0.3 + offset).softmax(-1)
    log_softmax = (student.features @ student.prototypes.T / 0.2).log_softmax(-1)
    pairs = -torch.einsum("sbk,tbk,b->st", log_softmax, targets, weights)
    expected = (pairs * (1 - torch.eye(*pairs.shape, dtype=pairs.dtype) * ignore_diagonal)).sum()
    given = Probabilities(teacher.over(0.3), offset)
    found = cross_entropy_module.cross_entropy(student, given, 0.2, weights, ignore_diagonal)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(3 * each, leaves) for each in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_in_autocast_logits_are_products_in_half_precision_and_the_rest_is_float32(chunk):
    """The direct formula, with the casts that autocast makes, and close to that of float32."""
    student, teacher = random_products(1, 13, torch.float32), random_products(1, 13, torch.float32, seed=1)
    leaves, given = [each.requires_grad_() for each in student], Probabilities(teacher.over(0.5), torch.zeros(11))

    def direct():
        targets = (teacher.features / 0.5 @ teacher.prototypes.T).float().softmax(-1)
        return -(targets * (student.features / 0.2 @ student.prototypes.T).float().log_softmax(-1)).sum()

    exact = torch.autograd.grad(direct(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = cross_entropy_module.cross_entropy(student, given, 0.2), direct()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    for one, other, fine in zip(*(torch.autograd.grad(each, leaves) for each in (found, expected)), exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - fine).norm() < 1.2 * (other - fine).norm() < 0.02 * fine.norm()


def test_what_is_kept_for_the_backward_does_not_grow_with_rows_times_prototypes():
    """Counted by autograd's own hook: of each loss a gradient of features and one of prototypes, and scalars."""
    rows, prototypes, width = 1000, 500, 4
    student, given = (
        Logits(*(torch.randn(each, width, requires_grad=grad) for each in (rows, prototypes))) for grad in (True, False)
    )
    teacher = Probabilities(given, torch.zeros(prototypes))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.nbytes) or each, lambda each: each):
        losses = [
            adjacent_slice_loss(student, teacher),
            ibot_loss(student, teacher, torch.ones(10, 100).bool(), torch.arange(1000)),
        ]
    assert all(loss.requires_grad for loss in losses)
    gradients = 4 * (rows + prototypes) * width
    assert 2 * gradients <= sum(kept) < 2.1 * gradients < 4 * rows * prototypes / 10


def test_losses_are_float32_under_autocast():
    """Else a loss of 11.28 is told from its neighbors in steps of 0.06, and so is what it teaches."""
    student, teacher = random_inputs(2, 3, 7)
    seen, given = (
        logits(student.bfloat16().float()),
        logits(teacher.bfloat16().float()),
    )  # products that round to nothing
    targets = Probabilities(given, torch.zeros(7))
    one, other = seen._replace(features=seen.features[0]), given._replace(features=given.features[0])
    losses = {
        "dino": lambda: dino_loss(seen, targets, 0.5),
        "ibot": lambda: ibot_loss(
            one, targets._replace(logits=other), torch.ones(3, 1, dtype=torch.bool), torch.arange(3), 0.5
        ),
        "adjacent": lambda: adjacent_slice_loss(one, targets._replace(logits=other), None, 0.5),
        "koleo": lambda: koleo_loss(student[0]),
        "gram": lambda: gram_loss(student, teacher),
        "dense": lambda: dense_regression_loss(student, teacher, torch.ones(2, 3)),
        "sigreg": lambda: sigreg_loss(student[0]),
        "visreg": lambda: visreg_loss(student[0]),
        "coding rate": lambda: coding_rate_loss(student[0]),
        "agreement": lambda: view_agreement_loss(student[0], torch.tensor([0, 0, 1])),
        "targets": lambda: sinkhorn_knopp(one, 0.5),
    }
    for name, loss in losses.items():
        torch.manual_seed(0)
        expected = loss()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            found = loss()
        assert found.dtype == torch.float32 and torch.equal(found, expected), name


def test_ibot_is_the_mean_over_crops_of_the_mean_over_masked_patches():
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)  # the second crop is unmasked
    student, teacher = random_inputs(5, 6)
    per_patch = [cross_entropy(student[m], teacher[m]) for m in range(5)]
    expected = (np.mean(per_patch[:2]) + 0 + np.mean(per_patch[2:])) / 3
    places = masks.flatten().nonzero()[:, 0]
    assert ibot_loss(logits(student), probabilities(teacher), masks, places).item() == pytest.approx(expected, rel=1e-5)


def test_ibot_without_any_mask_is_zero_and_differentiable():
    student = torch.zeros(0, 6, requires_grad=True)
    masks, places = torch.zeros(4, 9, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    loss = ibot_loss(logits(student), probabilities(torch.zeros(0, 6)), masks, places)
    loss.backward()
    assert loss.item() == 0 and student.grad is not None


def test_koleo_has_its_closed_form():
    # nearest neighbors on the unit circle at chords 1 (60 degrees), 1 and 2 * sin(45 degrees)
    angles = torch.deg2rad(torch.tensor([0.0, 60.0, 150.0]))
    features = torch.stack((angles.cos(), angles.sin()), dim=1) * torch.tensor([[1.0], [3.0], [0.2]])
    assert koleo_loss(features).item() == pytest.approx(-math.log(math.sqrt(2)) / 3, abs=1e-5)


def test_koleo_leaves_out_near_duplicates_of_one_volume():
    features = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [0.0, 1.0]])
    groups = torch.tensor([7, 7, 8])
    assert koleo_loss(features).item() > 2  # two slices of one volume dominate
    assert koleo_loss(features, groups).item() == pytest.approx(-math.log(math.sqrt(2)), abs=1e-3)
    alone = features.clone().requires_grad_(True)
    koleo_loss(alone, torch.zeros(3)).backward()  # nobody has a neighbor: no loss, and no NaN
    assert koleo_loss(alone, torch.zeros(3)).item() == 0 and torch.isfinite(alone.grad).all()


def test_adjacent_slice_is_a_weighted_mean():
    student, teacher = random_inputs(4, 5)
    weights = torch.tensor([1.0, 0.0, 0.5, 0.25])
    each = np.array([cross_entropy(student[n], teacher[n]) for n in range(4)])
    seen, given = logits(student), probabilities(teacher)
    assert adjacent_slice_loss(seen, given).item() == pytest.approx(each.mean(), rel=1e-5)
    expected = (each * weights.numpy()).sum() / weights.sum().item()
    assert adjacent_slice_loss(seen, given, weights).item() == pytest.approx(expected, rel=1e-5)
    assert adjacent_slice_loss(logits(student[:0]), probabilities(teacher[:0])).item() == 0


def test_gram_compares_every_pair_of_kept_patches():
    student, _ = random_inputs(3, 4, 6)
    teacher, _ = random_inputs(3, 4, 6, seed=1)
    keep = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)

    def cosine(a, b):
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    def expected(keep):
        images = []
        for x, y, kept in zip(student, teacher, keep, strict=True):
            places = kept.nonzero().flatten().tolist()
            pairs = [(cosine(x[i], x[j]) - cosine(y[i], y[j])) ** 2 for i in places for j in places]
            images.append(np.mean(pairs) if pairs else 0.0)  # an image without any kept patch counts as zero
        return np.mean(images)

    assert gram_loss(student, teacher, keep).item() == pytest.approx(expected(keep), rel=1e-5)
    assert gram_loss(student, teacher).item() == pytest.approx(expected(torch.ones(3, 4, dtype=bool)), rel=1e-5)
    assert gram_loss(student * 3, student).item() == pytest.approx(0, abs=1e-10)  # lengths do not matter
    dropped = (student * keep.unsqueeze(-1)).requires_grad_()  # background tokens are zero
    gram_loss(dropped, teacher, keep).backward()
    assert torch.isfinite(dropped.grad).all() and (dropped.grad[~keep] == 0).all()


def sinkhorn_oracle(logits, temperature, iterations):
    """Sinkhorn-Knopp as facebookresearch/dinov2 orders it: rows, then columns, with the totals written out."""
    q = np.exp(logits.T.astype(np.float64) / temperature)  # (K, n)
    num_prototypes, num_samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= num_prototypes
        q /= q.sum(axis=0, keepdims=True)
        q /= num_samples
    return (q * num_samples).T


@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_sinkhorn_matches_the_reference_order(temperature, monkeypatch):
    for module in (cross_entropy_module, targets_module):
        monkeypatch.setattr(module, "CHUNK_LOGITS", 5 * 5)  # five rows at a time
    values = torch.rand(12, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = sinkhorn(values, temperature)
    np.testing.assert_allclose(result.numpy(), sinkhorn_oracle(values.numpy(), temperature, 3), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.sum(dim=1), torch.ones(12))


def test_sinkhorn_uses_every_prototype_equally_and_survives_large_logits():
    values = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    result = sinkhorn(values, 1.0, iterations=200)
    torch.testing.assert_close(result.sum(dim=0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(sinkhorn(values * 1e4, 0.04)).all()
    assert sinkhorn(values[:0], 0.04).shape == (0, 8)


def test_centering_applies_the_center_of_the_step_before():
    centering = Centering(num_prototypes=3, momentum=0.9)
    first, second = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]), torch.tensor([[0.5, 0.0, 0.0]])

    def targets(values):
        return Probabilities(logits(values).over(0.5), centering(logits(values), 0.5)).dense()

    torch.testing.assert_close(targets(first), torch.softmax(first / 0.5, dim=-1))  # center 0 at the first step
    center = 0.1 * first.mean(dim=0)
    torch.testing.assert_close(targets(second), torch.softmax((second - center) / 0.5, dim=-1))
    torch.testing.assert_close(centering.center[0], 0.9 * center + 0.1 * second[0])
