"""Gray values of the DICOM reader against formulas written out from PS3.3: modality, padding, window, inversion."""

import logging
import math

import numpy as np
import pydicom
import pytest
from dicom_builders import MAMMOGRAPHY, RAMP, RAW, TOMOSYNTHESIS, build, item, save, volume
from pydicom import uid

from modeling_mammodino.dicom import iter_series, iter_slices, read_mammogram
from modeling_mammodino.dicom_pixels import AS_STORED, GraySettings, to_gray

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


@pytest.mark.parametrize("entries", [4096, 4095])
@pytest.mark.parametrize("vr", ["US", "OW"])
def test_lut_of_two_entries_packed_into_a_word(vr, entries):
    """PS3.3 C.11.1.1.1."""
    values = (np.arange(4096) ** 2 >> 16).astype(np.uint8)
    table = item(LUTDescriptor=[entries, 0, 8])
    table.add_new("LUTData", vr, values.tobytes() if vr == "OW" else values.view("<u2").tolist())
    seen = read_mammogram(build(VOILUTSequence=[table])).pixels.ravel()
    np.testing.assert_allclose(seen, values[np.minimum(np.arange(4096), entries - 1)] / 255, atol=1e-6)


@pytest.mark.parametrize(("center", "width"), [(32768, 65536), (60000, 100), (100, 0), (100, -5)])
@pytest.mark.parametrize("function", ["LINEAR", "SIGMOID"])
def test_window_of_another_bit_depth_is_ignored(caplog, center, width, function):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    dataset = build(pixels, bits=8, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    with caplog.at_level(logging.WARNING):
        seen = read_mammogram(dataset).pixels
    np.testing.assert_allclose(seen, pixels / 255, atol=1e-6)
    assert len(caplog.records) == 1 and "WindowCenter" in caplog.text


@pytest.mark.parametrize(("function", "bits"), [("SIGMOID", 16), ("LINEAR", 16)])
def test_a_full_range_window_of_16_bits_is_followed(caplog, function, bits):
    """Two files of CMMD among 8-bit ones."""
    pixels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    seen = read_mammogram(build(pixels, bits, WindowCenter=32768, WindowWidth=65536, VOILUTFunction=function)).pixels
    expected = [window_oracle(x, 32768, 65536, function) for x in range(65536)]
    np.testing.assert_allclose(seen.ravel(), expected, atol=2e-6)
    assert not caplog.records


def test_a_image_of_very_low_range_keeps_its_contrast():
    """One file of the RSNA set; all that it has lies within 1/64 of its window."""
    pixels = (RAMP // 100).astype(np.uint16)  # 0..40 of 0..4095
    seen = read_mammogram(build(pixels, WindowCenter=2048, WindowWidth=4096)).pixels
    np.testing.assert_allclose(seen, pixels / 4095, atol=1e-6)
    assert len(np.unique(seen)) == 41
    seen = read_mammogram(build(pixels, WindowCenter=500, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT")).pixels
    np.testing.assert_allclose(seen, pixels / 1000, atol=1e-6)  # 1/25 of the range, and followed


def test_a_window_that_turns_most_of_the_image_white_is_followed_with_a_warning(caplog):
    seen = read_mammogram(build(WindowCenter=128, WindowWidth=256)).pixels  # of 8 bits, for 12
    np.testing.assert_allclose(seen.ravel(), [window_oracle(x, 128, 256, "LINEAR") for x in range(4096)], atol=2e-6)
    assert len(caplog.records) == 1 and "white" in caplog.text


def test_white_is_counted_as_it_is_displayed(caplog):
    """Air is the largest value of MONOCHROME1, and black on display."""
    pixels = np.where(RAMP % 64 < 40, 4095, RAMP).astype(np.uint16)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    read_mammogram(build(pixels, photometric="MONOCHROME1", **window))
    assert not caplog.records
    read_mammogram(build(4095 - pixels, photometric="MONOCHROME1", **window))
    assert len(caplog.records) == 1 and "white" in caplog.text


def lut(entries, first, data, vr="US"):
    table = item(LUTDescriptor=[entries, first, 16])
    if data is not None:
        table.add_new("LUTData", vr, data)
    return table


@pytest.mark.parametrize("table", [lut(4, 0, None), item(LUTExplanation="none")])
def test_a_malformed_voi_lut_gives_way_to_the_window(caplog, table):
    seen = read_mammogram(build(VOILUTSequence=[table], WindowCenter=2048, WindowWidth=4096)).pixels
    np.testing.assert_allclose(seen, RAMP / 4095, atol=1e-6)
    np.testing.assert_array_equal(read_mammogram(build(VOILUTSequence=[table])).pixels, RAMP)
    assert caplog.text.count("VOILUTSequence: malformed") == 2


def test_a_voi_lut_beyond_the_pixels_is_ignored(caplog):
    table = lut(3, 60000, [0, 30000, 65535])
    np.testing.assert_allclose(read_mammogram(build(VOILUTSequence=[table])).pixels, RAMP / 4095, atol=1e-6)
    assert "VOILUTSequence" in caplog.text


def test_lut_of_all_16_bits_and_of_signed_values():
    pixels = np.arange(-32768, 32768, 16, dtype=np.int16).reshape(64, 64)
    table = lut(0, 32768, np.arange(65536, dtype="<u2").tobytes(), "OW")  # 0 entries: 65536; first: -32768, unsigned
    seen = read_mammogram(build(pixels, 16, VOILUTSequence=[table])).pixels
    np.testing.assert_allclose(seen, (pixels.astype(float) + 32768) / 65535, atol=1e-6)


def test_a_lut_nearer_to_the_frame_is_preferred_to_a_window_further_off():
    dataset = volume(levels=(0, 1), WindowCenter=1, WindowWidth=1)
    dataset.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence = [
        item(VOILUTSequence=[lut(200, 0, [*range(0, 51200, 256)])])
    ]
    groups = dataset.PerFrameFunctionalGroupsSequence
    groups[1].FrameVOILUTSequence = [item(WindowCenter=107, WindowWidth=214, VOILUTFunction="LINEAR_EXACT")]
    seen = [float(each.pixels[0, 0]) for each in iter_slices(dataset)]
    assert seen == pytest.approx([7 * 256 / 65535, 0.5])


def test_no_window_keeps_stored_values():
    assert read_mammogram(build()).pixels.dtype == np.uint16
    np.testing.assert_array_equal(read_mammogram(build()).pixels, RAMP)


# Modality, padding, inversion


def test_rescale_comes_before_the_window():
    dataset = build(RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000, WindowWidth=500)
    dataset.VOILUTFunction = "LINEAR_EXACT"
    expected = [window_oracle(2 * x - 1000, 1000, 500, "LINEAR_EXACT") for x in RAMP.ravel().tolist()]
    np.testing.assert_allclose(read_mammogram(dataset).pixels.ravel(), expected, atol=2e-6)
    rescaled = read_mammogram(dataset, GraySettings(do_voi_lut=False)).pixels
    np.testing.assert_array_equal(rescaled, 2.0 * RAMP - 1000)
    assert rescaled.dtype == np.float32
    np.testing.assert_array_equal(read_mammogram(dataset, **RAW).pixels, RAMP)


def test_modality_lut():
    table = item(LUTDescriptor=[3, 1, 16], ModalityLUTType="US")
    table.add_new("LUTData", "US", [7, 70, 700])
    seen = read_mammogram(build(ModalityLUTSequence=[table], RescaleSlope=5, RescaleIntercept=0)).pixels
    assert seen.ravel()[[0, 1, 2, 3, 4]].tolist() == [7, 7, 70, 700, 700]


def test_modality_lut_of_functional_groups():
    dataset = volume(levels=(0, 0))
    groups = dataset.PerFrameFunctionalGroupsSequence
    groups[1].PixelValueTransformationSequence = [item(ModalityLUTSequence=[lut(2, 7, [500, 600])])]
    assert [float(each.pixels[0, 0]) for each in iter_slices(dataset)] == [7, 500]


def test_a_slope_of_zero_does_not_erase_the_image(caplog):
    np.testing.assert_array_equal(read_mammogram(build(RescaleSlope=0, RescaleIntercept=5)).pixels, RAMP + 5.0)
    assert "RescaleSlope" in caplog.text


def test_monochrome1_with_and_without_window():
    windowed = {"WindowCenter": 2048, "WindowWidth": 4096}
    upright = read_mammogram(build(**windowed)).pixels
    np.testing.assert_allclose(read_mammogram(build(photometric="MONOCHROME1", **windowed)).pixels, 1 - upright)
    np.testing.assert_array_equal(read_mammogram(build(photometric="MONOCHROME1")).pixels, 4095 - RAMP)
    kept = read_mammogram(build(photometric="MONOCHROME1"), GraySettings(do_invert_monochrome1=False)).pixels
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


@pytest.mark.parametrize(("dtype", "padded", "vr", "written"), [("i2", -2000, "US", 63536), ("u2", 63536, "SS", -2000)])
def test_padding_written_with_the_other_sign(dtype, padded, vr, written):
    pixels = np.array([[padded, 100], [500, 900]], dtype)
    dataset = build(pixels, 16)
    dataset.add_new("PixelPaddingValue", vr, written)
    np.testing.assert_array_equal(read_mammogram(dataset).pixels, [[100, 100], [500, 900]])
    narrow = build(np.array([[0, 100], [200, 255]], np.uint8), 8, PixelPaddingValue=256)  # no value of 8 bits
    np.testing.assert_array_equal(read_mammogram(narrow).pixels, [[0, 100], [200, 255]])


def test_padding_beyond_bits_stored_widens_nothing(caplog):
    pixels = np.array([[65535, 4095], [1000, 0]], np.uint16)
    dataset = build(pixels, 16, "MONOCHROME1", BitsStored=12, HighBit=11, PixelPaddingValue=65535)
    np.testing.assert_array_equal(read_mammogram(dataset).pixels, [[0, 0], [3095, 4095]])
    assert not caplog.records


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


@pytest.mark.parametrize(
    ("stored", "expected", "about"),
    [
        ([0, 511, 1023, 512], [0, 511, -1, -512], []),  # the sign stands in bit 9, the bits above are clear
        ([0, 511, -1, -512], [0, 511, -1, -512], []),  # extended
        ([0, 511, -1, 700], [0, 511, -1, 700], ["BitsStored"]),  # a lie
        ([0, 511, 1024, 700], [0, 511, 1024, 700], ["BitsStored"]),
    ],
)
def test_the_sign_is_where_bits_stored_says_unless_it_lies(stored, expected, about):
    header, warned = item(BitsStored=10, PhotometricInterpretation="MONOCHROME2"), []
    frame = np.array(stored, np.int16).reshape(2, 2)
    seen = to_gray(frame, header, 0, AS_STORED, warn=lambda name, _: warned.append(name))
    np.testing.assert_array_equal(seen.ravel(), expected)
    assert warned == about


def test_overshoot_of_a_lossy_codec_is_no_lie(caplog):
    pixels = np.array([[0, 4096], [4120, 2000]], np.uint16)  # BitsStored 12
    dataset = build(pixels, 16, "MONOCHROME1", BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(read_mammogram(dataset).pixels, 4120 - pixels)
    assert not caplog.records


def test_embedded_overlay_bits_are_cleared():
    dataset = build(RAMP | 0x8000, bits=16, BitsStored=12, HighBit=11)
    dataset.add_new((0x6000, 0x0102), "US", 15)
    np.testing.assert_array_equal(read_mammogram(dataset).pixels, RAMP)


def test_inverse_presentation_turns_monochrome2_once():
    np.testing.assert_array_equal(read_mammogram(build(PresentationLUTShape="INVERSE")).pixels, 4095 - RAMP)
    np.testing.assert_array_equal(read_mammogram(build(PresentationLUTShape="IDENTITY")).pixels, RAMP)
    both = build(photometric="MONOCHROME1", PresentationLUTShape="INVERSE")
    np.testing.assert_array_equal(read_mammogram(both).pixels, 4095 - RAMP)
    kept = read_mammogram(build(PresentationLUTShape="INVERSE"), GraySettings(do_invert_monochrome1=False)).pixels
    np.testing.assert_array_equal(kept, RAMP)


# One decision a volume


def slices_of(kind, frames, **elements):
    """The same slices as frames of one file, or as files."""
    if kind == "frames":
        return list(iter_slices(build(frames, 16, SOPClassUID=TOMOSYNTHESIS, **elements)))
    files = [build(each, 16, **elements) for each in frames]
    return list(iter_series(files))


def ramps(*peaks, dtype=np.uint16):
    """Slices (64, 64) that reach different largest values; pixel 0 holds 500 in each."""
    frames = np.stack([np.linspace(0, peak, 4096).reshape(64, 64) for peak in peaks]).astype(dtype)
    frames[:, 0, 0] = 500
    return frames


@pytest.mark.parametrize("kind", ["frames", "files"])
def test_a_window_fits_all_slices_of_a_volume_or_none(kind):
    """A 12-bit volume, a window of 16 bits: alone, the dark slices would be shown sixteen times as bright."""
    frames = ramps(700, 850, 1000, 1150, 1150, 1000, 850, 700)
    wide = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 32768, "WindowWidth": 65536}
    seen = [float(each.pixels[0, 0]) for each in slices_of(kind, frames, **wide)]
    assert len(set(seen)) == 1
    fits = {"WindowCenter": 400, "WindowWidth": 800, "VOILUTFunction": "LINEAR_EXACT"}
    seen = [float(each.pixels[0, 0]) for each in slices_of(kind, frames, **fits)]
    assert seen == pytest.approx([500 / 800] * 8)


@pytest.mark.parametrize("kind", ["frames", "files"])
def test_all_slices_of_a_volume_are_inverted_against_one_maximum(kind):
    frames = ramps(900, 4000, 20000)  # BitsStored says 10 bits
    slices = slices_of(kind, frames, photometric="MONOCHROME1", BitsStored=10, HighBit=9)
    assert [int(each.pixels[0, 0]) for each in slices] == [32767 - 500] * 3


@pytest.mark.parametrize("kind", ["frames", "files"])
def test_the_sign_of_a_lut_and_of_pixels_is_that_of_the_volume(kind):
    frames = ramps(900, 1000, 800, dtype=np.int16)
    frames[1, 0, 1] = -100
    table = lut(0, 65536 - 2000, (np.arange(65536) % 4096 * 16).astype("<u2").tobytes(), "OW")  # first: -2000
    slices = slices_of(kind, frames, ModalityLUTSequence=[table])
    assert [int(each.pixels[0, 0]) for each in slices] == [2500 * 16] * 3


def test_one_slice_is_read_as_the_whole_volume_is():
    dataset = build(ramps(700, 850, 1000, 1150, 900, 600), 16, WindowCenter=32768, WindowWidth=65536, BitsStored=12)
    together = list(iter_slices(dataset))
    for index in (0, 3, 5):
        (alone,) = iter_slices(dataset, indices=[index])
        np.testing.assert_array_equal(alone.pixels, together[index].pixels)
