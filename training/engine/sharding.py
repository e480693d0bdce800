"""FSDP2: parameters, gradients and optimizer state spread over processes, for encoders that one device does not hold.

By torch's `fully_shard` on Accelerate's processes: Accelerate's own plugin turns into DDP on a CPU, where it could not
be tested. Student and teacher are sharded alike, so that the moving average stays local.
"""

import warnings

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .student_teacher import Network


def shard(networks: list[Network], device: torch.device) -> None:
    """Shards in place over all processes, block by block. Before the optimizer is made.

    Raises ValueError where there is one process only.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        raise ValueError("fsdp=True: there is one process; start several with torchrun or accelerate launch")
    # its networks return views of their logits; nothing here writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for network in networks:
        heads = [part for part in network.children() if part is not network.backbone]
        for part in (*network.backbone.encoder.layer, *heads):
            fully_shard(part, mesh=mesh)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)  # a root keeps its own whole until a backward
