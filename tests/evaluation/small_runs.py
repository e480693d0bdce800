"""A small table of drawn mammograms with a finding that can be learned, and settings for short runs."""

import shlex
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from made_inputs import draw_breast

from training.evaluation.run_settings import FinetuneSettings

NUM_PATIENTS = 24


def draw_table(folder: Path, num_patients: int = NUM_PATIENTS) -> Path:
    """Two views of the left breast of each patient; every third patient has bright spots, and is labeled so."""
    rows = []
    for number in range(num_patients):
        cancer = int(number % 3 == 0)
        for view in ("CC", "MLO"):
            image = np.pad(draw_breast(100, 60, seed=2 * number + (view == "MLO")), ((10, 10), (0, 40)), mode="edge")
            if cancer:
                for x, y in np.random.default_rng(number).integers((10, 35), (40, 85), (6, 2)):
                    cv2.circle(image, (int(x), int(y)), 4, 4095, -1)
            path = folder / f"p{number:02d}_{view}.png"
            cv2.imwrite(str(path), image)
            rows.append(
                {
                    "patient_id": f"p{number:02d}",
                    "path": path.name,
                    "laterality": "L",
                    "view": view,
                    "cancer": cancer,
                    "density": "ABCD"[number % 4],
                    "lesion_type": ("mass", "calcification", "")[number % 3],
                }
            )
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    return folder


def short_run(data_dir: Path, folders: dict[str, Path], output: Path, **changes) -> FinetuneSettings:
    """Settings of a run that takes seconds."""
    chosen = {
        "dataset": "table",
        "data_dir": str(data_dir),
        "task": "cancer",
        "backbone": "mammodino",
        "output_dir": str(output),
        "num_train_epochs": 3,
        "early_stopping_patience": 3,
        "dataloader_num_workers": 0,
        "num_resamples": 50,
        "test_fraction": 0.3,
        "validation_fraction": 0.3,
        "baselines": False,
        **changes,
    }
    return FinetuneSettings(source=str(folders[chosen["backbone"]]), **chosen)


def command_line(settings: FinetuneSettings) -> list[str]:
    """The same run as arguments of training.finetune."""
    return shlex.split(settings.command())[3:]
