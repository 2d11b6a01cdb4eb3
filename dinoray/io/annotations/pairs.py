"""Pairs of images and label images, by name: two folders or globs, or side by side as Cellpose keeps them."""

from __future__ import annotations

import posixpath
from collections import Counter
from dataclasses import replace

from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest
from dinoray.io.annotations.found import Found, files_of, list_images
from dinoray.io.annotations.label_files import LabelFile
from dinoray.io.items import Item
from dinoray.io.objects import image_stem, with_labels
from dinoray.io.walk import has_magic


def list_pairs(source: LabelledSource) -> list[Found]:
    """Images and labels of matching names below their own roots; a suffix such as `_masks` is tolerated
    (dinoray.io.objects). Where both are globs of one fixed file name (`*/raw.tif`, `*/ids.png`), those are pairs whose
    wildcards stand for the same.
    """
    if source.labels is None:
        raise BadRequest("pairs need the label images", where=source.images, todo="give labels, or kind: cellpose")
    if _fixed_name(source.images) and _fixed_name(source.labels):
        return _by_wildcards(source.images, source.labels)
    return _by_name(source, source.labels)


def list_cellpose(source: LabelledSource) -> list[Found]:
    """`NNN_img.png` with `NNN_masks.png`, `x.tif` with `x_cp_masks.png`, in one folder (or two)."""
    return _by_name(source, source.labels or source.images)


def _by_name(source: LabelledSource, labels: str) -> list[Found]:
    items, listing = list_images(source)
    paired = with_labels(replace(listing, items=iter(items)), labels).items
    return [_found(image_stem(item.item_id), item) for item in paired]


def _found(image_id: str, item: Item) -> Found:
    truth = LabelFile(item.labels) if item.labels is not None else None
    return Found(image_id, replace(item, labels=None), item.group, truth, item.problem)


def _fixed_name(path: str) -> bool:
    """Whether the last part of a path is the name of one file, with or without wildcards above."""
    return "**" not in path and not has_magic(posixpath.basename(path)) and image_stem(path) != path


def _by_wildcards(images: str, labels: str) -> list[Found]:
    masks = {}
    for label in files_of(labels)[0]:
        key = _wildcards(labels, label.files[0].uri)
        masks[key] = label.files[0]
    items, _ = files_of(images)
    keys = [_wildcards(images, item.files[0].uri) for item in items]
    twice = [key for key, n in Counter(keys).items() if n > 1]
    if twice:
        raise BadRequest(f"several images stand for {'/'.join(twice[0])!r}", where=images, todo="name folders, not parts of them")
    found = []
    for key, item in zip(keys, items, strict=True):
        name = "/".join(key) or image_stem(posixpath.basename(item.files[0].uri))
        mask = masks.get(key)
        problem = item.problem or (None if mask else f"missing_labels: no {posixpath.basename(labels)} in its place of {labels}")
        found.append(_found(name, replace(item, labels=mask, problem=problem)))
    return found


def _wildcards(pattern: str, path: str) -> tuple[str, ...]:
    """The parts of a path that parts of the pattern with wildcards stand for, counted from the end."""
    parts = list(zip(reversed(pattern.split("/")), reversed(path.split("/")), strict=False))
    return tuple(name for part, name in reversed(parts) if has_magic(part))
