"""What a layout's lister hands over: images with or without the labels that belong to them."""

from __future__ import annotations

from dataclasses import dataclass

from dinoray.config.labelled import LabelledSource
from dinoray.io.annotations.labelled import Truth
from dinoray.io.items import Item
from dinoray.io.sources import ItemListing, list_items, list_labels


@dataclass(frozen=True)
class Found:
    """An image of a source; `problem` says why it cannot be used (then there may be no truth)."""

    image_id: str
    item: Item
    group: str
    truth: Truth | None
    problem: str | None = None


def files_of(path: str) -> tuple[list[Item], ItemListing]:
    """Every image file of a folder, glob or URL as an item of its own. Raises BadRequest when there is none."""
    listing = list_labels(path)
    return list(listing.items), listing


def list_images(source: LabelledSource) -> tuple[list[Item], ItemListing]:
    """The images of a source; one file per channel is grouped where the names follow a known pattern."""
    listing = list_items([source.images])
    return list(listing.items), listing
