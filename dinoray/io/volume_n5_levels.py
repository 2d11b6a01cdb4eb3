"""Voxel sizes in the attributes of N5 levels: COSEM, N5-viewer and BigDataViewer, Paintera. Lists are x, y, z there.

`resolution` is in nm unless units say otherwise (Paintera); `pixelResolution` names its unit. Both are those of the full
resolution where a level repeats what s0 says or inherits it from its group, and are then multiplied by the level's factors.
`offset` is the centre of the first voxel of s0 (Paintera). A level of factor f averages f voxels: it begins (f-1)/2 later.
"""

from __future__ import annotations

from typing import Any

from dinoray.errors import BadRequest
from dinoray.io.ome_zarr import as_list, as_number
from dinoray.io.volume_attributes import cosem_transform
from dinoray.io.volume_grid import Triple
from dinoray.io.volume_levels import SAME, Level, check_sizes, tidy, unit_nm
from dinoray.wording import plural


def n5_level(name: str, own: dict[str, Any], group: dict[str, Any], first: dict[str, Any], where: str) -> Level | None:
    """The level `name` by its own attributes, those of its group and of s0; None where nobody states a size.

    Raises BadRequest for sizes that are not above 0 and units of time, ItemError `decode` for what is no number.
    """
    level = _in_multiscales(name, group, where) or cosem_transform(own, name, where)
    if level is not None:
        return level
    mine, base = _resolution(own, where), _resolution(first, where) or _resolution(group, where)
    if mine is None and base is None:
        return None
    factors = _factors(name, own, group, where)
    repeats = mine is None or base is not None and all(abs(m - b) <= SAME * b for m, b in zip(mine, base, strict=True))
    if repeats:
        size: Triple = tuple(b * f for b, f in zip(base or (), factors, strict=True))  # type: ignore[assignment]
    else:
        size = mine  # type: ignore[assignment]
    full: Triple = tuple(s / f for s, f in zip(size, factors, strict=True))  # type: ignore[assignment]
    offset = next((_triple(each["offset"], "offset", where) for each in (own, group, first) if each.get("offset") is not None),
                  (0.0, 0.0, 0.0))
    translation = tuple(tidy(o + (f - 1) / 2 * r) for o, f, r in zip(offset, factors, full, strict=True))
    return Level(name, check_sizes(size, where), translation)  # type: ignore[arg-type]


def _in_multiscales(name: str, group: dict[str, Any], where: str) -> Level | None:
    """COSEM's group attribute: multiscales[0].datasets[i] = {path, transform}."""
    scales = group.get("multiscales")
    datasets = scales[0].get("datasets") if isinstance(scales, list) and scales and isinstance(scales[0], dict) else None
    for dataset in datasets if isinstance(datasets, list) else []:
        if isinstance(dataset, dict) and str(dataset.get("path", "")).strip("/") == name:
            return cosem_transform(dataset, name, where)
    return None


def _resolution(attributes: dict[str, Any], where: str) -> Triple | None:
    """Voxel size in nm, z, y, x; None where none is stated with a unit of length."""
    value, units = attributes.get("pixelResolution"), attributes.get("units")
    if isinstance(value, dict):
        value, units = value.get("dimensions"), value.get("unit")
    elif value is None:
        value = attributes.get("resolution")
        units = "nm" if units is None else units
    if value is None:
        return None
    listed = [str(u) for u in units] if isinstance(units, list) and len(units) == 3 else [str(units or "")] * 3
    factors = [unit_nm(u, a, where) for u, a in zip(reversed(listed), "zyx", strict=True)]
    if any(f is None for f in factors):
        return None
    sizes = check_sizes(_triple(value, "resolution", where), where)
    return tuple(tidy(s * f) for s, f in zip(sizes, factors, strict=True))  # type: ignore[return-value,operator]


def _factors(name: str, own: dict[str, Any], group: dict[str, Any], where: str) -> Triple:
    """How many voxels of s0 one of the level stands for."""
    value = own.get("downsamplingFactors")
    if value is None:
        number = int(name[1:]) if name[1:].isdecimal() and name[:1] == "s" else 0
        listed = next((group[k] for k in ("downsamplingFactors", "scales") if isinstance(group.get(k), list)), [])
        value = listed[number] if number < len(listed) and isinstance(listed[number], list) else [1, 1, 1]
        if value == [1, 1, 1] and number and not listed:
            raise BadRequest(f"level {name} states no downsampling factors", where=where,
                             todo="add downsamplingFactors to its attributes, or read s0 (--dataset)")
    return check_sizes(_triple(value, "downsamplingFactors", where), where)


def _triple(value: Any, key: str, where: str) -> Triple:
    """Three numbers of N5, turned around to z, y, x."""
    numbers = [as_number(n, key, where) for n in as_list(value, key, where)]
    if len(numbers) != 3:
        raise BadRequest(f"{key}: {plural(len(numbers), 'number')} instead of x, y, z", where=where,
                         todo=f"mend the attribute {key}")
    return (numbers[2], numbers[1], numbers[0])
