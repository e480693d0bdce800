"""Files whose pixels are in another encoding than their header states, and rare transfer syntaxes."""

import io
import struct
import zlib

import numpy as np
import pydicom
import pytest
from dicom_builders import RAMP, RAW, build, refused, save, volume
from made_inputs import draw_breast
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info

from modeling_mammodino import dicom_frames
from modeling_mammodino.dicom import iter_slices, read_instance, read_mammogram
from modeling_mammodino.image_io import ImageFile

DEFLATED, UNCOMPRESSED, JPEG_XL = "1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.1.98", "1.2.840.10008.1.2.4.110"


def write(dataset, path, stated=None, implicit=False, behind=None):
    """A file whose meta header may state another transfer syntax than the data set is in."""
    stated = stated or dataset.file_meta.TransferSyntaxUID
    dataset.file_meta.TransferSyntaxUID = uid.UID(stated)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.ImplementationClassUID = uid.PYDICOM_IMPLEMENTATION_UID
    dataset.file_meta.FileMetaInformationVersion = b"\0\1"
    whole = b"\0" * 128 + b"DICM"
    meta = DicomBytesIO()
    meta.is_little_endian, meta.is_implicit_VR = True, False
    write_file_meta_info(meta, dataset.file_meta)
    whole += meta.getvalue()
    for part in (dataset, behind or pydicom.Dataset()):
        body = DicomBytesIO()
        body.is_little_endian, body.is_implicit_VR = True, implicit
        plain = pydicom.Dataset()
        plain.update({element.tag: element for element in part})
        write_dataset(body, plain)
        whole += body.getvalue()
    path.write_bytes(whole)
    return path


def in_frames(frames, syntax, pixels=RAMP, **elements):
    dataset = build(pixels, **elements)
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
    return dataset


@pytest.mark.parametrize("implicit", [True, False])
def test_the_vr_that_is_found_counts_not_the_one_that_is_stated(tmp_path, implicit):
    stated = uid.ExplicitVRLittleEndian if implicit else uid.ImplicitVRLittleEndian
    path = write(build(), tmp_path / "image.dcm", stated, implicit)
    np.testing.assert_array_equal(read_mammogram(path).pixels, RAMP)
    np.testing.assert_array_equal(read_mammogram(ImageFile(io.BytesIO(path.read_bytes()), "a.dcm")).pixels, RAMP)


@pytest.mark.parametrize("stated", [uid.JPEGLosslessSV1, uid.RLELossless, uid.JPEG2000, DEFLATED])
def test_native_pixels_under_a_compressed_syntax_are_read(tmp_path, caplog, stated):
    path = write(build(), tmp_path / "image.dcm", stated)
    np.testing.assert_array_equal(read_mammogram(path).pixels, RAMP)
    assert caplog.text.count("TransferSyntaxUID") == 1


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless])
@pytest.mark.parametrize("stated", [uid.ExplicitVRLittleEndian, uid.JPEGLosslessSV1, uid.JPEGBaseline8Bit])
def test_compressed_pixels_under_another_syntax_are_read(tmp_path, caplog, syntax, stated):
    pixels = np.random.default_rng(0).integers(0, 4096, (3, 32, 32), dtype=np.uint16)
    dataset = build(pixels, syntax=syntax, NumberOfFrames=3)
    dataset["PixelData"].is_undefined_length = True
    path = write(dataset, tmp_path / "image.dcm", stated)
    np.testing.assert_array_equal([each.pixels for each in iter_slices(path, **RAW)], pixels)
    assert caplog.text.count("TransferSyntaxUID") == 1


def test_what_is_in_no_known_syntax_is_refused_with_that_reason(tmp_path):
    dataset = build()
    dataset.PixelData = dataset.PixelData[:-100]
    refused(write(dataset, tmp_path / "a.dcm", uid.JPEG2000), "JPEG 2000", "not encapsulated")
    unknown = write(in_frames([bytes(900)], uid.JPEG2000), tmp_path / "b.dcm", uid.ExplicitVRLittleEndian)
    refused(unknown, "Explicit VR Little Endian", "PixelData is encapsulated")


def test_frames_without_a_codec_are_unpacked(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4096, (3, 31, 33), dtype=np.uint16)
    deflated = []
    for frame in pixels:
        deflater = zlib.compressobj(wbits=-15)
        deflated.append(deflater.compress(frame.tobytes()) + deflater.flush())
    for syntax, frames in ((DEFLATED, deflated), (UNCOMPRESSED, [frame.tobytes() for frame in pixels])):
        path = write(in_frames(frames, syntax, pixels), tmp_path / "image.dcm")
        np.testing.assert_array_equal([each.pixels for each in iter_slices(path, **RAW)], pixels)
        np.testing.assert_array_equal([each.pixels for each in iter_slices(path, indices=[2], **RAW)], pixels[2:])


@pytest.mark.parametrize("first", [0x0AFF, 0xD8FF])
def test_pixels_that_start_as_a_codestream_are_none(tmp_path, first):
    pixels = RAMP.copy()
    pixels[0, 0] = first
    path = write(in_frames([pixels.tobytes()], UNCOMPRESSED, pixels, bits=16), tmp_path / "image.dcm")
    np.testing.assert_array_equal(read_mammogram(path, **RAW).pixels, pixels)


def test_a_frame_that_inflates_without_end_takes_the_memory_of_one_frame(tmp_path):
    deflater = zlib.compressobj(9, wbits=-15)
    bomb = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(64)) + deflater.flush()
    assert not read_mammogram(write(in_frames([bomb], DEFLATED), tmp_path / "image.dcm")).pixels.any()


def test_jpeg_xl_through_imagecodecs(tmp_path, monkeypatch):
    imagecodecs = pytest.importorskip("imagecodecs")
    breast = draw_breast(96, 72)
    frame = imagecodecs.jpegxl_encode(breast, lossless=True)
    path = write(in_frames([frame], JPEG_XL, breast), tmp_path / "image.dcm")
    np.testing.assert_array_equal(read_mammogram(path, **RAW).pixels, breast)
    wrong = in_frames([frame], JPEG_XL, breast)
    wrong.Rows = 97
    refused(write(wrong, tmp_path / "wrong.dcm"), "96 x 72", "97 x 72")
    monkeypatch.setattr(dicom_frames, "_imagecodecs", lambda: None)
    refused(path, "JPEG XL", "imagecodecs")


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (48, 40), (333, 257), (3518, 2800), (300, 400)])
def test_the_size_of_jpeg_xl(rows, columns):
    imagecodecs = pytest.importorskip("imagecodecs")
    frame = imagecodecs.jpegxl_encode(np.zeros((rows, columns), np.uint8), lossless=True)
    assert dicom_frames.frame_header(frame)[:2] == (rows, columns)


@pytest.mark.parametrize("syntax", [uid.JPEGExtended12Bit, uid.JPEGBaseline8Bit])
def test_jpeg_of_twelve_bits_needs_more_than_pillow(tmp_path, monkeypatch, syntax):
    imagecodecs = pytest.importorskip("imagecodecs")
    breast = draw_breast(96, 72)
    frame = imagecodecs.jpeg8_encode(breast, level=98, bitspersample=12)
    path = write(in_frames([frame], syntax, breast), tmp_path / "image.dcm")
    assert np.abs(read_mammogram(path, **RAW).pixels.astype(int) - breast).max() <= 8
    monkeypatch.setattr(dicom_frames, "_pylibjpeg_is_here", lambda: False)
    np.testing.assert_array_equal(read_mammogram(path, **RAW).pixels, imagecodecs.jpeg8_decode(frame))
    monkeypatch.setattr(dicom_frames, "_imagecodecs", lambda: None)
    refused(path, "JPEG Extended of 12 bits", "pylibjpeg-libjpeg")


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless])
def test_elements_behind_the_pixels_count(tmp_path, syntax):
    behind = pydicom.Dataset()
    behind.WindowCenter, behind.WindowWidth = 1000, 500
    expected = read_mammogram(build(WindowCenter=1000, WindowWidth=500)).pixels
    dataset = build(syntax=syntax)
    dataset["PixelData"].is_undefined_length = syntax != uid.ExplicitVRLittleEndian
    path = write(dataset, tmp_path / "image.dcm", behind=behind)
    np.testing.assert_array_equal(read_mammogram(path).pixels, expected)
    path.write_bytes(path.read_bytes() + b"no element" * 50)
    assert read_mammogram(path).pixels.shape == RAMP.shape


def test_a_large_private_payload_stays_in_the_file(tmp_path, monkeypatch):
    dataset = build(SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    del dataset.PixelData
    path = save(dataset, tmp_path)
    with open(path, "ab") as file:
        file.write(struct.pack("<HH2sH", 0x7E01, 0x0010, b"LO", 12) + b"HOLOGIC, Inc")
        file.write(struct.pack("<HH4sL", 0x7E01, 0x1010, b"OB\0\0", 400 << 20))
        file.truncate(file.tell() + (400 << 20))  # sparse

    class Watched(io.FileIO):
        taken = 0

        def read(self, size=-1):
            content = super().read(size)
            Watched.taken += len(content)
            return content

    with Watched(path) as stream:
        refused(ImageFile(stream, "sco.dcm"), "Hologic", read=lambda source: read_instance(source, b"key"))
    assert Watched.taken < 1 << 16


def test_missing_elements_have_their_one_meaning(tmp_path, caplog):
    for name in ("SamplesPerPixel", "PixelRepresentation"):
        dataset = build()
        delattr(dataset, name)
        for source in (dataset, write(dataset, tmp_path / "image.dcm")):
            np.testing.assert_array_equal(read_mammogram(source).pixels, RAMP)
    assert caplog.text.count("PixelRepresentation") == 2


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
@pytest.mark.parametrize("high", [13, 15])
def test_values_end_at_high_bit(tmp_path, kind, high):
    """PS3.5-2013 8.1.1: 12 bits that end at bit 15 or 13; below them anything."""
    values = (RAMP.astype(np.int32) - (2048 if kind is np.int16 else 0)).astype(kind)
    stored = (values.astype(np.int32) << high - 11 & 0xFFFF >> 15 - high).astype(np.uint16).view(kind)
    for below in (0, 1):
        dataset = build(stored | kind(below), bits=16)
        dataset.BitsStored, dataset.HighBit = 12, high
        expected = values.astype(np.float32) if kind is np.int16 else values
        np.testing.assert_array_equal(read_mammogram(save(dataset, tmp_path), **RAW).pixels, expected)


def test_a_high_bit_that_the_values_contradict_is_not_followed():
    dataset = build()
    dataset.HighBit = 15
    np.testing.assert_array_equal(read_mammogram(dataset).pixels, RAMP)


@pytest.mark.parametrize("group", [0x6000, 0x6002, 0x601E])
def test_overlays_in_the_pixels_are_cleared(group):
    dataset = build(RAMP | np.uint16(1 << 13), bits=16)
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.add_new((group, 0x0100), "US", 16)
    dataset.add_new((group, 0x0102), "US", 13)
    np.testing.assert_array_equal(read_mammogram(dataset).pixels, RAMP)


def test_a_volume_whose_syntax_is_found_is_read_in_order(tmp_path):
    dataset = volume(positions=(3, 1, 2, 0), syntax=uid.RLELossless)
    dataset["PixelData"].is_undefined_length = True
    path = write(dataset, tmp_path / "image.dcm", uid.ExplicitVRLittleEndian)
    assert [int(each.pixels[0, 0]) for each in iter_slices(path)] == [307, 107, 207, 7]
    assert len(list(iter_slices(path, indices=[1]))) == 1
