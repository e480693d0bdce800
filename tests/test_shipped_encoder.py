"""The encoder in model_cards/mammodino-small: complete, small, opened by every way that a user has, and the commands'
default."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor, Dinov2WithRegistersModel

from modeling_mammodino import MammoDinoModel
from modeling_mammodino.tools.command import SHIPPED, shipped_model
from modeling_mammodino.tools.convert import convert, load_checkpoint
from modeling_mammodino.tools.model_files import check_folder

ALONE = """
import sys
sys.modules["modeling_mammodino"] = None
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
features = model(**processor(sys.argv[2], return_tensors="pt")).pooler_output
print(type(model).__module__, features.dtype, *features[0].tolist())
"""


@pytest.fixture(scope="module")
def weights() -> Path:
    assert shipped_model() is not None
    return SHIPPED / "model.safetensors"


@pytest.fixture(scope="module")
def mammogram(phantom_archive) -> Path:
    return sorted(phantom_archive.rglob("*_2d.dcm"))[0]


def test_the_folder_could_be_published():
    assert check_folder(SHIPPED) == []


def test_the_card_states_the_license_of_the_data():
    card = ModelCard.load(SHIPPED / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    for words in ("BCS-DBT", "CC BY-NC 4.0", "free for research", "Heath", "held out", "Research use only"):
        assert words.lower() in card.text.lower(), words


def test_weights_are_small_and_half_precision(weights):
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


@pytest.mark.slow
def test_auto_classes_open_it_with_the_package_and_without(weights, mammogram, tmp_path):
    model, processor = AutoModel.from_pretrained(SHIPPED).eval(), AutoProcessor.from_pretrained(SHIPPED)
    assert isinstance(model, MammoDinoModel) and next(model.parameters()).dtype == torch.float32
    with torch.inference_mode():
        expected = model(**processor(mammogram, return_tensors="pt")).pooler_output[0]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", ALONE, SHIPPED, mammogram]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    module, dtype, *features = done.stdout.split()
    assert module.startswith("transformers_modules.") and dtype == "torch.float32"
    torch.testing.assert_close(torch.tensor([float(each) for each in features]), expected, rtol=1e-4, atol=1e-4)


def test_plain_transformers_finds_all_its_weights_and_runs_it_once_positions_are_square(weights, tmp_path):
    model, found = Dinov2WithRegistersModel.from_pretrained(SHIPPED, output_loading_info=True)
    assert not any(found.values()) and next(model.parameters()).dtype == torch.float32
    convert(SHIPPED, tmp_path / "square", to="dinov2_with_registers", image_size=384)
    pixels = torch.randn(1, 1, 384, 384)
    with torch.inference_mode():
        ours = load_checkpoint(SHIPPED, image_size=384)(pixels).pooler_output
        theirs = Dinov2WithRegistersModel.from_pretrained(tmp_path / "square").eval()(pixels).pooler_output
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_commands_take_it_where_no_model_is_named(weights, mammogram, tmp_path, mammodino):
    mammodino("embed", mammogram, "--output", tmp_path / "features.parquet")
    table = parquet.read_table(tmp_path / "features.parquet")
    width = json.loads((SHIPPED / "config.json").read_text())["hidden_size"]
    assert len(table) == 1 and len(table["embedding"][0].as_py()) == width
    assert table.schema.metadata[b"model"] == SHIPPED.name.encode()  # not where the checkout lies
    mammodino("inspect", mammogram, "--output", tmp_path / "seen.png")
    assert (tmp_path / "seen.png").stat().st_size > 0


def test_without_it_a_command_asks_for_a_model(monkeypatch, mammodino, tmp_path, capsys):
    monkeypatch.setattr("modeling_mammodino.tools.command.SHIPPED", tmp_path)
    with pytest.raises(SystemExit):
        mammodino("embed", tmp_path, "--output", tmp_path / "features.parquet")
    assert "required: --model" in capsys.readouterr().err
