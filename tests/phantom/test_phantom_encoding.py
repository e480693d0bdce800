"""The bar of the DICOM reader: however a phantom is written, it reads back to the same image."""

import sys

import numpy as np
import pydicom
import pytest
from dicom_builders import RAW, phantom, save
from phantom_formats import VOI_FORMS, VOI_PLACES, as_secondary_capture, encoded, set_pixel_format, set_voi
from pydicom import uid
from pydicom.encaps import generate_frames

from dataset_scripts.phantom.archive import main
from dataset_scripts.phantom.dicom import (
    TRANSFER_SYNTAXES,
    encode,
    near_lossless_error,
    stored_values,
)
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.dicom import iter_slices
from modeling_mammodino.dicom_pixels import GraySettings

# Largest and mean error of a stored value after a lossy codec, as fractions of the range of BitsStored. Measured on
# this phantom, all depths: 0.031, 0.0027; 0.0020, 0.00026; NEAR by definition, 0.0017; 0.0078, 0.0008; 0.0020, 0.0002.
LOSSY = {
    "JPEGBaseline8Bit": (0.04, 0.005),
    "JPEGExtended12Bit": (0.003, 0.0005),
    "JPEGLSNearLossless": (None, 0.002),
    "JPEG2000": (0.012, 0.0012),
    "HTJ2K": (0.003, 0.0005),
}
CASES = [
    pytest.param(syntax, bits, multi_frame, id=f"{syntax}-{bits}-{'volume' if multi_frame else 'image'}")
    for syntax, encoding in TRANSFER_SYNTAXES.items()
    for bits in (8, 12, 16)
    if bits in encoding.bits
    for multi_frame in (False, True)
]


def read(source, **options):
    """(F, H, W) in the order of the file."""
    return np.stack([each.pixels for each in iter_slices(source, **options)])


def half_step(bits):
    """Largest error of an image in 0..1 from writing 12 bits as `bits`, and from float32."""
    return (0.5 / (2**bits - 1) if bits != 12 else 0) + 1e-6


@pytest.mark.parametrize(("syntax", "bits", "multi_frame"), CASES)
def test_every_transfer_syntax(tmp_path, syntax, bits, multi_frame):
    dataset, values = phantom(multi_frame)
    stored = stored_values(set_pixel_format(dataset, bits)).astype(float)
    path = save(encoded(dataset, syntax), tmp_path)
    assert pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID == getattr(uid, syntax)
    top = 2**bits - 1
    most, mean = LOSSY.get(syntax, (0, 0))
    most = near_lossless_error(bits) / top if most is None else most
    for source in (path, dataset):
        error = np.abs(read(source, **RAW) - stored)
        assert error.max() <= most * top and error.mean() <= mean * top
        np.testing.assert_allclose(read(source), values / 4095, rtol=0, atol=most + half_step(bits))


def test_lossy_files_say_so_and_lossless_ones_do_not():
    for syntax in TRANSFER_SYNTAXES:
        dataset, _ = phantom(False)
        before = dataset.SOPInstanceUID
        encoded(set_pixel_format(dataset, 12 if 12 in TRANSFER_SYNTAXES[syntax].bits else 8), syntax)
        lossy = syntax in LOSSY
        assert dataset.LossyImageCompression == ("01" if lossy else "00")
        assert (dataset.SOPInstanceUID != before) == lossy
        assert not lossy or (dataset.LossyImageCompressionRatio > 1 and dataset.LossyImageCompressionMethod)


# Frame header, and what else the standard asks for: selection value or NEAR; CAP of HTJ2K; progression and TLM of RPCL.
CODESTREAMS = {
    "JPEGBaseline8Bit": (b"\xff\xc0",),
    "JPEGExtended12Bit": (b"\xff\xc1",),
    "JPEGLossless": (b"\xff\xc3", b"\xff\xda\x00\x08\x01\x01\x00\x06"),
    "JPEGLosslessSV1": (b"\xff\xc3", b"\xff\xda\x00\x08\x01\x01\x00\x01"),
    "JPEGLSLossless": (b"\xff\xf7", b"\xff\xda\x00\x08\x01\x01\x00\x00"),
    "JPEGLSNearLossless": (b"\xff\xf7", b"\xff\xda\x00\x08\x01\x01\x00\x04"),
    "HTJ2KLossless": (b"\xff\x4f\xff\x51", b"\xff\x50\x00\x08"),
    "HTJ2KLosslessRPCL": (b"\xff\x4f\xff\x51", b"\xff\x50\x00\x08", b"\xff\x52\x00\x0c\x00\x02", b"\xff\x55"),
}


@pytest.mark.parametrize("syntax", CODESTREAMS)
def test_the_codestream_is_of_the_kind_that_the_file_states(syntax):
    dataset, _ = phantom(False)
    encoded(set_pixel_format(dataset, 8 if syntax == "JPEGBaseline8Bit" else 12), syntax)
    (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
    assert all(part in frame[:400] for part in CODESTREAMS[syntax])


FORMATS = [(8, 8), (8, 16), (10, 16), (12, 16), (14, 16), (16, 16)]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("bits", "allocated"), FORMATS)
def test_every_bit_depth_sign_and_polarity(tmp_path, bits, allocated, signed, photometric):
    for multi_frame in (False, True):
        dataset, values = phantom(multi_frame)
        set_pixel_format(dataset, bits, allocated, signed, photometric)
        stored = stored_values(dataset)
        assert int(stored.max()) - int(stored.min()) > 0.5 * 2**bits and (stored.min() < 0) == signed
        for syntax in ("ExplicitVRLittleEndian", "ExplicitVRBigEndian"):
            path = save(encode(dataset, syntax), tmp_path)
            np.testing.assert_array_equal(read(path, **RAW), stored)
            np.testing.assert_allclose(read(path), values / 4095, rtol=0, atol=half_step(bits))


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", [name for name in TRANSFER_SYNTAXES if TRANSFER_SYNTAXES[name].signed])
def test_signed_monochrome1_in_every_codec(tmp_path, syntax, bits, caplog):
    dataset, values = phantom(True)
    stored = stored_values(set_pixel_format(dataset, bits, signed=True, photometric="MONOCHROME1"))
    path = save(encoded(dataset, syntax), tmp_path)
    most = LOSSY.get(syntax, (0,))[0]
    np.testing.assert_allclose(read(path, **RAW), stored.astype(float), rtol=0, atol=most * (2**bits - 1))
    np.testing.assert_allclose(read(path), values / 4095, rtol=0, atol=most + half_step(bits))
    assert not caplog.records  # a lossy codec may overshoot BitsStored, which then does not lie


# Windows. The phantom's gray values fill 12 bits; a narrower window than its own makes every form visible.
CENTER, WIDTH = 1500.0, 2001.0


def windowed(values, form):
    """PS3.3 C.11.2.1.2.1 with ymin = 0 and ymax = 1; SIGMOID by C.11.2.1.3.1."""
    if form == "NONE":
        return values.astype(np.float32)
    if form == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - CENTER) / WIDTH))
    return np.clip((values - (CENTER - 0.5)) / (WIDTH - 1) + 0.5, 0, 1)


@pytest.mark.parametrize("place", VOI_PLACES)
@pytest.mark.parametrize("form", VOI_FORMS)
def test_every_form_of_the_window_in_every_place(tmp_path, form, place):
    for multi_frame in (False, True) if place == "top" else (True,):
        dataset, values = phantom(multi_frame)
        path = save(set_voi(dataset, form, place, CENTER, WIDTH), tmp_path)
        seen = read(path)
        np.testing.assert_allclose(seen, windowed(values, form), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(read(path, settings=GraySettings(do_voi_lut=False)), values)


@pytest.mark.parametrize("form", VOI_FORMS)
def test_windows_apply_to_rescaled_values(form):
    dataset, values = phantom(True)
    set_pixel_format(dataset, 14, signed=True)
    set_voi(dataset, form, "per_frame", CENTER, WIDTH)
    scale = 1 if form != "NONE" else 4095  # without a window, the values of the modality LUT
    np.testing.assert_allclose(read(dataset) / scale, windowed(values, form) / scale, rtol=0, atol=3 * half_step(14))


@pytest.mark.parametrize("multi_frame", [False, True])
def test_the_image_processor_gives_the_same_image(tmp_path, multi_frame):
    processor = MammoDinoImageProcessor(size={"height": 56, "width": 56}, slices_per_volume=2)
    expected = processor(save(phantom(multi_frame)[0], tmp_path, "plain.dcm"))
    assert len(expected["pixel_values"]) == (2 if multi_frame else 1)

    def differences(dataset):
        seen = processor(save(dataset, tmp_path))
        assert np.array_equal(seen["tissue_mask"], expected["tissue_mask"])
        return np.abs(np.asarray(seen["pixel_values"]) - np.asarray(expected["pixel_values"]))

    dataset = phantom(multi_frame)[0]
    assert differences(encoded(set_pixel_format(dataset, signed=True), "JPEGLosslessSV1")).max() == 0
    dataset = set_pixel_format(phantom(multi_frame)[0], photometric="MONOCHROME1")
    assert differences(encoded(dataset, "HTJ2KLossless")).max() == 0
    dataset = set_voi(phantom(multi_frame)[0], "LINEAR_EXACT")
    assert differences(encoded(dataset, "JPEG2000Lossless", offset_table="extended")).max() == 0
    # Without a window the values stay integers, and are rounded when resized.
    dataset = encode(set_voi(phantom(multi_frame)[0], "NONE"), "ExplicitVRBigEndian")
    assert differences(dataset).mean() < 0.02  # 2.5 steps of 8 bits


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGBaseline8Bit"])
def test_an_archive_in_a_transfer_syntax(tmp_path, syntax):
    if syntax == "JPEGBaseline8Bit":
        pytest.importorskip("imagecodecs")
    shape = ["--num_slices", "4", "--height_px", "64", "--width_px", "48", "--pixel_spacing_mm", "2.5"]
    for name, options in (("plain", []), ("encoded", ["--transfer_syntax", syntax])):
        main(["--output", str(tmp_path / name), "--num_patients", "2", *shape, *options])
    files = sorted(each.relative_to(tmp_path / "plain") for each in (tmp_path / "plain").rglob("*.*"))
    assert files == sorted(each.relative_to(tmp_path / "encoded") for each in (tmp_path / "encoded").rglob("*.*"))
    for file in (each for each in files if each.suffix == ".dcm"):
        header = pydicom.dcmread(tmp_path / "encoded" / file, stop_before_pixels=True)
        assert header.file_meta.TransferSyntaxUID == getattr(uid, syntax)
        assert header.file_meta.MediaStorageSOPInstanceUID == header.SOPInstanceUID
        if syntax == "RLELossless" or pydicom.pixels.get_decoder(uid.JPEGBaseline8Bit).is_available:
            tolerance = 0 if syntax == "RLELossless" else 0.06
            np.testing.assert_allclose(
                read(tmp_path / "encoded" / file), read(tmp_path / "plain" / file), rtol=0, atol=tolerance
            )


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "no"), "--transfer_syntax", "GIF"])
    assert "JPEG2000Lossless" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(SystemExit, match=r"HTJ2K is written with imagecodecs.*mammodino\[test\]"):
        main(["--output", str(tmp_path / "no"), "--transfer_syntax", "HTJ2K"])
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("bits", "allocated", "signed", "syntax", "message"),
    [
        (12, None, False, "JPEGBaseline8Bit", "holds 8 bits, unsigned, not 12 unsigned"),
        (10, None, False, "JPEGExtended12Bit", "holds 12 bits, unsigned, not 10 unsigned"),
        (8, None, True, "JPEGBaseline8Bit", "not 8 signed"),
        (12, None, True, "JPEGLSNearLossless", "not 12 signed"),
        (8, 16, False, "RLELossless", "must be allocated 8"),
        (12, None, False, "JPEG2000Part2", "must be one of ImplicitVR"),
    ],
)
def test_illegal_encodings_are_named(bits, allocated, signed, syntax, message):
    if syntax.startswith("JPEG") and syntax in TRANSFER_SYNTAXES and TRANSFER_SYNTAXES[syntax].encoder == "imagecodecs":
        pytest.importorskip("imagecodecs")
    dataset = set_pixel_format(phantom(False)[0], bits, allocated, signed)
    before = dataset.PixelData
    with pytest.raises(ValueError, match=message):
        encode(dataset, syntax)
    assert dataset.PixelData == before


COLOR = {
    "ExplicitVRLittleEndian": 0,
    "RLELossless": 0,
    "JPEGLSLossless": 0,
    "JPEG2000Lossless": 0,
    "JPEGBaseline8Bit": 9,
}


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
@pytest.mark.parametrize("syntax", COLOR)
def test_gray_written_as_color(syntax, photometric):
    """By pydicom, which converts YBR_FULL to RGB."""
    for multi_frame in (False, True):
        dataset, values = phantom(multi_frame)
        encoded(as_secondary_capture(dataset, photometric), syntax)
        assert dataset.SamplesPerPixel == 3 and dataset.PhotometricInterpretation == photometric
        color = pydicom.pixels.pixel_array(dataset).reshape(*values.shape, 3)
        gray = np.rint(values / 4095 * 255)
        assert np.abs(color - gray[..., None]).max() <= COLOR[syntax]
        for read, expected in zip(iter_slices(dataset), gray, strict=True):
            assert np.abs(read.pixels.astype(int) - expected).max() <= COLOR[syntax]
