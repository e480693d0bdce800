"""A small model folder, complete and fit to be published, and a copy of it to spoil: fixtures."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
        "num_register_tokens": 1}  # fmt: skip
CARD = """---
license: apache-2.0
---
# An encoder
Research use only: not a medical device. Made with ViT-B/14 and/or [others](https://example.org/a/b).

![losses](losses.png)
"""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MammoDinoModel(MammoDinoConfig(**TINY)).save_pretrained(folder)
    MammoDinoImageProcessor(size={"height": 64, "width": 48}, patch_size=16).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "losses.png").write_bytes(encode(figure()))
    (folder / "recipe.yaml").write_text("hidden_size: 16\ncrop_scale: [0.1, 1.0]\nteacher_targets: sinkhorn_knopp\n")
    return folder


@pytest.fixture
def model_copy(model_folder, tmp_path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "copy")


def figure(height: int = 40, width: int = 60) -> Image.Image:
    """A red line on white."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[height // 2, :, 1:] = 0
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()
