"""The chunk objects of a volume's level: its identity by metadata and listing, and their bytes, whole or in part.

Up to MAX_LISTED chunks are listed when the volume is opened, and a chunk that is another one when it is read is
`changed`. A chunk that is not stored is the fill value, as Zarr and N5 have it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from hashlib import blake2b

from dinoray.errors import BadRequest, ItemError
from dinoray.io.decoded import Limits
from dinoray.io.items import FileRef
from dinoray.io.reading import read_file
from dinoray.io.remote_store import on_inputs
from dinoray.io.retries import retried
from dinoray.io.storage_errors import TruncatedBody, storage_errors
from dinoray.io.stores import is_local, local_path
from dinoray.io.walk import LocalTree, RemoteTree
from dinoray.io.zarr_objects import MAX_OBJECTS, list_objects
from dinoray.wording import plural

MAX_LISTED = MAX_OBJECTS
"""Chunks of a level; above, they are not listed."""
_MARK = "volume:"


def ref_of(uri: str) -> FileRef:
    """The FileRef of one file or object now. Raises OSError of storage as it comes."""
    return LocalTree().ref(str(local_path(uri))) if is_local(uri) else RemoteTree(uri).named()


def digest_ref(uri: str, num_bytes: int, texts: Iterable[bytes]) -> FileRef:
    """A FileRef whose version is a digest of some texts."""
    digest = blake2b(digest_size=16)
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text)
    return FileRef(uri, num_bytes, _MARK + digest.hexdigest())


class ChunkObjects:
    """The objects below `uri` (an array of Zarr or N5), of which `limit` bytes each are believed."""

    def __init__(self, uri: str, limit: int):
        self.uri = uri
        self._limits = Limits(max_file_bytes=limit)
        self._listed: dict[str, tuple[int, str]] | None = None
        """Key -> (bytes, version): of up to MAX_LISTED objects, so without their addresses."""

    def identify(self, top: str, documents: Iterable[bytes], *, below: str, count: int, num_wanted: int,
                 wanted: Callable[[str], bool], fill: object, decoded_bytes: int) -> tuple[FileRef, tuple[str, ...]]:
        """(identity of the volume at `top`, lines for the log), from its metadata documents and the listing of the chunks
        in the folder `below` that are `wanted`, `num_wanted` if all are stored; `count` is how many there may be in that
        folder, wanted or not. `fill`: what those that are not stored read as.

        Raises BadRequest when no chunk is stored, ItemError for links and special files, OSError of storage.
        """
        documents = [self.uri.removeprefix(top).encode("utf-8", "surrogateescape"), *documents]
        unlisted = digest_ref(top, decoded_bytes, documents), (
            f"over {MAX_LISTED:,} chunks are too many to list: one that changes while the job runs is not noticed",)
        if count > MAX_LISTED:
            return unlisted
        folder = f"{self.uri}/{below}" if below else self.uri
        try:
            found = list_objects(folder)
        except FileNotFoundError:
            found = []
        except ItemError as error:
            if error.reason != "too_large":
                raise
            return unlisted  # what else lies in the folder are as many
        prefix = f"{below}/" if below else ""
        self._listed = {prefix + o.name: (o.size, o.version) for o in found if wanted(prefix + o.name)}
        if not self._listed:
            raise BadRequest("no chunk of the volume is stored" + (f"; there is {found[0].name[:100]!r}" if found else ""),
                             where=self.uri, todo="copy the volume again, or name another level or channel")
        lines = (f"{name}\0{size}\0{version}\n".encode("utf-8", "surrogateescape")
                 for name, (size, version) in self._listed.items())
        size = sum(map(len, documents)) + sum(max(0, size) for size, _ in self._listed.values())
        gone = num_wanted - len(self._listed)
        return digest_ref(top, size, [*documents, *lines]), () if gone <= 0 else (
            f"{gone:,} of {plural(num_wanted, 'chunk')} {'is' if gone == 1 else 'are'} not stored: read as the fill value {fill}",)

    def ref(self, key: str) -> FileRef | None:
        """The object as it was listed, or (not listed) as it is now; None when it is not stored. Raises as `get`."""
        uri = f"{self.uri}/{key}"
        if self._listed is not None:
            return FileRef(uri, *self._listed[key]) if key in self._listed else None
        with storage_errors(uri):
            ref = ref_of(uri)
        return None if ref.version == "missing" else ref

    def get(self, key: str) -> bytes | None:
        """All bytes of an object; None when it is not stored.

        Raises ItemError `missing` and `changed` (since it was listed), `too_large`, `bad_path`; TransientError, SystemicError.
        """
        ref = self.ref(key)
        if ref is None:
            return None
        if self._listed is None and is_local(ref.uri):  # links were not looked for
            return self.part(ref, 0, ref.size)
        return read_file(ref, self._limits)

    def part(self, ref: FileRef, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of an object. Raises as `get`, and ItemError `truncated` where the object ends before."""
        if end - begin > self._limits.max_file_bytes:
            raise ItemError("too_large", f"a chunk of {end - begin:,} bytes", where=ref.uri)
        return read_part(ref, begin, end)


def read_part(ref: FileRef, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file or object that is still the one that was listed; retried.

    Raises ItemError `truncated` (it ends before), `changed`, `missing`; TransientError, SystemicError.
    """
    if not 0 <= begin <= end or 0 <= ref.size < end:
        raise ItemError("truncated", f"the object holds {ref.size:,} bytes, bytes {begin:,} to {end:,} are asked for",
                        where=ref.uri, todo="copy it again")
    with storage_errors(ref.uri):
        return retried(lambda: _part(ref, begin, end), ref.uri)


def check_same(ref: FileRef) -> None:
    """Raises ItemError `changed` or `missing` when a file is not the one that was listed; TransientError, SystemicError."""
    with storage_errors(ref.uri):
        now = ref_of(ref.uri)
    if now.version == "missing":
        raise ItemError("missing", "no such file", where=ref.uri)
    if now != ref:
        raise changed(ref.uri)


def changed(uri: str) -> ItemError:
    """What is raised for a file that was replaced since it was listed."""
    return ItemError("changed", "the file is not the one that was listed", where=uri, todo="plan again with the new volume")


def _part(ref: FileRef, begin: int, end: int) -> bytes:
    """One try. Raises ItemError `changed`, TruncatedBody, what storage raises."""
    if is_local(ref.uri):
        path = local_path(ref.uri)
        if path.is_symlink():
            raise ItemError("bad_path", "a link inside a container is not followed", where=ref.uri,
                            todo="copy what it points to into it")
        with open(path, "rb", buffering=0) as file:
            data = _read_all(file.fileno(), begin, end)
            version: str | None = str(os.fstat(file.fileno()).st_mtime_ns)
    else:
        data, version = on_inputs(ref.uri, lambda fs: _remote_part(fs, ref.uri, begin, end))
    if version not in (None, ref.version):
        raise changed(ref.uri)
    if len(data) != end - begin:
        raise TruncatedBody(f"only {len(data):,} of {end - begin:,} bytes arrived")
    return data


def _read_all(descriptor: int, begin: int, end: int) -> bytes:
    """Bytes [begin, end), fewer where the file ends: one call reads at most 2 GiB."""
    parts = []
    while begin < end and (part := os.pread(descriptor, end - begin, begin)):
        parts.append(part)
        begin += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _remote_part(fs, uri: str, begin: int, end: int) -> tuple[bytes, str | None]:
    path = fs._strip_protocol(uri)
    if hasattr(fs, "read_object"):  # S3
        data, version = fs.read_object(path, begin=begin, end=end)
        return data, version and version.strip('"')
    return fs.cat_file(path, start=begin, end=end), None
