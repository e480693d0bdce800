"""Each way in which a corpus can be less, more or other than what was built is found."""

import hashlib
import json
import shutil

import cv2
import datasets
import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter

from dataset_scripts.corpus_reader import FEATURES, encode_png
from dataset_scripts.verify import CHECKS, main, verify_corpus


@pytest.fixture
def corpus(phantom_corpus, tmp_path):
    return shutil.copytree(phantom_corpus, tmp_path / "corpus")


def rewrite(corpus, change, features=FEATURES):
    """The one shard with changed rows, under a manifest that knows its new content."""
    path = corpus / "data-00000.arrow"
    rows = datasets.Dataset.from_file(str(path))
    for name in ("image", "tissue"):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    rows = change(rows.to_list())
    with ArrowWriter(path=str(path), features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["shards"][0] |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "rows": len(rows)}
    (corpus / "manifest.json").write_text(json.dumps(manifest))


def set_value(row, column, value):
    def change(rows):
        rows[row][column] = value
        return rows

    return change


def test_a_corpus_as_it_was_built_has_no_fault(corpus, capsys):
    assert verify_corpus(corpus) == []
    main([str(corpus), "--num_proc", "1"])
    assert "84 images of 24 volumes" in capsys.readouterr().out


def test_every_column_has_a_check():
    assert set(CHECKS) | {"image", "tissue"} == set(FEATURES)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("volume_id", "DOE^JANE"),
        ("patient", "12345"),
        ("study", "1.2.3"),
        ("kind", "mr"),
        ("laterality", "left breast of Jane"),
        ("view", "CC of Jane"),
        ("source", "Jane"),
        ("num_slices", 0),
        ("slice_index", -1),
        ("slice_spacing_mm", -1.0),
        ("pixel_spacing_mm", 0.0),
        ("mask_confidence", 1.5),
        ("burned_in_annotation", "JANE"),
        ("image", {"bytes": encode_png(np.zeros((40, 30), np.uint8)), "path": "/home/jane.dcm"}),
        ("image", {"bytes": b"", "path": None}),
        ("image", {"bytes": encode_png(np.zeros((400, 30), np.uint8)), "path": None}),
        ("image", {"bytes": encode_png(np.zeros((40, 30), np.uint16)), "path": None}),
        ("image", {"bytes": cv2.imencode(".jpg", np.zeros((40, 30), np.uint8))[1].tobytes(), "path": None}),
        ("image", {"bytes": encode_png(np.zeros((40, 30), np.uint8)) + b"DOE^JANE", "path": None}),
        ("tissue", {"bytes": encode_png(np.zeros((40, 30), np.uint8)), "path": None}),
    ],
)
def test_a_value_that_does_not_belong(corpus, column, value):
    rewrite(corpus, set_value(3, column, value))
    complaints = verify_corpus(corpus)
    assert complaints and any("row 3" in each for each in complaints)
    assert not any("JANE" in each.upper() for each in complaints)  # what leaks is not repeated


def test_text_in_a_picture_is_found(corpus):
    def change(rows):
        data = rows[0]["image"]["bytes"]
        chunk = b"tEXtName\0DOE^JANE"
        rows[0]["image"]["bytes"] = data[:33] + (len(chunk) - 4).to_bytes(4, "big") + chunk + b"\0\0\0\0" + data[33:]
        return rows

    rewrite(corpus, change)
    assert any("PNG chunks" in each for each in verify_corpus(corpus))


def test_another_column(corpus):
    rewrite(
        corpus,
        lambda rows: [row | {"name": "x"} for row in rows],
        datasets.Features({**FEATURES, "name": datasets.Value("string")}),
    )
    assert any("column name" in each for each in verify_corpus(corpus))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda rows: rows[:-1], "rows is 84"),
        (lambda rows: rows[:1] + rows[2:], "complete and in order"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "complete and in order"),
        (lambda rows: rows + rows[:6], "stand more than once"),
    ],
)
def test_rows_lost_doubled_or_out_of_order(corpus, change, word):
    rewrite(corpus, change)
    assert any(word in each for each in verify_corpus(corpus))


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "scan.dcm", "data-00099.arrow"])
def test_another_file(corpus, name):
    (corpus / name).write_bytes(b"x")
    assert any(name in each for each in verify_corpus(corpus))


def test_damage(corpus, capsys):
    shard = corpus / "data-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert any("not what was written" in each for each in verify_corpus(corpus))
    shard.unlink()
    with pytest.raises(SystemExit, match="faults"):
        main([str(corpus), "--num_proc", "1"])
    assert "missing" in capsys.readouterr().out
    (corpus / "manifest.json").unlink()
    with pytest.raises(SystemExit, match="go on with the build"):
        main([str(corpus)])


def test_a_path_or_an_unknown_field_in_the_manifest(corpus):
    manifest = json.loads((corpus / "manifest.json").read_text())
    (corpus / "manifest.json").write_text(json.dumps(manifest | {"collection": "/home/jane/scans", "patient": 1}))
    complaints = "\n".join(verify_corpus(corpus))
    assert "a path of a local machine" in complaints and "unknown field patient" in complaints
