"""Data Science Bowl 2018 folders: `<id>/images/<id>.png` and one mask per nucleus, `<id>/masks/*.png`."""

from __future__ import annotations

import posixpath

from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest
from dinoray.io.annotations.found import Found, files_of
from dinoray.io.annotations.label_files import MaskFiles
from dinoray.io.grouping import relative_to
from dinoray.io.items import FileRef, Item

_PARTS = ("images", "masks")


def split(path: str) -> tuple[str, str] | None:
    """(folder of an image, "images" or "masks") of a file's path below the root; None for files elsewhere."""
    folder, part = posixpath.split(posixpath.dirname(path))
    return (folder, part) if folder and part in _PARTS else None


def list_dsb(source: LabelledSource) -> list[Found]:
    """The images of a DSB split; the id is the folder's name. Objects are numbered by the names of their masks."""
    if source.labels is not None:
        raise BadRequest("DSB folders hold their masks themselves", where=source.labels, todo="leave labels out")
    items, listing = files_of(source.images)
    images: dict[str, list[Item]] = {}
    masks: dict[str, list[FileRef]] = {}
    for item in items:
        place = split(relative_to(listing.root, item.files[0].uri))
        if place is None:
            continue
        folder, part = place
        if part == "images":
            images.setdefault(folder, []).append(item)
        else:
            masks.setdefault(folder, []).append(item.files[0])
    if not images:
        raise BadRequest("no <id>/images/<id>.png below it", where=source.images, todo="name the folder that holds the ids")
    found = []
    for folder, own in sorted(images.items()):
        mine = tuple(sorted(masks.get(folder, ()), key=lambda file: posixpath.basename(file.uri)))
        problem = own[0].problem
        if len(own) > 1:
            problem = f"ambiguous_labels: {len(own)} files in images/"
        elif not mine:
            problem = problem or "missing_labels: no masks/*.png (an image without objects has one empty mask)"
        found.append(Found(folder, own[0], folder, MaskFiles(mine) if mine else None, problem))
    return found
