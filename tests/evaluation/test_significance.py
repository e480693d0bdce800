"""Scores over seeds: means, paired bootstrap by patient against DeLong's formula, p-values, Holm's adjustment."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from training.evaluation.significance import holm, labels_and_probabilities, score_task, two_sided_p


def predictions(signal: float, seed: int, model: int = 0, num_patients: int = 80, images: int = 2) -> pd.DataFrame:
    """Patients of `images` images each with one label of this seed; higher signal, better ranked."""
    rng = np.random.default_rng(1000 + seed)
    label = np.repeat(rng.integers(0, 2, num_patients), images)
    noise = np.random.default_rng([seed, model]).normal(size=len(label))
    p = 1 / (1 + np.exp(-(signal * (label - 0.5) + noise)))
    patient = np.repeat([f"P{number}" for number in range(num_patients)], images)
    return pd.DataFrame(
        {"image_id": np.arange(len(label)).astype(str), "patient_id": patient, "label": label, "p_0": 1 - p, "p_1": p}
    )


def test_a_score_is_the_mean_over_seeds():
    by_seed = {seed: predictions(1.0, seed) for seed in (0, 1, 2)}
    scored = score_task({"a": by_seed}, "auc", 50)
    expected = np.mean([roc_auc_score(rows["label"], rows["p_1"]) for rows in by_seed.values()])
    assert scored.score("a").value == pytest.approx(expected)
    assert scored.num_patients == 80


def test_resamples_take_whole_patients_and_are_shared_by_all_models():
    rows = {seed: predictions(1.0, seed) for seed in (0, 1)}
    scored = score_task({"a": rows, "b": rows}, "auc", 40)
    np.testing.assert_array_equal(scored.resampled["a"], scored.resampled["b"])
    assert scored.difference("a", "b")[0] == (0, 0, 0)
    # an oracle: patients drawn by hand with the same counts
    patients = np.unique(rows[0]["patient_id"])
    counts = np.random.default_rng(0).multinomial(80, np.full(80, 1 / 80), size=40)[0]
    scores = []
    for each in rows.values():
        drawn = pd.concat(
            [each[each["patient_id"] == p] for p, n in zip(patients, counts, strict=True) for _ in range(n)]
        )
        scores.append(roc_auc_score(drawn["label"], drawn["p_1"]))
    assert scored.resampled["a"][0] == pytest.approx(np.mean(scores))


def test_a_clear_difference_is_found_and_a_chance_one_is_not():
    strong, weak = ({seed: predictions(signal, seed) for seed in (0, 1)} for signal in (3.0, 0.3))
    scored = score_task({"strong": strong, "weak": weak}, "auc", 300)
    difference, p = scored.difference("strong", "weak")
    assert difference.low > 0 and p < 0.01
    again = {seed: predictions(0.3, seed, model=1) for seed in (0, 1)}
    _, p = score_task({"a": weak, "b": again}, "auc", 300).difference("a", "b")
    assert p > 0.05


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Coverage over many data sets whose true AUC is known: normal scores one unit apart, Phi(1 / sqrt 2) = 0.760."""
    hits = 0
    for trial in range(40):
        low, high = score_task({"a": {0: independent(trial)}}, "auc", 100).score("a")[1:]
        hits += low <= 0.760 <= high
    assert hits >= 34


def independent(trial: int) -> pd.DataFrame:
    rng = np.random.default_rng(trial)
    label = np.arange(120) % 2
    score = rng.normal(size=120) + label
    names = [f"{number:03d}" for number in range(120)]
    return pd.DataFrame({"image_id": names, "patient_id": names, "label": label, "p_0": -score, "p_1": score})


def test_models_that_saw_other_images_are_not_compared():
    with pytest.raises(ValueError, match="a was tested on 160 rows, b on 158"):
        score_task({"a": {0: predictions(1, 0)}, "b": {0: predictions(1, 0).iloc[2:]}}, "auc", 10)


def test_without_a_common_seed_there_is_no_comparison():
    with pytest.raises(ValueError, match="no seed"):
        score_task({"a": {0: predictions(1, 0)}, "b": {1: predictions(1, 1)}}, "auc", 10)


def test_classes_that_a_task_lacks_are_left_out():
    rows = predictions(1, 0).assign(p_2=np.nan, p_10=np.nan)
    _, probabilities = labels_and_probabilities(rows)
    np.testing.assert_array_equal(probabilities, rows[["p_0", "p_1"]])


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.04 times 3, 2, 1, made monotonous
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_p_counts_both_sides_and_is_never_zero():
    assert two_sided_p(np.ones(99)) == pytest.approx(0.02)
    assert two_sided_p(np.array([-1.0, 1.0] * 50)) == 1.0
    assert two_sided_p(np.array([np.nan, 1.0])) == 1.0


def delong(labels, scores_a, scores_b):
    """Difference of two correlated AUCs and its standard error (DeLong et al. 1988), from their placement values."""
    placements = []
    for scores in (scores_a, scores_b):
        pairs = scores[labels == 1][:, None] - scores[labels == 0]
        wins = (pairs > 0) + 0.5 * (pairs == 0)
        placements.append((wins.mean(axis=1), wins.mean(axis=0)))
    of_positives, of_negatives = (placements[0][side] - placements[1][side] for side in (0, 1))
    variance = of_positives.var(ddof=1) / len(of_positives) + of_negatives.var(ddof=1) / len(of_negatives)
    return of_positives.mean(), np.sqrt(variance)


def two_models(seed, gain, num_patients=300):
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=num_patients)
    shared = rng.normal(size=num_patients) + labels
    a, b = (shared + rng.normal(size=num_patients) + extra * labels for extra in (gain, 0))
    return labels, a, b


def paired(labels, a, b, patients, num_resamples):
    """Difference of two models with its interval, and p; their scores by hand."""
    names = [f"{number:05d}" for number in range(len(labels))]
    table = pd.DataFrame({"patient_id": [f"{each:05d}" for each in patients], "image_id": names, "label": labels})
    models = {name: {0: table.assign(p_0=-scores, p_1=scores)} for name, scores in (("a", a), ("b", b))}
    return score_task(models, "auc", num_resamples).difference("a", "b")


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_the_paired_bootstrap_agrees_with_delong(gain):
    labels, a, b = two_models(3, gain)
    found, p_value_found = paired(labels, a, b, np.arange(300), 2000)
    difference, error = delong(labels, a, b)
    assert found.value == pytest.approx(difference)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    p_value = 2 * stats.norm.sf(abs(difference) / error)
    assert p_value_found == pytest.approx(p_value, abs=0.03)
    assert (p_value_found < 0.05) == (not found.low <= 0 <= found.high)


def test_no_difference_is_found_as_seldom_as_the_level_says():
    found = 0
    for seed in range(60):
        labels, a, b = two_models(seed, 0.0, num_patients=80)
        found += paired(labels, a, b, np.arange(80), 200)[1] < 0.1
    assert 1 <= found <= 14  # of 60 at the level 0.1: 6 expected, within four standard deviations


def test_images_of_a_patient_are_no_news():
    """Each image four times over, under one patient, changes neither interval nor p-value."""
    labels, a, b = two_models(4, 0.3)
    one, _ = paired(labels, a, b, np.arange(300), 300)
    four, _ = paired(*(np.repeat(each, 4) for each in (labels, a, b, np.arange(300))), 300)
    assert np.allclose(one, four)
    assert paired(labels, a, a, np.arange(300), 300) == ((0, 0, 0), 1)
