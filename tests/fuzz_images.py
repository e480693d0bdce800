"""Damaged files: does the reader read or refuse each, without a crash, a hang or an absurd allocation?

    python -m tests.fuzz_images --count 10000 --seed 0

A mutant is a pure function of (seed, index). Each is read as a user would, in a process that is watched: a signal, more
than 10 seconds, more than 1 GiB asked for (VmPeak, so Linux only), or another exception than InvalidImageError is a
finding, and its file is kept.
"""

import argparse
import io
import os
import re
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom.pixels import get_decoder

from dataset_scripts.phantom.archive import PhantomParameters, acquire_2d, acquire_dbt, simulate_breast
from dataset_scripts.phantom.dicom import (
    TRANSFER_SYNTAXES,
    BreastInfo,
    encode,
    fit_pixel_format,
    mammogram_dataset,
    tomosynthesis_dataset,
)
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.image_io import ImageFile, InvalidImageError
from performance.images import REAL_DATA
from tests.forked import CONTEXT, start
from tests.phantom_formats import set_voi

LIMIT_SECONDS, LIMIT_BYTES = 10.0, 2**30
ATTRIBUTES = (
    *("Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("SamplesPerPixel", "PlanarConfiguration", "WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "PhotometricInterpretation", "VOILUTFunction", "ImageType"),
    *("ImageOrientationPatient", "ImagePositionPatient", "Modality", "SOPClassUID", "PatientID", "ViewPosition"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "VOILUTSequence", "PixelData"),
)
NUMBERS = (0, 1, -1, 2, 3, 7, 8, 12, 16, 17, 32, 33, 64, 255, 256, 4095, 32767, 32768, 65535, 2**31 - 1, 2**32 - 1)
WORDS = ("", "RGB", "MONOCHROME1", "PALETTE COLOR", "YBR_FULL_422", "SIGMOID", "1e309", "nan", "-1", "A" * 300, "\0")
MARKERS = (
    *(b"\xff\x51", b"\xff\x52", b"\xff\x53", b"\xff\x5c", b"\xff\x90", b"\xff\x93", b"\xff\x50"),  # JPEG 2000
    *(b"\xff\xc0", b"\xff\xc1", b"\xff\xc3", b"\xff\xc4", b"\xff\xda", b"\xff\xdb", b"\xff\xdd", b"\xff\xf7"),  # JPEG
    *(b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0", b"\xe0\x7f\x10\x00", b"IHDR", b"IDAT", b"II*\0"),
)


@cache
def seeds() -> list[tuple[str, bytes]]:
    """Valid files of every kind that is read, small; the real ones too where they are."""
    breast = simulate_breast(PhantomParameters(4, 65, 47, pixel_spacing_mm=2.5, slice_spacing_mm=8.0), 0, 1)
    info = BreastInfo("PHANTOM", breast.laterality, breast.view, 2.5, 8.0)

    def phantom(multi_frame: bool) -> pydicom.Dataset:
        if multi_frame:
            return tomosynthesis_dataset(acquire_dbt(breast), info)
        return mammogram_dataset(acquire_2d(breast), info)

    found = []
    for name in TRANSFER_SYNTAXES:
        if not get_decoder(getattr(pydicom.uid, name)).is_available:
            continue
        for multi_frame in (False, True):
            dataset = encode(fit_pixel_format(phantom(multi_frame), name), name)
            found.append((f"{name} {'volume' if multi_frame else 'mammogram'}", _bytes_of(dataset)))
    for form in ("SIGMOID", "LUT"):
        found.append((form, _bytes_of(set_voi(phantom(True), form, "per_frame"))))
    image = acquire_2d(breast) << 4
    for suffix in (".png", ".tif", ".pgm"):
        found.append((suffix, cv2.imencode(suffix, image)[1].tobytes()))
    found.append((".jpg", cv2.imencode(".jpg", (image >> 8).astype(np.uint8))[1].tobytes()))
    real = sorted((REAL_DATA / "dicom_codecs").glob("*.dcm"))
    return found + [(path.name, path.read_bytes()) for path in real]


def _bytes_of(dataset: pydicom.Dataset) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def mutant(seed: int, index: int) -> tuple[str, bytes]:
    """Name and content of a damaged file."""
    rng = np.random.default_rng((seed, index))
    name, content = seeds()[int(rng.integers(len(seeds())))]
    kinds: list[Callable[[bytes, np.random.Generator], bytes]] = [_cut, _flip, _run, _block, _length, _marker, _splice]
    if content[128:132] == b"DICM":
        kinds += [_header, _header, _syntax, _marker, _marker, _marker, _marker]  # codestreams lie deep
    for _ in range(int(rng.integers(1, 4))):
        content = kinds[int(rng.integers(len(kinds)))](content, rng)
    suffix = name if name.startswith(".") else ".dcm"
    return f"{index:06d}{suffix}", content


def _place(content: bytes, rng: np.random.Generator) -> int:
    """Anywhere, more often in the first 2 KiB, where headers stand."""
    return int(rng.integers(min(len(content), 2048) if rng.random() < 0.5 else len(content)) if content else 0)


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: _place(content, rng)]


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 17)) if changed else 0):
        changed[_place(content, rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _run(content: bytes, rng: np.random.Generator) -> bytes:
    at, length = _place(content, rng), int(rng.integers(1, 65))
    filling = bytes([int(rng.choice([0, 255]))]) * length if rng.random() < 0.5 else rng.bytes(length)
    return content[:at] + filling + content[at + length :]


def _block(content: bytes, rng: np.random.Generator) -> bytes:
    """Taken out, inserted or doubled."""
    at, length = _place(content, rng), int(rng.integers(1, 257))
    block = content[at : at + length]
    return (content[:at] + content[at + length :], content[:at] + rng.bytes(length) + content[at:],
            content[: at + length] + block + content[at + length :])[int(rng.integers(3))]  # fmt: skip


def _length(content: bytes, rng: np.random.Generator) -> bytes:
    """A number of 2 or 4 bytes becomes another, in either byte order."""
    at, size = _place(content, rng), int(rng.choice([2, 4]))
    value = int(rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.integers(2**32)])) % 256**size
    return content[:at] + value.to_bytes(size, rng.choice(["little", "big"])) + content[at + size :]


def _marker(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes behind a marker of a codestream, an item or a chunk change."""
    places = [at for marker in MARKERS if (at := content.find(marker, int(rng.integers(len(content) + 1)))) >= 0]
    if not places:
        return _flip(content, rng)
    at, length = int(rng.choice(places)) + int(rng.integers(2, 44)), int(rng.integers(1, 5))
    return content[:at] + rng.bytes(length) + content[at + length :]


def _splice(content: bytes, rng: np.random.Generator) -> bytes:
    other = seeds()[int(rng.integers(len(seeds())))][1]
    return content[: _place(content, rng)] + other[_place(other, rng) :]


def _header(content: bytes, rng: np.random.Generator) -> bytes:
    """An attribute gets another value, through pydicom."""
    try:
        with pydicom.config.disable_value_validation():
            dataset = pydicom.dcmread(io.BytesIO(content), force=True)
            keyword = str(rng.choice(ATTRIBUTES))
            if rng.random() < 0.2 and keyword in dataset:
                delattr(dataset, keyword)
            else:
                value = int(rng.choice(NUMBERS)) if rng.random() < 0.6 else str(rng.choice(WORDS))
                for scope in (dataset, *(dataset.get("SharedFunctionalGroupsSequence") or [])):
                    scope[keyword] = pydicom.DataElement(keyword, pydicom.datadict.dictionary_VR(keyword), value)
            return _bytes_of(dataset)
    except Exception:  # damaged before, or a value that cannot be written
        return _flip(content, rng)


def _syntax(content: bytes, rng: np.random.Generator) -> bytes:
    """The pixels are said to be in another transfer syntax."""
    at = content.find(b"1.2.840.10008.1.2")
    ends = [b".1\0", b".2\0", b".5\0", b".4.50", b".4.51", b".4.57", b".4.70", b".4.80", b".4.90", b".4.91", b".4.201"]
    ends += [b".4.110", b".8.1\0\0", b".1.98\0"]
    end = ends[int(rng.integers(len(ends)))]
    return content[: at + 17] + end + content[at + 17 + len(end) :] if at > 0 else content


def read(name: str, content: bytes, processor: MammoDinoImageProcessor) -> str:
    """ "read", or the reason of the refusal; whatever else the reader raises."""
    try:
        for mammogram, rendered in processor.render_source(ImageFile(io.BytesIO(content), name), (64, 64)):
            if not np.isfinite(mammogram.pixels).all() and mammogram.pixels.dtype.kind != "f":
                raise AssertionError("pixels that are no numbers")
            if rendered.image.dtype != np.uint8 or not rendered.tissue.any() and rendered.image.any():
                raise AssertionError("an image without a breast")
    except InvalidImageError as refusal:
        if "MemoryError" in refusal.reason or isinstance(refusal.__cause__, MemoryError):
            raise MemoryError(refusal.reason) from refusal
        return refusal.reason
    return "read"


def child(seed: int, pipe: Connection) -> None:
    """Reads the mutants whose indices come in; says what became of each."""
    for stream in (1, 2):  # decoders print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    cv2.setNumThreads(1)
    processor = MammoDinoImageProcessor()
    read(*mutant(seed, 0), processor)  # what is loaded late is loaded now
    hard = address_space()[0] + 6 * LIMIT_BYTES  # protects the machine
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            index, (size, peak) = pipe.recv(), address_space()
            try:
                result = read(*mutant(seed, index), processor)
            except BaseException as error:
                result = f"FINDING {type(error).__name__}: {error}"
            grown = address_space()[1]
            if grown > peak and grown - size > LIMIT_BYTES:
                result = f"FINDING {(grown - size) / LIMIT_BYTES:.1f} GiB taken: {result}"
            pipe.send(result)


def address_space() -> tuple[int, int]:
    """Bytes: now, and at most so far; what was asked for, touched or not."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmSize", "VmPeak"))


class Reader:
    """A watched process that reads mutants."""

    def __init__(self, seed: int):
        self.seed = seed
        self.start()

    def start(self) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = start(child, self.seed, theirs)
        theirs.close()
        self.pipe.recv()

    def read(self, index: int) -> str:
        try:
            self.pipe.send(index)
            if self.pipe.poll(LIMIT_SECONDS):
                return self.pipe.recv()
            finding = "no answer within 10 s"
            self.process.kill()
            self.process.join()
        except (EOFError, OSError):  # the process has ended
            self.process.join()
            finding = f"signal {-self.process.exitcode}"
        self.start()
        return f"FINDING {finding}"

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def fuzz(indices: range, seed: int) -> Iterator[tuple[int, str]]:
    """Index and result of each mutant."""
    reader = Reader(seed)
    try:
        for index in indices:
            yield index, reader.read(index)
    finally:
        reader.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_images", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="mutants (default 10,000)")
    parser.add_argument("--first", type=int, default=0, help="index of the first (default 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of findings")
    options = parser.parse_args()
    results: Counter[str] = Counter()
    for index, result in fuzz(range(options.first, options.first + options.count), options.seed):
        results[re.sub(r"\d+", "#", result)] += 1
        if result.startswith("FINDING"):
            name, content = mutant(options.seed, index)
            print(f"{index}: {result[:300]}", flush=True)
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / name).write_bytes(content)
    for result, count in results.most_common():
        print(f"{count:7d}  {result[:160]}")
    findings = sum(count for result, count in results.items() if result.startswith("FINDING"))
    print(f"{options.count} mutants: {results['read']} read, {options.count - results['read'] - findings} refused, "
          f"{findings} findings")  # fmt: skip
    raise SystemExit(findings > 0)


if __name__ == "__main__":
    main()
