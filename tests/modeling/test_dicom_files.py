"""What the DICOM reader refuses, with which words, and real files in many transfer syntaxes."""

import zlib

import cv2
import numpy as np
import pydicom
import pytest
from dicom_builders import CAPTURE, MAMMOGRAPHY, PROCESSING, RAMP, RAW, build, refused, save, volume
from made_inputs import REAL_DATA
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames

from modeling_mammodino.dicom import (
    Mammogram,
    frame_order,
    is_dicom,
    iter_slices,
    open_dicom,
    read_mammogram,
)

CODECS = REAL_DATA / "dicom_codecs"


def test_not_dicom(tmp_path):
    for name, content in {"text.dcm": b"Dear colleague, " * 40, "empty.dcm": b"", "zeros.dcm": bytes(300)}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, name, "DICOM")
        refused(tmp_path / name, name, read=open_dicom)
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
    dataset.save_as(tmp_path / "bare", implicit_vr=False, little_endian=True)
    dataset.save_as(tmp_path / "bare.001", implicit_vr=True, little_endian=True)
    for path in (bare, tmp_path / "bare", tmp_path / "bare.001"):
        assert is_dicom(path)
        np.testing.assert_array_equal(read_mammogram(path).pixels, RAMP)
    (tmp_path / "other").write_bytes(b"\x08\0\x05\0CS" + bytes(300))
    assert not is_dicom(tmp_path / "other")


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


@pytest.mark.parametrize(
    "syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless]
)
def test_more_frames_than_the_header_states(tmp_path, caplog, syntax):
    dataset = volume(levels=(0, 1, 2), shape=(32, 32), syntax=syntax)
    for frames in (3, 2, 1, None):
        caplog.clear()
        dataset.NumberOfFrames = frames
        path = save(dataset, tmp_path)
        if frames:
            assert [int(each.pixels[0, 0]) for each in iter_slices(path)] == [7, 107, 207][:frames]
            assert caplog.text.count("PixelData holds 3") == (frames < 3)
        else:
            refused(path, "NumberOfFrames (0028,0008) is missing", "holds 3", read=iter_slices)
            dataset.SOPClassUID = MAMMOGRAPHY
            assert read_mammogram(save(dataset, tmp_path)).pixels[0, 0] == 7 and "PixelData holds 3" in caplog.text


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


@pytest.mark.parametrize("color", ["RGB", "YBR_FULL", "PALETTE COLOR"])
def test_color(color):
    refused(build(PhotometricInterpretation=color), "PhotometricInterpretation", color)
    refused(build(SamplesPerPixel=3), "PhotometricInterpretation")


@pytest.mark.parametrize(
    ("elements", "word"),
    [
        ({"Rows": 40000}, "Rows"),
        ({"Columns": 0}, "Columns"),
        ({"Rows": 32768, "Columns": 32768}, "million pixels"),
        ({"BitsStored": None}, "BitsStored"),
        ({"NumberOfFrames": 10**9}, "NumberOfFrames is over 4096"),
        ({"NumberOfFrames": 4000}, "truncated"),
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
COLORED, DEFLATED_FRAMES = "HTJ2KLossless_08_RGB.dcm", "liver_deflate.dcm"


@real
@pytest.mark.parametrize("name", [name for name in NAMES if name not in (COLORED, DEFLATED_FRAMES)])
def test_real_files_decode_as_pydicom_does(name):
    dataset = pydicom.dcmread(CODECS / name)
    if not pydicom.pixels.get_decoder(dataset.file_meta.TransferSyntaxUID).is_available:
        pytest.skip("no decoder of it: pip install 'mammodino[codecs]'")
    expected = dataset.pixel_array
    expected = expected if expected.ndim == 3 else expected[None]
    slices = list(iter_slices(CODECS / name, **RAW))
    assert len(slices) == len(expected) == open_dicom(CODECS / name).num_frames
    for each, file_frame in zip(slices, frame_order(CODECS / name), strict=True):
        np.testing.assert_array_equal(each.pixels, expected[file_frame])
    assert all(np.isfinite(each.pixels).all() for each in iter_slices(CODECS / name))


@real
def test_a_colored_capture_is_read_as_its_luminance(caplog):
    expected = pydicom.dcmread(CODECS / COLORED).pixel_array  # (H, W, 3)
    (decoded,) = open_dicom(CODECS / COLORED).decode([0])
    np.testing.assert_array_equal(decoded, expected)
    luminance = cv2.cvtColor(expected, cv2.COLOR_RGB2GRAY)  # BT.601, in fixed point
    assert np.abs(read_mammogram(CODECS / COLORED).pixels.astype(int) - luminance).max() <= 1
    assert "colored" in caplog.text


@real
def test_a_deflated_image_frame_holds_what_inflating_it_by_hand_gives(tmp_path):
    """Of 1 bit, which pydicom does not read; a segmentation, and as such refused."""
    dataset = pydicom.dcmread(CODECS / DEFLATED_FRAMES)
    refused(CODECS / DEFLATED_FRAMES, "Segmentation Storage, an object that is no image")
    image = tmp_path / "image.dcm"
    segmentation, mammogram = (name.encode().ljust(28, b"\0") for name in (dataset.SOPClassUID, MAMMOGRAPHY))
    image.write_bytes((CODECS / DEFLATED_FRAMES).read_bytes().replace(segmentation, mammogram))
    slices = list(iter_slices(image, **RAW))
    assert len(slices) == dataset.NumberOfFrames
    frames = list(generate_frames(dataset.PixelData, number_of_frames=len(slices)))
    for each, place in zip(slices, frame_order(image), strict=True):
        inflated = np.frombuffer(zlib.decompressobj(-15).decompress(frames[place]), np.uint8)
        expected = np.unpackbits(inflated, bitorder="little").reshape(dataset.Rows, dataset.Columns)
        np.testing.assert_array_equal(each.pixels, expected)
    assert max(each.pixels.max() for each in slices) == 1
