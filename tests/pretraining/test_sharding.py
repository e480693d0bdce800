"""What two processes gather of sharded weights, counted where torch sends it; and that sharding changes no result."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pretrain_runs import start_processes, tiny, tiny_batch
from torch.utils._python_dispatch import TorchDispatchMode

from training.pretrain import compute_losses, weighted_sum
from training.pretraining.losses.targets import TeacherTargets
from training.pretraining.networks import Network, make_teacher, shard
from training.pretraining.recipe import load_recipe

NUM_PROCESSES = 2
# of an encoder's weights in a step: by the first of the student's three forwards and by the last two of its backwards,
# for the first one finds them there; by both forwards of the teacher
GATHERS = 1 + 2 + 2


class Gathers(TorchDispatchMode):
    """Counts bytes of what collectives gather, by its type."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d" and "allgather_base" in operator.name():
            gathered = args[0]
            self.num_bytes[gathered.dtype] = self.num_bytes.get(gathered.dtype, 0) + gathered.nbytes
        return operator(*args, **(kwargs or {}))


def layer_norm_of_cuda(inputs, shape, weight=None, bias=None, eps=1e-5, real=torch.nn.functional.layer_norm):
    """As autocast does it on CUDA, in float32 (torch.amp, "ops that autocast to float32")."""
    return real(inputs.float(), shape, weight.float(), bias.float(), eps)


def work(process: int, folder: str, corpus: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=process, world_size=NUM_PROCESSES)
    torch.nn.functional.layer_norm = layer_norm_of_cuda
    recipe, found = tiny("--fsdp", "true", "--drop_path_rate", "0", "--koleo_weight", "0"), {}
    batch, device = tiny_batch(Path(corpus)), torch.device("cpu")  # the same in both
    for gathered in (torch.float32, torch.bfloat16):
        for is_sharded in (False, True):
            torch.manual_seed(0)
            student = Network(recipe)
            teacher, targets = make_teacher(student), TeacherTargets(recipe)
            if is_sharded:
                shard([student, teacher], device, gathered)
            with Gathers() as gathers:
                with torch.autocast("cpu", torch.bfloat16, enabled=gathered == torch.bfloat16):
                    losses, _ = compute_losses(batch, student, teacher, targets, 0.07, recipe)
                weighted_sum(losses, recipe).backward()
            gradients = {name: each.grad for name, each in student.named_parameters()}
            if is_sharded:
                gradients = {name: each.full_tensor() for name, each in gradients.items()}
            found[gathered, is_sharded] = {"losses": losses, "gradients": gradients, "bytes": gathers.num_bytes}
    torch.save(found, f"{folder}/{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(phantom_corpus, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sharding")
    start_processes(work, NUM_PROCESSES, str(folder), str(phantom_corpus))
    return torch.load(folder / "0.pt", weights_only=False)


def sizes(network: Network) -> dict[str, int]:
    """Parameters of blocks and heads, and of the rest, which is gathered in float32."""
    found = {"blocks": 0, "heads": 0, "rest": 0}
    for name, parameter in network.named_parameters():
        part = "blocks" if ".encoder.layer." in name else "heads" if name.startswith("head.") else "rest"
        found[part] += parameter.numel()
    return found


@pytest.mark.slow
def test_bf16_halves_what_is_gathered(found):
    """Heads run once, so are gathered once by either network; the rest by each forward and by the backward."""
    part = sizes(Network(tiny()))
    numel = GATHERS * part["blocks"] + 2 * part["heads"]
    full, half = found[torch.float32, True]["bytes"], found[torch.bfloat16, True]["bytes"]
    assert half.keys() == {torch.float32, torch.bfloat16} and half[torch.bfloat16] == 2 * numel
    assert full == {torch.float32: 4 * numel + half[torch.float32]}
    assert 1 <= half[torch.float32] / (3 * 4 * part["rest"]) < 1.1  # with what pads odd shapes


def test_what_a_step_of_vit_l_gathers():
    """The figures of docs/cluster.md, by the formula that is counted above."""
    large = ["--hidden_size", "1024", "--num_hidden_layers", "24", "--num_attention_heads", "16"]
    with torch.device("meta"):
        part = sizes(Network(load_recipe(["paper", "--corpus", "c", "--output_dir", "o", *large])))
    assert GATHERS * 2 * part["blocks"] / 1e9 == pytest.approx(3.0, abs=0.05)
    assert part["heads"] + part["rest"] < 0.1 * part["blocks"]


@pytest.mark.slow
@pytest.mark.parametrize(("gathered", "tolerance"), [(torch.float32, 0), (torch.bfloat16, 1e-3)])
def test_sharded_weights_give_the_losses_and_gradients_of_whole_ones(found, gathered, tolerance):
    """In bfloat16 the weights are rounded a moment earlier than by autocast, norms and layer scales too."""
    whole, sharded = found[gathered, False], found[gathered, True]
    assert whole["losses"].keys() == sharded["losses"].keys()
    for name, loss in whole["losses"].items():
        assert sharded["losses"][name].item() == pytest.approx(loss.item(), rel=tolerance), name
    for name, gradient in whole["gradients"].items():
        if "key.bias" not in name:  # attention does not depend on it: its gradient is rounding
            off = (sharded["gradients"][name] - gradient).norm() / gradient.norm()
            assert off <= 20 * tolerance, name
