"""Where a run is followed beside its own log: TensorBoard, trackio or Weights & Biases, through Accelerate."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from ..recipe import Recipe
from .model_card import published_recipe

PROJECT = "mammodino"


def find_tracker(report_to: str) -> str | None:
    """What `Accelerator(log_with=)` takes. Raises ValueError where the tracker is not installed, which Accelerate would
    pass over in silence."""
    if report_to == "none":
        return None
    if importlib.util.find_spec(report_to) is None:
        raise ValueError(
            f"report_to={report_to!r}: not installed; pip install {report_to}, or give tensorboard or none (the JSON "
            "lines are written in any case)"
        )
    return report_to


def start_tracker(accelerator: Accelerator, recipe: Recipe) -> None:
    """One run a start of the command, named as output_dir is; it is told the recipe without this machine's paths."""
    name, logs = Path(recipe.run.output_dir).resolve().name, str(Path(recipe.run.output_dir) / "logs")
    settings = {key: value if isinstance(value, (bool, int, float, str)) else str(value)
                for key, value in published_recipe(recipe).items()}  # fmt: skip
    # W&B's own record of the machine holds the command line with its paths, and what is printed
    quiet = {"x_disable_meta": True, "console": "off", "disable_git": True, "disable_code": True}
    of_each: dict[str, dict[str, Any]] = {
        "trackio": {"name": name, "resume": "allow"},
        "wandb": {"name": name, "group": name, "dir": logs, "settings": quiet},
    }
    accelerator.init_trackers(PROJECT, config=settings, init_kwargs=of_each)


def log_picture(accelerator: Accelerator, name: str, picture: np.ndarray, step: int) -> None:
    """A picture (H, W, 3) uint8 RGB to TensorBoard, whose files stay here: breasts are not sent to a hosted tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
