"""The DICOM reader against formulas written out from PS3.3, made files, and real files in many transfer syntaxes."""

import logging
import math
import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import set_pixel_data

from modeling_mammodino.dicom import (
    Mammogram,
    count_slices,
    frame_order,
    is_dicom,
    iter_slices,
    keyed_hash,
    read_mammogram,
)
from modeling_mammodino.errors import ImageRefused

DATA = Path(__file__).parents[2] / "shared" / "data"
CODECS = DATA / "dicom_codecs"
SOP = "1.2.840.10008.5.1.4.1.1."
MAMMOGRAPHY, PROCESSING, TOMOSYNTHESIS, PROJECTION, CT, CAPTURE = (
    SOP + end for end in ("1.2", "1.2.1", "13.1.3", "13.1.4", "2", "7")
)
RAW = {"apply_modality_lut": False, "apply_voi": False, "invert_monochrome1": False}
KEY = b"a key of the tests"
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def item(**elements):
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def build(pixels=RAMP, bits=12, photometric="MONOCHROME2", syntax=uid.ExplicitVRLittleEndian, **elements):
    """A data set with the given pixels, (H, W) or (F, H, W), and further elements by keyword, legal or not."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = MAMMOGRAPHY
    dataset.Modality = "MG"
    set_pixel_data(dataset, np.ascontiguousarray(pixels), photometric, bits, generate_instance_uid=False)
    dataset.SOPInstanceUID = "1.2.3.4"
    with pydicom.config.disable_value_validation():
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
    if syntax != uid.ExplicitVRLittleEndian:
        dataset.file_meta.TransferSyntaxUID = syntax
        if uid.UID(syntax).is_compressed:
            dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
            dataset.compress(syntax, generate_instance_uid=False)
    return dataset


def save(dataset, folder, name="image.dcm"):
    path = folder / name
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.save_as(path, enforce_file_format=True)
    return path


def frame_groups(**sequences):
    """One functional group item; every argument is the item of a macro."""
    return item(**{name: [content] for name, content in sequences.items()})


def volume(levels=(0, 1, 2, 3), positions=None, shape=(8, 8), syntax=uid.ExplicitVRLittleEndian, **elements):
    """A DBT volume; frame i of the file holds 100 * levels[i] + 7 and stands at positions[i] mm."""
    pixels = np.stack([np.full(shape, 100 * level + 7, np.uint16) for level in levels])
    groups = [Dataset() for _ in levels]
    shared = Dataset()
    if positions is not None:
        for group, z in zip(groups, positions, strict=True):
            group.PlanePositionSequence = [item(ImagePositionPatient=[5.0, -3.0, float(z)])]
        shared.PlaneOrientationSequence = [item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    dataset = build(pixels, syntax=syntax, SOPClassUID=TOMOSYNTHESIS)
    dataset.PerFrameFunctionalGroupsSequence = groups
    dataset.SharedFunctionalGroupsSequence = [shared]
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


# VOI


def window_oracle(x, center, width, function):
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.2 and C.11.2.1.3.1 as written, with ymin = 0 and ymax = 1."""
    if function == "LINEAR":
        if x <= center - 0.5 - (width - 1) / 2:
            return 0.0
        if x > center - 0.5 + (width - 1) / 2:
            return 1.0
        return (x - (center - 0.5)) / (width - 1) + 0.5
    if function == "LINEAR_EXACT":
        if x <= center - width / 2:
            return 0.0
        if x > center + width / 2:
            return 1.0
        return (x - center) / width + 0.5
    return 1 / (1 + math.exp(min(700, -4 * (x - center) / width)))  # exp overflows beyond


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize(
    ("center", "width"), [(2048, 4096), (2000, 1), (1000.5, 333), (2048, 2), (100, 9000), (4, 1.5)]
)
def test_windows_follow_the_standard(function, center, width):
    elements = {"WindowCenter": center, "WindowWidth": width}
    dataset = build(**elements, **({"VOILUTFunction": function} if function else {}))
    seen = read_mammogram(dataset).pixels
    expected = [window_oracle(x, center, width, function or "LINEAR") for x in RAMP.ravel().tolist()]
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen.ravel(), expected, atol=2e-6)


def test_first_of_several_windows():
    dataset = build(WindowCenter=[1000, 50], WindowWidth=[2000, 10], VOILUTFunction="LINEAR_EXACT")
    assert read_mammogram(dataset).pixels[0, 50] == pytest.approx(50 / 2000)


def test_voi_lut_is_preferred_to_the_window(tmp_path):
    lut = item(LUTDescriptor=[4, 100, 10])
    lut.add_new("LUTData", "US", [0, 100, 500, 1023])
    dataset = build(WindowCenter=2048, WindowWidth=4096, VOILUTSequence=[lut])
    for source in (dataset, save(dataset, tmp_path)):
        seen = read_mammogram(source).pixels.ravel()
        expected = [0, 0, 100, 500, 1023, 1023]
        np.testing.assert_allclose(seen[[0, 100, 101, 102, 103, 4095]], np.array(expected) / 1023, atol=1e-6)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_lut_as_words_in_either_byte_order(tmp_path, syntax):
    entries = (np.arange(4096) // 2).astype(np.uint16)
    table = item(LUTDescriptor=[4096, 0, 12])
    big = syntax == uid.ExplicitVRBigEndian
    table.add_new("LUTData", "OW", entries.astype(">u2" if big else "<u2").tobytes())
    dataset = build(VOILUTSequence=[table])
    dataset.PixelData = (RAMP.byteswap() if big else RAMP).tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    path = tmp_path / "lut.dcm"
    dataset.file_meta.MediaStorageSOPClassUID = MAMMOGRAPHY
    pydicom.dcmwrite(path, dataset, implicit_vr=False, little_endian=not big)
    np.testing.assert_allclose(read_mammogram(path).pixels.ravel(), entries / 4095, atol=1e-6)


@pytest.mark.parametrize(("center", "width"), [(32768, 65536), (60000, 100), (100, 0), (100, -5)])
@pytest.mark.parametrize("function", ["LINEAR", "SIGMOID"])
def test_window_of_another_bit_depth_is_ignored(caplog, center, width, function):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    dataset = build(pixels, bits=8, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    with caplog.at_level(logging.WARNING):
        seen = read_mammogram(dataset).pixels
    np.testing.assert_allclose(seen, pixels / 255, atol=1e-6)
    assert len(caplog.records) == 1 and "WindowCenter" in caplog.text


def test_no_window_keeps_stored_values():
    assert read_mammogram(build()).pixels.dtype == np.uint16
    np.testing.assert_array_equal(read_mammogram(build()).pixels, RAMP)


# Modality, padding, inversion


def test_rescale_comes_before_the_window():
    dataset = build(RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000, WindowWidth=500)
    dataset.VOILUTFunction = "LINEAR_EXACT"
    expected = [window_oracle(2 * x - 1000, 1000, 500, "LINEAR_EXACT") for x in RAMP.ravel().tolist()]
    np.testing.assert_allclose(read_mammogram(dataset).pixels.ravel(), expected, atol=2e-6)
    rescaled = read_mammogram(dataset, apply_voi=False).pixels
    np.testing.assert_array_equal(rescaled, 2.0 * RAMP - 1000)
    assert rescaled.dtype == np.float32
    np.testing.assert_array_equal(read_mammogram(dataset, **RAW).pixels, RAMP)


def test_modality_lut():
    table = item(LUTDescriptor=[3, 1, 16], ModalityLUTType="US")
    table.add_new("LUTData", "US", [7, 70, 700])
    seen = read_mammogram(build(ModalityLUTSequence=[table], RescaleSlope=5, RescaleIntercept=0)).pixels
    assert seen.ravel()[[0, 1, 2, 3, 4]].tolist() == [7, 7, 70, 700, 700]


def test_monochrome1_with_and_without_window():
    windowed = {"WindowCenter": 2048, "WindowWidth": 4096}
    upright = read_mammogram(build(**windowed)).pixels
    np.testing.assert_allclose(read_mammogram(build(photometric="MONOCHROME1", **windowed)).pixels, 1 - upright)
    np.testing.assert_array_equal(read_mammogram(build(photometric="MONOCHROME1")).pixels, 4095 - RAMP)
    kept = read_mammogram(build(photometric="MONOCHROME1"), invert_monochrome1=False).pixels
    np.testing.assert_array_equal(kept, RAMP)


def test_monochrome1_of_signed_values():
    pixels = np.array([[-2048, 0], [5, 2047]], np.int16)
    seen = read_mammogram(build(pixels, photometric="MONOCHROME1")).pixels
    np.testing.assert_array_equal(seen, [[2047, -1], [-6, -2048]])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("padding", [(4095,), (0,), (4000, 4095)])
def test_padding_becomes_air(photometric, padding):
    pixels = np.array([[0, 4095], [4050, 1000], [2000, 3000]], np.uint16)
    elements = dict(zip(("PixelPaddingValue", "PixelPaddingRangeLimit"), padding, strict=False))
    dataset = build(pixels, photometric=photometric, WindowCenter=2048, WindowWidth=4096, **elements)
    seen = read_mammogram(dataset).pixels
    padded = (pixels >= min(padding)) & (pixels <= max(padding))
    assert padded.any()
    assert (seen[padded] == seen[~padded].min()).all()


def test_padding_does_not_stretch_negative_slopes():
    pixels = np.array([[0, 10], [20, 4095]], np.uint16)
    seen = read_mammogram(build(pixels, PixelPaddingValue=0, RescaleSlope=-1, RescaleIntercept=0)).pixels
    np.testing.assert_array_equal(seen, [[-4095, -10], [-20, -4095]])


def test_bits_stored_that_lies(caplog):
    pixels = np.array([[0, 100], [1023, 4000]], np.uint16)
    for syntax in (uid.ExplicitVRLittleEndian, uid.RLELossless):
        dataset = build(pixels, bits=16, syntax=syntax, BitsStored=10, HighBit=9)
        dataset.PhotometricInterpretation = "MONOCHROME1"
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="modeling_mammodino"):
            np.testing.assert_array_equal(read_mammogram(dataset).pixels, 4095 - pixels)
        assert len([record for record in caplog.records if "BitsStored" in record.message]) == 1


def test_embedded_overlay_bits_are_cleared():
    dataset = build(RAMP | 0x8000, bits=16, BitsStored=12, HighBit=11)
    dataset.add_new((0x6000, 0x0102), "US", 15)
    np.testing.assert_array_equal(read_mammogram(dataset).pixels, RAMP)


# Volumes


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLSLossless])
def test_frames_come_in_order_of_position(tmp_path, syntax):
    dataset = volume(levels=(0, 1, 2, 3), positions=(3.0, 1.0, 4.0, 2.0), syntax=syntax)
    for source in (dataset, save(dataset, tmp_path)):
        slices = list(iter_slices(source))
        assert [int(each.pixels[0, 0]) for each in slices] == [107, 307, 7, 207]
        assert [each.slice_index for each in slices] == [0, 1, 2, 3]
        assert [each.slice_position_mm for each in slices] == [1, 2, 3, 4]
        assert {each.num_slices for each in slices} == {4} == {count_slices(source)}
        assert slices[0].slice_spacing_mm == pytest.approx(1.0)
        assert frame_order(source) == (1, 3, 0, 2)


def test_order_from_stack_positions_then_file():
    dataset = volume()
    assert [int(each.pixels[0, 0]) for each in iter_slices(dataset)] == [7, 107, 207, 307]
    for group, place in zip(dataset.PerFrameFunctionalGroupsSequence, (4, 2, 3, 1), strict=True):
        group.FrameContentSequence = [item(StackID="1", InStackPositionNumber=place)]
    assert [int(each.pixels[0, 0]) for each in iter_slices(dataset)] == [307, 107, 207, 7]


def test_oblique_planes_are_projected_on_their_normal():
    dataset = volume(positions=(0, 0, 0, 0))
    tilt = math.radians(60)
    axes = [1, 0, 0, 0, math.cos(tilt), math.sin(tilt)]
    normal = np.cross(axes[:3], axes[3:])
    dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = axes
    for group, millimetres in zip(dataset.PerFrameFunctionalGroupsSequence, (2, 1, 0, 3), strict=True):
        corner = millimetres * normal + np.array([9, 4, 0]) * [1, 0, 0]
        group.PlanePositionSequence[0].ImagePositionPatient = [round(float(value), 6) for value in corner]
    assert frame_order(dataset) == (2, 1, 0, 3)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_indices_decode_only_what_is_asked_for(tmp_path, monkeypatch, syntax):
    path = save(volume(levels=range(6), positions=(6, 5, 4, 3, 2, 1), syntax=syntax), tmp_path)
    decoder = pydicom.pixels.get_decoder(syntax)
    name = "_as_array_encapsulated" if uid.UID(syntax).is_compressed else "_as_array_native"
    original, decoded = getattr(type(decoder), name), []
    monkeypatch.setattr(
        type(decoder), name, staticmethod(lambda runner, index: decoded.append(index) or original(runner, index))
    )
    slices = iter_slices(path, indices=[4, 0])
    assert decoded == []
    assert int(next(slices).pixels[0, 0]) == 107 and decoded == [1]
    last = next(slices)
    assert int(last.pixels[0, 0]) == 507 and last.slice_index == 0 and decoded == [1, 5]
    assert list(iter_slices(path, indices=[])) == [] and decoded == [1, 5]
    with pytest.raises(ImageRefused, match=re.escape("0..5")):
        iter_slices(path, indices=[6])


def test_windows_of_functional_groups():
    dataset = volume(levels=(1, 1, 1), WindowCenter=1, WindowWidth=1)
    dataset.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence = [
        item(WindowCenter=107, WindowWidth=214, VOILUTFunction="LINEAR_EXACT")
    ]
    dataset.PerFrameFunctionalGroupsSequence[1].FrameVOILUTSequence = [
        item(WindowCenter=214, WindowWidth=428, VOILUTFunction="LINEAR_EXACT")
    ]
    assert [float(each.pixels[0, 0]) for each in iter_slices(dataset)] == pytest.approx([0.5, 0.25, 0.5])


def test_rescale_of_functional_groups():
    dataset = volume(levels=(1, 1))
    dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = [
        item(RescaleSlope=2, RescaleIntercept=1)
    ]
    dataset.PerFrameFunctionalGroupsSequence[1].PixelValueTransformationSequence = [
        item(RescaleSlope=3, RescaleIntercept=0)
    ]
    assert [float(each.pixels[0, 0]) for each in iter_slices(dataset)] == [215, 321]


# What the header says


@pytest.mark.parametrize(
    ("elements", "laterality", "view"),
    [
        ({"ImageLaterality": "L", "ViewPosition": "MLO"}, "L", "MLO"),
        ({"Laterality": "R", "ViewPosition": "cc"}, "R", "CC"),
        ({"ImageLaterality": "B", "ViewPosition": "XCCL"}, None, "XCCL"),
        ({"ImageLaterality": "r", "ViewPosition": "RCC"}, "R", "CC"),
        ({"ViewCodeSequence": [item(CodeMeaning="medio-lateral oblique")]}, None, "MLO"),
        ({"ViewCodeSequence": [item(CodeMeaning="Cranio-Caudal", CodeValue="R-10242")]}, None, "CC"),
        ({"ViewCodeSequence": [item(CodeMeaning="?", CodeValue="399099002")]}, None, "LMO"),
        ({"ViewCodeSequence": [item(CodeValue="R-10224")], "ViewPosition": ""}, None, "ML"),
        ({"ViewPosition": "LM"}, None, "LM"),
        ({"ViewPosition": "SMITH"}, None, None),
        ({}, None, None),
    ],
)
def test_laterality_and_view(elements, laterality, view):
    mammogram = read_mammogram(build(**elements))
    assert (mammogram.laterality, mammogram.view) == (laterality, view)


@pytest.mark.parametrize("place", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_laterality_of_functional_groups(place):
    dataset = volume()
    for group in getattr(dataset, place):
        group.FrameAnatomySequence = [item(FrameLaterality="R")]
    dataset.ViewCodeSequence = [item(CodeMeaning="cranio-caudal")]
    assert {(each.laterality, each.view, each.kind) for each in iter_slices(dataset)} == {("R", "CC", "dbt")}


@pytest.mark.parametrize(
    ("elements", "kind"),
    [
        ({}, "ffdm"),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMO_2D", "LEFT", "GENERATED_2D"]}, "synthetic_2d"),
        ({"ImageType": ["DERIVED", "PRIMARY", "", "C-View"]}, "synthetic_2d"),
        ({"ImageType": ["DERIVED", "PRIMARY", "Intelligent 2D"]}, "synthetic_2d"),
        ({"ImageType": ["DERIVED", "PRIMARY", "VOLUME"]}, "synthetic_2d"),
        ({"ImageType": ["DERIVED", "PRIMARY", "VOLUME"], "SOPClassUID": TOMOSYNTHESIS}, "dbt"),
        (
            {"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "GENERATED_2D"], "SOPClassUID": TOMOSYNTHESIS},
            "synthetic_2d",
        ),
        ({"SOPClassUID": CT}, "dbt"),
        ({"SOPClassUID": CT, "Modality": "CT"}, "unknown"),
        ({"SOPClassUID": CAPTURE}, "unknown"),
    ],
)
def test_kind_of_single_frames(elements, kind):
    assert read_mammogram(build(**elements)).kind == kind


@pytest.mark.parametrize(
    ("elements", "kind"),
    [
        ({}, "dbt"),
        ({"SOPClassUID": CT}, "dbt"),
        ({"SOPClassUID": PROJECTION}, "unknown"),
        ({"SOPClassUID": CT, "Modality": "CT"}, "unknown"),
    ],
)
def test_kind_of_volumes(elements, kind):
    assert next(iter_slices(volume(**elements))).kind == kind


def test_spacing():
    assert read_mammogram(build()).pixel_spacing_mm is None
    assert read_mammogram(build(ImagerPixelSpacing=[0.07, 0.08])).pixel_spacing_mm == pytest.approx(0.07)
    both = build(ImagerPixelSpacing=[0.07, 0.07], PixelSpacing=[0.065, 0.065])
    assert read_mammogram(both).pixel_spacing_mm == pytest.approx(0.065)
    measures = item(PixelSpacing=[0.1, 0.1], SliceThickness=5)
    dataset = volume()
    dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = [measures]
    assert next(iter_slices(dataset)).pixel_spacing_mm == pytest.approx(0.1)
    assert next(iter_slices(dataset)).slice_spacing_mm == 5
    measures.SpacingBetweenSlices = 1.5
    assert next(iter_slices(dataset)).slice_spacing_mm == 1.5
    assert read_mammogram(build(SliceThickness=None)).slice_spacing_mm is None


def test_hashes_are_keyed_and_linkable_only_by_key():
    elements = {"PatientID": "P1", "StudyInstanceUID": "1.2.9"}
    one, two = (read_mammogram(build(**elements), hash_key=KEY) for _ in range(2))
    assert (one.patient, one.study, one.volume_id) == (two.patient, two.study, two.volume_id)
    assert one.patient == keyed_hash("P1", KEY) and re.fullmatch("[0-9a-f]{32}", one.patient)
    assert read_mammogram(build(**elements), hash_key=b"another").patient != one.patient
    random = read_mammogram(build(**elements)).patient
    assert random == read_mammogram(build(**elements)).patient != one.patient
    assert read_mammogram(build()).patient is None


def test_separate_files_of_one_dbt_series_share_a_volume():
    def hashed(instance, **elements):
        dataset = build(SOPClassUID=TOMOSYNTHESIS, SOPInstanceUID=instance, SeriesInstanceUID="1.2.77", **elements)
        return read_mammogram(dataset, hash_key=KEY).volume_id

    assert hashed("1.1") == hashed("1.2") != hashed("1.1", ImageLaterality="L")


@pytest.mark.parametrize("damage", [None, "WindowCenter", "PhotometricInterpretation", "NumberOfFrames"])
def test_no_identifier_leaves(tmp_path, caplog, recwarn, damage):
    secrets = {
        "PatientName": "Zwingli^Ulrika", "PatientID": "ZQ-4711", "PatientBirthDate": "19530217",
        "StudyDate": "20190823", "AccessionNumber": "ACC99887", "StudyInstanceUID": "1.2.826.555.1",
        "SOPInstanceUID": "1.2.826.555.2", "SeriesInstanceUID": "1.2.826.555.3", "InstitutionName": "Spital Ost",
        "SeriesDescription": "Zwingli left", "ViewPosition": "ZWINGLI ULRIKA 19530217",
    }  # fmt: skip
    dataset = build(WindowCenter=10**6, WindowWidth=1, **secrets)
    if damage:
        setattr(dataset, damage, "77777777")
    path = save(dataset, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"77777777", b"ZQ 47113"))  # no such number can be set in pydicom
    recwarn.clear()
    with caplog.at_level(logging.INFO):
        try:
            said = repr(read_mammogram(path))
        except ImageRefused as error:
            said = str(error)
    said += caplog.text + "".join(str(warning.message) for warning in recwarn)
    for secret in (*secrets.values(), "ZWINGLI", "47113"):
        assert secret not in said
    assert len(said) > 20


# Refusals


def refused(source, *words, read=read_mammogram, **options):
    with pytest.raises(ImageRefused) as caught:
        read(source, **options)
    for word in (*words, ";"):
        assert word in str(caught.value)


def test_not_dicom(tmp_path):
    for name, content in {"text.dcm": b"Dear colleague, " * 40, "empty.dcm": b"", "zeros.dcm": bytes(300)}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, name, "DICOM")
        refused(tmp_path / name, name, read=count_slices)
        assert not is_dicom(tmp_path / name)
    refused(tmp_path / "missing.dcm", "missing.dcm", "no such file")
    refused(tmp_path, "no such file")
    refused(3, "int")


def test_is_dicom_by_content(tmp_path):
    path = save(build(), tmp_path, "no_extension")
    assert is_dicom(path) and is_dicom(str(path)) and not is_dicom(tmp_path)
    bare = tmp_path / "bare.dcm"
    dataset = build()
    del dataset.file_meta
    dataset.save_as(bare, implicit_vr=True, little_endian=True)
    assert is_dicom(bare)
    np.testing.assert_array_equal(read_mammogram(bare).pixels, RAMP)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLSLossless])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.97])
def test_truncated_files(tmp_path, syntax, share):
    noise = np.random.default_rng(0).integers(0, 4096, (3, 64, 64), dtype=np.uint16)
    path = save(build(noise, syntax=syntax), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "image.dcm", read=lambda source: list(iter_slices(source)))


def test_truncated_pixel_data_is_named(tmp_path):
    short = build()
    short.PixelData = short.PixelData[:-2]
    refused(short, "PixelData is truncated")
    refused(save(short, tmp_path), "PixelData is truncated")
    fewer = build(np.zeros((2, 8, 8), np.uint16), syntax=uid.RLELossless, NumberOfFrames=2)
    fewer.NumberOfFrames = 5
    refused(fewer, "PixelData is truncated", read=iter_slices)
    refused(save(fewer, tmp_path), "PixelData is truncated", read=iter_slices)


def test_no_pixel_data(tmp_path):
    dataset = build()
    del dataset.PixelData
    refused(dataset, "no PixelData")
    refused(save(dataset, tmp_path), "no PixelData")
    report = Dataset()
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    report.SOPClassUID, report.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", "1.2.3"
    refused(save(report, tmp_path), "Rows")


def test_undecodable_transfer_syntax(tmp_path):
    dataset = build(syntax=uid.RLELossless)
    dataset.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    refused(save(dataset, tmp_path), "MPEG2")
    del dataset.file_meta.TransferSyntaxUID
    refused(dataset, "TransferSyntaxUID")


def test_damaged_codestream(tmp_path):
    dataset = build(syntax=uid.JPEGLSLossless)
    path = save(dataset, tmp_path)
    content = bytearray(path.read_bytes())
    start = content.rindex(b"\xff\xd8\xff")
    content[start : start + 60] = bytes(60)
    path.write_bytes(content)
    refused(path, "PixelData", "JPEG-LS")


@pytest.mark.parametrize("elements", [{"PresentationIntentType": "FOR PROCESSING"}, {"SOPClassUID": PROCESSING}])
def test_for_processing(elements):
    dataset = build(**elements)
    refused(dataset, "PresentationIntentType", "allow_for_processing")
    assert read_mammogram(dataset, allow_for_processing=True).kind == "ffdm"


@pytest.mark.parametrize("colour", ["RGB", "YBR_FULL", "PALETTE COLOR"])
def test_colour(colour):
    refused(build(PhotometricInterpretation=colour), "PhotometricInterpretation", colour)
    refused(build(SamplesPerPixel=3), "PhotometricInterpretation")


@pytest.mark.parametrize(
    ("elements", "word"),
    [
        ({"Rows": 40000}, "Rows"),
        ({"Columns": 0}, "Columns"),
        ({"Rows": 32768, "Columns": 32768}, "1 GiB"),
        ({"BitsStored": None}, "BitsStored"),
        ({"NumberOfFrames": 10**9}, "truncated"),
        ({"NumberOfFrames": -3}, "Frames"),
    ],
)
def test_absurd_headers(tmp_path, elements, word):
    dataset = build(**elements)
    refused(dataset, word)
    refused(save(dataset, tmp_path), word)


def test_multi_frame_names_iter_slices():
    refused(volume(), "NumberOfFrames is 4", "iter_slices")


def test_hologic_secondary_capture(tmp_path):
    dataset = build(SOPClassUID=CAPTURE)
    block = dataset.private_block(0x7E01, "HOLOGIC, Inc.", create=True)
    block.add_new(0x10, "SQ", [Dataset()])
    refused(save(dataset, tmp_path), "Hologic", "BTO")
    dataset.SOPClassUID = MAMMOGRAPHY
    assert read_mammogram(dataset).kind == "ffdm"


def test_deflated_data_set(tmp_path):
    path = save(build(syntax=uid.DeflatedExplicitVRLittleEndian), tmp_path)
    np.testing.assert_array_equal(read_mammogram(path).pixels, RAMP)


def test_pixels_of_a_data_set_stay_untouched():
    dataset = build(WindowCenter=10, WindowWidth=20, PixelPaddingValue=0, photometric="MONOCHROME1")
    before = dataset.PixelData
    read_mammogram(dataset)
    assert dataset.PixelData == before and isinstance(read_mammogram(dataset), Mammogram)


# Real files

real = pytest.mark.skipif(not CODECS.is_dir(), reason=f"no real DICOM files in {CODECS}")
NAMES = sorted(path.name for path in CODECS.glob("*.dcm"))
COLOUR, UNREADABLE = "HTJ2KLossless_08_RGB.dcm", "liver_deflate.dcm"


@real
@pytest.mark.parametrize("name", [name for name in NAMES if name not in (COLOUR, UNREADABLE)])
def test_real_files_decode_as_pydicom_does(name):
    expected = pydicom.dcmread(CODECS / name).pixel_array
    expected = expected if expected.ndim == 3 else expected[None]
    slices = list(iter_slices(CODECS / name, **RAW))
    assert len(slices) == len(expected) == count_slices(CODECS / name)
    for each, file_frame in zip(slices, frame_order(CODECS / name), strict=True):
        np.testing.assert_array_equal(each.pixels, expected[file_frame])
    assert all(np.isfinite(each.pixels).all() for each in iter_slices(CODECS / name))


@real
def test_real_files_refused():
    refused(CODECS / COLOUR, COLOUR, "RGB")
    refused(CODECS / UNREADABLE, UNREADABLE, "transfer syntax", "1.2.840.10008.1.2.8.1", read=iter_slices)
