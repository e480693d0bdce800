"""transformers' pipelines: through `fetch_images` they get every bit, and what they clip themselves is refused."""

import pickle

import cv2
import numpy as np
import pytest
import torch
from made_inputs import REAL_DATA, TINY_ENCODER, draw_breast, random_encoder
from PIL import Image
from transformers import pipeline

from modeling_mammodino import (
    InvalidImageError,
    MammoDinoConfig,
    MammoDinoForImageClassification,
    MammoDinoImageProcessor,
)
from modeling_mammodino.image_io import GrayImage, read_image
from modeling_mammodino.rendering import RenderSettings, make_thumbnail, plan_rendering

GRAY = {
    "L": np.arange(1600, dtype=np.uint8).reshape(40, 40),
    "I;16": np.arange(1600, dtype=np.uint16).reshape(40, 40) * np.uint16(40),
    "F": np.linspace(-3, 9, 1600, dtype=np.float32).reshape(40, 40),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A checkpoint for each pipeline, as save_pretrained writes it."""
    torch.manual_seed(0)
    classifier = MammoDinoForImageClassification(MammoDinoConfig(**TINY_ENCODER, num_labels=3)).eval()
    torch.nn.init.normal_(classifier.classifier.weight)
    models = {"image-feature-extraction": random_encoder(), "image-classification": classifier}
    found = {}
    for task, model in models.items():
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        MammoDinoImageProcessor(size={"height": 112, "width": 84}).save_pretrained(folder)
        found[task] = str(folder)
    return found


@pytest.fixture(scope="module", params=["image-feature-extraction", "image-classification"])
def pipe(request, folders):
    return pipeline(request.param, folders[request.param], trust_remote_code=False)


@pytest.fixture(scope="module")
def png(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("images") / "breast.png")
    cv2.imwrite(path, draw_breast())
    return path


@pytest.fixture(scope="module")
def mammogram(phantom_archive) -> str:
    return str(sorted(phantom_archive.rglob("*_2d.dcm"))[0])


@pytest.fixture(scope="module")
def volume(phantom_archive) -> str:
    return str(sorted(phantom_archive.rglob("*_dbt.dcm"))[0])


def direct(pipe, image) -> list:
    """What the model makes of an image without a pipeline, in a pipeline's form."""
    with torch.inference_mode():
        outputs = pipe.model(**pipe.image_processor(image, return_tensors="pt"))
    return pipe.postprocess(outputs)


def assert_equal_features(found, expected) -> None:
    """A batch leaves a dimension of one more, or less, around the features of an image."""
    if isinstance(expected[0], dict):
        assert [each["label"] for each in found] == [each["label"] for each in expected]
        found, expected = ([each["score"] for each in scores] for scores in (found, expected))
    np.testing.assert_allclose(np.squeeze(found), np.squeeze(expected), atol=1e-6)


def test_fetched_files_reach_the_model_with_every_bit(pipe, png, mammogram):
    for path in (png, mammogram):
        assert_equal_features(pipe(pipe.image_processor.fetch_images(path)), direct(pipe, path))


def test_fetched_lists_and_batches(pipe, png, mammogram):
    images = pipe.image_processor.fetch_images([png, mammogram, png])
    for found, path in zip(pipe(images, batch_size=2), (png, mammogram, png), strict=True):
        assert_equal_features(found, direct(pipe, path))


def test_a_volume_gives_one_result_a_slice(pipe, volume):
    slices = pipe.image_processor.fetch_images(volume)
    assert len(slices) == len(pipe(slices)) == 6


def test_pooled_features_of_a_fetched_file(folders, mammogram):
    pipe = pipeline("image-feature-extraction", folders["image-feature-extraction"], trust_remote_code=False)
    pooled = pipe(pipe.image_processor.fetch_images(mammogram), pool=True, return_tensors=True)
    with torch.inference_mode():
        expected = pipe.model(**pipe.image_processor(mammogram, return_tensors="pt")).pooler_output
    torch.testing.assert_close(pooled, expected)


def test_settings_of_one_call_pass_through_a_pipeline(folders, png):
    task = "image-feature-extraction"
    settings = {"do_clahe": False}
    pipe = pipeline(task, folders[task], trust_remote_code=False, image_processor_kwargs=settings)
    found = pipe(pipe.image_processor.fetch_images(png))
    with torch.inference_mode():
        outputs = pipe.model(**pipe.image_processor(png, do_clahe=False, return_tensors="pt"))
    np.testing.assert_allclose(found, pipe.postprocess(outputs), atol=1e-6)
    assert np.abs(np.array(found) - direct(pipe, png)).max() > 1e-3


def test_a_sixteen_bit_image_that_a_pipeline_clips_is_refused_with_the_remedy(pipe, png):
    for image in (png, Image.open(png)):
        with pytest.raises(InvalidImageError, match="255.*fetch_images"):
            pipe(image)
    assert direct(pipe, png)  # the processor itself opens it


def test_an_eight_bit_path_needs_no_help(pipe, tmp_path):
    path = str(tmp_path / "breast.png")
    cv2.imwrite(path, (draw_breast() >> 4).astype(np.uint8))
    assert_equal_features(pipe(path), direct(pipe, path))


def test_what_is_clipped_all_over_is_refused_with_the_remedy():
    with pytest.raises(InvalidImageError, match="same value.*fetch_images"):
        MammoDinoImageProcessor()(np.full((80, 80, 3), 255, np.uint8))


@pytest.mark.parametrize("bits", [12, 14, 16])
def test_clipped_slices_are_refused(real_slices, bits):
    for path in real_slices[::15]:
        clipped = np.minimum(read_image(path).astype(np.float32) * (2**bits - 1) / 255, 255).astype(np.uint8)
        with pytest.raises(InvalidImageError, match="fetch_images"):
            plan_rendering([make_thumbnail(clipped)], RenderSettings())


def test_no_real_image_is_refused(real_slices):
    subtracted = sorted((REAL_DATA / "cdd_cesm" / "subtracted_512").rglob("*.png"))
    for path in real_slices[::3] + subtracted:
        plan_rendering([make_thumbnail(read_image(path))], RenderSettings(), str(path))


def test_fetch_images_keeps_structure_depth_and_images(png, mammogram, volume):
    processor = MammoDinoImageProcessor(slices_per_volume=2)
    breast = draw_breast()
    fetched = processor.fetch_images([png, [mammogram, volume], breast])
    assert np.array_equal(np.asarray(fetched[0]), breast) and np.asarray(fetched[0]).dtype == np.uint16
    assert np.asarray(fetched[1][0]).dtype == np.float32  # after modality LUT and window
    assert len(fetched[1][1]) == 2 and fetched[2] is breast
    plain = MammoDinoImageProcessor(do_voi_lut=False)
    assert np.asarray(plain.fetch_images(mammogram)).max() > np.asarray(fetched[1][0]).max()
    for path in (png, mammogram):
        for key, values in processor(path).items():
            np.testing.assert_array_equal(processor(processor.fetch_images(path))[key], values)


@pytest.mark.parametrize("mode", GRAY)
def test_a_gray_image_is_the_plane(mode):
    image = GrayImage.of(GRAY[mode])
    assert isinstance(image, Image.Image) and image.mode == mode
    for same in (image, image.copy(), pickle.loads(pickle.dumps(image)), image.convert(mode)):
        assert np.array_equal(np.asarray(same), GRAY[mode])
    asked = image.convert("RGB")
    if mode == "L":
        assert asked.mode == "RGB"
    else:
        assert np.array_equal(np.asarray(asked), GRAY[mode]) and asked is not image
    assert np.array_equal(np.asarray(image.crop((5, 0, 25, 30))), GRAY[mode][:30, 5:25])


def test_nothing_is_asked_where_the_package_is_imported(folders, png, monkeypatch):
    """transformers swallows what a question raises, so they are noted."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "n")
    for task, folder in folders.items():
        pipe = pipeline(task, folder)
        assert pipe(pipe.image_processor.fetch_images(png)) and not asked
