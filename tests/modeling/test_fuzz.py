"""A short run of the fuzzer; the long one is `python -m tests.fuzz_images`."""

import fuzz_images
import pytest

from modeling_mammodino import MammoDinoImageProcessor

pytestmark = pytest.mark.slow
COUNT = 400


def test_a_mutant_is_a_function_of_seed_and_index():
    first, again = ([fuzz_images.mutant(1, index) for index in range(60)] for _ in range(2))
    assert first == again and len({content for _, content in first}) > 50


def test_every_seed_is_read():
    processor = MammoDinoImageProcessor()
    kinds = {name: fuzz_images.read(name, content, processor) for name, content in fuzz_images.seeds()}
    assert set(kinds.values()) <= {"read"} | {reason for name, reason in kinds.items() if name == "liver_deflate.dcm"}


def test_damaged_files_are_read_or_refused():
    results = dict(fuzz_images.fuzz(range(COUNT), seed=2026))
    findings = {index: result for index, result in results.items() if result.startswith("FINDING")}
    assert len(results) == COUNT and not findings
    assert sum(result == "read" for result in results.values()) > COUNT / 20
    assert all(";" in result for result in results.values() if result != "read")  # a remedy


def test_a_hang_is_a_finding(monkeypatch):
    reader = fuzz_images.Reader(seed=0)
    monkeypatch.setattr(fuzz_images, "LIMIT_SECONDS", 0.0)
    assert reader.read(2) == "FINDING no answer within 10 s"
    monkeypatch.undo()
    reader.process.kill()  # as a decoder that crashes would
    reader.process.join()
    assert reader.read(3) == "FINDING signal 9"
    reader.close()
