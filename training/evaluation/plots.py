"""Figures of the evaluation: radar plot, detections, FROC curves, heat maps. Research use only."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from modeling_mammodino.tools.files import atomic_file, readable

from .detection.boxes import BoxedImage
from .detection.data import LesionImage, LesionImageRenderer
from .detection.lesion_metrics import FALSE_POSITIVES, Found, FrocMarks, froc_curve, sensitivity_at
from .heat_maps import HeatMap

NOTICE = "Research use only: not a medical device."
MIN_SPOKES = 3  # fewer do not span a plane
TRUE_COLOR, PREDICTED_COLOR = "#4fc3f7", "#ffb000"
NUM_WITH_LESION, NUM_WITHOUT, COLUMNS = 8, 4, 6
MAX_BOXES = 5


def drawable(name: str) -> str:
    """Return a name of a file or model as Matplotlib takes it: bytes that are no text escaped, $ no formula."""
    return readable(name).replace("$", r"\$")


def draw_radar(scores: pd.DataFrame, ours: str, output: Path, caption: str) -> bool:
    """Write a PNG as the paper's figure 2: one spoke a row of `scores` (tasks), one closed line a column (backbones),
    `ours` drawn heavier.

    Each spoke runs from a little below its lowest score to its highest and is labeled with both, so that the order on
    a spoke can be read; lengths on different spokes cannot be compared. A missing score leaves a gap.

    Returns: whether it was drawn; fewer than three tasks do not make a radar.
    """
    if len(scores) < MIN_SPOKES:
        return False
    low, high = scores.min(axis=1), scores.max(axis=1)
    span = (high - low).where(high > low, 1.0)
    length = 0.25 + 0.75 * scores.sub(low, axis=0).div(span, axis=0)
    angles = np.linspace(0, 2 * np.pi, len(scores), endpoint=False)
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    colors = matplotlib.color_sequences["tab10"]
    for number, name in enumerate(scores.columns):
        heavy = name == ours
        line = axes.plot(
            np.append(angles, angles[0]),
            np.append(length[name], length[name].iloc[0]),
            label=name,
            color="black" if heavy else colors[number % len(colors)],
            linewidth=2.6 if heavy else 1.3,
            linestyle="-" if heavy or number < len(colors) else "--",
            marker="o",
            markersize=5 if heavy else 3,
            zorder=3 if heavy else 2,
        )
        if heavy:
            axes.fill(angles, length[name].fillna(0), color=line[0].get_color(), alpha=0.06)
    names = [f"{task.replace(' ', chr(10), 1)}\n{low[task]:.3f} to {high[task]:.3f}" for task in scores.index]
    axes.set_xticks(angles, names, fontsize=9)
    axes.tick_params(axis="x", pad=24)
    axes.set_yticks([0.25, 1.0], ["", ""])
    axes.set_ylim(0, 1.05)
    axes.spines["polar"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(caption, fontsize=10)
    save_figure(figure, output, dpi=130)
    return True


def draw_detections(
    images: list[BoxedImage], found: list[Found], renderer: LesionImageRenderer, title: str, output: Path
) -> None:
    """Draw images with and without lesions, evenly spaced over those tested, so that nobody has chosen them.

    Of a volume, the slice of its first lesion, or else of its best box; boxes that count there by depth are shown.
    """
    file_of = {image.image_id: image.file for image in images}
    with_lesion = [each for each in found if len(each.lesions)]
    without = [each for each in found if not len(each.lesions)]
    shown = _spread(with_lesion, NUM_WITH_LESION) + _spread(without, NUM_WITHOUT)
    threshold = score_at(found, 1.0)
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 4.6 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, each in zip(axes.flat, shown, strict=False):
        _draw_boxes(axis, each, file_of[each.image_id], renderer, threshold)
    figure.suptitle(
        f"{title}\nblue: true; orange: the {MAX_BOXES} best boxes with their scores, dotted below {threshold:.2f}, "
        f"above which there is about one box an image. {NOTICE}",
        fontsize=10,
    )
    save_figure(figure, output)


def score_at(found: list[Found], boxes_per_image: float) -> float:
    """Return the least score of so many boxes an image."""
    scores = np.sort(np.concatenate([each.scores for each in found]))[::-1]
    return float(scores[min(len(scores) - 1, round(boxes_per_image * len(found)))]) if len(scores) else 1.0


def draw_froc(curves: dict[str, FrocMarks], title: str, output: Path) -> None:
    """Draw sensitivity over false positives an image, a curve a kind of image."""
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, marks in curves.items():
        false_positives, sensitivity = froc_curve(marks)
        points = ", ".join(f"{sensitivity_at(marks, each):.2f}" for each in FALSE_POSITIVES)
        axis.step(false_positives, sensitivity, where="post", label=f"{name}: {points} at {FALSE_POSITIVES}")
    axis.set(xlim=(0, 8), ylim=(0, 1), xlabel="false positives an image", ylabel="sensitivity, lesions")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=7)
    axis.set_title(f"{title}\n{NOTICE}", fontsize=8)
    save_figure(figure, output)


def draw_heat_maps(image: LesionImage, maps: list[HeatMap], title: str, output: Path) -> None:
    """Draw the image as the encoder sees it, and each heat map over it."""
    height, width = image.image.shape
    count = len(maps) + 1
    figure = Figure(figsize=(3.2 * count, 3.2 * height / width + 1.5), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, height_ratios=(3.2 * height / width, 0.12))  # bars below, in line
    place = f", slice {image.frame} of {image.num_frames}" if image.num_frames > 1 else ""
    axes[0, 0].set_title(f"as the encoder sees it{place}", fontsize=10)
    for axis in axes[0]:
        axis.imshow(image.image, cmap="gray", vmin=0)
        axis.set_axis_off()
    axes[1, 0].set_axis_off()
    for axis, bar, each in zip(axes[0, 1:], axes[1, 1:], maps, strict=True):
        low, high = np.nanpercentile(each.values, (1, 99))
        if each.is_signed:
            low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
        shown = axis.imshow(
            each.values,
            cmap="coolwarm" if each.is_signed else "inferno",
            vmin=low,
            vmax=high,
            alpha=0.55,
            extent=(0, width, height, 0),
            interpolation="nearest",
        )
        figure.colorbar(shown, cax=bar, orientation="horizontal", label=each.scale, extend="both")
        axis.set_title(each.name, fontsize=10)
    figure.suptitle(f"{drawable(title)}\nFor a look: not validated to show lesions. {NOTICE}", fontsize=10)
    save_figure(figure, output, dpi=200)


def _draw_boxes(axis: Axes, found: Found, file: str, renderer: LesionImageRenderer, threshold: float) -> None:
    frame = 0
    if found.num_slices > 1:
        at = found.lesion_slices if len(found.lesions) else found.slices
        frame = int(at[0]) if len(at) and at[0] >= 0 else found.num_slices // 2
    (image,) = renderer(file, [frame])
    axis.imshow(image.image, cmap="gray", vmin=0)
    near = np.flatnonzero(np.abs(found.slices - frame) <= found.num_slices / 4) if found.num_slices > 1 else None
    rows = (np.arange(len(found.boxes)) if near is None else near)[:MAX_BOXES]
    for x0, y0, x1, y1 in image.placement.boxes(found.lesions):
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=TRUE_COLOR, linewidth=2))
    for (x0, y0, x1, y1), score in zip(image.placement.boxes(found.boxes[rows]), found.scores[rows], strict=True):
        style = "-" if score >= threshold else ":"
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=PREDICTED_COLOR, linestyle=style))
        axis.text(x0, y0 - 1, f"{score:.2f}", color=PREDICTED_COLOR, fontsize=6, verticalalignment="bottom")
    place = f", slice {frame} of {found.num_slices}" if found.num_slices > 1 else ""
    axis.set_title(f"{drawable(Path(found.image_id).name[-24:])}{place}", fontsize=7)


def _spread(found: list[Found], count: int) -> list[Found]:
    return [found[row] for row in np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))] if found else []


def save_figure(figure: Figure, output: Path, dpi: int = 90) -> None:
    with atomic_file(output) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
