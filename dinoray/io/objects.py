"""Where the cells are: label images, or a table of centroids, joined to the images of a listing by name.

Both sides are listed first: names, sizes and versions of the label files, or the rows of the table, go into a
temporary SQLite database (on disk when it grows), so that memory stays bounded; then every image of the listing
gets its `labels` or `objects`. Pixels are never read here.

A label image belongs to the image whose id it has: the path below its own root without extension, and without a
suffix such as `_masks`, `_cp_masks`, `_labels`. Images with one file per channel have the id of the group; the
label file may also have the name of one of the channels. An image `000_img` may also own `000_masks`.
"""

from __future__ import annotations

import posixpath
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from dinoray.errors import BadRequest
from dinoray.io import plates
from dinoray.io.centroids import CentroidTable, position_key
from dinoray.io.grouping import relative_to
from dinoray.io.items import FileRef, Item
from dinoray.io.sources import ItemListing, list_labels
from dinoray.io.walk import IMAGE_SUFFIXES, count

LABEL_SUFFIX = re.compile(r"[ _.-](?:cp_?masks?|mask_?(?:nuclei|cells?|cytoplasm)|masks?|labels?|seg|segmentation)", re.IGNORECASE)
"""What the names of label images end in (Cellpose, CellProfiler, StarDist and others), before the extension."""
IMAGE_SUFFIX = "_img"
"""What the names of images may end in, beside labels without it: Cellpose's own data are `000_img.png`, `000_masks.png`."""
_NAME_SUFFIXES = (".tif", ".tiff", ".png")


def image_stem(path: str) -> str:
    """A path without the extension of an image, `.ome.tif` included."""
    for suffix in IMAGE_SUFFIXES:
        if path.lower().endswith(suffix):
            path = path[:-len(suffix)]
            return path[:-4] if path.lower().endswith(".ome") else path
    return path


def _bare(stem: str) -> str | None:
    """A stem without its label suffix, None when it has none."""
    folder, slash, name = stem.rpartition("/")
    match = next((m for m in LABEL_SUFFIX.finditer(name) if m.end() == len(name) and m.start() > 0), None)
    return f"{folder}{slash}{name[:match.start()]}" if match else None


def label_keys(path: str, patterns: tuple[plates.Pattern, ...] = ()) -> list[tuple[int, str]]:
    """(rank, stem of the image) of all the images that a label file may belong to, by its path below its root.

    Ranks: 0 the name without its label suffix, 1 the very name, 2 and 3 the same with one channel's name for the group's.
    """
    stem = image_stem(path)
    bare = _bare(stem)
    names = ([(0, bare)] if bare else []) + [(1, stem)]
    keys = dict.fromkeys(names)
    for rank, name in names:
        for pattern in patterns:
            for suffix in _NAME_SUFFIXES:
                parsed = plates.parse(pattern, name + suffix)
                if parsed is not None:
                    keys[(rank + 2, image_stem(parsed.key_without_channel))] = None
    return list(keys)


def with_labels(listing: ItemListing, source: str, *, pattern: str | None = "auto", limit: int | None = None) -> ItemListing:
    """The listing with `labels` for each item: the label image of its name among those of `source` (folder, glob, URL,
    or a manifest with `item_id` and `uri`).

    An item without one gets the problem `missing_labels`, one with several `ambiguous_labels`. Label images that lie
    among the images are no images (counted in `ignored`); `limit` counts what is left. Raises BadRequest when no item
    has labels.
    """
    found = list_labels(source)
    if pattern in ("none", None):
        patterns: tuple[plates.Pattern, ...] = ()
    else:
        patterns = tuple(plates.SHIPPED.values()) if pattern == "auto" else (plates.get_pattern(pattern),)

    def paired() -> Iterator[Item]:
        matched, taken, first, example = 0, 0, None, ""
        with closing(sqlite3.connect("")) as db:  # "": a temporary file of its own
            db.execute("CREATE TABLE labels (key TEXT, rank INTEGER, uri TEXT, size INTEGER, version TEXT)")
            for label in found.items:
                if len(label.files) != 1:
                    raise BadRequest("a label image is one file", where=source, todo="give a manifest with item_id and uri")
                file, example = label.files[0], example or label.item_id
                db.executemany("INSERT INTO labels VALUES (?, ?, ?, ?, ?)", [
                    (key, rank, file.uri, file.size, file.version) for rank, key in label_keys(label.item_id, patterns)])
            db.execute("CREATE INDEX by_key ON labels (key)")
            db.execute("CREATE INDEX by_uri ON labels (uri)")
            for item in listing.items:
                if any(db.execute("SELECT 1 FROM labels WHERE uri = ? AND rank = 0", (f.uri,)).fetchone() for f in item.files):
                    count(listing.ignored, "label image among the images")
                    continue
                labelled = _labelled(item, listing, db)
                matched += labelled.labels is not None
                first = first or item
                yield labelled
                taken += 1
                if taken == limit:
                    break
        if not matched:
            looked = f"image {first.item_id} wants {image_stem(first.item_id)!r}" if first else "all images are label images"
            raise BadRequest(f"no image has a label image of its name ({looked}; the label images are like {example!r})",
                             where=source, todo="name label images like their images below their folder, with or without "
                             "_mask(s), _cp_masks or _labels; or give a manifest with item_id and uri")

    return replace(listing, items=paired())


def _below(item_id: str, listing: ItemListing) -> str:
    """An id as a path below the folder of its own sources (of an extension it is relative to the first plan's root)."""
    whole = item_id if "://" in item_id or item_id.startswith("/") else f"{listing.root.rstrip('/')}/{item_id}"
    return relative_to(listing.folder, whole)


def _labelled(item: Item, listing: ItemListing, db: sqlite3.Connection) -> Item:
    names = {image_stem(item.item_id), image_stem(_below(item.item_id, listing))}
    if not item.channels:
        names |= {image_stem(relative_to(root, file.uri)) for file in item.files for root in (listing.root, listing.folder)}
    names |= {name[:-len(IMAGE_SUFFIX)] for name in names if name.endswith(IMAGE_SUFFIX)}
    own = {file.uri for file in item.files}
    marks = ", ".join("?" * len(names))
    rows = db.execute(f"SELECT DISTINCT rank, uri, size, version FROM labels WHERE key IN ({marks}) ORDER BY rank, uri",
                      tuple(sorted(names))).fetchall()
    rows = [row for row in rows if row[1] not in own]
    best = [row for row in rows if row[0] == rows[0][0]]
    if len(best) == 1:
        return replace(item, labels=FileRef(*best[0][1:]))
    if item.problem is not None:
        return item
    if best:
        return replace(item, problem=f"ambiguous_labels: {len(best)} files could be its labels: "
                       + ", ".join(posixpath.basename(row[1]) for row in best[:3]))
    return replace(item, problem=f"missing_labels: no label image is named like {image_stem(item.item_id)}")


def with_centroids(listing: ItemListing, source: str) -> ItemListing:
    """The listing with `objects` for each item: its rows of the table at `source` (dinoray.io.centroids).

    An item without a row has no objects, which is no problem; one whose objects cannot be told apart or lack a
    coordinate has the problem `bad_centroids`. Raises BadRequest for a table that cannot be read, and when no item has
    a row.
    """

    def joined() -> Iterator[Item]:
        matched, first = 0, None
        with closing(CentroidTable(source)) as table:
            for item in listing.items:
                objects, problem = table.objects_of(_names(item, listing, table))
                matched += bool(objects) or problem is not None
                first = first or item
                yield replace(item, objects=objects, problem=item.problem or problem)
            if not matched:
                named = f"the first image is {first.item_id}; " if first else ""
                raise BadRequest(f"no image has a row in the table of centroids ({named}it names images like {table.example!r})",
                                 where=source,
                                 todo="write item ids as in the features, paths of the images, or Metadata_Plate, _Well and _Site")

    return replace(listing, items=joined())


def _names(item: Item, listing: ItemListing, table: CentroidTable) -> list[str]:
    """All the names that a table may have for an item."""
    if table.by_position:
        return [position_key(*(item.metadata.get(f"Metadata_{name}") for name in ("Plate", "Well", "Site")))]
    below = _below(item.item_id, listing)
    names = [item.item_id, image_stem(item.item_id), below, image_stem(below)]
    for file in item.files:
        for path in (file.uri, *(relative_to(root, file.uri) for root in (listing.root, listing.folder, table.folder))):
            names += [path, image_stem(path)]
    return list(dict.fromkeys(names))
