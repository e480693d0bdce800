"""Shared fixtures: images of made-up breasts, a small phantom corpus."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import hub, hub_server  # noqa: F401 (fixtures)
from made_inputs import HASH_KEY, REAL_DATA, draw_breast
from model_folder import model_copy, model_folder  # noqa: F401 (fixtures)


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    torch.set_num_threads(1)


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
