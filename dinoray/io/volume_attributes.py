"""Voxel sizes that plain arrays state in their attributes (funlib and daisy, COSEM, N5), in the order z, y, x."""

from __future__ import annotations

from typing import Any

from dinoray.errors import BadRequest
from dinoray.io.ome_zarr import as_dict, as_list, as_number
from dinoray.io.volume_grid import Triple
from dinoray.io.volume_levels import Level, check_sizes, choose_level, tidy, unit_nm, unstated
from dinoray.io.volume_ome import axis_name
from dinoray.wording import plural

Notes = tuple[str, ...]


def plain_level(attributes: dict[str, Any], axes: str, name: str, wanted: Triple | float | None, where: str) -> tuple[Level, Notes]:
    """The only level of an array with attributes in the order of its axes: COSEM's `transform`, or `resolution` (also
    `voxel_size`), `offset` and `units` of funlib, in nm unless units say otherwise; without any, what the user gave.

    `offset` is the corner of the first voxel (funlib), `translate` its centre (COSEM). Raises BadRequest, ItemError `decode`.
    """
    level = cosem_transform(attributes, name, where)
    if level is None:
        level = _funlib(attributes, axes, name, where)
    if level is None:
        return unstated(name, None, None, wanted, "the array states no voxel size", where)
    if isinstance(level, str):
        return unstated(name, None, None, wanted, level, where)
    return choose_level([level], wanted, where)


def _funlib(attributes: dict[str, Any], axes: str, name: str, where: str) -> Level | str | None:
    """None: nothing is said; a text: why what is said is no size."""
    key = next((k for k in ("voxel_size", "resolution") if attributes.get(k) is not None), None)
    if key is None:
        return None
    sizes = spatial(attributes[key], axes, key, where)
    units = attributes.get("units", attributes.get("unit"))
    if units is None or units == "" or units == []:
        factors: list[float | None] = [1.0] * 3
    elif isinstance(units, str):
        factors = [unit_nm(units, "zyx", where)] * 3
    else:
        listed = [str(u) for u in as_list(units, "units", where)]
        listed = [listed[axes.index(a)] for a in "zyx"] if len(listed) == len(axes) else listed
        if len(listed) != 3:
            raise BadRequest(f"{plural(len(listed), 'unit')} for the axes {axes}", where=where, todo="mend the attribute units")
        factors = [unit_nm(u, a, where) for u, a in zip(listed, "zyx", strict=True)]
    if any(f is None for f in factors):
        return f"the units {str(units)[:60]!r} are no lengths"
    check_sizes(sizes, where)
    size = check_sizes([s * f for s, f in zip(sizes, factors, strict=True)], where)  # type: ignore[operator]
    translation = (0.0, 0.0, 0.0)
    if attributes.get("offset") is not None:
        offset = spatial(attributes["offset"], axes, "offset", where)
        translation = tuple(tidy(o * f + s / 2) for o, f, s in zip(offset, factors, size, strict=True))  # type: ignore[assignment,operator]
    return Level(name, size, translation)


def spatial(values: Any, axes: str, key: str, where: str) -> list[float]:
    """Numbers for z, y, x from a list with one for each of the axes, or for each of z, y, x in their order in `axes`."""
    numbers = [as_number(v, key, where) for v in as_list(values, key, where)]
    order = axes if len(numbers) == len(axes) else "".join(a for a in axes if a in "zyx")
    if len(numbers) != len(order):
        raise BadRequest(f"{key}: {plural(len(numbers), 'number')} for the axes {axes}", where=where,
                         todo=f"mend the attribute {key}")
    return [numbers[order.index(a)] for a in "zyx"]


def cosem_transform(attributes: dict[str, Any], name: str, where: str) -> Level | None:
    """COSEM's `transform`: axes, scale, translate, units in one order, that of the axes it names (`order`: F reverses)."""
    if not isinstance(attributes.get("transform"), dict) or "scale" not in attributes["transform"]:
        return None
    transform = as_dict(attributes["transform"], "transform", where)
    axes = "".join(axis_name(a) for a in as_list(transform.get("axes", ["z", "y", "x"]), "transform.axes", where)[:16])
    if sorted(axes) != ["x", "y", "z"]:
        raise BadRequest(f"a transform of the axes {axes[:60]!r}", where=where, todo="mend the attribute transform")
    units = [str(u) for u in as_list(transform.get("units", ["nm"] * 3), "transform.units", where)]
    if len(units) != 3:
        raise BadRequest(f"{plural(len(units), 'unit')} for the axes {axes}", where=where, todo="mend the attribute transform")
    factors = [unit_nm(units[axes.index(a)], a, where) for a in "zyx"]
    if any(f is None for f in factors):
        return None
    scale = check_sizes(spatial(transform["scale"], axes, "transform.scale", where), where)
    translate = spatial(transform.get("translate", [0.0] * 3), axes, "transform.translate", where)
    size = check_sizes([s * f for s, f in zip(scale, factors, strict=True)], where)  # type: ignore[operator]
    return Level(name, size, tuple(tidy(t * f) for t, f in zip(translate, factors, strict=True)))  # type: ignore[arg-type,operator]
