"""One process against two: the same samples, the same targets, losses and gradients, and the same run."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pretrain_runs import CROPS, TINY, launch, log, start_processes

from training.pretraining.losses.adjacent_slice import adjacent_slice_loss
from training.pretraining.losses.cross_entropy import Logits, Probabilities
from training.pretraining.losses.dense_regression import dense_regression_loss
from training.pretraining.losses.koleo import koleo_loss
from training.pretraining.losses.targets import Centering, sinkhorn_knopp

NUM_PROCESSES = 2
SPLITS = {"equal": (6, 6), "unequal": (9, 3), "one is empty": (12, 0)}  # rows of either process
STEPS = {"as shipped": 8, "with every option": 4}
OPTIONS = ["--teacher_targets", "centering", "--separate_ibot_head", "true", "--ibot_num_prototypes", "24",
           "--tissue_tokens", "true", "--gram_weight", "1", "--gram_start_step", "2", "--gram_crop_size", "128",
           "--gradient_checkpointing", "true"]  # fmt: skip


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOGITS, LATER_LOGITS, TEACHER_LOGITS = numbers(12, 5), numbers(12, 5, seed=1), numbers(12, 5, seed=2)
WEIGHTS = numbers(12, seed=3).abs()
FEATURES = torch.cat((numbers(6, 7, seed=4), numbers(6, 7, seed=4) + 0.1 * numbers(6, 7, seed=5)))  # near across halves
VOLUMES = torch.tensor([0, 1, 2, 3, 3, 5, 6, 7, 2, 9, 10, 11])


def gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return leaf.grad


def targets(rows: slice) -> dict[str, torch.Tensor]:
    centering = Centering(num_prototypes=5)
    found = {}
    for name, how, values in (
        ("sinkhorn", sinkhorn_knopp, LOGITS), ("first", centering, LOGITS), ("second", centering, LATER_LOGITS)
    ):  # fmt: skip
        logits = Logits(values[rows], torch.eye(5))
        found[name] = Probabilities(logits.over(0.1), how(logits, 0.1)).dense()
    return found | {"center": centering.center}


def dense_loss(rows: slice) -> dict[str, torch.Tensor]:
    predicted = LOGITS[rows].unsqueeze(1).clone().requires_grad_()  # (B, 1, S)
    loss = dense_regression_loss(predicted, LATER_LOGITS[rows].unsqueeze(1), WEIGHTS[rows].unsqueeze(1))
    return {"loss": loss.detach(), "gradient": gradient(loss, predicted)}


def slice_loss(rows: slice) -> dict[str, torch.Tensor]:
    logits = LOGITS[rows].clone().requires_grad_()
    teacher = Probabilities(Logits(TEACHER_LOGITS[rows], torch.eye(5)), torch.zeros(5))
    loss = adjacent_slice_loss(Logits(logits, torch.eye(5)), teacher, WEIGHTS[rows])
    return {"loss": loss.detach(), "gradient": gradient(loss, logits)}


def spread(rows: slice, groups: bool) -> dict[str, torch.Tensor]:
    features = FEATURES[rows].clone().requires_grad_()
    loss = koleo_loss(features, VOLUMES[rows] if groups else None)
    return {"loss": loss.detach(), "gradient": gradient(loss, features)}


def results(rows_of: dict[str, slice]) -> dict[str, dict[str, torch.Tensor]]:
    found = {f"targets, {name}": targets(rows) for name, rows in rows_of.items()}
    found |= {f"slices, {name}": slice_loss(rows) for name, rows in rows_of.items()}
    found |= {f"dense, {name}": dense_loss(rows) for name, rows in rows_of.items()}
    return found | {f"koleo, {groups}": spread(rows_of["equal"], groups) for groups in (False, True)}


def work(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=process, world_size=NUM_PROCESSES)
    own = {name: slice(0, split[0]) if process == 0 else slice(split[0], 12) for name, split in SPLITS.items()}
    torch.save(results(own), Path(folder) / f"{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> list[dict]:
    """What each of two processes found with its part of the rows."""
    folder = tmp_path_factory.mktemp("processes")
    start_processes(work, NUM_PROCESSES, str(folder))
    return [torch.load(folder / f"{process}.pt") for process in range(NUM_PROCESSES)]


@pytest.fixture(scope="module")
def alone() -> dict:
    return results({name: slice(None) for name in SPLITS})


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_targets_do_not_depend_on_how_samples_are_spread(shared, alone, split):
    """Sinkhorn-Knopp and centering balance over all processes, also where one holds nothing."""
    key = f"targets, {split}"
    for name in ("sinkhorn", "first", "second"):
        rows = torch.cat([each[key][name] for each in shared])
        torch.testing.assert_close(rows, alone[key][name], rtol=1e-5, atol=1e-7)
    for each in shared:
        torch.testing.assert_close(each[key]["center"], alone[key]["center"])
    assert not torch.allclose(targets(slice(0, 6))["sinkhorn"], alone[key]["sinkhorn"][:6], rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", [*(f"{loss}, {split}" for loss in ("slices", "dense") for split in SPLITS), "koleo, False", "koleo, True"]
)
def test_losses_and_gradients_average_to_those_of_the_whole_batch(shared, alone, key):
    """The mean over processes, as DistributedDataParallel averages gradients, is what one process finds."""
    mean = torch.stack([each[key]["loss"] for each in shared]).mean()
    torch.testing.assert_close(mean, alone[key]["loss"], rtol=1e-5, atol=0)
    rows = torch.cat([each[key]["gradient"] for each in shared]) / NUM_PROCESSES
    torch.testing.assert_close(rows, alone[key]["gradient"], rtol=1e-4, atol=1e-6)


def test_koleo_finds_neighbors_in_the_other_process(alone):
    """So that the test above is not passed by halves that have nothing to do with each other."""
    halves = (koleo_loss(FEATURES[:6]) + koleo_loss(FEATURES[6:])) / 2
    assert alone["koleo, False"]["loss"] > halves + 1


@pytest.fixture(scope="module", params=STEPS)
def one_and_two(request, phantom_corpus, tmp_path_factory) -> dict[int, tuple[list, list]]:
    """Recorded forwards of each process, and the log, of one run by one process and by two."""
    runs, options = {}, OPTIONS if request.param == "with every option" else []
    for processes in (1, NUM_PROCESSES):
        folder = tmp_path_factory.mktemp(f"by_{processes}")
        arguments = [str(folder), CROPS, "--corpus", str(phantom_corpus), "--output_dir", str(folder / "run"), *TINY,
                     "--drop_path_rate", "0", "--max_steps", str(STEPS[request.param]), "--adjacent_patch_weight",
                     "0.5", "--koleo_weight", "0.1", "--per_device_train_batch_size", str(8 // processes),
                     *options]  # fmt: skip
        launch(processes, *arguments, module="tests.recorded_run")
        recorded = [torch.load(folder / f"{process}.pt") for process in range(processes)]
        runs[processes] = (recorded, log(folder / "run"))
    return runs


@pytest.mark.slow
def test_two_processes_see_the_samples_of_one(one_and_two):
    (alone,), _ = one_and_two[1]
    shared, _ = one_and_two[NUM_PROCESSES]
    assert len(alone) in STEPS.values() and all(len(each) == len(alone) for each in shared)
    for step, forward in enumerate(alone):
        parts = [each[step] for each in shared]
        for key in ("index", "row", "boxes"):
            assert torch.equal(torch.cat([part[key] for part in parts]), forward[key]), (step, key)
        for key in ("masks", "global_crops"):  # crop-major: all first crops before all second ones
            joined = torch.cat([part[key].unflatten(0, (2, -1)) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(joined, forward[key]), (step, key)
        assert torch.equal(torch.cat([part["slice_tissue"] for part in parts]), forward["slice_tissue"])
    assert any(len(a["slice_tissue"]) != len(b["slice_tissue"]) for a, b in zip(*shared, strict=True))  # it is tried


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(one_and_two):
    """To 1e-4 over eight steps: every loss, so every gradient before it; and the log says so."""
    (alone,), alone_log = one_and_two[1]
    shared, shared_log = one_and_two[NUM_PROCESSES]
    for step, forward in enumerate(alone):
        for name, value in forward["losses"].items():
            mean = np.mean([each[step]["losses"][name] for each in shared])
            assert mean == pytest.approx(value, rel=1e-4), (step, name)
            assert shared_log[step][f"loss_{name}"] == pytest.approx(alone_log[step][f"loss_{name}"], rel=1e-4)
        assert shared_log[step]["loss"] == pytest.approx(alone_log[step]["loss"], rel=1e-4)
