"""The image processor: every input a user holds, the same picture from each, and settings that survive a round trip."""

import json

import cv2
import numpy as np
import pytest
import torch
from conftest import draw_breast
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_mammodino import ImageRefused, MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.rendering import RenderSettings, plan_rendering, render
from modeling_mammodino.tissue import segment_breast


@pytest.fixture(scope="module")
def processor() -> MammoDinoImageProcessor:
    return MammoDinoImageProcessor(size={"height": 224, "width": 168}, patch_size=14)


def test_shapes_dtypes_and_ranges(processor, breast):
    inputs = processor([breast, breast[:, ::-1]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 1, 224, 168) and inputs["pixel_values"].dtype == torch.float32
    assert inputs["tissue_mask"].shape == (2, 16, 12) and inputs["tissue_mask"].dtype == torch.float32
    assert 0 <= inputs["tissue_mask"].min() and inputs["tissue_mask"].max() == 1
    unit = inputs["pixel_values"] * processor.image_std[0] + processor.image_mean[0]
    assert unit.min() >= -1e-6 and unit.max() <= 1 + 1e-6 and unit.max() > 0.9
    torch.testing.assert_close(inputs["pixel_values"][0], inputs["pixel_values"][1])  # both face the same side


def test_every_kind_of_input_gives_the_same_picture(processor, breast, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), breast)
    cv2.imwrite(str(tmp_path / "a.pgm"), breast)
    expected = processor(breast)["pixel_values"][0]
    same = {
        "png path": tmp_path / "a.png",
        "pgm path": str(tmp_path / "a.pgm"),
        "float array": breast.astype(np.float64),
        "channel first": breast[None],
        "channel last": breast[..., None],
        "three equal channels": np.stack([breast] * 3, axis=-1),
        "uint16 tensor": torch.from_numpy(breast),
        "int32 tensor": torch.from_numpy(breast.astype(np.int32)),
        "PIL I;16": Image.fromarray(breast),
    }
    for name, image in same.items():
        # whole grey levels of 16 bits are kept when resizing, floats are not rounded: up to a few of the 8-bit levels
        difference = np.abs(processor(image)["pixel_values"][0] - expected)
        assert difference.max() < 0.08 and difference.mean() < 5e-3, name
    eight_bit = (breast >> 4).astype(np.uint8)
    for image in (eight_bit, Image.fromarray(eight_bit), Image.fromarray(eight_bit).convert("RGB")):
        difference = np.abs(processor(image)["pixel_values"][0] - expected)
        assert np.median(difference) < 0.1  # eight bits of twelve


def test_sixteen_bits_survive():
    """The breast spans 900 of 65536 grey levels: through eight bits three would be left."""
    faint = (draw_breast().astype(np.float64) * 0.2).astype(np.uint16)
    processor = MammoDinoImageProcessor(size={"height": 224, "width": 168}, bit_depth=16, do_clahe=False)
    assert len(np.unique(processor(faint)["pixel_values"])) > 400


def test_dicom_and_png_of_the_same_pixels_agree(processor, phantom_archive):
    import pydicom

    path = sorted(phantom_archive.rglob("*_2d.dcm"))[0]
    window = pydicom.dcmread(path)
    plain = MammoDinoImageProcessor(size={"height": 224, "width": 168}, do_voi_lut=False)
    from_dicom = plain(path)["pixel_values"]
    np.testing.assert_allclose(from_dicom, plain(window.pixel_array)["pixel_values"], atol=1e-5)
    np.testing.assert_allclose(plain(window)["pixel_values"], from_dicom, atol=1e-5)  # a data set in memory


def test_a_volume_alone_gives_its_slices(processor, phantom_archive):
    volume = sorted(phantom_archive.rglob("*_dbt.dcm"))[0]
    assert processor(volume)["pixel_values"].shape[0] == 6
    assert processor(volume, slices_per_volume=2)["pixel_values"].shape[0] == 2
    with pytest.raises(ImageRefused, match="one at a time"):
        processor([volume, volume])


def test_slices_of_a_volume_stay_aligned_under_one_plan():
    """The breast of the second slice is smaller: cropped on its own it would move."""
    settings = RenderSettings(do_clahe=False)
    large, small = draw_breast(), draw_breast()
    small[:60] = 20
    plan = plan_rendering([large, small], settings)
    a, b = (render(each, plan, settings, (200, 200)) for each in (large, small))
    assert a.picture.shape == b.picture.shape
    both = cv2.erode(b.tissue.astype(np.uint8), np.ones((11, 11))) > 0
    assert both.sum() > 5000
    np.testing.assert_array_equal(a.picture[both], b.picture[both])


def test_the_canvas_keeps_the_aspect(processor):
    breast = draw_breast(400, 300)
    picture = processor(breast)["pixel_values"][0, 0] > -1.9
    rows, columns = picture.any(1), picture.any(0)
    mask = segment_breast(breast)
    source = mask.any(1).sum() / mask.any(0).sum()
    assert rows.sum() / columns.sum() == pytest.approx(source, rel=0.05)


def test_a_background_that_is_not_zero_is_cleared_and_an_option_keeps_it(breast):
    lifted = (breast + 3000).astype(np.uint16)
    lifted[20:40, 150:190] = 9000  # a label
    cleared = MammoDinoImageProcessor(size={"height": 224, "width": 168}, do_normalize=False)(lifted)
    outside = cleared["pixel_values"][0, 0][:, 150:]
    assert (outside == 0).all()
    kept = MammoDinoImageProcessor(
        size={"height": 224, "width": 168}, do_normalize=False, do_zero_background=False, do_crop_to_breast=False
    )(lifted)
    assert kept["pixel_values"].max() > 0.9 and (kept["pixel_values"][0, 0][:, 120:] > 0.9).any()


def test_intensities_do_not_depend_on_gain_and_offset(processor, breast):
    scaled = (breast.astype(np.float64) * 3.7 + 150).astype(np.uint16)
    difference = np.abs(processor(breast)["pixel_values"] - processor(scaled)["pixel_values"])
    assert difference.mean() < 0.01


def test_every_setting_survives_a_round_trip(tmp_path, breast):
    processor = MammoDinoImageProcessor(
        size={"height": 256, "width": 160},
        patch_size=16,
        clahe_clip_limit=3.5,
        intensity_percentiles=(1.0, 99.0),
        chest_wall_side="right",
        bit_depth=16,
        image_mean=[0.3],
        do_zero_background=False,
    )
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(again, MammoDinoImageProcessor)
    assert json.loads(again.to_json_string()) == json.loads(processor.to_json_string())
    np.testing.assert_array_equal(again(breast)["pixel_values"], processor(breast)["pixel_values"])


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"patch_size": 15}, "multiples of patch_size"),
        ({"bit_depth": 12}, "bit_depth"),
        ({"chest_wall_side": "up"}, "chest_wall_side"),
        ({"intensity_percentiles": [90.0, 10.0]}, "intensity_percentiles"),
        ({"clahe_limit": 2}, "clahe_limit"),
    ],
)
def test_wrong_settings_are_refused_by_name(processor, breast, setting, message):
    with pytest.raises((ValueError, TypeError), match=message):
        processor(breast, **setting)


def test_what_is_no_mammogram_is_refused_by_name(processor, tmp_path):
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "photo.png"), rng.integers(0, 255, (80, 80, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "black.png"), np.zeros((80, 80), np.uint8))
    cv2.imwrite(str(tmp_path / "dot.png"), np.full((1, 1), 7, np.uint8))
    (tmp_path / "text.dcm").write_text("not an image")
    for name in ("photo.png", "black.png", "dot.png", "text.dcm"):
        with pytest.raises(ImageRefused, match=name):
            processor(tmp_path / name)
    with pytest.raises(ImageRefused, match="image 1"):
        processor([draw_breast(), np.zeros((80, 80))])


def test_the_encoder_takes_what_the_processor_gives(processor, breast):
    from test_model import random_model

    model: MammoDinoModel = random_model()
    inputs = processor(breast, return_tensors="pt")
    output = model(**inputs)
    kept = inputs["tissue_mask"].flatten(1) > 0
    patches = output.last_hidden_state[:, 1 + model.config.num_register_tokens :]
    assert (patches[~kept] == 0).all() and (patches[kept].abs().sum(-1) > 0).all()
