"""Layer-wise decay, stochastic depth, gradient checkpointing, several processes, class tokens of several layers."""

import numpy as np
import pandas as pd
import pytest
import torch
from made_inputs import TINY_ENCODER, random_encoder
from pretrain_runs import launch
from torch import nn

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools.features import embed_files
from training.evaluation.backbones.preprocessing import MammoDinoImages
from training.evaluation.backbones.registry import BACKBONES, Backbone, load_backbone
from training.evaluation.finetuning.image_classifier import ImageClassifier, open_classifier
from training.evaluation.finetuning.tuning import ClassifierTrainer
from training.evaluation.layer_decay import layer_multiplier
from training.evaluation.seeded_trainer import prepare_encoder
from training.finetune import finetune
from training.probe import read_features

from .small_runs import command_line, short_run
from .test_finetune_training import make_training

TRANSFORMERS = [kind for kind, family in BACKBONES.items() if family.is_transformer]
SIZE = {"height": 112, "width": 84}


class Stop(Exception):
    pass


def groups_of(monkeypatch, train) -> list[dict]:
    """The optimizer's groups of a training that stops before its first step."""
    found = []

    def stop(self):
        found.extend(self.create_optimizer().param_groups)
        raise Stop

    monkeypatch.setattr(ClassifierTrainer, "resume", stop)
    with pytest.raises(Stop):
        train()
    return found


def test_learning_rates_fall_layer_by_layer_and_the_weight_decay_stays(folders, drawn_table, tmp_path, monkeypatch):
    of_names: dict[float, dict[str, tuple[float, float]]] = {}
    for decay in (1.0, 0.5):
        changes = {"layerwise_decay": decay, "learning_rate": 0.01, "weight_decay": 0.3}
        classifier, _, train = make_training("mammodino", folders, drawn_table, tmp_path, **changes)
        groups = groups_of(monkeypatch, train)
        by_id = {id(each): (group["lr"], group["weight_decay"]) for group in groups for each in group["params"]}
        of_names[decay] = {name: by_id[id(each)] for name, each in classifier.named_parameters()}
    rates = {
        "backbone.model.embeddings.cls_token": 0.01 / 8,  # two blocks and what follows them
        "backbone.model.embeddings.patch_embeddings.projection.bias": 0.01 / 8,
        "backbone.model.encoder.layer.0.mlp.fc1.weight": 0.01 / 4,
        "backbone.model.encoder.layer.1.norm1.bias": 0.01 / 2,
        "backbone.model.layernorm.weight": 0.01,
        "head.weight": 0.01,
    }
    for name, rate in rates.items():
        assert of_names[0.5][name][0] == pytest.approx(rate), name
    assert {rate for rate, _ in of_names[1.0].values()} == {0.01}
    for name, (_, weight_decay) in of_names[1.0].items():
        assert of_names[0.5][name][1] == weight_decay, name
    assert {weight_decay for _, weight_decay in of_names[0.5].values()} == {0.0, 0.3}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_layers_of_every_transformer_are_told_by_their_names(kind, folders):
    model = load_backbone(kind, folders[kind]).model
    depth = model.config.num_hidden_layers
    found = {name: layer_multiplier(name, depth, 0.5) for name, _ in model.named_parameters()}
    assert set(found.values()) == {0.5**above for above in range(depth + 2)}
    assert next(iter(found.values())) == 0.5 ** (depth + 1)  # class token or patch embedding
    assert sum(value == 0.5 ** (depth + 1) for value in found.values()) <= 7  # embeddings and tokens alone


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    tissue = torch.ones(count, 8, 6)
    tissue[:, :, 4:] = 0
    tissue[0, 2:] = 0  # images of different lengths
    pixels = torch.randn(count, 1, 112, 84, generator=numbers)
    return {
        "pixel_values": pixels,
        "tissue_mask": tissue,
        "num_slices": torch.ones(count, dtype=torch.long),
        "labels": torch.arange(count) % 2,
    }


def classifier_of(settings) -> ImageClassifier:
    encoder = random_encoder()
    prepare_encoder(encoder, settings)
    backbone = Backbone(
        "mammodino", "made", encoder, MammoDinoImages(MammoDinoImageProcessor(size=SIZE, patch_size=14))
    )
    torch.manual_seed(0)
    return ImageClassifier(backbone, nn.Linear(backbone.width, 2), np.ones(2))


def test_stochastic_depth_is_of_training_alone_and_no_key_of_features(folders, drawn_table, tmp_path):
    plain = classifier_of(short_run(drawn_table, folders, tmp_path, mode="full")).eval()
    dropping = classifier_of(short_run(drawn_table, folders, tmp_path, mode="full", drop_path_rate=0.5))
    assert dropping.backbone.settings() == plain.backbone.settings()
    expected = plain(**batch())["logits"]
    torch.testing.assert_close(dropping.eval()(**batch())["logits"], expected)
    torch.testing.assert_close(plain.train()(**batch())["logits"], expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    draws = [dropping.train()(**batch())["logits"] for _ in range(2)]
    assert (draws[0] - draws[1]).abs().max() > 1e-3 < (draws[0] - expected).abs().max()
    with pytest.raises(ValueError, match="drop_path_rate=0.5: Dinov2Model has none"):
        changes = {"mode": "full", "backbone": "dinov2", "drop_path_rate": 0.5}
        finetune(short_run(drawn_table, folders, tmp_path / "dinov2", **changes))


def test_checkpointed_gradients_are_the_same_and_blocks_run_twice(folders, drawn_table, tmp_path):
    gradients, calls = [], []
    for checkpointing in (False, True):
        changes = {"mode": "full", "gradient_checkpointing": checkpointing, "drop_path_rate": 0.5}
        classifier = classifier_of(short_run(drawn_table, folders, tmp_path, **changes)).train()
        count = [0]
        classifier.backbone.model.encoder.layer[0].mlp.register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        torch.manual_seed(0)  # the same branches are dropped
        classifier(**batch())["loss"].backward()
        gradients.append({name: each.grad for name, each in classifier.named_parameters()})
        calls.append(count[0])
    assert calls == [1, 2]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0].values())


def test_options_reach_the_encoder_of_a_run(folders, drawn_table, tmp_path, monkeypatch):
    def stop(classifier, train, *_):
        raise Stop(classifier, train.labels)

    monkeypatch.setattr("training.finetune.train_classifier", stop)
    changes = {"mode": "lora", "drop_path_rate": 0.25, "gradient_checkpointing": True}
    with pytest.raises(Stop) as stopped:
        finetune(short_run(drawn_table, folders, tmp_path, **changes))
    classifier, labels = stopped.value.args
    np.testing.assert_allclose(classifier.class_weights * np.bincount(labels), len(labels) / 2)  # both weigh the same
    layers = [each for each in classifier.modules() if hasattr(each, "drop_path_rate")]
    assert layers and all(each.drop_path_rate == 0.25 and each.gradient_checkpointing for each in layers)


def blocks_of(model) -> list[nn.Module]:
    return next(list(each) for name, each in model.named_modules() if name.endswith(("layer", "layers")))


@pytest.mark.parametrize("kind", ["mammodino", "dinov2", "dinov3", "biomedclip", "mammo_clip_vit"])
def test_class_tokens_of_the_last_layers_stand_before_the_usual_features(kind, folders, drawn_table):
    """Taken from the blocks by hooks, behind the final norm."""
    path = min(drawn_table.glob("*.png"))
    both = [load_backbone(kind, folders[kind], last_layers=number) for number in (1, 2)]
    seen, (plain, backbone) = [], both
    first, last = blocks_of(backbone.model)[-2:]
    first.register_forward_hook(lambda *call: seen.append(call[-1]))
    norm = next(
        each for name, each in backbone.model.named_modules() if name in ("norm", "layernorm", "post_layernorm")
    )
    inputs = {name: torch.from_numpy(value)[None] for name, value in next(backbone.preprocess(path)).items()}
    with torch.inference_mode():
        found, usual = backbone(**inputs), plain(**inputs)
        states = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        expected = norm(states)[:, 0]
    assert found.shape[1] == backbone.width == plain.width * 3 // 2
    torch.testing.assert_close(found, torch.cat((expected, usual), dim=1), rtol=1e-4, atol=1e-5)
    assert backbone.settings() == plain.settings() | {"last_layers": 2} != plain.settings()
    assert last is not first


def test_too_many_layers_and_models_without_class_token_are_refused(folders):
    with pytest.raises(ValueError, match="last_layers=9: backbone mammodino has 2 layers"):
        load_backbone("mammodino", folders["mammodino"], last_layers=9)
    for kind in ("resnet50", "medsiglip"):
        with pytest.raises(ValueError, match=f"last_layers=2: backbone {kind} has no class token"):
            load_backbone(kind, folders[kind], last_layers=2)


def test_embedding_files_gives_the_same_class_tokens(drawn_table):
    processor, files = MammoDinoImageProcessor(size=SIZE, patch_size=14), sorted(drawn_table.glob("*.png"))[:3]
    encoder = random_encoder()
    backbone = Backbone("mammodino", "made", encoder, MammoDinoImages(processor), last_layers=3)
    width = TINY_ENCODER["hidden_size"]
    for pool, size in (("both", 4), ("class", 3)):
        found = embed_files(files, encoder, processor, pool=pool, last_layers=3)
        for path, each in zip(files, found, strict=True):
            inputs = {name: torch.from_numpy(value)[None] for name, value in next(backbone.preprocess(path)).items()}
            with torch.inference_mode():
                expected = backbone(**inputs)[:, : size * width]
            np.testing.assert_allclose(each.embeddings, expected, atol=1e-4)
        table = pd.DataFrame({"file": [path.name for path in files]})
        read = read_features(drawn_table / "index.csv", table, {"a": encoder, "b": encoder}, processor, pool, 4, 3)
        assert read.by_model["b"].shape == (3, size * width)  # of training.probe
    with pytest.raises(ValueError, match="last_layers=4: must be 1 to 3"):
        embed_files(files, encoder, processor, last_layers=4)


def test_a_frozen_run_on_several_layers_has_its_own_cache_and_opens_again(folders, drawn_table, tmp_path):
    cache = tmp_path / "features"
    for number in (1, 2):
        settings = short_run(drawn_table, folders, tmp_path / str(number), last_layers=number, cache_dir=str(cache))
        result = finetune(settings)
    assert len(list(cache.glob("*/mammodino-*"))) == 2
    assert result["backbone"]["width"] * 2 + 2 == result["learned"]["parameters"]
    backbone, head, _ = open_classifier(tmp_path / "2" / "model")
    row = pd.read_parquet(tmp_path / "2" / "predictions.parquet").query("level == 'image'").iloc[0]
    inputs = next(backbone.preprocess(drawn_table / row["image_id"]))
    with torch.inference_mode():
        p = torch.softmax(head(backbone(**{name: torch.from_numpy(each)[None] for name, each in inputs.items()})), 1)
    np.testing.assert_allclose(row[["p_0", "p_1"]].astype(float), p[0], atol=1e-4)


@pytest.mark.slow
def test_two_processes_reach_what_one_reaches_and_the_main_one_alone_writes(folders, drawn_table, tmp_path):
    """A batch of eight, and twice one of four; batches are whole, or their last images would be repeated."""
    changes = {"mode": "full", "learning_rate": 1e-3, "per_device_eval_batch_size": 5}
    alone = finetune(short_run(drawn_table, folders, tmp_path / "one", per_device_train_batch_size=8, **changes))
    assert alone["counts"]["train"]["images"] % 8 == 0 == alone["counts"]["validation"]["images"] % 10
    settings = short_run(drawn_table, folders, tmp_path / "two", per_device_train_batch_size=4, **changes)
    said = launch(2, str(tmp_path), *command_line(settings), module="tests.evaluation.recorded_writes")
    assert said.count("| patient_max |") == 1  # printed once
    shared = finetune(settings)  # finished: read
    assert shared["learned"]["penalty"] == alone["learned"]["penalty"]
    for one, two in zip(*(each["learned"]["training"]["validation_scores"] for each in (alone, shared)), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    assert len({each["eval_loss"] for each in alone["learned"]["training"]["validation_scores"]}) == 3  # it learned
    assert shared["metrics"] == alone["metrics"]
    main, other = ((tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2))
    ours = [path for path in other if str(tmp_path / "two") in path and not path.endswith(".lock")]
    assert not ours and any(path.endswith(".tmp") and str(tmp_path / "two") in path for path in main)
