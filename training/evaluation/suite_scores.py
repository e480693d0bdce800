"""Scores over several seeds, with intervals and paired differences: patients are resampled, jointly for all models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas

from .metrics import METRICS, Interval, interval

# of one model on one task: by seed, a row a tested image; columns patient_id, image_id, label, p_0 .. p_{C-1}
Predictions = Mapping[int, pandas.DataFrame]


@dataclass(frozen=True)
class TaskScores:
    """Scores of several models on one task: each the mean over the seeds that all models have."""

    metric: str
    by_seed: dict[str, dict[int, float]]
    resampled: dict[str, np.ndarray]  # (R,) the same resamples of patients for every model
    num_patients: int

    def value(self, name: str) -> float:
        return float(np.mean(list(self.by_seed[name].values())))

    def score(self, name: str) -> Interval:
        return interval(self.value(name), self.resampled[name])

    def difference(self, a: str, b: str) -> tuple[Interval, float]:
        """a - b on the same patients and seeds, and its two-sided p, not adjusted for other comparisons."""
        apart = self.resampled[a] - self.resampled[b]
        return interval(self.value(a) - self.value(b), apart), two_sided_p(apart)

    def best_of(self, names: list[str]) -> str:
        return max(names, key=self.value)


def score_task(predictions: Mapping[str, Predictions], metric: str, num_resamples: int) -> TaskScores:
    """Of the predictions of each model. A resample draws patients with replacement from all that some seed tested, and
    takes of each seed the rows of those drawn; its score is the mean over the seeds.

    Raises ValueError where no seed is there for all models, or models saw other test images.
    """
    seeds = sorted(set.intersection(*({*each} for each in predictions.values())))
    if not seeds:
        raise ValueError(f"no seed is finished for all of {', '.join(predictions)}")
    check_same_rows(predictions, seeds)
    first = next(iter(predictions.values()))
    patients = np.unique(np.concatenate([first[seed]["patient_id"].astype(str) for seed in seeds]))
    times_drawn = draw_patients(len(patients), num_resamples)  # (R, P)
    by_seed, resampled = {}, {}
    for name, of_seed in predictions.items():
        by_seed[name] = {seed: float(METRICS[metric](*labels_and_probabilities(of_seed[seed]))) for seed in seeds}
        each = [resample(of_seed[seed], patients, times_drawn, METRICS[metric]) for seed in seeds]
        resampled[name] = np.mean(each, axis=0)
    return TaskScores(metric, by_seed, resampled, len(patients))


def draw_patients(num_patients: int, num_resamples: int) -> np.ndarray:
    """(R, P) int: how often each patient is in each resample, the same for every model and task of this size."""
    rng = np.random.default_rng(0)
    return rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=num_resamples)


def resample(rows: pandas.DataFrame, patients: np.ndarray, times_drawn: np.ndarray, metric: Callable) -> np.ndarray:
    """(R,) scores of one seed's predictions; NaN where a resample leaves the score undefined."""
    labels, probabilities = labels_and_probabilities(rows)
    times = times_drawn[:, np.searchsorted(patients, rows["patient_id"].astype(str))]  # (R, n)
    chosen = (np.repeat(np.arange(len(rows)), each) for each in times)
    return np.array([metric(labels[each], probabilities[each]) if len(each) else np.nan for each in chosen])


def two_sided_p(differences: np.ndarray) -> float:
    """Of resampled differences: twice the smaller share on a side of zero, at least 1 / (R + 1)."""
    differences = differences[~np.isnan(differences)]
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(differences) + 1)))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for their number (Holm, Scand. J. Statist. 6 (1979) 65), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def labels_and_probabilities(rows: pandas.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(n,) int and (n, C) float; columns of classes that the task does not have are empty and left out."""
    columns = sorted((name for name in rows if name.startswith("p_")), key=lambda name: int(name[2:]))
    return rows["label"].to_numpy(int), rows[columns].dropna(axis=1, how="all").to_numpy(float)


def check_same_rows(predictions: Mapping[str, Predictions], seeds: list[int]) -> None:
    for seed in seeds:
        first, *rest = predictions
        expected = set(zip(*(predictions[first][seed][name] for name in ("patient_id", "image_id")), strict=True))
        for name in rest:
            found = set(zip(*(predictions[name][seed][key] for key in ("patient_id", "image_id")), strict=True))
            if found != expected:
                raise ValueError(
                    f"seed {seed}: {first} was tested on {len(expected)} images, {name} on {len(found)}, not the "
                    "same ones: the data changed between the runs; remove the older runs and start again"
                )
