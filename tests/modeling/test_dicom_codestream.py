"""Frame headers of compressed frames, refusals by them, deflated data sets, and private objects."""

import io
import zlib

import numpy as np
import pydicom
import pytest
from dicom_builders import build, phantom, refused, save
from phantom_formats import encoded, set_pixel_format
from pydicom import uid
from pydicom.encaps import encapsulate, generate_fragments, generate_frames
from pydicom.pixels.decoders.base import Decoder

from modeling_mammodino import dicom, dicom_frames
from modeling_mammodino.dicom import iter_slices, read_mammogram
from modeling_mammodino.dicom_frames import JPEG_2000, FrameHeader, frame_header
from modeling_mammodino.image_io import ImageFile

SYNTAXES = (
    "JPEGBaseline8Bit",
    "JPEGExtended12Bit",
    "JPEGLossless",
    "JPEGLSLossless",
    "JPEG2000Lossless",
    "HTJ2KLossless",
)


def fit(dataset, syntax):
    from dataset_scripts.phantom.dicom import fit_pixel_format

    return encoded(fit_pixel_format(dataset, syntax), syntax)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_codestream_states_its_size(syntax):
    dataset = fit(phantom(True)[0], syntax)
    _, *frames = generate_fragments(dataset.PixelData)
    assert len(frames) == 4
    for frame in frames:
        assert frame_header(frame)[:3] == (65, 47, 1)


@pytest.mark.parametrize("head", [b"\xff\x4f\xff\x51\0\x29", b"\xff\x4f\xff\x51" + bytes(60), b"\xff\xd8\xff\xda\0\4"])
def test_a_damaged_frame_header_is_no_frame_header(head):
    with pytest.raises(ValueError, match="cut off|no area|no frame header"):
        frame_header(head)
    assert frame_header(b"\0\1\2\3" * 20) is None and frame_header(b"") is None


def test_tiles_of_jpeg_2000():
    head = bytearray(b"\xff\x4f\xff\x51\0\x29\0\0")
    for value in (100, 90, 4, 2, 10, 20, 0, 0):
        head += value.to_bytes(4, "big")
    assert frame_header(bytes(head + b"\0\x01")) == FrameHeader(88, 96, 1, tiles=10 * 5, family=JPEG_2000)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_size_that_differs_from_the_header_is_refused_before_decoding(tmp_path, monkeypatch, syntax):
    dataset = fit(phantom(False)[0], syntax)
    dataset.Rows = 66
    monkeypatch.setattr(Decoder, "iter_array", lambda *given, **options: pytest.fail("was decoded"))
    refused(save(dataset, tmp_path), "65 x 47 x 1", "66 x 47 x 1")


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("syntax", ["JPEGBaseline8Bit", "JPEGExtended12Bit", "JPEGLossless", "JPEGLSLossless"])
def test_a_frame_that_is_cut_off_within_a_whole_item_is_refused(tmp_path, syntax, fragments):
    dataset = fit(phantom(True)[0], syntax)
    whole = [each.pixels for each in iter_slices(dataset)]
    frames = [frame.rstrip(b"\0") for frame in generate_frames(dataset.PixelData, number_of_frames=4)]
    for padding in (b"\0", b"\xff", bytes(5000)):
        padded = [frame + padding for frame in frames]
        dataset.PixelData = encapsulate(padded, fragments_per_frame=fragments)
        np.testing.assert_array_equal([each.pixels for each in iter_slices(save(dataset, tmp_path))], whole)
    for place in (1, 3):
        for rest in (b"", bytes(5000)):  # cut off, or not yet arrived
            damaged = [*frames]
            damaged[place] = frames[place][: len(frames[place]) * 9 // 10] + rest
            dataset.PixelData = encapsulate(damaged, fragments_per_frame=fragments)
            for source in (dataset, save(dataset, tmp_path)):
                refused(source, "PixelData is damaged", "fetch the file again", read=iter_slices)


@pytest.mark.parametrize("syntax", ["JPEGBaseline8Bit", "JPEGLSLossless"])
def test_what_the_strict_decoder_objects_to_is_read_by_no_other(syntax):
    pytest.importorskip("jpeg_ls")
    dataset = fit(phantom(False)[0], syntax)
    (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
    half = len(frame) // 2
    dataset.PixelData = encapsulate([frame[:half] + b"\xff\xd8" * 20 + frame[half + 40 :]])
    refused(dataset, "PixelData cannot be decoded", "fetch or export")


def test_a_codestream_of_gigabytes_is_refused(tmp_path):
    dataset = fit(phantom(False)[0], "JPEG2000Lossless")
    at = dataset.PixelData.find(b"\xff\x4f\xff\x51") + 8
    damaged = dataset.PixelData[:at] + (60000).to_bytes(4, "big") * 2 + dataset.PixelData[at + 8 :]
    dataset.PixelData = damaged
    refused(save(dataset, tmp_path), "60000 x 60000", "export")


def test_a_deflated_data_set_that_inflates_without_end_is_refused(tmp_path, monkeypatch):
    path = save(build(syntax=uid.DeflatedExplicitVRLittleEndian), tmp_path)
    content = path.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(8)) + deflater.flush()
    monkeypatch.setattr(dicom, "MAX_INFLATED_BYTES", 4 << 20)
    monkeypatch.setattr(pydicom, "dcmread", lambda *given, **options: pytest.fail("was inflated whole"))
    path.write_bytes(content[:start] + bomb)
    refused(path, "inflates to over 4 MiB")
    refused(ImageFile(io.BytesIO(path.read_bytes()), "stream.dcm"), "stream.dcm", "inflates")


@pytest.mark.parametrize(
    ("sop", "name"),
    [
        ("1.2.840.113619.4.30", "private object of GE"),
        ("1.3.12.2.1107.5.9.1", "private object of Siemens"),
        ("1.9.8.7", "private object of a vendor"),
        ("1.2.840.10008.5.1.4.1.1.88.50", "Mammography CAD SR Storage"),
        ("1.2.840.10008.5.1.4.1.1.66", "Raw Data Storage"),
    ],
)
def test_objects_that_are_no_images_are_refused_by_name(sop, name):
    dataset = build(SOPClassUID=sop)
    del dataset.Rows, dataset.PixelData
    refused(dataset, name, "without Rows")


def test_a_segmentation_is_no_image_though_it_has_pixels():
    refused(build(SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"), "Segmentation Storage, an object that is no image")


def test_too_many_tiles_are_refused(monkeypatch):
    monkeypatch.setattr(dicom_frames, "MAX_TILES", 0)
    refused(fit(phantom(False)[0], "JPEG2000Lossless"), "1 tiles")


def test_every_frame_is_looked_at(tmp_path):
    """Also one in the middle; the others are not decoded first."""
    dataset = fit(phantom(True)[0], "JPEG2000Lossless")
    at = dataset.PixelData.rfind(b"\xff\x4f\xff\x51") + 8
    dataset.PixelData = dataset.PixelData[:at] + (48).to_bytes(4, "big") + dataset.PixelData[at + 4 :]
    refused(save(dataset, tmp_path), "65 x 48 x 1", read=iter_slices)


def test_eight_bits_in_sixteen_of_lossless_jpeg():
    dataset = set_pixel_format(phantom(False)[0], bits_stored=8, bits_allocated=16)
    expected = read_mammogram(dataset).pixels
    np.testing.assert_array_equal(read_mammogram(encoded(dataset, "JPEGLossless")).pixels, expected)
