"""Volumes stored as one file a slice: DBT of older vendors, in CT or mammography objects, and CT and MR themselves."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .dicom import Mammogram, instance_uid, keyed_hash, read_mammogram, shared_fields
from .dicom_file import boundary, check_header, open_header
from .dicom_header import number, positions_mm


class Instance(NamedTuple):
    """A file's place among others: keyed hashes, and what orders it."""

    sop_instance: str
    volume_id: str  # equal to sop_instance, or shared by the files of a volume
    num_slices: int  # in the file
    slice_position_mm: float | None
    instance_number: float | None

    @property
    def is_slice(self) -> bool:
        return self.volume_id != self.sop_instance


def read_instance(source: Any, hash_key: bytes, allow_for_processing: bool = False) -> Instance:
    """From the header alone. Raises ImageRefused for all that the header is enough to refuse."""
    opened = open_header(source)
    check_header(opened, allow_for_processing)
    frames = opened.num_frames
    with boundary(opened, "the header cannot be interpreted"):
        positions = positions_mm(opened.header, 1) if frames == 1 else None
        return Instance(
            sop_instance=keyed_hash(instance_uid(opened), hash_key),
            volume_id=shared_fields(opened, frames, positions, hash_key)["volume_id"],
            num_slices=frames,
            slice_position_mm=None if positions is None else float(positions[0]),
            instance_number=number(opened.header, "InstanceNumber"),
        )


def order_of_files(instances: Sequence[Instance]) -> list[int]:
    """Places of the files of one volume in order of position, else of InstanceNumber, else as they come."""
    for name in ("slice_position_mm", "instance_number"):
        values = [getattr(each, name) for each in instances]
        if None not in values and len(set(values)) > 1:
            return np.argsort(values, kind="stable").tolist()
    return list(range(len(instances)))


def iter_series(sources: Sequence[Any], indices: Sequence[int] | None = None, **options: Any) -> Iterator[Mammogram]:
    """The slices of a volume of several files, given in order; options as in `read_mammogram`."""
    for index in range(len(sources)) if indices is None else indices:
        mammogram = read_mammogram(sources[index], **options)
        yield replace(mammogram, slice_index=index, num_slices=len(sources))
