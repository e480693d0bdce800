"""What does a linear probe cost? Ours, its penalty chosen on a validation part, beside one fit of scikit-learn.

python -m performance.linear_probe [--images 50000] [--width 768] [--classes 2 4] [--repeats 3] [--threads 2]

Features are drawn with a spectrum like an encoder's: correlated, their variance falling with the power 1.4 of the rank
of their axis. The peer is `StandardScaler` and `LogisticRegression` with its defaults, but for as many steps as it
needs; it fits one penalty, C = 1, where ours tries up to 13 and keeps the best. In turn, in one process.
"""

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from training.evaluation.finetuning.heads import fit_linear_probe

VALIDATION_FRACTION = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.linear_probe", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = f"numpy {np.__version__}, scikit-learn {sklearn.__version__}"
    print(f"{options.images} x {options.width} float32, {options.threads} threads, {platform.machine()}; {versions}")
    print(f"{options.repeats} repeats, median (min, max)")
    print("| classes | way | seconds | CPU seconds | penalties | validation loss |")
    print("|---" * 6 + "|")
    with threadpool_limits(options.threads):
        for num_classes in options.classes:
            for row in measure(options, num_classes):
                print(f"| {num_classes} | {row} |", flush=True)


def measure(options: argparse.Namespace, num_classes: int) -> list[str]:
    features, labels = draw(options.images, options.width, num_classes)
    first = int(VALIDATION_FRACTION * options.images)
    validation, learn = slice(first), slice(first, None)

    def ours() -> tuple[int, float]:
        probe = fit_linear_probe(
            features[learn], labels[learn], features[validation], labels[validation], np.ones(num_classes)
        )
        return len(probe.validation_losses), loss(probe.head.probabilities(features[validation]), labels[validation])

    def theirs() -> tuple[int, float]:
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
        pipeline.fit(features[learn], labels[learn])
        return 1, loss(pipeline.predict_proba(features[validation]), labels[validation])

    ways = {"ours": ours, "scikit-learn": theirs}
    times = {way: [] for way in ways}
    found = {}
    for _ in range(options.repeats):
        for way, fit in ways.items():
            found[way], *seconds = stopwatch(fit)
            times[way].append(seconds)
    rows = []
    for way, (penalties, validation_loss) in found.items():
        wall, cpu = (spread(each) for each in zip(*times[way], strict=True))
        rows.append(f"{way} | {wall} | {cpu} | {penalties} | {validation_loss:.4f}")
    return rows


def draw(num_images: int, width: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, F) float32 and labels (n,) of a linear model of them, with noise."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(width, width)))[0]
    rank = np.arange(1, width + 1)
    hidden = rng.normal(size=(num_images, width))
    logits = hidden @ (rng.normal(size=(width, num_classes)) * rank[:, None] ** -1.0)
    labels = (1.5 * logits / logits.std() + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return ((hidden * rank**-0.7) @ axes).astype(np.float32), labels


def loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


def stopwatch(fit: Callable) -> tuple[tuple[int, float], float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = fit()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def spread(seconds: list[float]) -> str:
    return f"{np.median(seconds):.1f} ({min(seconds):.1f}, {max(seconds):.1f})"


if __name__ == "__main__":
    main()
