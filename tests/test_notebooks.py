"""The notebooks of docs/ run as they are, in a folder of the test's, and are kept without outputs."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_python import forked_python

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Iterator[Path]:
    """A folder with `python` and `mammodino`."""
    folder = tmp_path_factory.mktemp("commands")
    with forked_python(folder):
        yield folder


def run_notebook(path: Path, folder: Path, commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a notebook with `folder` in place of its runs/. Raises nbclient's error with the cell that failed."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    notebook = nbformat.reads(path.read_text().replace("runs/", f"{folder}/"), as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(path, tmp_path, commands, monkeypatch):
    run_notebook(path, tmp_path, commands, monkeypatch)
    if path.stem == "pretrain_small":
        documented = (ROOT / "docs" / "log.md").read_text()
        line = json.loads((tmp_path / "notebook_pretrained/logs/log.jsonl").read_text().splitlines()[-1])
        assert {name for name in line if f"`{name}`" not in documented} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_says_first_what_one_needs(path):
    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert "**What you need:**" in "".join(cells[0]["source"])
