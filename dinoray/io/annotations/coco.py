"""COCO data sets (LIVECell): a folder of images, and a JSON with polygons or run lengths of their objects.

Polygons become pixels as pycocotools draws them. Objects are numbered 1, 2, ... in the order of the file. Where they
overlap, the smaller one keeps the pixel (of equal ones the lower number), so that no object vanishes below another.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as pycoco

from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest, ItemError
from dinoray.io.annotations.coco_json import CocoImage, Outline, Runs, read_coco, unreadable
from dinoray.io.annotations.found import Found, files_of
from dinoray.io.annotations.rle import object_runs, parse_counts
from dinoray.io.decoded import Limits, check_limits
from dinoray.io.grouping import group_of, relative_to
from dinoray.io.items import FileRef, Item
from dinoray.io.objects import image_stem


@dataclass(frozen=True)
class CocoObjects:
    """The objects of one image of a COCO JSON."""

    file: FileRef
    image: CocoImage

    @property
    def files(self) -> tuple[FileRef, ...]:
        return (self.file,)

    def read(self, limits: Limits) -> np.ndarray:
        where = f"{self.file.uri}#{self.image.file_name}"
        check_limits(where, limits, height=self.image.height, width=self.image.width, itemsize=4)
        return draw(read_coco(self.file).outlines.get(self.image.number, []), (self.image.height, self.image.width), where)


def draw(outlines: list[Outline], shape: tuple[int, int], where: str) -> np.ndarray:
    """Labels [Y, X] int32 of outlines: object i + 1 is the i-th; the smaller one keeps a shared pixel.

    Raises ItemError `bad_labels` for an object without an outline, and for outlines that cannot be of this image.
    """
    runs = [_runs(outline, shape, f"{where}, object {number}") for number, outline in enumerate(outlines, 1)]
    areas = [int((run[:, 1] - run[:, 0]).sum()) for run in runs]
    labels = np.zeros(shape[0] * shape[1], np.int32)
    for i in sorted(range(len(runs)), key=lambda i: (-areas[i], -i)):  # what is drawn last stays
        for start, end in runs[i].tolist():
            labels[start:end] = i + 1
    return np.ascontiguousarray(labels.reshape(shape[1], shape[0]).T)


def _runs(outline: Outline, shape: tuple[int, int], where: str) -> np.ndarray:
    """Start and end of an object's runs [N, 2] in the column-major image."""
    height, width = shape
    if outline is None:
        raise ItemError("bad_labels", "an object without an outline (a box alone is none)", where=where)
    try:
        if isinstance(outline, Runs):
            if outline.size != shape:
                raise ValueError(f"run lengths of an image of {outline.size}, this one is {shape}")
            counts = parse_counts(outline.counts) if isinstance(outline.counts, bytes) else outline.counts
            return object_runs(counts, height * width)
        if not outline:
            return np.empty((0, 2), np.int64)
        polygons = [np.frombuffer(part, np.float64) for part in outline]
        reach = max(float(np.abs(part).max()) for part in polygons)
        if not reach <= 2 * max(shape):  # NaN is not either
            raise ValueError(f"a polygon that reaches {reach:g}, in an image of {height} x {width}")
    except ValueError as error:
        raise ItemError("bad_labels", str(error), where=where) from error
    drawn = pycoco.merge(pycoco.frPyObjects([part.tolist() for part in polygons], height, width))
    return object_runs(parse_counts(drawn["counts"]), height * width)


def list_coco(source: LabelledSource) -> list[Found]:
    """The images that the JSON names, found below the images' folder by name; what it does not name is left out.

    Raises BadRequest for a JSON that is none, and when there is none or several and `labels` does not say which.
    """
    json_file = find_json(source)
    try:
        coco = read_coco(json_file)
    except ItemError as error:
        raise unreadable(error) from error
    items, listing = files_of(source.images)
    by_name: dict[str, list[tuple[str, Item]]] = defaultdict(list)
    for item in items:
        path = relative_to(listing.root, item.files[0].uri)
        by_name[posixpath.basename(path)].append((path, item))
    found = []
    for image in coco.images:
        place, problem = _place(image.file_name.replace("\\", "/"), by_name)
        if place is None:
            nothing = Item(image.file_name, ())
            found.append(Found(image_stem(image.file_name), nothing, "", None, problem))
            continue
        path, item = place
        group = group_of(item.metadata, path)
        found.append(Found(image_stem(path), item, group, CocoObjects(json_file, image), item.problem))
    return found


def _place(name: str, by_name: dict[str, list[tuple[str, Item]]]) -> tuple[tuple[str, Item] | None, str | None]:
    places = by_name.get(posixpath.basename(name), [])
    if len(places) > 1:  # the folders that the JSON names decide
        exact = [place for place in places if place[0] == name or place[0].endswith("/" + name.removeprefix("./"))]
        if len(exact) != 1:
            return None, f"ambiguous_images: {len(places)} files of this name, {', '.join(sorted(p for p, _ in places)[:3])}"
        places = exact
    return (places[0], None) if places else (None, "missing: the JSON names it, and no file is called so")


def find_json(source: LabelledSource) -> FileRef:
    """The JSON of a source: `labels`, or the only one below the images. Raises BadRequest when that is not one file."""
    path = source.labels or f"{source.images.rstrip('/')}/**/*.json"
    items, _ = files_of(path)
    if len(items) != 1:
        names = ", ".join(posixpath.basename(item.files[0].uri) for item in items[:5])
        raise BadRequest(f"{len(items)} JSON files: {names}", where=path, todo="name the one of this source as `labels`")
    return items[0].files[0]
