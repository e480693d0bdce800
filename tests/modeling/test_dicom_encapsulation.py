"""Compressed frames, however they are packed: order, fragments, offset tables, odd lengths, BitsStored that lies."""

import numpy as np
import pytest
from dicom_builders import RAW, SLICES, item, phantom, save
from phantom_formats import encoded, set_pixel_format, set_voi
from pydicom.encaps import generate_frames, parse_fragments

from dataset_scripts.phantom.dicom import TRANSFER_SYNTAXES, stored_values
from modeling_mammodino.dicom import frame_order, iter_slices
from modeling_mammodino.image_io import ImageFile

COMPRESSED = [name for name, encoding in TRANSFER_SYNTAXES.items() if encoding.encoder]
LOSSLESS = [name for name in COMPRESSED if not TRANSFER_SYNTAXES[name].method]
FRAGMENTED = [name for name in LOSSLESS if name != "RLELossless"]  # an RLE frame is one fragment (PS3.5 A.4.2)


def volume_for(syntax):
    """Unencoded, and its values (F, H, W), reduced to the bits that the transfer syntax holds."""
    bits = 12 if 12 in TRANSFER_SYNTAXES[syntax].bits else 8
    dataset = set_pixel_format(phantom(True)[0], bits)
    return dataset, stored_values(dataset)


def raw(source, **options):
    return np.stack([each.pixels for each in iter_slices(source, **RAW, **options)])  # (F, H, W)


@pytest.mark.parametrize("syntax", TRANSFER_SYNTAXES)
def test_frames_out_of_order_and_windows_of_their_own(tmp_path, syntax):
    dataset, stored = volume_for(syntax)
    order = (2, 0, 3, 1)  # frame `order[i]` of the file stands at place i
    groups = dataset.PerFrameFunctionalGroupsSequence
    positions = [group.PlanePositionSequence[0].ImagePositionPatient for group in groups]
    for place, frame in enumerate(order):
        groups[frame].PlanePositionSequence = [item(ImagePositionPatient=positions[place])]
        groups[frame].FrameVOILUTSequence = [item(WindowCenter=500 * (frame + 1), WindowWidth=1001)]
    path = save(encoded(dataset, syntax), tmp_path)
    assert frame_order(path) == order
    tolerance = 0.04 if TRANSFER_SYNTAXES[syntax].method else 0
    top = 2 ** int(dataset.BitsStored) - 1
    seen = raw(path)
    np.testing.assert_allclose(seen, stored[list(order)].astype(float), rtol=0, atol=tolerance * top)
    np.testing.assert_array_equal(raw(path, indices=[3, 1]), seen[[3, 1]])
    for slice_, frame in zip(iter_slices(path), order, strict=True):
        expected = np.clip((SLICES[frame] - (500.0 * (frame + 1) - 0.5)) / 1000 + 0.5, 0, 1)
        step = 4.095 / top  # of the reduced depth, in the window of 1000
        np.testing.assert_allclose(
            slice_.pixels, expected, rtol=0, atol=4.1 * tolerance + (step if top < 4095 else 1e-5)
        )


@pytest.mark.parametrize("fragments", [2, 3, 7])
@pytest.mark.parametrize("offset_table", ["basic", "none"])
@pytest.mark.parametrize("syntax", FRAGMENTED)
def test_frames_over_several_fragments(tmp_path, syntax, offset_table, fragments):
    for multi_frame in (False, True):
        dataset, values = phantom(multi_frame)
        encoded(dataset, syntax, offset_table=offset_table, fragments_per_frame=fragments)
        found, _ = parse_fragments(dataset.PixelData)
        assert found == fragments * len(values) + 1  # the first is the offset table
        for source in (dataset, save(dataset, tmp_path)):
            np.testing.assert_array_equal(raw(source), values)
        if multi_frame:
            np.testing.assert_array_equal(raw(save(dataset, tmp_path), indices=[2]), values[[2]])


@pytest.mark.parametrize("offset_table", ["extended", "none"])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_offset_tables(tmp_path, syntax, offset_table):
    for multi_frame in (False, True):
        dataset, values = phantom(multi_frame)
        path = save(encoded(dataset, syntax, offset_table=offset_table), tmp_path)
        assert ("ExtendedOffsetTable" in dataset) == (offset_table == "extended")
        np.testing.assert_array_equal(raw(path), values)
        if multi_frame:
            np.testing.assert_array_equal(raw(path, indices=[3, 0]), values[[3, 0]])


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_codestreams_of_odd_length(tmp_path, syntax):
    padded = set()
    for rows in range(33, 41):
        dataset, values = phantom(True)
        values = np.ascontiguousarray(values[:, :rows])
        dataset.Rows, dataset.PixelData = rows, values.tobytes()
        encoded(dataset, syntax, offset_table="extended")
        frames = generate_frames(dataset.PixelData, number_of_frames=len(values))
        padded |= {frame.endswith(b"\0") for frame in frames}
        np.testing.assert_array_equal(raw(save(dataset, tmp_path)), values)
    assert padded == {False, True}  # to an even length, with a zero


@pytest.mark.parametrize("syntax", [name for name in LOSSLESS if TRANSFER_SYNTAXES[name].signed])
@pytest.mark.parametrize("bits", [10, 12])
def test_streams_deeper_than_bits_stored(tmp_path, caplog, syntax, bits):
    """The files of BCS-DBT: a stream of 16 bits where BitsStored is 10; values may or may not exceed it."""
    dataset = set_voi(set_pixel_format(phantom(True)[0], bits), "NONE")
    stored = stored_values(dataset)
    dataset.BitsStored, dataset.HighBit = 16, 15
    encoded(dataset, syntax)
    dataset.BitsStored, dataset.HighBit = 10, 9
    path = save(dataset, tmp_path)
    np.testing.assert_array_equal(raw(path), stored)
    assert ("BitsStored" in caplog.text) == (bits == 12)


@pytest.mark.parametrize("syntax", [*LOSSLESS, "DeflatedExplicitVRLittleEndian", "ExplicitVRBigEndian"])
def test_an_open_stream_reads_as_its_file(tmp_path, syntax):
    dataset, values = phantom(True)
    path = save(encoded(dataset, syntax), tmp_path)
    with open(path, "rb") as stream:
        np.testing.assert_array_equal(raw(ImageFile(stream, "volume.dcm"), indices=[1, 3]), values[[1, 3]])


def test_padding_and_rescale_of_compressed_volumes(tmp_path):
    dataset, values = phantom(True)
    set_pixel_format(dataset, 14, signed=True)
    stored = stored_values(dataset).copy()
    stored[:, :9, -5:] = -8192
    stored[:, 9:, -1] = -8190
    dataset.PixelData = stored.tobytes()
    dataset.PixelPaddingValue, dataset.PixelPaddingRangeLimit = -8192, -8190
    path = save(encoded(dataset, "JPEGLSLossless"), tmp_path)
    for each, frame, image in zip(iter_slices(path), stored, values, strict=True):
        padding = frame <= -8190
        inside = ~padding
        np.testing.assert_allclose(each.pixels[inside], image[inside] / 4095, rtol=0, atol=1e-4)
        assert (each.pixels[padding] == each.pixels[inside].min()).all()
