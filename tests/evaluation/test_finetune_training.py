"""Training images, the classifier over slices, early stopping, and a training that is killed and goes on."""

import json

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from dataset_scripts.benchmarks.task import load_task
from training.evaluation.backbones.registry import load_backbone
from training.evaluation.finetuning.image_classifier import (
    ImageClassifier,
    add_adapters,
    open_classifier,
    save_classifier,
)
from training.evaluation.finetuning.predictor import Predictor
from training.evaluation.finetuning.tuning import (
    LabeledImages,
    MammographyScores,
    augment,
    collate_images,
    train_classifier,
)
from training.evaluation.seeded_trainer import SeededSampler, SeededTrainer, find_checkpoint

from .small_runs import short_run


def test_each_image_comes_once_an_epoch_in_an_order_of_seed_and_epoch():
    sampler = SeededSampler(50, seed=3, augment=True)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(position for position, _ in epochs[0]) == list(range(50))
    assert len({draw for epoch in epochs[:2] for _, draw in epoch}) == 100  # no change is drawn twice
    assert list(SeededSampler(50, seed=4, augment=True)) != epochs[0]
    assert sorted(SeededSampler(50, seed=3, augment=False)) == list(range(50))


def test_a_sampler_draws_classes_equally_often():
    labels = np.array([0] * 900 + [1] * 100)
    sampler = SeededSampler(1000, seed=0, augment=False, weights=np.array([1 / 900, 1 / 100])[labels])
    drawn = labels[list(sampler)]
    assert 0.42 < drawn.mean() < 0.58  # five standard deviations


def smooth_image(height: int = 64, width: int = 48) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(height, width)).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 4) * 10


def test_image_and_tissue_mask_are_changed_alike_and_all_slices_of_an_image_are():
    """A mask that is the image's own means over patches stays so, away from the border."""
    image, patch = smooth_image(), 4
    mask = cv2.resize(image, (48 // patch, 64 // patch), interpolation=cv2.INTER_AREA)
    slices = [{"pixel_values": image[None], "tissue_mask": mask}, {"pixel_values": 2 * image[None]}]
    for seed in range(4):
        first, second = augment(np.random.default_rng(seed), slices)
        np.testing.assert_allclose(second["pixel_values"], 2 * first["pixel_values"], rtol=1e-4, atol=1e-4)
        seen = cv2.resize(first["pixel_values"][0], (48 // patch, 64 // patch), interpolation=cv2.INTER_AREA)
        inner = (slice(4, -4), slice(3, -3))
        assert np.abs(seen - first["tissue_mask"])[inner].max() < 0.12 * np.ptp(image)
        assert np.abs(seen - mask)[inner].max() > 0.12 * np.ptp(image)  # and it did change
    assert first["pixel_values"].min() >= image.min() - 1e-6


def test_flips_turns_and_scales_are_as_large_as_said():
    """Where a bright dot right of the center comes to lie, over many draws."""
    image = np.zeros((101, 101), np.float32)
    image[47:54, 77:84] = 1  # 30 px to the right of the center
    offsets = []
    for seed in range(200):
        (changed,) = augment(np.random.default_rng(seed), [{"pixel_values": image[None]}])
        moments = cv2.moments(changed["pixel_values"][0])
        offsets.append((moments["m10"] / moments["m00"] - 50, moments["m01"] / moments["m00"] - 50))
    x, y = np.array(offsets).T
    assert 70 < (x < 0).sum() < 130  # flipped in half of the draws
    distance = np.hypot(np.abs(x), y)
    assert 0.9 * 30 - 7.5 < distance.min() and distance.max() < 1.1 * 30 + 7.5  # scale, and a shift up to 5 px each way
    assert np.abs(y).max() < 33 * np.sin(np.deg2rad(10)) + 5.5


def test_a_images_change_is_a_function_of_seed_and_draw(drawn_table, folders):
    backbone = load_backbone("mammodino", folders["mammodino"])
    files = [str(path) for path in sorted(drawn_table.glob("*.png"))[:2]]
    images = LabeledImages(backbone.preprocess, files, np.array([0, 1]), 4, seed=5)
    (first,), label = images[1, 7]
    (again,), _ = images[1, 7]
    (other,), _ = images[1, 8]
    (plain,), _ = images[1]
    assert label == 1
    np.testing.assert_array_equal(first["pixel_values"], again["pixel_values"])
    assert np.abs(first["pixel_values"] - other["pixel_values"]).max() > 0.1
    np.testing.assert_array_equal(plain["pixel_values"], next(backbone.preprocess(files[1]))["pixel_values"])


class MeanPixel(nn.Module):
    def forward(self, pixel_values, tissue_mask=None):
        return pixel_values.mean(dim=(1, 2, 3))[:, None]


def test_an_image_has_the_mean_probability_of_its_slices_and_each_slice_its_label():
    """Three slices of one image and one of another, by hand."""
    values, labels, weights = [0.3, -1.0, 2.0, 0.5], [1, 0], np.array([0.5, 3.0])
    items = [
        ([{"pixel_values": np.full((1, 2, 2), value, np.float32)} for value in part], label)
        for part, label in zip((values[:3], values[3:]), labels, strict=True)
    ]
    batch = collate_images(items)
    assert batch["num_slices"].tolist() == [3, 1] and batch["pixel_values"].shape == (4, 1, 2, 2)
    head = nn.Linear(1, 2)
    outputs = ImageClassifier(MeanPixel(), head, weights)(**batch)
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    logits = np.array(values)[:, None] @ weight.T + bias
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(outputs["logits"].detach().exp().numpy(), [p[:3].mean(axis=0), p[3]], rtol=1e-5)
    loss = np.mean([-3 * np.log(p[row, 1]) for row in range(3)] + [-0.5 * np.log(p[3, 0])])
    assert outputs["loss"].item() == pytest.approx(loss, rel=1e-5)


def test_very_sure_slices_still_differ():
    """Probabilities far below what float32 holds keep their logarithms, and their order."""
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [1.0]]))
        head.bias.zero_()
    pixels = torch.tensor([-100.0, -100, -120, -120]).reshape(4, 1, 1, 1)
    found = ImageClassifier(MeanPixel(), head, np.ones(2))(pixels, torch.tensor([2, 2]))["logits"]
    torch.testing.assert_close(found[:, 1], torch.tensor([-100.0, -120.0]))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_batch_norms_keep_their_statistics_and_learn_their_weights(mode, folders, drawn_table, tmp_path):
    backbone = load_backbone("resnet50", folders["resnet50"])
    settings = short_run(drawn_table, folders, tmp_path, mode=mode, backbone="resnet50")
    encoder = add_adapters(backbone, settings) if mode == "lora" else backbone
    classifier = ImageClassifier(encoder, nn.Linear(backbone.width, 2), np.ones(2)).train()
    norms = [module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms) and classifier.training
    assert all(norm.weight.requires_grad == (mode == "full") for norm in norms)


@pytest.mark.parametrize("kind", ["mammodino", "resnet50"])
def test_adapters_alone_learn_and_are_merged(kind, folders, drawn_table, tmp_path):
    backbone = load_backbone(kind, folders[kind])
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    settings = short_run(drawn_table, folders, tmp_path, mode="lora", backbone=kind)
    classifier = ImageClassifier(add_adapters(backbone, settings), nn.Linear(backbone.width, 2), np.ones(2))
    learns = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    assert learns and all("lora_" in name or name.startswith("head.") for name in learns)
    optimizer = torch.optim.SGD([each for each in classifier.parameters() if each.requires_grad], 1e-3)
    classifier.train()
    images = [next(backbone.preprocess(path)) for path in sorted(drawn_table.glob("*.png"))[:4]]
    batch = collate_images([([each], number % 2) for number, each in enumerate(images)])
    for _ in range(2):
        classifier(**batch)["loss"].backward()
        optimizer.step()
    with torch.inference_mode():
        tuned = classifier.eval()(**batch)["logits"]
        merged = classifier.backbone.merge_and_unload()
        merged_logits = ImageClassifier(merged, classifier.head, np.ones(2)).eval()(**batch)["logits"]
    assert merged is backbone and backbone.state_dict().keys() == before.keys()
    torch.testing.assert_close(merged_logits, tuned, atol=1e-4, rtol=1e-4)
    changed = {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and not any("running" in name or "norm" in name for name in changed)


def make_training(kind, folders, drawn_table, output, **changes):
    settings = short_run(drawn_table, folders, output, mode="full", backbone=kind, **changes)
    task = load_task("table", drawn_table, "cancer", test_fraction=0.3, validation_fraction=0.3)
    backbone = load_backbone(kind, folders[kind])
    parts = []
    for split in ("train", "validation"):
        rows = task.table[task.table["split"] == split]
        parts.append(LabeledImages(backbone.preprocess, rows["file"].tolist(), rows["label"].to_numpy(), 4, 0))
    torch.manual_seed(1)
    classifier = ImageClassifier(backbone, nn.Linear(backbone.width, 2), np.array([0.8, 1.5]))
    arguments = (classifier, *parts, None, MammographyScores(2), settings, output / "checkpoints")
    return classifier, parts[1], lambda: train_classifier(*arguments)


def test_training_stops_early_and_leaves_the_best_epoch(folders, drawn_table, tmp_path):
    changes = {"num_train_epochs": 12, "early_stopping_patience": 2, "learning_rate": 1e-3}
    classifier, validation, train = make_training("mammodino", folders, drawn_table, tmp_path, **changes)
    learned = train()
    scores = [each["eval_auc"] for each in learned["validation_scores"]]
    best = int(np.argmax(scores))
    assert len(scores) == best + 1 + 2 < 12 and learned["best_score"] == max(scores)
    with torch.inference_mode():  # the weights are those of the best epoch: it loses the same again
        outputs = classifier(**collate_images([validation[number] for number in range(len(validation))]))
    losses = [each["eval_loss"] for each in learned["validation_scores"]]
    assert outputs["loss"].item() == pytest.approx(losses[best], abs=1e-4) != pytest.approx(losses[-1], abs=1e-4)
    assert MammographyScores(2).of_trainer((outputs["logits"].numpy(), validation.labels))["auc"] == max(scores)


class Killed(BaseException):
    pass


def test_a_training_that_is_killed_goes_on_and_ends_the_same(folders, drawn_table, tmp_path, monkeypatch):
    """Killed in the third epoch, and once more when all is trained; epochs that were finished are not repeated."""
    classifier, _, train = make_training("mammodino", folders, drawn_table, tmp_path / "whole")
    whole = train()
    _, _, train = make_training("mammodino", folders, drawn_table, tmp_path / "killed")
    step, steps = SeededTrainer.training_step, []

    def dies(self, *args, **kwargs):
        steps.append(self.state.global_step)
        assert self.sampler.epoch == self.state.global_step // 2  # another order each epoch
        if len(steps) == 5:  # of two a epoch
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SeededTrainer, "training_step", dies)
    with pytest.raises(Killed):
        train()
    half_written = tmp_path / "killed" / "checkpoints" / "checkpoint-999"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"")
    steps.clear()
    steps.extend([-1] * 5)
    resumed, _, train = make_training("mammodino", folders, drawn_table, tmp_path / "killed")
    again = train()
    assert steps[5:] == [4, 5] and not half_written.exists()
    assert again == whole
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    finished, _, train = make_training("mammodino", folders, drawn_table, tmp_path / "killed")
    assert train() == whole and len(steps) == 7  # nothing is trained again
    assert torch.equal(finished.head.weight, classifier.head.weight)


def test_a_checkpoint_counts_when_its_last_file_is_whole(tmp_path):
    assert find_checkpoint(tmp_path) is None
    for number, content in ((2, json.dumps({"epoch": 1})), (10, json.dumps({"epoch": 5})), (12, '{"epoch"')):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(content)
    assert find_checkpoint(tmp_path).name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()


def test_parts_of_a_classifier_open_again_and_fit_together(folders, tmp_path):
    backbone = load_backbone("resnet50", folders["resnet50"])
    with torch.no_grad():
        next(backbone.parameters()).add_(0.01)  # as if it had learned
    head = nn.Linear(backbone.width, 3)
    predictor = Predictor(head, True)
    save_classifier(tmp_path / "model", backbone, predictor, ("a", "b", "c"), "meaning", is_frozen=False)
    again, its_head, classes = open_classifier(tmp_path / "model")
    assert classes == ["a", "b", "c"] and torch.equal(its_head.weight, head.weight)
    assert again.settings() == backbone.settings()
    save_classifier(tmp_path / "head", backbone, predictor, ("a", "b", "c"), "meaning", is_frozen=True)
    assert "AutoModelForImageClassification, for resnet50 under" in (tmp_path / "head" / "README.md").read_text()
    assert not (tmp_path / "head" / "backbone.safetensors").exists()
    with pytest.raises(ValueError, match="learned on other weights"):
        open_classifier(tmp_path / "head")
