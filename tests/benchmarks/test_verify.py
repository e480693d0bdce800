"""What is on disk of a labeled data set, against what was published and against its own metadata."""

from dataclasses import replace

import pandas as pd
import pytest

from dataset_scripts.benchmarks import get_benchmark
from dataset_scripts.benchmarks.index import Benchmark, Count, make_index
from dataset_scripts.benchmarks.rsna import COLUMNS
from dataset_scripts.benchmarks.verify import main, verify_benchmark

PUBLIC = ("rsna", "vindr_mammo", "cbis_ddsm", "cmmd", "cdd_cesm", "bcs_dbt", "embed_open_data")
NAMES = ["a.dcm", "b.dcm", "c.dcm"]


def read_index(data_dir):
    names = (data_dir / "list.txt").read_text().split()
    return make_index([{"patient_id": name, "image_id": name, "path": f"images/{name}"} for name in names], "made up")


def read_tables(data_dir):
    return {"images": read_index(data_dir), "files": pd.DataFrame({"name": ["list.txt"]})}


MADE_UP = Benchmark(
    name="made_up",
    title="Made up",
    homepage="",
    license="",
    citation="",
    definitions=(),
    notes=("This data set does not exist.",),
    read_index=read_index,
    read_tables=read_tables,
    counts=(Count("images", published=3), Count("boxes", table="boxes", published=7), Count("files", table="files")),
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "list.txt").write_text(" ".join(NAMES))
    (tmp_path / "images").mkdir()
    for name in NAMES:
        (tmp_path / "images" / name).touch()
    return tmp_path


def test_a_whole_data_set(folder):
    (folder / "masks").mkdir()
    (folder / "masks" / "a.PNG").touch()
    (folder / "images" / "notes.txt").touch()
    report = verify_benchmark(MADE_UP, folder)
    assert report.faults == []
    assert report.lines == [
        "Made up: 1 of 2 published counts are found here",
        "1 are of metadata files that are not here: boxes",
        "1 more were counted: files 1",
        "3 of 3 image files of the index are here",
        "1 image files are not in the index: masks/a.PNG",
        "note: This data set does not exist.",
    ]


def test_missing_files_and_other_counts(folder):
    (folder / "images" / "b.dcm").unlink()
    (folder / "list.txt").write_text("a.dcm b.dcm")
    report = verify_benchmark(MADE_UP, folder)
    assert report.faults == ["images: 2 here, 3 published", "1 of 2 image files are missing: images/b.dcm"]
    assert report.extra == ["images/c.dcm"]


def test_metadata_only_and_long_lists(folder):
    for name in NAMES:
        (folder / "images" / name).unlink()
    names = [f"{number}.dcm" for number in range(9)]
    (folder / "list.txt").write_text(" ".join(names))
    (fault,) = verify_benchmark(replace(MADE_UP, counts=()), folder).faults
    assert fault == "none of the 9 image files is here: " + ", ".join(f"images/{name}" for name in names[:5]) + ", ..."


def test_files_come_from_locate_and_belong_to_one_image(folder):
    def locate(index, data_dir):
        return index.assign(path=["images/a.dcm", "images/a.dcm", None])

    report = verify_benchmark(replace(MADE_UP, locate=locate), folder)
    assert report.faults == [
        "1 of 3 image files are missing: c.dcm",
        "1 files are those of several images: images/a.dcm",
    ]


def test_a_label_table_is_found_as_a_task_finds_it(tmp_path):
    """Relative to the table, whether it is given or its folder; absolute; through a linked folder."""
    data_dir, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data_dir, elsewhere):
        folder.mkdir()
        for name in NAMES:
            (folder / name).touch()
    (data_dir / "linked").symlink_to(elsewhere)
    table = data_dir / "index.csv"
    for prefix, place in (("", data_dir), ("", table), (f"{elsewhere}/", table), ("linked/", data_dir)):
        rows = [f"p{name},{prefix}{name},{number % 2}\n" for number, name in enumerate(NAMES)]
        table.write_text("patient_id,path,cancer\n" + "".join(rows))
        report = verify_benchmark("table", place)
        assert report.faults == [] and report.images == 3
    assert report.extra == NAMES  # those beside the table


ROW = "1,10,{},L,CC,50,1,1,1,0,0,B,49,False\n"


@pytest.mark.parametrize("option", ["--data-dir", "--data_dir"])
def test_the_command(tmp_path, option, capsys):
    (tmp_path / "train.csv").write_text(",".join(COLUMNS) + "\n" + ROW.format(1) + ROW.format(2))
    with pytest.raises(SystemExit, match=f"verify: [0-9]+ faults in {tmp_path}"):
        main(["rsna", option, str(tmp_path)])
    shown = capsys.readouterr().out.splitlines()
    assert "images: 2 here, 54706 published" in shown
    assert "none of the 2 image files is here: train_images/10/1.dcm, train_images/10/2.dcm" in shown
    assert any(line.startswith("note: ") for line in shown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rsna", "--data-dir", "{}"], "verify: .*no train.csv; give the folder with train.csv"),
        (["rsna", "--data-dir", "{}/gone"], "verify: .*gone: no such folder"),
        (["ddsm", "--data-dir", "{}"], "verify: data set 'ddsm': must be one of .*cbis_ddsm"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, words):
    with pytest.raises(SystemExit, match=words) as stop:
        main([each.format(tmp_path) for each in arguments])
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_data_set_says_what_it_is(name):
    """Each definition has two classes or more and says what counts, and what is left out where something is."""
    benchmark = get_benchmark(name)
    assert benchmark.title and benchmark.license and benchmark.homepage.startswith("https://") and benchmark.citation
    assert benchmark.published and benchmark.notes
    assert {each.task for each in benchmark.definitions} > {"cancer"}
    names = [(each.task, each.name) for each in benchmark.definitions]
    assert len(set(names)) == len(names)
    for each in benchmark.definitions:
        assert len(set(each.classes)) == len(each.classes) >= 2 and len(each.meaning) > 20
        empty = make_index([], benchmark.name).assign(pathology=None)
        assert list(each.label(empty)) == []


def test_sharing_is_refused_where_the_terms_forbid_it():
    assert {name for name in PUBLIC if get_benchmark(name).no_sharing} == {"rsna", "vindr_mammo", "embed_open_data"}
