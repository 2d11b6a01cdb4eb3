"""Names of objects made from names that others gave: plates and item ids as parts of keys.

Injective, so that two plates or items never share an object, and usable on every file system and object store.
"""

from __future__ import annotations

import hashlib
from urllib.parse import quote

from dinoray.io.stores import safe_join

MAX_NAME = 200
"""Characters of one part of a key; file systems allow 255 bytes."""
_SUFFIXES = (".tif", ".zarr")


def encoded(name: str) -> str:
    """One part of a key: percent-encoded, a leading `.` or `_` too (readers of Parquet folders pass over such names);
    names that file systems would refuse end in a hash. An empty name is `%`, which no other name becomes."""
    text = quote(name, safe="")
    if not text:
        return "%"
    if text[0] in "._":
        text = f"%{ord(text[0]):02X}{text[1:]}"
    if len(text) > MAX_NAME:
        text = f"{text[:MAX_NAME - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return text


def plate_folder(plate: str | None) -> str:
    """The folder of a plate with a slash, or nothing."""
    return safe_join(encoded(plate)) + "/" if plate else ""


def item_path(item_id: str) -> str:
    """An item id as a path of encoded parts, to which a suffix is added (`.tif`, `.zarr`). A folder never ends in such a
    suffix: the mask of `a` and the folder of `a.tif/b` would be one name."""
    *folders, name = item_id.split("/")
    parts = [encoded(folder) for folder in folders]
    for i, part in enumerate(parts):
        if part.lower().endswith(_SUFFIXES):
            stem, _, suffix = part.rpartition(".")
            parts[i] = f"{stem}%2E{suffix}"
    return safe_join(*parts, encoded(name))
