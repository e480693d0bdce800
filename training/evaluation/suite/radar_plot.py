"""The radar plot of models over tasks: the paper's figure 2, for a suite of ours."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas
from matplotlib.figure import Figure

LEAST_SPOKES = 3  # fewer do not span a plane


def draw_radar(scores: pandas.DataFrame, ours: str, output: Path, caption: str) -> bool:
    """Writes a PNG: one spoke a row of `scores` (tasks), one closed line a column (backbones), `ours` drawn heavier.

    Each spoke runs from a little below its lowest score to its highest and is labeled with both, so that the order on
    a spoke can be read; lengths on different spokes cannot be compared. A missing score leaves a gap.

    Returns: whether it was drawn; fewer than three tasks do not make a radar.
    """
    if len(scores) < LEAST_SPOKES:
        return False
    low, high = scores.min(axis=1), scores.max(axis=1)
    span = (high - low).where(high > low, 1.0)
    length = 0.25 + 0.75 * scores.sub(low, axis=0).div(span, axis=0)
    angles = np.linspace(0, 2 * np.pi, len(scores), endpoint=False)
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    colors = matplotlib.colormaps["tab10"].colors
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
    figure.savefig(output, dpi=130)
    return True
