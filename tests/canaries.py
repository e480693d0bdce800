"""Identifiers that occur nowhere else: planted into DICOM headers and file names, and searched for byte by byte."""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pydicom
from pydicom.datadict import DicomDictionary, RepeatersDictionary, dictionary_VR
from pydicom.tag import Tag

# What the reader needs to see an image; another value would only have the file refused. A UID, a patient and the texts
# that need no certain value are planted all the same.
NEEDED = {
    *("PhotometricInterpretation", "Modality", "ImageType", "PresentationIntentType", "SOPClassUID", "VOILUTFunction"),
    *("SpecificCharacterSet", "ImageLaterality", "Laterality", "FrameLaterality", "PixelPresentation", "ViewPosition"),
    *("BurnedInAnnotation", "RecognizableVisualFeatures", "NumberOfFrames", "WindowCenter", "WindowWidth"),
    *("RescaleSlope", "RescaleIntercept", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"),
    *("SpacingBetweenSlices", "SliceThickness", "ImagePositionPatient", "ImageOrientationPatient"),
    *("LossyImageCompression", "InstanceNumber", "PresentationLUTShape"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ViewCodeSequence"),
    *("ModalityLUTSequence", "VOILUTSequence", "PresentationLUTSequence", "AnatomicRegionSequence"),
}
TEXTS = {"LO", "SH", "PN", "LT", "ST", "UT", "UC", "AE", "CS", "UR"}
AGE = "987Y"  # an AS has four characters: the one value that is planted more than once
ITEM = ("PersonName", "TextValue", "CodeMeaning", "Date", "Time", "UID", "PatientComments", "PatientBirthDate")
# Shapes of the values in lower case. What is digits only stands alone where it is written as text: a longer run of
# digits is another number. A time may follow a date.
SHAPES = (r"qz\d{6}xj", r"1\.2\.840\.99887766\.\d+\.5544332211", r"235959\.\d{6}", rf"(?<!\w){AGE.lower()}(?!\w)")
DIGITS = (r"(?<![\w.])(1[5-8]\d\d-?\d\d-?\d\d)(?=(?:\d{6}|t\d+)?(?!\w))", r"(?<![\w.])(7\d{8})(?!\w)")
ANY_DIGITS = (r"(?=(1[5-8]\d{6}))", r"(?=(7\d{8}))")
PNG = b"\x89PNG\r\n\x1a\n"


class Canaries:
    """Makes unique values, and finds them again."""

    def __init__(self) -> None:
        self.planted: set[str] = set()
        self.kinds: Counter[str] = Counter()

    def _add(self, kind: str, value: str) -> str:
        self.kinds[kind] += 1
        self.planted.add(value)
        return value

    def text(self) -> str:
        return self._add("text", f"QZ{self.kinds['text']:06d}XJ")

    def uid(self) -> str:
        return self._add("uid", f"1.2.840.99887766.{self.kinds['uid']}.5544332211")

    def date(self) -> str:
        number = self.kinds["date"]
        return self._add("date", f"{1500 + number // 336}{1 + number // 28 % 12:02d}{1 + number % 28:02d}")

    def time(self) -> str:
        return self._add("time", f"235959.{self.kinds['time']:06d}")

    def number(self) -> str:
        return self._add("number", f"7{self.kinds['number']:08d}")

    def of(self, vr: str) -> str | None:
        """A legal value of that VR; None of those that hold no text."""
        if vr in TEXTS:
            return self.text()
        makers = {"DA": self.date, "TM": self.time, "UI": self.uid, "IS": self.number, "DS": self.number}
        if vr == "DT":
            return f"{self.date()}235959"
        if vr == "AS":
            return self._add("age", AGE)
        return makers[vr]() if vr in makers else None

    def found_in(self, content: bytes, among_digits: bool = False) -> set[str]:
        """In any case; as UTF-8, Latin or UTF-16; as they are, inside the pixels and texts of PNGs, in Arrow's cells.

        among_digits: also where the bytes beside a number happen to be digits, as in a DICOM file.
        """
        found: set[bytes] = set()
        for layer in layers(content):
            for text in {layer.lower(), layer.replace(b"\0", b"").lower()}:  # zeros part values, or make them UTF-16
                for shape in SHAPES + (ANY_DIGITS if among_digits else DIGITS):
                    found.update(re.findall(shape.encode(), text))
        found |= {each.replace(b"-", b"") for each in found}
        return self.planted & {each.decode().upper() for each in found}  # they have no lower case


def layers(content: bytes) -> Iterator[bytes]:
    """The content, and what is in it where a search of its bytes would miss it."""
    yield content
    for start in (match.start() for match in re.finditer(re.escape(PNG), content)):
        pixels, at = b"", start + len(PNG)
        while at + 8 <= len(content):
            size, name = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
            data = content[at + 8 : at + 8 + size]
            if name == b"IDAT":
                pixels += data
            elif name in (b"zTXt", b"iTXt"):
                yield _inflate(data[max(data.find(b"\x78"), 0) :])
            at += 12 + size
            if name == b"IEND":
                break
        yield _inflate(pixels)
    try:  # cells of a string column stand side by side
        with pa.ipc.open_stream(content) as batches:
            table = batches.read_all()
    except (pa.ArrowInvalid, OSError):  # no stream of Arrow
        return
    yield str(table.schema.metadata).encode()
    for column in table.columns:
        if not pa.types.is_struct(column.type):
            yield "\n".join(map(str, column.to_pylist())).encode()


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data)
    except zlib.error:
        return b""


def plant(dataset: pydicom.Dataset, canaries: Canaries) -> None:
    """Into every attribute of the dictionary that takes a text, a date, a UID or a number as text, retired ones too;
    into an item of every sequence, into those that are there at any depth, private blocks, file meta and preamble."""
    nested = list(_items(dataset))
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if not keyword or keyword in NEEDED or Tag(tag).group in (0x0000, 0x0002, 0x0004, 0xFFFE):
            continue
        if vr == "SQ" and not dataset.get(keyword):
            dataset.add_new(tag, vr, [planted_item(canaries)])
        elif (value := canaries.of(vr)) is not None:
            dataset.add_new(tag, vr, value)
    for tag, (vr, *_) in RepeatersDictionary.items():  # of overlays and curves
        if vr in TEXTS and tag.startswith(("50xx", "60xx")):
            dataset.add_new(int(tag.replace("xx", "00"), 16), vr, canaries.text())
    for each in nested:
        _fill(each, canaries)
    for group in (0x0009, 0x0029, 0x7FDF):
        block = dataset.private_block(group, canaries.text(), create=True)
        block.add_new(1, "LO", canaries.text())
        block.add_new(2, "UN", canaries.text().encode())
        block.add_new(3, "DA", canaries.date())
        block.add_new(4, "SQ", [planted_item(canaries)])
        block.add_new(5, "LT", canaries.text().encode("utf-16").decode("latin-1"))
    dataset.add_new(0xFFFCFFFC, "OB", canaries.text().encode() + b"\0")  # trailing padding
    meta = dataset.file_meta
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.SourceApplicationEntityTitle, meta.SendingApplicationEntityTitle = canaries.text(), canaries.text()
    meta.ReceivingApplicationEntityTitle, meta.ImplementationVersionName = canaries.text(), canaries.text()
    meta.PrivateInformationCreatorUID = canaries.uid()
    meta.PrivateInformation = canaries.text().encode() + b"\0"
    dataset.preamble = canaries.text().encode().ljust(128, b"\0")


def planted_item(canaries: Canaries) -> pydicom.Dataset:
    item = pydicom.Dataset()
    _fill(item, canaries)
    return item


def _fill(item: pydicom.Dataset, canaries: Canaries) -> None:
    for keyword in ITEM:
        setattr(item, keyword, canaries.of(dictionary_VR(keyword)))


def _items(dataset: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield item
                yield from _items(item)


def contents(folder: Path) -> Iterator[bytes]:
    """Names and contents of all that is in a folder, a file at a time."""
    for path in sorted(folder.rglob("*")):
        yield bytes(path.relative_to(folder)) + b"\n" + (bytes(path.readlink()) if path.is_symlink() else b"")
        if path.is_file():
            yield path.read_bytes()
