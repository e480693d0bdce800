"""Figures that may be published: pictures of results and nothing else. PNG, JPEG or SVG, checked by content.

Refused are metadata of any kind, data after the picture's end, links, what is as large as a mammogram, and what is
grey throughout, as mammograms are. A figure that shows a patient in colour is not recognised: look before you push.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

# a page is about 800 px wide; full-field mammograms start at 4 MP
MAX_FIGURE_PX, MAX_FIGURE_BYTES = 3_000_000, 3 * 2**20
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# what a decoder needs; the others hold text, dates, EXIF, colour profiles or private data (PNG specification, 11.3)
PNG_CHUNKS = {"IHDR", "PLTE", "IDAT", "IEND", "tRNS", "gAMA", "cHRM", "sRGB", "sBIT", "pHYs", "bKGD", "hIST"}
JPEG_SEGMENTS = {"APP0", "APP14"}  # JFIF's density and Adobe's colour transform; EXIF, XMP, ICC, IPTC are others
SVG = "{http://www.w3.org/2000/svg}"
SVG_ELEMENTS = {
    "svg", "g", "defs", "style", "path", "use", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text",
    "tspan", "clipPath", "mask", "pattern", "marker", "linearGradient", "radialGradient", "stop", "symbol",
}  # fmt: skip
XLINK, XML = "{http://www.w3.org/1999/xlink}", "{http://www.w3.org/XML/1998/namespace}"
REMEDY = "draw it anew, with savefig(..., metadata={'Software': None}) in matplotlib"
SVG_REMEDY = "save it as PNG, or from matplotlib with svg.fonttype 'none' and Creator, Date, Format and Type None"


def check_figure(suffix: str, data: bytes) -> Iterator[str]:
    """What is wrong with a figure of this suffix (.png, .jpg, .jpeg, .svg), each with its remedy."""
    if len(data) > MAX_FIGURE_BYTES:
        yield f"{len(data) / 2**20:.1f} MiB, and a figure has at most {MAX_FIGURE_BYTES / 2**20:g}; draw it smaller"
    elif suffix == ".svg":
        yield from _check_svg(data)
    else:
        yield from _check_picture("PNG" if suffix == ".png" else "JPEG", data)


def _check_picture(kind: str, data: bytes) -> Iterator[str]:
    try:
        picture = Image.open(io.BytesIO(data), formats=[kind])
        if picture.width * picture.height > MAX_FIGURE_PX:
            size = f"{picture.width} x {picture.height} px, as large as a mammogram"
            yield f"{size}; a figure has at most {MAX_FIGURE_PX / 1e6:g} million: draw it smaller"
            return
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        yield f"not a readable {kind}, whatever its name says; remove it"
        return
    yield from _check_png_chunks(data) if kind == "PNG" else _check_jpeg_segments(picture, data)
    if picture.mode not in ("RGB", "RGBA", "P"):
        yield f"colour mode {picture.mode}, as mammograms have; a figure is drawn in 8-bit colour"
    else:
        colours = np.asarray(picture.convert("RGB"))  # (H, W, 3)
        if (colours == colours[..., :1]).all():
            yield "grey throughout, as mammograms are; draw the figure with a colour, or leave it out"


def _check_png_chunks(data: bytes) -> Iterator[str]:
    position = len(PNG_SIGNATURE)
    chunks: list[str] = []
    while position + 12 <= len(data) and chunks[-1:] != ["IEND"]:
        length = int.from_bytes(data[position : position + 4], "big")
        body = data[position + 4 : position + 8 + length]
        if zlib.crc32(body) != int.from_bytes(data[position + 8 + length : position + 12 + length], "big"):
            yield f"damaged at byte {position}; {REMEDY}"
            return
        chunks.append(body[:4].decode("latin-1"))
        position += 12 + length
    if hidden := sorted(set(chunks) - PNG_CHUNKS):
        yield f"metadata in the PNG chunks {', '.join(hidden)}; {REMEDY}"
    if chunks[-1:] != ["IEND"]:
        yield f"cut short; {REMEDY}"
    elif position != len(data):
        yield f"{len(data) - position} bytes after the picture's end; {REMEDY}"


def _check_jpeg_segments(picture: Image.Image, data: bytes) -> Iterator[str]:
    segments = getattr(picture, "applist", [])
    if hidden := sorted({name for name, _ in segments} - JPEG_SEGMENTS):
        yield f"metadata in the JPEG segments {', '.join(hidden)}; save it as PNG"
    if any(name == "APP0" and not (body.startswith(b"JFIF\0") and len(body) == 14) for name, body in segments):
        yield "a thumbnail or unknown data in its APP0 segment; save it as PNG"
    # inside the picture's own data a byte FF is followed by 00 or a restart marker, so the first end marker ends it
    if data.find(b"\xff\xd9", data.find(b"\xff\xda")) != len(data) - 2:
        yield "data after the picture's end; save it as PNG"


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
