"""The original `.pth`: equal to the published layout, in each of its forms, and nothing but tensors is read."""

import os
import pickle
import sys

import pytest
import torch
from dinov2_checkpoints import (
    PATCH,
    SIDE,
    SIZES,
    TINY,
    WIDTH,
    assert_equal_features,
    inputs,
    reference_forward,
    reference_state,
    save_source,
)
from transformers import AutoModel, Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from modeling_mammodino.tools.convert import convert, load_encoder


@pytest.mark.parametrize("registers,swiglu_hidden", [(0, 0), (3, 0), (0, 344), (0, 512)])
def test_an_original_checkpoint_gives_what_the_published_code_gives(tmp_path, registers, swiglu_hidden):
    state = reference_state(registers, swiglu_hidden)
    torch.save(state, tmp_path / "dinov2.pth")
    model = load_encoder(tmp_path / "dinov2.pth")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (WIDTH, 2, 2)
    assert (config.patch_size, config.image_size, config.num_register_tokens) == (PATCH, SIDE, registers)
    assert config.use_swiglu_ffn == bool(swiglu_hidden)
    offset, antialias = (0.0, True) if registers else (0.1, False)
    assert (config.interpolate_offset, config.interpolate_antialias) == (offset, antialias)
    for size in SIZES:
        rgb, gray = inputs(*size)
        expected = reference_forward(state, rgb, offset, antialias)
        with torch.no_grad():
            torch.testing.assert_close(model(gray).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["mammodino", "dinov2_with_registers"])
def test_an_original_checkpoint_becomes_either_folder(tmp_path, to):
    torch.save(reference_state(registers=2), tmp_path / "dinov2.pth")
    convert(tmp_path / "dinov2.pth", tmp_path / "out", to)
    model, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()) and model.config.model_type == to
    for size in SIZES:
        _, gray = inputs(*size)
        assert_equal_features(model.eval(), load_encoder(tmp_path / "dinov2.pth"), gray, gray)


def chunked(state):
    return {
        name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): v for name, v in state.items()
    }


def as_teacher(state):
    heads = {"dino_head.mlp.0.weight": torch.zeros(3), "ibot_head.last_layer.weight": torch.zeros(3)}
    return {"teacher": {f"backbone.{name}": value for name, value in state.items()} | heads}


def as_training(state):
    other = reference_state(seed=9)
    both = {f"teacher.backbone.{name}": value for name, value in state.items()}
    both |= {f"student.backbone.{name}": value for name, value in other.items()} | {"dino_loss.center": torch.zeros(1)}
    return {"model": both, "iteration": 7}


@pytest.mark.parametrize("wrap", [chunked, as_teacher, as_training])
def test_every_form_of_an_original_checkpoint_is_the_same_model(tmp_path, wrap):
    state = reference_state()
    torch.save(state, tmp_path / "plain.pth")
    torch.save(wrap(state), tmp_path / "wrapped.pth")
    plain, wrapped = (load_encoder(tmp_path / name).state_dict() for name in ("plain.pth", "wrapped.pth"))
    assert plain.keys() == wrapped.keys() and all(torch.equal(plain[key], wrapped[key]) for key in plain)


def changed(**changes):
    state = reference_state() | changes
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    "state,message",
    [
        (changed(**{"blocks.1.mlp.fc2.bias": None}), r"missing encoder.layer.1.mlp.fc2.bias; unexpected none"),
        (changed(rope_embed=torch.zeros(3)), r"missing none; unexpected rope_embed"),
        (changed(**{"blocks.0.ls1.gamma": torch.zeros(7)}), r"lambda1 \(7,\), not \(128,\)"),
        (changed(**{"blocks.0.attn.qkv.bias": None}), "unexpected encoder.layer.1.attention.attention.key.bias"),
        (changed(**{"patch_embed.proj.weight": None}), "no patch_embed.proj.weight"),
        (changed(pos_embed=torch.zeros(1, 1 + 12, WIDTH)), "a square grid"),
        (changed(pos_embed=None), "a square grid"),
        (changed(**{"blocks.0.mlp.fc2.weight": torch.zeros(WIDTH, 200)}), "200 hidden features"),
        (changed(epoch=3), "not tensors: epoch"),
        (
            {"teacher": {"backbone.norm.bias": torch.zeros(3), "optimizer.x": torch.zeros(3)}},
            "unknown keys: optimizer.x",
        ),
        ([1, 2], "holds a list"),
    ],
)
def test_what_is_not_a_whole_dinov2_is_refused_by_its_keys(tmp_path, state, message):
    path = tmp_path / "odd.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match=message) as refusal:
        load_encoder(path)
    assert str(path) in str(refusal.value)


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


MARK = "/nonexistent"


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, save, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MARK", str(tmp_path / "owned"))
    save({"cls_token": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth: refused.*none of its code was run"):
        load_encoder(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_a_malicious_folder_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MARK", str(tmp_path / "owned"))
    save_source(tmp_path, Dinov2Model, Dinov2Config(**TINY))
    (tmp_path / "model.safetensors").unlink()
    torch.save({"layernorm.weight": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="none of their code was run"):
        load_encoder(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "half.pth").write_bytes(b"half")
    with pytest.raises(ValueError, match="half.pth: refused"):
        load_encoder(tmp_path / "half.pth")
