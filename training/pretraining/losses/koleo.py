"""KoLeo regulariser (Sablayrolles et al. 2019): spreads the features of a batch."""

import torch

from .distributed import gather_rows, num_processes, process_index, sum_over_processes


def koleo_loss(features: torch.Tensor, groups: torch.Tensor | None = None, epsilon: float = 1e-8) -> torch.Tensor:
    """-mean log distance to the nearest neighbor, features L2-normalized.

    features (B, D), class tokens of one crop before the head; every process holds as many. groups (B,): images of one
    group, such as slices of one volume, are near-duplicates and never count as neighbors, for KoLeo would push apart
    what the adjacent-slice loss pulls together. An image without any neighbor left does not count. Returns a scalar
    float32, whose mean over processes is the loss of all images: neighbors are sought in all processes (DINOv2: in
    one), so that the loss is that of the batch, however many processes share it.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = torch.nn.functional.normalize(features.float(), eps=epsilon, dim=-1)
        candidates = gather_rows(features)  # (processes * B, D)
        places = torch.arange(len(candidates), device=features.device)
        own_places = places[: len(features)] + process_index() * len(features)
        same = own_places[:, None] == places[None, :]  # (B, processes * B)
        if groups is not None:
            same = same | (groups[:, None] == gather_rows(groups)[None, :])
        with torch.no_grad():
            nearest = (features @ candidates.T).masked_fill(same, -torch.inf).argmax(dim=1)
        has_neighbor = (~same.all(dim=1)).float()  # (B,)
        distances = torch.nn.functional.pairwise_distance(features, candidates[nearest], p=2, eps=epsilon)
        total = -(torch.log(distances + epsilon) * has_neighbor).sum()
        return total * num_processes() / sum_over_processes(has_neighbor.sum()).clamp_min(1)
