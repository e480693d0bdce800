"""The command line: what every subcommand shares."""

import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modeling_mammodino import __version__
from modeling_mammodino.tools.command import command_line, show_progress, user_model
from training.evaluation.run_settings import DetectionSettings

COMMANDS = ("inspect", "contact_sheet", "embed", "convert", "push")


def test_it_has_the_packages_version(mammodino, capsys):
    with pytest.raises(SystemExit):
        mammodino("--version")
    assert capsys.readouterr().out == f"mammodino {__version__}\n"


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=str)
def test_help_says_research_use_only_once(mammodino, command, capsys):
    with pytest.raises(SystemExit) as stop:
        mammodino(*command, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and text.lower().count("research use only") == 1


def test_the_commands_are_these(mammodino, capsys):
    with pytest.raises(SystemExit):
        mammodino("--help")
    text = capsys.readouterr().out
    assert all(f"\n    {command}" in text for command in (*COMMANDS, "env"))


def test_env_prints_versions_and_devices_and_nothing_of_the_user(mammodino, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    mammodino("env")
    text = capsys.readouterr().out
    lines = dict(line.split(": ", 1) for line in text.splitlines())
    assert lines["mammodino"].startswith(__version__) and lines["torch"] == torch.__version__ and lines["GPU"]
    for private in ("hf_secret", "/", str(Path.home()), str(Path.cwd()), platform.node()):
        assert private not in text


@pytest.mark.slow
def test_an_error_is_one_line_and_status_1(mammodino, tmp_path):
    missing = str(tmp_path / "gone.dcm")
    arguments = [
        sys.executable,
        "-m",
        "modeling_mammodino.tools.cli",
        "inspect",
        missing,
        "--output",
        str(tmp_path / "a.png"),
    ]
    ended = subprocess.run(arguments, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("mammodino inspect: ") and missing in ended.stderr and ended.stderr.count("\n") == 1
    for output in ("image.jpg", "image"):
        with pytest.raises(SystemExit, match="mammodino inspect: .*png"):
            mammodino("inspect", missing, "--output", tmp_path / output)
    assert not list(tmp_path.iterdir())


def test_a_list_of_faults_keeps_its_lines_and_any_other_message_is_one(capsys):
    for raised, shown in (
        (ValueError("cannot\nbe   read"), "program: cannot be read"),
        (FileExistsError("refused.\n  a: bad\n  b: worse"), "program: refused.\n  a: bad\n  b: worse"),
    ):
        with pytest.raises(SystemExit) as stop, command_line("program"):
            raise raised
        assert stop.value.code == shown
    with pytest.raises(KeyError), command_line("program"):
        raise KeyError("a fault of ours")
    with pytest.raises(SystemExit) as stop, command_line("program"):
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err == "\nprogram: stopped\n"


def test_a_misspelled_option_is_named_with_the_one_that_may_be_meant(mammodino, capsys):
    for given in (["x.dcm", "--outptu", "a.parquet"], ["x.dcm", "--output", "a.parquet", "--outptu=b"]):
        with pytest.raises(SystemExit) as stop:
            mammodino("embed", *given)
        assert stop.value.code == 2
        assert "mammodino embed: error: unknown option --outptu; did you mean '--output'?" in capsys.readouterr().err


def test_all_commands_share_the_parser():
    folders = ("modeling_mammodino", "training", "dataset_scripts")
    files = [file for folder in folders for file in (Path(__file__).parents[2] / folder).rglob("*.py")]
    plain = [file.name for file in files if re.search(r"(?<!Hf)ArgumentParser\((?!\)|add_help)", file.read_text())]
    assert len(files) > 100 and plain == []


def test_of_a_run_the_encoder_is_meant(tmp_path):
    encoder = tmp_path / "run" / "encoder"
    encoder.mkdir(parents=True)
    assert user_model(str(tmp_path / "run")) == str(tmp_path / "run")
    (encoder / "config.json").touch()
    assert user_model(str(tmp_path / "run")) == user_model(str(encoder)) == str(encoder)
    settings = DetectionSettings(labels="a.csv", encoder=str(tmp_path / "run"), output_dir="out")
    assert settings.encoder == str(encoder)


def test_a_bar_in_a_log_file_is_drawn_once_a_minute(capsys):
    for _ in show_progress(range(3)):
        time.sleep(0.15)
    assert capsys.readouterr().err.count("\r") <= 2  # the beginning and the end; on a terminal one a step
