"""Item and FileRef: what a plan is made of. An item is one image (a field) in one or several files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

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
class Item:
    """One image of the collection: the atom of quarantine and of `item_id`.

    `channels` names the channel of each file when the image has one file per channel, else it is empty.
    `group` is what intensity scaling is shared over: the plate where known, else the folder.
    `problem` is a reason class found while listing (`duplicate_id`); such an item is quarantined unread.
    """

    item_id: str
    files: tuple[FileRef, ...]
    channels: tuple[str, ...] = ()
    group: str = ""
    plate: str | None = None
    metadata: dict[str, str | None] = field(default_factory=dict)
    problem: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files by the listing (missing files count as 0)."""
        return sum(max(0, f.size) for f in self.files)
