"""Files of a folder -> Items: one per image, with its channels, its metadata and an id that can be stored."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b

from dinoray.io import plates
from dinoray.io.items import FileRef, Item, storable
from dinoray.io.plate_folders import plate_folder
from dinoray.io.walk import Entry, count, is_image_name

_PLATE_TYPE = "AssayPlate_"
"""What CellVoyager puts before the names when no plate was named: the kind of plate, the same for all."""
MAX_ID = 1024
"""Characters of an item id."""
_BAD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, among them those that make a name look like another one (right-to-left overrides)."""


def relative_to(root: str, uri: str) -> str:
    """The POSIX path of a file below the root; its whole URI when it lies elsewhere."""
    prefix = root if root.endswith("/") else root + "/"
    return uri[len(prefix):] if root and uri.startswith(prefix) else uri


def group_of(metadata: dict[str, str | None], path: str) -> str:
    """What intensity scaling is shared over: [source/][batch/]plate where known, else the file's folder."""
    if metadata.get("Metadata_Plate"):
        names = (metadata.get(f"Metadata_{name}") for name in ("Source", "Batch", "Plate"))
        return "/".join(name for name in names if name)
    return posixpath.dirname(path) or "."


def make_item(
    item_id: str,
    files: tuple[FileRef, ...],
    root: str,
    *,
    channels: tuple[str, ...] = (),
    metadata: dict[str, str | None] | None = None,
    problem: str | None = None,
    group: str | None = None,
) -> Item:
    """An Item with its group (`group_of` unless given) and plate; an id or path that cannot be stored becomes
    the problem `bad_id`.

    Bad characters (control characters, names that are not UTF-8) are written as escapes, so that the
    item can be reported; ids over MAX_ID characters are cut and end in a hash.
    """
    metadata = {storable(key): value and storable(value) for key, value in (metadata or {}).items()}
    channels = tuple(storable(channel) for channel in channels)
    group = storable(group_of(metadata, relative_to(root, files[0].uri)) if group is None else group)
    if any("::" in f.uri and "://" in f.uri for f in files):
        problem = "bad_path: a URL with '::', which would be read as a chain of file systems"
    if not item_id or len(item_id) > MAX_ID or _BAD.search(item_id) or any(_BAD.search(f.uri) for f in files):
        problem = f"bad_id: {len(item_id)} characters, or some that are not printable"
        digest = blake2b(item_id.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        item_id = _printable(item_id)
        item_id = item_id if len(item_id) <= MAX_ID else f"{item_id[:MAX_ID - 20]}...{digest}"
        files = tuple(FileRef(_printable(f.uri), f.size, f.version) for f in files)
        group = _printable(group)
        metadata = {key: value and _printable(value) for key, value in metadata.items()}
    return Item(item_id, files, channels, group, metadata.get("Metadata_Plate"), metadata, problem)


def _printable(text: str) -> str:
    return _BAD.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def make_items(
    files: list[Entry], root: str, pattern: plates.Pattern | None, auto: bool, ignored: dict[str, int]
) -> Iterator[Item]:
    """Items of a folder's files (sorted by name), sorted by id.

    With a pattern, one item per key with its files in the natural order of the channels; with `auto` the
    pattern is the shipped one that all of them match, if any. Files that the pattern knows to be
    thumbnails are counted in `ignored`.
    """
    explicit = pattern is not None
    if auto:
        pattern = plates.detect([entry.name for entry in files if is_image_name(entry.name)])
    if pattern is None:
        for entry in files:
            yield make_item(relative_to(root, entry.file.uri), (entry.file,), root)
        return
    items: list[Item] = []
    images: dict[str, list[tuple[plates.ParsedName, FileRef]]] = {}
    for entry in files:
        path = relative_to(root, entry.file.uri)
        if pattern.ignore and pattern.ignore.fullmatch(entry.name):
            count(ignored, pattern.ignored_as)
            continue
        parsed = plates.parse(pattern, path)
        if parsed is not None:
            images.setdefault(parsed.key_without_channel, []).append((parsed, entry.file))
        else:  # with `auto`: a file of another kind that was named one by one
            problem = f"pattern_mismatch: the name does not match {pattern.name}" if explicit else None
            items.append(make_item(path, (entry.file,), root, problem=problem))
    plates_channels: dict[str, set[str]] = {}
    told = {key: _metadata(files, root, pattern) for key, files in images.items()}
    for key, found in images.items():
        channels = plates_channels.setdefault(told[key][1], set())
        channels |= {parsed.channel for parsed, _ in found}
    for key, found in images.items():
        found.sort(key=lambda pair: (natural(pair[0].channel), pair[1].uri))
        channels = tuple(parsed.channel for parsed, _ in found)
        metadata, group = told[key]
        items.append(make_item(key, tuple(file for _, file in found), root, channels=channels, metadata=metadata,
                               group=group, problem=_channel_problem(channels, plates_channels[group])))
    yield from sorted(items, key=lambda item: item.item_id)


def _channel_problem(channels: tuple[str, ...], expected: set[str]) -> str | None:
    twice = [channel for channel, n in Counter(channels).items() if n > 1]
    if twice:
        return f"duplicate_channel: more than one file of {', '.join(twice)}"
    missing = sorted(expected - set(channels), key=natural)
    return f"channel_count: missing {', '.join(missing)}" if missing else None


def _metadata(
    files: list[tuple[plates.ParsedName, FileRef]], root: str, pattern: plates.Pattern
) -> tuple[dict[str, str | None], str]:
    """Metadata: what the names of all channels agree on, and what the folders tell; and the scaling group.

    Two plates of one name in different folders are different plates: the group is the plate's folder below
    the root. Only where a pattern of the user's says the plate does the name alone count.
    """
    first = files[0][0].metadata
    metadata: dict[str, str | None] = {
        key: value for key, value in first.items() if all(p.metadata.get(key) == value for p, _ in files)
    }
    uri = files[0][1].uri
    place = plate_folder(posixpath.dirname(uri), metadata.get("Metadata_Well"))
    plate = metadata.pop("Metadata_Plate", None)
    by_user = bool(plate) and pattern.name not in plates.SHIPPED
    if plate and not by_user and plate.startswith(_PLATE_TYPE):
        metadata["Metadata_PlateType"], plate = plate, None
    if by_user:
        metadata = {"Metadata_Plate": plate} | metadata
        return metadata, group_of(metadata, relative_to(root, uri))
    told: dict[str, str | None] = {**place.metadata, **metadata}
    plate = plate or place.plate
    metadata = {"Metadata_Plate": plate} | told if plate else told
    prefix = root if root.endswith("/") else root + "/"
    below = place.path[len(prefix):] if root and place.path.startswith(prefix) else ""
    if metadata.get("Metadata_Source") or metadata.get("Metadata_Batch") or not plate or not below:
        return metadata, group_of(metadata, relative_to(root, uri))
    same = posixpath.basename(below) in (plate, place.metadata.get("Metadata_PlateFolder"))
    return metadata, below if same else f"{below}/{plate}"


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key: ch2 before ch10."""
    parts = (part for part in re.split(r"([0-9]+)", text) if part)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts]
