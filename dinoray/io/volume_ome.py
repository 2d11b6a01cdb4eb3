"""OME-Zarr multiscales (0.1..0.5) of a volume -> axes, units, and the scale and translation of every level.

ome_zarr.py reads the same documents for 2D images. Every value is checked; an ItemError or BadRequest is all that comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dinoray.errors import BadRequest, ItemError
from dinoray.io.ome_zarr import as_dict, as_list, as_number, channel_names, path_below
from dinoray.io.volume_grid import Triple
from dinoray.io.volume_levels import Level, check_sizes, tidy, unit_nm
from dinoray.wording import plural

_AXES = {"channel": "c", "time": "t"}
_TYPES = {"z": "space", "y": "space", "x": "space", "t": "time", "c": "channel"}


@dataclass(frozen=True)
class MultiscaleLevel:
    """A level as it is written: numbers per axis, in the units of the axes; None where there is no scale."""

    path: str
    scale: tuple[float, ...] | None
    translation: tuple[float, ...]


@dataclass(frozen=True)
class Multiscale:
    """The first multiscale image of a group."""

    axes: str
    units_nm: tuple[float | None, ...]
    """Nanometres of the unit of z, y, x; None where there is none, or it is no length."""
    units: tuple[str, ...]
    levels: tuple[MultiscaleLevel, ...]
    channel_names: tuple[str, ...] | None

    def spatial(self, values: tuple[float, ...]) -> Triple:
        """The values of z, y, x."""
        return tuple(values[self.axes.index(a)] for a in "zyx")  # type: ignore[return-value]

    def in_nm(self, where: str) -> list[Level] | None:
        """The levels in nm; None where a unit or a scale is missing. Raises BadRequest for scales that are not above 0."""
        for level in self.levels:
            if level.scale is not None:
                check_sizes(self.spatial(level.scale), f"{where}: {level.path}")
        if any(u is None for u in self.units_nm) or any(level.scale is None for level in self.levels):
            return None
        units: Triple = self.units_nm  # type: ignore[assignment]

        def lengths(values: tuple[float, ...]) -> list[float]:
            return [tidy(v * u) for v, u in zip(self.spatial(values), units, strict=True)]

        return [Level(each.path, check_sizes(lengths(each.scale or ()), where), tuple(lengths(each.translation)))  # type: ignore[arg-type]
                for each in self.levels]


def parse_axes(names: list[str], where: str) -> str:
    """Axis names as one string of t, c, z, y, x. Raises BadRequest for other names, and where z, y or x is missing."""
    joined = "".join(names)
    if any(name not in tuple("tczyx") for name in names) or len(set(names)) < len(names):
        raise BadRequest(f"unknown axes: {', '.join(names)[:100]}", where=where,
                         todo="volumes have the axes z, y, x and, where there are any, t and c: write it with these")
    if not {"z", "y", "x"} <= set(joined):
        raise BadRequest(f"an image without depth (axes {', '.join(names) or 'none'}), not a volume", where=where,
                         todo="images are read by `dinoray extract images`")
    return joined


def axis_name(name: Any) -> str:
    """`channel`, `Channel`, `c^` -> c."""
    text = str(name).strip().lower().rstrip("^")
    return _AXES.get(text, text)


def parse_multiscale(attributes: dict[str, Any], where: str) -> Multiscale:
    """The first multiscale of a group that has some.

    Raises BadRequest: unknown axes, no z, units of time for a length; ItemError `decode` for what is no multiscale.
    """
    scales = as_list(attributes["multiscales"], "multiscales", where)
    multiscale = as_dict(scales[0] if scales else None, "multiscales", where)
    described = as_list(multiscale.get("axes", list("tczyx")), "axes", where)[:16]  # 0.1 and 0.2 had no choice
    dicts = [{"name": axis} if isinstance(axis, str) else as_dict(axis, "axes", where) for axis in described]
    axes = parse_axes([axis_name(axis.get("name", "")) for axis in dicts], where)
    for axis, each in zip(axes, dicts, strict=True):
        if each.get("type") not in (None, "", _TYPES[axis]):
            raise BadRequest(f"the axis {axis} is of the type {str(each['type'])[:60]!r}", where=where,
                             todo="mend the axes in the metadata")
    units = tuple(str(dicts[axes.index(a)].get("unit") or "")[:60] for a in "zyx")
    datasets = as_list(multiscale.get("datasets"), "datasets", where)
    if not datasets:
        raise ItemError("decode", "the image has no level", where=where)
    levels = []
    for dataset in datasets:
        dataset = as_dict(dataset, "datasets", where)
        path = path_below(dataset.get("path"), where)
        scale, translation = _combined(dataset, multiscale, len(axes), where)
        levels.append(MultiscaleLevel(path, scale, translation))
    if len({level.path for level in levels}) < len(levels):
        raise ItemError("decode", "two levels have one path", where=where)
    return Multiscale(axes, tuple(unit_nm(u, a, where) for u, a in zip(units, "zyx", strict=True)), units, tuple(levels),
                      channel_names(attributes, where))


def _combined(dataset: dict[str, Any], multiscale: dict[str, Any], ndim: int, where: str
              ) -> tuple[tuple[float, ...] | None, tuple[float, ...]]:
    """The transformations of a level, then those of the whole image, each list in its order: (scale, translation)."""
    scale, translation, stated = [1.0] * ndim, [0.0] * ndim, False
    for owner in (dataset, multiscale):
        for transform in as_list(owner.get("coordinateTransformations") or [], "coordinateTransformations", where):
            transform = as_dict(transform, "coordinateTransformations", where)
            kind = transform.get("type", "scale" if "scale" in transform else "translation" if "translation" in transform else "")
            if kind == "identity":
                continue
            if kind not in ("scale", "translation") or kind not in transform:
                raise ItemError("unsupported", f"a coordinate transformation of the type {str(kind)[:60]!r}", where=where,
                                todo="write it with scale and translation as numbers in the metadata")
            values = [as_number(n, kind, where) for n in as_list(transform[kind], kind, where)]
            if len(values) != ndim:
                raise ItemError("decode", f"a {kind} of {plural(len(values), 'number')} for {ndim} axes", where=where)
            if kind == "scale":
                stated |= owner is dataset or not dataset.get("coordinateTransformations")
                scale = [s * v for s, v in zip(scale, values, strict=True)]
                translation = [t * v for t, v in zip(translation, values, strict=True)]
            else:
                translation = [t + v for t, v in zip(translation, values, strict=True)]
    return tuple(scale) if stated else None, tuple(translation)
