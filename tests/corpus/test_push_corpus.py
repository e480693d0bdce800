"""A corpus on the Hub: only what was verified, private unless said otherwise, and it opens there."""

import shutil
import subprocess
import sys

import datasets
import pytest
from hub_server import HubServer
from huggingface_hub import DatasetCard
from huggingface_hub.errors import HfHubHTTPError

from dataset_scripts.corpus import push as module
from dataset_scripts.corpus.build import build_corpus
from dataset_scripts.corpus.push import main, push_corpus
from dataset_scripts.corpus.reader import FEATURES
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools import publish
from modeling_mammodino.tools.publish import push_folder

# the steps by which the Hub's viewer shows a data set: names and sizes of the card, then the first rows as a stream
AS_THE_VIEWER = """
import datasets
name = "someone/corpus"
info = datasets.load_dataset_builder(name).info
assert set(info.features) == set(datasets.load_dataset(name, split="train", streaming=True).features)
print(datasets.get_dataset_config_names(name), datasets.get_dataset_split_names(name), end=" ")
print(info.splits["train"].num_examples)
row = next(iter(datasets.load_dataset(name, split="train", streaming=True)))
print(row["image"].mode, row["tissue"].mode)
rows = datasets.load_dataset(name, split="train")
print(len(rows), list(rows.features))
"""


@pytest.fixture(scope="module")
def four_shards(phantom_archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four") / "corpus"
    build_corpus([phantom_archive], folder, (64, 48), MammoDinoImageProcessor(), "phantom", rows_per_shard=21, tasks=4)
    return folder


@pytest.mark.slow
def test_a_corpus_is_published_and_opens(phantom_corpus, hub: HubServer, tmp_path):
    push_corpus(phantom_corpus, "someone/corpus", "cc0-1.0")
    files = hub.files("someone/corpus", kind="dataset")
    assert set(files) == {path.name for path in phantom_corpus.iterdir()} | {"README.md"}
    assert all(files[path.name] == path.read_bytes() for path in phantom_corpus.iterdir())
    assert hub.repos["dataset/someone/corpus"]["private"]
    card = files["README.md"].decode()
    assert "license: cc0-1.0" in card and "Research use only" in card and "84 images of 24" in card
    command = [sys.executable, "-c", AS_THE_VIEWER]
    shown = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert shown.stdout.splitlines() == ["['default'] ['train'] 84", "L L", f"84 {list(FEATURES)}"]
    data = DatasetCard(card).data
    assert data.size_categories == "n<1K" and data.task_categories == ["image-feature-extraction"]

    hub.requests.clear()
    push_corpus(phantom_corpus, "someone/corpus", "cc0-1.0")  # what is there is not sent again
    assert not any("lfs" in path for _, path in hub.requests)


def test_a_push_that_was_stopped_goes_on(four_shards, hub: HubServer, monkeypatch):
    monkeypatch.setattr(publish, "SHARDS_A_COMMIT", 1)
    hub.commits_left = 2
    try:
        with pytest.raises(HfHubHTTPError, match="429"):
            push_corpus(four_shards, "someone/stopped", "cc0-1.0")
    finally:
        hub.commits_left = None
    assert set(hub.files("someone/stopped", kind="dataset")) == {"data-00000.arrow", "data-00001.arrow"}  # no corpus

    hub.requests.clear()
    push_corpus(four_shards, "someone/stopped", "cc0-1.0")
    assert sum(path.endswith("/commit/main") for _, path in hub.requests) == 3  # two shards, and the manifest
    assert sum("lfs-put" in path for _, path in hub.requests) == 1  # the third shard arrived, only its commit did not
    files = hub.files("someone/stopped", kind="dataset")
    assert all(files[path.name] == path.read_bytes() for path in four_shards.iterdir())


def test_what_datasets_caches_beside_the_shards_is_no_fault_and_not_sent(four_shards, hub: HubServer, tmp_path):
    corpus = shutil.copytree(four_shards, tmp_path / "corpus")
    datasets.load_from_disk(str(corpus)).map(lambda row: {"view": "CC"})
    assert list(corpus.glob("cache-*.arrow"))
    push_corpus(corpus, "someone/cached", "cc0-1.0")
    assert set(hub.files("someone/cached", kind="dataset")) == {each.name for each in four_shards.iterdir()} | {
        "README.md"
    }


def test_shards_of_another_corpus_are_not_mixed_in(four_shards, phantom_corpus, hub: HubServer):
    push_corpus(four_shards, "someone/one", "cc0-1.0")
    before = hub.files("someone/one", kind="dataset")
    with pytest.raises(ValueError, match="4 files of another data set, data-00000.arrow first; nothing was sent"):
        push_corpus(phantom_corpus, "someone/one", "cc0-1.0")
    push_corpus(four_shards, "someone/one", "cc-by-4.0", revision="second")
    assert hub.files("someone/one", kind="dataset") == before
    card = hub.files("someone/one", "second", kind="dataset")["README.md"]
    assert b"license: cc-by-4.0" in card and b"license: cc0-1.0" in before["README.md"]


def test_a_shard_that_changes_after_the_check_is_not_sent(four_shards, hub: HubServer, tmp_path, monkeypatch):
    corpus = shutil.copytree(four_shards, tmp_path / "corpus")

    def verify_then_change(folder, num_proc):
        complaints = verify(folder, num_proc)
        (folder / "data-00001.arrow").write_bytes(b"DOE^JANE")
        return complaints

    verify = module.verify_corpus
    monkeypatch.setattr(module, "verify_corpus", verify_then_change)
    with pytest.raises(ValueError, match="data-00001.arrow changed since it was checked"):
        push_corpus(corpus, "someone/changed", "cc0-1.0")
    assert hub.files("someone/changed", kind="dataset") == {}


def test_nothing_is_sent_where_something_does_not_belong(phantom_corpus, phantom_archive, hub: HubServer, tmp_path):
    corpus = shutil.copytree(phantom_corpus, tmp_path / "corpus")
    shutil.copy(sorted(phantom_archive.rglob("*.dcm"))[0], corpus / "scan.dcm")
    shutil.copytree(f"{phantom_corpus}.private", corpus / "corpus.private")
    for folder, message in (
        (corpus, "nothing was sent(.|\n)*corpus.private: no file of this corpus(.|\n)*scan.dcm"),
        (corpus / "corpus.private", "no manifest.json"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(folder), "someone/other", "--license", "cc0-1.0", "--num_proc", "1"])
    with pytest.raises(ValueError, match="nothing was sent"):
        push_folder(corpus / "corpus.private", "someone/other")
    assert not hub.requests


def test_a_public_repository_only_on_request(phantom_corpus, hub: HubServer):
    push_corpus(phantom_corpus, "someone/open", "cc0-1.0", public=True)
    with pytest.raises(ValueError, match="is public"):
        push_corpus(phantom_corpus, "someone/open", "cc0-1.0")


@pytest.mark.parametrize("license", ["", "mine\ntags: [x]", "CC BY"])
def test_the_license_must_be_said(four_shards, hub: HubServer, license):
    with pytest.raises(SystemExit, match="terms of their own.*BCS-DBT is CC BY-NC 4.0.*EMBED"):
        main([str(four_shards), "someone/corpus", "--license", license])
    with pytest.raises(SystemExit, match="terms of their own"):
        main([str(four_shards), "someone/corpus"])
    assert not hub.requests


def test_a_hub_out_of_reach(four_shards, hub: HubServer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="the Hub cannot be reached"):
        main([str(four_shards), "someone/corpus", "--license", "cc0-1.0", "--num_proc", "1"])
