"""Boxes carried with images: which images count, and boxes against lesions that are found where they should be."""

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from made_inputs import draw_breast

from modeling_mammodino import InvalidImageError, MammoDinoImageProcessor
from training.evaluation.detection.boxes import load_boxes
from training.evaluation.detection.data import (
    DetectionImages,
    LesionImageRenderer,
    augment,
    collate_images,
    render_training_images,
    to_centers,
    to_corners,
    visible_boxes,
)
from training.settings import generator

CANVAS = {"height": 128, "width": 96}


@pytest.fixture(scope="module")
def renderer() -> LesionImageRenderer:
    return LesionImageRenderer(MammoDinoImageProcessor(size=CANVAS, patch_size=16))


def write_table(folder: Path, rows: list[dict]) -> Path:
    """Drawn breasts, each with the boxes of its row."""
    for number, row in enumerate(rows):
        cv2.imwrite(str(folder / f"{number}.png"), draw_breast(200, 140, seed=number))
        row |= {"path": f"{number}.png", "laterality": "L"}
        row.setdefault("patient_id", f"p{number}")
        row["boxes"] = None if row.get("boxes") is None else json.dumps(row["boxes"])
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    return folder


def box(x0=20.0, y0=80.0, x1=50.0, y1=120.0, frame=-1) -> dict:
    return {"x0": x0, "y0": y0, "x1": x1, "y1": y1, "slice": frame, "label": "mass"}


def test_only_images_whose_lesions_are_known_count(tmp_path):
    rows = [{"lesion": 1, "boxes": [box()]} for _ in range(8)] + [{"lesion": 0, "boxes": []} for _ in range(4)]
    rows += [
        {"lesion": 0},  # known to hold none: nobody had to draw
        {"boxes": []},  # a reader found none
        {"boxes": [box(), box(60, 60, 80, 90)]},
        {"lesion": 1},
        {"lesion": 1, "boxes": []},
        {"lesion": 0, "boxes": [box()]},
        {"cancer": 0},
    ]
    table = load_boxes("table", write_table(tmp_path, rows), test_fraction=0.3, validation_fraction=0.3)
    images = {image.image_id: image for split in table.images.values() for image in split}
    assert sorted(images, key=lambda name: int(name[:-4])) == [f"{number}.png" for number in range(15)]
    assert [len(images[f"{number}.png"].lesions) for number in (0, 11, 12, 13, 14)] == [1, 0, 0, 0, 2]
    assert table.counts["left_out"] == {
        "a lesion without a box": 2,
        "a box without a lesion": 1,
        "nobody looked for lesions": 1,
    }
    assert sum(table.counts[split]["lesions"] for split in ("train", "validation", "test")) == 10
    patients = [{image.patient_id for image in split} for split in table.images.values()]
    assert sum(map(len, patients)) == len(set().union(*patients)) == 15


def test_a_table_without_boxes_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="no image has a box"):
        load_boxes("table", write_table(tmp_path, [{"lesion": 0}, {"lesion": 1}]))


def marked_row(renderer: LesionImageRenderer, tmp_path: Path, side: str):
    """A drawn breast with a bright ellipse, as load_boxes and render_training_images give it back."""
    rows = [{"boxes": [box()]} for _ in range(4)]
    write_table(tmp_path, rows)
    plane = draw_breast(200, 140, seed=0)
    cv2.ellipse(plane, (35, 100), (15, 20), 0, 0, 360, 4095, -1)  # a rectangle would pass for a label
    for number in range(4):
        cv2.imwrite(str(tmp_path / f"{number}.png"), plane if side == "left" else plane[:, ::-1])
    boxes = [box()] if side == "left" else [box(140 - 50, 80, 140 - 20, 120)]
    table = pd.read_csv(tmp_path / "index.csv").assign(boxes=json.dumps(boxes))
    table.to_csv(tmp_path / "index.csv", index=False)
    images = load_boxes("table", tmp_path, test_fraction=0.3, validation_fraction=0.3).images["train"]
    return render_training_images(images, renderer, 1, 0, tmp_path / "cache", num_proc=1)


def bright_box(image: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero((image > 0.97 * image.max()).sum(axis=axis) > 1) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_targets_lie_on_the_lesion_also_after_augmentation(tmp_path, side):
    renderer = LesionImageRenderer(MammoDinoImageProcessor(size=CANVAS, patch_size=16, do_clahe=False))
    rows, refused = marked_row(renderer, tmp_path, side)
    assert not refused and len(rows) == 2
    images, canvas = DetectionImages(rows, renderer, seed=3), (CANVAS["height"], CANVAS["width"])
    corners = []
    for draw in [None, *range(6)]:
        item = images[0 if draw is None else (0, draw)]
        (found,) = to_corners(item["labels"]["boxes"].double().numpy(), canvas)
        np.testing.assert_allclose(found, bright_box(item["pixel_values"][0].numpy()), atol=1.6)
        tissue = item["pixel_values"][1].numpy()
        column, row = ((found[:2] + found[2:]) / 2).astype(int)
        assert tissue[row, column] > 0.5
        corners.append(found)
    assert np.ptp(corners, axis=0).min() > 3  # they do move
    np.testing.assert_array_equal(images[(0, 4)]["pixel_values"], images[(0, 4)]["pixel_values"])


def test_rows_are_found_again_and_a_changed_file_is_not(renderer, tmp_path):
    first, _ = marked_row(renderer, tmp_path, "left")
    made = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*.arrow"))]
    images = load_boxes("table", tmp_path, test_fraction=0.3, validation_fraction=0.3).images["train"]
    render_training_images(images, renderer, 1, 0, tmp_path / "cache", num_proc=1)
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*.arrow"))] == made
    cv2.imwrite(images[0].file, draw_breast(210, 140, seed=9))
    again, _ = render_training_images(images, renderer, 1, 0, tmp_path / "cache", num_proc=1)
    assert again[0]["image"] != first[0]["image"] and again[1]["image"] == first[1]["image"]


def test_a_volume_gives_the_slices_of_its_lesion(renderer, phantom_archive, tmp_path):
    """The phantom's box, drawn by the simulation, lies on its breast; slices beside it have it, too."""
    images = [image for split in load_boxes("phantom", phantom_archive).images.values() for image in split]
    volumes = [image for image in images if image.image_id.endswith("dbt")]
    with_lesion = [image for image in volumes if len(image.lesions)]
    rows, refused = render_training_images(volumes, renderer, 3, 1, tmp_path / "cache", num_proc=1)
    assert not refused
    for image in volumes:
        of = [row for row in rows if row["image_id"] == image.image_id]
        frames = [row["frame"] for row in of]
        if not len(image.lesions):
            assert frames == [1, 3, 5] and not any(row["boxes"] for row in of)
            continue
        (middle,) = image.lesion_slices
        assert frames == [frame for frame in (middle - 1, middle, middle + 1) if 0 <= frame < 6]
        assert all(len(row["boxes"]) == 1 for row in of) and of[0]["boxes"] == of[-1]["boxes"]
        (x0, y0, x1, y1) = of[0]["boxes"][0]
        tissue = np.reshape(of[0]["tissue"], (8, 6))
        assert tissue[int((y0 + y1) / 32), int((x0 + x1) / 32)] > 0.3
    assert len(with_lesion) >= 3
    beyond = with_lesion[0]._replace(lesion_slices=np.array([6]))
    unknown = with_lesion[0]._replace(image_id="unknown", lesion_slices=np.array([-1]))
    rows, refused = render_training_images([beyond, unknown], renderer, 3, 1, tmp_path / "other", num_proc=1)
    assert (
        len(rows) == 0 and "6 slices, from 0; slice 6" in refused[beyond.image_id] and "no slice" in refused["unknown"]
    )


def test_frames_are_those_of_the_file(renderer, phantom_archive):
    file = str(next(phantom_archive.rglob("*_dbt.dcm")))
    every = list(renderer(file))
    assert [each.frame for each in every] == list(range(6)) and every[0].num_frames == 6
    (one,) = renderer(file, [4])
    np.testing.assert_array_equal(one.image, every[4].image)
    with pytest.raises(InvalidImageError, match="slice 6 was asked for"):
        list(renderer(file, [6]))


def test_boxes_that_are_hardly_on_the_canvas_are_no_targets():
    boxes = np.array([[-10, 0, 10, 10], [-90, 0, 10, 10], [200, 0, 300, 10], [10, 10, 20, 20.0]])
    assert visible_boxes(boxes, (100, 100)).tolist() == [[0, 0, 10, 10], [10, 10, 20, 20]]
    assert visible_boxes(np.empty((0, 4)), (100, 100)).shape == (0, 4)


def test_centers_and_corners_are_inverse():
    boxes = np.array([[10.0, 20, 30, 60]])
    np.testing.assert_allclose(to_centers(boxes, (100, 50)), [[0.4, 0.4, 0.4, 0.4]])
    np.testing.assert_allclose(to_corners(to_centers(boxes, (100, 50)), (100, 50)), boxes)


def test_augmentation_keeps_black_black_and_depth():
    image, tissue = np.zeros((64, 48), np.uint16), np.ones((4, 3), np.float32)
    image[8:40, :20] = 65535
    changed, of, boxes = augment(generator(0, 18, 5), image, tissue, np.empty((0, 4)))
    assert changed.dtype == np.uint16 and changed.max() == 65535 and changed.min() == 0 and boxes.shape == (0, 4)
    assert of.shape == tissue.shape and 0 <= of.min() and of.max() <= 1


def test_a_batch_has_a_list_of_labels(renderer, tmp_path):
    rows, _ = marked_row(renderer, tmp_path, "left")
    images = DetectionImages(rows, renderer, seed=0)
    batch = collate_images([images[0], images[1]])
    assert batch["pixel_values"].shape == (2, 2, 128, 96) and len(batch["labels"]) == 2
    assert batch["labels"][0]["boxes"].shape == (1, 4) and batch["labels"][0]["class_labels"].tolist() == [0]
