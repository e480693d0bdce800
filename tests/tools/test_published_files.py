"""What a published model may hold: a model folder is spoiled in one way at a time, and nothing leaves the machine."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from model_folder import CARD, encode, figure
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from modeling_mammodino.tools.model_files import check_folder
from modeling_mammodino.tools.privacy import check_text
from modeling_mammodino.tools.publish import push_folder


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x010E] = "SMITH^ANNA"
    return tags


def text_chunk() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "SMITH^ANNA")
    return info


def write(name: str, content: bytes | str, add: bool = False):
    def change(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes((folder / name).read_bytes() + data if add else data)

    return change


def settings(name: str, **values):
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


def tensors(more: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, without: str = ""):
    def change(folder: Path) -> None:
        kept = {key: value for key, value in load_file(folder / "model.safetensors").items() if key != without}
        save_file(kept | more, folder / "model.safetensors", metadata)

    return change


def link_to(target: str):
    def change(folder: Path) -> None:
        (folder / "losses.png").unlink()
        (folder / "losses.png").symlink_to(target)

    return change


def subfolder(folder: Path) -> None:
    (folder / "exams" / "anna").mkdir(parents=True)
    (folder / "exams" / "anna" / "scan.dcm").write_bytes(DICOM)


DICOM = bytes(128) + b"DICM" + bytes(200)
ENTRY = "- dataset:\n    id: me/data\n    task_id: cancer\n  value: 0.75\n  notes: frozen features\n"


def results(content: str, name: str = "data.yaml"):
    def change(folder: Path) -> None:
        (folder / ".eval_results").mkdir()
        (folder / ".eval_results" / name).write_text(content)

    return change


SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><path d="M0 0L9 9"/>%s</svg>'
SHOWN = "---\nlicense: mit\n---\nResearch use only\n![a](losses.png)\n![b](%s)\n"


def svg(inside: str):
    def change(folder: Path) -> None:
        (folder / "curve.svg").write_text(SVG % inside)
        (folder / "README.md").write_text(SHOWN % "curve.svg")

    return change


REFUSALS = {
    # what is in no model folder
    "dicom": (write("scan.dcm", DICOM), "scan.dcm: a DICOM file; remove it"),
    "dicom as png": (write("losses.png", DICOM), "losses.png: a DICOM file, whatever its name says; remove it"),
    "table": (write("patients.csv", "patient,age\n"), "patients.csv: no file of a model; remove it"),
    "table as png": (write("losses.png", "patient,age\n"), "losses.png: not a readable PNG"),
    "pickle": (write("training_args.bin", pickle.dumps({1: 2})), "training_args.bin: a pickle"),
    "torch zip": (write("optimizer.pt", b"PK\3\4..."), "optimizer.pt: a zip archive"),
    "hidden": (write(".env", "TOKEN=1"), ".env: hidden; remove it"),
    "subfolder": (subfolder, "exams/anna/scan.dcm: in a folder of its own"),
    "link outside": (link_to("/etc/hostname"), "losses.png: a link to /etc/hostname"),
    "other code": (write("evil.py", "import os"), "evil.py: code that this package does not copy"),
    "other json": (write("all_results.json", "{}"), "all_results.json: no file of a model"),
    # code
    "changed code": (write("dicom.py", "\nimport os\n", add=True), "dicom.py: differs from this package's"),
    "missing code": (lambda folder: (folder / "rendering.py").unlink(), "rendering.py: missing"),
    # weights
    "half weights": (write("model.safetensors", b"12345678{}"), "model.safetensors: not a whole safetensors file"),
    "header text": (tensors({}, {"format": "pt", "site": "St. Mary"}), "model.safetensors: text in its header (site)"),
    "extra tensor": (tensors({"exams": torch.ones(3)}), "model.safetensors: holds 'exams', which the architecture"),
    "missing tensor": (tensors({}, without="layernorm.bias"), "model.safetensors: lacks layernorm.bias"),
    "wrong shape": (tensors({"layernorm.bias": torch.ones(3)}), "layernorm.bias has shape [3]"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: missing"),
    "stray shard": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model-00001-of-00002.safetensors"),
        "model.safetensors: beside shards of it",
    ),
    # settings
    "broken json": (write("config.json", "{"), "config.json: cannot be read"),
    "field twice": (
        write("config.json", '{"a": "Anna", "a": 1}'),
        "config.json: cannot be read (a field stands twice)",
    ),
    "recipe twice": (write("recipe.yaml", "hidden_size: Anna\n", add=True), "each name once"),
    "unknown setting": (settings("config.json", patient="Anna"), "config.json: unknown field 'patient'"),
    "foreign code": (settings("config.json", auto_map={"AutoModel": "a/b--c.D"}), "config.json: auto_map names other"),
    "foreign model": (settings("config.json", model_type="vit"), "config.json: model_type 'vit': not a MammoDINO"),
    "no class": (settings("config.json", architectures=["ViTModel"]), "config.json: architectures ['ViTModel']"),
    "path in config": (settings("config.json", id2label={"0": "/home/anna/x"}), "config.json: line 1 holds a path"),
    "unknown step": (settings("preprocessor_config.json", note="x"), "preprocessor_config.json: unknown field 'note'"),
    "bad step": (settings("preprocessor_config.json", clahe_grid=-1), "preprocessor_config.json: not valid settings"),
    "recipe path": (write("recipe.yaml", "\ncorpus: runs/anna\n", add=True), "recipe.yaml: corpus: a place"),
    "recipe text": (write("recipe.yaml", "\nnote: seen by Dr. A\n", add=True), "recipe.yaml: note: free text"),
    "recipe table": (write("recipe.yaml", "\nrows: {a: 1}\n", add=True), "recipe.yaml: rows: holds a dict"),
    "recipe home": (write("recipe.yaml", "\nweights: ~/x\n", add=True), "recipe.yaml: line 5 holds a path of a local"),
    "recipe comment": (write("recipe.yaml", "# of Dr. A\n", add=True), "recipe.yaml: holds comments; take them out"),
    # evaluation results
    "no results": (
        results("seen by Dr. A", "notes.txt"),
        ".eval_results/notes.txt: no YAML file of results; remove it",
    ),
    "results field": (results(ENTRY + "  reader: Dr. A\n"), "data.yaml: not results in the Hub's form (other fields"),
    "results comment": (results(ENTRY + "# of Dr. A\n"), "data.yaml: not results in the Hub's form"),
    "results nowhere": (results(ENTRY.replace("me/", "")), "needs a data set OWNER/NAME and a finite value"),
    "results nan": (results(ENTRY.replace("0.75", ".nan")), "needs a data set OWNER/NAME and a finite value"),
    "results path": (results(ENTRY.replace("frozen", "/home/anna")), ".eval_results/data.yaml: line 5 holds a path"),
    # card
    "no card": (lambda folder: (folder / "README.md").unlink(), "README.md: missing"),
    "no license": (write("README.md", CARD.replace("license:", "terms:")), "README.md: states no license"),
    "no warning": (write("README.md", CARD.replace("Research", "Any")), "README.md: does not say `research use only`"),
    "path in card": (
        write("README.md", "From /data/patients\n", add=True),
        "README.md: line 8 holds a path of a local",
    ),
    "windows path": (write("README.md", r"From C:\Users\anna", add=True), r"holds a path of a local machine ('C:\\Use"),
    "recipe in card": (write("README.md", "corpus: runs/anna\n", add=True), "README.md: prints corpus, a place"),
    "token": (write("README.md", "hf_" + "aB3" * 11, add=True), "README.md: line 8 holds an access token; take"),
    "uid": (write("README.md", "1.2.840.10008.5.1.4.1.1.1.2\n", add=True), "README.md: line 8 holds a DICOM UID"),
    "lost figure": (lambda folder: (folder / "losses.png").unlink(), "README.md: shows losses.png, which is not"),
    "unshown figure": (write("anna.png", encode(figure())), "README.md: does not show anna.png"),
    # figures
    "png text": (write("losses.png", encode(figure(), pnginfo=text_chunk())), "losses.png: metadata in the PNG chunks"),
    "png exif": (write("losses.png", encode(figure(), exif=exif())), "losses.png: metadata in the PNG chunks eXIf"),
    "png tail": (write("losses.png", b"SMITH", add=True), "losses.png: 5 bytes after the image's end"),
    "png cut": (write("losses.png", encode(figure())[:-20]), "losses.png: "),
    "gray": (write("losses.png", encode(figure().convert("L"))), "losses.png: color mode L, as mammograms have"),
    "gray in color": (
        write("losses.png", encode(figure().convert("L").convert("RGB"))),
        "losses.png: gray throughout, as mammograms are",
    ),
    "large": (write("losses.png", encode(figure(3000, 2000))), "losses.png: 2000 x 3000 px, as large as a mammogram"),
    "svg metadata": (svg("<metadata>Anna</metadata>"), "curve.svg: holds metadata"),
    "svg image": (svg('<image href="data:image/png;base64,AA"/>'), "curve.svg: holds image"),
    "svg script": (svg('<g onload="x()"/>'), "curve.svg: holds the attributes onload"),
    "svg comment": (svg("<!-- Anna -->"), "curve.svg: holds comments"),
    "svg link": (svg('<rect fill="url(http://x/y)"/>'), "curve.svg: refers to 'http://x/y' outside"),
    "svg entity": (
        write("losses.svg", '<!DOCTYPE svg [<!ENTITY a "b">]>' + SVG % ""),
        "losses.svg: not a readable SVG",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_belong_is_named_and_nothing_is_sent(name, model_copy, hub):
    change, message = REFUSALS[name]
    change(model_copy)
    with pytest.raises(ValueError, match="nothing was sent") as refusal:
        push_folder(model_copy, "me/refused")
    assert message in str(refusal.value)
    assert hub.requests == []


@pytest.mark.parametrize("kind, settings", [("jpg", {"exif": exif()}), ("jpg", {"comment": b"Anna"})])
def test_a_jpeg_with_metadata_is_refused(model_copy, kind, settings):
    (model_copy / "README.md").write_text(SHOWN % "photo.jpg")
    (model_copy / "photo.jpg").write_bytes(encode(figure(), "JPEG"))
    assert check_folder(model_copy) == []
    (model_copy / "photo.jpg").write_bytes(encode(figure(), "JPEG", **settings))
    assert [complaint for complaint in check_folder(model_copy) if "metadata in the JPEG" in complaint]
    (model_copy / "photo.jpg").write_bytes(encode(figure(), "JPEG") + DICOM)
    assert check_folder(model_copy) == ["photo.jpg: data after the image's end; save it as PNG"]


def test_every_offending_file_is_named(model_copy):
    for name in ("dicom", "pickle", "hidden", "no warning", "recipe path"):
        REFUSALS[name][0](model_copy)
    named = {complaint.partition(":")[0] for complaint in check_folder(model_copy)}
    assert named == {"scan.dcm", "training_args.bin", ".env", "README.md", "recipe.yaml"}


@pytest.mark.parametrize("private", ["/home/anna", "(/data)", "corpus:/data/x", "~/x", "~anna/x", "file:///x", "D:/x",
                                     r"C:\x", r"\\server\share\x", "hf_abcdefghijklmnopqrstuvwxyz",
                                     "1.2.276.0.7230010.3.1.4.8323329"])  # fmt: skip
def test_what_should_not_leave_the_machine_is_seen_in_text(private):
    assert list(check_text(f"one\ntwo {private} three"))


def test_what_is_public_is_left_alone():
    public = (
        "ViT-B/14, and/or, https://example.org/a/b.html, </p>, H / w, ./x/y, a/b/c, 0.1.2.3, 5.17.0, ~3 s, w/o, hf_hub"
    )
    assert list(check_text(public)) == []
