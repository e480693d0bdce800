"""Two nodes under torchrun, of which one is killed and started again: the run goes on from its last checkpoint.

    sudo python -m tests.pretraining.test_nodes CORPUS OUTPUT

does the same in two network namespaces, which share nothing but a wire.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # where it is run as a script
import pretrain_runs  # noqa: E402
from pretrain_runs import CROPS, ROOT, TINY, log  # noqa: E402

STEPS, SAVED = 24, 4
OPTIONS = ["--max_steps", str(STEPS), "--save_steps", str(SAVED), "--drop_path_rate", "0"]
SECONDS = 300  # of patience


def start_node(node: int, port: int, *arguments: str, address: str = "127.0.0.1", host: str = "127.0.0.1",
               interface: str = "lo", prefix: tuple[str, ...] = ()) -> subprocess.Popen:  # fmt: skip
    """One torchrun of a node with one process; node 0 keeps the meeting place."""
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "run"),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", f"{host}:{port}", "--local_addr", address),
        *("--rdzv_conf", f"is_host={node == 0},keep_alive_interval=1", "--max_restarts", "3"),
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
    # torch 2.13: else a node that joins later waits for an address that the first has written in the first round only
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen([*prefix, *launcher, "-m", "training.pretrain", *arguments], cwd=ROOT, env=environment,
                            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)  # fmt: skip


def kill(node: subprocess.Popen) -> None:
    """Kill torchrun and its workers, which have sessions of their own, as the loss of their machine does."""
    found = [node.pid]
    for pid in found:
        found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    node.communicate()


def lose_a_node(start: Callable[[int], subprocess.Popen], output: Path) -> str:
    """Run on two nodes, kill the second after the first checkpoint and start it again; return what the first said."""
    nodes = [start(0), start(1)]
    try:
        give_up = time.monotonic() + SECONDS
        while not (output / f"checkpoint-{SAVED}").exists():
            assert time.monotonic() < give_up and nodes[0].poll() is None and nodes[1].poll() is None
            time.sleep(0.02)
        kill(nodes[1])
        assert nodes[0].poll() is None and not (output / "encoder").exists()  # in the middle of the run
        nodes[1] = start(1)
        said = [node.communicate(timeout=SECONDS)[1].decode() for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said[0][-3000:]
        return said[0]
    finally:
        for node in nodes:
            if node.poll() is None:
                kill(node)


def check(output: Path, said: str, corpus: Path, alone: Path) -> None:
    """It went on from a checkpoint, and every step has the loss of a run of one process that nothing happened to."""
    assert "going on from" in said
    pretrain_runs.main(arguments(corpus, alone, processes=1))
    assert [line["step"] for line in log(output)] == list(range(1, STEPS + 1))
    for found, expected in zip(log(output), log(alone), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3), found["step"]


def arguments(corpus: Path, output: Path, processes: int = 2) -> list[str]:
    batch = ["--per_device_train_batch_size", str(8 // processes)]
    return [CROPS, "--corpus", str(corpus), "--output_dir", str(output), *TINY, *OPTIONS, *batch]


@pytest.mark.slow
def test_a_run_on_two_nodes_survives_the_loss_of_one(phantom_corpus, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / "run"
    said = lose_a_node(lambda node: start_node(node, port, *arguments(phantom_corpus, output)), output)
    check(output, said, phantom_corpus, tmp_path / "alone")


def main() -> None:
    """The same where nodes reach each other by a wire alone: network namespaces, which need root."""
    corpus, output = map(Path, sys.argv[1:])
    ip = ["link add wire0 type veth peer name wire1"]
    for node in (0, 1):
        space = f"-n mammodino{node}"
        ip += [f"netns add mammodino{node}", f"link set wire{node} netns mammodino{node}"]
        ip += [f"{space} address add 10.77.0.{node + 1}/24 dev wire{node}"]
        ip += [f"{space} link set {each} up" for each in ("lo", f"wire{node}")]

    def start(node: int) -> subprocess.Popen:
        place = {"address": f"10.77.0.{node + 1}", "host": "10.77.0.1", "interface": f"wire{node}"}
        return start_node(
            node, 29500, *arguments(corpus, output / "run"), **place, prefix=("ip", "netns", "exec", f"mammodino{node}")
        )

    try:
        for words in ip:
            subprocess.run(["ip", *words.split()], check=True)
        said = lose_a_node(start, output / "run")
    finally:
        for node in (0, 1):
            subprocess.run(["ip", "netns", "delete", f"mammodino{node}"], check=False)
    check(output / "run", said, corpus, output / "alone")
    print(*(line for line in said.splitlines() if "going on" in line), sep="\n")


if __name__ == "__main__":
    main()
