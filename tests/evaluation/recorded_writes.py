"""A fine-tuning run that notes what its processes write, given NOTES and its arguments.

NOTES/{process}.txt has a line a file that was opened for writing, renamed or removed.
"""

import os
import sys
from pathlib import Path

from training import finetune


def main(arguments: list[str]) -> None:
    notes, *arguments = arguments
    seen: list[str] = []

    def hook(event: str, about: tuple) -> None:
        writes = event in ("os.rename", "os.remove", "shutil.rmtree")
        if event == "open":
            writes = bool((about[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes:
            seen.append(str(about[0]))

    sys.addaudithook(hook)
    finetune.main(arguments)
    Path(notes, f"{os.environ['RANK']}.txt").write_text("\n".join(seen))
