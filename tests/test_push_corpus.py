"""A corpus on the Hub: only what was verified, private unless said otherwise, and it opens there."""

import shutil
import subprocess
import sys

import pytest
from hub_server import HubServer

from dataset_scripts.corpus_reader import FEATURES
from dataset_scripts.push_corpus import main, push_corpus


def test_a_corpus_is_published_and_opens(phantom_corpus, hub: HubServer, tmp_path):
    push_corpus(phantom_corpus, "someone/corpus", "cc0-1.0")
    files = hub.files("someone/corpus", kind="dataset")
    assert set(files) == {path.name for path in phantom_corpus.iterdir()} | {"README.md"}
    assert all(files[path.name] == path.read_bytes() for path in phantom_corpus.iterdir())
    assert hub.repos["dataset/someone/corpus"]["private"]
    card = files["README.md"].decode()
    assert "license: cc0-1.0" in card and "Research use only" in card and "84 pictures of 24" in card
    command = "import datasets; rows = datasets.load_dataset('someone/corpus', split='train')"
    command += "; print(len(rows), list(rows.features))"
    shown = subprocess.run(
        [sys.executable, "-c", command], env=hub.environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert shown.stdout.split(" ", 1) == ["84", f"{list(FEATURES)}\n"]

    hub.requests.clear()
    push_corpus(phantom_corpus, "someone/corpus", "cc0-1.0")  # what is there is not sent again
    assert not any("lfs" in path for _, path in hub.requests)


def test_nothing_is_sent_where_something_does_not_belong(phantom_corpus, phantom_archive, hub: HubServer, tmp_path):
    corpus = shutil.copytree(phantom_corpus, tmp_path / "corpus")
    shutil.copy(sorted(phantom_archive.rglob("*.dcm"))[0], corpus / "scan.dcm")
    with pytest.raises(SystemExit, match="nothing was sent(.|\n)*scan.dcm"):
        main([str(corpus), "someone/other", "--license", "cc0-1.0", "--num_proc", "1"])
    assert not hub.requests


def test_a_public_repository_only_on_request(phantom_corpus, hub: HubServer):
    push_corpus(phantom_corpus, "someone/open", "cc0-1.0", public=True)
    with pytest.raises(ValueError, match="is public"):
        push_corpus(phantom_corpus, "someone/open", "cc0-1.0")


def test_the_licence_must_be_said(phantom_corpus, capsys):
    with pytest.raises(SystemExit):
        main([str(phantom_corpus), "someone/corpus"])
    assert "--license" in capsys.readouterr().err
