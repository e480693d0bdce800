"""The page of the Hub Space and of `mammodino demo`: what the encoder sees of a mammogram. Research use only.

    mammodino demo          # on this machine
    python space/app.py     # the same, as a Space runs it; MAMMODINO_MODEL names another checkpoint

An upload is read into memory and its file removed; the images that a browser fetches go within minutes, all else when
the server ends. Nothing is logged of an image, and nothing is sent elsewhere.

`Page` answers what a visitor does; `build` lays it out; `serve` runs it.
"""

import base64
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import cv2
import gradio as gr
import numpy as np
from transformers import PreTrainedModel

from dataset_scripts.phantom.archive import PhantomParameters, write_archive
from modeling_mammodino.image_io import ImageFile, InvalidImageError
from modeling_mammodino.image_processing_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools.command import shipped_model
from modeling_mammodino.tools.embed import open_encoder
from modeling_mammodino.tools.examine import Examined, PrincipalAxes, examine, nearest
from modeling_mammodino.tools.feature_table import write_table
from modeling_mammodino.tools.features import FileEmbeddings, group_paths
from modeling_mammodino.tools.files import readable
from modeling_mammodino.tools.visualize import colored_patches, encoded_patches, enlarged, outlined

MAX_UPLOAD_MB = 400
NUM_PATIENTS, SEED = 4, 5  # simulated, a volume and a mammogram each
NUM_NEAREST = 4
CLEAN_SECONDS = (60, 180)  # how often files are removed, and how old they get
FORGET_SECONDS = 1800  # what a visitor left open
CANNOT_USE = (InvalidImageError, OSError, ValueError)


class Example(NamedTuple):
    """A simulated image."""

    path: Path
    label: str
    thumbnail: np.ndarray  # (H, W) uint8
    embedding: np.ndarray  # (D,)


@dataclass(frozen=True)
class Opened:
    """What one visitor looks at, in memory."""

    name: str
    files: tuple[tuple[str, bytes], ...]  # name and bytes of one file, or of each slice of a volume
    examined: Examined
    warnings: tuple[str, ...]
    patch: tuple[int, int]  # row and column of the one that all are compared with
    axes: PrincipalAxes  # of the features as colors, the same for all slices
    example: int | None = None


class Page:
    """What a visitor's acts lead to. A method raises InvalidImageError, OSError or ValueError, one line, for what
    cannot be used."""

    def __init__(self, model: PreTrainedModel, image_processor: MammoDinoImageProcessor, folder: Path):
        """folder: where the simulated examples are written, which takes seconds."""
        self.model, self.image_processor = model, image_processor
        write_archive(folder, NUM_PATIENTS, seed=SEED, parameters=PhantomParameters(vendor="mixed"))
        self.examples = []
        for path in sorted(folder.rglob("*.dcm")):
            examined, (side, view, kind) = examine(path, model, image_processor), path.stem.split("_")
            label = f"{int(path.parent.name[-6:]) + 1} {side} {view} {kind.upper()}"
            self.examples.append(Example(path, label, examined.seen.image, examined.embedding))

    def open_upload(self, paths: Sequence[str]) -> Opened:
        """Open what was uploaded, an image or the files of one volume, and remove it from the disk."""
        uploads = [Path(path) for path in paths]
        name = uploads[0].name + (f" and {len(uploads) - 1} more" if len(uploads) > 1 else "")
        try:
            if (size_mb := sum(path.stat().st_size for path in uploads) / 2**20) > MAX_UPLOAD_MB:
                raise ValueError(f"{name}: {size_mb:.0f} MB; this page takes at most {MAX_UPLOAD_MB} MB")
            places, *others = group_paths(uploads)
            if others:
                raise ValueError(f"{name}: not the slices of one volume, but {1 + len(others)} images; give one")
            files = tuple((uploads[place].name, uploads[place].read_bytes()) for place in places)
        finally:
            for path in uploads:
                path.unlink(missing_ok=True)
        return self._open(name, files)

    def open_example(self, number: int) -> Opened:
        example = self.examples[number]
        opened = self._open(f"Simulated breast {example.label}", ((example.path.name, example.path.read_bytes()),))
        return replace(opened, example=number)

    def open_slice(self, opened: Opened, slice_index: int) -> Opened:
        """Go to another slice; the patch stays in its place."""
        moved = self._open(opened.name, opened.files, slice_index)
        patch = opened.patch if moved.examined.kept[opened.patch] else moved.patch
        return replace(moved, example=opened.example, patch=patch, axes=opened.axes)

    def _open(self, name: str, files: tuple[tuple[str, bytes], ...], slice_index: int | None = None) -> Opened:
        streams = [ImageFile(io.BytesIO(content), each) for each, content in files]
        with warnings_meanwhile() as warnings:
            source = streams if len(streams) > 1 else streams[0]
            examined = examine(source, self.model, self.image_processor, slice_index)
        rows, columns = np.nonzero(examined.kept)
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        patch = (int(rows[middle]), int(columns[middle]))
        return Opened(name, files, examined, tuple(warnings), patch, examined.axes)

    def choose_patch(self, opened: Opened, x: int, y: int) -> Opened:
        """Choose the patch at a pixel of an image; the background changes nothing."""
        (height, width), kept = enlarged(opened.examined.seen.image).shape[:2], opened.examined.kept
        patch = min(y * len(kept) // height, len(kept) - 1), min(x * kept.shape[1] // width, kept.shape[1] - 1)
        return replace(opened, patch=patch) if kept[patch] else opened

    def drawings(self, opened: Opened) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, float]]:
        """Return what the encoder sees, features as colors, and how alike each patch is to the one chosen, (H, W, 3)
        uint8 RGB; and the least and the most similarity that the last one's colors tell apart."""
        examined, kept = opened.examined, opened.examined.kept
        image = enlarged(examined.seen.image)
        similarity = examined.similarity(*opened.patch)
        low, high = np.nanpercentile(similarity, 1), np.nanmax(similarity)
        levels = np.nan_to_num((similarity - low) / max(high - low, 1e-12)).clip(0, 1)
        colors = cv2.applyColorMap(np.rint(255 * levels).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1] / 255
        alike = colored_patches(image, colors, kept, opacity=0.65)
        side_y, side_x = image.shape[0] // kept.shape[0], image.shape[1] // kept.shape[1]
        row, column = opened.patch
        corners = (column * side_x, row * side_y), ((column + 1) * side_x, (row + 1) * side_y)
        cv2.rectangle(alike, *corners, (255, 255, 255), 4)
        seen = outlined(encoded_patches(image, kept), examined.seen.breast)
        return (
            seen,
            colored_patches(image, examined.colors(opened.axes), kept, opacity=0.85),
            alike,
            (float(low), float(high)),
        )

    def nearest(self, opened: Opened) -> list[tuple[int, float]]:
        """Return the numbers of the examples most like the image, without itself, and how like."""
        others = {number: example.embedding for number, example in enumerate(self.examples)}
        ranked = nearest(opened.examined.embedding, others, NUM_NEAREST + 1)
        return [each for each in ranked if each[0] != opened.example][:NUM_NEAREST]

    def table(self, opened: Opened) -> bytes:
        """Return the image's embedding as the Parquet table of `mammodino embed`, one row."""
        seen, name = opened.examined.seen, opened.files[0][0]
        row = FileEmbeddings(
            name,
            volume=name,
            slices=[seen.slice_index],
            num_slices=seen.num_slices,
            embeddings=opened.examined.embedding[None],
            tissue_fraction=np.array([seen.tissue_mask.mean()], np.float32),
            mask_confidence=np.array([seen.confidence], np.float32),
        )
        with TemporaryDirectory() as folder:
            write_table([row], file := Path(folder) / "features.parquet", {})
            return file.read_bytes()


@contextmanager
def warnings_meanwhile() -> Iterator[list[str]]:
    """Collect what this package warns of in this thread."""
    said: list[str] = []
    handler, thread = logging.Handler(logging.WARNING), threading.get_ident()
    handler.emit = lambda record: said.append(record.getMessage()) if record.thread == thread else None  # type: ignore[method-assign]
    logger = logging.getLogger("modeling_mammodino")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


NOTICE = (
    "<b>Research use only.</b> Not a medical device: not for diagnosis, screening or triage. What you upload is read "
    "into memory and not stored."
)
TITLE = "<h1>MammoDINO <span>what a vision foundation model sees of a mammogram</span></h1>"
UPLOAD = "DICOM, PNG, JPEG or TIFF; a volume as one file, or as all its slices."
SEEN = "<b>What the encoder sees.</b> Green: the breast mask. Ruled: the patches that become tokens. Gray: left out."
COLORS = "<b>Patch features.</b> Alike colors, alike features: first three principal components as red, green, blue."
ALIKE = (
    "<b>Similarity</b> to the patch in the white square, cosine {low:.2f} <span class='ramp'></span> {high:.2f}. "
    "<b>Click or tap another patch</b>, in any image."
)
# one screen: the images in a row; on a phone two by two, the tapped one beside the answer
CSS = """
.gradio-container {padding: 4px 8px !important} .main.app {max-width: 1280px; padding: 8px !important}
.html-container {padding: 0 !important}
footer {display: none !important}
h1 {font-size: 21px; margin: 0 0 4px; font-weight: 650} h1 span {font-weight: 400; opacity: .65; font-size: 15px}
.notice, .problem, .doubt {color: #5c4300; background: #fdf3d8; border-left: 4px solid #d99a00; padding: 6px 10px;
  font-size: 13px; overflow-wrap: anywhere}
.problem {color: #7a1710; background: #fde4e1; border-color: #c8372d}
.doubt {font-size: 12px; padding: 4px 8px; margin: 0 0 8px}
.choice, .cell {gap: 6px !important}
.cell {min-width: 150px !important} .cell img {cursor: crosshair}
.heading {font-size: 14px; font-weight: 650}
.caption {font-size: 12.5px; line-height: 1.35}
.ramp {display: inline-block; width: 56px; height: 9px;
  background: linear-gradient(90deg, #000004, #57106e, #bc3754, #f98e09, #fcffa4)}
.facts {font-size: 13px; line-height: 1.35; overflow-wrap: anywhere} .facts h3 {font-size: 15px; margin: 0 0 4px}
.facts dl {margin: 0 0 8px} .facts dt {opacity: .65; font-size: 12px} .facts dd {margin: 0 0 4px}
.facts a {display: block; padding: 5px 8px; border: 1px solid currentColor; border-radius: 6px;
  text-align: center; text-decoration: none; color: inherit}
.thumbs .grid-wrap {min-height: 0 !important; max-height: none !important; overflow: visible !important;
  padding: 0 !important}
.thumbs .grid-container {grid-template-columns: repeat(4, 1fr) !important; gap: 6px !important; padding: 0 !important;
  grid-template-rows: none !important; grid-auto-rows: auto !important}
.thumbs .thumbnail-item, .thumbs .thumbnail-lg {aspect-ratio: 1 !important; width: auto !important;
  height: auto !important}
.thumbs .caption-label {font-size: 10px; line-height: 1.1; padding: 1px 3px; max-width: 100%; left: 0; right: auto;
  bottom: 0; white-space: normal; overflow-wrap: normal}
#nearest .grid-container {grid-template-columns: repeat(2, 1fr) !important}
#slice {padding: 4px 10px}
@media (max-width: 640px) {
  .gradio-container {padding: 6px 8px !important}
  h1 span {display: block}
  .cells {display: grid !important; grid-template-columns: 1fr 1fr; gap: 10px !important}
  .cells > .cell {min-width: 0 !important; width: auto !important}
  .cells > .seen {order: 0} .cells > .alike {order: 1} .cells > .colors {order: 2} .cells > .facts-cell {order: 3}
}
"""


def build(page: Page) -> gr.Blocks:
    """Lay the page out and connect it."""
    thumbnails = [(example.thumbnail, example.label) for example in page.examples]
    # images are outputs that can be clicked; nothing is kept of them
    image_options: dict[str, Any] = {"show_label": False, "interactive": False, "buttons": [], "container": False}
    gallery: dict[str, Any] = {"show_label": False, "allow_preview": False, "buttons": [], "elem_classes": "thumbs",
                               "object_fit": "cover", "interactive": False}  # fmt: skip
    blocks = gr.Blocks(title="MammoDINO", analytics_enabled=False, delete_cache=CLEAN_SECONDS, fill_width=True)
    with blocks:
        opened = gr.State(None, time_to_live=FORGET_SECONDS)
        gr.HTML(TITLE + f'<div class="notice">{NOTICE}</div>', padding=False)
        problem = gr.HTML(visible=False, padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=260, elem_classes="choice"):
                gr.HTML(f'<div class="heading">Open an image</div><div class="caption">{UPLOAD}</div>', padding=False)
                upload = gr.File(show_label=False, file_count="multiple", height=110, elem_id="upload")
                gr.HTML('<div class="heading">or take a simulated one</div>', padding=False)
                examples = gr.Gallery(thumbnails, columns=4, elem_id="examples", **gallery)
            with gr.Column(scale=3, min_width=300):
                slices = gr.Slider(0, 1, step=1, label="Slice", visible=False, elem_id="slice", buttons=[])
                with gr.Row(elem_classes="cells", equal_height=False):
                    cells = []
                    for name in ("seen", "colors", "alike"):
                        with gr.Column(elem_classes=["cell", name], min_width=150):
                            cells.append((gr.Image(elem_id=name, **image_options), gr.HTML(padding=False)))
                    with gr.Column(elem_classes=["cell", "facts-cell"], min_width=150):
                        facts = gr.HTML(elem_id="facts", padding=False)
                        gr.HTML('<div class="heading">Nearest simulated images</div>', padding=False)
                        near = gr.Gallery(columns=2, elem_id="nearest", **gallery)

        seen_parts = [part for cell in cells for part in cell]
        shown = [opened, problem, *seen_parts, facts, slices, near]

        def show(found: Opened, moves: bool = True) -> dict[Any, Any]:
            """What follows from an image or slice that was opened."""
            *drawings, (low, high) = page.drawings(found)
            captions = (SEEN, COLORS, ALIKE.format(low=low, high=high))
            answer: dict[Any, Any] = {opened: found, problem: gr.update(visible=False)}
            for (image, caption), drawn, words in zip(cells, drawings, captions, strict=True):
                answer |= {image: drawn, caption: f'<div class="caption">{words}</div>'}
            if moves:
                ranked = page.nearest(found)
                last, place = found.examined.seen.num_slices - 1, found.examined.seen.slice_index
                answer[near] = [
                    (thumbnails[number][0], f"{like:+.2f} {thumbnails[number][1]}") for number, like in ranked
                ]
                answer[slices] = gr.update(
                    maximum=max(last, 1), value=place, visible=last > 0, label=f"Slice, 0 to {last}"
                )
            answer[facts] = describe(page, found)
            return answer

        def refused(error: Exception) -> dict[Any, Any]:
            reason = escape(readable(" ".join(str(error).split())))
            return {problem: gr.update(value=f'<div class="problem">{reason}</div>', visible=True)}

        def take(paths: list[str] | None) -> dict[Any, Any]:
            if not paths:
                return {problem: gr.update()}
            try:
                return show(page.open_upload(paths)) | {upload: None}
            except CANNOT_USE as error:
                return refused(error) | {upload: None}

        def go_to(found: Opened | None, place: int) -> dict[Any, Any]:
            if found is None or place == found.examined.seen.slice_index:
                return {problem: gr.update()}
            answer = show(page.open_slice(found, int(place)))
            return {part: value for part, value in answer.items() if part is not slices}  # the hand is on it

        def compare(found: Opened | None, event: gr.SelectData) -> dict[Any, Any]:
            if found is None:
                return {problem: gr.update()}
            answer = show(page.choose_patch(found, *event.index), moves=False)
            return {part: answer[part] for part in (opened, *cells[2])}

        def pick(event: gr.SelectData) -> dict[Any, Any]:
            return show(page.open_example(event.index))

        def pick_near(found: Opened | None, event: gr.SelectData) -> dict[Any, Any]:
            return show(page.open_example(page.nearest(found)[event.index][0])) if found else {problem: gr.update()}

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        upload.upload(take, upload, [*shown, upload], show_progress_on=cells[0][0], **quiet)
        examples.select(pick, None, shown, **quiet)
        near.select(pick_near, opened, shown, **quiet)
        slices.input(go_to, [opened, slices], shown, trigger_mode="always_last", **quiet)
        for image, _ in cells:
            image.select(compare, opened, [opened, *cells[2]], trigger_mode="always_last", **quiet)
        blocks.load(lambda: show(page.open_example(0)), None, shown, **quiet)
    return blocks


def describe(page: Page, opened: Opened) -> str:
    """Say what the images do not, and offer the embedding."""
    examined, seen = opened.examined, opened.examined.seen
    size = " x ".join(map(str, seen.image.shape))
    rows = {
        "breast mask": f"confidence {seen.confidence:.2f} of 1" + (f", {seen.warning}" if seen.warning else ""),
        "tokens": f"{examined.kept.sum()} of {examined.kept.size} patches ({examined.kept.mean():.0%})",
        "canvas": f"{size} pixels" + (f", {1 / seen.px_per_mm:.2f} mm each" if seen.px_per_mm else ""),
        "slice": f"{seen.slice_index} (0 to {seen.num_slices - 1})" if seen.num_slices > 1 else "",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(words)}</dd>" for name, words in rows.items() if words)
    doubts = "".join(f'<p class="doubt">{escape(readable(each))}</p>' for each in opened.warnings)
    link = f"data:application/octet-stream;base64,{base64.b64encode(page.table(opened)).decode()}"
    return (
        f'<div class="facts"><h3>{escape(readable(opened.name))}</h3><dl>{listed}</dl>{doubts}'
        f'<a id="embedding" download="features.parquet" href="{link}">Embedding, {len(examined.embedding)} numbers '
        "(Parquet)</a></div>"
    )


def serve(model_name: str, **options: Any) -> None:
    """Run the page until Ctrl-C; `options` are those of `gradio.Blocks.launch`."""
    model, image_processor = open_encoder(model_name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # files are removed then, too
    with TemporaryDirectory(prefix="mammodino-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "cache")
        blocks = build(Page(model, image_processor, Path(folder) / "examples"))
        font = ("system-ui", "sans-serif")  # of the machine: none is fetched
        theme = gr.themes.Default(font=font, font_mono=("ui-monospace", "monospace"), primary_hue="emerald")
        _, url, _ = blocks.launch(
            theme=theme,
            css=CSS,
            footer_links=[],
            max_file_size=f"{MAX_UPLOAD_MB}mb",
            ssr_mode=False,
            share=False,
            enable_monitoring=False,
            quiet=True,
            prevent_thread_lock=True,
            **options,
        )
        print(f"page: {url} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()


if __name__ == "__main__":
    name = os.environ.get("MAMMODINO_MODEL") or shipped_model()
    if name is None:
        raise SystemExit("no encoder here; name a checkpoint in MAMMODINO_MODEL")
    serve(name)
