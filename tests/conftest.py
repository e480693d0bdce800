"""Shared fixtures: images of made-up breasts, a small phantom corpus, and where real files lie, if they do."""

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hub_server import hub, hub_server  # noqa: F401 (fixtures)
from model_folder import model_copy, model_folder  # noqa: F401 (fixtures)

from modeling_mammodino import MammoDinoConfig, MammoDinoModel

REAL_DATA = Path(os.environ.get("MAMMODINO_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


HASH_KEY = "a key of the tests, long enough"


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def hash_key():
    os.environ["MAMMODINO_HASH_KEY"] = HASH_KEY


@pytest.fixture(scope="session")
def real_slices() -> list[Path]:
    """Real DBT slices, which are not part of the project."""
    found = sorted((REAL_DATA / "bcs_dbt" / "slices").glob("*.jpg"))
    if not found:
        pytest.skip("the real DBT slices (shared/data/bcs_dbt) are not here")
    return found


def draw_breast(height: int = 300, width: int = 200, seed: int = 0, side: str = "left") -> np.ndarray:
    """A half-ellipse of textured tissue on air, (height, width) uint16 of 12 bits."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    breast = ((y - height / 2) / (0.42 * height)) ** 2 + (x / (0.7 * width)) ** 2 < 1
    texture = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), 4)
    image = np.where(breast, 1800 + 4000 * texture, 20 + 5 * rng.normal(size=(height, width)))
    image = np.clip(image, 0, 4095).astype(np.uint16)
    return image if side == "left" else np.ascontiguousarray(image[:, ::-1])


TINY_ENCODER = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 112,
    "num_register_tokens": 3,
    "layerscale_value": 1.0,
}


def random_encoder(**changes) -> MammoDinoModel:
    torch.manual_seed(0)
    model = MammoDinoModel(MammoDinoConfig(**{**TINY_ENCODER, **changes})).eval()
    for parameter in model.parameters():  # tokens and biases away from their zero initial values
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def mammodino() -> Callable[..., None]:
    """The command line in this process; arguments may be paths."""
    from modeling_mammodino.tools.cli import main

    return lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def breast() -> np.ndarray:
    return draw_breast()


@pytest.fixture(scope="session")
def phantom_archive(tmp_path_factory) -> Path:
    """Twelve simulated patients as DICOM, a DBT volume and a mammogram each."""
    from dataset_scripts.phantom.archive import PhantomParameters, write_archive

    folder = tmp_path_factory.mktemp("phantom")
    parameters = PhantomParameters(num_slices=6, height_px=128, width_px=96, pixel_spacing_mm=1.4, slice_spacing_mm=6.0)
    write_archive(folder, 12, seed=3, parameters=parameters)
    return folder


@pytest.fixture(scope="session")
def phantom_corpus(phantom_archive, tmp_path_factory) -> Path:
    from dataset_scripts.corpus.build import build_corpus
    from modeling_mammodino import MammoDinoImageProcessor

    folder = tmp_path_factory.mktemp("built") / "corpus"
    build_corpus([phantom_archive], folder, (128, 96), MammoDinoImageProcessor(), "phantom", tasks=1)
    return folder
