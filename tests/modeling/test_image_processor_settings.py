"""Settings of the image processor: each is honored, survives a round trip, and ends with the call it was given for."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from made_inputs import draw_breast
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_mammodino import InvalidImageError, MammoDinoImageProcessor
from modeling_mammodino.image_processing_mammodino import FIXED_SETTINGS

SIZE = {"height": 84, "width": 56}
SETTINGS = sorted(MammoDinoImageProcessor.valid_kwargs.__annotations__)
# another value of each setting; one that is forgotten here fails by its name
CHANGED = {
    "allow_for_processing": True,
    "bit_depth": 16,
    "chest_wall_side": "right",
    "clahe_clip_limit": 40,
    "clahe_grid": 3,
    "crop_margin_fraction": 0.2,
    "default_to_square": False,
    "do_clahe": False,
    "do_crop_to_breast": False,
    "do_intensity_normalize": False,
    "do_invert_monochrome1": False,
    "do_modality_lut": False,
    "do_normalize": False,
    "do_voi_lut": False,
    "do_zero_background": False,
    "image_mean": [0.3],
    "image_std": [0.5],
    "intensity_percentiles": [5.0, 95],
    "patch_size": 7,
    "return_tensors": "pt",
    "size": {"height": 56, "width": 112},
    "slices_per_volume": 2,
    "polarity": "inverted",
    "tissue_finder": "body",
}
REFUSED = {
    "crop_size": {"height": 56, "width": 56},
    "data_format": "channels_last",
    "device": "cuda",
    "disable_grouping": True,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_pad": False,
    "do_rescale": False,
    "do_resize": False,
    "image_seq_length": 4,
    "input_data_format": "channels_first",
    "pad_size": {"height": 56, "width": 56},
    "resample": 3,
    "rescale_factor": 1.0,
}
ALLOWED = {  # what is done anyhow, in the words of transformers
    "data_format": "channels_first",
    "device": torch.device("cpu"),
    "do_center_crop": False,
    "do_convert_rgb": False,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "rescale_factor": 1 / 255,
}


@pytest.fixture(scope="module")
def volume(phantom_archive) -> Path:
    return sorted(phantom_archive.rglob("*_dbt.dcm"))[0]


@pytest.fixture(scope="module")
def mammogram(phantom_archive) -> pydicom.Dataset:
    """A DICOM in which each step of reading it counts: rescaled, windowed, and stored as MONOCHROME1."""
    dataset = pydicom.dcmread(sorted(phantom_archive.rglob("*_2d.dcm"))[0])
    dataset.PixelData = (4095 - dataset.pixel_array).astype(np.uint16).tobytes()
    dataset.PhotometricInterpretation, dataset.PresentationLUTShape = "MONOCHROME1", "INVERSE"
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -300
    breast = 2 * dataset.pixel_array[dataset.pixel_array < 4095] - 300.0  # air is 4095 here
    low, high = np.percentile(breast, [20, 80])  # a window that cuts both ends of the breast
    dataset.WindowCenter, dataset.WindowWidth = round((low + high) / 2), round(high - low)
    return dataset


@pytest.fixture(scope="module")
def raw(mammogram) -> pydicom.Dataset:
    dataset = copy.deepcopy(mammogram)
    dataset.PresentationIntentType = "FOR PROCESSING"
    return dataset


def process(processor: MammoDinoImageProcessor, image, **settings) -> tuple:
    try:
        inputs = processor(image, **settings)
    except InvalidImageError as refusal:  # without its inversion the breast is darker than the air
        return (str(refusal),)
    values, tissue = inputs["pixel_values"], inputs["tissue_mask"]
    return type(values), values.shape, tissue.shape, np.asarray(values).tobytes(), np.asarray(tissue).tobytes()


@pytest.mark.parametrize("name", [each for each in SETTINGS if each not in FIXED_SETTINGS])
def test_a_setting_counts_survives_and_does_not_stick(name, tmp_path, volume, mammogram, raw):
    change = {name: CHANGED[name]}
    image = mammogram if name in ("do_invert_monochrome1", "do_modality_lut", "do_voi_lut") else draw_breast()
    image = volume if name == "slices_per_volume" else image
    image = raw if name == "allow_for_processing" else image
    plain, changed = MammoDinoImageProcessor(size=SIZE), MammoDinoImageProcessor(**{"size": SIZE, **change})
    before, expected = process(plain, image), process(changed, image)
    assert (before == expected) == (name == "default_to_square")  # which only says how one number becomes a size

    assert process(plain, image, **change) == expected
    assert process(plain, image) == before
    changed.save_pretrained(tmp_path)
    for again in (
        AutoImageProcessor.from_pretrained(tmp_path),
        MammoDinoImageProcessor.from_dict(changed.to_dict()),
        MammoDinoImageProcessor.from_pretrained(tmp_path),
    ):
        assert json.loads(again.to_json_string()) == json.loads(changed.to_json_string())
        assert np.array_equal(getattr(again, name), getattr(changed, name))
        assert process(again, image) == expected


@pytest.mark.parametrize("name", FIXED_SETTINGS)
def test_a_setting_without_meaning_here_is_refused_by_name(name, breast):
    processor = MammoDinoImageProcessor(size=SIZE)
    for refuse in (lambda **each: processor(breast, **each), MammoDinoImageProcessor):
        with pytest.raises(ValueError, match=f"{name}=.*leave it out"):
            refuse(**{name: REFUSED[name]})
    if name in ALLOWED:
        assert process(processor, breast, **{name: ALLOWED[name]}) == process(processor, breast)


def test_none_leaves_every_setting_as_it_is(breast):
    processor = MammoDinoImageProcessor(size=SIZE, do_clahe=False)
    assert process(processor, breast, **dict.fromkeys(SETTINGS)) == process(processor, breast)


@pytest.mark.parametrize("tensors, kind", [("np", np.ndarray), ("pt", torch.Tensor), (None, np.ndarray)])
def test_return_tensors(breast, tensors, kind):
    inputs = MammoDinoImageProcessor(size=SIZE)([breast] * 2, return_tensors=tensors)
    assert set(inputs) == {"pixel_values", "tissue_mask"}
    assert isinstance(inputs["pixel_values"], kind) and inputs["pixel_values"].shape == (2, 1, 84, 56)
    assert isinstance(inputs["tissue_mask"], kind) and inputs["tissue_mask"].shape == (2, 6, 4)


def test_one_number_is_a_square_canvas_and_a_mean(breast):
    processor = MammoDinoImageProcessor(size=56, image_mean=0.4, image_std=1)
    assert processor(breast)["pixel_values"].shape == (1, 1, 56, 56)
    assert processor.image_mean == (0.4,) and processor.image_std == (1,)


def test_normalization_is_of_pixels_in_0_to_1(breast):
    plain = MammoDinoImageProcessor(size=SIZE, do_normalize=False)(breast)["pixel_values"]
    assert plain.min() == 0 and plain.max() == 1
    shifted = MammoDinoImageProcessor(size=SIZE, image_mean=0.2, image_std=0.4)(breast)["pixel_values"]
    np.testing.assert_allclose(shifted, (plain - 0.2) / 0.4, atol=1e-6)


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"patch_size": 15}, "multiples of patch_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"size": {"height": -84, "width": 56}}, "multiples of patch_size"),
        ({"size": {"shortest_edge": 84}}, "'height' and 'width'"),
        ({"bit_depth": 12}, "bit_depth"),
        ({"bit_depth": "8"}, "bit_depth"),
        ({"chest_wall_side": "up"}, "chest_wall_side"),
        ({"intensity_percentiles": [90.0, 10.0]}, "intensity_percentiles"),
        ({"crop_margin_fraction": -0.1}, "crop_margin_fraction"),
        ({"clahe_clip_limit": 0}, "clahe_clip_limit"),
        ({"clahe_grid": 0}, "clahe_grid"),
        ({"slices_per_volume": -1}, "slices_per_volume"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.0]}, "image_std"),
        ({"do_clahe": "no"}, "do_clahe"),
        ({"clahe_limit": 2}, "clahe_limit"),
    ],
)
def test_wrong_settings_are_refused_by_name_before_any_work(breast, setting, message):
    processor = MammoDinoImageProcessor(size=SIZE)
    for refuse in (lambda **each: processor(breast, **each), MammoDinoImageProcessor):
        with pytest.raises((ValueError, TypeError, StrictDataclassFieldValidationError), match=message):
            refuse(**setting)


def test_a_processor_equals_itself_after_saving(tmp_path):
    for settings in ({}, {"intensity_percentiles": (1, 99.0)}, {"size": None}):
        processor = MammoDinoImageProcessor(**settings)
        processor.save_pretrained(tmp_path)
        assert MammoDinoImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    assert processor.size.height == 518


def test_a_setting_of_a_later_version_is_left_out_with_a_warning(tmp_path, caplog, breast):
    MammoDinoImageProcessor(size=SIZE, do_clahe=False).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sharpen_like_2031": 3}))
    with caplog.at_level(logging.WARNING):
        later = MammoDinoImageProcessor.from_pretrained(tmp_path)
    assert "sharpen_like_2031" in caplog.text and not hasattr(later, "sharpen_like_2031")
    assert process(later, breast) == process(MammoDinoImageProcessor(size=SIZE, do_clahe=False), breast)
    AutoImageProcessor.from_pretrained(tmp_path)


def test_a_setting_that_the_user_misspells_is_refused(tmp_path):
    MammoDinoImageProcessor(size=SIZE).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="do_clae; is do_clahe meant"):
        MammoDinoImageProcessor.from_pretrained(tmp_path, do_clae=False)
    assert MammoDinoImageProcessor.from_pretrained(tmp_path, do_clahe=False).do_clahe is False
