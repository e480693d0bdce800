"""What the package consists of: the files of a checkpoint, and the few that a DICOM passes through."""

import sys
from pathlib import Path

import pydicom

import modeling_mammodino
from modeling_mammodino import MammoDinoConfig, MammoDinoForImageClassification, MammoDinoImageProcessor

PACKAGE = Path(modeling_mammodino.__file__).parent
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
PASSED = {
    "image_processing_mammodino.py",
    "dicom.py",
    "dicom_frames.py",
    "dicom_header.py",
    "dicom_pixels.py",
    "breast_segmentation.py",
    "rendering.py",
}


def test_the_files_of_the_package_are_those_that_a_checkpoint_carries(tmp_path):
    MammoDinoForImageClassification(MammoDinoConfig(**TINY)).save_pretrained(tmp_path)
    MammoDinoImageProcessor().save_pretrained(tmp_path)
    carried = {path.name for path in tmp_path.rglob("*.py")}
    assert carried == {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}


def files_entered(call) -> set[str]:
    """Files of the package whose functions a call enters."""
    entered = set()
    sys.setprofile(lambda frame, event, _: entered.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {Path(name).name for name in entered if Path(name).is_relative_to(PACKAGE)}


def test_a_dicom_passes_through_seven_files_to_pixel_values(phantom_archive):
    processor = MammoDinoImageProcessor()
    for path in sorted(phantom_archive.rglob("*.dcm"))[:2]:  # a mammogram and a volume
        assert files_entered(lambda path=path: processor(path)) <= PASSED


def test_a_header_is_parsed_once(phantom_archive, monkeypatch):
    parsed, read_preamble = [], pydicom.filereader.read_preamble
    monkeypatch.setattr(
        pydicom.filereader, "read_preamble", lambda *given: parsed.append(given) or read_preamble(*given)
    )
    processor = MammoDinoImageProcessor()
    for path in sorted(phantom_archive.rglob("*.dcm"))[:2]:
        parsed.clear()
        processor(path)
        assert len(parsed) == 1
