"""A `.zarr` folder -> Items: one image, the fields of a plate (OME-Zarr HCS), or the images of bioformats2raw."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from dinoray.errors import ItemError
from dinoray.io import ome_zarr
from dinoray.io.grouping import make_item, natural, relative_to
from dinoray.io.items import FileRef, Item
from dinoray.io.ome_zarr_pixels import UNREAD, field_ref, group_attributes, label_ref
from dinoray.io.plates import format_well
from dinoray.io.storage_errors import listing_errors
from dinoray.io.zarr_objects import leads_out

_THREADS = 16
_SUFFIX = re.compile(r"(\.ome)?\.zarr$", re.IGNORECASE)


def zarr_items(uri: str, root: str) -> Iterator[Item]:
    """The images in the Zarr group at `uri`, in the order of wells and fields; none when it holds no OME-Zarr.

    The id is the path of the image's group below `root`. What is wrong with one field is that item's
    `problem`. Raises BadRequest or TransientError for storage trouble.
    """
    with listing_errors(uri):
        try:
            attributes = group_attributes(uri)
            if attributes is None:
                return
            wells = ome_zarr.parse_plate(attributes, uri)
            if wells is not None:
                yield from _plate(uri, wells, root)
            elif "bioformats2raw.layout" in attributes:
                yield from _series(uri, root)
            elif "multiscales" in attributes:
                yield _item(uri, root, uri, {})
        except ItemError as error:  # the group's own metadata are no good
            yield _broken(uri, root, error, {})


def as_labels(item: Item) -> Item:
    """An item of a listing of label images: one that is no image because it is marked as labels is read as such.

    Others, and what cannot be read as labels either, as they are. Raises BadRequest or TransientError for storage trouble.
    """
    if [file.version for file in item.files] != [UNREAD]:
        return item
    uri = item.files[0].uri
    with listing_errors(uri):
        try:
            return replace(item, files=(label_ref(uri),), problem=None)
        except ItemError:  # the item says what is wrong, or reading it will
            return item


def _plate(uri: str, wells: list[ome_zarr.WellRef], root: str) -> Iterator[Item]:
    """The plate's name is its folder's: the name in the metadata is free text, often the same for all plates."""
    plate = _SUFFIX.sub("", posixpath.basename(uri.rstrip("/")))
    with ThreadPoolExecutor(_THREADS) as pool:
        tasks = (lambda well=well: _well(uri, plate, well, root) for well in wells)
        for items in pool.map(_call, tasks):
            yield from items


def _call(task: Callable[[], list[Item]]) -> list[Item]:
    return task()


def _well(uri: str, plate: str, well: ome_zarr.WellRef, root: str) -> list[Item]:
    place, metadata = f"{uri}/{well.path}", {"Metadata_Plate": plate, "Metadata_Well": format_well(well.row + well.column)}
    with listing_errors(place):
        try:
            _check_inside(place, uri)
            attributes = group_attributes(place)
            if attributes is None:
                raise ItemError("missing", "the plate names a well that is not there", where=place)
            fields = ome_zarr.parse_well(attributes, place)
        except ItemError as error:
            return [_broken(place, root, error, metadata)]
    items = []
    for path, acquisition in sorted(fields, key=lambda field: natural(field[0])):
        more = {"Metadata_Site": path} | ({"Metadata_Acquisition": acquisition} if acquisition is not None else {})
        items.append(_item(f"{place}/{path}", root, uri, metadata | more))
    return items


def _series(uri: str, root: str) -> Iterator[Item]:
    """The images that the OME group names, else 0, 1, ... while there are such groups."""
    named = ome_zarr.parse_series(group_attributes(f"{uri}/OME") or {}, uri)
    for name in named or itertools.count():
        item = _item(f"{uri}/{name}", root, uri, {})
        if not named and item.files[0].version == "missing":
            return
        yield item


def _item(uri: str, root: str, top: str, metadata: dict[str, str | None]) -> Item:
    with listing_errors(uri):
        try:
            _check_inside(uri, top)
            return make_item(relative_to(root, uri), (field_ref(uri),), root, metadata=metadata)
        except ItemError as error:
            return _broken(uri, root, error, metadata)


def _broken(uri: str, root: str, error: ItemError, metadata: dict[str, str | None]) -> Item:
    files = (FileRef(uri, -1, "missing" if error.reason == "missing" else UNREAD),)
    return make_item(relative_to(root, uri), files, root, metadata=metadata, problem=f"{error.reason}: {error.what}")


def _check_inside(uri: str, top: str) -> None:
    if leads_out(uri, top):
        raise ItemError("bad_path", "a link that leads out of the Zarr group", where=uri)
