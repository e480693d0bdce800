"""One training sample: everything that student and teacher see of one image, a pure function of (seed, index)."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from ..recipe import ViewsRecipe
from .crops import Crop, TissueTable, cut, tissue_aware_crop
from .masks import block_mask, maskable_patches, stratified_mask_ratios
from .slices import sample_neighbour

NUM_GLOBAL_CROPS = 2
# streams of the counter-based generator, so that order, masks and views never share numbers
VIEWS_STREAM, ORDER_STREAM, MASK_STREAM = 0, 1, 2


def generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    """numpy's Philox keyed by (seed, stream, counter): the same numbers in any process, worker or run."""
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 56) + counter]))


@dataclass(frozen=True)
class Picture:
    """One row of a corpus, decoded: picture (H, W) uint8 or uint16, and the table of its breast mask."""

    pixels: np.ndarray
    tissue: TissueTable


class PretrainingViews(torch.utils.data.Dataset):
    """Views by global sample index. `index // global_batch_size` is the step; an epoch is a permutation of the
    volumes (a 2D image is a volume of one slice), and each visit draws one slice, so that near-duplicates do not fill
    a batch.

    corpus: a `dataset_scripts.corpus_reader.Corpus`. global_batch_size: images a step over all processes; it fixes how
    mask ratios are stratified, so the number of processes does not matter. slice_pairs: whether to draw neighbours.
    """

    def __init__(
        self,
        corpus,
        recipe: ViewsRecipe,
        patch_size: int,
        seed: int,
        global_batch_size: int,
        slice_pairs: bool = True,
    ):
        self.corpus, self.recipe, self.patch_size, self.with_slice_pairs = corpus, recipe, patch_size, slice_pairs
        self.seed, self.global_batch_size = seed, global_batch_size
        processor = corpus.image_processor
        self.mean, self.std = map(np.float32, processor.mean_and_std)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def picture(self, row: int) -> Picture:
        pixels, tissue = self.corpus.picture(row)
        return Picture(pixels, TissueTable(tissue, pixels.shape))

    def standardize(self, pixels: np.ndarray) -> np.ndarray:
        return (pixels - self.mean) / self.std

    def volume_of(self, index: int) -> int:
        epoch, place = divmod(index, self.corpus.num_volumes)
        if self._order[0] != epoch:
            self._order = (epoch, generator(self.seed, ORDER_STREAM, epoch).permutation(self.corpus.num_volumes))
        return int(self._order[1][place])

    def mask_ratios(self, index: int) -> np.ndarray:
        """Mask ratio of each global crop of this sample, stratified over the whole step."""
        step, place = divmod(index, self.global_batch_size)
        recipe = self.recipe
        ratios = stratified_mask_ratios(
            generator(self.seed, MASK_STREAM, step),
            NUM_GLOBAL_CROPS * self.global_batch_size,
            recipe.mask_probability,
            (recipe.mask_ratio[0], recipe.mask_ratio[1]),
        )
        return ratios.reshape(self.global_batch_size, NUM_GLOBAL_CROPS)[place]

    def __getitem__(self, index: int) -> dict[str, Any]:
        recipe, rng = self.recipe, generator(self.seed, VIEWS_STREAM, index)
        volume = self.volume_of(index)
        rows = self.corpus.rows_of(volume)
        position = int(rng.integers(len(rows)))
        picture = self.picture(rows[position])

        globals_ = [self.view(rng, picture, number) for number in range(NUM_GLOBAL_CROPS)]
        locals_ = [self.view(rng, picture, NUM_GLOBAL_CROPS) for _ in range(recipe.num_local_crops)]
        masks = [
            block_mask(rng, ratio, maskable_patches(view["tissue"], recipe.tissue_aware_masks))
            for view, ratio in zip(globals_, self.mask_ratios(index), strict=True)
        ]
        return {
            "index": index,
            "row": rows[position],
            "volume": volume,
            "global_crops": np.stack([view["pixels"] for view in globals_])[:, None],  # (G, 1, H, W)
            "global_tissue": np.stack([view["tissue"] for view in globals_]),  # (G, h, w)
            **self.gram_views(picture, globals_),
            "local_crops": stack([view["pixels"] for view in locals_], recipe.local_crop_size)[:, None],
            "local_tissue": stack([view["tissue"] for view in locals_], recipe.local_crop_size // self.patch_size),
            "masks": np.stack(masks),  # (G, h, w)
            "crop_tissue": np.array([view["crop"].tissue_fraction for view in globals_ + locals_], np.float32),
            "crops_below_minimum": sum(not view["crop"].fits for view in globals_ + locals_),
            "boxes": np.stack([view["crop"].box for view in globals_ + locals_]),
            "slice_pair": self.slice_pair(rng, rows, position, picture),
        }

    def view(self, rng: np.random.Generator, picture: Picture, number: int) -> dict[str, Any]:
        """Crop `number` (0, 1: global; 2: local) with its photometric changes: pixels (S, S) float32, standardised,
        and tissue (h, w), the breast fraction of each patch."""
        recipe, is_local = self.recipe, number == NUM_GLOBAL_CROPS
        size = recipe.local_crop_size if is_local else recipe.global_crop_size
        scale = recipe.local_crop_scale if is_local else recipe.global_crop_scale
        minimum = recipe.local_min_tissue if is_local else recipe.global_min_tissue
        crop = self.crop(rng, picture, scale, minimum)
        pixels = to_unit(cut(picture.pixels, crop.box, size))
        if rng.uniform() < recipe.jitter_probability:
            pixels = jitter(rng, pixels, recipe.brightness, recipe.contrast)
        if rng.uniform() < recipe.blur_probability[number]:
            pixels = cv2.GaussianBlur(pixels, (9, 9), float(rng.uniform(*recipe.blur_sigma_px)))
        if number == 1 and rng.uniform() < recipe.solarize_probability:
            pixels = np.where(pixels >= 0.5, 1 - pixels, pixels)
        tissue = picture.tissue.grid(crop.box, (size // self.patch_size, size // self.patch_size))
        flips = self.flips(rng)
        return {"pixels": self.standardize(pixels[flips]), "tissue": tissue[flips], "crop": crop, "flips": flips}

    def gram_views(self, picture: Picture, globals_: list[dict[str, Any]]) -> dict[str, Any]:
        """The global crops' boxes and flips at the size of the gram teacher, without photometric changes; nothing
        where it sees the global crops themselves."""
        size = self.recipe.gram_crop_size
        if not size:
            return {}
        grid, placed = (size // self.patch_size,) * 2, [(view["crop"].box, view["flips"]) for view in globals_]
        pixels = [self.standardize(to_unit(cut(picture.pixels, box, size)))[flips] for box, flips in placed]
        return {
            "gram_crops": np.stack(pixels)[:, None],  # (G, 1, S, S)
            "gram_tissue": np.stack([picture.tissue.grid(box, grid)[flips] for box, flips in placed]),
        }

    def crop(self, rng: np.random.Generator, picture: Picture, scale: list[float], minimum: float) -> Crop:
        aware = self.recipe.tissue_aware_crops
        ratio = (self.recipe.crop_ratio[0], self.recipe.crop_ratio[1])
        return tissue_aware_crop(rng, picture.tissue, (scale[0], scale[1]), ratio, minimum if aware else 0.0)

    def flips(self, rng: np.random.Generator) -> tuple[slice, slice]:
        left_right, up_down = rng.uniform(size=2)
        return (
            slice(None, None, -1 if up_down < self.recipe.vertical_flip_probability else 1),
            slice(None, None, -1 if left_right < self.recipe.horizontal_flip_probability else 1),
        )

    def slice_pair(
        self, rng: np.random.Generator, rows: range, position: int, picture: Picture
    ) -> dict[str, Any] | None:
        """A slice and a neighbour under one conservative transform: one crop with enough breast, one flip, one mild
        jitter. pixels (2, 1, S, S): the student's slice, the teacher's neighbour; tissue (h, w) of both. None where
        the image has no neighbour (2D)."""
        recipe, corpus = self.recipe, self.corpus
        if len(rows) < 2 or not self.with_slice_pairs:
            return None
        neighbour = sample_neighbour(
            rng,
            corpus.slice_indices(rows),
            position,
            corpus.slice_spacing_mm(rows[0]),
            recipe.slice_max_distance_mm,
            recipe.slice_max_distance_slices,
        )
        if neighbour is None:
            return None
        other = self.picture(rows[neighbour])
        box = self.crop(rng, picture, recipe.slice_crop_scale, recipe.global_min_tissue).box
        flips = self.flips(rng)
        factors = rng.uniform(1 - recipe.brightness / 2, 1 + recipe.brightness / 2)
        size = recipe.global_crop_size
        grid = (size // self.patch_size, size // self.patch_size)
        pixels = [np.clip(to_unit(cut(each.pixels, box, size)) * factors, 0, 1)[flips] for each in (picture, other)]
        tissue = np.minimum(picture.tissue.grid(box, grid), other.tissue.grid(box, grid))[flips]
        return {
            "pixels": np.stack([self.standardize(each) for each in pixels])[:, None],
            "tissue": tissue,
            "rows": (rows[position], rows[neighbour]),
        }


def to_unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) * np.float32(1 / np.iinfo(pixels.dtype).max)


def jitter(rng: np.random.Generator, pixels: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """Brightness then contrast by factors drawn in 1 +- the settings, clipped to 0..1 (torchvision's ColorJitter)."""
    pixels = np.clip(pixels * np.float32(rng.uniform(1 - brightness, 1 + brightness)), 0, 1)
    mean = pixels.mean()
    return np.clip(mean + (pixels - mean) * np.float32(rng.uniform(1 - contrast, 1 + contrast)), 0, 1)


def stack(arrays: list[np.ndarray], side: int) -> np.ndarray:
    return np.stack(arrays) if arrays else np.zeros((0, side, side), np.float32)


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Samples to a batch. Crops come crop-major: (G * B, 1, H, W), all first crops before all second ones, as the
    losses reshape them to (G, B, ...). Slice pairs (P, 2, 1, S, S) of those P <= B samples that have one."""

    def crop_major(key: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([sample[key] for sample in samples], axis=1)).flatten(0, 1)

    of_crops = ["global_crops", "global_tissue", "local_crops", "local_tissue", "masks", "gram_crops", "gram_tissue"]
    batch = {key: crop_major(key) for key in of_crops if key in samples[0]}
    for key in ("index", "row", "volume", "crops_below_minimum"):
        batch[key] = torch.tensor([sample[key] for sample in samples])
    for key in ("crop_tissue", "boxes"):
        batch[key] = torch.from_numpy(np.stack([sample[key] for sample in samples]))
    pairs = [sample["slice_pair"] for sample in samples if sample["slice_pair"]]
    size, grid = samples[0]["global_crops"].shape[-1], samples[0]["masks"].shape[-1]
    batch["slice_pairs"] = torch.from_numpy(
        np.stack([pair["pixels"] for pair in pairs]) if pairs else np.zeros((0, 2, 1, size, size), np.float32)
    )
    batch["slice_tissue"] = torch.from_numpy(
        np.stack([pair["tissue"] for pair in pairs]) if pairs else np.zeros((0, grid, grid), np.float32)
    )
    return batch
