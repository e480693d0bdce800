"""The walk over folders that corpus, embed and contact_sheet share, and the paths that users write."""

import os
from pathlib import Path

import cv2
import pytest
from made_inputs import draw_breast

from modeling_mammodino.tools.command import user_path
from modeling_mammodino.tools.features import find_files, paths_below
from modeling_mammodino.tools.walk import ENTERED, NOT_REGULAR, OF_SYSTEM, walk
from training.settings import check_values


def make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"content")
    return path


def listed(folder: Path) -> list[str]:
    return sorted(os.path.relpath(path, folder) for path in walk(folder).files)


@pytest.fixture
def locked(monkeypatch):
    """Folders of the name `locked` cannot be listed: permissions mean nothing to root, who may run the tests."""
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)


def test_a_folder_that_cannot_be_listed_is_named_and_the_rest_is_found(tmp_path, locked):
    make(tmp_path / "a" / "1.png"), make(tmp_path / "locked" / "2.png"), make(tmp_path / "z" / "3.png")
    found = walk(tmp_path)
    assert len(found.files) == 2 and list(found.unlisted) == [str(tmp_path / "locked")]
    assert "Permission denied" in found.unlisted[str(tmp_path / "locked")]
    with pytest.raises(PermissionError):
        walk(tmp_path / "locked")


def test_linked_folders_are_entered_once_and_never_in_a_circle(tmp_path):
    archive, elsewhere = tmp_path / "archive", tmp_path / "elsewhere"
    make(archive / "own" / "1.png"), make(elsewhere / "p2" / "2.png")
    (archive / "again").symlink_to(archive / "own")  # before its target in the alphabet
    (archive / "linked").symlink_to(elsewhere)
    (archive / "linked_twice").symlink_to(elsewhere / "p2")
    (archive / "own" / "up").symlink_to(archive)
    (archive / "far_up").symlink_to(tmp_path)
    (elsewhere / "back").symlink_to(elsewhere)
    (archive / "file.png").symlink_to(archive / "own" / "1.png")
    assert listed(archive) == ["file.png", "linked/p2/2.png", "own/1.png"]
    assert list(walk(archive).passed_over.values()) == [ENTERED] * 5


def test_only_regular_files_are_found(tmp_path):
    make(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "nowhere.dcm").symlink_to(tmp_path / "gone")
    assert listed(tmp_path) == ["a.png"]
    assert list(walk(tmp_path).passed_over.values()) == [NOT_REGULAR] * 2
    with pytest.raises(OSError, match=r"pipe\.dcm: no regular file"):
        find_files([tmp_path / "pipe.dcm"])


@pytest.mark.parametrize(
    "name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", ".Trash-1000", "lost+found"]
)
def test_what_a_system_keeps_is_passed_over(tmp_path, name):
    make(tmp_path / name / "deep" / "1.png"), make(tmp_path / "p" / "1.png"), make(tmp_path / "p" / "._1.png")
    assert listed(tmp_path) == ["p/1.png"]
    assert set(walk(tmp_path).passed_over.values()) == {OF_SYSTEM}
    assert listed(tmp_path / name) == ["deep/1.png"]  # asked for by its name


def test_names_of_files_are_paths_below_what_holds_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [Path("a/p1/1.dcm"), tmp_path / "a/p2/1.dcm"]
    assert paths_below(files) == ["p1/1.dcm", "p2/1.dcm"]
    assert paths_below(files[:1]) == ["1.dcm"] and paths_below(files[:1], [Path("a")]) == ["p1/1.dcm"]
    assert paths_below(files, [Path("b/../c")]) == ["a/p1/1.dcm", "a/p2/1.dcm"]


def test_find_files_counts_what_it_passes_over_and_logs_what_it_cannot_list(tmp_path, locked, caplog):
    make(tmp_path / "a.png"), make(tmp_path / "notes.txt"), make(tmp_path / "locked" / "b.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")  # the index of a CD, without pixels
    found = find_files([tmp_path])
    assert found.files == [tmp_path / "a.png"] and found.ignored == {".txt": 1, "no suffix": 1, NOT_REGULAR: 1}
    assert list(found.unlisted) == [str(tmp_path / "locked")] and "locked" in caplog.text


def test_a_contact_sheet_of_an_archive_that_cannot_be_listed_whole(tmp_path, locked, mammodino, capsys):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), draw_breast())
    make(tmp_path / "in" / "locked" / "b.png")
    mammodino("contact_sheet", tmp_path / "in", "--output", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x" and user_path("a/~") == Path("a/~")
    with pytest.raises(ValueError, match="no such home directory"):
        user_path("~nobody-of-that-name/x")


def test_a_tilde_in_a_recipe_is_the_home_directory(tmp_path, monkeypatch):
    from training.pretraining.recipe import load_recipe

    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(["mammodino", "--corpus=~/corpus", "--output_dir=~/run"])
    assert (recipe.run.corpus, recipe.run.output_dir) == (str(tmp_path / "corpus"), str(tmp_path / "run"))
    check_values(recipe.run)
