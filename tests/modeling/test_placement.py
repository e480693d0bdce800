"""Where a rectangle of the source is said to lie in the image, against where it is found there."""

import cv2
import numpy as np
import pytest
from made_inputs import draw_breast

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.rendering import Placement, place_on_canvas

PLAIN = {"do_clahe": False, "do_intensity_normalize": False, "bit_depth": 16}  # gray stays linear in the source


def found_box(added: np.ndarray) -> np.ndarray:
    """The box of a rectangle of constant height in an else empty image, to a fraction of a pixel: its profiles'
    middles, and their areas over their heights."""
    box = []
    for axis in (0, 1):
        profile = added.sum(axis=axis)
        middle = (profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum()
        half = profile.sum() / profile.max() / 2
        box.append((middle - half, middle + half))
    (x0, x1), (y0, y1) = box
    return np.array([x0, y0, x1, y1])


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("wall", ["left", "right", "as_is"])
@pytest.mark.parametrize("canvas", [(112, 84), (700, 308), (210, 560)])
def test_a_rectangle_lies_where_its_placement_says(tmp_path, canvas, wall, side, crop):
    plane = draw_breast(310, 203, side=side)
    box = np.array([61, 120, 93, 171]) if side == "left" else np.array([203 - 93, 120, 203 - 61, 171])
    marked = plane.copy()
    marked[box[1] : box[3], box[0] : box[2]] += 900
    processor = MammoDinoImageProcessor(
        size={"height": canvas[0], "width": canvas[1]},
        patch_size=14,
        chest_wall_side=wall,
        do_crop_to_breast=crop,
        **PLAIN,
    )
    images = []
    for name, each in (("plain", plane), ("marked", marked)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), each)
        ((_, rendered),) = processor.render_source(tmp_path / f"{name}.png", canvas)
        placed = place_on_canvas(rendered.image, rendered.tissue, processor.render_settings, rendered.placement)
        images.append(placed.image.astype(float))
        assert placed.image.shape == canvas
    added = images[1] - images[0]
    np.testing.assert_allclose(placed.placement.boxes(box)[0], found_box(added), atol=0.15)
    np.testing.assert_allclose(placed.placement.inverse().boxes(placed.placement.boxes(box))[0], box, atol=1e-9)
    mirrored = wall not in ("as_is", side)
    assert (placed.placement.scale_x < 0) == mirrored


def test_slices_of_a_volume_share_their_placement(phantom_archive):
    source = next(phantom_archive.rglob("*_dbt.dcm"))
    processor = MammoDinoImageProcessor(size={"height": 128, "width": 96}, patch_size=16)
    placements = {rendered.placement for _, rendered in processor.render_source(source, (128, 96))}
    assert len(placements) == 1


def test_an_empty_list_of_boxes_stays_empty():
    assert Placement(-2.0, 5.0, 1.0, 0.0).boxes(np.empty((0, 4))).shape == (0, 4)
