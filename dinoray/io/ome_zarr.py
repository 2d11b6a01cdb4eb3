"""OME-Zarr metadata (0.1..0.5) -> what is an image, a plate, a well; every value is checked as attacker's text.

Only JSON is read here. An `ItemError` (decode, unsupported, too_large) is all that comes out for any text.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from dinoray.errors import BadRequest, ItemError
from dinoray.io.ome import isotropic, to_um
from dinoray.io.stores import safe_join

MAX_FIELDS = 10_000
"""Wells of a plate, fields of a well, images of a file, channels: longer lists are no plate (3456 wells is the most)."""


MAX_NAME = 256
"""Characters of a channel's name; it stands in every row."""


@dataclass(frozen=True)
class ImageGroup:
    """A multiscale image: its axes (slowest first, of t, c, z, y, x), the path of the full resolution level
    below the group, and what the metadata say of channels and of the pixels' size."""

    axes: str
    level: str
    channel_names: tuple[str, ...] | None = None
    pixel_size_um: float | None = None


@dataclass(frozen=True)
class WellRef:
    """A well of a plate: its path below the plate, its row and column by name ("A", "1")."""

    path: str
    row: str
    column: str


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises ItemError `decode` for everything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ItemError("decode", f"the metadata are no JSON: {str(error)[:200]}", where=where) from error
    return as_dict(value, "the metadata", where)


def ome_attributes(document: dict[str, Any], where: str) -> dict[str, Any]:
    """The OME part of a group's document: `attributes.ome` of a zarr.json (0.5), else a .zattrs as it is."""
    if document.get("zarr_format") != 3:
        return document
    attributes = as_dict(document.get("attributes", {}), "attributes", where)
    return as_dict(attributes.get("ome", attributes), "ome", where)


def parse_image(attributes: dict[str, Any], where: str, *, labels: bool = False) -> ImageGroup | None:
    """The first multiscale image of a group; None when the group is no image. `labels`: one that is a label image is wanted.

    Raises ItemError `unsupported` for a label image where none is wanted, and for axes other than t, c, z, y, x with y and x last.
    """
    if "multiscales" not in attributes:
        return None
    if "image-label" in attributes and not labels:
        raise ItemError("unsupported", "a label image, not an image", where=where,
                        todo="name the image that the labels belong to")
    scales = as_list(attributes["multiscales"], "multiscales", where)
    if not scales:
        raise ItemError("decode", "multiscales is empty", where=where)
    multiscale = as_dict(scales[0], "multiscales", where)
    datasets = [as_dict(d, "datasets", where) for d in as_list(multiscale.get("datasets"), "datasets", where)]
    if not datasets:
        raise ItemError("decode", "the image has no level", where=where)
    names, units = _axes(multiscale, where)
    sizes = [1.0] * len(names)
    for owner in (datasets[0], multiscale):
        for transform in as_list(owner.get("coordinateTransformations", []), "coordinateTransformations", where):
            scale = as_dict(transform, "coordinateTransformations", where).get("scale")
            if scale is not None:
                factors = [as_number(n, "scale", where) for n in as_list(scale, "scale", where)]
                if len(factors) != len(names):
                    raise ItemError("decode", f"a scale of {len(factors)} numbers for axes {names}", where=where)
                sizes = [size * factor for size, factor in zip(sizes, factors, strict=True)]
    y_um, x_um = (to_um(sizes[i], units[i]) for i in (-2, -1))
    level = path_below(datasets[0].get("path"), where)
    return ImageGroup(names, level, channel_names(attributes, where), isotropic(x_um, y_um))


def _axes(multiscale: dict[str, Any], where: str) -> tuple[str, list[str]]:
    """Axis names as one string, and the unit of each ("" where unknown)."""
    axes = as_list(multiscale.get("axes", list("tczyx")), "axes", where)[:16]  # 0.1 and 0.2 had no choice
    dicts = [{"name": axis} if isinstance(axis, str) else as_dict(axis, "axes", where) for axis in axes]
    names = [str(axis.get("name", "")).lower() for axis in dicts]
    joined = "".join(names)
    if any(name not in tuple("tczyx") for name in names) or len(set(names)) < len(names) or joined[-2:] != "yx":
        raise ItemError("unsupported", f"axes {', '.join(names)[:100]}; images have some of t, c, z and then y, x",
                        where=where, todo="write the image with these axes")
    return joined, [str(axis.get("unit") or "") for axis in dicts]


def channel_names(attributes: dict[str, Any], where: str) -> tuple[str, ...] | None:
    """The names in `omero`, one for each channel; None where they are not all there, or not all different."""
    omero = attributes.get("omero")
    if not isinstance(omero, dict) or not isinstance(omero.get("channels"), list):
        return None
    labels = [c.get("label") if isinstance(c, dict) else None for c in omero["channels"][:MAX_FIELDS]]
    if not all(isinstance(label, str) and 0 < len(label) <= MAX_NAME for label in labels) or len(set(labels)) < len(labels):
        return None
    return tuple(labels)


def parse_plate(attributes: dict[str, Any], where: str) -> list[WellRef] | None:
    """The wells of a plate, in the order of rows and columns; None when the group is no plate."""
    if "plate" not in attributes:
        return None
    plate = as_dict(attributes["plate"], "plate", where)
    wells = []
    for well in as_list(plate.get("wells"), "plate.wells", where):
        path = path_below(as_dict(well, "plate.wells", where).get("path"), where)
        row, slash, column = path.partition("/")
        if not slash or "/" in column:
            raise ItemError("decode", f"a well at {path[:100]!r} instead of row/column", where=where)
        wells.append(WellRef(path, row, column))
    if len({well.path for well in wells}) < len(wells):
        raise ItemError("decode", "the plate names a well twice", where=where)
    return sorted(wells, key=lambda w: (len(w.row), w.row, len(w.column), w.column))


def parse_well(attributes: dict[str, Any], where: str) -> list[tuple[str, str | None]]:
    """(path below the well, acquisition) of each field. Raises ItemError `decode` when the group is no well."""
    well = as_dict(attributes.get("well"), "well", where)
    fields = []
    for image in as_list(well.get("images"), "well.images", where):
        acquisition = as_dict(image, "well.images", where).get("acquisition")
        fields.append((path_below(image.get("path"), where), None if acquisition is None else str(acquisition)[:64]))
    if len({path for path, _ in fields}) < len(fields):
        raise ItemError("decode", "the well names a field twice", where=where)
    return fields


def parse_series(attributes: dict[str, Any], where: str) -> list[str]:
    """The images that the `OME` group of the bioformats2raw layout names."""
    return [path_below(path, where) for path in as_list(attributes.get("series", []), "series", where)]


def path_below(path: Any, where: str) -> str:
    """A path of the metadata when it stays below its group. Raises ItemError `bad_path`."""
    try:
        path = safe_join(path if isinstance(path, str) else "")
        if "::" in path or "://" in path:  # would be a chained URL below a remote group
            raise BadRequest("not a usable key part")
        return path
    except BadRequest as error:
        raise ItemError("bad_path", f"the metadata name the path {str(path)[:100]!r}", where=where) from error


def as_dict(value: Any, name: str, where: str) -> dict[str, Any]:
    """The value when it is a JSON object. Raises ItemError `decode`."""
    if not isinstance(value, dict):
        raise ItemError("decode", f"{name}: not a JSON object", where=where)
    return value


def as_list(value: Any, name: str, where: str) -> list[Any]:
    """The value when it is a list of at most MAX_FIELDS. Raises ItemError `decode`."""
    if not isinstance(value, list) or len(value) > MAX_FIELDS:
        raise ItemError("decode", f"{name}: not a list, or one of over {MAX_FIELDS:,} entries", where=where)
    return value


def as_number(value: Any, name: str, where: str) -> float:
    """The value when it is a finite number. Raises ItemError `decode`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not math.isfinite(value):
        raise ItemError("decode", f"{name}: not a number", where=where)
    return float(value)
