"""Images of detection: true and predicted boxes on test images, and the FROC curve. Research use only."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import patches, pyplot  # noqa: E402 (the backend is chosen first)

from training.evaluation.run_files import write_whole

from .data import LesionImageRenderer
from .metrics import FALSE_POSITIVES, Found, FrocMarks, froc_curve, sensitivity_at
from .table import BoxedImage

matplotlib.use("Agg")

TRUE_COLOR, PREDICTED_COLOR = "#4fc3f7", "#ffb000"
NUM_WITH_LESION, NUM_WITHOUT, COLUMNS = 8, 4, 6
MAX_BOXES = 5
NOTICE = "Research use only: not a medical device."


def draw_detections(
    images: list[BoxedImage], found: list[Found], maker: LesionImageRenderer, title: str, output: Path
) -> None:
    """Images with and without lesions, evenly spaced over those tested, so that nobody has chosen them.

    Of a volume, the slice of its first lesion, or else of its best box; boxes that count there by depth are shown.
    """
    file_of = {image.image_id: image.file for image in images}
    with_lesion = [each for each in found if len(each.lesions)]
    without = [each for each in found if not len(each.lesions)]
    shown = _spread(with_lesion, NUM_WITH_LESION) + _spread(without, NUM_WITHOUT)
    threshold = score_at(found, 1.0)
    rows = -(-len(shown) // COLUMNS)
    figure, axes = pyplot.subplots(
        rows, COLUMNS, figsize=(3 * COLUMNS, 4.6 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, each in zip(axes.flat, shown, strict=False):
        _draw(axis, each, file_of[each.image_id], maker, threshold)
    figure.suptitle(
        f"{title}\nblue: true; orange: the {MAX_BOXES} best boxes with their scores, dotted below {threshold:.2f}, "
        f"above which there is about one box an image. {NOTICE}",
        fontsize=10,
    )
    _save(figure, output)


def score_at(found: list[Found], boxes_per_image: float) -> float:
    """The least score of so many boxes an image."""
    scores = np.sort(np.concatenate([each.scores for each in found]))[::-1]
    return float(scores[min(len(scores) - 1, round(boxes_per_image * len(found)))]) if len(scores) else 1.0


def _draw(axis, found: Found, file: str, maker: LesionImageRenderer, threshold: float) -> None:
    frame = 0
    if found.num_slices > 1:
        at = found.lesion_slices if len(found.lesions) else found.slices
        frame = int(at[0]) if len(at) and at[0] >= 0 else found.num_slices // 2
    (image,) = maker(file, [frame])
    axis.imshow(image.image, cmap="gray", vmin=0)
    near = np.flatnonzero(np.abs(found.slices - frame) <= found.num_slices / 4) if found.num_slices > 1 else None
    rows = (np.arange(len(found.boxes)) if near is None else near)[:MAX_BOXES]
    for x0, y0, x1, y1 in image.placement.boxes(found.lesions):
        axis.add_patch(patches.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=TRUE_COLOR, linewidth=2))
    for (x0, y0, x1, y1), score in zip(image.placement.boxes(found.boxes[rows]), found.scores[rows], strict=True):
        style = "-" if score >= threshold else ":"
        axis.add_patch(
            patches.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=PREDICTED_COLOR, linestyle=style)
        )
        axis.text(x0, y0 - 1, f"{score:.2f}", color=PREDICTED_COLOR, fontsize=6, verticalalignment="bottom")
    place = f", slice {frame} of {found.num_slices}" if found.num_slices > 1 else ""
    axis.set_title(f"{Path(found.image_id).name[-24:]}{place}", fontsize=7)


def draw_froc(curves: dict[str, FrocMarks], title: str, output: Path) -> None:
    """Sensitivity over false positives an image, a curve a kind of image."""
    figure, axis = pyplot.subplots(figsize=(5.5, 4.2), layout="constrained")
    for name, marks in curves.items():
        false_positives, sensitivity = froc_curve(marks)
        points = ", ".join(f"{sensitivity_at(marks, each):.2f}" for each in FALSE_POSITIVES)
        axis.step(false_positives, sensitivity, where="post", label=f"{name}: {points} at {FALSE_POSITIVES}")
    axis.set(xlim=(0, 8), ylim=(0, 1), xlabel="false positives an image", ylabel="sensitivity, lesions")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=7)
    axis.set_title(f"{title}\n{NOTICE}", fontsize=8)
    _save(figure, output)


def _spread(found: list[Found], count: int) -> list[Found]:
    return [found[row] for row in np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))] if found else []


def _save(figure, output: Path) -> None:
    write_whole(output, lambda temporary: figure.savefig(temporary, format="png", dpi=90, metadata={"Software": None}))
    pyplot.close(figure)
