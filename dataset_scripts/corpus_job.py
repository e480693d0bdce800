"""One build of a corpus: what all its tasks know, and its two folders.

`output` is the corpus. `work`, beside it and for its owner's eyes alone, holds what names the files of the archive: the
listing, the headers found, the plan, what was refused, the engine's logs. It is what a stopped build goes on from.
"""

import json
import logging
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modeling_mammodino.dicom import keyed_hash
from modeling_mammodino.image_processing_mammodino import MammoDinoImageProcessor

logger = logging.getLogger(__name__)

HASH_KEY_VARIABLE = "MAMMODINO_HASH_KEY"
SHORT_KEY_BYTES = 16
README = """\
This folder names files of an archive, and so perhaps patients: do not share it. From it a stopped build of the corpus
beside it goes on. refused.csv says which files were left out, and why. Once the corpus is complete, nothing else in
here is needed.
"""


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        fit: (height, width) in pixels that pictures are fitted into, never enlarged.
        image_processor: settings of the MammoDinoImageProcessor.
        hash_key_file: holds the key of the hashes; else it is in $MAMMODINO_HASH_KEY. The key itself stands nowhere.
        bcs_dbt_paths: BCS-DBT's BCS-DBT-file-paths-*.csv, which correct wrong headers.
        tasks: in which the work is shared out; fixed for the life of a build.
    """

    output: str
    sources: tuple[str, ...]
    fit: tuple[int, int]
    image_processor: dict[str, Any]
    collection: str
    hash_key_file: str | None
    bcs_dbt_paths: tuple[str, ...]
    rows_per_shard: int
    tasks: int

    @property
    def work(self) -> Path:
        return Path(f"{self.output}.private")

    @property
    def listing(self) -> Path:
        return self.work / "files.jsonl"

    @property
    def plan(self) -> Path:
        """Written last: tells that the shards' own plans are there."""
        return self.work / "plan.json"

    def headers(self, task: int) -> Path:
        return self.work / "headers" / f"{task:05d}.jsonl"

    def shard_plan(self, shard: int) -> Path:
        return self.work / "plan" / f"{shard:05d}.jsonl"

    def shard_record(self, shard: int) -> Path:
        return self.work / "shards" / f"{shard:05d}.json"

    @property
    def hash_key(self) -> bytes:
        return read_hash_key(self.hash_key_file)

    def processor(self) -> MammoDinoImageProcessor:
        return MammoDinoImageProcessor(**self.image_processor)

    def settings(self) -> dict[str, Any]:
        """What shapes the rows. One corpus has one set of these."""
        kept = ("sources", "fit", "image_processor", "collection", "bcs_dbt_paths")
        settings = {name: value for name, value in asdict(self).items() if name in kept}
        settings["hash_key_check"] = keyed_hash("corpus", self.hash_key)  # tells two keys apart, reveals neither
        return json.loads(json.dumps(settings))


def read_hash_key(path: str | Path | None) -> bytes:
    """The key of the patient hashes, from a file or the environment; empty where there is none."""
    return Path(path).read_bytes().strip() if path else os.environ.get(HASH_KEY_VARIABLE, "").encode()


def provide_hash_key(path: str | Path | None) -> None:
    """Sees to it that there is a key, for this process and its children; a made-up one is said."""
    key = read_hash_key(path)
    if key and len(key) < SHORT_KEY_BYTES:
        logger.warning(
            "the key of the patient hashes is short (%d bytes): it can be guessed, give 16 or more", len(key)
        )
    if not key and path:
        raise ValueError(f"--hash_key_file {path}: the file is empty; write a secret of 16 bytes or more into it")
    if not key:
        logger.warning(
            "no key for the patient hashes (--hash_key_file or $%s): a random one is used, so this corpus can neither "
            "be continued after a stop nor linked to another",
            HASH_KEY_VARIABLE,
        )
        os.environ[HASH_KEY_VARIABLE] = secrets.token_hex(16)


class Notes(logging.Handler):
    """What the reader guesses and doubts, file by file into a private log, and by kind as a count.

    Takes the place of the console in a task: a million files may have as many notes.
    """

    def __init__(self, path: Path):
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a")

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._stream.write(message + "\n")
        name = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        self.counts[re.sub(r"\d[\d.]*", "#", message.removeprefix(f"{name}: "))] += 1

    def __enter__(self) -> "Notes":
        package = logging.getLogger("modeling_mammodino")
        self._before = package.handlers[:], package.propagate
        package.handlers[:], package.propagate = [self], False
        return self

    def __exit__(self, *_: object) -> None:
        package = logging.getLogger("modeling_mammodino")
        package.handlers[:], package.propagate = self._before
        self._stream.close()


def write_json(path: Path, content: Any) -> None:
    write_lines(path, [json.dumps(content, indent=2)])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as stream:
            stream.writelines(f"{line}\n" for line in lines)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_lines(path: Path) -> Iterator[Any]:
    """Of a JSON lines file."""
    with path.open() as stream:
        for line in stream:
            yield json.loads(line)
