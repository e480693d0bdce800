"""Publishing: a whole model folder goes to the Hub in one commit and opens from there where the package is missing."""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, HubServer
from made_inputs import draw_breast
from model_folder import CARD, TINY
from PIL import Image

from modeling_mammodino import MammoDinoConfig, MammoDinoForImageClassification, MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.model_files import check_folder
from modeling_mammodino.tools.publish import push_folder, upload

ROOT = Path(__file__).parents[2]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        push_folder(tmp_path / "nowhere", "me/refused")


def test_a_sharded_classifier_with_a_plain_svg_is_published(model_copy, hub):
    (model_copy / "model.safetensors").unlink()
    model = MammoDinoForImageClassification(MammoDinoConfig(**TINY, num_labels=2))
    model.save_pretrained(model_copy, max_shard_size="10KB")
    (model_copy / "curve.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><text>loss</text></svg>')
    (model_copy / "README.md").write_text(CARD + "![curve](curve.svg)\n")
    assert len(list(model_copy.glob("model-*.safetensors"))) > 1 and check_folder(model_copy) == []
    push_folder(model_copy, "me/sharded")
    assert hub.files("me/sharded") == {path.name: path.read_bytes() for path in model_copy.iterdir()}
    index = json.loads((model_copy / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("classifier.bias"), index["metadata"].update(site="St. Mary")
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    next(model_copy.glob("model-00001-*")).unlink()
    assert {line.partition(":")[0] for line in check_folder(model_copy)} >= {"model.safetensors.index.json"}


def test_the_command_pushes_the_whole_folder_in_one_commit(mammodino, model_folder, hub, capsys):
    mammodino("push", model_folder, "me/encoder", "--commit_message", "First")
    commits = [path for method, path in hub.requests if "/commit/" in path]
    assert commits == ["/api/models/me/encoder/commit/main"]
    assert hub.files("me/encoder") == {path.name: path.read_bytes() for path in model_folder.iterdir()}
    oid = capsys.readouterr().out.strip().rpartition("/")[2]
    assert hub.messages[oid] == "First" and hub.resolve("model/me/encoder", "main") == oid


def test_a_branch_is_made_and_main_stays(model_copy, hub):
    before = push_folder(model_copy, "me/branches")
    (model_copy / "README.md").write_text(CARD + "Changed.\n")
    push_folder(model_copy, "me/branches", revision="v2")
    assert hub.resolve("model/me/branches", "main") == before.oid
    assert b"Changed." in hub.files("me/branches", "v2")["README.md"]


def test_private_is_private_or_nothing_is_uploaded(model_folder, hub):
    push_folder(model_folder, "me/secret", private=True)
    assert hub.repos["model/me/secret"]["private"]
    huggingface_hub.HfApi().create_repo("me/open")
    with pytest.raises(ValueError, match="me/open exists and is public; nothing was sent"):
        push_folder(model_folder, "me/open", private=True)
    assert hub.files("me/open") == {}


def test_a_refusal_by_the_hub_is_one_line(mammodino, model_folder, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(SystemExit, match="mammodino push: .*401"):
        mammodino("push", model_folder, "me/denied")
    with pytest.raises(SystemExit, match="mammodino push: .*no/such/name"):
        mammodino("push", model_folder, "no/such/name")


def test_a_hub_out_of_reach_is_one_line(mammodino, model_folder, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="mammodino push: the Hub cannot be reached .*HF_ENDPOINT"):
        mammodino("push", model_folder, "me/unreachable")


def test_the_loopback_hub_verifies_what_it_is_sent(hub):
    api = huggingface_hub.HfApi()
    api.create_repo("me/server")
    session = huggingface_hub.utils.get_session()
    assert session.put(f"{hub.url}/lfs-put/{'0' * 64}/4", content=b"data").status_code == 422
    line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 4}}
    url, headers = f"{hub.url}/api/models/me/server/commit/main", {"Authorization": f"Bearer {TOKEN}"}
    assert session.post(url, content=json.dumps(line).encode(), headers=headers).status_code == 400
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id="me/server")
    assert hub.files("me/server") == {}
    api.upload_file(path_or_fileobj=b"text", path_in_repo="in/a.txt", repo_id="me/server")
    (info,) = api.get_paths_info("me/server", ["in/a.txt", "none"])
    assert (info.path, info.size) == ("in/a.txt", 4) and api.list_repo_files("me/server") == ["in/a.txt"]


@pytest.fixture
def shards(tmp_path) -> dict[str, tuple[Path, str]]:
    for number in range(3):
        (tmp_path / f"{number}.arrow").write_bytes(bytes([number, 0]) * 100)
    files = {f"data-{path.name}": path for path in sorted(tmp_path.glob("*.arrow"))}
    return {name: (path, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in files.items()}


def upload_shards(shards, repo_id="me/shards", **options) -> str:
    settings = {"repo_type": "dataset", "private": True, "commit_message": "Add card", "shard_pattern": "data-*.arrow"}
    return str(upload(repo_id, {"README.md": b"A card."}, shards=shards, **settings | options).repo_url)


def test_shards_go_first_and_are_not_sent_twice(shards, hub, monkeypatch):
    monkeypatch.setattr("modeling_mammodino.tools.publish.SHARDS_A_COMMIT", 2)
    hub.commits_left = 1
    try:
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="429"):
            upload_shards(shards)
    finally:
        hub.commits_left = None
    assert list(hub.files("me/shards", kind="dataset")) == ["data-0.arrow", "data-1.arrow"]
    hub.requests.clear()
    assert upload_shards(shards).endswith("me/shards")
    assert sum("/commit/" in path for _, path in hub.requests) == 2  # one shard, and the card
    hub.requests.clear()
    upload_shards(shards)
    assert not any("lfs" in path for _, path in hub.requests)
    expected = {name: path.read_bytes() for name, (path, _) in shards.items()}
    assert hub.files("me/shards", kind="dataset") == {"README.md": b"A card.", **expected}


def test_shards_of_two_data_sets_are_not_mixed_and_a_changed_one_is_not_sent(shards, hub):
    upload_shards({"data-0.arrow": shards["data-0.arrow"], "data-9.arrow": shards["data-1.arrow"]}, "me/two")
    with pytest.raises(ValueError, match="holds 1 files of another data set, data-9.arrow first; nothing was sent"):
        upload_shards(shards, "me/two")
    shards["data-2.arrow"][0].write_bytes(b"DOE^JANE")
    with pytest.raises(ValueError, match="data-2.arrow changed since it was checked"):
        upload_shards(shards, "me/two", shard_pattern="")
    assert set(hub.files("me/two", kind="dataset")) == {"README.md", "data-0.arrow", "data-9.arrow"}
    huggingface_hub.HfApi().create_repo("me/open_data", repo_type="dataset")
    with pytest.raises(ValueError, match="me/open_data exists and is public; nothing was sent. .* pass --public"):
        upload("me/open_data", {}, repo_type="dataset", private=True, commit_message="None")


# The entry points of transformers itself, and back, each in a process of its own

PUSH = """
import sys, torch
from huggingface_hub import ModelCard
from modeling_mammodino import *
folder, card = sys.argv[1], sys.argv[2] == "card"
model = MammoDinoModel.from_pretrained(folder)
model.push_to_hub("me/entry_points"), MammoDinoImageProcessor.from_pretrained(folder).push_to_hub("me/entry_points")
torch.manual_seed(1)
MammoDinoForImageClassification(MammoDinoConfig(**model.config.to_dict() | {"num_labels": 3})).push_to_hub("me/classes")
if card:
    ModelCard.load(folder + "/README.md").push_to_hub("me/entry_points")
"""
OPEN = """
import sys
sys.modules["modeling_mammodino"] = None  # an editable install would make it importable
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import json, torch
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained("me/entry_points", trust_remote_code=True)
parts = {"model": AutoModel.from_pretrained("me/entry_points", trust_remote_code=True),
         "backbone": AutoBackbone.from_pretrained("me/entry_points", trust_remote_code=True, out_indices=[1, 2]),
         "classes": AutoModelForImageClassification.from_pretrained("me/classes", trust_remote_code=True)}
assert all("transformers_modules" in type(each).__module__ for each in [processor, *parts.values()])
inputs = processor(sys.argv[1], return_tensors="pt")
with torch.inference_mode():
    maps = parts["backbone"].eval()(inputs["pixel_values"]).feature_maps
    print(json.dumps({"model": parts["model"].eval()(**inputs).pooler_output[0].tolist(),
                      "backbone": [list(each.shape) for each in maps],
                      "classes": parts["classes"].eval()(**inputs).logits[0].tolist()}))
"""
HUB_VERSION = int(importlib.metadata.version("huggingface_hub").partition(".")[0])


def process(program: str, *arguments: str, environment: dict[str, str], cwd: Path) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def entry_points(hub_server, model_folder, tmp_path_factory) -> HubServer:
    environment = hub_server.environment(tmp_path_factory.mktemp("push"))
    process(PUSH, model_folder, "card" if HUB_VERSION >= 2 else "", environment=environment, cwd=ROOT)
    return hub_server


@pytest.mark.slow
def test_models_and_processor_are_pushed_by_transformers_own_methods(entry_points, model_folder):
    files = entry_points.files("me/entry_points")
    code = {path.name for path in model_folder.glob("*.py")}
    assert files.keys() >= code | {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()


@pytest.mark.skipif(HUB_VERSION < 2, reason="huggingface_hub 1 validates cards at a fixed address, not at HF_ENDPOINT")
@pytest.mark.slow
def test_the_card_is_pushed_by_its_own_method(entry_points):
    assert entry_points.files("me/entry_points")["README.md"].decode() == CARD


@pytest.mark.slow
def test_what_was_pushed_opens_where_the_package_is_missing(entry_points, model_folder, tmp_path):
    Image.fromarray(draw_breast()).save(tmp_path / "breast.png")
    environment = {**entry_points.environment(tmp_path / "home"), "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    printed = process(OPEN, tmp_path / "breast.png", environment=environment, cwd=tmp_path)
    answer = json.loads(printed.splitlines()[-1])
    inputs = MammoDinoImageProcessor.from_pretrained(model_folder)(tmp_path / "breast.png", return_tensors="pt")
    with torch.inference_mode():
        expected = MammoDinoModel.from_pretrained(model_folder).eval()(**inputs).pooler_output[0]
    torch.testing.assert_close(torch.tensor(answer["model"]), expected, rtol=1e-4, atol=1e-5)
    assert answer["backbone"] == [[1, 16, 4, 3], [1, 16, 4, 3]] and len(answer["classes"]) == 3
