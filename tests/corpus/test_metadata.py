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
    ],
)
def test_bad_tables_are_refused_with_line_and_value(tmp_path, table, reason):
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(ValueError, match=reason):
        FileMetadata([tmp_path / "t.csv"], KEY)
