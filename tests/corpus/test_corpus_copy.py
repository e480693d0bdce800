"""A corpus in an object store: copied once, whole, and the same."""

import fsspec
import pytest

from dataset_scripts.corpus.reader import Corpus, local_corpus


@pytest.fixture
def remote(phantom_corpus, tmp_path, monkeypatch):
    """In memory, which fsspec serves as it does s3."""
    monkeypatch.setenv("MAMMODINO_CACHE", str(tmp_path / "cache"))
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(phantom_corpus), "/bucket/corpus", recursive=True)
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


def test_a_remote_corpus_is_copied_once_and_the_same(remote, phantom_corpus, monkeypatch):
    folder = local_corpus("memory://bucket/corpus")
    assert Corpus(folder).rows["image"] == Corpus(phantom_corpus).rows["image"]
    monkeypatch.setattr(type(remote), "get_file", None)  # nothing is fetched again
    assert local_corpus("memory://bucket/corpus") == folder
    assert local_corpus(phantom_corpus) == phantom_corpus


def test_a_copy_that_was_cut_off_goes_on(remote, tmp_path, monkeypatch):
    get, fetched = type(remote).get_file, []

    def cut_off(self, source, target, **options):
        fetched.append(source.rpartition("/")[2])
        if len(fetched) == 2:
            raise ConnectionError("reset")
        get(self, source, target, **options)

    monkeypatch.setattr(type(remote), "get_file", cut_off)
    with pytest.raises(ConnectionError):
        local_corpus("memory://bucket/corpus")
    local_corpus("memory://bucket/corpus")
    assert fetched.count("data-00000.arrow") == 1 and fetched[-1] == "manifest.json"


def test_a_damaged_shard_is_not_kept(remote, tmp_path):
    remote.pipe("/bucket/corpus/data-00000.arrow", b"half")
    with pytest.raises(OSError, match="data-00000.arrow: arrived damaged"):
        local_corpus("memory://bucket/corpus")
    assert not list((tmp_path / "cache").rglob("data-*"))


def test_what_is_no_corpus_is_said(remote):
    with pytest.raises(FileNotFoundError, match="memory://bucket/nothing: no manifest.json"):
        local_corpus("memory://bucket/nothing")
