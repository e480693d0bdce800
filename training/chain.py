"""Commands one after another, as a user would type them: what the demos are made of."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

# patients are hashed with a key; the phantoms have nothing to hide, so theirs is written here
KEY = "the key of simulated patients"


class Chain:
    """Runs commands, timed; stops with the command's own words where one fails."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.done: list[tuple[str, float]] = []

    def run(self, *arguments: str | Path | int, processes: int = 1) -> None:
        """Runs one command, or several processes of it side by side, which share its work."""
        command = [str(argument) for argument in arguments]
        line = shown(command) + (f"    # {processes} processes" if processes > 1 else "")
        print(f"\n$ {line}", flush=True)
        started = time.monotonic()
        environment = {**os.environ, "MAMMODINO_HASH_KEY": KEY, "TOKENIZERS_PARALLELISM": "false"}
        if processes > 1:  # each gets its share of the cores
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
        running = [subprocess.Popen(command, env=environment) for _ in range(processes)]
        if any([each.wait() for each in running]):  # all are waited for
            raise SystemExit(f"{self.name}: stopped at: {line}")
        self.done.append((line, time.monotonic() - started))


def shown(command: list[str]) -> str:
    """A command as a user would type it."""
    return shlex.join(["python" if part == sys.executable else part for part in command])
