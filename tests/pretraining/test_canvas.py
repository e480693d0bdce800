"""The canvas objective: heads and whitening against closed forms, and runs that learn, resume and share their work."""

import shutil

import numpy as np
import pytest
import torch
from pretrain_runs import launch, log, train, weights

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoModel
from training.pretraining.canvas_objective import BatchStandardization, breast_differences, whiten_patch_embeddings
from training.pretraining.networks import Network
from training.pretraining.recipe import Recipe, load_recipe

SMALL = [
    "--image_height", "128", "--image_width", "96", "--patch_size", "8", "--hidden_size", "32",
    "--num_hidden_layers", "2", "--num_attention_heads", "4", "--canvas_tokens", "12", "--dense_components", "16",
    "--projector_hidden_size", "32", "--projector_size", "8", "--per_device_train_batch_size", "16",
    "--warmup_steps", "2", "--logging_steps", "1", "--report_to", "none", "--visualization_steps", "0",
    "--dataloader_num_workers", "0",
]  # fmt: skip


def small(corpus, output, *arguments) -> Recipe:
    return load_recipe(["small_data", "--corpus", str(corpus), "--output_dir", str(output), *SMALL, *arguments])


@pytest.fixture(scope="module")
def run(phantom_corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("canvas")
    train(small(phantom_corpus, output, "--max_steps", "16", "--save_steps", "8"))
    return output


def test_every_loss_falls_or_stays_and_nothing_else_is_computed(run):
    lines = log(run)
    names = {name for name in lines[0] if name.startswith("loss_")}
    views = {f"loss_{view}_{part}" for view in ("breast", "patient") for part in ("agreement", "spread")}
    assert names == {"loss_dense_statistics", "loss_dense_components"} | views
    assert all(np.isfinite([line[name] for name in names]).all() for line in lines)
    first, last = (np.mean([line["loss_dense_statistics"] for line in part]) for part in (lines[:3], lines[-3:]))
    assert last < 0.97 * first


def test_a_resumed_run_is_the_uninterrupted_run(run, phantom_corpus, tmp_path):
    shutil.copytree(run / "checkpoint-8", tmp_path / "checkpoint-8")  # as if it had been stopped there
    train(small(phantom_corpus, tmp_path, "--max_steps", "16", "--save_steps", "8"))
    whole, resumed = weights(run / "checkpoint-16"), weights(tmp_path / "checkpoint-16")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
def test_two_processes_train_as_one(phantom_corpus, tmp_path):
    for processes in (1, 2):
        changes = ["--max_steps", "4", "--save_steps", "4", "--per_device_train_batch_size", str(16 // processes)]
        output = tmp_path / str(processes)
        launch(processes, "small_data", "--corpus", str(phantom_corpus), "--output_dir", str(output), *SMALL, *changes)
    one, two = (log(tmp_path / str(processes)) for processes in (1, 2))
    for name in (name for name in one[0] if name.startswith("loss")):
        np.testing.assert_allclose([line[name] for line in one], [line[name] for line in two], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("regularizer", ["sigreg", "coding_rate"])
def test_the_other_regularizers_train(phantom_corpus, tmp_path, regularizer):
    train(small(phantom_corpus, tmp_path, "--max_steps", "2", "--view_regularizer", regularizer))
    assert all(np.isfinite(line["loss_breast_spread"]) for line in log(tmp_path))


def test_crops_and_canvas_share_a_step(phantom_corpus, tmp_path):
    changes = ["--dino_weight", "1", "--ibot_weight", "1", "--koleo_weight", "0.1", "--num_prototypes", "32",
               "--adjacent_slice_weight", "1", "--global_crop_size", "64", "--local_crop_size", "32",
               "--head_hidden_size", "16", "--head_bottleneck_size", "8"]  # fmt: skip
    train(small(phantom_corpus, tmp_path, "--max_steps", "2", *changes))
    names = log(tmp_path)[0]
    assert {"loss_dino_global", "loss_adjacent_slice", "loss_dense_components", "target_entropy"} <= names.keys()


def test_without_crops_there_is_no_head_of_prototypes(phantom_corpus):
    network = Network(small(phantom_corpus, "o"), Corpus(phantom_corpus).image_processor)
    assert network.head is None and network.canvas_heads is not None


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--views_per_patient", "0"], "views_per_patient"),
        (["--views_per_patient", "3"], "views_per_patient"),
        (["--per_device_train_batch_size", "18"], "per_device_train_batch_size"),
        (["--fsdp", "true"], "fsdp"),
        (["--kind_weights", "dbt=1"], "kind_weights"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(arguments, field):
    with pytest.raises(ValueError, match=field):
        small("c", "o", *arguments)


def test_nothing_to_learn_is_refused():
    off = [
        "dense_statistics_weight",
        "dense_components_weight",
        "breast_weight",
        "patient_weight",
        "contralateral_weight",
    ]
    with pytest.raises(ValueError, match="weight 0"):
        small("c", "o", *(part for name in off for part in (f"--{name}", "0")))


def test_batch_standardization_is_batch_norm():
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    torch.testing.assert_close(BatchStandardization(5)(features), torch.nn.BatchNorm1d(5)(features))


def test_breast_differences_are_of_one_view():
    embeddings = torch.arange(16.0).view(8, 2).square()
    differences, patients = breast_differences(embeddings, torch.tensor([3] * 4 + [5] * 4), 4)
    expected = [embeddings[a] - embeddings[b] for a, b in ((0, 2), (1, 3), (4, 6), (5, 7))]
    torch.testing.assert_close(differences, torch.stack(expected))
    assert patients.tolist() == [3, 3, 5, 5]


def test_the_whitened_patch_embedding_sees_uncorrelated_patches(phantom_corpus):
    chosen = small(phantom_corpus, "o", "--hidden_size", "512", "--patch_size", "16")
    network = Network(chosen, Corpus(phantom_corpus).image_processor)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 64, 48, generator=generator)
    images = torch.nn.functional.avg_pool2d(noise.unsqueeze(1), 5, stride=1, padding=2).squeeze(1)  # correlated
    torch.manual_seed(1)
    whiten_patch_embeddings(network.backbone, images, torch.ones(40, 64, 48, dtype=torch.bool))
    projection = network.backbone.embeddings.patch_embeddings.projection
    features = projection(images.unsqueeze(1)).flatten(2).transpose(1, 2).flatten(0, 1)  # (n, 512)
    assert features.mean(dim=0).abs().max() < 1e-2
    values = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0)[:256]
    assert values[100] > 0.05 * values[0]  # of correlated patches through random filters it would be a thousandth


def test_weights_that_a_run_starts_from_are_not_whitened_away(phantom_corpus, tmp_path):
    source = tmp_path / "source"
    random = Network(small(phantom_corpus, "o"), Corpus(phantom_corpus).image_processor).backbone
    random.save_pretrained(source)
    Corpus(phantom_corpus).image_processor.save_pretrained(source)
    slow = ["--init_from", str(source), "--max_steps", "1", "--learning_rate", "1e-9", "--warmup_steps", "0"]
    slow += ["--whiten_patch_embeddings", "true"]
    encoder = MammoDinoModel.from_pretrained(train(small(phantom_corpus, tmp_path / "run", *slow)))
    found, start = (each.embeddings.patch_embeddings.projection.weight for each in (encoder, random))
    torch.testing.assert_close(found, start, rtol=0, atol=1e-6)
