"""Scores over several seeds, and whether one model is better than another: patients are resampled, for all jointly."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .metrics import METRICS, Interval, interval, joint_bootstrap_weights, score

# of one model on one task: by seed, a row a tested image (breast, patient); columns patient_id, breast_id, image_id
# where they apply, label, p_0 .. p_{C-1}
Predictions = Mapping[int, pd.DataFrame]
IDENTIFIERS = ("patient_id", "breast_id", "image_id")


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
    """Score the predictions of each model. A resample draws patients with replacement from all that some seed tested,
    and takes of each seed the rows of those drawn; its score is the mean over the seeds.

    Raises ValueError where no seed is there for all models, or models were tested on other rows.
    """
    seeds = sorted(set.intersection(*({*each} for each in predictions.values())))
    if not seeds:
        raise ValueError(f"no seed is finished for all of {', '.join(predictions)}")
    sorted_rows = {name: {seed: _in_order(of_seed[seed]) for seed in seeds} for name, of_seed in predictions.items()}
    _check_same_rows(sorted_rows, seeds)
    first = next(iter(sorted_rows.values()))
    patients = {seed: first[seed]["patient_id"].astype(str).to_numpy() for seed in seeds}
    weights = joint_bootstrap_weights(patients, num_resamples)
    num_patients = len(set().union(*patients.values()))
    by_seed, resampled = {}, {}
    for name, of_seed in sorted_rows.items():
        seen = {seed: labels_and_probabilities(rows) for seed, rows in of_seed.items()}
        by_seed[name] = {seed: score(*each, metric) for seed, each in seen.items()}
        resampled[name] = np.mean([METRICS[metric](*seen[seed], weights[seed]) for seed in seeds], axis=0)
    return TaskScores(metric, by_seed, resampled, num_patients)


def two_sided_p(differences: np.ndarray) -> float:
    """Return the level at which the percentile interval of resampled differences would just touch 0: twice the share on
    the rarer side of 0, the observed one counted in (Davison and Hinkley 1997, sections 4.2 and 5.2), so never below 2
    / (R + 1). Resamples in which a score is undefined do not count."""
    defined = differences[~np.isnan(differences)]
    rarer = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2 * (1 + rarer) / (1 + len(defined)))) if len(defined) else float("nan")


def holm(p_values: list[float]) -> list[float]:
    """Adjust p-values for their number (Holm, Scand. J. Statist. 6 (1979) 65), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def labels_and_probabilities(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return (n,) int and (n, C) float; columns of classes that the task does not have are empty and left out."""
    columns = sorted((name for name in rows if name.startswith("p_")), key=lambda name: int(name[2:]))
    return rows["label"].to_numpy(int), rows[columns].dropna(axis=1, how="all").to_numpy(float)


def _in_order(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values([name for name in IDENTIFIERS if name in rows], ignore_index=True)


def _check_same_rows(predictions: Mapping[str, Predictions], seeds: list[int]) -> None:
    for seed in seeds:
        first, *rest = predictions
        expected = predictions[first][seed]
        compared = [name for name in (*IDENTIFIERS, "label") if name in expected]
        for name in rest:
            found = predictions[name][seed]
            if len(found) != len(expected) or not found[compared].equals(expected[compared]):
                raise ValueError(
                    f"seed {seed}: {first} was tested on {len(expected)} rows, {name} on {len(found)}, not the same "
                    "ones: the data changed between the runs, or one refused a file; remove the older and run again"
                )
