"""Tables of files without a header: what enters a corpus, and what is refused by name."""

import cv2
import pytest
from made_inputs import draw_breast

from dataset_scripts.corpus.build import build_corpus
from dataset_scripts.corpus.metadata import FileMetadata
from dataset_scripts.corpus.reader import Corpus
from dataset_scripts.corpus.verify import verify_corpus
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.dicom import keyed_hash

KEY = b"a key of the tests, long enough"
TABLE = "file,patient,laterality,view,source,age\na.png,Jane Doe,LEFT,cc,A,61\nb.png,Jane Doe,R,MLO,B,61\n"


def test_images_get_their_patient_side_view_and_source(tmp_path):
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        cv2.imwrite(str(tmp_path / name), draw_breast(seed=number))
    (tmp_path / "labels.csv").write_text(TABLE)
    output = tmp_path / "out" / "corpus"
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    build_corpus(
        files, output, (128, 96), MammoDinoImageProcessor(), "films", metadata=[tmp_path / "labels.csv"], tasks=1
    )
    rows = Corpus(output).rows.select_columns(["patient", "laterality", "view", "source"]).to_list()
    jane = keyed_hash("Jane Doe", KEY)
    assert sorted(map(repr, rows)) == sorted(
        map(
            repr,
            [
                {"patient": jane, "laterality": "L", "view": "CC", "source": "films-A"},
                {"patient": jane, "laterality": "R", "view": "MLO", "source": "films-B"},
                {"patient": None, "laterality": None, "view": None, "source": "films"},
            ],
        )
    )
    assert verify_corpus(output) == []
    assert "Jane" not in (output / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("path,patient\na.png,p\n", "needs a column `file`"),
        ("file,age\na.png,61\n", "at least one of"),
        ("file,patient\n,p\n", "line 2: `file` is empty"),
        ("file,laterality\na.png,both\n", "laterality 'both'"),
        ("file,kind\na.png,mri\n", "kind 'mri'"),
        ("file,patient\na.png,p\n./x/../a.png,q\n", "line 3: another row says otherwise of ./x/../a.png; keep one"),
    ],
)
def test_bad_tables_are_refused_with_line_and_value(tmp_path, table, reason):
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(ValueError, match=reason):
        FileMetadata([tmp_path / "t.csv"], KEY)


def test_a_file_is_known_however_its_path_is_written(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "t.csv").write_text("file,view\n../images/m\u00fcller.png,CC\n../images/a.png,MLO\n")
    metadata = FileMetadata([tmp_path / "tables" / "t.csv"], KEY)
    found = [metadata.of(str(tmp_path / "images" / name)) for name in ("mu\u0308ller.png", "a.png", "b.png")]
    assert found == [{"view": "CC"}, {"view": "MLO"}, {}] and metadata.counts == {"known": 2, "unknown": 1}


def test_a_corrected_table_is_another_setting_and_files_in_no_table_are_said(tmp_path, caplog):
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        cv2.imwrite(str(tmp_path / name), draw_breast(seed=number))
    table, output = tmp_path / "labels.csv", tmp_path / "out" / "corpus"
    table.write_text(TABLE)
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    build = (files, output, (128, 96), MammoDinoImageProcessor(), "films")
    build_corpus(*build, metadata=[table], tasks=1)
    assert "1 files are in none of the tables of --metadata, and have no patient" in caplog.text
    build_corpus(*build, metadata=[table], tasks=1)  # the same again
    table.write_text(TABLE.replace("Jane", "Joan"))
    with pytest.raises(ValueError, match=r"made with other settings \(metadata_content\)"):
        build_corpus(*build, metadata=[table], tasks=1)
