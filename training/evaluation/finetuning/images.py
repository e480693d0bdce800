"""Training images of images: drawn in an order, and changed, by seed and count alone."""

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from modeling_mammodino import InvalidImageError
from training.evaluation.backbones.registry import Images
from training.settings import generator

FINETUNE_ORDER_STREAM, FINETUNE_AUGMENT_STREAM = 16, 17
MAX_TURN_DEGREES, MAX_SCALE, MAX_SHIFT_FRACTION = 10.0, 0.1, 0.05


class LabeledImages(Dataset):
    """Files with labels. An item is asked for by position, or by (position, draw) to be changed at random."""

    def __init__(
        self, images: Images, files: list[str], labels: np.ndarray, slices_per_volume: int, seed: int = 0
    ) -> None:
        self.images, self.files, self.labels = images, files, labels
        self.slices_per_volume, self.seed = slices_per_volume, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[list[dict[str, np.ndarray]], int]:
        """Its slices and its label. Raises InvalidImageError where the file, which was usable, no longer is."""
        position, draw = index if isinstance(index, tuple) else (index, None)
        try:
            slices = list(self.images(self.files[position], slices_per_volume=self.slices_per_volume))
        except OSError as error:
            raise InvalidImageError(self.files[position], f"cannot be read ({error.strerror})") from error
        if draw is not None:
            rng = generator(self.seed, FINETUNE_AUGMENT_STREAM, draw)
            slices = augment(rng, slices)
        return slices, int(self.labels[position])


class SeededSampler(Sampler):
    """An epoch of (position, draw), or of positions alone where nothing is drawn for augmentation.

    `weights` (n,), where given, are how likely each image is drawn, with replacement; else each comes once, shuffled.
    The order is a function of seed and epoch: a resumed run has that of the uninterrupted one.
    """

    def __init__(self, num_images: int, seed: int, augment: bool, weights: np.ndarray | None = None):
        self.num_images, self.seed, self.augment, self.weights, self.epoch = num_images, seed, augment, weights, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int | tuple[int, int]]:
        rng = generator(self.seed, FINETUNE_ORDER_STREAM, self.epoch)
        if self.weights is None:
            order = rng.permutation(self.num_images)
        else:
            order = rng.choice(self.num_images, self.num_images, p=self.weights / self.weights.sum())
        for count, position in enumerate(order.tolist()):
            yield (position, self.epoch * self.num_images + count) if self.augment else position


def collate_images(items: list[tuple[list[dict[str, np.ndarray]], int]]) -> dict[str, torch.Tensor]:
    """The slices of B images in one row: pixel_values (N, C, H, W), tissue_mask (N, h, w) where there is one,
    num_slices (B,) of each image, labels (B,)."""
    slices = [each for of_image, _ in items for each in of_image]
    batch = {name: torch.from_numpy(np.stack([each[name] for each in slices])) for name in slices[0]}
    batch["num_slices"] = torch.tensor([len(of_image) for of_image, _ in items])
    batch["labels"] = torch.tensor([label for _, label in items])
    return batch


def augment(rng: np.random.Generator, slices: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The slices of one image under one random flip left to right, turn, scale and shift; what comes in from outside
    has the least value of its image. A tissue mask goes along, on its own grid. Our choice, mild."""
    flip, turn, scale, *shift = rng.random(5)
    degrees, factor = MAX_TURN_DEGREES * (2 * turn - 1), 1 + MAX_SCALE * (2 * scale - 1)
    shift = MAX_SHIFT_FRACTION * (2 * np.array(shift) - 1)

    def change(plane: np.ndarray) -> np.ndarray:
        height, width = plane.shape
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, factor)
        matrix[:, 2] += shift * (width, height)
        if flip < 0.5:
            plane = plane[:, ::-1]
        return cv2.warpAffine(
            np.ascontiguousarray(plane), matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=float(plane.min())
        )

    changed = []
    for each in slices:
        planes = {"pixel_values": np.stack([change(plane) for plane in each["pixel_values"]])}
        if "tissue_mask" in each:
            planes["tissue_mask"] = change(each["tissue_mask"])
        changed.append(planes)
    return changed
