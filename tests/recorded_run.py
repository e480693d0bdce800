"""A pretraining run that writes down what each of its processes saw, given FOLDER RECIPE ...

FOLDER/{process}.pt is a list with one entry a forward: sample indices, crop boxes, masks and losses of that process.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from training import pretrain


def main(arguments: list[str]) -> None:
    folder, *arguments = arguments
    compute_losses, recorded = pretrain.compute_losses, []

    def record(batch, *rest, **options):
        result = compute_losses(batch, *rest, **options)
        seen = {key: batch[key].clone() for key in ("index", "row", "boxes", "masks", "slice_tissue", "global_crops")}
        recorded.append(seen | {"losses": {name: float(value.detach()) for name, value in result[0].items()}})
        return result

    pretrain.compute_losses = record
    end_training = pretrain.Accelerator.end_training

    def save_and_end(accelerator):
        process = dist.get_rank() if dist.is_initialized() else 0
        torch.save(recorded, Path(folder) / f"{process}.pt")
        end_training(accelerator)

    pretrain.Accelerator.end_training = save_and_end
    pretrain.main(arguments)
