"""A COCO JSON -> its images and the outlines of their objects, in a small part of the memory of the parsed JSON.

Every annotation becomes a few byte strings as soon as the parser has read it, so that the Python numbers of one
annotation live at a time: the training file of LIVECell, 1 M cells, needs about 16 bytes per polygon point and 150 per cell.
Parsed once per process; a file that changed is parsed again.
"""

from __future__ import annotations

import json
import logging
import threading
from array import array
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dinoray.errors import BadRequest, ItemError
from dinoray.io.decoded import Limits
from dinoray.io.items import FileRef
from dinoray.io.reading import read_file

logger = logging.getLogger(__name__)
_LOCK = threading.Lock()
_MIN_NUMBERS = 6
"""Of a polygon: three points. (pycocotools takes four numbers for a box.)"""


@dataclass(frozen=True, slots=True)
class Runs:
    """An object as run lengths: compressed bytes, or the counts as packed int64; [Y, X] of its image."""

    counts: bytes | array
    size: tuple[int, int]


Outline = tuple[bytes, ...] | Runs | None
"""Polygons, each x0 y0 x1 y1 ... as packed float64; run lengths; None: an object without an outline."""


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One entry of `images`."""

    number: int | str
    file_name: str
    height: int
    width: int


@dataclass
class CocoFile:
    """What the file holds: images in its order, and for each image the outlines of its objects in its order."""

    images: list[CocoImage]
    outlines: dict[int | str, list[Outline]] = field(default_factory=dict)
    num_crowds: int = 0
    """Annotations with `iscrowd`, which are left out."""
    num_flat: int = 0
    """Annotations whose polygons have fewer than three points: objects without a pixel."""


def read_coco(file: FileRef) -> CocoFile:
    """The content of a COCO JSON, kept for the next call.

    Raises BadRequest for a file that is no COCO JSON (it names the annotation), that names an image twice or an image that
    it does not list; ItemError `missing` or `changed`, TransientError, SystemicError for storage trouble.
    """
    with _LOCK:  # two threads must not parse 300 MB at once
        return _parsed(file)


@cache
def _parsed(file: FileRef) -> CocoFile:
    text = read_file(file, Limits())
    reader = _Reader(file.uri)
    try:
        content = json.JSONDecoder(object_hook=reader.hook).decode(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"no JSON: {error or type(error).__name__}", where=file.uri,
                         todo="give a COCO JSON with outlines") from error
    coco = reader.finish(content)
    logger.info("%s: %d images, %d objects, %d crowds left out, %d objects without an area", file.uri, len(coco.images),
                sum(map(len, coco.outlines.values())), coco.num_crowds, coco.num_flat)
    return coco


class _Reader:
    """Turns annotations into outlines while the JSON is parsed: they leave None behind."""

    def __init__(self, uri: str):
        self.uri = uri
        self.coco = CocoFile([])

    def hook(self, value: dict[str, Any]) -> dict[str, Any] | None:
        if "image_id" not in value:
            return value
        number = value["image_id"]
        if not isinstance(number, int | str):
            raise self._bad(f"annotation {value.get('id')!r} belongs to image {number!r}")
        if value.get("iscrowd"):
            self.coco.num_crowds += 1
        else:
            self.coco.outlines.setdefault(number, []).append(self._outline(value))
        return None

    def _outline(self, annotation: dict[str, Any]) -> Outline:
        shape = annotation.get("segmentation")
        if not shape:
            return None
        try:
            if isinstance(shape, dict):
                height, width = (int(side) for side in shape["size"])
                counts = shape["counts"]
                return Runs(counts.encode("ascii") if isinstance(counts, str) else array("q", counts), (height, width))
            parts = [array("d", part) for part in shape]
            if any(len(part) % 2 for part in parts):
                raise ValueError("an odd number of coordinates")
        except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
            raise self._bad(f"the segmentation of annotation {annotation.get('id')!r} is neither polygons nor run lengths "
                            f"({type(error).__name__}: {error})") from error
        polygons = tuple(part.tobytes() for part in parts if len(part) >= _MIN_NUMBERS)
        self.coco.num_flat += not polygons
        return polygons

    def finish(self, content: Any) -> CocoFile:
        """The images, checked against the annotations."""
        if not isinstance(content, dict) or not isinstance(content.get("images"), list) or "annotations" not in content:
            raise self._bad("it has no list `images`, or no `annotations`")
        annotations = content["annotations"]
        rest = annotations.values() if isinstance(annotations, dict) else annotations  # some files of LIVECell have a dict
        if not isinstance(annotations, list | dict) or any(value is not None for value in rest):
            raise self._bad("an annotation without image_id")
        for entry in content["images"]:
            try:
                image = CocoImage(entry["id"], str(entry["file_name"]), int(entry["height"]), int(entry["width"]))
            except (TypeError, KeyError, ValueError) as error:
                raise self._bad(f"an image without id, file_name, height or width: {str(entry)[:200]}") from error
            if not isinstance(image.number, int | str) or image.height < 1 or image.width < 1:
                raise self._bad(f"image {image.number!r} has {image.height} x {image.width} pixels")
            self.coco.images.append(image)
        numbers = {image.number for image in self.coco.images}
        if len(numbers) < len(self.coco.images):
            raise self._bad("an image id is there twice")
        names = {image.file_name for image in self.coco.images}
        if len(names) < len(self.coco.images):
            raise self._bad("an image file is there twice")
        unknown = [number for number in self.coco.outlines if number not in numbers]
        if unknown:
            raise self._bad(f"{len(unknown):,} images with annotations are not among `images`: {unknown[:5]}")
        return self.coco

    def _bad(self, what: str) -> BadRequest:
        return BadRequest(f"not a COCO JSON with outlines: {what}", where=self.uri,
                          todo="images need id, file_name, height, width; annotations image_id and segmentation")


def unreadable(error: ItemError) -> BadRequest:
    """A JSON that cannot be read stops the request, not one image."""
    return BadRequest(error.what, where=error.where, todo=error.todo)
