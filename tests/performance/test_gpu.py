"""performance.gpu, where there is no GPU: it starts, says what is wrong, and goes on; its figures are left to a GPU."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from performance import gpu
from performance.gpu import SIZES, Section, Setup, run_apart

ROOT = Path(__file__).parents[2]


def link_with_needs(names: set[str], folder: Path) -> None:
    """Link distributions and, recursively, what they require into a folder that is a Python path of its own."""
    done: set[str] = set()
    asked = {canonicalize_name(name) for name in names}
    while asked:
        name = asked.pop()
        done.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        needs = map(Requirement, found.requires or ())
        asked |= {canonicalize_name(need.name) for need in needs if not need.marker or need.marker.evaluate()} - done
        for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))


@pytest.mark.slow
def test_the_script_passes_every_check_on_a_cpu_with_the_packages_of_its_header_alone(tmp_path):
    (named,) = re.findall(r"pip install ([^`]+)`", gpu.__doc__)
    packages = tmp_path / "site-packages"  # the name by which dill knows what is installed
    packages.mkdir()
    link_with_needs({*named.split(), "torch", "transformers"}, packages)
    assert (packages / "torch").is_dir() and not (packages / "datatrove").exists()
    done = subprocess.run(  # -S: without the environment's own packages
        [sys.executable, "-S", "-m", "performance.gpu", "--device", "cpu", "--size", "tiny", "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "gpu.json").is_file(), done.stderr[-2000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: each["status"] for name, each in report["sections"].items() if each["status"] != "passed"} == {}
    assert done.returncode == 0 and report["correct"] is True, done.stderr[-2000:]

    sections, compared = report["sections"], ("encoder", "packed", "losses float32", "losses bf16", "compiled")
    assert {name for name, each in sections.items() if each["check"]} == {
        "machine", "corpus", "losses_cpu", *compared}  # fmt: skip
    assert all(sections[name]["checks"] for name in compared)
    assert sections["losses float32"]["losses"] == sections["losses_cpu"]["losses"]  # here the same machine
    assert len(sections["losses_cpu"]["losses"]) == 5 and sections["losses bf16"]["checks"][1]["found"] > 0
    (row,) = sections["pretrain small"]["rows"]
    assert row["batch"] == 8 and row["flops_per_image"] > 0 and 0 < row["mfu"]["matmul"] < 1
    assert row["images_per_second"]["standing"] > 0 and 0 <= row["data_wait_fraction"] <= 1
    assert [(row["px"], row["batch"]) for row in sections["encode tiny14"]["rows"]] == [(112, 1), (112, 2)]
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("| within |") == sum(len(each.get("checks", ())) for each in sections.values())
    assert "| small, study_small | 8 |" in table and "| tiny14 | 112 | 2 |" in table


def fails(setup, done):
    raise ValueError("as a section may")


def hangs(setup, done):
    time.sleep(600)


def dies(setup, done):
    os._exit(3)


def is_wrong(setup, done):
    return {"checks": [gpu.check("a number that is none", float("nan"), 1.0)]}


@pytest.mark.slow
def test_a_section_that_fails_hangs_dies_or_is_wrong_is_reported_and_no_check_is_passed(tmp_path):
    setup = Setup("cpu", SIZES["tiny"], tmp_path, "fork")
    found = {each.__name__: run_apart(Section(each, 60), setup, {}, limit=60) for each in (fails, dies, is_wrong)}
    found["hangs"] = run_apart(Section(hangs, 60), setup, {}, limit=1)
    found["late"] = run_apart(Section(fails, 60), setup, {}, limit=0)
    assert {name: each["status"] for name, each in found.items()} == {
        "fails": "failed",
        "dies": "died with exit code 3",
        "is_wrong": "failed",
        "hangs": "stopped after its 1 s",
        "late": "no time left",
    }
    assert "ValueError: as a section may" in found["fails"]["traceback"]
    assert found["hangs"]["seconds"] < 30
    report = {"date": "2026-01-01", "size": "tiny", "seconds": 1.0, "sections": found}
    table = gpu.as_markdown(report)
    assert "| fails |  |  | failed: ValueError: as a section may |" in table and "| OVER |" in table
