"""Weights in and out of folders: equal to transformers' own classes, whole folders, and nothing left random."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dinov2_checkpoints import (
    MEAN,
    PATCH,
    SIDE,
    SIZES,
    STD,
    TINY,
    assert_equal_features,
    inputs,
    randomize,
    reference_state,
    save_source,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, Dinov2Config, Dinov2WithRegistersConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2ForImageClassification, Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)

from modeling_mammodino import MammoDinoConfig, MammoDinoForImageClassification, MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.convert import convert, load_checkpoint, load_encoder, write_native


def folder_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("swiglu", [False, True])
def test_rgb_dinov2_gives_the_same_features_for_a_gray_image(tmp_path, swiglu):
    native = save_source(tmp_path, Dinov2Model, Dinov2Config(**TINY, use_swiglu_ffn=swiglu))
    model = load_encoder(tmp_path, interpolation="transformers")
    assert model.config.num_channels == 1 and model.config.num_register_tokens == 0
    for size in SIZES:
        rgb, gray = inputs(*size)
        assert_equal_features(model, native, gray, rgb, atol=1e-5)
    masked = torch.rand(2, 25) < 0.5
    rgb, gray = inputs(SIDE, SIDE)
    with torch.no_grad():
        a, b = (net(x, bool_masked_pos=masked)[0] for net, x in ((model, gray), (native, rgb)))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_rgb_register_variant_gives_the_same_features_for_a_gray_image(tmp_path):
    native = save_source(tmp_path, Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**TINY, num_register_tokens=3))
    model = load_encoder(tmp_path)
    assert (model.config.interpolate_antialias, model.config.interpolate_offset) == (True, 0.0)
    for size in SIZES:
        rgb, gray = inputs(*size)
        assert_equal_features(model, native, gray, rgb, atol=1e-5)


@pytest.mark.parametrize(
    "settings,full",
    [
        ({"rescale_factor": 2 / 255}, 2.0),
        ({"do_rescale": False}, 255.0),
        ({"do_normalize": False}, None),
        ({"image_mean": [0.53] * 3, "image_std": [0.26] * 3}, 1.0),
        ({"image_mean": 0.53, "image_std": 0.26}, 1.0),
    ],
)
def test_the_fold_is_exact_for_any_normalization(tmp_path, settings, full):
    config = Dinov2WithRegistersConfig(**TINY, num_register_tokens=1)
    native = save_source(tmp_path, Dinov2WithRegistersModel, config, **settings)
    mean, std = (settings.get("image_mean", MEAN), settings.get("image_std", STD)) if full else ([0.0] * 3, [1.0] * 3)
    rgb, gray = inputs(SIDE, SIDE, mean if isinstance(mean, (list, tuple)) else [mean] * 3,
                       std if isinstance(std, (list, tuple)) else [std] * 3, full or 1.0)  # fmt: skip
    scale = 100 if full == 255.0 else 1  # raw pixels over std are large numbers: compare to relative precision
    assert_equal_features(load_encoder(tmp_path), native, gray, rgb, atol=2e-5 * scale)


def test_a_source_that_does_not_say_its_normalization_is_taken_for_imagenet_aloud(tmp_path, caplog):
    native = save_source(tmp_path, Dinov2Model, Dinov2Config(**TINY))
    (tmp_path / "preprocessor_config.json").unlink()
    model = load_encoder(tmp_path)
    assert "ImageNet" in caplog.text and str(tmp_path) in caplog.text
    rgb, gray = inputs(SIDE, SIDE)
    assert_equal_features(model, native, gray, rgb, atol=1e-5)


def test_normalization_that_does_not_fit_is_refused(tmp_path):
    save_source(tmp_path, Dinov2Model, Dinov2Config(**TINY), mean=[0.1, 0.2], std=[1, 2])
    with pytest.raises(ValueError, match=r"image_mean=\(0.1, 0.2\).*num_channels=3"):
        load_encoder(tmp_path)


def test_the_pixels_of_another_image_processor_can_be_asked_for(tmp_path):
    native = save_source(tmp_path, Dinov2Model, Dinov2Config(**TINY))
    model = load_encoder(tmp_path, image_processor=MammoDinoImageProcessor(image_mean=[0.1], image_std=[0.7]))
    rgb, gray = inputs(SIDE, SIDE)
    assert_equal_features(model, native, ((gray * 0.25 + 0.5) - 0.1) / 0.7, rgb, atol=1e-5)


def test_interpolation_is_the_references_unless_asked(tmp_path):
    native = save_source(tmp_path, Dinov2Model, Dinov2Config(**TINY))
    reference, theirs = load_encoder(tmp_path), load_encoder(tmp_path, interpolation="transformers")
    assert (reference.config.interpolate_antialias, reference.config.interpolate_offset) == (False, 0.1)
    rgb, gray = inputs(112, 112)
    with torch.no_grad():
        a, b, c = reference(gray)[0], theirs(gray)[0], native(rgb)[0]
    torch.testing.assert_close(b, c, rtol=0, atol=1e-5)
    assert (a - c).abs().max() > 1e-3  # the two rules do differ
    with pytest.raises(ValueError, match="interpolation='nearest'"):
        load_encoder(tmp_path, interpolation="nearest")


@pytest.mark.parametrize("image_size", [112, [42, 98]])
def test_position_embeddings_can_be_stored_at_another_size(tmp_path, image_size):
    torch.save(reference_state(), tmp_path / "dinov2.pth")
    model, stored = (load_encoder(tmp_path / "dinov2.pth", image_size=size) for size in (None, image_size))
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert stored.config.image_size == image_size
    assert stored.embeddings.position_embeddings.shape[1] == 1 + height // PATCH * (width // PATCH)
    _, gray = inputs(height, width)
    assert_equal_features(stored, model, gray, gray, atol=1e-6)
    for wrong in (100, [70, 70, 70], 0):
        with pytest.raises(ValueError, match="image_size="):
            load_encoder(tmp_path / "dinov2.pth", image_size=wrong)


SOURCES = {
    "dinov2": (Dinov2Model, Dinov2Config(**TINY)),
    "dinov2_classifier": (Dinov2ForImageClassification, Dinov2Config(**TINY, num_labels=3)),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**TINY)),
    "registers_classifier": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig(**TINY, id2label={0: "benign", 1: "cancer"}, label2id={"benign": 0, "cancer": 1}),
    ),
    "gray": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**TINY, num_channels=1)),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("to", ["mammodino", "dinov2_with_registers"])
def test_a_folder_in_is_a_folder_out(tmp_path, name, to):
    kind, config = SOURCES[name]
    mean, std = (MEAN, STD) if config.num_channels == 3 else ([0.4], [0.2])
    native = save_source(tmp_path / "in", kind, config, mean, std)
    out = convert(tmp_path / "in", tmp_path / "out", to, interpolation="transformers")
    settings = json.loads((out / "config.json").read_text())
    assert settings["model_type"] == to and "Research use only" in (out / "README.md").read_text()
    assert str(tmp_path) not in "".join((out / each).read_text() for each in folder_files(out) if "safe" not in each)
    if to == "dinov2_with_registers":
        assert folder_files(out) == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
        assert "auto_map" not in settings and "auto_map" not in (out / "preprocessor_config.json").read_text()
    else:
        assert {"modeling_mammodino.py", "rendering.py", "image_processing_mammodino.py"} <= folder_files(out)
    loader = AutoModelForImageClassification if "classifier" in name else AutoModel
    model, report = loader.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    if "classifier" in name:
        assert model.config.id2label == config.id2label
    processor = MammoDinoImageProcessor.from_pretrained(out)
    assert dict(processor.size) == {"height": SIDE, "width": SIDE} and processor.patch_size == PATCH
    for size in SIZES if "dinov2" not in name else SIZES[:1]:
        rgb, gray = inputs(*size, mean, std)
        assert_equal_features(model.eval(), native, gray, rgb, atol=1e-5)


def test_ours_goes_out_and_comes_back_bit_by_bit(tmp_path):
    model = randomize(MammoDinoForImageClassification(MammoDinoConfig(**TINY, num_labels=3)))
    model.save_pretrained(tmp_path / "ours")
    MammoDinoImageProcessor(image_mean=[0.3], size={"height": 140, "width": 70}, do_clahe=False).save_pretrained(
        tmp_path / "ours"
    )
    convert(tmp_path / "ours", tmp_path / "native", "dinov2_with_registers")
    convert(tmp_path / "native", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    first, last = (MammoDinoImageProcessor.from_pretrained(tmp_path / name) for name in ("ours", "back"))
    assert first.to_dict() | {"auto_map": None} == last.to_dict() | {"auto_map": None}
    native = AutoModelForImageClassification.from_pretrained(tmp_path / "native").eval()
    assert type(native) is Dinov2WithRegistersForImageClassification
    for size in SIZES:
        _, gray = inputs(*size)
        assert_equal_features(model, native, gray, gray)


@pytest.mark.slow
def test_plain_transformers_opens_the_native_folder_without_this_package(tmp_path):
    model = randomize(MammoDinoModel(MammoDinoConfig(**TINY)))
    write_native(model, tmp_path / "native")
    torch.manual_seed(0)
    pixels = torch.randn(1, 1, 84, 70)
    torch.save(pixels, tmp_path / "pixels.pt")
    program = f"""
import sys, torch
from transformers import AutoModel
model, report = AutoModel.from_pretrained({str(tmp_path / "native")!r}, output_loading_info=True)
assert not any(report.values()), report
assert type(model).__name__ == "Dinov2WithRegistersModel" and "modeling_mammodino" not in sys.modules
torch.save(model.eval()(torch.load("pixels.pt")).last_hidden_state, "features.pt")
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), expected, rtol=0, atol=1e-5)


def test_a_native_folder_says_where_it_differs_and_what_it_cannot_hold(tmp_path, caplog):
    save_source(tmp_path / "in", Dinov2Model, Dinov2Config(**TINY))
    convert(tmp_path / "in", tmp_path / "out", "dinov2_with_registers", image_size=112)
    assert caplog.text.count("differ at other sizes") == 1 and "112 x 112" in caplog.text
    model, native = load_encoder(tmp_path / "in"), AutoModel.from_pretrained(tmp_path / "out").eval()
    _, gray = inputs(112, 112)
    assert_equal_features(model, native, gray, gray)
    with pytest.raises(ValueError, match="--image_size 98"):
        convert(tmp_path / "in", tmp_path / "tall", "dinov2_with_registers", image_size=[98, 42])
    assert folder_files(tmp_path) == {"in", "out"}


def test_color_can_be_kept(tmp_path):
    native = save_source(tmp_path / "in", Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**TINY))
    convert(tmp_path / "in", tmp_path / "out", "dinov2_with_registers", num_channels=3)
    rgb, _ = inputs(98, 70)
    assert_equal_features(AutoModel.from_pretrained(tmp_path / "out").eval(), native, rgb, rgb, atol=0)
    before, after = (json.loads((tmp_path / x / "preprocessor_config.json").read_text()) for x in ("in", "out"))
    assert before == after
    with pytest.raises(ValueError, match="num_channels=2.*choose 1 or 3"):
        load_checkpoint(tmp_path / "in", num_channels=2)


def test_a_head_is_left_out_of_an_encoder_aloud(tmp_path, caplog):
    save_source(tmp_path, Dinov2ForImageClassification, Dinov2Config(**TINY, num_labels=5))
    encoder = load_encoder(tmp_path)
    assert type(encoder) is MammoDinoModel and "classifier is left out" in caplog.text
    assert encoder.config.num_labels == MammoDinoConfig().num_labels


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda state: state.pop("layernorm.weight"), "missing: layernorm.weight"),
        (lambda state: state.update(surplus=torch.zeros(2)), "unexpected: surplus"),
        (lambda state: state.update({"layernorm.bias": torch.zeros(2)}), "of another shape: .*layernorm.bias"),
        (lambda state: state.pop("embeddings.register_tokens"), "missing: embeddings.register_tokens"),
        (lambda state: state.pop("embeddings.mask_token"), "missing: embeddings.mask_token"),
    ],
)
def test_a_folder_whose_weights_do_not_fit_is_refused_by_its_keys(tmp_path, change, message):
    save_source(tmp_path / "in", Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**TINY))
    edit_weights(tmp_path / "in", change)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "in", tmp_path / "out")
    assert folder_files(tmp_path) == {"in"}


def test_plain_dinov2_without_a_mask_token_starts_from_zero_aloud(tmp_path, caplog):
    save_source(tmp_path, Dinov2Model, Dinov2Config(**TINY, use_mask_token=False))
    assert not load_encoder(tmp_path).embeddings.mask_token.any() and "mask_token" in caplog.text


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="model_type='vit'.*dinov2, dinov2_with_registers, mammodino"):
        load_encoder(tmp_path)


def test_the_command(mammodino, tmp_path, capsys):
    torch.save(reference_state(2), tmp_path / "dinov2.pth")
    (tmp_path / "out").mkdir()  # an empty folder is free
    mammodino("convert", tmp_path / "dinov2.pth", tmp_path / "out", "--image_size", "98", "42")
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert AutoModel.from_pretrained(tmp_path / "out").config.image_size == [98, 42]
    assert dict(MammoDinoImageProcessor.from_pretrained(tmp_path / "out").size) == {"height": 98, "width": 42}
    with pytest.raises(SystemExit, match="mammodino convert: .*out: exists"):
        mammodino("convert", tmp_path / "dinov2.pth", tmp_path / "out")
    for source in ("nowhere.pth", str(tmp_path / "nowhere")):
        with pytest.raises(SystemExit, match="mammodino convert: .*nowhere"):
            mammodino("convert", source, tmp_path / "other")
    assert not (tmp_path / "other").exists()
