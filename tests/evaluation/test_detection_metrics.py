"""Scores of detection against slow oracles: loops over thresholds, and pycocotools' own summary."""

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.evaluation.detection.lesion_metrics import (
    HITS,
    Found,
    average_precision,
    coco_matches,
    evaluate,
    froc_curve,
    froc_marks,
    hits,
    iou,
    merge_boxes,
    sensitivity_at,
)


def made_up(seed: int, num_images: int = 30, num_slices: int = 1, ties: bool = False) -> list[Found]:
    """Images with no, one or two lesions, near some of which something is predicted."""
    rng, found = np.random.default_rng(seed), []
    for number in range(num_images):
        count = int(rng.integers(0, 3))
        corner, size = rng.uniform(0, 800, (count, 2)), rng.uniform(30, 150, (count, 2))
        lesions = np.concatenate((corner, corner + size), axis=1)
        near = np.repeat(lesions, 2, axis=0) + rng.normal(0, 25, (2 * count, 4))
        far = rng.uniform(0, 800, (6, 2))
        boxes = np.concatenate((near, np.concatenate((far, far + rng.uniform(20, 200, (6, 2))), axis=1)))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = rng.uniform(0, 1, len(boxes)) + 0.3 * (np.arange(len(boxes)) < 2 * count)
        scores = scores.round(1) if ties else scores
        slices, depths = rng.integers(0, num_slices, len(boxes)), rng.integers(0, num_slices, count)
        found.append(Found(f"i{number}", f"p{number // 2}", num_slices, lesions, depths, boxes, slices, scores))
    return found


def one_hit(rule: str, box, lesion, depth: int, slice_: int, num_slices: int, least_iou: float) -> bool:
    """One prediction and one lesion, in scalars."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    if num_slices > 1 and abs(depth - slice_) > num_slices / 4:
        return False
    if rule == "center":
        return lesion[0] <= x <= lesion[2] and lesion[1] <= y <= lesion[3]
    if rule == "dbt_challenge":
        width, height = lesion[2] - lesion[0], lesion[3] - lesion[1]
        away = math.hypot(x - lesion[0] - width / 2, y - lesion[1] - height / 2)
        return away <= max(math.hypot(width, height) / 2, 100)
    across = max(0, min(box[2], lesion[2]) - max(box[0], lesion[0]))
    down = max(0, min(box[3], lesion[3]) - max(box[1], lesion[1]))
    area = (box[2] - box[0]) * (box[3] - box[1]) + (lesion[2] - lesion[0]) * (lesion[3] - lesion[1]) - across * down
    return across * down / area >= least_iou


def slow_sensitivity(found: list[Found], rule: str, least_iou: float, false_positives: float) -> float:
    """Every threshold in turn, every image, every prediction."""
    best, thresholds = 0.0, {math.inf, *(float(score) for each in found for score in each.scores)}
    for threshold in thresholds:
        wrong, seen, lesions = 0, 0, 0
        for each in found:
            lesions += len(each.lesions)
            hit_lesions = set()
            for box, slice_, score in zip(each.boxes, each.slices, each.scores, strict=True):
                if score < threshold:
                    continue
                hit = {
                    k
                    for k, (lesion, depth) in enumerate(zip(each.lesions, each.lesion_slices, strict=True))
                    if one_hit(rule, box, lesion, depth, slice_, each.num_slices, least_iou)
                }
                wrong += not hit
                hit_lesions |= hit
            seen += len(hit_lesions)
        if wrong <= false_positives * len(found):
            best = max(best, seen / lesions)
    return best


@pytest.mark.parametrize("rule", list(HITS))
@pytest.mark.parametrize("num_slices, ties", [(1, False), (40, False), (40, True)])
def test_sensitivity_at_false_positives_is_that_of_the_best_threshold(rule, num_slices, ties):
    found = made_up(3, 16, num_slices, ties)
    marks = froc_marks(found, rule, 0.3)
    for false_positives in (0, 0.5, 1, 2, 4, 100):
        expected = slow_sensitivity(found, rule, 0.3, false_positives)
        assert sensitivity_at(marks, false_positives) == pytest.approx(expected)
    rising = froc_curve(marks)
    assert (np.diff(rising[1]) >= 0).all() and rising[1][-1] == sensitivity_at(marks, 100)


def test_rules_at_their_edges():
    lesion = np.array([[100.0, 200, 160, 280]])  # half its diagonal is 50

    def hit(rule: str, center: tuple[float, float], slice_: int = 0, num_slices: int = 1, depth: int = 0) -> bool:
        box = np.array([[center[0] - 5, center[1] - 5, center[0] + 5, center[1] + 5]])
        found = Found("i", "p", num_slices, lesion, np.array([depth]), box, np.array([slice_]), np.ones(1))
        return bool(hits(found, rule, 0.1)[0, 0])

    assert hit("center", (160, 280)) and not hit("center", (160.1, 240))
    assert hit("dbt_challenge", (230, 240)) and not hit("dbt_challenge", (230.1, 240))  # 100 pixels, not 50
    assert hit("dbt_challenge", (130, 240), slice_=20, num_slices=40, depth=10)
    assert not hit("dbt_challenge", (130, 240), slice_=21, num_slices=40, depth=10)
    assert hit("center", (130, 240), slice_=39, num_slices=40, depth=-1)  # a depth that nobody noted
    assert not hit("iou", (130, 240))  # 100 of 4800 pixels
    assert iou(np.array([[0, 0, 4, 4.0]]), np.array([[2, 0, 6, 4.0]])) == pytest.approx(8 / 24)


def test_average_precision_is_pycocotools_own():
    for seed in range(3):
        found = made_up(seed, ties=seed == 2)
        truth, predicted = COCO(), []
        truth.dataset = {"images": [{"id": k} for k in range(len(found))], "annotations": [], "categories": [{"id": 7}]}
        for k, each in enumerate(found):
            for lesion in each.lesions:
                box = [*lesion[:2], *(lesion[2:] - lesion[:2])]
                truth.dataset["annotations"].append(
                    {"id": len(truth.dataset["annotations"]) + 1, "image_id": k, "category_id": 7, "iscrowd": 0,
                     "bbox": box, "area": box[2] * box[3]}
                )  # fmt: skip
            predicted += [
                {"image_id": k, "category_id": 7, "score": score, "bbox": [*box[:2], *(box[2:] - box[:2])]}
                for box, score in zip(each.boxes, each.scores, strict=True)
            ]
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(predicted), "bbox")
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        assert average_precision(coco_matches(found)) == pytest.approx(
            (evaluation.stats[1], evaluation.stats[0]), abs=1e-9
        )


def test_weights_are_images_that_repeat():
    found = made_up(5)
    rows = np.random.default_rng(0).integers(0, len(found), len(found))
    weights, repeated = np.bincount(rows, minlength=len(found)), [found[row] for row in np.sort(rows)]
    assert average_precision(coco_matches(found), weights) == pytest.approx(average_precision(coco_matches(repeated)))
    for false_positives in (0.5, 1, 4):
        assert sensitivity_at(froc_marks(found, "center", 0), false_positives, weights) == pytest.approx(
            sensitivity_at(froc_marks(repeated, "center", 0), false_positives)
        )


def test_one_known_case_by_hand():
    """Two lesions, one found by the second best box; AP is 1/2 up to recall 1/2, so 51 of 101 points at 1/2."""
    lesions, none = np.array([[0.0, 0, 10, 10], [50, 50, 60, 60]]), np.empty((0, 4))
    found = [
        Found("a", "p", 1, lesions, np.zeros(2, int), lesions[:1], np.zeros(1, int), np.array([0.5])),
        Found("b", "q", 1, none, np.empty(0, int), lesions[:1], np.zeros(1, int), np.array([0.9])),
    ]
    assert average_precision(coco_matches(found)) == pytest.approx((51 / 101 / 2, 51 / 101 / 2))
    marks = froc_marks(found, "center", 0)
    assert sensitivity_at(marks, 0.5) == 0.5 and sensitivity_at(marks, 0.4) == 0
    scores = evaluate(found, "center", 0.1, 50, seed=0)
    assert scores["sensitivity_at_1"].value == 0.5 and scores["map_50"].low <= scores["map_50"].value


def test_no_prediction_and_no_lesion_are_not_errors():
    none = np.empty((0, 4))
    lesion, zero = np.array([[0.0, 0, 10, 10]]), np.zeros(0)
    silent = [Found("a", "p", 1, lesion, np.zeros(1, int), none, np.zeros(0, int), zero)]
    assert average_precision(coco_matches(silent)) == (0, 0)
    assert sensitivity_at(froc_marks(silent, "iou", 0.1), 4) == 0
    healthy = [Found("a", "p", 1, none, np.zeros(0, int), lesion, np.zeros(1, int), np.ones(1))]
    assert np.isnan(average_precision(coco_matches(healthy))).all()
    assert np.isnan(sensitivity_at(froc_marks(healthy, "iou", 0.1), 4))


def test_intervals_take_patients_whole():
    """Two images a patient, equal in all: an interval over images would be about sqrt(2) narrower."""
    single = made_up(7, 40)
    alone = [each._replace(patient_id=each.image_id) for each in single]
    doubled = [each._replace(image_id=each.image_id + side) for each in alone for side in "lr"]
    width = {}
    for name, found in (("alone", alone), ("doubled", doubled)):
        score = evaluate(found, "center", 0.1, 200, seed=1)["sensitivity_at_1"]
        width[name] = score.high - score.low
        assert score.low <= score.value <= score.high
    assert width["doubled"] == pytest.approx(width["alone"], rel=0.02)


def test_boxes_merge_through_a_quarter_of_the_slices():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [40, 40, 50, 50.0]])
    slices, scores = np.array([10, 20, 21, 10]), np.array([0.9, 0.8, 0.7, 0.6])
    assert merge_boxes(boxes, slices, scores, 40, 0.3).tolist() == [0, 2, 3]
    assert merge_boxes(boxes, slices, scores, 40, 0.3, limit=1).tolist() == [0]
    assert merge_boxes(boxes, slices, scores, 40, 0.9).tolist() == [0, 1, 3]  # IoU 9 / 11; the last two are one box
    assert merge_boxes(np.empty((0, 4)), np.empty(0, int), np.empty(0), 40, 0.3).tolist() == []
