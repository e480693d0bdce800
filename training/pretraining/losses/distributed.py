"""Sums and gathers over the processes of a run, so that no loss depends on how samples are spread over them.

One rule holds for every loss: the mean over processes of what each returns is the loss of the whole batch, as
DistributedDataParallel averages gradients. Every process must call these in the same order; one process alone sees its
own value.
"""

import torch
import torch.distributed as dist


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if num_processes() > 1 else 0


@torch.no_grad()
def sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The sum of every process' `value`, of its shape; without gradient."""
    return _all_reduce(value, dist.ReduceOp.SUM)


@torch.no_grad()
def max_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The largest of every process' `value`, of its shape; without gradient."""
    return _all_reduce(value, dist.ReduceOp.MAX)


@torch.no_grad()
def from_first_process(value: torch.Tensor) -> torch.Tensor:
    """Return the first process' `value`, of its shape, such as random numbers that all must share."""
    if num_processes() > 1:
        dist.broadcast(value, src=0)
    return value


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Every process' rows (n, ...), n the same for all, in their order: (processes * n, ...).

    Gradients flow back to the process that a row came from, summed over all that used it.
    """
    return _GatherRows.apply(rows) if num_processes() > 1 else rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(context, rows: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(rows) for _ in range(num_processes())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(gradient).chunk(num_processes())[process_index()]


def _all_reduce(value: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if num_processes() > 1:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value, operation)
    return value
