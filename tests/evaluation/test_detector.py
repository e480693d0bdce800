"""The detector: background costs and changes nothing, cells against a slow oracle; it learns and reopens."""

import math

import numpy as np
import pytest
import torch
from made_inputs import random_encoder

from modeling_mammodino import MammoDinoImageProcessor
from training.evaluation.detection.detector import DetectionBackbone, build_detector, cell_loss, detect, load_detector
from training.evaluation.detection.train_detector import lesion_weights, make_optimizer
from training.evaluation.run_settings import DetectionSettings

GRID = (16, 12)  # of cells, for 112 x 84 pixels and patches of 14


def small_detector(**changes):
    options = {"map_width": 32, "decoder_layers": 2, "num_queries": 8, "spatial_prior": True}
    return build_detector(random_encoder(), **{**options, **changes}, seed=0)


def inputs(num_images: int = 2) -> torch.Tensor:
    """Images whose right half holds no tissue."""
    generator = torch.Generator().manual_seed(3)
    pixels = 0.3 * torch.randn(num_images, 2, 112, 84, generator=generator)
    pixels[:, 1] = 1.0
    pixels[:, 1, :, 42:] = 0.0
    return pixels


@pytest.mark.parametrize("spatial_prior", [True, False])
def test_the_encoder_leaves_background_out(spatial_prior):
    backbone: DetectionBackbone = small_detector(spatial_prior=spatial_prior).model.backbone.model.eval()
    pixels, seen = inputs(), []
    attention = backbone.encoder.encoder.layer[0].attention
    attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    feature_map = backbone(pixels).feature_maps[0]
    assert feature_map.shape == (2, 32, *GRID)
    assert seen == [(2, 1 + 3 + 8 * 3, 48)]  # of each image 3 of 6 columns of patches
    expected = backbone.encoder(pixels[:, :1], tissue_mask=pixels[:, 1, ::14, ::14]).feature_maps[0]
    noise = pixels.clone()
    noise[:, 0, :, 42:] += 1
    again = backbone.encoder(noise[:, :1], tissue_mask=noise[:, 1, ::14, ::14]).feature_maps[0]
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    if not spatial_prior:  # which sees the whole image
        torch.testing.assert_close(backbone(noise).feature_maps[0], feature_map, rtol=0, atol=1e-4)


def slow_cell_loss(logits, labels, grid) -> float:
    """Cell by cell: Lin et al., equation 5, with alpha 0.75 and gamma 2."""
    levels = (grid, (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)))
    total, positives = 0.0, 0
    for image, label in zip(logits[..., 0].tolist(), labels, strict=True):
        cells = iter(image)
        for height, width in levels:
            for row in range(height):
                for column in range(width):
                    x, y, inside = (column + 0.5) / width, (row + 0.5) / height, False
                    for cx, cy, w, h in label["boxes"].tolist():
                        center_inside = abs(x - cx) <= w / 2 and abs(y - cy) <= h / 2
                        across = abs(x - cx) <= max(0.5 / width, w / 2)
                        down = abs(y - cy) <= max(0.5 / height, h / 2)
                        inside |= center_inside or (across and down)
                    p = 1 / (1 + math.exp(-next(cells)))
                    positives += inside
                    total += -0.75 * (1 - p) ** 2 * math.log(p) if inside else -0.25 * p**2 * math.log(1 - p)
    return total / max(1, positives)


def test_the_loss_of_cells_is_that_of_a_loop_over_them():
    torch.manual_seed(0)
    logits = torch.randn(3, 16 * 11 + 8 * 6, 1)
    boxes = (torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.81, 0.77, 0.01, 0.01]]), torch.zeros(0, 4))
    labels = [{"boxes": boxes[0]}, {"boxes": boxes[1]}, {"boxes": boxes[0][1:]}]
    assert cell_loss(logits, labels, (16, 11)).item() == pytest.approx(slow_cell_loss(logits, labels, (16, 11)))
    alone = [{"boxes": boxes[1]}] * 3  # no lesion at all
    assert cell_loss(logits, alone, (16, 11)).item() == pytest.approx(slow_cell_loss(logits, alone, (16, 11)))


def test_a_detector_learns_two_lesions_and_reopens_the_same(tmp_path):
    detector = small_detector().train()
    pixels = inputs()
    pixels[:, 1] = 1
    pixels[0, 0, 28:56, 14:42] += 2  # a bright lesion in each
    pixels[1, 0, 70:98, 42:70] += 2
    corners = np.array([[14.0, 28, 42, 56], [42, 70, 70, 98]])
    centers = torch.tensor([[28.0, 42, 28, 28], [56, 84, 28, 28]]) / torch.tensor([84.0, 112, 84, 112])
    labels = [{"class_labels": torch.tensor([0]), "boxes": box[None]} for box in centers]
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(30):
        outputs = detector(pixels, labels=labels)
        (outputs.loss + 20 * cell_loss(outputs.enc_outputs_class, labels, GRID)).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = detect(detector.eval(), pixels)
    for (boxes, scores), corner in zip(found, corners, strict=True):
        best = boxes[scores.argmax()]
        center = (best[:2] + best[2:]) / 2
        assert (center > corner[:2]).all() and (center < corner[2:]).all()
    detector.save_pretrained(tmp_path)
    MammoDinoImageProcessor(size={"height": 112, "width": 84}, patch_size=14).save_pretrained(tmp_path)
    again, processor = load_detector(tmp_path)
    assert processor.size["height"] == 112 and again.config.id2label == {0: "lesion"}
    for (boxes, scores), (expected, of) in zip(detect(again, pixels), found, strict=True):
        np.testing.assert_array_equal(boxes, expected), np.testing.assert_array_equal(scores, of)


def test_the_encoder_starts_from_its_weights_and_stays_where_it_is_frozen():
    detector = small_detector()
    encoder = detector.model.backbone.model.encoder
    for name, expected in random_encoder().state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], expected, rtol=0, atol=0)
    common = {"dataset": "phantom", "data_dir": "x", "encoder": "x", "output_dir": "x"}
    groups = make_optimizer(detector, DetectionSettings(**common, encoder_learning_rate=1e-5)).param_groups
    of_encoder = {id(each) for each in encoder.parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == (1e-5 if id(parameter) in of_encoder else 5e-4)
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1)
    assert sum(len(group["params"]) for group in groups) == len(list(detector.parameters()))
    chosen = DetectionSettings(**common, encoder_learning_rate=1e-5, layerwise_decay=0.5)
    rate = {
        id(each): group["lr"] for group in make_optimizer(detector, chosen).param_groups for each in group["params"]
    }
    for part, of_part in (
        (encoder.embeddings, 1e-5 / 16),
        (encoder.encoder.layer[1], 1e-5 / 4),
        (encoder.layernorm, 1e-5),
    ):
        assert {rate[id(each)] for each in part.parameters()} == {of_part}  # three blocks
    assert rate[id(detector.model.backbone.model.upsample.weight)] == 5e-4
    frozen = make_optimizer(detector, DetectionSettings(**common, freeze_encoder=True)).param_groups
    assert not of_encoder & {id(each) for group in frozen for each in group["params"]}


def test_images_with_lesions_are_drawn_by_their_share():
    has_lesion = np.array([True, False, False, False])
    np.testing.assert_allclose(lesion_weights(has_lesion, 0.5), [0.5, 1 / 6, 1 / 6, 1 / 6])
    assert lesion_weights(has_lesion, 0) is None and lesion_weights(np.ones(3, bool), 0.5) is None
