"""From a job to the listing of its inputs: images, and in jobs of cells where their cells are. Pixels are never read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dinoray.config import CollectionJob, ExtractCellsJob
from dinoray.errors import BadRequest, ItemError
from dinoray.io.images import Limits, declared_pixel_size
from dinoray.io.items import Item
from dinoray.io.objects import with_centroids, with_labels
from dinoray.io.sources import ItemListing, list_items
from dinoray.io.storage_errors import storage_errors
from dinoray.io.stores import read_bytes
from dinoray.io.walk import is_image_name

PEEKED_GROUPS = 16
"""Plates (or folders) of whose first image the header is read while listing, to find a missing pixel size in time."""
PEEKED_BYTES = 256 * 2**20
"""Larger files are not read for their header alone."""


def list_inputs(job: CollectionJob, sources: list[str] | None = None, *, root: str | None = None) -> ItemListing:
    """The inputs of a job, or those at other `sources` by the job's rules, with labels or centroids in jobs of cells.
    `root`: what ids are relative to (see `list_items`).

    Raises BadRequest as `list_items`, `with_labels` and `with_centroids` do, here or while the items are read; there too
    when crops need a pixel size and the first image of a plate or folder says none.
    """
    labels = job.labels if isinstance(job, ExtractCellsJob) else None
    listing = list_items(sources or list(job.sources), pattern=job.pattern, where=dict(job.where),
                         limit=job.limit if labels is None else None, root=root)
    if not isinstance(job, ExtractCellsJob):
        return listing
    if labels is not None:
        listing = with_labels(listing, labels, pattern=job.pattern, limit=job.limit)
    else:
        listing = with_centroids(listing, job.centroids)
    if job.pixel_size_um is None:
        limits = Limits(max_pixels=job.max_pixels, max_bytes=job.max_file_bytes, max_file_bytes=job.max_file_bytes)
        listing = replace(listing, items=_with_pixel_size(listing.items, limits))
    return listing


def _with_pixel_size(items: Iterator[Item], limits: Limits) -> Iterator[Item]:
    """The items; raises BadRequest when the first readable one of a group has no pixel size."""
    known: set[str] = set()
    for item in items:
        if item.problem is None and item.group not in known and len(known) < PEEKED_GROUPS:
            known.add(item.group)
            _check_pixel_size(item, limits)
        yield item


def _check_pixel_size(item: Item, limits: Limits) -> None:
    file = item.files[0]
    if file.size < 0 or file.size > PEEKED_BYTES or not is_image_name(file.uri):
        return  # its runner will tell
    try:
        with storage_errors(file.uri):
            size = declared_pixel_size(read_bytes(file.uri), file.uri, limits)
    except ItemError:
        return  # a damaged file is the runner's to quarantine, with its reason
    if size is None:
        raise BadRequest("a crop in µm needs the pixel size, and this image does not say it (or y and x differ: "
                         "pixels must be square)", where=file.uri,
                         todo="give --pixel-size-um (µm per pixel); only OME-TIFF and ImageJ files say it themselves")
