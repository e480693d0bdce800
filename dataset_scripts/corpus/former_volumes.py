"""The volumes that stand in a corpus before it is extended: they tell a copy, and a slice that comes too late."""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets

from .reader import map_file, read_index

SHARD = "data-{:05d}.arrow"
LATE = "of a volume that is in the corpus, for which it comes too late; a copy, or build the corpus anew"
IN_CORPUS = "a copy of an image in the corpus; one is enough"


class FormerVolumes:
    """The volumes in the first `shards` shards of a folder, by volume_id; read when they are first asked for."""

    def __init__(self, folder: Path, shards: int):
        self.paths = [path for path in (folder / SHARD.format(shard) for shard in range(shards)) if path.exists()]

    @cached_property
    def places(self) -> dict[str, tuple[Path, int, int]]:
        """volume_id -> shard, first row, row behind the last."""
        found: dict[str, tuple[Path, int, int]] = {}
        for path in self.paths:
            shard = read_index(map_file(path))
            bounds = pairwise([*shard.starts.tolist(), len(shard.slice_indices)])
            ids = shard.volumes.column("volume_id").to_pylist()
            found |= {volume_id: (path, *rows) for volume_id, rows in zip(ids, bounds, strict=True)}
        return found

    def digest(self, volume_id: str) -> str:
        path, start, stop = self.places[volume_id]
        rows = datasets.Dataset.from_file(str(path)).cast_column("image", datasets.Image(decode=False))
        return digest_of(rows.select_columns("image").select(range(start, stop)))


def digest_of(rows: Iterable[dict[str, Any]]) -> str:
    """Return the SHA-256 of the images of a volume, as a corpus stores them."""
    return hashlib.sha256(b"".join(row["image"]["bytes"] for row in rows)).hexdigest()
