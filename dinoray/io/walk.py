"""Folders, globs and files of one file system -> files, folder by folder, in one fixed order.

The order is that of the code points of the names: within a folder its own files first, then its
sub-folders; it depends neither on the file system nor on the locale. Memory holds one folder's files.
Hidden files and folders, `_dinoray`, folders that are an output of dinoray, and N5 arrays are skipped; a
`.zarr` folder is listed like a file. A link to a folder is followed, unless it leads to or above what is listed already.
"""

from __future__ import annotations

import datetime
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from fsspec.utils import glob_translate

from dinoray.io.items import FileRef
from dinoray.io.storage_errors import classify
from dinoray.io.stores import filesystem, on_inputs

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_ARRAYS = (".zarr", ".n5")
ZARR = ".zarr"
_MAGIC = re.compile(r"[*?\[]")


def is_image_name(name: str) -> bool:
    """Whether the extension (in any case) is one of IMAGE_SUFFIXES."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def has_magic(path: str) -> bool:
    """Whether a path is a glob."""
    return _MAGIC.search(path) is not None


@dataclass(frozen=True)
class Entry:
    """A file or folder as the file system lists it; `path` in the file system's own form."""

    name: str
    path: str
    is_folder: bool
    file: FileRef | None = None
    link: bool = False


@dataclass
class Matcher:
    """Which files below `base` are wanted: all images (no glob), or what the glob matches.

    A glob that matches a folder stands for all images in it, as a shell's expansion would.
    """

    base: str
    glob: str = ""
    _regex: re.Pattern[str] = field(init=False, repr=False)
    _parts: list[re.Pattern[str]] = field(init=False, repr=False)

    def __post_init__(self):
        self._regex = re.compile(glob_translate(self.glob))
        parts = self.glob.split("/")
        self._deep = "**" in parts
        fixed = parts[:parts.index("**")] if self._deep else parts
        self._parts = [re.compile(glob_translate(part)) for part in fixed]
        # `*.dat` asks for files that are not named like images; `*` does not
        suffix = os.path.splitext(parts[-1])[1]
        self._any_suffix = bool(suffix) and not has_magic(suffix)

    def _below(self, path: str) -> str | None:
        if path == self.base:
            return ""
        base = self.base if self.base.endswith("/") or not self.base else self.base + "/"
        return path[len(base):] if path.startswith(base) else None

    def _matches_folder(self, below: str) -> bool:
        names = below.split("/")
        return any(self._regex.fullmatch("/".join(names[:n])) for n in range(1, len(names) + 1))

    def wants_folder(self, path: str) -> bool:
        """Whether a folder at or below the base may hold wanted files."""
        below = self._below(path)
        if below is None:
            return False
        if not self.glob or not below or self._matches_folder(below):
            return True
        names = below.split("/")
        if len(names) >= len(self._parts) and not self._deep:
            return False
        return all(regex.fullmatch(name) for regex, name in zip(self._parts, names, strict=False))

    def wants_array(self, path: str) -> bool:
        """Whether a `.zarr` folder is wanted: the glob matches it or a folder above."""
        below = self._below(path)
        return bool(below) and (not self.glob or self._matches_folder(below))

    def wants_file(self, path: str) -> bool:
        """Whether the file is wanted."""
        below = self._below(path)
        if not below:
            return False
        if not self.glob:
            return is_image_name(path)
        if self._regex.fullmatch(below):
            return self._any_suffix or is_image_name(path)
        return "/" in below and self._matches_folder(below.rpartition("/")[0]) and is_image_name(path)


class LocalTree:
    """Listing of local folders: uri = absolute path, version = mtime in ns."""

    def url(self, path: str) -> str:
        """The path itself."""
        return path

    def list(self, folder: str) -> list[Entry]:
        """Entries of a folder sorted by name. Raises OSError when it cannot be listed."""
        found = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_folder(entry):
                    found.append(Entry(entry.name, entry.path, True, link=entry.is_symlink()))
                elif is_image_name(entry.name):
                    found.append(Entry(entry.name, entry.path, False, self.ref(entry.path)))
                else:  # stat'ed only when a glob wants it
                    found.append(Entry(entry.name, entry.path, False))
        return sorted(found, key=lambda entry: entry.name)

    def ref(self, path: str) -> FileRef:
        """The FileRef of a path; size -1 when it does not exist (or is a dangling link)."""
        try:
            info = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return FileRef(path, -1, "missing")
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                return FileRef(path, -1, "missing")
            raise
        if not stat.S_ISREG(info.st_mode):  # a FIFO would hang its reader
            return FileRef(path, -1, "missing")
        return FileRef(path, info.st_size, str(info.st_mtime_ns))

    def follow(self, link: str, start: str, linked: list[str]) -> bool:
        """Whether to go through a link to a folder: not into or above what this walk lists already."""
        linked += [] if linked else [_with_slash(os.path.realpath(start))]
        target = _with_slash(os.path.realpath(link))
        if any(target.startswith(top) or top.startswith(target) for top in linked):
            return False
        linked.append(target)
        return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # links that lead to each other
            return False
        raise


def _with_slash(path: str) -> str:
    return path.rstrip("/") + "/"


class RemoteTree:
    """Listing of an fsspec file system: uri = full URL, version = ETag where there is one."""

    def __init__(self, url: str):
        self.fs, self.path = filesystem(url)

    def url(self, path: str) -> str:
        """The full URL of a path of this file system."""
        return self.fs.unstrip_protocol(path)

    def list(self, folder: str) -> list[Entry]:
        """Entries of a folder sorted by name."""
        found = []
        for info in on_inputs(self.url(folder), lambda fs: fs.ls(folder, detail=True)):
            path = info["name"].rstrip("/")
            if path == folder.rstrip("/") or info["name"].endswith("/") and info["type"] != "directory":
                continue  # the marker object of a "folder"
            name = path.rpartition("/")[2]
            is_folder = info["type"] == "directory"
            found.append(Entry(name, path, is_folder, None if is_folder else self.to_ref(path, info)))
        return sorted(found, key=lambda entry: entry.name)

    def ref(self, path: str) -> FileRef:
        """The FileRef of a path; size -1 when there is no such object."""
        try:
            info = on_inputs(self.url(path), lambda fs: fs.info(path))
        except FileNotFoundError as error:
            if classify(error) != "missing":  # fsspec's word for whatever a web server says; also: no such bucket
                raise
            return FileRef(self.fs.unstrip_protocol(path), -1, "missing")
        return self.to_ref(path, info)

    def named(self) -> FileRef:
        """The FileRef of the URL that this tree was made of."""
        return self.ref(self.path)

    def to_ref(self, path: str, info: dict) -> FileRef:
        """A FileRef from what fsspec says about an object."""
        version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") \
            or info.get("updated") or info.get("created")
        if version is None:
            version = self.fs.ukey(path)
        if isinstance(version, float):  # the memory file system says it so when it lists, else as a datetime
            version = datetime.datetime.fromtimestamp(version, datetime.UTC)
        text = version.isoformat() if hasattr(version, "isoformat") else str(version)
        size = info.get("size")
        return FileRef(self.fs.unstrip_protocol(path), -1 if size is None else int(size), text.strip('"'))

    def follow(self, link: str, start: str, linked: list[str]) -> bool:
        """Object stores have no links."""
        return False


def walk(
    tree: LocalTree | RemoteTree,
    start: str,
    matchers: list[Matcher],
    *,
    other_starts: frozenset[str] = frozenset(),
    named: dict[str, set[str]] | None = None,
    ignored: dict[str, int],
) -> Iterator[tuple[str, list[Entry]]]:
    """(folder, its wanted files sorted by name) for `start` and everything below it.

    A `.zarr` folder that is wanted is one of the entries (`is_folder`), and never looked into. Folders in
    `other_starts` are left to a walk of their own. `named` are files wanted whatever their
    extension, {folder: names}; what is met is taken out. What was passed over is counted in `ignored`, by
    extension. Raises OSError when a folder cannot be listed.
    """
    pending: list[str] = [start]
    linked: list[str] = []
    while pending:
        folder = pending.pop()
        entries = tree.list(folder)
        if folder != start and any(entry.is_folder and entry.name == "_dinoray" for entry in entries):
            continue
        names = named.pop(folder, set()) if named else set()
        files, folders = [], []
        for entry in entries:
            if not entry.is_folder and entry.name in names:
                files.append(entry)
            elif entry.name.startswith(".") or entry.name == "_dinoray":
                if not entry.is_folder and is_image_name(entry.name):  # ._x.tif: macOS puts one beside each file
                    count(ignored, f"hidden .{entry.name.rpartition('.')[2].lower()}")
            elif entry.is_folder:
                if entry.name.lower().endswith(ZARR) and any(m.wants_array(entry.path) for m in matchers):
                    files.append(entry)
                elif entry.name.lower().endswith(_ARRAYS):
                    count(ignored, os.path.splitext(entry.name)[1].lower() + " folder")
                elif entry.link and not tree.follow(entry.path, start, linked):
                    count(ignored, "link to a folder in the listing")
                elif entry.path not in other_starts and any(m.wants_folder(entry.path) for m in matchers):
                    folders.append(entry.path)
            elif any(matcher.wants_file(entry.path) for matcher in matchers):
                files.append(entry)
            else:
                count(ignored, os.path.splitext(entry.name)[1].lower() or "no extension")
        if files:
            yield folder, [f if f.file or f.is_folder else replace(f, file=tree.ref(f.path)) for f in files]
        pending += reversed(folders)


def count(ignored: dict[str, int], kind: str, number: int = 1) -> None:
    """So many more files of this kind were passed over."""
    if number:
        ignored[kind] = ignored.get(kind, 0) + number
