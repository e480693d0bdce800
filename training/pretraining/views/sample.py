"""Samples and batches: what student and teacher see of one image, a pure function of (seed, global sample index)."""

from collections import UserDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset

from dataset_scripts.corpus.reader import Corpus
from training.pretraining.processes import leave_process_group
from training.pretraining.recipe import Recipe, ViewsRecipe, parse_kind_weights
from training.settings import CANVAS_STREAM, MASK_STREAM, VIEWS_STREAM, generator

from .canvas import WITHOUT_AUGMENTATION, canvas_view
from .crops import Crops, TissueTable, cut, downsample_2x, tissue_aware_crops
from .masks import block_mask, maskable_patches, stratified_mask_ratios
from .order import StepSampler, VolumeOrder, neighbor_reach, sample_neighbor
from .patients import PatientOrder, number_breasts


class Batch(UserDict[str, torch.Tensor]):
    """What `collate` returns. Sent to a device, it leaves behind what says which tokens are encoded: read on the host,
    that waits for nothing. No dict, for DistributedDataParallel and FSDP send on whatever they find in one."""

    ON_HOST = ("global_tissue", "local_tissue", "slice_tissue", "gram_tissue", "canvas_tokens")

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        sent = {
            name: each.to(device, non_blocking=non_blocking) for name, each in self.items() if name not in self.ON_HOST
        }
        return Batch({**self, **sent})


NUM_GLOBAL_CROPS = 2
BLUR_KERNEL_PX = 9


def photometric(rng: np.random.Generator, pixels: np.ndarray, recipe: ViewsRecipe, number: int) -> np.ndarray:
    """Return crop `number` (0, 1: global; 2: local), (S, S) uint8 or uint16, as uint8, with the jitter, blur and
    solarization of the recipe (dinov2/data/augmentations.py, less what needs color).

    As many numbers are drawn whatever is switched on, so that a switch changes nothing but what it names.
    """
    jitters, brightness, contrast, blurs, sigma, solarizes = rng.random(6).tolist()
    gray = to_gray(pixels)
    if jitters < recipe.jitter_probability:
        jitter(gray, 1 + recipe.brightness * (2 * brightness - 1), 1 + recipe.contrast * (2 * contrast - 1))
    if blurs < recipe.blur_probability[number]:
        low, high = recipe.blur_sigma_px
        gray = cv2.GaussianBlur(gray, (BLUR_KERNEL_PX, BLUR_KERNEL_PX), low + (high - low) * sigma)
    if number == 1 and solarizes < recipe.solarize_probability:
        gray = np.where(gray >= 127.5, 255 - gray, gray)
    return to_bytes(gray)


def to_gray(pixels: np.ndarray) -> np.ndarray:
    """Scale uint8 or uint16 to float32 in 0..255."""
    gray = pixels.astype(np.float32)
    if pixels.dtype == np.uint16:
        gray *= np.float32(1 / 257)
    return gray


def to_bytes(gray: np.ndarray) -> np.ndarray:
    """Round pixels (S, S) to uint8, above 255 to that: a quarter of the bytes on their way to the device."""
    return cv2.convertScaleAbs(gray)


def jitter(gray: np.ndarray, brightness: float, contrast: float) -> None:
    """Scale brightness, then contrast about the mean, each clipped to 0..255, in place (torchvision's ColorJitter)."""
    gray *= np.float32(brightness)
    np.minimum(gray, 255, out=gray)
    mean = cv2.mean(gray)[0]
    gray *= np.float32(contrast)
    gray += np.float32(mean * (1 - contrast))
    np.clip(gray, 0, 255, out=gray)


@dataclass(frozen=True)
class Image:
    """One row of a corpus, decoded: image (H, W) uint8 or uint16, the same at half its size, and the table of its
    breast mask."""

    pixels: np.ndarray
    half: np.ndarray
    tissue: TissueTable

    def cut(self, box: np.ndarray, size: int) -> np.ndarray:
        return cut(self.pixels, box, size, self.half)


class Views(NamedTuple):
    """Crops of one kind of one image, n of them."""

    pixels: np.ndarray  # (n, S, S) uint8
    tissue: np.ndarray  # (n, h, w) float32, the breast fraction of each patch
    crops: Crops
    flips: list[tuple[slice, slice]]


class PretrainingViews(Dataset):
    """Views by global sample index. `index // global_batch_size` is the step; an epoch is a permutation of the
    volumes (a 2D image is a volume of one slice), or of those of each kind where the recipe weighs kinds, and each
    visit draws one slice, so that near-duplicates do not fill a batch.

    global_batch_size: images a step over all processes; it fixes how mask ratios are stratified and which patients
    share a step, so the number of processes does not matter. slice_pairs, crops: whether they are drawn; canvas:
    the size (H, W) of a view of the whole image, None for no such view. Raises ValueError where the recipe weighs a
    kind that the corpus lacks.
    """

    def __init__(
        self,
        corpus: Corpus,
        recipe: ViewsRecipe,
        patch_size: int,
        seed: int,
        global_batch_size: int,
        slice_pairs: bool = True,
        crops: bool = True,
        canvas: tuple[int, int] | None = None,
    ):
        self.corpus, self.recipe, self.patch_size = corpus, recipe, patch_size
        self.with_slice_pairs, self.with_crops, self.canvas = slice_pairs, crops, canvas
        self.seed, self.global_batch_size = seed, global_batch_size
        self.breasts = number_breasts(*map(corpus.volume_column, ("patient", "laterality", "source")))
        self.patients: PatientOrder | None = None
        self.order: VolumeOrder  # of volumes, where patients are not grouped
        if recipe.views_per_patient:
            patients, sides, views, sources = map(corpus.volume_column, ("patient", "laterality", "view", "source"))
            group = recipe.views_per_patient
            slots, single = global_batch_size // group, recipe.single_source_batches
            self.patients = PatientOrder(seed, patients, sides, views, sources, group, slots, single)
        else:
            self.order = VolumeOrder(seed, corpus.kinds, parse_kind_weights(recipe.kind_weights))
        self._mask_ratios: tuple[int, np.ndarray] = (-1, np.empty(0))  # of the last step asked for

    def image(self, row: int) -> Image:
        pixels, tissue = self.corpus.image(row)
        return Image(pixels, downsample_2x(pixels), TissueTable(tissue, pixels.shape))

    def mask_ratios(self, index: int) -> np.ndarray:
        """Return the mask ratio of each global crop of this sample, stratified over the whole step."""
        step, place = divmod(index, self.global_batch_size)
        if self._mask_ratios[0] != step:
            rng, count = generator(self.seed, MASK_STREAM, step), NUM_GLOBAL_CROPS * self.global_batch_size
            ratios = stratified_mask_ratios(rng, count, self.recipe.mask_probability, self.recipe.mask_ratio)
            self._mask_ratios = (step, ratios.reshape(self.global_batch_size, NUM_GLOBAL_CROPS))
        return self._mask_ratios[1][place]

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng, volume, rows, position = self.place(index)
        pixels, tissue = self.corpus.image(rows[position])
        sample: dict[str, Any] = {"index": index, "row": rows[position], "volume": volume}
        sample["breast"] = int(self.breasts[volume])
        if self.patients:
            sample["patient"] = self.patients.patient_of(index // self.recipe.views_per_patient)
        if self.with_crops:
            image = Image(pixels, downsample_2x(pixels), TissueTable(tissue, pixels.shape))
            sample |= self.draw(rng, image, index) | {"slice_pair": self.slice_pair(rng, rows, position, image)}
        if self.canvas:
            neighbor = self.neighbor(rng, rows, position)
            target = pixels if neighbor is None else self.corpus.image(neighbor)[0]
            sample |= canvas_view(rng, pixels, target, tissue, self.canvas, self.patch_size, self.recipe)
        return sample

    def place(self, index: int) -> tuple[np.random.Generator, int, range, int]:
        """Return the sample's generator, its volume, the volume's rows, and which of them was drawn."""
        rng = generator(self.seed, VIEWS_STREAM, index)
        volume = self.patients[index].volume if self.patients else self.order[index]
        rows = self.corpus.rows_of(volume)
        return rng, volume, rows, int(rng.integers(len(rows)))

    def row_of(self, index: int) -> int:
        """Return the corpus row of a sample, without reading it."""
        _, _, rows, position = self.place(index)
        return rows[position]

    def draw(self, rng: np.random.Generator, image: Image, index: int) -> dict[str, Any]:
        """Draw crops and masks of an image, as sample `index`."""
        recipe = self.recipe
        globals_, locals_ = self.views(rng, image, is_global=True), self.views(rng, image, is_global=False)
        masks = [
            block_mask(rng, ratio, maskable_patches(tissue, recipe.tissue_aware_masks))
            for tissue, ratio in zip(globals_.tissue, self.mask_ratios(index), strict=True)
        ]
        boxes, fractions, fit = map(np.concatenate, zip(globals_.crops, locals_.crops, strict=True))
        return {
            "global_crops": globals_.pixels[:, None],  # (G, 1, H, W)
            "global_tissue": globals_.tissue,  # (G, h, w)
            **self.gram_views(image, globals_),
            "local_crops": locals_.pixels[:, None],
            "local_tissue": locals_.tissue,
            "masks": np.stack(masks),  # (G, h, w)
            "crop_tissue": fractions.astype(np.float32),  # (G + L,)
            "crops_below_minimum": int(np.count_nonzero(~fit)),
            "boxes": boxes,  # (G + L, 4)
        }

    def plain_canvases(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (n, H, W) float32 in 0..1 on the canvas, without augmentation, and their tissue (n, H, W) bool,
        of at most `count` volumes drawn by the seed."""
        assert self.canvas is not None, "made without a canvas"
        rng, recipe = generator(self.seed, CANVAS_STREAM, 0), replace(self.recipe, **WITHOUT_AUGMENTATION)
        found = []
        for volume in rng.permutation(self.corpus.num_volumes)[:count]:
            rows = self.corpus.rows_of(int(volume))
            pixels, tissue = self.corpus.image(rows[int(rng.integers(len(rows)))])
            found.append(canvas_view(rng, pixels, pixels, tissue, self.canvas, self.patch_size, recipe))
        images = torch.from_numpy(np.stack([view["canvas_target"] for view in found])).float() / 255
        return images, torch.from_numpy(np.stack([view["canvas_tissue"] for view in found]))

    def views(self, rng: np.random.Generator, image: Image, is_global: bool) -> Views:
        """Draw all global or all local crops with their photometric changes."""
        recipe = self.recipe
        if is_global:
            count, size = NUM_GLOBAL_CROPS, recipe.global_crop_size
            crops = self.crops(rng, image, recipe.global_crop_scale, recipe.global_min_tissue, count)
        else:
            count, size = recipe.num_local_crops, recipe.local_crop_size
            crops = self.crops(rng, image, recipe.local_crop_scale, recipe.local_min_tissue, count)
        pixels, flips = np.empty((count, size, size), np.uint8), []
        tissue = image.tissue.grids(crops.boxes, (size // self.patch_size, size // self.patch_size))
        for number, box in enumerate(crops.boxes):
            changed = photometric(rng, image.cut(box, size), recipe, number if is_global else NUM_GLOBAL_CROPS)
            flips.append(self.flips(rng))
            pixels[number], tissue[number] = changed[flips[-1]], tissue[number][flips[-1]].copy()
        return Views(pixels, tissue, crops, flips)

    def gram_views(self, image: Image, globals_: Views) -> dict[str, Any]:
        """Cut the global crops at the size of the gram teacher, without photometric changes; nothing where it sees
        the global crops themselves."""
        size = self.recipe.gram_crop_size
        if not size:
            return {}
        tissue = image.tissue.grids(globals_.crops.boxes, (size // self.patch_size, size // self.patch_size))
        pixels = [to_bytes(to_gray(image.cut(box, size))) for box in globals_.crops.boxes]
        return {
            "gram_crops": np.stack([each[flips] for each, flips in zip(pixels, globals_.flips, strict=True)])[:, None],
            "gram_tissue": np.stack([each[flips] for each, flips in zip(tissue, globals_.flips, strict=True)]),
        }

    def crops(
        self, rng: np.random.Generator, image: Image, scale: list[float], minimum: float, count: int = 1
    ) -> Crops:
        least = minimum if self.recipe.tissue_aware_crops else 0.0
        return tissue_aware_crops(rng, image.tissue, scale, self.recipe.crop_ratio, least, count)

    def flips(self, rng: np.random.Generator) -> tuple[slice, slice]:
        left_right, up_down = rng.random(2).tolist()
        return (
            slice(None, None, -1 if up_down < self.recipe.vertical_flip_probability else 1),
            slice(None, None, -1 if left_right < self.recipe.horizontal_flip_probability else 1),
        )

    def slice_pair(self, rng: np.random.Generator, rows: range, position: int, image: Image) -> dict[str, Any] | None:
        """Draw a neighbor and show both slices under one conservative transform: one crop with enough breast, one
        flip, one mild jitter. pixels (2, 1, S, S): the student's slice, the teacher's neighbor; tissue (h, w) of both.
        None where the image has no neighbor (2D)."""
        recipe = self.recipe
        neighbor = self.neighbor(rng, rows, position) if self.with_slice_pairs else None
        if neighbor is None:
            return None
        other = self.image(neighbor)
        boxes = self.crops(rng, image, recipe.slice_crop_scale, recipe.global_min_tissue).boxes  # (1, 4)
        flips = self.flips(rng)
        factor = rng.uniform(1 - recipe.brightness / 2, 1 + recipe.brightness / 2)
        size = recipe.global_crop_size
        grid = (size // self.patch_size, size // self.patch_size)
        pixels = [to_bytes(to_gray(each.cut(boxes[0], size)) * np.float32(factor))[flips] for each in (image, other)]
        tissue = np.minimum(image.tissue.grids(boxes, grid)[0], other.tissue.grids(boxes, grid)[0])[flips]
        return {
            "pixels": np.stack(pixels)[:, None],
            "tissue": tissue,
            "rows": (rows[position], neighbor),
        }

    def neighbor(self, rng: np.random.Generator, rows: range, position: int) -> int | None:
        """Draw the corpus row of a neighboring slice within the recipe's reach; None where there is none (2D)."""
        if len(rows) < 2:
            return None
        reach = neighbor_reach(self.recipe, self.corpus.slice_spacing_mm(rows[0]))
        found = sample_neighbor(rng, self.corpus.slice_indices(rows), position, reach)
        return None if found is None else rows[found]


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack samples to a batch.

    Crops come crop-major: (G * B, 1, H, W) uint8, all first crops before all second ones, as the losses reshape them to
    (G, B, ...). Slice pairs (P, 2, 1, S, S) of those P <= B samples that have one. Places are those of what is true in
    a flattened mask, int64: taking tokens by them does not wait for the device, as taking them by the mask would.
    """
    of_crops = ["global_crops", "global_tissue", "local_crops", "local_tissue", "masks", "gram_crops", "gram_tissue"]
    batch = Batch({
        key: torch.from_numpy(np.stack([sample[key] for sample in samples], axis=1)).flatten(0, 1)
        for key in of_crops
        if key in samples[0]
    })  # fmt: skip
    for key in ("index", "row", "volume", "patient", "breast", "crops_below_minimum"):
        if key in samples[0]:
            batch[key] = torch.tensor([sample[key] for sample in samples])
    for key in ("crop_tissue", "boxes", *(key for key in samples[0] if key.startswith("canvas"))):
        if key in samples[0]:
            batch[key] = torch.from_numpy(np.stack([sample[key] for sample in samples]))
    if "canvas_tokens" in batch:
        batch["canvas_places"] = batch["canvas_tokens"].flatten().nonzero().flatten()
    if "global_crops" not in samples[0]:
        return batch
    batch["masked_places"] = batch["masks"].flatten().nonzero().flatten()  # (M,)
    size, grid = samples[0]["global_crops"].shape[-1], samples[0]["masks"].shape[-1]
    for key, shape, dtype in (("pixels", (2, 1, size, size), np.uint8), ("tissue", (grid, grid), np.float32)):
        of_pairs = [sample["slice_pair"][key] for sample in samples if sample["slice_pair"]]
        stacked = np.stack(of_pairs) if of_pairs else np.zeros((0, *shape), dtype)
        batch["slice_pairs" if key == "pixels" else "slice_tissue"] = torch.from_numpy(stacked)
    tissue = batch["slice_tissue"].flatten()
    batch["slice_places"] = (tissue > 0).nonzero().flatten()  # (T,)
    batch["slice_patch_tissue"] = tissue[batch["slice_places"]]  # (T,) float32
    return batch


def at_places(patches: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Take what stands at M places among the patches of n images: (n, N, ...) -> (M, ...)."""
    return patches[places // patches.shape[1], places % patches.shape[1]]


def load_batches(views: PretrainingViews, recipe: Recipe, first_step: int, accelerator: Accelerator) -> Iterator[Batch]:
    """Return this process's batches on its device, one a forward, from a step on."""
    cv2.setNumThreads(1)  # crops are small, and a worker forked while OpenCV holds threads can hang
    loader = DataLoader(  # one iterator is the whole run, so its workers persist
        views,
        batch_sampler=StepSampler(recipe, first_step, accelerator.process_index, accelerator.num_processes),
        num_workers=recipe.run.dataloader_num_workers,
        prefetch_factor=recipe.run.dataloader_prefetch_factor if recipe.run.dataloader_num_workers else None,
        collate_fn=collate,
        worker_init_fn=leave_process_group,
        pin_memory=accelerator.device.type == "cuda",
    )
    return on_device(loader, accelerator.device)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device. On a GPU each is copied on a stream of its own, while the one before is computed with;
    batches in pinned memory, else the copy waits."""
    if device.type != "cuda":
        yield from (send_to_device(batch, device) for batch in batches)
        return
    copies = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in chain(batches, [None]):
        ready, ahead = ahead, None
        if batch is not None:
            with torch.cuda.stream(copies):
                ahead = send_to_device(batch, device, non_blocking=True), copies.record_event()
        if ready is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(ready[1])
            for each in ready[0].values():
                if each.is_cuda:
                    each.record_stream(current)  # its memory goes to no other copy before it was computed with
            yield ready[0]
