"""Background costs nothing: what is dropped is never encoded, and what is kept comes out as in a dense encoder."""

import pytest
import torch
from made_inputs import TINY_ENCODER, draw_breast, random_encoder

from modeling_mammodino import (
    MammoDinoBackbone,
    MammoDinoConfig,
    MammoDinoForImageClassification,
    MammoDinoImageProcessor,
    MammoDinoModel,
    pool_tokens,
)
from modeling_mammodino.tissue_tokens import MaskedTokens, PaddedTokens, select_tokens

NUM_PREFIX_TOKENS = 1 + TINY_ENCODER["num_register_tokens"]


def dense_with_background_ignored(model: MammoDinoModel, pixels: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
    """Oracle: encode every patch, but let no attention see background keys."""
    kept = tissue.flatten(1) > model.config.tissue_threshold  # (B, N)
    keys = torch.nn.functional.pad(kept, (NUM_PREFIX_TOKENS, 0), value=True)
    bias = torch.zeros(keys.shape).masked_fill(~keys, -torch.inf)[:, None, None, :]
    hidden = model.encoder(model.embeddings(pixels), attention_mask=bias).last_hidden_state
    return model.layernorm(hidden) * keys[..., None]


@pytest.fixture
def unequal() -> tuple[torch.Tensor, torch.Tensor]:
    """Four images (4, 1, 112, 112) and masks (4, 8, 8): two partly breast, one all breast, one without any."""
    pixels, tissue = torch.randn(4, 1, 112, 112), torch.rand(4, 8, 8) - 0.5
    tissue[1] = tissue[1].abs() + 0.1
    tissue[2] = 0
    return pixels, tissue.clamp(0, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # packed, padded
def test_equals_a_dense_encoder_that_ignores_background(unequal, attention, threshold):
    model, (pixels, tissue) = random_encoder(tissue_threshold=threshold), unequal
    model.set_attn_implementation(attention)
    result = model(pixels, tissue_mask=tissue).last_hidden_state
    expected = dense_with_background_ignored(model, pixels, tissue)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    for row in range(4):  # a batch of unequal masks equals its images one by one
        alone = model(pixels[row : row + 1], tissue_mask=tissue[row : row + 1]).last_hidden_state
        torch.testing.assert_close(alone[0], result[row], rtol=0, atol=1e-5)


def test_equals_it_on_the_images_of_the_image_processor():
    images = [draw_breast(300, 200, seed=1), draw_breast(260, 230, seed=2, side="right"), draw_breast(400, 150)]
    inputs = MammoDinoImageProcessor(size={"height": 252, "width": 126})(images, return_tensors="pt")
    assert 0.1 < float((inputs["tissue_mask"] > 0).float().mean()) < 0.9
    model = random_encoder()
    expected = dense_with_background_ignored(model, inputs["pixel_values"], inputs["tissue_mask"])
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_a_mask_of_ones_changes_nothing(unequal):
    model, (pixels, _) = random_encoder(), unequal
    with_mask = model(pixels, tissue_mask=torch.ones(4, 8, 8)).last_hidden_state
    torch.testing.assert_close(with_mask, model(pixels).last_hidden_state, rtol=0, atol=0)


def test_dropped_patches_are_never_encoded(unequal):
    model, shapes, (pixels, tissue) = random_encoder(), [], unequal
    model.encoder.layer[0].mlp.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    output = model(pixels, tissue_mask=tissue, output_hidden_states=True)
    assert shapes == [(1, 4 * NUM_PREFIX_TOKENS + int((tissue > 0).sum()), 48)]  # packed: no padding either
    assert output.last_hidden_state.shape == (4, NUM_PREFIX_TOKENS + 64, 48)
    dropped = tissue.flatten(1) == 0
    assert len(output.hidden_states) == 1 + TINY_ENCODER["num_hidden_layers"]
    for states in (output.last_hidden_state, *output.hidden_states):
        assert states.shape == (4, NUM_PREFIX_TOKENS + 64, 48)
        assert (states[:, NUM_PREFIX_TOKENS:][dropped] == 0).all()
        assert (states[:, NUM_PREFIX_TOKENS:][~dropped] != 0).any(dim=1).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_are_what_the_next_block_sees(unequal, attention):
    """So that gradients reach them, as Grad-CAM needs; and asking for them changes nothing."""
    model, (pixels, tissue) = random_encoder(), unequal
    model.set_attn_implementation(attention)
    output = model(pixels, tissue_mask=tissue, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, model(pixels, tissue_mask=tissue).last_hidden_state)
    for states in output.hidden_states:
        states.retain_grad()
    output.pooler_output.sum().backward()
    for states in output.hidden_states[:-1]:
        assert states.grad[:, NUM_PREFIX_TOKENS:][tissue.flatten(1) > 0].abs().sum() > 0


def test_an_attention_mask_beside_a_tissue_mask_is_refused_by_name(unequal):
    pixels, tissue = unequal
    with pytest.raises(ValueError, match="attention_mask cannot be combined with tissue_mask"):
        random_encoder()(pixels, tissue_mask=tissue, attention_mask=torch.ones(4, NUM_PREFIX_TOKENS + 64))


def test_a_traced_graph_takes_another_mask(unequal):
    model, (pixels, tissue) = random_encoder().requires_grad_(False), unequal
    traced = torch.jit.trace(
        lambda *inputs: model(inputs[0], tissue_mask=inputs[1]).last_hidden_state, (pixels, tissue)
    )
    other = tissue.flip(1)
    expected = model(pixels, tissue_mask=other).last_hidden_state
    torch.testing.assert_close(traced(pixels, other), expected, rtol=0, atol=1e-5)


def test_tensors_without_values_keep_their_shapes():
    pixels, tissue = torch.randn(2, 1, 112, 112, device="meta"), torch.zeros(2, 8, 8, device="meta")
    output = random_encoder().to("meta")(pixels, tissue_mask=tissue).last_hidden_state
    assert output.shape == (2, NUM_PREFIX_TOKENS + 64, 48)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="hold no image"):
        random_encoder()(torch.randn(0, 1, 112, 112), tissue_mask=torch.zeros(0, 8, 8))


@pytest.mark.slow
def test_flex_attention_agrees_dense_and_packed_and_refuses_what_is_padded(unequal):
    pixels, tissue = unequal
    model = random_encoder(num_hidden_layers=1, drop_path_rate=0.1)
    for mask in (None, tissue):
        outputs = []
        for attention in ("sdpa", "flex_attention"):
            model.set_attn_implementation(attention)
            with torch.no_grad():
                outputs.append(model(pixels, tissue_mask=mask).last_hidden_state)
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="flex_attention takes no mask"):
        model.train()(pixels, tissue_mask=tissue)


def test_every_form_gives_the_same_gradients(unequal):
    pixels, tissue = unequal
    gradients = {}
    for form in ("packed", "padded", "dense"):
        model = random_encoder()
        model.set_attn_implementation("eager" if form == "padded" else "sdpa")
        if form == "dense":
            output = dense_with_background_ignored(model, pixels, tissue)
        else:
            output = model(pixels, tissue_mask=tissue).last_hidden_state
        output.square().sum().backward()
        gradients[form] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for packed, padded, dense in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(padded, dense, rtol=1e-4, atol=1e-4)


def test_stochastic_depth_sees_images_not_a_packed_row(unequal):
    model, shapes, (pixels, tissue) = random_encoder(drop_path_rate=0.5).train(), [], unequal
    model.encoder.layer[0].register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    output = model(pixels, tissue_mask=tissue).last_hidden_state
    assert shapes == [(4, NUM_PREFIX_TOKENS + 64, 48)]  # the all-breast image is the longest
    assert (output[2, NUM_PREFIX_TOKENS:] == 0).all()


def test_eager_attentions_cover_the_kept_tokens(unequal):
    model, (pixels, tissue) = random_encoder(), unequal
    model.set_attn_implementation("eager")
    row = slice(0, 1)
    attentions = model(pixels[row], tissue_mask=tissue[row], output_attentions=True).attentions
    length = NUM_PREFIX_TOKENS + int((tissue[row] > 0).sum())
    assert [tuple(each.shape) for each in attentions] == [(1, 4, length, length)] * 3
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(1, 4, length))


@pytest.mark.parametrize("form", ["padded", "masked"])
def test_forms_gather_and_scatter_back(form):
    dense = torch.randn(3, 2 + 6, 5)
    tissue = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 1.0], [0] * 6])
    selected = select_tokens(tissue, 0.0, 2, pack=False)
    assert isinstance(selected, PaddedTokens)
    selected = selected if form == "padded" else MaskedTokens(selected.keep)
    expected = dense * torch.nn.functional.pad(tissue, (2, 0), value=1)[..., None]
    torch.testing.assert_close(selected.scatter(selected.gather(dense)), expected, rtol=0, atol=0)


def test_a_backbone_drops_background_too(unequal):
    torch.manual_seed(0)
    backbone = MammoDinoBackbone(MammoDinoConfig(**TINY_ENCODER, out_indices=[2, 3])).eval()
    pixels, tissue = unequal
    maps = backbone(pixels, tissue_mask=tissue).feature_maps
    expected = dense_with_background_ignored(backbone, pixels, tissue)[:, NUM_PREFIX_TOKENS:]  # (B, N, D)
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-5)
    assert (maps[0].permute(0, 2, 3, 1)[tissue == 0] == 0).all()


def test_wrong_shapes_are_refused_with_the_remedy():
    model = random_encoder()
    with pytest.raises(ValueError, match="tissue_mask has 49 patches"):
        model(torch.randn(1, 1, 112, 112), tissue_mask=torch.ones(1, 7, 7))
    with pytest.raises(ValueError, match="tissue_mask is for 1 images, pixel_values for 2"):
        model(torch.randn(2, 1, 112, 112), tissue_mask=torch.ones(1, 8, 8))


def test_pooling_weighs_patches_by_tissue():
    states, tissue = torch.randn(2, 1 + 3 + 4, 5), torch.tensor([[[1.0, 0.5], [0, 0]], [[0.0, 0], [0, 0]]])
    pooled = pool_tokens(states, 3, tissue)
    torch.testing.assert_close(pooled[:, :5], states[:, 0])
    torch.testing.assert_close(pooled[0, 5:], (states[0, 4] + 0.5 * states[0, 5]) / 1.5)
    torch.testing.assert_close(pooled[1, 5:], states[1, 4:].mean(0))  # no tissue: the plain mean
    torch.testing.assert_close(pool_tokens(states, 3, tissue, 0.5)[0, 5:], states[0, 4])  # dropped: no weight


def test_a_classifier_ignores_what_was_dropped(unequal):
    torch.manual_seed(0)
    model = MammoDinoForImageClassification(MammoDinoConfig(**TINY_ENCODER, tissue_threshold=0.2)).eval()
    pixels, tissue = unequal
    background = (tissue <= 0.2).repeat_interleave(14, 1).repeat_interleave(14, 2)[:, None]  # (B, 1, H, W)
    noisy = torch.where(background, torch.randn_like(pixels) * 5, pixels)
    logits = model(pixels, tissue_mask=tissue).logits
    torch.testing.assert_close(model(noisy, tissue_mask=tissue).logits, logits, rtol=0, atol=1e-6)
