"""A fine-tuning run that notes what its processes write: `python -m tests.evaluation.recorded_writes NOTES ...`.

NOTES/{process}.txt has a line a file that was opened for writing, renamed or removed.
"""

import os
import sys
from pathlib import Path

import torch

from training.finetune import main


def record(notes: str, *arguments: str) -> None:
    seen: list[str] = []

    def hook(event: str, about: tuple) -> None:
        writes = event in ("os.rename", "os.remove", "shutil.rmtree")
        if event == "open":
            writes = bool((about[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes:
            seen.append(str(about[0]))

    torch.set_num_threads(1)
    sys.addaudithook(hook)
    main(list(arguments))
    Path(notes, f"{os.environ['RANK']}.txt").write_text("\n".join(seen))


if __name__ == "__main__":
    record(*sys.argv[1:])
