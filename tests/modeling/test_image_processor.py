"""The image processor: every input a user holds, the same image from each, and settings that survive a round trip."""

import io
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import torch
from dicom_builders import CT, TOMOSYNTHESIS, build, save
from made_inputs import draw_breast, random_encoder
from PIL import Image

from modeling_mammodino import InvalidImageError, MammoDinoImageProcessor
from modeling_mammodino.breast_segmentation import find_breast
from modeling_mammodino.rendering import (
    RenderSettings,
    inverted,
    make_thumbnail,
    place_on_canvas,
    plan_rendering,
    render,
)


def closed_file() -> io.BytesIO:
    stream = io.BytesIO(b"anything")
    stream.close()
    return stream


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


def test_every_kind_of_sixteen_bit_input_gives_the_same_image_to_the_last_bit(processor, breast, tmp_path):
    for suffix in (".png", ".pgm", ".tif"):
        cv2.imwrite(str(tmp_path / f"a{suffix}"), breast)
    expected = processor(breast)
    assert len(np.unique(breast)) > 256
    same = {
        "png path": tmp_path / "a.png",
        "png path as text": str(tmp_path / "a.png"),
        "pgm path": tmp_path / "a.pgm",
        "tiff path": tmp_path / "a.tif",
        "channel first": breast[None],
        "channel last": breast[..., None],
        "three equal channels": np.stack([breast] * 3, axis=-1),
        "big-endian": breast.astype(">u2"),
        "not contiguous": np.repeat(breast, 2, axis=1)[:, ::2],
        "read-only": np.frombuffer(breast.tobytes(), np.uint16).reshape(breast.shape),
        "int16": breast.astype(np.int16),
        "uint16 tensor": torch.from_numpy(breast),
        "uint16 tensor of three channels": torch.from_numpy(breast).expand(3, -1, -1),
        "int32 tensor": torch.from_numpy(breast.astype(np.int32)),
        "PIL I;16": Image.fromarray(breast),
        "PIL I": Image.fromarray(breast.astype(np.int32)),
        "opened PIL": Image.open(tmp_path / "a.png"),
        "list": [breast],
        "nested list": [[breast]],
        "batch channel first": breast[None, None],
        "batch channel last": torch.from_numpy(breast)[None, ..., None],
    }
    for name, image in same.items():
        inputs = processor(image)
        for key, values in expected.items():
            np.testing.assert_array_equal(inputs[key], values, err_msg=name)


def test_floats_and_eight_bits_give_nearly_the_same_image(processor, breast):
    expected = processor(breast)["pixel_values"]
    for image in (breast / 4095, torch.from_numpy(breast / 4095).float(), Image.fromarray(breast.astype(np.float32))):
        # whole gray levels of 16 bits are kept when resizing, floats are not rounded: up to a few of the 8-bit levels
        difference = np.abs(processor(image)["pixel_values"] - expected)
        assert difference.max() < 0.08 and difference.mean() < 5e-3
    eight_bit = (breast >> 4).astype(np.uint8)
    color = np.stack([eight_bit] * 3, axis=-1)
    images = (eight_bit, color, torch.from_numpy(eight_bit), Image.fromarray(eight_bit), Image.fromarray(color))
    for image in images:
        values = processor(image)["pixel_values"]
        assert np.median(np.abs(values - expected)) < 0.1  # eight bits of twelve
        np.testing.assert_array_equal(values, processor(images[0])["pixel_values"])


def test_a_list_keeps_its_order_and_its_images_do_not_meet(processor, breast, tmp_path):
    other = draw_breast(260, 240, seed=1)
    cv2.imwrite(str(tmp_path / "other.png"), other)
    together = processor([breast, tmp_path / "other.png", torch.from_numpy(breast)])["pixel_values"]
    for values, image in zip(together, (breast, other, breast), strict=True):
        np.testing.assert_array_equal(values, processor(image)["pixel_values"][0])


def test_holes_become_air(processor, breast):
    lifted = breast.astype(np.float32) - 5000  # zero is brighter than all of it
    holed = lifted.copy()
    holed[10, 150], holed[20, 160], holed[30, 170] = np.nan, np.inf, -np.inf
    np.testing.assert_allclose(processor(holed)["pixel_values"], processor(lifted)["pixel_values"], atol=0.1)


def test_sixteen_bits_survive():
    """The breast spans 900 of 65536 gray levels: through eight bits three would be left."""
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
    with pytest.raises(InvalidImageError, match="one at a time"):
        processor([volume, volume])


@pytest.fixture
def series(tmp_path) -> list[Path]:
    """A DBT volume, a file a slice, whose outer slices show less of the breast, and the last nothing; in order."""
    files = []
    for number, share in enumerate((0.8, 0.9, 1.0, 0.9, 0.7, 0.0)):
        image = (draw_breast(256, 200, seed=number) * (0.5 + share / 2)).astype(np.uint16)
        image[round(256 * (0.5 + share / 2)) * (share > 0) :] = 20
        image[0] = 21  # not all pixels are equal
        files.append(image)
    place = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImageLaterality": "L", "ViewPosition": "CC"}
    about = {"SOPClassUID": CT, "PositionerType": "MAMMOGRAPHIC", "SeriesInstanceUID": "1.2.5", **place}
    (tmp_path / "series").mkdir()
    return [
        save(
            build(image, SOPInstanceUID=f"1.2.5.{n}", ImagePositionPatient=[0, 0, float(n)], **about),
            tmp_path / "series",
            f"{9 - n}.dcm",
        )
        for n, image in enumerate(files)
    ]


def test_files_of_one_volume_are_seen_as_the_corpus_sees_them(processor, series, breast):
    """Under one crop and window, each a row in its place; a folder of them is the volume, in order of position."""
    settings = processor.render_settings
    together = [
        place_on_canvas(rendered.image, rendered.tissue, settings)
        for _, rendered in processor.render_source(series, settings.canvas)
    ]
    expected = np.stack([each.pixel_values for each in together])
    mixed = [series[3], breast, series[0], series[5], series[1], series[2], series[4]]
    found = processor(mixed, return_tensors="np")
    assert len(found["pixel_values"]) == len(mixed)
    np.testing.assert_array_equal(found["pixel_values"][[2, 4, 5, 0, 6, 3]], expected)
    np.testing.assert_array_equal(found["tissue_mask"][2], together[0].tissue_mask)
    np.testing.assert_array_equal(found["pixel_values"][1], processor(breast, return_tensors="np")["pixel_values"][0])
    datasets = processor([pydicom.dcmread(path) for path in series], return_tensors="np", slices_per_volume=2)
    np.testing.assert_array_equal(datasets["pixel_values"], expected)  # a list loses no row
    folder = processor(series[0].parent, return_tensors="np")
    np.testing.assert_array_equal(folder["pixel_values"], expected)
    some = processor(str(series[0].parent), slices_per_volume=2, return_tensors="np")
    np.testing.assert_array_equal(some["pixel_values"], expected[[1, 4]])


def test_a_folder_that_is_not_one_volume_is_refused(processor, series, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidImageError, match="empty: a folder without DICOM files"):
        processor(tmp_path / "empty")
    save(build(SOPInstanceUID="1.9"), series[0].parent, "other.dcm")
    with pytest.raises(InvalidImageError, match="series: a folder of 2 volumes or images; give the files"):
        processor(series[0].parent)
    with pytest.raises(InvalidImageError, match="a volume among other images"):
        (series[0].parent / "other.dcm").unlink()
        processor([series[0].parent, series[0]])


def test_slices_of_a_volume_stay_aligned_under_one_plan():
    """The breast of the second slice is smaller: cropped on its own it would move."""
    settings = RenderSettings(do_clahe=False)
    large, small = draw_breast(), draw_breast()
    small[:60] = 20
    thumbnails = [make_thumbnail(each) for each in (large, small)]
    plan = plan_rendering(thumbnails, settings)
    a, b = (
        render(plane, thumbnail, plan, settings, (200, 200))
        for plane, thumbnail in zip((large, small), thumbnails, strict=True)
    )
    assert a.image.shape == b.image.shape
    both = cv2.erode(b.tissue.astype(np.uint8), np.ones((11, 11))) > 0
    assert both.sum() > 5000
    np.testing.assert_array_equal(a.image[both], b.image[both])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_an_image_with_bright_air_is_inverted_with_one_warning(processor, breast, caplog, dtype):
    """MONOCHROME1 that was exported as it is stored."""
    right = (breast >> 4).astype(np.uint8) if dtype == "uint8" else breast if dtype == "uint16" else breast / 4095
    right = right.astype(dtype)
    negative = inverted(right)
    expected = processor(right)
    assert not caplog.records
    found = processor(negative)
    np.testing.assert_allclose(found["pixel_values"], expected["pixel_values"], atol=0.05)
    np.testing.assert_array_equal(found["tissue_mask"], expected["tissue_mask"])
    assert len(caplog.records) == 1 and "image 0: air is bright" in caplog.text
    caplog.clear()
    told = processor(negative, polarity="inverted")
    np.testing.assert_array_equal(told["pixel_values"], found["pixel_values"])
    assert not caplog.records


def test_a_header_that_is_wrong_about_its_polarity_is_seen_for_a_whole_volume(processor, caplog):
    frames = np.stack([4095 - draw_breast(256, 200, seed) for seed in range(7)])
    frames[3] = 4095 - np.roll(draw_breast(256, 200, 3), 5, axis=0)
    wrong, right = (build(each, SOPClassUID=TOMOSYNTHESIS) for each in (frames, 4095 - frames))
    found = processor(wrong)["pixel_values"]
    assert caplog.text.count("air is bright") == 1
    assert np.abs(found - processor(right)["pixel_values"]).mean() < 0.005
    declared = build(frames, photometric="MONOCHROME1", SOPClassUID=TOMOSYNTHESIS)
    caplog.clear()
    assert np.abs(found - processor(declared)["pixel_values"]).mean() < 0.005
    assert "air is bright" not in caplog.text


def test_polarity_is_saved_and_checked(tmp_path, breast):
    MammoDinoImageProcessor(polarity="normal").save_pretrained(tmp_path)
    assert MammoDinoImageProcessor.from_pretrained(tmp_path).render_settings.polarity == "normal"
    with pytest.raises(ValueError, match="polarity='up'"):
        MammoDinoImageProcessor(polarity="up")


@pytest.mark.parametrize("size", [(224, 168), (221, 168), (100, 75)])
@pytest.mark.parametrize("levels", [256, 4096, 65536])
def test_both_bit_depths_give_one_image(levels, size):
    """Equalized, too, from a source of any depth, on sides that the tiles divide or not."""
    source = np.rint(draw_breast(600, 400) / 4095 * (levels - 1)).astype(np.uint16)
    thumbnail = make_thumbnail(source)
    settings = [RenderSettings(bit_depth=bits) for bits in (8, 16)]
    plan = plan_rendering([thumbnail], settings[0])
    eight, sixteen = (render(source, thumbnail, plan, each, size) for each in settings)
    difference = np.abs(eight.image / 255 - sixteen.image / 65535)[eight.tissue]
    assert difference.max() <= 0.02 and difference.mean() < 0.004  # rounding to 8 bits before and after
    assert abs((eight.image / 255)[eight.tissue].mean() - (sixteen.image / 65535)[eight.tissue].mean()) < 0.001
    assert len(np.unique(sixteen.image)) > 256


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("height", [3518, 2294, 1000])
@pytest.mark.parametrize("crop", [True, False])
def test_the_mask_lies_on_the_image_to_a_pixel(height, side, crop):
    """No skin is lost: the mask of the image is that of the thumbnail, wherever the crop and the pixels fall."""
    width = int(height * 0.8)
    y, x = np.mgrid[:height, :width]
    inside = ((y - height * 0.5) / (height * 0.37)) ** 2 + (x / (width * 0.55)) ** 2 < 1
    plane = np.where(inside, 30000, 500).astype(np.uint16)
    if side == "right":
        plane = np.ascontiguousarray(plane[:, ::-1])
    thumbnail = make_thumbnail(plane)
    settings = RenderSettings(do_crop_to_breast=crop)
    plan = plan_rendering([thumbnail], settings)
    rendered = render(plane, thumbnail, plan, settings, (1024, 1024), upscale=False)
    y0, x0, y1, x1 = plan.box
    large = cv2.resize(thumbnail.breast.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    large = large[y0:y1, x0:x1] if side == "left" else large[y0:y1, x0:x1][:, ::-1]
    truth = cv2.resize(large, rendered.tissue.shape[::-1], interpolation=cv2.INTER_AREA) >= 0.5
    for axis in (0, 1):
        found, wanted = (np.flatnonzero(mask.any(axis=axis))[[0, -1]] for mask in (rendered.tissue, truth))
        assert np.abs(found - wanted).max() <= (0 if height > 1024 else 1)
    assert (rendered.tissue != truth).sum() < 0.0005 * truth.sum()


def test_the_canvas_keeps_the_aspect(processor):
    breast = draw_breast(400, 300)
    image = processor(breast)["pixel_values"][0, 0] > -1.9
    rows, columns = image.any(1), image.any(0)
    mask = find_breast(breast).mask
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


def test_what_is_no_mammogram_is_refused_by_name(processor, tmp_path):
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "photo.png"), rng.integers(0, 255, (80, 80, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "black.png"), np.zeros((80, 80), np.uint8))
    cv2.imwrite(str(tmp_path / "dot.png"), np.full((1, 1), 7, np.uint8))
    (tmp_path / "text.dcm").write_text("not an image")
    for name in ("photo.png", "black.png", "dot.png", "text.dcm"):
        with pytest.raises(InvalidImageError, match=name):
            processor(tmp_path / name)
    with pytest.raises(InvalidImageError, match="image 1"):
        processor([draw_breast(), np.zeros((80, 80))])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"\x89PNG", "not a readable image"),
        (io.StringIO("text"), "mode 'rb'"),
        (closed_file(), "open it again"),
        ((each for each in ()), "generator"),
        ({"path": "a.png"}, "dict"),
        ([], "empty list"),
        ("https://example.org/a.png", "download"),
        ("data:image/png;base64,iVBORw0KGgo=", "download"),
        (np.zeros((2, 2, 80, 80, 1)), "shape"),
    ],
)
def test_what_is_no_image_is_refused_with_the_remedy(processor, image, message):
    with pytest.raises(InvalidImageError, match=message):
        processor(image)


def test_a_file_that_is_not_there(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        processor(tmp_path / "absent.png")


def test_the_encoder_takes_what_the_processor_gives(processor, breast):
    model = random_encoder()
    inputs = processor(breast, return_tensors="pt")
    output = model(**inputs)
    kept = inputs["tissue_mask"].flatten(1) > 0
    patches = output.last_hidden_state[:, 1 + model.config.num_register_tokens :]
    assert (patches[~kept] == 0).all() and (patches[kept].abs().sum(-1) > 0).all()


def test_open_files_and_bytes_are_read_and_stay_where_they_were(processor, breast, tmp_path):
    Image.fromarray(breast).save(tmp_path / "a.png")
    save(build(breast), tmp_path, "a.dcm")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.dcm", "a.dcm")
    for name in ("a.png", "a.dcm"):
        path = tmp_path / name
        content, expected = path.read_bytes(), processor(path)["pixel_values"]
        with open(path, "rb") as file, open(path, "rb", buffering=0) as unbuffered:
            for source in (content, bytearray(content), io.BytesIO(content), file, unbuffered):
                if hasattr(source, "seek"):
                    source.seek(7)
                np.testing.assert_array_equal(processor(source)["pixel_values"], expected)
                ((_, rendered),) = processor.render_source(source, (224, 168))
                assert rendered.tissue.any()
                np.testing.assert_array_equal(processor(processor.fetch_images(source))["pixel_values"], expected)
                if hasattr(source, "seek"):
                    assert source.tell() == 7 and source.read(1) == content[7:8]
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("a.dcm") as member:
        np.testing.assert_array_equal(processor([member, member])["pixel_values"], np.concatenate([expected] * 2))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_any_sequence_is_as_many_images(processor, breast, tmp_path, count):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    near = [(breast // 16 + each).astype(np.uint8) for each in range(count)]  # as neighbors in a volume
    files = [str(tmp_path / f"{each}.png") for each in range(count)]
    for file, plane in zip(files, near, strict=True):
        Image.fromarray(plane).save(file)
    expected = processor(near)["pixel_values"]
    assert len(expected) == count
    column = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())["image"]
    objects = np.array([*files, None], object)[:-1]
    for images in (column, tuple(near), pandas.Series(files), objects, [near[:1], near[1:]]):
        np.testing.assert_array_equal(processor(images)["pixel_values"], expected)
    assert len(processor.fetch_images(column)) == count


def test_raw_images_are_taken_where_the_refusal_says(breast):
    dataset = build(breast, PresentationIntentType="FOR PROCESSING")
    processor = MammoDinoImageProcessor()
    with pytest.raises(InvalidImageError, match="allow_for_processing=True"):
        processor(dataset)
    expected = processor(build(breast))["pixel_values"]
    np.testing.assert_array_equal(processor(dataset, allow_for_processing=True)["pixel_values"], expected)
    raw = MammoDinoImageProcessor(allow_for_processing=True)
    np.testing.assert_array_equal(raw(dataset)["pixel_values"], expected)
    assert len(list(raw.render_source(dataset, (64, 64)))) == 1
    np.testing.assert_array_equal(np.asarray(raw.fetch_images(dataset)), breast)


def test_without_intensity_normalization_signed_and_rescaled_values_are_not_white(breast, tmp_path):
    processor = MammoDinoImageProcessor(
        do_intensity_normalize=False, do_clahe=False, do_normalize=False, do_zero_background=False
    )
    expected = (breast - breast.min()) / np.ptp(breast)
    signed, rescaled = build(breast.astype(np.int16), bits=16), build(breast, RescaleSlope=1, RescaleIntercept=-1)
    for source in (signed, rescaled, breast.astype(np.float32)):
        ((_, rendered),) = processor.render_source(source, breast.shape)
        inside = rendered.image[rendered.tissue] / 255
        assert inside.mean() == pytest.approx(expected[breast > 1000].mean(), abs=0.05)
    unit = MammoDinoImageProcessor(do_intensity_normalize=False, do_clahe=False).render_source(
        (breast / 8190).astype(np.float32), breast.shape
    )
    assert next(unit)[1].image.max() == pytest.approx(255 * float(breast.max()) / 8190, abs=2)  # 0..1 is kept
