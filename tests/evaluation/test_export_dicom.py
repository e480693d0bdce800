"""Structured reports and segmentations, read back with highdicom: at the pixels and in the frame of the source."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from made_inputs import draw_breast, random_encoder

from dataset_scripts.phantom.dicom import BreastInfo, mammogram_dataset, save, tomosynthesis_dataset
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.image_io import InvalidImageError
from modeling_mammodino.rendering import Placement
from training import export_dicom
from training.evaluation.detection import find_lesions
from training.evaluation.detection.data import LesionImage, LesionImageRenderer
from training.evaluation.detection.detector import build_detector
from training.evaluation.heat_maps import HeatMap
from training.evaluation.run_settings import DetectionSettings
from training.export_dicom import Algorithm, main, on_source, source_header, write_seg, write_sr

hd = pytest.importorskip("highdicom", reason="needs highdicom: pip install -e '.[clinical]'")

SIZE = {"height": 112, "width": 84}
ELLIPSE, LESION = ((60, 140), (16, 22)), (44, 118, 77, 163)  # drawn; its box, half-open
SHAPE = (300, 200)
MADE = Algorithm("test", "ab" * 32)


def info(side: str) -> BreastInfo:
    return BreastInfo("PHANTOM-000001", side, "CC", 0.5, 2.0)


def drawn(side: str) -> tuple[np.ndarray, np.ndarray]:
    """A breast with a bright lesion (H, W), and the lesion's box."""
    plane = np.minimum(draw_breast(*SHAPE), 2600)
    cv2.ellipse(plane, *ELLIPSE, 0, 0, 360, 4095, -1)
    box = np.array(LESION, float)
    if side == "R":
        plane, box = (
            np.ascontiguousarray(plane[:, ::-1]),
            np.array([SHAPE[1] - box[2], box[1], SHAPE[1] - box[0], box[3]]),
        )
    return plane, box


def write_image(folder: Path, kind: str) -> tuple[Path, np.ndarray, int]:
    """A file of a kind, its lesion's box and its frame, -1 of a mammogram."""
    path, frame = folder / f"{kind}.dcm", -1
    plane, box = drawn("L" if kind == "left" else "R")
    if kind == "volume":
        frame = 2
        slices = np.repeat(np.minimum(draw_breast(*SHAPE), 2600)[None, :, ::-1], 4, axis=0)
        slices[frame] = plane
        dataset = tomosynthesis_dataset(np.ascontiguousarray(slices), info("R"))
        groups = dataset.PerFrameFunctionalGroupsSequence  # stored against their positions
        positions = [each.PlanePositionSequence for each in groups]
        for each, position in zip(groups, reversed(positions), strict=True):
            each.PlanePositionSequence = position
    else:
        dataset = mammogram_dataset(plane, info("L" if kind == "left" else "R"))
    if kind == "monochrome1":
        dataset.PhotometricInterpretation, dataset.PresentationLUTShape = "MONOCHROME1", "INVERSE"
        dataset.PixelData = (4095 - plane).astype("<u2").tobytes()
    save(dataset, path)
    return path, box, frame


@pytest.fixture(scope="module", params=["left", "right", "monochrome1", "volume"])
def image(request, tmp_path_factory) -> tuple[Path, np.ndarray, int]:
    return write_image(tmp_path_factory.mktemp(request.param), request.param)


def bright_box(pixel_values) -> np.ndarray:
    """The box of what is as bright as the drawn lesion."""
    y, x = np.nonzero(pixel_values > 0.97 * pixel_values.max())
    return np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1]], float)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    detector = build_detector(random_encoder(), 32, 1, 4, True, 0)
    detector.save_pretrained(folder / "model")
    MammoDinoImageProcessor(size=SIZE, patch_size=14, do_clahe=False).save_pretrained(folder / "model")
    settings = DetectionSettings(dataset="table", data_dir="x", encoder="x", output_dir=str(folder))
    (folder / "result.json").write_text(json.dumps({"detector": {}, "settings": asdict(settings)}))
    return folder


def test_a_box_lies_at_the_pixels_and_in_the_frame_of_the_source(image, run_folder, tmp_path, monkeypatch):
    """Seen on the canvas, cropped, mirrored and shrunk, by a detector that finds what is bright."""
    path, box, frame = image

    def detect(_, inputs):
        planes = [each[0].numpy() for each in inputs]
        area = [(plane > 0.97 * max(map(np.max, planes))).sum() for plane in planes]
        return [(bright_box(plane), np.array([0.9 if each == max(area) else 0.1]))
                for plane, each in zip(planes, area, strict=True)]  # fmt: skip

    monkeypatch.setattr(find_lesions, "detect", detect)
    main([str(run_folder), str(path), "--output", str(tmp_path)])
    (written,) = tmp_path.iterdir()
    report, source = hd.sr.srread(written), pydicom.dcmread(path)
    (group,) = report.content.get_planar_roi_measurement_groups()
    x, y = group.roi.value.T
    pixel = 200 / SIZE["width"]  # of the canvas at most, in pixels of the source
    np.testing.assert_allclose([x.min(), y.min(), x.max(), y.max()], box, atol=pixel)
    assert len(x) == 5 and (x[0], y[0]) == (x[-1], y[-1])
    (reference,) = group.roi.ContentSequence[0].ReferencedSOPSequence
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert reference.get("ReferencedFrameNumber") == (frame + 1 if frame >= 0 else None)
    assert report.StudyInstanceUID == source.StudyInstanceUID and report.PatientID == source.PatientID
    assert report.SeriesInstanceUID != source.SeriesInstanceUID and report.CompletionFlag == "PARTIAL"
    (score,) = group.get_measurements()
    assert (score.value, score.unit.value, score.name.meaning) == (90.0, "%", "Certainty of Finding")
    assert report.SeriesDescription.startswith("RESEARCH USE ONLY")
    assert written.read_bytes().count(b"RESEARCH USE ONLY") >= 3  # series, device, algorithm
    site = group.finding_sites[0]
    assert (site.topographical_modifier or site.laterality).meaning == ("Left" if path.stem == "left" else "Right")


def test_a_heat_map_lies_on_the_pixels_and_the_frame_of_the_source(image, tmp_path, monkeypatch):
    path, box, frame = image
    encoder = random_encoder()
    encoder.save_pretrained(tmp_path / "model")
    MammoDinoImageProcessor(size=SIZE, patch_size=14, do_clahe=False).save_pretrained(tmp_path / "model")
    seen = []

    def brightness(patches, *_):
        (each,) = LesionImageRenderer(MammoDinoImageProcessor.from_pretrained(tmp_path / "model"))(
            str(path), None if frame < 0 else [frame], 1
        )
        blocks = each.image.reshape(8, 14, 6, 14).max(axis=(1, 3)).astype(float)
        seen.append(each)
        return [HeatMap("brightest", np.where(blocks > 0.97 * blocks.max(), 1.0, 0.0)), HeatMap("all", blocks, True)]

    monkeypatch.setattr("training.heat_map.heat_maps", brightness)
    chosen = [] if frame < 0 else ["--slice", str(frame)]
    main([str(tmp_path / "model"), str(path), "--output", str(tmp_path / "out"), *chosen])
    source = pydicom.dcmread(path)
    maps = hd.seg.segread(tmp_path / "out" / f"{path.stem}.heat_maps.dcm")
    mask = hd.seg.segread(tmp_path / "out" / f"{path.stem}.breast.dcm")
    for segmentation, kind, count in ((maps, "FRACTIONAL", 2), (mask, "BINARY", 1)):
        assert segmentation.SegmentationType == kind and segmentation.number_of_segments == count
        assert (segmentation.Rows, segmentation.Columns) == (source.Rows, source.Columns) == SHAPE
        spacing = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
        assert list(spacing) == [0.5, 0.5]
        assert segmentation.ContentLabel == "RESEARCH_ONLY"
        assert segmentation.SeriesDescription.startswith("RESEARCH USE ONLY")
        for each in segmentation.PerFrameFunctionalGroupsSequence:
            reference = each.DerivationImageSequence[0].SourceImageSequence[0]
            assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
            if frame >= 0:
                assert reference.ReferencedFrameNumber == frame + 1
                position = source.PerFrameFunctionalGroupsSequence[frame].PlanePositionSequence[0].ImagePositionPatient
                assert each.PlanePositionSequence[0].ImagePositionPatient == position
    brightest = maps.pixel_array[0]
    y, x = np.nonzero(brightest)
    assert brightest.max() == 255
    patch = 14 * 200 / SIZE["width"]
    np.testing.assert_allclose([x.min(), y.min(), x.max() + 1, y.max() + 1], box, atol=patch)
    assert brightest[int(box[1] + box[3]) // 2, int(box[0] + box[2]) // 2] == 255
    breast = mask.pixel_array.reshape(SHAPE)
    plane = source.pixel_array if frame < 0 else source.pixel_array[frame]
    truth = plane < 4000 if path.stem == "monochrome1" else plane > 300
    assert (breast.astype(bool) & truth).sum() > 0.8 * (breast.astype(bool) | truth).sum()


def test_each_pixel_of_the_source_has_its_own_patch():
    """Against the placement, pixel by pixel."""
    shape, rng = (65, 47), np.random.default_rng(0)
    values, placement = rng.random((8, 6)), Placement(-0.9, 70.3, 1.7, -5.2)
    image = LesionImage(0, 1, np.zeros((112, 84), np.uint8), values, placement, shape)
    found = on_source(values, image)
    for y, x in rng.integers((0, 0), shape, (300, 2)):
        column, row = (-0.9 * (x + 0.5) + 70.3) / 14, (1.7 * (y + 0.5) - 5.2) / 14
        inside = 0 <= row < 8 and 0 <= column < 6
        expected = values[int(row), int(column)] if inside else 0.0
        near_edge = min(abs(column - round(column)), abs(row - round(row))) < 0.02
        assert near_edge or found[y, x] == pytest.approx(expected)


def test_what_cannot_be_exported_is_said(tmp_path, run_folder, monkeypatch):
    path, box, _ = write_image(tmp_path, "left")
    header = source_header(path)
    with pytest.raises(ValueError, match="no box; a report needs one"):
        write_sr(tmp_path / "a.dcm", header, np.empty((0, 4)), np.empty(0, int), np.empty(0), MADE)
    with pytest.raises(ValueError, match="the source has"):
        write_seg(tmp_path / "a.dcm", header, np.zeros((1, 3, 3), bool), ["breast"], 0, MADE)
    volume = source_header(write_image(tmp_path, "volume")[0])
    del volume.PerFrameFunctionalGroupsSequence
    with pytest.raises(ValueError, match="no PlanePositionSequence.* of the 4 frames"):
        write_seg(tmp_path / "a.dcm", volume, np.zeros((1, *SHAPE), bool), ["breast"], 0, MADE)
    monkeypatch.setattr(find_lesions, "detect", lambda _, inputs: [(np.zeros((1, 4)), np.zeros(1))] * len(inputs))
    main([str(run_folder), str(path), "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
    cv2.imwrite(str(tmp_path / "image.png"), drawn("L")[0])
    options = ["--output", str(tmp_path / "none")]
    with pytest.raises(SystemExit, match="none of 1 files can be used; the first: .*image.png: not a DICOM file"):
        main([str(run_folder), str(tmp_path / "image.png"), *options])
    monkeypatch.setattr(export_dicom, "hd", None)
    with pytest.raises(SystemExit, match="clinical"):
        main([str(run_folder), str(path), *options])
    assert not list(tmp_path.glob("*.boxes.dcm"))


@pytest.fixture
def finds_one_box(monkeypatch):
    found = np.array([[10.0, 20.0, 30.0, 40.0]]), np.array([0.9])
    monkeypatch.setattr(find_lesions, "detect", lambda _, inputs: [found] * len(inputs))


def referenced(path: Path) -> str:
    report = pydicom.dcmread(path)
    return (
        report.CurrentRequestedProcedureEvidenceSequence[0]
        .ReferencedSeriesSequence[0]
        .ReferencedSOPSequence[0]
        .ReferencedSOPInstanceUID
    )


def test_results_lie_as_their_files_do_and_replace_none_of_another_image(tmp_path, run_folder, finds_one_box, capsys):
    """Archives repeat names, have UIDs for names, and hold what cannot be used, and results of an earlier call."""
    archive, instances = tmp_path / "archive", {}
    source, *_ = write_image(tmp_path, "left")
    for name in ("p1/1-1.dcm", "p2/1-1.DCM", "1.2.840.1", "1.2.840.2"):
        dataset = pydicom.dcmread(source)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        instances[name] = dataset.SOPInstanceUID
        (archive / name).parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(archive / name)
    cv2.imwrite(str(archive / "image.png"), drawn("L")[0])
    (archive / "cut.dcm").write_bytes(source.read_bytes()[:-1000])
    output = archive / "results"
    for _ in range(2):
        main([str(run_folder), str(archive), "--output", str(output)])
        written = {path.relative_to(output).as_posix(): referenced(path) for path in output.rglob("*.dcm")}
        assert written == {name.removesuffix(".dcm").removesuffix(".DCM") + ".boxes.dcm": uid
                           for name, uid in instances.items()}  # fmt: skip
        assert "4 files; 2 refused" in capsys.readouterr().out
    one = ["--output", str(tmp_path / "one")]
    main([str(run_folder), str(archive / "p1/1-1.dcm"), *one])
    with pytest.raises(SystemExit, match="p2/1-1.DCM: .*one/1-1.boxes.dcm: belongs to another image"):
        main([str(run_folder), str(archive / "p2/1-1.DCM"), *one])
    assert referenced(tmp_path / "one/1-1.boxes.dcm") == instances["p1/1-1.dcm"]
    with pytest.raises(SystemExit, match="Comprehensive SR Storage"):  # named, not found
        main([str(run_folder), str(output / "1.2.840.1.boxes.dcm"), *one])


@pytest.mark.parametrize(
    ("values", "blank"),
    [
        ({"PatientBirthDate": "19000000", "StudyDate": "2020-01-05", "StudyTime": "12:30:00", "PatientSex": "FEMALE"},)
        * 2,
        ({"PatientBirthDate": "ANON", "StudyDate": "00000000", "PatientSize": "1,65"},) * 2,
        ({"PatientSex": "f"}, {}),
        ({"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce"}, {}),
        ({"SpecificCharacterSet": "ISO 2022 IR 149", "PatientName": "Hong^Gildong=\u6d2a^\u5409\u6d1e"}, {}),
        ({"SpecificCharacterSet": "", "PatientOrientation": "", "ImagerPixelSpacing": ""}, {}),
        ({"PatientOrientation": None, "ImagerPixelSpacing": [0.5], "BodyPartThickness": "thin"}, {}),
    ],
)
def test_headers_as_archives_have_them(tmp_path, caplog, values, blank):
    """What cannot be read is left blank, and said once; the rest is as in the file."""
    path, box, _ = write_image(tmp_path, "left")
    dataset = pydicom.dcmread(path)
    with pydicom.config.disable_value_validation():
        for keyword, value in values.items():
            vr = "LO" if keyword in blank or keyword == "BodyPartThickness" else pydicom.datadict.dictionary_VR(keyword)
            dataset.pop(keyword, None)
            if value is not None:
                dataset.add_new(keyword, vr, value)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # stores no VR
        dataset.save_as(path, enforce_file_format=True)
    with caplog.at_level(logging.WARNING):
        header = source_header(path)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ([", ".join(blank)] if blank else [])
    write_sr(tmp_path / "sr.dcm", header, box[None], np.zeros(1, int), np.ones(1), MADE)
    write_seg(tmp_path / "seg.dcm", header, np.zeros((1, *SHAPE), bool), ["breast"], 0, MADE)
    for name in ("sr.dcm", "seg.dcm"):
        written = pydicom.dcmread(tmp_path / name)
        assert not any(written.get(keyword) for keyword in blank)
        assert str(written.PatientName) == str(pydicom.dcmread(path).PatientName)
        assert written.PatientSex == ("" if "PatientSex" in blank else "F" if "PatientSex" in values else "O")
        assert written.PatientID == "PHANTOM-000001"
    assert len(hd.sr.srread(tmp_path / "sr.dcm").content.get_planar_roi_measurement_groups()) == 1


def test_orientation_and_spacing_of_a_volume_may_stand_in_its_frames(tmp_path):
    header = source_header(write_image(tmp_path, "volume")[0])
    shared = header.SharedFunctionalGroupsSequence[0]
    del header.SharedFunctionalGroupsSequence
    write = header, np.zeros((1, *SHAPE), bool), ["breast"], 2, MADE
    with pytest.raises(InvalidImageError, match="a.dcm: no PlaneOrientationSequence, PixelMeasuresSequence of the 4"):
        write_seg(tmp_path / "a.dcm", *write)
    for group in header.PerFrameFunctionalGroupsSequence:
        group.update(shared)
    write_seg(tmp_path / "a.dcm", *write)
    written = hd.seg.segread(tmp_path / "a.dcm").SharedFunctionalGroupsSequence[0]
    axes = written.PlaneOrientationSequence[0].ImageOrientationPatient
    assert axes == shared.PlaneOrientationSequence[0].ImageOrientationPatient
    assert written.PixelMeasuresSequence[0].PixelSpacing == [0.5, 0.5]
