"""Checkpoints that are missing, damaged, of another family, or more than tensors: one clear line, and no code run."""

import collections
import shutil
import sys
import typing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Dinov2Config

from training.evaluation.backbones import registry
from training.evaluation.backbones.registry import BACKBONES, load_backbone

from .reference_backbones import NATIVE, OWN_FILES, Touch


def refusal(kind: str, source: str | Path | None) -> str:
    with pytest.raises(ValueError) as caught:
        load_backbone(kind, source if source is None else str(source))
    message = str(caught.value)
    assert message.startswith(f"backbone {kind}") and len(message.splitlines()) == 1, message
    assert len(message) < 600
    return message


def test_what_is_no_kind_or_has_no_published_weights_is_said():
    with pytest.raises(ValueError, match="backbone vgg: must be one of mammodino, resnet50, "):
        load_backbone("vgg")
    for kind in ("mammodino", "mammo_clip_vit", "dbt_dino"):
        assert "give a source" in refusal(kind, None)
    assert "https://zenodo.org/records/17981813" in refusal("dbt_dino", None)
    assert all(family.license for family in BACKBONES.values())


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_checkpoint_of_the_wrong_family_is_one_line(folders, kind):
    alike = ({"mammodino", "untrained"}, {"dinov2", "rad_dino"}, {"mammo_clip_efficientnet", "mammo_fm"})
    for other, folder in folders.items():
        if other == kind or any({kind, other} <= each for each in alike):
            continue
        message = refusal(kind, folder)
        if other in NATIVE and kind not in OWN_FILES:
            assert "model_type=" in message
            assert f"open it as {'dinov2' if other == 'rad_dino' else other}" in message
        if other in OWN_FILES and kind in OWN_FILES:
            refusal(kind, folder / OWN_FILES[other])
        if other in OWN_FILES and kind not in OWN_FILES:
            assert "is a file" in refusal(kind, folder / OWN_FILES[other])


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_missing_or_damaged_checkpoint_is_one_line(folders, tmp_path, kind):
    assert "nowhere (no such folder or file here)" in refusal(kind, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refusal(kind, tmp_path / "empty")
    if kind == "untrained":  # it takes no weights
        return
    broken = shutil.copytree(folders[kind], tmp_path / "broken")
    weights = broken / OWN_FILES.get(kind, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    refusal(kind, broken)
    weights.write_bytes(b"")
    refusal(kind, broken)
    weights.unlink()
    refusal(kind, broken)


@pytest.mark.parametrize("kind", OWN_FILES)
def test_keys_that_do_not_fit_are_named(folders, tmp_path, kind):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    checkpoint = torch.load(folder / OWN_FILES[kind])
    wrapper = next((name for name in ("model", "teacher") if name in checkpoint), None)
    state = checkpoint[wrapper] if wrapper else checkpoint
    prefixes = ("image_encoder.", "backbone.", "visual.trunk.", "visual.")
    prefix = next(each for each in prefixes if any(name.startswith(each) for name in state))
    last = [name for name in state if name.startswith(prefix)][-1]
    for change, word in (("missing", "missing"), ("adapter", "unexpected"), ("shape", "of another shape")):
        spoiled = dict(state)
        if change == "missing":
            del spoiled[last]
        elif change == "adapter":
            spoiled[prefix + "adapter.down.weight"] = torch.zeros(2, 2)
        else:
            name = [each for each in spoiled if each.endswith("bias") and spoiled[each].ndim == 1][-1]
            name = name if name.startswith(prefix) else prefix + "norm.bias"
            spoiled[name] = torch.zeros(5)
        torch.save({wrapper: spoiled} if wrapper else spoiled, folder / OWN_FILES[kind])
        message = refusal(kind, folder)
        assert word in message and OWN_FILES[kind] in message, message


def test_a_native_checkpoint_without_a_layer_or_with_one_channel_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["dinov2"], tmp_path / "dinov2")
    state = load_file(folder / "model.safetensors")
    name = next(each for each in state if each.endswith("layernorm.weight"))
    save_file({key: value for key, value in state.items() if key != name}, folder / "model.safetensors")
    assert f"missing {name}" in refusal("dinov2", folder)
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 70, "patch_size": 14}
    AutoModel.from_config(Dinov2Config(**small, num_channels=1)).save_pretrained(tmp_path / "gray")
    assert "takes 1 channels" in refusal("dinov2", tmp_path / "gray")


def test_several_files_are_a_question(folders, tmp_path):
    folder = shutil.copytree(folders["mammo_clip_efficientnet"], tmp_path / "several")
    shutil.copy(folder / "model-best.tar", folder / "b2-model-best-epoch-10.tar")
    assert "2 files *.tar" in refusal("mammo_clip_efficientnet", folder)
    by_path = load_backbone("mammo_clip_efficientnet", str(folder / "model-best.tar"))
    assert by_path.preprocess.settings()["image_processor"]["size"] == {"height": 72, "width": 72}


# files with more than tensors


@pytest.mark.parametrize("kind", OWN_FILES)
def test_code_in_a_file_is_refused_and_not_run(folders, tmp_path, kind):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    checkpoint = torch.load(folder / OWN_FILES[kind])
    checkpoint["config"] = Touch(tmp_path / "ran")
    torch.save(checkpoint, folder / OWN_FILES[kind])
    message = refusal(kind, folder)
    assert "more than tensors" in message and "python -c" in message and "open" in message
    torch.save(checkpoint, folder / OWN_FILES[kind], _use_new_zipfile_serialization=False)
    assert "none of its code was run" in refusal(kind, folder)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_native_checkpoint_is_refused_and_not_run(folders, tmp_path):
    folder = shutil.copytree(folders["resnet50"], tmp_path / "resnet")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, "config": Touch(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "none of their code was run" in refusal("resnet50", folder)
    assert not (tmp_path / "ran").exists()


def test_a_torchscript_program_is_named(folders, tmp_path):
    program = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    program.save(str(tmp_path / "ViT-B-16.pt"))
    assert "TorchScript" in refusal("mammo_clip_vit", tmp_path / "ViT-B-16.pt")


def test_a_configuration_of_omegaconf_is_skipped(folders, tmp_path):
    """As training with hydra leaves it in a file: lists stay omegaconf's objects, of which we have no package."""
    names = ("omegaconf", "omegaconf.base", "omegaconf.listconfig", "omegaconf.nodes")
    assert not any(name in sys.modules for name in names)
    modules = {name: ModuleType(name) for name in names}

    def make(module: str, name: str):
        kind = type(name, (), {"__module__": module})
        setattr(modules[module], name, kind)
        return kind()

    node, sequence = make("omegaconf.nodes", "AnyNode"), make("omegaconf.listconfig", "ListConfig")
    metadata = make("omegaconf.base", "ContainerMetadata")
    metadata.__dict__.update(ref_type=typing.Any, object_type=list, resolver_cache=collections.defaultdict(dict))
    node.__dict__.update(_val=0.8, _parent=sequence)
    sequence.__dict__.update(_content=[node], _metadata=metadata)
    folder = shutil.copytree(folders["mammo_clip_efficientnet"], tmp_path / "hydra")
    checkpoint = torch.load(folder / "model-best.tar")
    checkpoint |= {"config": {"scale": sequence}, "train_loss": np.float64(0.5)}
    sys.modules.update(modules)
    try:
        torch.save(checkpoint, folder / "model-best.tar")
    finally:
        for name in names:
            del sys.modules[name]
    with pytest.raises(Exception, match="omegaconf"):
        torch.load(folder / "model-best.tar")
    found = load_backbone("mammo_clip_efficientnet", str(folder))
    expected = load_backbone("mammo_clip_efficientnet", str(folders["mammo_clip_efficientnet"]))
    assert found.settings() == expected.settings()


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
              RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]
)  # fmt: skip
def test_what_runs_out_of_memory_is_not_called_a_damaged_checkpoint(monkeypatch, error):
    def run_out(*rest):
        raise error

    monkeypatch.setattr(registry, "_untrained", run_out)
    with pytest.raises(type(error)) as found:
        load_backbone("untrained")
    assert found.value is error
