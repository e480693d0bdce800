"""KoLeo regulariser (Sablayrolles et al. 2019): spreads the features of a batch."""

import torch


def koleo_loss(features: torch.Tensor, groups: torch.Tensor | None = None, epsilon: float = 1e-8) -> torch.Tensor:
    """-mean log distance to the nearest neighbour, features L2-normalised.

    features (B, D), class tokens of one crop before the head. groups (B,): images of one group, such as slices of one
    volume, are near-duplicates and never count as neighbours, for KoLeo would push apart what the adjacent-slice loss
    pulls together. An image without any neighbour left does not count. Returns a scalar float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = torch.nn.functional.normalize(features.float(), eps=epsilon, dim=-1)
        same = torch.eye(len(features), dtype=torch.bool, device=features.device)
        if groups is not None:
            same = same | (groups[:, None] == groups[None, :])
        with torch.no_grad():
            similarity = (features @ features.T).masked_fill(same, -torch.inf)
            nearest = similarity.argmax(dim=1)
        has_neighbour = ~same.all(dim=1)
        if not has_neighbour.any():
            return features.sum() * 0.0
        distances = torch.nn.functional.pairwise_distance(features, features[nearest], p=2, eps=epsilon)
        return -torch.log(distances[has_neighbour] + epsilon).mean()
