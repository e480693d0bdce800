"""Commands that other commands start: their words where they fail, and how they are shown."""

import sys

import pytest

from training.commands import run, shown


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    (tmp_path / "said.py").write_text(
        "import sys\nprint('out', *sys.argv[1:])\nprint('x', file=sys.stderr)\n"
        "raise SystemExit('out of luck' if sys.argv[1] == 'fail' else 0)\n"
    )
    return {"PYTHONPATH": str(tmp_path)}


def test_a_failed_command_is_named(environment, capfd):
    with pytest.raises(ValueError, match="^stopped at: python -m said fail$"):
        run("said", "fail", environment=environment)
    assert capfd.readouterr().out == "\n$ python -m said fail\nout fail\n"
    with pytest.raises(ValueError, match="^python -m said fail 3: out of luck$"):
        run("said", "fail", 3, environment=environment, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_several_processes_share_a_command(environment, capfd):
    line, seconds = run("said", "a b", environment=environment, processes=2)
    assert line == "python -m said 'a b'    # 2 processes" and seconds > 0
    assert capfd.readouterr().out.count("out a b\n") == 2


def test_a_command_is_shown_as_it_is_typed():
    assert shown([sys.executable, "-m", "x", "--name", "plain DINOv2"]) == "python -m x --name 'plain DINOv2'"
