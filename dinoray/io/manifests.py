"""Tables of images (CSV or Parquet) -> Items, in the order of their rows: manifests, and LoadData (loaddata.py).

Columns of a manifest (in any case): `uri` (or `path`, `image`, `file`), or one `uri_<channel>` for each
channel; optional `item_id` (or `id`); every other column becomes a string `Metadata_*`. Relative paths start
at the table's folder. Rows are streamed; the named files are stat'ed in threads.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from dinoray.config import secret_in_url, without_secrets
from dinoray.errors import BadRequest, ItemError
from dinoray.io.grouping import make_item, relative_to
from dinoray.io.items import FileRef, Item
from dinoray.io.loaddata import LoadData, is_load_data
from dinoray.io.ome_zarr_pixels import UNREAD, field_ref
from dinoray.io.storage_errors import listing_errors
from dinoray.io.stores import is_local, local_path
from dinoray.io.table_paths import from_cell, inside
from dinoray.io.text_tables import text_rows
from dinoray.io.walk import ZARR, LocalTree, RemoteTree, count, is_image_name

FILE_COLUMNS = ("uri", "path", "image", "file")
ID_COLUMNS = ("item_id", "id")
_STANDARD = {name.lower(): f"Metadata_{name}" for name in ("Source", "Batch", "Plate", "Well", "Site")}
_THREADS = 16
_CHUNK = 16


def is_manifest(path: str) -> bool:
    """Whether a source is a table of images, by its extension."""
    return path.lower().endswith((".csv", ".parquet"))


def manifest_items(uri: str, root: str, ignored: dict[str, int]) -> Iterator[Item]:
    """The items of a manifest or LoadData table at `uri`; what it says beside is counted in `ignored`.

    Ids default to the path of the (first) file below `root`. A row without a file has the problem `missing`,
    one that lacks a channel `channel_count`, one that names what is no usable path `bad_path`. Raises
    BadRequest when the table cannot be read, lacks the needed columns, or holds columns that are no values.
    """
    folder, number = posixpath.dirname(uri), 0
    stat = _Stat()
    columns: _Manifest | LoadData | None = None
    with ThreadPoolExecutor(_THREADS) as pool:
        for names, rows in text_rows(uri):
            if columns is None:
                columns = LoadData(names, uri) if _is_load_data(names) else _Manifest(names, uri)
                for kind, found in columns.passed_over.items():
                    count(ignored, f"{kind} of {posixpath.basename(uri)}", found)
            wanted = [_files(row, columns, folder) for row in rows]
            named = [u for uris in wanted if not isinstance(uris, ItemError) for u in uris if u]
            chunks = [named[i:i + _CHUNK] for i in range(0, len(named), _CHUNK)]
            refs = itertools.chain.from_iterable(pool.map(stat, chunks))
            for row, uris in zip(rows, wanted, strict=True):
                number += 1
                files: list[FileRef | None] | ItemError = \
                    uris if isinstance(uris, ItemError) else [next(refs) if u else None for u in uris]
                yield _item(row, files, columns, root, f"{relative_to(root, uri)}#row{number}")


def _is_load_data(names: list[str]) -> bool:
    """A column of a manifest's own (`uri`) decides against LoadData."""
    lower = [name.strip().lower() for name in names]
    return is_load_data(names) and not any(n in FILE_COLUMNS or n.startswith("uri_") for n in lower)


def _files(row: tuple[str | None, ...], columns: _Manifest | LoadData, folder: str) -> list[str | None] | ItemError:
    try:
        return columns.files(row, folder)
    except ItemError as error:
        return error


class _Manifest:
    """Which column is what, by position."""

    def __init__(self, names: list[str], uri: str):
        lower = [name.strip().lower() for name in names]
        found = f"found columns: {', '.join(names)}"
        if len(set(lower)) < len(lower):
            raise BadRequest("two columns of a manifest have one name", where=uri, todo=found)
        single = next((lower.index(name) for name in FILE_COLUMNS if name in lower), None)
        per_channel = [i for i, name in enumerate(lower) if name.startswith("uri_") and len(name) > 4]
        if (single is None) == (not per_channel):
            raise BadRequest(
                "a manifest needs one column of files: uri, path, image or file; or one uri_<channel> for "
                f"each channel{', not both' if per_channel else ''}", where=uri, todo=found)
        self._files = per_channel or [single]
        self.channels = tuple(names[i].strip()[4:] for i in per_channel)
        self._item_id = next((lower.index(name) for name in ID_COLUMNS if name in lower), None)
        taken = {*self._files, self._item_id}
        self.metadata = {i: _metadata_name(name) for i, name in enumerate(names) if i not in taken}
        if len(set(self.metadata.values())) < len(self.metadata):
            raise BadRequest("two columns mean the same metadata", where=uri, todo=found)
        self.passed_over: dict[str, int] = {}

    def files(self, row: tuple[str | None, ...], folder: str) -> list[str | None]:
        """The path or URL of each file, None for an empty cell. Raises ItemError `bad_path`."""
        cells = [(row[i] or "").strip() for i in self._files]
        return [from_cell(inside(cell), folder) if cell else None for cell in cells]

    def item_id(self, row: tuple[str | None, ...]) -> str:
        """The row's own id, or "" when there is none."""
        return (row[self._item_id] or "").strip() if self._item_id is not None else ""


def _metadata_name(name: str) -> str:
    bare = name.strip()
    bare = bare[9:] if bare.lower().startswith("metadata_") else bare
    return _STANDARD.get(bare.lower(), f"Metadata_{bare}")


class _Stat:
    """URIs -> FileRefs, with one tree per protocol; missing files have size -1."""

    def __init__(self):
        self._trees: dict[str, RemoteTree] = {}

    def __call__(self, uris: list[str]) -> list[FileRef]:
        return [self._stat(uri) for uri in uris]

    def _stat(self, uri: str) -> FileRef:
        if "\0" in uri:
            return FileRef(uri, -1, "missing")
        secret = secret_in_url(uri)
        if secret:  # it would stand in every row
            raise BadRequest(f"a URL in the manifest holds {secret}", where=without_secrets(uri),
                             todo="name the files without it, and give credentials through the environment")
        with listing_errors(uri):
            if ZARR in uri.lower() and not is_image_name(uri):
                try:
                    return field_ref(str(local_path(uri)) if is_local(uri) else uri.rstrip("/"))
                except ItemError:
                    return FileRef(uri, -1, UNREAD)  # reading it tells the reason
            if is_local(uri):
                return LocalTree().ref(str(local_path(uri)))
            protocol = uri.split("://", 1)[0]
            tree = self._trees.get(protocol)
            if tree is None:
                tree = self._trees[protocol] = RemoteTree(uri)
            return tree.ref(tree.fs._strip_protocol(uri))


def _item(row: tuple[str | None, ...], files: list[FileRef | None] | ItemError, columns: _Manifest | LoadData, root: str,
          fallback_id: str) -> Item:
    channels, problem = columns.channels, None
    if isinstance(files, ItemError):
        problem, present = f"{files.reason}: {files.what}", (FileRef("", -1, "missing"),)
    else:
        present = tuple(file for file in files if file is not None)
        if not present:
            problem, present = "missing: the row names no file", (FileRef("", -1, "missing"),)
        elif len(present) < len(files):
            missing = [c for c, file in zip(channels, files, strict=True) if file is None]
            channels = tuple(c for c, file in zip(channels, files, strict=True) if file is not None)
            problem = f"channel_count: missing {', '.join(missing)}"
    item_id = columns.item_id(row) or relative_to(root, present[0].uri) or fallback_id
    metadata = {name: row[i] or None for i, name in columns.metadata.items()}
    return make_item(item_id, present, root, channels=channels, metadata=metadata, problem=problem)
