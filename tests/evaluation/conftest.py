"""Fixtures of the evaluation's tests: small checkpoints of every backbone, and a drawn table to learn from."""

from pathlib import Path

import pytest
from one_thread import one_thread  # noqa: F401 (a fixture, used by every test here)

from training.evaluation.backbones.small_checkpoints import write_small_checkpoints

from .small_runs import draw_table


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A small checkpoint of every kind."""
    return write_small_checkpoints(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def drawn_table(tmp_path_factory) -> Path:
    """A table of drawn mammograms with a finding that can be learned."""
    return draw_table(tmp_path_factory.mktemp("drawn"))
