"""Each way in which a corpus can be less, more or other than what was built is found."""

import hashlib
import json
import shutil
import zlib

import cv2
import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets.arrow_writer import ArrowWriter

from dataset_scripts.corpus.build import build_corpus
from dataset_scripts.corpus.reader import FEATURES, encode_png
from dataset_scripts.corpus.verify import COLUMN_CHECKS, VIEWS, main, verify_corpus
from modeling_mammodino import MammoDinoImageProcessor, dicom_header


@pytest.fixture
def corpus(phantom_corpus, tmp_path):
    return shutil.copytree(phantom_corpus, tmp_path / "corpus")


def trust(corpus, **changes):
    """Makes the manifest know the one shard as it is now."""
    path = corpus / "data-00000.arrow"
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["shards"][0] |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **changes}
    (corpus / "manifest.json").write_text(json.dumps(manifest))


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
    trust(corpus, rows=len(rows))


def edit(corpus, name, **changes):
    content = json.loads((corpus / name).read_text())
    (corpus / name).write_text(json.dumps(content | changes))


def set_value(row, column, value):
    def change(rows):
        rows[row][column] = value
        return rows

    return change


def test_a_corpus_as_it_was_built_has_no_fault(corpus, capsys):
    assert verify_corpus(corpus) == []
    main([str(corpus), "--num_proc", "1"])  # by two processes: test_privacy.py
    assert "84 images of 24 volumes" in capsys.readouterr().out


def test_every_column_has_a_check():
    assert set(COLUMN_CHECKS) | {"image", "tissue"} == set(FEATURES)
    assert set(dicom_header._VIEWS) == VIEWS  # the reader's own


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
        *((column, None) for column in ("volume_id", "slice_index", "num_slices", "kind", "source", "mask_confidence")),
        ("mask_confidence", float("nan")),
        ("pixel_spacing_mm", float("inf")),
        ("image", None),
        ("tissue", None),
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
    assert any(each.startswith(f"data-00000.arrow, row 3, {column}: ") for each in complaints)
    assert not any("JANE" in each.upper() for each in complaints)  # what leaks is not repeated


def chunk(name, data):
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


@pytest.mark.parametrize("name", [b"tEXt", b"iTXt", b"zTXt", b"tIME", b"eXIf", b"iCCP", b"prVt"])
@pytest.mark.parametrize("column", ["image", "tissue"])
def test_text_in_an_image_is_found(corpus, name, column):
    def change(rows):
        data = rows[0][column]["bytes"]
        rows[0][column]["bytes"] = data[:33] + chunk(name, b"Name\0DOE^JANE") + data[33:]
        return rows

    rewrite(corpus, change)
    assert any("PNG chunks" in each for each in verify_corpus(corpus))


@pytest.mark.parametrize(
    "put",
    [
        lambda png: png[:-12] + chunk(b"IEND", b"DOE^JANE"),
        lambda png: png[:-12] + b"JANE" + png[-8:],  # as the length of the last chunk
        lambda png: png[:-12],
        lambda png: png + b"DOE^JANE",
        lambda png: png[:60] + b"JANE" + png[64:],  # a checksum that does not fit
    ],
)
def test_an_image_that_ends_otherwise(corpus, put):
    def change(rows):
        rows[0]["image"]["bytes"] = put(rows[0]["image"]["bytes"])
        return rows

    rewrite(corpus, change)
    assert any("row 0, image" in each for each in verify_corpus(corpus))


def test_an_image_that_claims_to_be_huge_is_not_decoded(corpus, monkeypatch):
    data = encode_png(np.zeros((40, 30), np.uint8))
    header = chunk(b"IHDR", b"\0\1\0\0" * 2 + data[24:29])
    rewrite(corpus, set_value(0, "image", {"bytes": data[:8] + header + data[33:], "path": None}))
    assert any("65536 x 65536" in each for each in verify_corpus(corpus))


@pytest.mark.parametrize("value", ["string", "float64"])
def test_another_column_or_another_type(corpus, value):
    name = "name" if value == "string" else "pixel_spacing_mm"
    features = datasets.Features({**FEATURES, name: datasets.Value(value)})
    rewrite(corpus, lambda rows: [row | {name: row.get(name, "x")} for row in rows], features)
    assert any("data-00000.arrow, schema: " in each for each in verify_corpus(corpus))


def test_text_beside_the_columns(corpus):
    """In the schema, in a record batch, behind the last row: where no reader looks."""
    path, plain = corpus / "data-00000.arrow", verify_corpus(corpus)
    content = path.read_bytes()
    with pa.ipc.open_stream(content) as batches:
        table = batches.read_all()
    for word, schema, note, behind in (
        ("schema", table.schema.with_metadata({**table.schema.metadata, b"note": b"DOE^JANE"}), None, b""),
        ("metadata of a record batch", table.schema, {"note": "DOE^JANE"}, b""),
        ("8 bytes behind", table.schema, None, b"DOE^JANE"),
    ):
        with pa.ipc.new_stream(str(path), schema) as writer:
            for batch in table.cast(schema).to_batches():
                writer.write_batch(batch, custom_metadata=note)
        path.write_bytes(path.read_bytes() + behind)
        trust(corpus)
        assert any(word in each for each in verify_corpus(corpus)), word
    path.write_bytes(content)
    trust(corpus)
    assert verify_corpus(corpus) == plain == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda rows: rows[:-1], "rows: 84, but there are 83"),
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


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000.arrow"])
def test_a_link(corpus, name, tmp_path):
    (corpus / name).rename(tmp_path / name)
    (corpus / name).symlink_to(tmp_path / name)
    assert any(each.startswith(f"{name}: a link") for each in verify_corpus(corpus))


@pytest.mark.slow
def test_damage_and_its_remedy(phantom_archive, tmp_path, capsys):
    corpus = tmp_path / "corpus"

    def build():
        build_corpus(
            [phantom_archive], corpus, (128, 96), MammoDinoImageProcessor(), "phantom", rows_per_shard=28, tasks=3
        )

    build()
    whole = {path.name: path.read_bytes() for path in corpus.iterdir()}
    shard = corpus / "data-00001.arrow"
    shard.write_bytes(whole[shard.name][:-2000] + b"x" + whole[shard.name][-1999:])
    assert any("data-00001.arrow, sha256: not what was written" in each for each in verify_corpus(corpus))
    shard.unlink()
    with pytest.raises(SystemExit, match="faults"):
        main([str(corpus), "--num_proc", "1"])
    assert "data-00001.arrow, cannot be read" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "CORPUS.private shards/00042.json, engine/shards and engine/manifest" in said
    private = tmp_path / "corpus.private"
    (private / "shards" / "00001.json").unlink()
    shutil.rmtree(private / "engine" / "shards")
    shutil.rmtree(private / "engine" / "manifest")
    build()
    assert {path.name: path.read_bytes() for path in corpus.iterdir()} == whole


def test_an_unfinished_corpus(corpus):
    (corpus / "manifest.json").unlink()
    with pytest.raises(SystemExit, match="go on with the build"):
        main([str(corpus)])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("state.json", {"_split": "DOE^JANE"}),
        ("state.json", {"_format_kwargs": {"note": "DOE^JANE"}}),
        ("state.json", {"_data_files": [{"filename": "data-00000.arrow", "note": "DOE^JANE"}]}),
        ("state.json", {"_data_files": []}),
        ("state.json", {"note": "DOE^JANE"}),
        ("dataset_info.json", {"description": "DOE^JANE"}),
        ("dataset_info.json", {"splits": {"DOE^JANE": 1}}),
        ("dataset_info.json", {"features": {}}),
        ("manifest.json", {"patient": "DOE^JANE"}),
        ("manifest.json", {"image_processor": {"bit_depth": 8, "note": "DOE^JANE"}}),
        ("manifest.json", {"shards": [{"name": "../DOE^JANE", "rows": 1, "sha256": "0" * 64}]}),
        ("manifest.json", {"rows": "DOE^JANE"}),
        ("manifest.json", {"rows_by_kind": {"DOE^JANE": 84}}),
        ("manifest.json", {"rows_by_kind": {"ffdm": 84}}),
        ("manifest.json", {"burned_in_annotations": {"picture": 84}}),
        ("manifest.json", {"doubtful_masks": 84}),
        ("manifest.json", {"files_found": 3}),
        ("manifest.json", {"fit": [64, 64]}),
        ("manifest.json", {"complete": False}),
    ],
)
def test_more_or_other_than_we_write(corpus, name, changes):
    edit(corpus, name, **changes)
    complaints = verify_corpus(corpus)
    assert complaints and not any("JANE" in each for each in complaints)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "manifest.json"])
def test_a_file_that_is_no_json(corpus, name):
    (corpus / name).write_text('{"a": 1')
    assert any(each.startswith(f"{name}: cannot be read") for each in verify_corpus(corpus))


@pytest.mark.parametrize("text", ["/home/jane/scans", "1.2.840.113619.2.66.2158408118.16050010109105933.10000"])
def test_a_place_or_a_uid_in_the_manifest(corpus, text):
    edit(corpus, "manifest.json", notes={f"read as {text}": 1})
    assert any("manifest.json: line 1 holds" in each for each in verify_corpus(corpus))


def test_a_list_of_faults_is_cut(corpus, capsys):
    rewrite(corpus, lambda rows: [row | {"kind": "mr"} for row in rows])
    with pytest.raises(SystemExit, match="85 faults"):
        main([str(corpus), "--num_proc", "1"])
    assert "... and 35 more" in capsys.readouterr().out
