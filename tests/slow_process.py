"""A pretraining run whose main process takes longer over a k-NN than collectives of the training wait for another."""

import time
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from accelerate.utils import InitProcessGroupKwargs

from training import pretrain
from training.pretraining.monitoring import KnnProbe

TIMEOUT_SECONDS, SLOW_SECONDS = 6, 9


def main(arguments: list[str]) -> None:
    auc, calls = KnnProbe.auc, []

    def slow(probe, encoder):
        calls.append(1)
        if dist.is_initialized() and probe.processes.is_main and len(calls) == 2:  # once is enough
            time.sleep(SLOW_SECONDS)
        return auc(probe, encoder)

    KnnProbe.auc = slow
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=TIMEOUT_SECONDS))
    pretrain.Accelerator = partial(pretrain.Accelerator, kwargs_handlers=[timeout])
    pretrain.main(arguments)
