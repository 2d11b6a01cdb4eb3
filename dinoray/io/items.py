"""Item and FileRef: what a plan is made of. An item is one image (a field) in one or several files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

_OBJECT = np.dtype([("id", "<i8"), ("y", "<f8"), ("x", "<f8")])

_SURROGATE = re.compile("[\ud800-\udfff]")


def storable(text: str) -> str:
    """The text with halves of characters as escapes: JSON and file names may hold them, UTF-8 cannot."""
    return _SURROGATE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


@dataclass(frozen=True, slots=True)
class FileRef:
    """One input file as the listing saw it; pixels are never read to make one.

    `version` is the ETag where the store has one, else the modification time (ns for local files).
    A file that was named but does not exist has size -1 and version "missing".
    """

    uri: str
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of an image by their centroids, sorted by id. `packed`: 24 bytes each, little-endian int64 id,
    float64 y, float64 x, in px (the centre of the first pixel is 0) or µm (the same, times the pixel size)."""

    packed: bytes = field(repr=False)
    unit: Literal["px", "um"] = "px"

    @classmethod
    def pack(cls, ids: np.ndarray, y: np.ndarray, x: np.ndarray, unit: Literal["px", "um"] = "px") -> Objects:
        """From arrays of equal length."""
        table = np.empty(len(ids), _OBJECT)
        table["id"], table["y"], table["x"] = ids, y, x
        return cls(table[np.argsort(table["id"], kind="stable")].tobytes(), unit)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int64, y float64, x float64)."""
        table = np.frombuffer(self.packed, _OBJECT)
        return table["id"].astype(np.int64), table["y"].astype(np.float64), table["x"].astype(np.float64)

    def __len__(self) -> int:
        return len(self.packed) // _OBJECT.itemsize


@dataclass(frozen=True, slots=True)
class Item:
    """One image of the collection: the atom of quarantine and of `item_id`.

    `channels` names the channel of each file when the image has one file per channel, else it is empty.
    `group` is what intensity scaling is shared over: the plate where known, else the folder.
    `problem` is a reason class found while listing (`duplicate_id`); such an item is quarantined unread.
    `labels` (a label image) or `objects` say where the cells are, in jobs that look at single cells.
    """

    item_id: str
    files: tuple[FileRef, ...]
    channels: tuple[str, ...] = ()
    group: str = ""
    plate: str | None = None
    metadata: dict[str, str | None] = field(default_factory=dict)
    problem: str | None = None
    labels: FileRef | None = None
    objects: Objects | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files by the listing (missing files count as 0)."""
        return sum(max(0, f.size) for f in (*self.files, *([self.labels] if self.labels else [])))
