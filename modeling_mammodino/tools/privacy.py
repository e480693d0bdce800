"""What may not leave the machine, in a text or a figure that is published.

A check yields what is wrong, each with its remedy; nothing is repaired here.

Figures are images of results: PNG, JPEG or SVG. Refused are metadata of any kind, data after the image's end, links,
what is as large as a mammogram, and what is gray throughout, as mammograms are. A figure that shows a patient in color
is not recognized: look before you push.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import ChunkStream

LOCAL_PATH = re.compile(
    r"(?<![\w./<~\])}-])/[A-Za-z_][\w.-]*(?:/|\b)"  # /home/someone, not https://host/page, and/or, ViT-B/14, </p>
    r"|(?<!\w)~\w*/\w|\bfile://|(?<![A-Za-z])[A-Za-z]:[\\/]+\w|\\\\\w[\w.-]*\\"  # ~/x, file://, C:\x, \\server\x
)
PRIVATE = {
    "a path of a local machine": LOCAL_PATH,
    "an access token": re.compile(r"\b(?:hf|api_org|ghp|gho|github_pat)_\w{20,}|-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a DICOM UID": re.compile(r"(?<![\w.])[0-2](?:\.(?:0|[1-9]\d*)){6,}(?![\w.]\d)"),
}
# a page is about 800 px wide; full-field mammograms start at 4 MP
MAX_FIGURE_PX, MAX_FIGURE_BYTES = 3_000_000, 3 * 2**20
PNG_SIGNATURE, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
# what a decoder needs; the others hold text, dates, EXIF, color profiles or private data (PNG specification, 11.3)
PNG_CHUNKS = {"IHDR", "PLTE", "IDAT", "IEND", "tRNS", "gAMA", "cHRM", "sRGB", "sBIT", "pHYs", "bKGD", "hIST"}
JPEG_SEGMENTS = {"APP0", "APP14"}  # JFIF's density and Adobe's color transform; EXIF, XMP, ICC, IPTC are others
SVG = "{http://www.w3.org/2000/svg}"
SVG_ELEMENTS = {
    "svg", "g", "defs", "style", "path", "use", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text",
    "tspan", "clipPath", "mask", "pattern", "marker", "linearGradient", "radialGradient", "stop", "symbol",
}  # fmt: skip
XLINK, XML = "{http://www.w3.org/1999/xlink}", "{http://www.w3.org/XML/1998/namespace}"
REMEDY = "draw it anew, with savefig(..., metadata={'Software': None}) in matplotlib"
SVG_REMEDY = "save it as PNG, or from matplotlib with svg.fonttype 'none' and Creator, Date, Format and Type None"


def check_text(text: str) -> Iterator[str]:
    """Yield paths, tokens and UIDs that should not leave the machine."""
    for name, pattern in PRIVATE.items():
        if match := pattern.search(text):
            line = text.count("\n", 0, match.start()) + 1
            # a token itself is not repeated: this message may be logged
            shown = "" if "token" in name else f" ({_around(text, match)!r})"
            yield f"line {line} holds {name}{shown}; take it out"


def without_private(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts by text, most frequent first; what `check_text` finds in a text is replaced by what it is."""
    public: Counter[str] = Counter()
    for text, count in counts.items():
        for name, pattern in PRIVATE.items():
            text = re.sub(rf"(?:{pattern.pattern})[^\s,;()]*", f"({name})", text)
        public[text] += count
    return dict(public.most_common())


def _around(text: str, match: re.Match[str]) -> str:
    return re.split(r"\s", text[match.start() : match.start() + 48], maxsplit=1)[0] or match.group()


def check_figure(suffix: str, data: bytes) -> Iterator[str]:
    """Yield what is wrong with a figure of this suffix (.png, .jpg, .jpeg, .svg), each with its remedy."""
    if len(data) > MAX_FIGURE_BYTES:
        yield f"{len(data) / 2**20:.1f} MiB, and a figure has at most {MAX_FIGURE_BYTES / 2**20:g}; draw it smaller"
    elif suffix == ".svg":
        yield from _check_svg(data)
    else:
        yield from _check_image("PNG" if suffix == ".png" else "JPEG", data)


def _check_image(kind: str, data: bytes) -> Iterator[str]:
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
        if image.width * image.height > MAX_FIGURE_PX:
            size = f"{image.width} x {image.height} px, as large as a mammogram"
            yield f"{size}; a figure has at most {MAX_FIGURE_PX / 1e6:g} million: draw it smaller"
            return
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        yield f"not a readable {kind}, whatever its name says; remove it"
        return
    if kind == "JPEG":
        yield from _check_jpeg_segments(image, data)
    else:
        try:
            if hidden := sorted(set(png_chunks(data)) - PNG_CHUNKS):
                yield f"metadata in the PNG chunks {', '.join(hidden)}; {REMEDY}"
        except ValueError as error:
            yield f"{error}; {REMEDY}"
    if image.mode not in ("RGB", "RGBA", "P"):
        yield f"color mode {image.mode}, as mammograms have; a figure is drawn in 8-bit color"
    else:
        colors = np.asarray(image.convert("RGB"))  # (H, W, 3)
        if (colors == colors[..., :1]).all():
            yield "gray throughout, as mammograms are; draw the figure with a color, or leave it out"


def png_chunks(data: bytes) -> list[str]:
    """Return the names of a PNG's chunks but the last, IEND.

    Raises ValueError where a chunk is damaged or cut off, and where bytes stand behind the image's end.
    """
    stream = io.BytesIO(data)
    if stream.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
        raise ValueError("not a PNG")
    try:
        names = ChunkStream(stream).verify()  # up to the header of IEND
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError("damaged or cut short") from error
    if more := len(data) - 4 - stream.tell():
        raise ValueError(f"{more} bytes after the image's end" if more > 0 else "cut short")
    if not data.endswith(PNG_END):
        raise ValueError("damaged in its last chunk")
    return [name.decode("latin-1") for name in names]


def _check_jpeg_segments(image: Image.Image, data: bytes) -> Iterator[str]:
    segments = getattr(image, "applist", [])
    if hidden := sorted({name for name, _ in segments} - JPEG_SEGMENTS):
        yield f"metadata in the JPEG segments {', '.join(hidden)}; save it as PNG"
    if any(name == "APP0" and not (body.startswith(b"JFIF\0") and len(body) == 14) for name, body in segments):
        yield "a thumbnail or unknown data in its APP0 segment; save it as PNG"
    # inside the image's own data a byte FF is followed by 00 or a restart marker, so the first end marker ends it
    if data.find(b"\xff\xd9", data.find(b"\xff\xda")) != len(data) - 2:
        yield "data after the image's end; save it as PNG"


def _check_svg(data: bytes) -> Iterator[str]:
    try:
        text = data.decode()
        root = ElementTree.fromstring(_without_doctype(text))
    except (UnicodeDecodeError, ElementTree.ParseError, ValueError) as error:
        yield f"not a readable SVG ({error}); {SVG_REMEDY}"
        return
    if "<!--" in text or "<?" in text[5:]:
        yield f"holds comments or processing instructions; {SVG_REMEDY}"
    elements = {element.tag.removeprefix(SVG) for element in root.iter()}
    if root.tag != f"{SVG}svg" or elements - SVG_ELEMENTS:
        yield f"holds {', '.join(sorted(elements - SVG_ELEMENTS)) or 'no SVG'}; {SVG_REMEDY}"
    attributes = {(name, value) for element in root.iter() for name, value in element.attrib.items()}
    names = {name.removeprefix(XLINK).removeprefix(XML) for name, _ in attributes}
    if hidden := sorted(name for name in names if re.match(r"\{|on|data-|aria-", name)):
        yield f"holds the attributes {', '.join(hidden)}; {SVG_REMEDY}"
    styles = [element.text or "" for element in root.iter(f"{SVG}style")]
    links = [value for name, value in attributes if name.removeprefix(XLINK) in ("href", "src")]
    links += re.findall(r"(?:url\(|@import)\s*[\"']?([^)\s\"']*)", " ".join([*styles, *(v for _, v in attributes)]))
    if outside := [link for link in links if not link.startswith("#")]:
        yield f"refers to {outside[0][:60]!r} outside of it; {SVG_REMEDY}"


def _without_doctype(text: str) -> str:
    """Without the standard document type, which declares nothing of its own; any other is refused."""
    text = re.sub(r'<!DOCTYPE svg PUBLIC "[^"<>]*"\s+"[^"<>]*">', "", text, count=1)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("its document type declares entities")
    return text
