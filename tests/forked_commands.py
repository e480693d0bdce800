"""`python -m` in a process forked from one that has imported the modules: imports take longer than what is tried.

Run as a script, this is the process that they are forked from.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


class ForkedCommands:
    """They have the environment given here, which imports read, too; what imports say goes to `said`."""

    def __init__(self, modules: list[str], environment: dict[str, str], said: Path):
        with said.open("wb") as stream:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", "tests.forked_commands", *modules],
                cwd=CHECKOUT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )

    def run(self, command: list[str], changes: dict[str, str], output: Path) -> int:
        """The exit status; stdout and stderr go to `output`."""
        print(json.dumps([command, changes, str(output)]), file=self._parent.stdin, flush=True)
        return int(self._parent.stdout.readline())

    def close(self) -> None:
        self._parent.communicate()


def main(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    while line := sys.stdin.readline():
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            return run(*json.loads(line))


def run(command: list[str], changes: dict[str, str], output: str) -> None:
    module, *arguments = command
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    os.environ.update(changes)
    sys.argv[1:] = arguments
    sys.modules.pop(module, None)  # it runs anew, as __main__
    runpy._run_module_as_main(module)  # what -m calls; workers find the module as that of the command


if __name__ == "__main__":
    main(sys.argv[1:])
