"""The scores of `metrics` in the form that users of Trainer and `evaluate` know. Works without a network."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from .metrics import METRICS, metric_names, score


class MammographyScores(evaluate.Metric):
    """`compute(predictions=..., references=...)`: probabilities (n, C) and labels (n,) 0..C-1 -> one number a metric.

    Args:
        num_classes: C.
        ordered: whether the classes have an order, as densities have: quadratic kappa is given then.
        metrics: names of METRICS; None: all that such a task has.

    Usable as `compute_metrics` of transformers' Trainer through `of_trainer`.
    """

    def __init__(self, num_classes: int, ordered: bool = True, metrics: Sequence[str] | None = None, **kwargs):
        if unknown := [name for name in metrics or () if name not in METRICS]:
            raise ValueError(f"metric {unknown[0]!r}: must be one of {', '.join(METRICS)}")
        self.num_classes = num_classes
        self.metrics = list(metrics or metric_names(num_classes, ordered))
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="AUC, average precision, F1, balanced accuracy, quadratic kappa, sensitivity at fixed "
            "specificity. Research use only.",
            citation="",
            inputs_description="predictions: probabilities of the C classes; references: class numbers",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        labels, probabilities = np.asarray(references), np.asarray(predictions, float)
        if probabilities.ndim != 2 or probabilities.shape[1] != self.num_classes:
            raise ValueError(f"predictions have shape {probabilities.shape}, not (n, {self.num_classes})")
        if not np.isfinite(probabilities).all():
            raise ValueError("predictions are not finite: training diverged; lower learning_rate, or leave bf16 off")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"references go from {labels.min()} to {labels.max()}, not 0 to {self.num_classes - 1}")
        return {name: score(labels, probabilities, name) for name in self.metrics}

    def of_trainer(self, predictions: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """`compute_metrics` of a Trainer whose model returns logarithms of probabilities, or logits."""
        logits, labels = predictions
        logits = logits.astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return self.compute(predictions=exponentials / exponentials.sum(axis=1, keepdims=True), references=labels)
