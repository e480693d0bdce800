"""Draw what student and teacher see of a user's own file, beside plain random views (the paper's figures 1a to 1c).

python -m training.preview FILE --output PNG [--recipe RECIPE] [--seed N]
"""

from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dataset_scripts.corpus.reader import TISSUE_CELL_PX
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.breast_segmentation import patch_tissue
from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from modeling_mammodino.tools.files import atomic_file, check_output
from training.evaluation.plots import drawable
from training.pretraining.recipe import Recipe, load_recipe
from training.pretraining.views.crops import TissueTable, cut, tissue_aware_crops
from training.pretraining.views.masks import block_mask, maskable_patches
from training.pretraining.views.order import neighbor_reach, sample_neighbor

NUM_GLOBAL, NUM_LOCAL = 2, 8
COLORS = {"global": "#ffb000", "local": "#4fc3f7", "mask": (220, 60, 60)}


class Sheet:
    """One file's image with tissue-aware views on the upper row and plain ones below."""

    def __init__(self, image: np.ndarray, tissue: np.ndarray, recipe: Recipe, seed: int):
        self.image, self.tissue, self.recipe = image, tissue, recipe
        height, width = image.shape
        self.table = TissueTable(
            patch_tissue(tissue, (-(-height // TISSUE_CELL_PX), -(-width // TISSUE_CELL_PX))), (height, width)
        )
        self.rng = np.random.default_rng(seed)

    def crops(self, count: int, kind: str, aware: bool) -> list[tuple[np.ndarray, float]]:
        """Draw boxes (y0, x0, y1, x1) and their breast fractions."""
        views = self.recipe.views
        scale, minimum = (
            (views.global_crop_scale, views.global_min_tissue)
            if kind == "global"
            else (views.local_crop_scale, views.local_min_tissue)
        )
        found = tissue_aware_crops(self.rng, self.table, scale, views.crop_ratio, minimum if aware else 0, count)
        return list(zip(found.boxes, found.tissue_fractions.tolist(), strict=True))

    def draw_boxes(self, axis: Axes, aware: bool) -> list[tuple[np.ndarray, float]]:
        axis.imshow(self.image, cmap="gray", vmin=0)
        drawn = []
        for kind, count in (("local", NUM_LOCAL), ("global", NUM_GLOBAL)):
            crops = self.crops(count, kind, aware)
            for (y0, x0, y1, x1), _ in crops:
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=COLORS[kind], linewidth=1.5))
            drawn += crops if kind == "global" else []
            fractions = [fraction for _, fraction in crops]
            axis.plot([], color=COLORS[kind], label=f"{kind}: {min(fractions):.0%} to {max(fractions):.0%} breast")
        height, width = self.image.shape
        axis.set(xlim=(0, width), ylim=(height, 0))  # boxes end at the image
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), fontsize=9, frameon=False)
        return drawn

    def draw_masked(self, axis: Axes, box: np.ndarray, aware: bool) -> None:
        """Draw a global crop with the patches of an iBOT mask in red."""
        size = self.recipe.views.global_crop_size
        grid = (size // self.recipe.model.patch_size,) * 2
        tissue = self.table.grids(box[None], grid)[0]
        mask = block_mask(self.rng, self.recipe.views.mask_ratio[1], maskable_patches(tissue, aware))
        shown = np.repeat(cut(self.image, box, size)[..., None], 3, axis=2).astype(float)
        shown = shown * (255 / max(1, np.iinfo(self.image.dtype).max))
        large = cv2.resize(mask.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST).astype(bool)
        shown[large] = 0.45 * shown[large] + 0.55 * np.array(COLORS["mask"])
        axis.imshow(shown.astype(np.uint8))
        share = tissue[mask].mean() if mask.any() else float("nan")
        axis.set_xlabel(f"red: masked patches, {share:.0%} breast", fontsize=9)


def draw_preview(source: str | Path, recipe: Recipe, seed: int) -> Figure:
    views = recipe.views
    processor = MammoDinoImageProcessor()
    slices = list(processor.render_source(source, (1024, 1024), upscale=False))
    position = len(slices) // 2
    mammogram, rendered = slices[position]
    image, tissue = rendered.image, rendered.tissue
    sheet = Sheet(image, tissue, recipe, seed)

    across = max(0.6, image.shape[1] / image.shape[0])
    figure = Figure(figsize=(4.1 * (3 + 2 * across), 9.2), layout="constrained")
    axes = figure.subplots(2, 5, width_ratios=(across, across, 1, 1, 1))
    axes[0, 0].imshow(image, cmap="gray", vmin=0)
    axes[0, 0].set_title("as the encoder sees it", fontsize=10)
    axes[1, 0].imshow(tissue, cmap="gray")
    axes[1, 0].set_title(f"breast: {tissue.mean():.0%} of the image", fontsize=10)
    for row, (aware, word) in enumerate(((True, "tissue-aware"), (False, "plain random"))):
        boxes = sheet.draw_boxes(axes[row, 1], aware)
        axes[row, 1].set_title(f"{word} crops", fontsize=10)
        for column, (box, fraction) in enumerate(boxes, start=2):
            sheet.draw_masked(axes[row, column], box, aware)
            axes[row, column].set_title(f"{word} mask on a global crop, {fraction:.0%} breast", fontsize=10)
    draw_neighbors(axes[:, 4], slices, position, recipe, sheet)
    for axis in axes.flat:
        axis.set_xticks([]), axis.set_yticks([])
    figure.suptitle(
        f"{drawable(Path(source).name)}: crops hold at least {views.global_min_tissue:.0%} (global) and "
        f"{views.local_min_tissue:.0%} (local) breast. Research use only."
    )
    return figure


def draw_neighbors(axes: np.ndarray, slices: list, position: int, recipe: Recipe, sheet: Sheet) -> None:
    """Draw the student's slice and the teacher's neighbor under one crop; of a 2D image, a word on why there is
    none."""
    mammogram = slices[position][0]
    views = recipe.views
    indices = np.array([each.slice_index for each, _ in slices])
    other = sample_neighbor(sheet.rng, indices, position, neighbor_reach(views, mammogram.slice_spacing_mm))
    if other is None:
        for axis in axes:
            axis.text(0.5, 0.5, "one slice: no neighbor,\nno adjacent-slice loss", ha="center", va="center")
            axis.set_axis_off()
        return
    crops = tissue_aware_crops(
        sheet.rng, sheet.table, views.slice_crop_scale, views.crop_ratio, views.global_min_tissue
    )
    for axis, place, word in zip(axes, (position, other), ("student", "teacher"), strict=True):
        axis.imshow(cut(slices[place][1].image, crops.boxes[0], views.global_crop_size), cmap="gray", vmin=0)
        axis.set_title(f"{word}: slice {slices[place][0].slice_index} of {mammogram.num_slices}", fontsize=10)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.preview", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=user_path, help="DICOM, PNG, JPEG or PGM, or the folder of one volume")
    parser.add_argument("--output", type=user_path, required=True, help="PNG to write")
    parser.add_argument("--recipe", default="mammodino", help="whose crops and masks (default: mammodino)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with command_line("preview"):
        check_output(options.output, ".png")
        recipe = load_recipe([options.recipe, "--corpus", "none", "--output_dir", "none"])
        figure = draw_preview(options.file, recipe, options.seed)
        with atomic_file(options.output) as temporary:
            figure.savefig(temporary, format="png", dpi=200)
        print(options.output)


if __name__ == "__main__":
    main()
