"""Background costs nothing: what is dropped is never encoded, and what is kept comes out as in a dense encoder."""

import pytest
import torch
import transformers.integrations.flash_attention as flash_attention
from made_inputs import TINY_ENCODER, draw_breast, random_encoder

from modeling_mammodino import (
    MammoDinoBackbone,
    MammoDinoConfig,
    MammoDinoForImageClassification,
    MammoDinoImageProcessor,
    MammoDinoModel,
    pool_tokens,
    tissue_tokens,
)
from modeling_mammodino.tissue_tokens import select_tokens

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
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # a call an image, one call of padded images
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


def attend_rows(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
    """Reference of `torch.nn.attention.varlen.varlen_attn` and flash_attn's `flash_attn_varlen_func`, by their
    documentation: states (T, H, d), starts (B + 1,) int32 on their device, int lengths. In float64."""
    assert query.shape == key.shape == value.shape and query.ndim == 3 and query.stride(-1) == 1
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and cu_seq_q.device == query.device
    bounds = cu_seq_q.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(query)
    lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    assert type(max_q) is int and max_q == max_k == max(lengths)
    outputs = []
    for q, k, v in zip(*(each.double().split(lengths) for each in (query, key, value)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs).to(query.dtype)


def encode_with_gradients(model: MammoDinoModel, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, and the gradients of all parameters in one vector."""
    model.zero_grad()
    output = model(inputs[0], tissue_mask=inputs[1]).last_hidden_state
    output.float().square().sum().backward()
    gradients = [each.grad.float().flatten() for each in model.parameters() if each.grad is not None]
    return output.detach().float(), torch.cat(gradients)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_attention_kernels_for_rows_are_called_once_a_block(unequal, attention, monkeypatch):
    """No GPU is needed, and none is tried: the kernels are replaced by the reference above."""
    model, calls, (pixels, tissue) = random_encoder(hidden_size=64).bfloat16(), [], unequal
    expected = encode_with_gradients(model, pixels, tissue)

    def varlen_attn(query, *rest):
        calls.append(query.shape)
        return attend_rows(query, *rest)

    def flash_attention_forward(query, key, value, attention_mask, softmax_scale, is_causal, cu_seq_lens_q,
                                cu_seq_lens_k, max_length_q, max_length_k, **options):  # fmt: skip
        assert attention_mask is None and not is_causal
        states = (each.flatten(0, 1) for each in (query, key, value))  # (1, T, H, d)
        starts = (cu_seq_lens_q, cu_seq_lens_k)
        calls.append(query[0].shape)
        return attend_rows(*states, *starts, max_length_q, max_length_k, scale=softmax_scale).unsqueeze(0)

    monkeypatch.setattr(tissue_tokens, "varlen_attn", varlen_attn)
    monkeypatch.setattr(tissue_tokens, "has_varlen_kernel", lambda device: True)
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_attention_forward)
    model.config._attn_implementation = attention  # set_attn_implementation asks for the package
    found = encode_with_gradients(model, pixels, tissue)
    num_tokens = 4 * NUM_PREFIX_TOKENS + int((tissue > 0).sum())
    assert calls == 3 * [(num_tokens, 4, 16)]
    for ours, loop in zip(found, expected, strict=True):
        assert (ours - loop).norm() < 0.01 * loop.norm()  # bfloat16
    with torch.no_grad():  # in float32 there are no such kernels
        model.float()(pixels, tissue_mask=tissue)
    assert len(calls) == (3 if attention == "sdpa" else 6)


def test_flash_attention_takes_padded_rows_with_their_mask(unequal, monkeypatch):
    """Of stochastic depth: a mask (B, T) of tokens, as transformers' own function unpads by it."""
    model, (pixels, tissue) = random_encoder(drop_path_rate=0.5).train(), unequal
    outputs = []

    def flash_attention_forward(query, key, value, attention_mask, softmax_scale, **options):
        assert attention_mask.dtype == torch.bool and attention_mask.shape == query.shape[:2]
        states = (each.transpose(1, 2) for each in (query, key, value))
        mask = attention_mask[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(*states, mask, scale=softmax_scale).transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_attention_forward)
    for attention in ("sdpa", "flash_attention_2"):
        model.config._attn_implementation = attention
        torch.manual_seed(0)
        outputs.append(model(pixels, tissue_mask=tissue).last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_elsewhere_padded_images_share_a_call_and_nothing_waits_for_the_device(unequal, monkeypatch):
    """The device is meta, which has no values: reading any raises. The mask stays on the CPU."""
    pixels, tissue = unequal
    model, calls = random_encoder().to("meta"), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def count(query, *arguments, **options):
        calls.append(tuple(query.shape))
        return attention(query, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    output = model(pixels.to("meta"), tissue_mask=tissue, output_hidden_states=True)
    assert output.last_hidden_state.shape == (4, NUM_PREFIX_TOKENS + 64, 48)
    assert calls == 3 * [(4, 4, NUM_PREFIX_TOKENS + 64, 12)]
    torch.manual_seed(0)
    classifier = MammoDinoForImageClassification(MammoDinoConfig(**TINY_ENCODER)).to("meta")
    classifier(pixels.to("meta"), tissue_mask=tissue, labels=torch.zeros(4, dtype=torch.int64, device="meta"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["blocks", "encoder"])
def test_compiled_blocks_see_packed_tokens_without_a_graph_a_length(unequal, what):
    torch._dynamo.reset()
    model, plain, graphs, counts = random_encoder(num_hidden_layers=1), random_encoder(num_hidden_layers=1), [], []

    def as_it_is(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    for module in [model.encoder] if what == "encoder" else model.encoder.layer:
        module.compile(backend=as_it_is, fullgraph=True)
    for shares in torch.rand(4, 4, 1, 1):
        inputs = {"pixel_values": unequal[0], "tissue_mask": (torch.rand(4, 8, 8) < shares).float()}
        with torch.no_grad():
            found, expected = (each(**inputs).last_hidden_state for each in (model, plain))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        counts.append(len(graphs))
    assert counts == [1, 2, 2, 2]  # one for the first length, one for all others
    states = [node.meta.get("example_value") for node in graphs[-1].graph.nodes if node.op == "placeholder"]
    assert any(each.ndim == 3 and each.shape[0] == 1 for each in states if isinstance(each, torch.Tensor))  # packed


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


@pytest.mark.parametrize("form", ["packed", "padded", "in place"])
def test_forms_gather_and_scatter_back(form):
    dense = torch.randn(3, 2 + 6, 5)
    tissue = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 1.0], [0] * 6])
    selected = select_tokens(tissue, 0.0, 2, pack=form == "packed")
    selected = selected.in_place() if form == "in place" else selected
    tokens = selected.gather(dense)
    assert tokens.shape == {"packed": (1, 12, 5), "padded": (3, 6, 5), "in place": (3, 8, 5)}[form]
    expected = dense * torch.nn.functional.pad(tissue, (2, 0), value=1)[..., None]
    torch.testing.assert_close(selected.scatter(tokens), expected, rtol=0, atol=0)


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
