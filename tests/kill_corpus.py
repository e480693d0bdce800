"""A build that is killed again and again: does it end with the rows of one that was left alone?

    python -m tests.kill_corpus --kills 20 --seed 0

Each time the command is killed with SIGKILL at a random moment of its course, alone or with all its worker processes,
and started again. What it leaves is then compared with an undisturbed corpus byte by byte.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dataset_scripts.corpus import shards
from dataset_scripts.corpus.reader import MANIFEST
from dataset_scripts.phantom.archive import PhantomParameters, write_archive

CHECKOUT = Path(__file__).parents[1]


def command(archive: Path, output: Path) -> list[str]:
    options = ["--height", "128", "--width", "96", "--rows_per_shard", "20", "--tasks", "8", "--num_proc", "2"]
    return [sys.executable, "-m", "dataset_scripts.corpus", str(archive), "--output", str(output), *options]


def start(archive: Path, output: Path) -> subprocess.Popen:
    environment = {"MAMMODINO_HASH_KEY": "a key of the tests, long enough", **os.environ}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(archive, output), cwd=CHECKOUT, env=environment, start_new_session=True, **quiet)


def stop_after_two_shards(monkeypatch) -> list[int]:
    """Break a build in this process off, once, when it has made two shards; return the list of those that are made."""
    render, made, stops = shards.render_shard, [], [True]

    def render_or_stop(job, shard, noted):
        if stops and len(made) == 2:
            stops.clear()
            raise KeyboardInterrupt
        made.append(shard)
        render(job, shard, noted)

    monkeypatch.setattr(shards, "render_shard", render_or_stop)
    return made


def kill_repeatedly(archive: Path, output: Path, kills: int, seed: int, seconds: float) -> list[str]:
    """Where each kill, at a moment up to `seconds` after a start, found the build; it is then let go to its end.

    A build that was complete before the last kill is begun anew.
    """
    rng, found = np.random.default_rng(seed), []
    while len(found) < kills:
        if (output / MANIFEST).exists():
            shutil.rmtree(output)
            shutil.rmtree(private(output))
        process = start(archive, output)
        time.sleep(rng.uniform(0, seconds))
        if rng.random() < 0.5:
            process.kill()  # its workers are to end with it
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        found.append(state_of(output))
    finish(archive, output)
    return found


def finish(archive: Path, output: Path) -> None:
    process = start(archive, output)
    _, said = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"the build does not go on: {said.decode()[-2000:]}")


def private(output: Path) -> Path:
    return Path(f"{output}.private")


def state_of(output: Path) -> str:
    headers, shards = (len(list(private(output).glob(pattern))) for pattern in ("headers/*.jsonl", "shards/*.json"))
    is_complete = (output / MANIFEST).exists()
    return f"{headers} parts of headers, {shards} shards" + (", complete" if is_complete else "")


def digests(folder: Path) -> dict[str, str]:
    """Of all files of a folder, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kill_corpus", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive, undisturbed, killed = (Path(folder, name) for name in ("archive", "undisturbed", "killed"))
        parameters = PhantomParameters(6, 128, 96, pixel_spacing_mm=1.4, slice_spacing_mm=6.0)
        write_archive(archive, options.patients, seed=options.seed, parameters=parameters)
        began = time.perf_counter()
        finish(archive, undisturbed)
        seconds = time.perf_counter() - began
        found = kill_repeatedly(archive, killed, options.kills, options.seed, seconds)
        print(f"an undisturbed build takes {seconds:.1f} s; killed {len(found)} times, with", *found, sep="\n  ")
        is_same = digests(killed) == digests(undisturbed)
        print(f"{len(digests(undisturbed))} files:", "identical" if is_same else "NOT identical")
        raise SystemExit(not is_same)


if __name__ == "__main__":
    main()
