"""A `python` for programs that call many: processes forked from one that has imported the libraries.

Importing them takes longer than what a notebook's command does. What is ours is imported by each process, and so is
matplotlib, which asks the environment for its backend.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = [
    *("accelerate", "cv2", "datasets", "pandas", "pydicom", "scipy.fft", "sklearn.linear_model", "torch"),
    *("transformers.image_processing_utils", "transformers.modeling_utils", "transformers.trainer"),
]
# of the standard library alone: a few milliseconds
CALL = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({place!r})
    asked = json.dumps([{before} + sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [asked], [0, 1, 2])
    sys.exit(*(server.recv(1) or [1]))
"""


@contextlib.contextmanager
def forked_python(folder: Path, environment: dict[str, str] | None = None) -> Iterator[None]:
    """Put into a folder `python`, and `mammodino` as it is installed, for use while this lasts.

    Libraries are imported in that environment, for some read it then.
    """
    place, installed = str(folder / "socket"), str(Path(sys.executable).with_name("mammodino"))
    for name, before in (("python", []), ("mammodino", [installed])):
        (folder / name).write_text(CALL.format(python=sys.executable, place=place, before=before))
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen()
        command = [sys.executable, __file__, str(server.fileno())]
        process = subprocess.Popen(command, pass_fds=[server.fileno()], env=environment)
    yield
    process.kill()
    process.wait()


def main() -> None:
    """Start what is asked for, one after the other; a child leaves the loop."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # what children share, none collects, which would copy it
    server = socket.socket(fileno=int(sys.argv[1]))
    while True:
        connection, _ = server.accept()
        asked, streams, *_ = socket.recv_fds(connection, 2**20, 3)
        if not (child := os.fork()):
            break
        connection.send(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256]))
        for each in (connection, *map(os.fdopen, streams)):
            each.close()
    (first, *arguments), folder, environment = json.loads(asked)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if first == "-m":
        sys.argv, sys.path[0] = arguments, folder
        runpy._run_module_as_main(arguments[0])  # what -m calls; spawned workers find the module as that of the command
    else:
        sys.argv, sys.path[0] = [first, *arguments], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
