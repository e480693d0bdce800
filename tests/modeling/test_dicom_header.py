"""What the DICOM reader takes from a header: order and values of frames, side, view, kind, spacing, keyed hashes."""

import logging
import math
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import pytest
from dicom_builders import CAPTURE, CT, PROJECTION, TOMOSYNTHESIS, build, item, save, volume
from pydicom import uid

from modeling_mammodino.dicom import frame_order, iter_slices, keyed_hash, open_dicom, read_mammogram
from modeling_mammodino.dicom_header import kind
from modeling_mammodino.image_io import InvalidImageError

KEY = b"a key of the tests"

# Volumes


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLSLossless])
def test_frames_come_in_order_of_position(tmp_path, syntax):
    dataset = volume(levels=(0, 1, 2, 3), positions=(3.0, 1.0, 4.0, 2.0), syntax=syntax)
    for source in (dataset, save(dataset, tmp_path)):
        slices = list(iter_slices(source))
        assert [int(each.pixels[0, 0]) for each in slices] == [107, 307, 7, 207]
        assert [each.slice_index for each in slices] == [0, 1, 2, 3]
        assert [each.slice_position_mm for each in slices] == [1, 2, 3, 4]
        assert {each.num_slices for each in slices} == {4} == {open_dicom(source).num_frames}
        assert slices[0].slice_spacing_mm == pytest.approx(1.0)
        assert frame_order(source) == (1, 3, 0, 2)


def test_order_from_stack_positions_then_file():
    dataset = volume()
    assert [int(each.pixels[0, 0]) for each in iter_slices(dataset)] == [7, 107, 207, 307]
    for group, place in zip(dataset.PerFrameFunctionalGroupsSequence, (4, 2, 3, 1), strict=True):
        group.FrameContentSequence = [item(StackID="1", InStackPositionNumber=place)]
    assert [int(each.pixels[0, 0]) for each in iter_slices(dataset)] == [307, 107, 207, 7]


@pytest.mark.parametrize("ids", [("1", "1", "1", "2", "2", "2"), ("2", "10", "2", "10", "2", "10")])
def test_stacks_at_the_same_positions_come_one_behind_another(caplog, ids):
    positions = (0, 2, 4, 0, 2, 4) if ids[0] == "1" else (4, 4, 2, 2, 0, 0)
    dataset = volume(levels=range(6), positions=positions)
    assert frame_order(dataset) == ((0, 3, 1, 4, 2, 5) if ids[0] == "1" else (4, 5, 2, 3, 0, 1)) and not caplog.records
    for group, stack in zip(dataset.PerFrameFunctionalGroupsSequence, ids, strict=True):
        group.FrameContentSequence = [item(StackID=stack)]
    slices = list(iter_slices(dataset))
    expected = (0, 1, 2, 3, 4, 5) if ids[0] == "1" else (4, 2, 0, 5, 3, 1)
    assert frame_order(dataset) == expected and [each.pixels[0, 0] // 100 for each in slices] == list(expected)
    assert [each.slice_position_mm for each in slices] == [0, 2, 4] * 2 and slices[0].slice_spacing_mm == 2
    assert {record.message.split(": ")[1] for record in caplog.records} == {"StackID"}


def test_oblique_planes_are_projected_on_their_normal():
    dataset = volume(positions=(0, 0, 0, 0))
    tilt = math.radians(60)
    axes = [1, 0, 0, 0, math.cos(tilt), math.sin(tilt)]
    normal = np.cross(axes[:3], axes[3:])
    dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = axes
    for group, millimeters in zip(dataset.PerFrameFunctionalGroupsSequence, (2, 1, 0, 3), strict=True):
        corner = millimeters * normal + np.array([9, 4, 0]) * [1, 0, 0]
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
    with pytest.raises(InvalidImageError, match=re.escape("0..5")):
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


def side_of_region(**code):
    return item(CodeValue="76752008", CodeMeaning="Breast", AnatomicRegionModifierSequence=[item(**code)])


def magnified(**code):
    return item(**code, ViewModifierCodeSequence=[item(CodeValue="399163009", CodeMeaning="magnification")])


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
        # a letter before the view, where no element states the side; LMO is a view of its own
        ({"ViewPosition": "RCC"}, "R", "CC"),
        ({"ViewPosition": "L MLO"}, "L", "MLO"),
        ({"ViewPosition": "LML"}, "L", "ML"),
        ({"ViewPosition": "LMO"}, None, "LMO"),
        ({"ImageLaterality": "L", "ViewPosition": "RCC"}, "L", "CC"),
        ({"ImageLaterality": "U", "Laterality": "L", "ViewPosition": "RCC"}, None, "CC"),
        ({"ImageLaterality": "", "Laterality": "left"}, "L", None),
        # the modifier of the anatomic region, in SCT, SRT and words
        ({"AnatomicRegionSequence": [side_of_region(CodeValue="7771000")]}, "L", None),
        ({"AnatomicRegionSequence": [side_of_region(CodeValue="G-A100")]}, "R", None),
        ({"AnatomicRegionSequence": [side_of_region(CodeMeaning="Left")]}, "L", None),
        ({"AnatomicRegionSequence": [side_of_region(CodeValue="51440002")]}, None, None),  # right and left
        ({"AnatomicRegionSequence": [side_of_region(CodeValue="7771000")], "ImageLaterality": "R"}, "R", None),
        # PatientOrientation says how the image lies, not which breast it is
        ({"PatientOrientation": ["A", "R"], "ViewPosition": "CC"}, None, "CC"),
        # the code is what counts; old codes of SRT stand under SNM3 too; modifiers leave the view as it is
        ({"ViewCodeSequence": [item(CodeValue="399162004", CodeMeaning="mlo")]}, None, "CC"),
        ({"ViewCodeSequence": [item(CodeValue="R-10226", CodingSchemeDesignator="SNM3")]}, None, "MLO"),
        ({"ViewCodeSequence": [magnified(CodeValue="R-10242")]}, None, "CC"),
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


def test_laterality_of_each_frame():
    dataset = volume(levels=(0, 1, 2))
    dataset.SharedFunctionalGroupsSequence[0].FrameAnatomySequence = [
        item(AnatomicRegionSequence=[side_of_region(CodeValue="24028007")])
    ]
    dataset.PerFrameFunctionalGroupsSequence[1].FrameAnatomySequence = [item(FrameLaterality="L")]
    dataset.PerFrameFunctionalGroupsSequence[2].FrameAnatomySequence = [item(FrameLaterality="B")]
    assert [each.laterality for each in iter_slices(dataset)] == ["R", "L", None]


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
        ({"SOPClassUID": CT, "Modality": "CT", "BodyPartExamined": "BREAST"}, "unknown"),  # may be breast CT
        ({"SOPClassUID": CT, "Modality": "CT", "PositionerType": "MAMMOGRAPHIC"}, "dbt"),
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


@pytest.mark.parametrize(
    ("elements", "is_square"),
    [
        ({}, True),
        ({"PixelSpacing": [0.1, 0.101]}, True),
        ({"PixelSpacing": [0.1, 0.1], "PixelAspectRatio": [2, 1]}, True),  # the standard has one or the other
        ({"PixelAspectRatio": [2, 0]}, True),
        ({"PixelAspectRatio": [2, 1]}, False),
        ({"ImagerPixelSpacing": [0.07, 0.08]}, False),
    ],
)
def test_pixels_that_are_not_square_are_said(caplog, elements, is_square):
    read_mammogram(build(**elements))
    assert caplog.text.count("not square") == (not is_square)


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
        except InvalidImageError as error:
            said = str(error)
    said += caplog.text + "".join(str(warning.message) for warning in recwarn)
    for secret in (*secrets.values(), "ZWINGLI", "47113"):
        assert secret not in said
    assert len(said) > 20


@pytest.mark.parametrize("encoding", ["ISO_IR 192", "ISO_IR 144"])
def test_a_patients_hash_does_not_depend_on_who_looked_at_the_data_set(tmp_path, encoding):
    path = save(build(PatientID="Иванов-1", SpecificCharacterSet=encoding), tmp_path)
    touched = pydicom.dcmread(path)
    assert touched.PatientID == "Иванов-1"
    sources = (path, pydicom.dcmread(path), touched, build(PatientID="Иванов-1", SpecificCharacterSet=encoding))
    assert len({read_mammogram(source, hash_key=KEY).patient for source in sources}) == 1


def test_a_malformed_second_value_does_not_drop_the_first(tmp_path):
    expected = read_mammogram(build(WindowCenter=2048, WindowWidth=500)).pixels
    for centers in (b"2048\\ab", b"2048\\"):
        path = save(build(WindowCenter=77777777, WindowWidth=[500, 500]), tmp_path)
        path.write_bytes(path.read_bytes().replace(b"77777777", centers.ljust(8)))
        np.testing.assert_array_equal(read_mammogram(path).pixels, expected)
        touched = pydicom.dcmread(path)
        np.testing.assert_array_equal(read_mammogram(touched).pixels, expected)


def test_threads_leave_pydicom_and_warnings_as_they_were(tmp_path):
    """And no thread hears what a header holds, whichever reads longest."""
    path = save(build(ViewPosition="ZWINGLI ULRIKA 19530217", WindowCenter=2048, WindowWidth=4096), tmp_path)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            before = (pydicom.config.settings._reading_validation_mode, list(warnings.filters))
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: [read_mammogram(path) for _ in range(15)], range(8)))
            assert (pydicom.config.settings._reading_validation_mode, list(warnings.filters)) == before
            warnings.warn("of the user", stacklevel=1)
    finally:
        sys.setswitchinterval(interval)
    assert [str(each.message) for each in heard] == ["of the user"]


def test_contrast_images_are_no_mammograms_and_s_view_is_synthetic():
    """PS3.3 table C.8-74: value 4 says what was recombined, value 5 the energy."""
    of = {
        ("ORIGINAL", "PRIMARY"): "ffdm",
        ("ORIGINAL", "PRIMARY", "", "", "LOW_ENERGY"): "ffdm",
        ("ORIGINAL", "PRIMARY", "", "", "HIGH_ENERGY"): "unknown",
        ("DERIVED", "PRIMARY", "", "SUBTRACTION"): "unknown",
        ("DERIVED", "PRIMARY", "", "S-VIEW"): "synthetic_2d",
    }
    assert {given: kind(build(ImageType=list(given)), 1) for given in of} == of
