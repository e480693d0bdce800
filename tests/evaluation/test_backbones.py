"""Backbones: converted weights against independent forwards, one rule for features, learning, settings, the Hub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    EfficientNetModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from modeling_mammodino import MammoDinoForImageClassification
from training.evaluation.backbones.convert_mammo_clip_efficientnet import (
    VARIANTS,
    convert_mammo_clip,
    efficientnet_config,
)
from training.evaluation.backbones.registry import BACKBONES, Backbone, load_backbone
from training.evaluation.backbones.small_checkpoints import efficientnet_state, write_small_checkpoints

from .reference_backbones import NATIVE, OWN_FILES, clip_vit, efficientnet, inputs, timm_vit


def features(backbone: Backbone, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return backbone(**given)


def pooled(tokens: torch.Tensor, num_prefix: int = 1) -> torch.Tensor:
    return torch.cat((tokens[:, 0], tokens[:, num_prefix:].mean(1)), dim=1)


def test_every_kind_opens_from_its_small_checkpoint(folders):
    assert set(folders) == set(BACKBONES)
    for kind, folder in folders.items():
        backbone = load_backbone(kind, str(folder))
        assert not backbone.training and all(each.dtype == torch.float32 for each in backbone.parameters())
        found = features(backbone, inputs(kind))
        assert found.shape == (2, backbone.width) and found.isfinite().all() and found.std(0).min() > 0
        assert (backbone.kind, backbone.source) == (kind, str(folder))


def test_small_checkpoints_are_a_function_of_their_seed(folders, tmp_path):
    hashes = {kind: load_backbone(kind, str(folder)).settings()["weights"] for kind, folder in folders.items()}
    assert len(set(hashes.values())) == len(hashes)
    before = torch.get_rng_state()
    for seed, same in ((0, True), (1, False)):
        written = write_small_checkpoints(tmp_path / str(seed), seed)
        for kind in ("resnet50", *OWN_FILES):
            again = load_backbone(kind, str(written[kind])).settings()["weights"]
            assert (hashes[kind] == again) is same
    assert torch.equal(before, torch.get_rng_state())


# converted files, against forwards of the raw keys


def test_biomedclip_equals_timms_forward(folders):
    state = torch.load(folders["biomedclip"] / OWN_FILES["biomedclip"])
    given = inputs("biomedclip")
    found = features(load_backbone("biomedclip", str(folders["biomedclip"])), given)
    torch.testing.assert_close(found, pooled(timm_vit(state, given["pixel_values"])), rtol=0, atol=2e-5)


def test_dbt_dino_equals_dinov2s_forward_of_the_teacher(folders):
    state = torch.load(folders["dbt_dino"] / OWN_FILES["dbt_dino"])["teacher"]
    given = inputs("dbt_dino")
    found = features(load_backbone("dbt_dino", str(folders["dbt_dino"])), given)
    torch.testing.assert_close(found, pooled(timm_vit(state, given["pixel_values"], "backbone.")), rtol=0, atol=2e-5)


@pytest.mark.parametrize("quick", [True, False])
def test_a_clip_tower_equals_openais_forward(folders, tmp_path, quick):
    folder = shutil.copytree(folders["mammo_clip_vit"], tmp_path / "clip")
    state = torch.load(folder / OWN_FILES["mammo_clip_vit"])
    assert state["visual.conv1.weight"].dtype == torch.float16
    if not quick:  # open_clip's own training; its wrapper and that of distributed training
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / OWN_FILES["mammo_clip_vit"])
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {}}}))
    given = inputs("mammo_clip_vit")
    found = features(load_backbone("mammo_clip_vit", str(folder)), given)
    expected = clip_vit(state, given["pixel_values"], quick)
    torch.testing.assert_close(found, pooled(expected), rtol=0, atol=2e-5)
    other = clip_vit(state, given["pixel_values"], not quick)
    assert (found - pooled(other)).abs().max() > 1e-3  # the activation can be told


@pytest.mark.parametrize("shape", [(72, 72), (80, 56), (67, 45)])
def test_mammo_clip_equals_efficientnet_pytorchs_forward(folders, shape):
    """Also at sizes for which TensorFlow would pad otherwise: the amounts are those of the variant's own size."""
    state = torch.load(folders["mammo_clip_efficientnet"] / OWN_FILES["mammo_clip_efficientnet"])["model"]
    pixels = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    expected = efficientnet(state, pixels, 72, strides=[1, 2, 2, 2, 1, 2, 1])
    found = features(
        load_backbone("mammo_clip_efficientnet", str(folders["mammo_clip_efficientnet"])), {"pixel_values": pixels}
    )
    torch.testing.assert_close(found, expected.mean((2, 3)), rtol=0, atol=2e-5)


def test_the_variants_of_efficientnet_are_the_published_ones():
    """Widths of Tan and Le's heads, and the blocks that transformers' own conversion pads on all sides."""
    published = {
        "b0": (1280, []), "b1": (1280, [16]), "b2": (1408, [5, 8, 16]), "b3": (1536, [5, 18]), "b4": (1792, [6]),
        "b5": (2048, [13, 27]), "b6": (2304, [31]), "b7": (2560, [18]),
    }  # fmt: skip
    found = {name: efficientnet_config(name) for name in VARIANTS if name != "small"}
    assert {name: (each.hidden_dim, list(each.depthwise_padding)) for name, each in found.items()} == published


@pytest.mark.parametrize(("variant", "millions", "head"), [("b2", 7.70, 1408), ("b5", 28.34, 2048)])
def test_the_published_sizes_of_mammo_clip_open(tmp_path, variant, millions, head):
    """Parameters without the classifier: 9.11 - 1.41 and 30.39 - 2.05 million of torchvision's B2 and B5."""
    with torch.device("meta"):
        model, state = EfficientNetModel(efficientnet_config(variant)), efficientnet_state(variant)
    expected = {name: each.shape for name, each in model.state_dict().items()}
    count = sum(each.numel() for name, each in state.items() if "running" not in name and "tracked" not in name)
    assert round(count / 1e6, 2) == millions and len(state) == len(expected)
    if variant == "b2":  # a whole one is read; B5 takes seconds
        zeros = {f"image_encoder.{name}": torch.zeros(each.shape) for name, each in state.items()}
        torch.save({"model": zeros}, tmp_path / "b2-model-best-epoch-10.tar")
        model, processor = convert_mammo_clip(tmp_path / "b2-model-best-epoch-10.tar")
        assert {name: each.shape for name, each in model.state_dict().items()} == expected
        assert model.config.hidden_dim == head and processor["size"] == {"height": 1520, "width": 912}


def test_mammo_clips_batch_statistics_move_at_its_own_pace(folders):
    backbone = load_backbone("mammo_clip_efficientnet", str(folders["mammo_clip_efficientnet"])).train()
    norms = [each for each in backbone.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    assert {(each.momentum, each.eps) for each in norms} == {(0.01, 1e-3)}
    given = inputs("mammo_clip_efficientnet", batch=4)
    norm = backbone.model.embeddings.batchnorm
    before = norm.running_mean.clone()
    with torch.no_grad():
        stem = backbone.model.embeddings.convolution(backbone.model.embeddings.padding(given["pixel_values"]))
        backbone(**given)
    torch.testing.assert_close(norm.running_mean, 0.99 * before + 0.01 * stem.mean((0, 2, 3)))


# checkpoints of transformers


@pytest.mark.parametrize("kind", NATIVE)
def test_a_native_checkpoint_is_loaded_whole_and_pooled_as_published(folders, kind):
    backbone, given = load_backbone(kind, str(folders[kind])), inputs(kind)
    outputs = AutoModel.from_pretrained(folders[kind]).eval()(**given)
    expected = outputs.pooler_output.flatten(1)
    if kind == "medsiglip":  # its attention pooling stands for a class token
        expected = torch.cat((expected, outputs.last_hidden_state.mean(1)), dim=1)
    elif "dino" in kind:
        expected = pooled(outputs.last_hidden_state, num_prefix=5 if kind == "dinov3" else 1)
    torch.testing.assert_close(features(backbone, given), expected)
    backbone.model.save_pretrained(folders[kind] / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folders[kind], folders[kind] / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_registers_and_classifiers_of_dinov2_are_opened(folders, tmp_path):
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 70, "patch_size": 14}
    torch.manual_seed(0)
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**small, num_register_tokens=3)).save_pretrained(tmp_path / "r")
    Dinov2ForImageClassification(Dinov2Config(**small, num_labels=3)).save_pretrained(tmp_path / "c")
    given = inputs("dinov2")
    model = Dinov2WithRegistersModel.from_pretrained(tmp_path / "r").eval()
    expected = pooled(model(**given).last_hidden_state, num_prefix=4)
    torch.testing.assert_close(features(load_backbone("dinov2", str(tmp_path / "r")), given), expected)
    model = Dinov2ForImageClassification.from_pretrained(tmp_path / "c").eval()
    seen = []
    model.classifier.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(**given)  # its head takes what ours does
    torch.testing.assert_close(features(load_backbone("dinov2", str(tmp_path / "c")), given), seen[0])


def test_towers_that_were_saved_by_transformers_are_opened(tmp_path):
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**small, image_size=64)).eval()
    vit.save_pretrained(tmp_path / "vit")
    text = {**small, "vocab_size": 9}
    clip = CLIPModel(CLIPConfig(vision_config={**small, "image_size": 64, "patch_size": 16}, text_config=text)).eval()
    clip.save_pretrained(tmp_path / "clip")
    given = inputs("biomedclip")
    found = features(load_backbone("biomedclip", str(tmp_path / "vit")), given)
    torch.testing.assert_close(found, pooled(vit(**given).last_hidden_state))
    found = features(load_backbone("mammo_clip_vit", str(tmp_path / "clip")), given)
    torch.testing.assert_close(found[:, :64], clip.vision_model(**given).pooler_output)
    whole = SiglipModel(SiglipConfig(vision_config={**small, "image_size": 64, "patch_size": 16}, text_config=text))
    whole.eval().save_pretrained(tmp_path / "siglip")  # as medsiglip is published
    found = features(load_backbone("medsiglip", str(tmp_path / "siglip")), given)
    torch.testing.assert_close(found[:, :64], whole.vision_model(**given).pooler_output)


def test_mammodino_gives_what_its_own_classifier_takes(folders):
    model = MammoDinoForImageClassification.from_pretrained(folders["mammodino"]).eval()
    seen = []
    model.classifier.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    given = inputs("mammodino")
    model(**given)
    backbone = load_backbone("mammodino", str(folders["mammodino"]))
    found = features(backbone, given)
    torch.testing.assert_close(found, seen[0])
    assert (found - features(backbone, given | {"tissue_mask": None})).abs().max() > 1e-3


def test_an_untrained_vit_has_the_architecture_it_is_given_and_its_seed(folders):
    trained = load_backbone("mammodino", str(folders["mammodino"]))
    before = torch.get_rng_state()
    first, again, other = (load_backbone("untrained", str(folders["untrained"]), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    weights = [each.settings()["weights"] for each in (first, again, other, trained)]
    assert weights[0] == weights[1] and len(set(weights)) == 3
    assert first.settings()["config"] == trained.settings()["config"]
    assert first.preprocess.settings() == trained.preprocess.settings()
    default = load_backbone("untrained")
    assert (default.width, sum(each.numel() for each in default.parameters()) // 10**6) == (768, 21)  # a ViT-S


# learning


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("whole", [False, True], ids=["head", "whole"])
def test_a_head_and_the_whole_learn(folders, kind, whole):
    torch.manual_seed(0)
    backbone = load_backbone(kind, str(folders[kind])).requires_grad_(whole).train(whole)
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(backbone.width), torch.nn.Linear(backbone.width, 2))
    given, labels, losses = inputs(kind, batch=8), torch.tensor([0, 1] * 4), []
    given["pixel_values"][1::2, :, 16:48, 16:48] += 1.5  # the lesion
    learned = [*head.parameters(), *(each for each in backbone.parameters() if each.requires_grad)]
    optimizer = torch.optim.AdamW(learned, lr=1e-3 if whole else 3e-3)
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(head(backbone(**given)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    if whole:
        still = {name for name, each in backbone.named_parameters() if each.grad is None or not each.grad.any()}
        assert all(name.endswith(("mask_token", "register_tokens")) for name in still), still  # of pretraining; none
    else:
        assert all(each.grad is None for each in backbone.parameters())


@pytest.mark.parametrize("kind", BACKBONES)
def test_low_rank_adapters_find_their_layers(folders, kind):
    backbone, given = load_backbone(kind, str(folders[kind])), inputs(kind)
    assert backbone.lora_targets
    before = features(backbone, given)
    adapted = get_peft_model(backbone, LoraConfig(r=2, target_modules=backbone.lora_targets, init_lora_weights=False))
    learned = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert learned and all("lora_" in name for name in learned)
    after = adapted(**given)
    assert after.shape == before.shape and (after - before).abs().max() > 1e-4
    after.square().mean().backward()
    assert all(each.grad is not None and each.grad.any() for each in adapted.parameters() if each.requires_grad)


# settings


@pytest.mark.parametrize("kind", BACKBONES)
def test_settings_are_the_same_for_the_same_features_only(folders, tmp_path, kind):
    backbone = load_backbone(kind, str(folders[kind]))
    settings = backbone.settings()
    moved = shutil.copytree(folders[kind], tmp_path / "moved")
    assert json.loads(json.dumps(settings)) == json.loads(json.dumps(load_backbone(kind, str(moved)).settings()))
    assert str(tmp_path) not in json.dumps(settings) and str(folders[kind]) not in json.dumps(settings)
    if kind not in ("mammodino", "untrained"):
        assert load_backbone(kind, str(moved), crop_to_breast=False).settings() != settings
        path = moved / "preprocessor_config.json"
        given = json.loads(path.read_text()) if path.is_file() else {"image_processor_type": "ViTImageProcessor"}
        path.write_text(json.dumps(given | {"image_mean": [0.1, 0.1, 0.1]}))
        changed = load_backbone(kind, str(moved)).settings()
        assert changed["weights"] == settings["weights"] and changed["images"] != settings["images"]
    with torch.no_grad():
        next(backbone.parameters()).flatten()[0].add_(1)
    assert backbone.settings()["weights"] != settings["weights"]


# the Hub


def test_weights_come_from_the_hub_by_id_and_by_path(folders, hub, tmp_path):
    api = HfApi(endpoint=hub.url, token="dummy")
    uploads = {
        "me/resnet": ("resnet50", ""),
        "me/biomed": ("biomedclip", ""),
        "me/mammo": ("mammo_clip_efficientnet", "a/b"),
    }
    for repo, (kind, path) in uploads.items():
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=folders[kind], path_in_repo=path or None)
    program = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from training.evaluation.backbones.registry import load_backbone
sources = {{"resnet50": "me/resnet", "biomedclip": "me/biomed"}}
sources["mammo_clip_efficientnet"] = "me/mammo/a/b/model-best.tar"
found = {{kind: load_backbone(kind, source).settings()["weights"] for kind, source in sources.items()}}
for kind, source in (("resnet50", "me/biomed"), ("biomedclip", "me/resnet"), ("mammo_clip_efficientnet", "me/mammo"),
                     ("dinov2", "me/nothing"), ("mammo_clip_efficientnet", "me/mammo/a/nothing.tar")):
    try:
        load_backbone(kind, source)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1, str(error)
    else:
        raise AssertionError((kind, source))
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=hub.environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found == {kind: load_backbone(kind, str(folders[kind])).settings()["weights"] for kind in found}
