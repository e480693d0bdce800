"""What each backbone sees of a file: published numbers, the whole breast, the whole depth, every slice."""

import json
import pickle

import cv2
import numpy as np
import pytest
from dicom_builders import build, save
from made_inputs import draw_breast
from PIL import Image

from modeling_mammodino import InvalidImageError, MammoDinoImageProcessor
from training.evaluation.backbones.preprocessing import rgb_images
from training.evaluation.backbones.registry import BACKBONES, load_backbone

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
# by kind: mean and standard deviation, the side of the small checkpoints, and the published one
PUBLISHED = {
    "resnet50": (*IMAGENET, 64, (224, 224)),
    "convnextv2": (*IMAGENET, 64, (224, 224)),
    "dinov2": (*IMAGENET, 70, (224, 224)),
    "dinov3": (*IMAGENET, 64, (224, 224)),
    "medsiglip": ([0.5] * 3, [0.5] * 3, 64, (448, 448)),
    "dbt_dino": ([0.0] * 3, [1.0] * 3, 70, (518, 518)),
    "rad_dino": ([0.5307] * 3, [0.2583] * 3, 70, (518, 518)),
    "biomedclip": (*CLIP, 64, (224, 224)),
    "mammo_clip_vit": (*CLIP, 64, (224, 224)),
    "mammo_clip_efficientnet": ([0.3089279] * 3, [0.25053555408335154] * 3, 72, (1520, 912)),
    "mammo_fm": ([0.3089279] * 3, [0.25053555408335154] * 3, 72, (1520, 912)),
}


@pytest.fixture(scope="module")
def backbones(folders):
    return {kind: load_backbone(kind, str(folder)) for kind, folder in folders.items()}


def standardized(image: np.ndarray, kind: str) -> np.ndarray:
    """Pixels of 0..255 (H, W), by hand, as (3, H, W)."""
    mean, std = (np.array(each)[:, None, None] for each in PUBLISHED[kind][:2])
    return (image[None] / 255 - mean) / std


def of_file(backbone, path, **options) -> np.ndarray:
    return np.stack([each["pixel_values"] for each in backbone.preprocess(path, **options)])


def test_each_kind_has_its_numbers(backbones):
    assert set(PUBLISHED) == set(BACKBONES) - {"mammodino", "untrained"}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_image_of_the_final_size_is_only_standardized(backbones, kind):
    side = PUBLISHED[kind][2]
    image = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    image[0, :2] = 0, 255  # the range is full: nothing to stretch
    found = backbones[kind].preprocess.prepare(image)
    assert found.dtype == np.float32 and found.shape == (3, side, side)
    np.testing.assert_allclose(found, standardized(image, kind), atol=1e-5)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_without_a_processor_the_published_one_is_taken_and_said(tmp_path, caplog, kind):
    caplog.set_level("INFO")
    family = BACKBONES[kind]
    images = rgb_images(str(tmp_path), family.published, True, family.as_mammo_clip)
    assert caplog.text.count("no preprocessor_config.json") == 1
    size = PUBLISHED[kind][3]
    image = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    image[0, :2] = 0, 255
    np.testing.assert_allclose(images.prepare(image), standardized(image, kind), atol=1e-5)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_nothing_is_cut_off_where_the_processor_would_crop(backbones, kind):
    """A tall image: its aspect is kept between black margins, up to its first and last row; but for Mammo-CLIP's."""
    side = PUBLISHED[kind][2]
    tall = np.full((4 * side, 2 * side), 100, np.uint8)
    tall[:8], tall[-8:] = 255, 255
    found = backbones[kind].preprocess.prepare(tall)
    margin = side // 4
    black, gray, white = (standardized(np.full((1, 1), value, np.uint8), kind)[:, 0, 0] for value in (0, 100, 255))
    middle = found[:, side // 2, side // 2]
    if BACKBONES[kind].as_mammo_clip:  # stretched to the size, and 100..255 to 0..1
        np.testing.assert_allclose(middle, black, atol=1e-5)
        np.testing.assert_allclose(found[:, side // 2, 0], black, atol=1e-5)
        np.testing.assert_allclose(found[:, 0, 0], white, atol=1e-5)
        return
    np.testing.assert_allclose(middle, gray, atol=1e-5)
    np.testing.assert_allclose(found[:, side // 2, : margin - 1], np.repeat(black[:, None], margin - 1, 1), atol=1e-5)
    np.testing.assert_allclose(found[:, :, -margin + 1 :].max((1, 2)), black, atol=1e-5)
    for row in (0, -1):
        np.testing.assert_allclose(found[:, row, side // 2], white, atol=0.2)


def test_the_interpolation_is_the_processors_own(backbones):
    image = np.random.default_rng(1).integers(0, 256, (140, 140), np.uint8)
    bicubic = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(
        backbones["resnet50"].preprocess.prepare(image), standardized(bicubic, "resnet50"), atol=1e-5
    )
    image = np.random.default_rng(1).integers(0, 256, (144, 216), np.uint8)  # the area average, 2 x 3 to 1
    area = image.reshape(72, 2, 72, 3).mean((1, 3))
    area = (area - area.min()) * (255 / np.ptp(area))
    found = backbones["mammo_clip_efficientnet"].preprocess.prepare(image)
    np.testing.assert_allclose(found, standardized(area, "mammo_clip_efficientnet"), atol=0.03)  # Pillow rounds


@pytest.mark.parametrize("settings", [
    {"image_processor_type": "ConvNextFeatureExtractor", "size": 64, "crop_pct": 0.875},
    {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 64, "crop_pct": 0.875},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}, "rescale_factor": 1 / 255},
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}},
    {"size": {"height": 64, "width": 64}, "auto_map": {"AutoImageProcessor": "code.Processor"}},
    {"image_processor_type": "BitImageProcessorFast", "size": {"shortest_edge": 90}, "crop_size": 64},
])  # fmt: skip
def test_processors_of_all_ages_are_read(folders, tmp_path, settings):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["resnet50"] / name).read_bytes())
    mean, std = IMAGENET
    settings |= {"image_mean": mean, "image_std": std, "resample": 3, "do_resize": True, "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    image = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    found = load_backbone("resnet50", str(tmp_path)).preprocess.prepare(image)
    np.testing.assert_allclose(found, standardized(image, "resnet50"), atol=1e-5)


def test_a_processor_for_gray_images_is_refused(folders, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["dinov2"] / name).read_bytes())
    MammoDinoImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MammoDinoImageProcessor is no image processor for RGB"):
        load_backbone("dinov2", str(tmp_path))


@pytest.mark.parametrize("size", [{"longest_edge": 64}, {}])
def test_a_processor_without_a_final_size_is_refused(folders, tmp_path, size):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["dinov2"] / name).read_bytes())
    settings = {"image_processor_type": "BitImageProcessor", "do_center_crop": False, "size": size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="^backbone dinov2, source .*size") as caught:
        load_backbone("dinov2", str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def dicom(plane: np.ndarray, folder, name: str, **elements):
    return save(build(plane, **elements), folder, name)


@pytest.mark.parametrize("kind", BACKBONES)
def test_all_bits_of_a_dicom_are_seen_and_monochrome1_is_turned(backbones, tmp_path, kind):
    plane = draw_breast()  # 12 bits
    path = dicom(plane, tmp_path, "a.dcm")
    found = of_file(backbones[kind], path)
    assert len(found) == 1 and len(np.unique(found[0, 0])) > 60
    assert np.mean(found[0, 0] == found[0, 0].max()) < 0.02  # cut to 8 bits, all of the breast would be white
    turned = dicom(4095 - plane, tmp_path, "b.dcm", photometric="MONOCHROME1")
    np.testing.assert_allclose(of_file(backbones[kind], turned), found, atol=1e-5)
    cv2.imwrite(str(tmp_path / "a.png"), plane)
    np.testing.assert_allclose(of_file(backbones[kind], tmp_path / "a.png"), found, atol=1e-5)
    scaled = dicom(plane, tmp_path, "c.dcm", RescaleSlope=2, RescaleIntercept=-100)
    np.testing.assert_allclose(of_file(backbones[kind], scaled), found, atol=0.2)  # as floats: not rounded on the way


@pytest.mark.parametrize("kind", ["dinov2", "mammo_clip_efficientnet"])
def test_the_window_of_a_dicom_is_applied(backbones, tmp_path, kind):
    plane = draw_breast()
    narrow = of_file(backbones[kind], dicom(plane, tmp_path, "w.dcm", WindowCenter=1800, WindowWidth=200))
    plain = of_file(backbones[kind], dicom(plane, tmp_path, "p.dcm"))
    top = narrow[0, 0].max()
    assert np.mean(narrow[0, 0] > top - 0.01) > 0.1 > np.mean(plain[0, 0] > plain[0, 0].max() - 0.01)


def test_all_see_the_same_breast_or_the_whole_image(folders, tmp_path):
    """A breast of 84 % of the height and 70 % of the width of its image, off the other borders."""
    plane = draw_breast(300, 200)
    cv2.imwrite(str(tmp_path / "a.png"), plane)
    gray = MammoDinoImageProcessor(chest_wall_side="as_is", do_clahe=False, do_zero_background=False)
    ((_, rendered),) = gray.render_source(tmp_path / "a.png", (4096, 4096), upscale=False)
    height, width = rendered.image.shape
    assert 0.8 * 300 < height < 0.93 * 300 and 0.65 * 200 < width < 0.8 * 200
    for kind in ("resnet50", "dinov2", "biomedclip"):
        backbone = load_backbone(kind, str(folders[kind]))
        found = of_file(backbone, tmp_path / "a.png")[0]
        np.testing.assert_array_equal(found, backbone.preprocess.prepare(rendered.image))
        whole = of_file(load_backbone(kind, str(folders[kind]), crop_to_breast=False), tmp_path / "a.png")[0]
        assert np.mean(whole[0] > whole[0].min() + 1) < 0.9 * np.mean(found[0] > found[0].min() + 1)


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_volume_gives_spread_or_named_slices_under_one_plan(backbones, phantom_archive, kind):
    volume = sorted(phantom_archive.rglob("*_dbt.dcm"))[0]  # six slices
    every = of_file(backbones[kind], volume, slices_per_volume=0)
    assert len(every) == 6 and all(np.abs(every[0] - each).max() > 0.1 for each in every[1:])
    np.testing.assert_array_equal(of_file(backbones[kind], volume), every[[0, 2, 3, 5]])  # four, evenly spaced
    np.testing.assert_array_equal(of_file(backbones[kind], volume, slices_per_volume=1), every[[3]])
    np.testing.assert_array_equal(of_file(backbones[kind], volume, slices=[4, 1]), every[[4, 1]])
    np.testing.assert_array_equal(of_file(backbones[kind], volume, slices=[2, 2]), every[[2]])
    with pytest.raises(InvalidImageError, match="slice 6 of 6"):
        list(backbones[kind].preprocess(volume, slices=[6]))


@pytest.mark.parametrize("kind", BACKBONES)
def test_what_is_no_image_is_refused_by_name(backbones, tmp_path, kind):
    (tmp_path / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"x" * 50)
    (tmp_path / "broken.png").write_bytes(b"x" * 50)
    cv2.imwrite(str(tmp_path / "a.png"), draw_breast())
    for name in ("broken.dcm", "broken.png"):
        with pytest.raises(InvalidImageError, match=name):
            list(backbones[kind].preprocess(tmp_path / name))
    with pytest.raises(InvalidImageError, match="slice 3 of an image"):
        list(backbones[kind].preprocess(tmp_path / "a.png", slices=[3]))
    assert len(list(backbones[kind].preprocess(tmp_path / "a.png", slices=[0]))) == 1


@pytest.mark.parametrize("kind", BACKBONES)
def test_images_are_made_in_workers_without_the_weights(backbones, tmp_path, kind):
    cv2.imwrite(str(tmp_path / "a.png"), draw_breast())
    packed = pickle.dumps(backbones[kind].preprocess)
    assert len(packed) < 20_000
    ours, theirs = (list(each(tmp_path / "a.png")) for each in (backbones[kind].preprocess, pickle.loads(packed)))
    assert [each.keys() for each in ours] == [each.keys() for each in theirs]
    for name in ours[0]:
        np.testing.assert_array_equal(ours[0][name], theirs[0][name])


def test_mammodino_sees_what_its_image_processor_gives(folders, backbones, phantom_archive):
    processor = MammoDinoImageProcessor.from_pretrained(folders["mammodino"])
    for path in (sorted(phantom_archive.rglob("*_dbt.dcm"))[1], sorted(phantom_archive.rglob("*_2d.dcm"))[0]):
        expected = processor(path, slices_per_volume=3)
        found = list(backbones["mammodino"].preprocess(path, slices_per_volume=3))
        assert len(found) == len(expected["pixel_values"])
        for number, each in enumerate(found):
            np.testing.assert_array_equal(each["pixel_values"], expected["pixel_values"][number])
            np.testing.assert_array_equal(each["tissue_mask"], expected["tissue_mask"][number])


def test_real_slices_are_seen_whole_by_all(backbones, real_slices):
    for kind, backbone in backbones.items():
        found = of_file(backbone, real_slices[0])
        assert found.shape[0] == 1 and np.isfinite(found).all() and found.std() > 0.1, kind
