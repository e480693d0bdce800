"""The readout: rings and shifts by hand, centers where boxes are, folds of patients, images kept for the next call."""

from itertools import product

import cv2
import numpy as np
import pytest
import torch
from made_inputs import draw_breast, random_encoder

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.rendering import Placement
from training.evaluation.readout import (
    NUM_RINGS,
    Canvas,
    EncoderReader,
    held_out_answers,
    place_centers,
    region_features,
    render_once,
    tissue_in_box,
    whole_features,
)

PATCH, HEIGHT, WIDTH = 8, 128, 96
PROCESSOR = MammoDinoImageProcessor(size={"height": HEIGHT, "width": WIDTH}, patch_size=PATCH)
AS_IT_IS = Placement(1, 0, 1, 0)


class PlaceReader:
    """Says of each patch the brightness and the coordinates that its pixels hold."""

    patch_size = PATCH

    def whole(self, pixels: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))

    def places(self, pixels: torch.Tensor, tissue: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, PATCH)[:, 0, :, :, None] * wanted[..., None]


def canvas(image: np.ndarray, tissue: float = 1.0) -> Canvas:
    return Canvas(image, np.full((HEIGHT // PATCH, WIDTH // PATCH), tissue, np.float32), AS_IT_IS)


def test_rings_by_hand_from_patches_at_half_a_stride():
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    center, width = np.array([61.0, 45.0]), HEIGHT / 64
    rings: list[list[float]] = [[] for _ in range(NUM_RINGS)]
    for top, left in product(range(0, HEIGHT - PATCH, PATCH // 2), range(0, WIDTH - PATCH, PATCH // 2)):
        ring = int(np.hypot(top + PATCH / 2 - center[0], left + PATCH / 2 - center[1]) / width)
        if ring < NUM_RINGS:
            rings[ring].append(image[top : top + PATCH, left : left + PATCH].mean() / 255)
    found = region_features(PlaceReader(), [canvas(image)], center[None])[0]
    np.testing.assert_allclose(found, [np.mean(each) if each else 0 for each in rings], rtol=1e-5)


def test_an_encoder_sees_a_region_in_its_place_and_nothing_else_of_the_image():
    reader = EncoderReader(random_encoder(image_size=[HEIGHT, WIDTH], patch_size=PATCH), PROCESSOR)
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    changed, here = image.copy(), np.array([[64.0, 48.0]])
    changed[:24] = 0  # above the window
    same, other = (region_features(reader, [canvas(each)], here) for each in (image, changed))
    np.testing.assert_array_equal(same, other)
    changed[60:68] = 0
    assert np.abs(region_features(reader, [canvas(changed)], here) - same).max() > 1e-3
    assert np.abs(region_features(reader, [canvas(image)], here + 8) - same).max() > 1e-3
    assert same.shape == (1, NUM_RINGS * reader.encoder.config.hidden_size)


def test_a_whole_image_is_the_class_token_without_background():
    reader = EncoderReader(random_encoder(image_size=[HEIGHT, WIDTH], patch_size=PATCH), PROCESSOR)
    one = canvas(draw_breast(HEIGHT, WIDTH).astype(np.uint8))
    one.tissue[:4] = 0
    pixels = torch.from_numpy((one.image.astype(np.float32) / 255 - 0.5) / 0.25)[None, None]
    with torch.inference_mode():
        token = reader.encoder(pixels, tissue_mask=torch.from_numpy(one.tissue)[None]).last_hidden_state[0, 0]
    np.testing.assert_allclose(whole_features(reader, [one])[0], token, atol=1e-5)


def test_centers_are_the_boxes_and_else_another_image_s_where_there_is_tissue():
    blank = np.zeros((HEIGHT, WIDTH), np.uint8)
    enlarged = canvas(blank)._replace(placement=Placement(2, 4, 2, 8))
    half = canvas(blank)
    half.tissue[:, 6:] = 0
    boxes = [np.array([10.0, 20, 30, 28]), np.array([60.0, 60, 90, 80]), None]
    centers = place_centers([enlarged, canvas(blank), half], boxes)
    assert centers.tolist() == [[56, 44], [70, 75], [56, 44]]  # the second's place is outside the third's breast
    assert tissue_in_box(half, np.array([40.0, 0, 56, 16])) == pytest.approx(0.5)


def test_answers_come_from_heads_that_saw_other_patients():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(30), 4)
    labels = np.repeat(rng.permutation(np.arange(30) % 2), 4)
    identity = np.repeat(np.eye(30), 4, axis=0) * 10  # knows the patient and nothing else
    assert abs(held_out_answers(identity, labels, patients).probabilities[:, 1] - 0.5).max() < 0.3
    with pytest.raises(ValueError, match="1 classes of 30 patients"):
        held_out_answers(identity, labels * 0, patients)


def test_where_a_split_is_given_the_head_learns_from_it_and_answers_for_the_rest():
    labels, patients = np.tile([0, 1], 60), np.repeat(np.arange(30), 4)
    is_train, features = patients < 20, labels[:, None].astype(float)
    found = held_out_answers(features, labels, patients, is_train)
    assert found.patients.tolist() == patients[~is_train].tolist()
    assert (found.probabilities.argmax(axis=1) == labels[~is_train]).all()
    features[~is_train] = 1 - features[~is_train]  # what the head has not learned from does not move it
    assert (held_out_answers(features, labels, patients, is_train).probabilities.argmax(axis=1) != found.labels).all()
    with pytest.raises(ValueError, match="one class to learn from"):
        held_out_answers(features, np.where(is_train, 1, labels), patients, is_train)
    with pytest.raises(ValueError, match="patient 0 is in train and test"):
        held_out_answers(features, labels, patients, np.arange(120) % 2 == 0)


def test_images_are_rendered_once_and_refusals_kept(tmp_path, monkeypatch):
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for number, file in enumerate(files[:2]):
        cv2.imwrite(str(file), draw_breast(112, 84, seed=number))
    first = render_once(files, PROCESSOR, tmp_path / "cache")
    monkeypatch.setattr("training.evaluation.readout.render", None)  # would fail
    again = render_once(files, PROCESSOR, tmp_path / "cache")
    assert isinstance(first[2], str) and first[2] == again[2] and "c.png" in first[2]
    for a, b in zip(first[:2], again[:2], strict=True):
        assert (a.image == b.image).all() and (a.tissue == b.tissue).all() and a.placement == b.placement
