"""How well lesions are found: average precision over boxes, and sensitivity at a few false positives an image (FROC).

An image is a mammogram or a whole DBT volume. FROC (Bunch et al., 1978): a prediction that hits a lesion is no false
positive, also where the lesion was found already; a lesion is found at a threshold if any prediction of that score hits
it; false positives are counted over all images, with and without lesions. Average precision is COCO's (pycocotools):
there a second box on one lesion is wrong; of a volume the depth is not evaluated by it.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.evaluation.metrics import Interval, bootstrap_weights, interval

FALSE_POSITIVES = (1, 2, 4)
DEPTH_FRACTION = 0.25  # of the slices of a volume, before and after a lesion's: the DBTex challenge's rule
CHALLENGE_PX = 100  # of the source, as in that challenge


class Found(NamedTuple):
    """The lesions of one image and what was predicted there, in pixels of the source; boxes are x0, y0, x1, y1."""

    image_id: str
    patient_id: str
    num_slices: int  # 1 of a mammogram, whose slices below do not count
    lesions: np.ndarray  # (g, 4) float
    lesion_slices: np.ndarray  # (g,) int; -1 where unknown: any depth will do
    boxes: np.ndarray  # (n, 4) float
    slices: np.ndarray  # (n,) int
    scores: np.ndarray  # (n,) float
    mask: tuple[float, str] = (float("nan"), "")  # as of `LesionImage`, the worst slice's


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return intersection over union, (n, g); 0 where either is empty."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(np.clip(each[:, 2:] - each[:, :2], 0, None), axis=1) for each in (boxes, others)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def overlaps(boxes: np.ndarray, lesions: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Tell where intersection over union is at least `iou_threshold`."""
    return iou(boxes, lesions) >= iou_threshold


def is_centered(boxes: np.ndarray, lesions: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Tell where the prediction's center lies in the lesion's box, its edge included."""
    centers = _centers(boxes)[:, None]
    return np.all((centers >= lesions[None, :, :2]) & (centers <= lesions[None, :, 2:]), axis=2)


def is_near(boxes: np.ndarray, lesions: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Tell where the centers are at most half the lesion's diagonal apart, or 100 pixels of the source where that is
    more: the rule of DBTex (Konz et al., JAMA Netw Open 2023; mazurowski-lab/duke-dbt-data)."""
    distance = np.linalg.norm(_centers(boxes)[:, None] - _centers(lesions)[None], axis=2)
    half_diagonal = np.linalg.norm(lesions[:, 2:] - lesions[:, :2], axis=1) / 2
    return distance <= np.maximum(half_diagonal, CHALLENGE_PX)[None]


HITS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "center": is_centered,
    "iou": overlaps,
    "dbt_challenge": is_near,
}


def hits(found: Found, rule: str, iou_threshold: float) -> np.ndarray:
    """Tell which prediction hits which lesion, (n, g) bool; in a volume, within a quarter of the slices."""
    hit = HITS[rule](found.boxes, found.lesions, iou_threshold)
    if found.num_slices > 1:
        away = np.abs(found.slices[:, None] - found.lesion_slices[None])
        hit &= (away <= DEPTH_FRACTION * found.num_slices) | (found.lesion_slices[None] < 0)
    return hit


def best_scores(found: Found, hit: np.ndarray) -> np.ndarray:
    """Return the best score that hits each lesion, (g,), -inf where none does; hit: (n, g) as `hits` gives it."""
    return np.max(np.where(hit, found.scores[:, None], -np.inf), axis=0, initial=-np.inf)


def merge_boxes(
    boxes: np.ndarray, slices: np.ndarray, scores: np.ndarray, num_slices: int, iou_threshold: float, limit: int = 100
) -> np.ndarray:
    """Suppress non-maxima through a volume; return the rows kept, the best first, `limit` at most.

    A box is dropped where a better one overlaps it by more than `iou_threshold` within a quarter of the slices.
    """
    kept: list[int] = []
    for row in np.argsort(-scores, kind="stable"):
        near = np.abs(slices[kept] - slices[row]) <= DEPTH_FRACTION * num_slices
        if not (near & (iou(boxes[row][None], boxes[kept])[0] > iou_threshold)).any():
            kept.append(int(row))
            if len(kept) == limit:
                break
    return np.array(kept, dtype=int)


class FrocMarks(NamedTuple):
    """All images' false positives, the best first, and lesions with the score they are found at (-inf: by none)."""

    false_scores: np.ndarray  # (f,)
    false_images: np.ndarray  # (f,) number of the image
    lesion_scores: np.ndarray  # (l,)
    lesion_images: np.ndarray  # (l,)
    num_images: int


def froc_marks(found: list[Found], rule: str, iou_threshold: float) -> FrocMarks:
    """Collect the marks of all images; rule: of HITS."""
    false_scores, false_images, lesion_scores, lesion_images = [], [], [], []
    for number, each in enumerate(found):
        hit = hits(each, rule, iou_threshold)  # (n, g)
        wrong = each.scores[~hit.any(axis=1)]
        best = best_scores(each, hit)
        false_scores.append(wrong)
        false_images.append(np.full(len(wrong), number))
        lesion_scores.append(best)
        lesion_images.append(np.full(len(best), number))
    scores, images = np.concatenate(false_scores), np.concatenate(false_images)
    order = np.argsort(-scores, kind="stable")
    return FrocMarks(
        scores[order], images[order], np.concatenate(lesion_scores), np.concatenate(lesion_images), len(found)
    )


def sensitivity_at(marks: FrocMarks, false_positives: float, weights: np.ndarray | None = None) -> float:
    """Return the largest share of lesions found by a threshold with at most so many false positives an image.

    weights (num_images,): how often an image counts, as in a bootstrap resample. NaN where there is no lesion.
    """
    weights = np.ones(marks.num_images) if weights is None else weights
    lesion_weights = weights[marks.lesion_images]
    if not lesion_weights.any():
        return float("nan")
    too_many = np.cumsum(weights[marks.false_images]) > false_positives * weights.sum()
    # the threshold stands just above the first false positive that is one too many
    limit = marks.false_scores[too_many.argmax()] if too_many.any() else -np.inf
    return float(lesion_weights[marks.lesion_scores > limit].sum() / lesion_weights.sum())


def froc_curve(marks: FrocMarks) -> tuple[np.ndarray, np.ndarray]:
    """Return false positives an image and sensitivity as the threshold falls, from (0, ...) to all false positives."""
    false_positives = np.arange(len(marks.false_scores) + 1) / marks.num_images
    return false_positives, np.array([sensitivity_at(marks, each) for each in false_positives])


class CocoMatches(NamedTuple):
    """pycocotools' matches of all images' predictions, the best first."""

    is_hit: np.ndarray  # (10, n) bool, at IoU 0.50, 0.55, ..., 0.95
    images: np.ndarray  # (n,) number of the image
    num_lesions: np.ndarray  # (num_images,)


def coco_matches(found: list[Found]) -> CocoMatches:
    """Match predictions and lesions by pycocotools."""
    annotations: dict[str, list[dict]] = {"lesions": [], "boxes": []}
    for number, each in enumerate(found, start=1):  # pycocotools takes id 0 for none
        for name, boxes, scores in (("lesions", each.lesions, None), ("boxes", each.boxes, each.scores)):
            for row, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
                one: dict[str, Any] = {
                    "id": len(annotations[name]) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "iscrowd": 0,
                }
                one |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
                annotations[name].append(one if scores is None else {**one, "score": float(scores[row])})
    with contextlib.redirect_stdout(io.StringIO()):
        truth, predicted = COCO(), COCO()
        for coco, name in ((truth, "lesions"), (predicted, "boxes")):
            every_image = [{"id": number} for number in range(1, len(found) + 1)]
            coco.dataset = {"images": every_image, "annotations": annotations[name], "categories": [{"id": 1}]}
            coco.createIndex()
        evaluation = COCOeval(truth, predicted, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    matched = [each for each in evaluation.evalImgs if each is not None]
    scores = np.concatenate([np.empty(0), *(each["dtScores"] for each in matched)])
    images = [np.full(len(each["dtScores"]), each["image_id"] - 1) for each in matched]
    hit = [np.asarray(each["dtMatches"]) > 0 for each in matched]
    order = np.argsort(-scores, kind="stable")
    return CocoMatches(
        np.concatenate([np.empty((10, 0), bool), *hit], axis=1)[:, order],
        np.concatenate([np.empty(0, int), *images])[order],
        np.array([len(each.lesions) for each in found]),
    )


def average_precision(matches: CocoMatches, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Return AP at an IoU of 0.5, and the mean of AP over IoU 0.50, 0.55, ..., 0.95; AP is the mean of the largest
    precision at a recall of at least 0, 0.01, ..., 1 (COCO). Weights as in `sensitivity_at`; NaN where there is no
    lesion."""
    weights = np.ones(len(matches.num_lesions)) if weights is None else weights
    if not (num_lesions := (weights * matches.num_lesions).sum()):
        return float("nan"), float("nan")
    each = weights[matches.images]  # (n,)
    hit = np.cumsum(each * matches.is_hit, axis=1)  # (10, n)
    precision = hit / np.maximum(np.cumsum(each), 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))  # a recall that is not reached has precision 0
    recall = hit / num_lesions
    levels = np.linspace(0, 1, 101)
    by_iou = [
        row[np.searchsorted(reached, levels, side="left")].mean()
        for row, reached in zip(precision, recall, strict=True)
    ]
    return float(by_iou[0]), float(np.mean(by_iou))


def evaluate(found: list[Found], rule: str, iou_threshold: float, num_resamples: int, seed: int) -> dict[str, Interval]:
    """Return `map_50`, `map` and `sensitivity_at_{1,2,4}`, with 95 % intervals over patients."""
    marks, matches = froc_marks(found, rule, iou_threshold), coco_matches(found)

    def scores(weights: np.ndarray) -> list[float]:
        sensitivities = [sensitivity_at(marks, each, weights) for each in FALSE_POSITIVES]
        return [*average_precision(matches, weights), *sensitivities]

    names = ["map_50", "map", *(f"sensitivity_at_{each}" for each in FALSE_POSITIVES)]
    values = scores(np.ones(len(found)))
    patients = np.array([each.patient_id for each in found])
    resampled = [scores(each) for block in bootstrap_weights(patients, num_resamples, seed) for each in block]
    return {name: interval(values[k], np.array(resampled)[:, k]) for k, name in enumerate(names)}


def _centers(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, :2] + boxes[:, 2:]) / 2
