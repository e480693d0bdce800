"""Commands that other commands start, as a user would type them: parts of the demos, a release and the study."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

# patients are hashed with a key; phantoms have nothing to hide, so theirs is written here
PHANTOM_KEY = {"MAMMODINO_HASH_KEY": "the key of simulated patients"}


def run(
    module: str,
    *arguments: str | Path | int,
    environment: Mapping[str, str] = PHANTOM_KEY,
    processes: int = 1,
    quiet: bool = False,
) -> tuple[str, float]:
    """Run `python -m MODULE ARGUMENTS`, or several processes of it side by side that share its work and the cores.

    environment: variables to set beside those of this process. quiet: print nothing.

    Return the command's line and its seconds. Raises ValueError naming the line, and where it is quiet its last words.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    line = shown(command) + (f"    # {processes} processes" if processes > 1 else "")
    if not quiet:
        print(f"\n$ {line}", flush=True)
    started = time.monotonic()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment}
    if processes > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    pipe = subprocess.PIPE if quiet else None
    running = [
        subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(processes)
    ]
    said = [each.communicate() for each in running]  # all are waited for
    if any(each.returncode for each in running):
        printed, complained = said[0]
        raise ValueError(
            f"{line}: {(complained or printed).strip().splitlines()[-1]}" if quiet else f"stopped at: {line}"
        )
    return line, time.monotonic() - started


def shown(command: list[str]) -> str:
    """Return a command as a user would type it."""
    return shlex.join(["python" if part == sys.executable else part for part in command])
