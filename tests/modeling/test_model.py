"""The encoder: equal to transformers' own on the same weights, and a backbone and classifier as its heads expect."""

import pytest
import torch
from made_inputs import TINY_ENCODER, random_encoder
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification, Dinov2WithRegistersConfig
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)

from modeling_mammodino import MammoDinoBackbone, MammoDinoConfig, MammoDinoForImageClassification, MammoDinoModel

SIZES = ((224, 224), (518, 518), (896, 448))


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module, height: int, width: int) -> None:
    pixels = torch.randn(2, 1, height, width)
    masked = torch.rand(2, height // 14 * (width // 14)) < 0.3
    with torch.inference_mode():
        for arguments in ({}, {"bool_masked_pos": masked}):
            one, other = ours(pixels, **arguments), theirs(pixels, **arguments)
            torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state, rtol=0, atol=1e-5)
            torch.testing.assert_close(one.pooler_output, other.pooler_output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_with_registers_opens_ours(tmp_path, swiglu):
    model = random_encoder(use_swiglu_ffn=swiglu, image_size=518)
    model.save_pretrained(tmp_path)
    native = Dinov2WithRegistersModel.from_pretrained(tmp_path).eval()
    for height, width in SIZES:
        assert_same(model, native, height, width)


def test_opens_what_dinov2_with_registers_wrote(tmp_path):
    torch.manual_seed(1)
    native = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**{**TINY_ENCODER, "image_size": 518}, num_channels=1)
    ).eval()
    native.save_pretrained(tmp_path)
    model, report = MammoDinoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for height, width in SIZES:
        assert_same(model, native, height, width)


def test_classification_checkpoint_opens_natively(tmp_path):
    torch.manual_seed(2)
    model = MammoDinoForImageClassification(MammoDinoConfig(**TINY_ENCODER, num_labels=4)).eval()
    model.save_pretrained(tmp_path)
    native = Dinov2WithRegistersForImageClassification.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 1, 112, 112)
    torch.testing.assert_close(model(pixels).logits, native(pixels).logits, rtol=0, atol=1e-5)


def test_save_and_load_keep_the_features(tmp_path):
    model = random_encoder()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 1, 140, 112)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, MammoDinoModel)
    torch.testing.assert_close(again(pixels).last_hidden_state, model(pixels).last_hidden_state, rtol=0, atol=0)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
    encoder = classifier.dinov2_with_registers
    torch.testing.assert_close(encoder(pixels).pooler_output, model(pixels).pooler_output, rtol=0, atol=0)


def test_wrong_shapes_are_refused_with_the_remedy():
    model = random_encoder()
    with pytest.raises(ValueError, match="MammoDinoImageProcessor"):
        model(torch.randn(1, 3, 112, 112))
    with pytest.raises(Exception, match="must divide"):
        MammoDinoConfig(hidden_size=50, num_attention_heads=4)


def test_a_fresh_encoder_starts_as_dinov2s_does():
    """facebookresearch/dinov2, vision_transformer.py: truncated normals of 0.02, tokens near zero, LayerScale 1e-5; the
    patch convolution as PyTorch makes it, uniform up to the inverse root of what it sees."""
    torch.manual_seed(0)
    model = MammoDinoModel(MammoDinoConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3))
    for name, parameter in model.named_parameters():
        value, spread = parameter.detach(), parameter.detach().std().item()
        if name.endswith("lambda1"):
            assert (value == 1e-5).all(), name
        elif "norm" in name:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        elif "projection" in name:
            assert value.abs().max() <= 1 / 14 and spread == pytest.approx(1 / 14 / 3**0.5, rel=0.1), name
        elif name.endswith(("bias", "mask_token")):
            assert not value.any(), name
        elif name.endswith(("cls_token", "register_tokens")):
            assert spread == pytest.approx(1e-6, rel=0.2), name
        else:  # linear layers, position embeddings
            assert spread == pytest.approx(0.02, rel=0.03), name


def test_stochastic_depth_keeps_the_expectation():
    torch.manual_seed(0)
    model = random_encoder(drop_path_rate=0.5, num_hidden_layers=1)
    layer, states = model.encoder.layer[0], torch.randn(8, 5, 48)
    expected = layer(states) - states  # eval: nothing is dropped
    layer.train()
    with torch.no_grad():
        layer.layer_scale1.lambda1.fill_(1.0)
        updates = torch.stack(
            [
                layer.add_residual(states, lambda x, rows: torch.ones_like(x), layer.layer_scale1) - states
                for _ in range(400)
            ]
        )
    dropped = (updates == 0).all(dim=(2, 3))
    assert (dropped.sum(dim=1) == 4).all()  # half of the batch, every time
    torch.testing.assert_close(updates.mean(0), torch.ones_like(expected), rtol=0, atol=0.25)


@pytest.mark.slow
def test_a_classifier_learns():
    torch.manual_seed(0)
    model = MammoDinoForImageClassification(MammoDinoConfig(**TINY_ENCODER, num_labels=2))
    pixels, labels = torch.randn(8, 1, 56, 56), torch.tensor([0, 1] * 4)
    pixels[labels == 1] += 0.5
    tissue = torch.ones(8, 4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        loss = model(pixels, tissue_mask=tissue, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_backbone_returns_the_stages_asked_for(tmp_path):
    model = random_encoder()
    model.save_pretrained(tmp_path)
    backbone = MammoDinoBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage3"]).eval()
    native = Dinov2WithRegistersBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage3"]).eval()
    pixels = torch.randn(2, 1, 112, 84)
    ours, theirs = backbone(pixels), native(pixels)
    assert backbone.channels == [48, 48] and ours.hidden_states is None
    assert [tuple(each.shape) for each in ours.feature_maps] == [(2, 48, 8, 6)] * 2
    for one, other in zip(ours.feature_maps, theirs.feature_maps, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    last = model(pixels).last_hidden_state[:, 1 + 3 :].transpose(1, 2).unflatten(2, (8, 6))
    torch.testing.assert_close(ours.feature_maps[-1], last, rtol=0, atol=0)


def test_a_backbone_is_saved_with_its_stages(tmp_path):
    backbone = MammoDinoBackbone(
        MammoDinoConfig(**TINY_ENCODER, out_indices=[0, 2], reshape_hidden_states=False)
    ).eval()
    backbone.save_pretrained(tmp_path)
    again = AutoBackbone.from_config(MammoDinoConfig.from_pretrained(tmp_path))
    assert isinstance(again, MammoDinoBackbone) and again.out_features == ["stem", "stage2"]
    maps = MammoDinoBackbone.from_pretrained(tmp_path)(torch.randn(1, 1, 56, 56)).feature_maps
    assert [tuple(each.shape) for each in maps] == [(1, 1 + 3 + 16, 48)] * 2


def test_position_embeddings_follow_the_plain_reference():
    """Oracle: facebookresearch/dinov2's formula for its plain variants, `scale_factor=(n + 0.1) / M`, written out."""
    model = random_encoder(interpolate_antialias=False, interpolate_offset=0.1)
    stored = model.embeddings.position_embeddings[0, 1:].reshape(8, 8, 48)
    ours = model.embeddings.interpolate_position_embeddings((5, 11))[0, 1:].reshape(5, 11, 48)
    for row, column in ((0, 0), (2, 7), (4, 10)):
        y, x = ((place + 0.5) * 8 / (size + 0.1) - 0.5 for place, size in ((row, 5), (column, 11)))
        expected = sum(
            cubic(y - j) * cubic(x - i) * stored[min(max(j, 0), 7), min(max(i, 0), 7)]
            for j in range(int(y // 1) - 1, int(y // 1) + 3)
            for i in range(int(x // 1) - 1, int(x // 1) + 3)
        )
        torch.testing.assert_close(ours[row, column], expected, rtol=0, atol=1e-5)


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel with torch's a."""
    t = abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0
