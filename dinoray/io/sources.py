"""SRC arguments -> a stream of Items, in an order that depends on nothing but names.

A source is a folder (all images in it), a glob, a file, an OME-Zarr (ome_zarr_items.py), an fsspec URL of one
of these, or a table of images (`.csv`, `.parquet`: manifests.py). Listing reads names, sizes and versions, never pixels. Memory is
bounded by the largest single folder (and 70 bytes per item when there are manifests).
"""

from __future__ import annotations

import itertools
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from hashlib import blake2b

from dinoray.errors import BadRequest
from dinoray.io import plates
from dinoray.io.grouping import make_items
from dinoray.io.items import Item
from dinoray.io.manifests import is_manifest, manifest_items
from dinoray.io.ome_zarr_items import as_labels, zarr_items
from dinoray.io.storage_errors import listing_errors
from dinoray.io.stores import is_local, local_path, on_inputs
from dinoray.io.walk import ZARR, Entry, LocalTree, Matcher, RemoteTree, count, has_magic, walk


@dataclass
class ItemListing:
    """The items of a request. `items` can be read once; `ignored` is complete when it is exhausted."""

    items: Iterator[Item]
    root: str
    """What item ids are relative to; empty when the sources have no folder in common (ids are full URIs)."""
    folder: str = ""
    """The folder that the sources have in common: `root`, unless ids were asked to be relative to another."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Files passed over so far: {extension: count}."""

    @property
    def num_ignored(self) -> int:
        """Files passed over so far."""
        return sum(self.ignored.values())

    def describe_ignored(self) -> str:
        """For example "12 ignored (10 .txt, 2 .csv)"; empty when nothing was."""
        most = sorted(self.ignored.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in most)
        return f"{self.num_ignored:,} ignored ({kinds})" if most else ""


@dataclass
class _Request:
    """The sources of one file system."""

    tree: LocalTree | RemoteTree
    matchers: list[Matcher] = field(default_factory=list)
    named: dict[str, set[str]] = field(default_factory=dict)
    """Files named one by one: {folder: names}."""
    arrays: list[str] = field(default_factory=list)
    """Zarr groups named one by one."""

    def entries(self, ignored: dict[str, int]) -> Iterator[list[Entry]]:
        """The wanted files, folder by folder."""
        named = {folder: set(names) for folder, names in self.named.items()}
        starts = sorted({matcher.base for matcher in self.matchers})
        for start in starts:
            others = frozenset(starts) - {start}
            with listing_errors(self.tree.url(start)):
                for _, files in walk(self.tree, start, self.matchers, other_starts=others, named=named,
                                     ignored=ignored):
                    yield files
        for folder in sorted(named):  # not listed: reading a file does not need access to its folder
            paths = [(name, posixpath.join(folder, name)) for name in sorted(named[folder])]
            with listing_errors(self.tree.url(folder)):
                yield [Entry(name, path, False, self.tree.ref(path)) for name, path in paths]
        for path in sorted(set(self.arrays)):
            yield [Entry(posixpath.basename(path), path, True)]


def list_items(
    sources: list[str],
    *,
    pattern: str | None = "auto",
    where: dict[str, str] | None = None,
    limit: int | None = None,
    root: str | None = None,
) -> ItemListing:
    """List the images of `sources` as Items.

    pattern: "auto" groups the files of a folder to multi-channel items when they all match one shipped
        pattern (plates.SHIPPED); "none" or None makes every file an item; else the name of a shipped pattern
        or a regex (plates.py). With an explicit pattern, files that do not match are items with the problem
        `pattern_mismatch`: nothing is dropped.
    where: {"Plate": "BR001*"} keeps items whose Metadata_Plate matches (fnmatch, case counts; `Metadata_` may
        be left out).
    limit: at most the first N items.
    root: what ids are relative to, instead of the folder that the sources have in common; inputs that lie elsewhere
        have their full URI as id.

    Raises BadRequest when a source does not exist or is not accessible, and when nothing is found;
    TransientError for storage trouble. While the items are read, the same may come up.
    """
    if not sources:
        raise BadRequest("no source", where="SRC", todo="name a folder, a glob, files, a URL, or a manifest")
    if limit is not None and limit < 1:
        raise BadRequest(f"a limit of {limit} items", where="limit", todo="ask for at least 1")
    grouping = None if pattern in ("auto", "none", None) else plates.get_pattern(pattern)
    requests: dict[str, _Request] = {}
    manifests: list[str] = []
    roots = [_add_source(source, requests, manifests) for source in sources]
    folder = _common_root(roots)
    listing = ItemListing(iter(()), folder if root is None else root, folder)

    def arrays(request: _Request, entry: Entry) -> Iterator[Item]:
        found = zarr_items(request.tree.url(entry.path), listing.root)
        first = next(found, None)
        if first is not None:
            yield from itertools.chain([first], found)
        elif entry.path in request.arrays:
            raise BadRequest("a Zarr group without an OME-Zarr image or plate", where=request.tree.url(entry.path),
                             todo="name the group that holds `multiscales` or `plate`, or export its planes as TIFF")
        else:
            count(listing.ignored, ".zarr folder")

    def listed() -> Iterator[Item]:
        for name in sorted(requests):
            folders = requests[name].entries(listing.ignored)
            if grouping is not None and grouping.whole_path:  # an image's channels may lie in several folders
                folders = iter([[entry for entries in folders for entry in entries]])
            for entries in folders:
                files = [entry for entry in entries if not entry.is_folder]
                yield from make_items(files, listing.root, grouping, pattern == "auto", listing.ignored)
                for entry in entries:
                    if entry.is_folder:
                        yield from arrays(requests[name], entry)
        for manifest in dict.fromkeys(manifests):
            yield from manifest_items(manifest, listing.root, listing.ignored)

    items = listed()
    if manifests:
        items = _flag_duplicates(items)
    if where:
        items = _filter(items, where)
    items = itertools.islice(items, limit)
    first = next(items, None)
    if first is None:
        what = f"no image{' that matches ' + str(where) if where else ''}"
        raise BadRequest(f"{what}; {listing.describe_ignored() or 'nothing is there'}",
                         where=", ".join(sources[:5]),
                         todo="images end in .tif .tiff .png .jpg .jpeg .bmp .gif or .webp, or are OME-Zarr folders")
    listing.items = itertools.chain([first], items)
    return listing


def list_labels(source: str) -> ItemListing:
    """The label images of a folder, glob, URL or manifest, each an item of its own: as `list_items`, but OME-Zarr groups that are
    marked as labels, which are no images, are read too."""
    listing = list_items([source], pattern="none")
    listing.items = map(as_labels, listing.items)
    return listing


def _add_source(source: str, requests: dict[str, _Request], manifests: list[str]) -> str:
    """Sort one source into `requests` or `manifests`; returns its root (folder) as a path or URL."""
    tree: LocalTree | RemoteTree
    if is_local(source):
        tree, path = LocalTree(), str(local_path(source))
        is_folder, is_file = os.path.isdir(path), os.path.isfile(path)
        magic = not (is_folder or is_file) and has_magic(path)
        key = "file"
    else:
        tree = RemoteTree(source)
        path, key = tree.path.rstrip("/"), source.split("://", 1)[0]
        magic = has_magic(path) and not key.startswith("http")
        if key.startswith("http") and ZARR in path.lower():
            raise BadRequest("an OME-Zarr over http(s) cannot be listed", where=source,
                             todo="use the s3:// address of the same data, or a copy")
        with listing_errors(source):
            kind = "" if magic else on_inputs(source, lambda fs: fs.info(path)["type"])
        is_folder, is_file = kind == "directory", kind == "file"
    request = requests.get(key) or _Request(tree)
    if is_file and is_manifest(path):
        manifests.append(tree.url(path))
        return tree.url(posixpath.dirname(path))
    if not (is_folder or is_file or magic):
        raise BadRequest("no such file or folder", where=source, todo="check the path; quote globs")
    requests[key] = request
    if is_file:
        folder, name = posixpath.split(path)
        request.named.setdefault(folder, set()).add(name)
        return tree.url(folder)
    base, glob = (path, "") if is_folder else _split_glob(path)
    if base.lower().endswith(".n5"):
        raise BadRequest("an N5 array is a volume", where=source,
                         todo="`dinoray extract volume` reads volumes")
    if is_folder and any(name.lower().endswith(ZARR) for name in base.split("/")):
        request.arrays.append(base)
        return tree.url(posixpath.dirname(base))
    if is_local(source) and not os.path.isdir(base):
        raise BadRequest("no such folder", where=base, todo=f"check the glob {source}")
    request.matchers.append(Matcher(base, glob))
    return tree.url(base)


def _split_glob(path: str) -> tuple[str, str]:
    """The folder before the first part with a wildcard, and the rest."""
    parts = path.split("/")
    at = next(i for i, part in enumerate(parts) if has_magic(part))
    return "/".join(parts[:at]) or ("/" if path.startswith("/") else ""), "/".join(parts[at:])


def _common_root(roots: list[str]) -> str:
    """The deepest folder above all roots; empty when they differ in protocol or bucket."""
    split = [(root.split("://", 1) if "://" in root else ["", root]) for root in roots]
    if len({protocol for protocol, _ in split}) > 1:
        return ""
    paths = [path.rstrip("/").split("/") for _, path in split]
    common = os.path.commonprefix(paths)
    protocol = split[0][0]
    if not protocol:
        return "/".join(common) or "/"
    return f"{protocol}://{'/'.join(common)}" if any(common) else ""


def _flag_duplicates(items: Iterable[Item]) -> Iterator[Item]:
    """Give the second and further items of one id the problem `duplicate_id`."""
    seen: set[int] = set()
    for item in items:
        digest = int.from_bytes(blake2b(item.item_id.encode(), digest_size=8).digest(), "little")
        if digest in seen and item.problem is None:
            item = replace(item, problem="duplicate_id: an earlier item has the same id")
        seen.add(digest)
        yield item


def _filter(items: Iterable[Item], where: dict[str, str]) -> Iterator[Item]:
    """Items whose metadata match; an unknown key is told as soon as an item with metadata lacks it."""
    wanted = {key if key.startswith("Metadata_") else f"Metadata_{key}": glob for key, glob in where.items()}
    known: set[str] = set()
    any_item = False
    for item in items:
        any_item = True
        known |= item.metadata.keys()
        if item.metadata and not known >= wanted.keys():
            _refuse_keys(wanted, known)
        if all(fnmatchcase(item.metadata.get(key) or "", glob) for key, glob in wanted.items()):
            yield item
    if any_item and not known >= wanted.keys():
        _refuse_keys(wanted, known)


def _refuse_keys(wanted: dict[str, str], known: set[str]) -> None:
    unknown = ", ".join(sorted(key.removeprefix("Metadata_") for key in wanted.keys() - known))
    names = ", ".join(sorted(key.removeprefix("Metadata_") for key in known))
    raise BadRequest(f"unknown key {unknown}", where="where", todo=f"known: {names or 'none'}")
