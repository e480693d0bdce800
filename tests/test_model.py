"""The encoder: equal to transformers' own on the same weights, and background really costs nothing."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, Dinov2WithRegistersConfig
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)

from modeling_mammodino import MammoDinoConfig, MammoDinoForImageClassification, MammoDinoModel, pool_tokens

TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 112,
    "num_register_tokens": 3,
    "layerscale_value": 1.0,
}


def random_model(**changes) -> MammoDinoModel:
    torch.manual_seed(0)
    model = MammoDinoModel(MammoDinoConfig(**{**TINY, **changes})).eval()
    for parameter in model.parameters():  # tokens and biases away from their zero initial values
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("swiglu", [False, True])
def test_equals_dinov2_with_registers_on_the_same_file(tmp_path, swiglu):
    model = random_model(use_swiglu_ffn=swiglu)
    model.save_pretrained(tmp_path)
    native = Dinov2WithRegistersModel.from_pretrained(tmp_path).eval()
    for height, width in ((112, 112), (224, 224), (126, 70)):
        pixels = torch.randn(2, 1, height, width)
        masked = torch.rand(2, height // 14 * (width // 14)) < 0.3
        for arguments in ({}, {"bool_masked_pos": masked}):
            ours, theirs = model(pixels, **arguments), native(pixels, **arguments)
            torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=0, atol=1e-5)


def test_opens_what_dinov2_with_registers_wrote(tmp_path):
    torch.manual_seed(1)
    native = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, num_channels=1)).eval()
    native.save_pretrained(tmp_path)
    model, report = MammoDinoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels = torch.randn(1, 1, 112, 112)
    torch.testing.assert_close(model(pixels).pooler_output, native(pixels).pooler_output, rtol=0, atol=1e-5)


def test_classification_checkpoint_opens_natively(tmp_path):
    torch.manual_seed(2)
    model = MammoDinoForImageClassification(MammoDinoConfig(**TINY, num_labels=4)).eval()
    model.save_pretrained(tmp_path)
    native = Dinov2WithRegistersForImageClassification.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 1, 112, 112)
    torch.testing.assert_close(model(pixels).logits, native(pixels).logits, rtol=0, atol=1e-5)


def test_save_and_load_keep_the_features(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 1, 140, 112)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, MammoDinoModel)
    torch.testing.assert_close(again(pixels).last_hidden_state, model(pixels).last_hidden_state, rtol=0, atol=0)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
    encoder = classifier.dinov2_with_registers
    torch.testing.assert_close(encoder(pixels).pooler_output, model(pixels).pooler_output, rtol=0, atol=0)


def dense_with_background_ignored(model, pixels, kept):
    """Oracle: encode every patch, but let no attention see background keys. kept (B, N) bool."""
    prefix = torch.ones(len(kept), 1 + model.config.num_register_tokens, dtype=torch.bool)
    keys = torch.cat((prefix, kept), dim=1)
    bias = torch.zeros(keys.shape).masked_fill(~keys, -torch.inf)[:, None, None, :]
    hidden = model.encoder(model.embeddings(pixels), attention_mask=bias).last_hidden_state
    return model.layernorm(hidden) * keys[..., None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tissue_tokens_equal_a_dense_encoder_that_ignores_background(attention):
    model = random_model()
    model.set_attn_implementation(attention)
    pixels, tissue = torch.randn(4, 1, 112, 112), torch.rand(4, 8, 8) - 0.5
    tissue[1] = tissue[1].abs() + 0.1  # all breast
    tissue[2] = 0  # none
    tissue = tissue.clamp(0, 1)
    result = model(pixels, tissue_mask=tissue).last_hidden_state
    expected = dense_with_background_ignored(model, pixels, tissue.flatten(1) > 0)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    for row in range(4):  # a batch of unequal masks equals its images one by one
        alone = model(pixels[row : row + 1], tissue_mask=tissue[row : row + 1]).last_hidden_state
        torch.testing.assert_close(alone[0], result[row], rtol=0, atol=1e-5)


def test_a_mask_of_ones_changes_nothing():
    model, pixels = random_model(), torch.randn(2, 1, 112, 112)
    torch.testing.assert_close(
        model(pixels, tissue_mask=torch.ones(2, 8, 8)).last_hidden_state,
        model(pixels).last_hidden_state,
        rtol=0,
        atol=0,
    )


def test_dropped_patches_are_never_encoded():
    model, lengths = random_model(), []
    model.encoder.layer[0].register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    tissue = torch.zeros(1, 8, 8)
    tissue[0, :2, :3] = 0.4
    output = model(torch.randn(1, 1, 112, 112), tissue_mask=tissue, output_hidden_states=True)
    assert lengths == [1 + 3 + 6]
    assert output.last_hidden_state.shape == (1, 1 + 3 + 64, 48)
    assert all(states.shape == (1, 1 + 3 + 64, 48) for states in output.hidden_states)


def test_wrong_shapes_are_refused_with_the_remedy():
    model = random_model()
    with pytest.raises(ValueError, match="MammoDinoImageProcessor"):
        model(torch.randn(1, 3, 112, 112))
    with pytest.raises(ValueError, match="tissue_mask has 49 patches"):
        model(torch.randn(1, 1, 112, 112), tissue_mask=torch.ones(1, 7, 7))
    with pytest.raises(Exception, match="must divide"):
        MammoDinoConfig(hidden_size=50, num_attention_heads=4)


def test_pooling_weighs_patches_by_tissue():
    states, tissue = torch.randn(2, 1 + 3 + 4, 5), torch.tensor([[[1.0, 0.5], [0, 0]], [[0.0, 0], [0, 0]]])
    pooled = pool_tokens(states, 3, tissue)
    torch.testing.assert_close(pooled[:, :5], states[:, 0])
    torch.testing.assert_close(pooled[0, 5:], (states[0, 4] + 0.5 * states[0, 5]) / 1.5)
    torch.testing.assert_close(pooled[1, 5:], states[1, 4:].mean(0))  # no tissue: the plain mean


def test_stochastic_depth_keeps_the_expectation():
    torch.manual_seed(0)
    model = random_model(drop_path_rate=0.5, num_hidden_layers=1)
    layer, states = model.encoder.layer[0], torch.randn(8, 5, 48)
    expected = layer(states) - states  # eval: nothing is dropped
    layer.train()
    with torch.no_grad():
        updates = torch.stack(
            [layer.add_residual(states, lambda x, rows: torch.ones_like(x)) - states for _ in range(400)]
        )
    dropped = (updates == 0).all(dim=(2, 3))
    assert (dropped.sum(dim=1) == 4).all()  # half of the batch, every time
    torch.testing.assert_close(updates.mean(0), torch.ones_like(expected), rtol=0, atol=0.25)


def test_a_classifier_learns():
    torch.manual_seed(0)
    model = MammoDinoForImageClassification(MammoDinoConfig(**TINY, num_labels=2))
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
