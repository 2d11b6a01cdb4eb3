"""Voxel sizes in nm and the level of a multiscale volume that is read: exact, else the nearest finer one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dinoray.errors import BadRequest
from dinoray.io.ome import to_um
from dinoray.io.volume_grid import Triple
from dinoray.io.volume_source import missing_scale

SAME = 1e-3
"""Voxel sizes that differ by no more than this share are one size."""
_TIME = {"second", "seconds", "s", "sec", "ms", "us", "µs", "ns", "min", "h", "millisecond", "microsecond", "nanosecond",
         "picosecond", "minute", "hour", "day", "year"}


@dataclass(frozen=True)
class Level:
    """One level: its path below the group, voxel size and the centre of its first voxel, z, y, x."""

    name: str
    voxel_size_nm: Triple
    translation_nm: Triple = (0.0, 0.0, 0.0)


def tidy(value: float) -> float:
    """A length without the last digits that a change of unit leaves (0.008 µm * 1000)."""
    return float(f"{value:.12g}")


def show(size: Triple | float) -> str:
    """A voxel size for messages: `8 nm`, `40 x 4 x 4 nm`."""
    values = size if isinstance(size, tuple) else (size,)
    values = values[:1] if len(set(values)) == 1 else values
    return " x ".join(f"{v:g}" for v in values) + " nm"


def unit_nm(unit: str, axis: str, where: str) -> float | None:
    """Nanometres of a unit of length; None for no unit, pixels and units that nobody knows.

    Raises BadRequest for a unit of time.
    """
    if unit.strip().lower() in _TIME:
        raise BadRequest(f"the axis {axis} is measured in {unit!r}, which is no length", where=where,
                         todo="mend the units of the axes in the metadata")
    um = to_um(1.0, unit)
    return None if um is None else tidy(um * 1000)


def check_sizes(sizes: Sequence[float], where: str) -> Triple:
    """Three voxel sizes. Raises BadRequest unless each is a number above 0."""
    if len(sizes) != 3 or any(not math.isfinite(s) or s <= 0 for s in sizes):
        raise BadRequest(f"a scale of {', '.join(f'{s:g}' for s in sizes)}", where=where,
                         todo="voxel sizes are numbers above 0: mend the metadata")
    return (tidy(sizes[0]), tidy(sizes[1]), tidy(sizes[2]))


def choose_level(levels: Sequence[Level], wanted: Triple | float | None, where: str) -> tuple[Level, tuple[str, ...]]:
    """The level of voxel size `wanted` (a number: of its finest axis) and lines for the log; by default the finest.

    Without an exact one (to 1e-3) it is the coarsest of those that are finer on every axis. Raises BadRequest, with the
    list of levels, when there is none.
    """
    finest = min(levels, key=lambda level: math.prod(level.voxel_size_nm))
    if wanted is None:
        return finest, _chosen(finest, levels)
    asked = wanted if isinstance(wanted, tuple) else (float(wanted),)

    def sizes(level: Level) -> tuple[float, ...]:
        return level.voxel_size_nm if len(asked) == 3 else (min(level.voxel_size_nm),)

    exact = [level for level in levels if all(abs(s - a) <= SAME * a for s, a in zip(sizes(level), asked, strict=True))]
    if exact:
        return exact[0], _chosen(exact[0], levels)
    finer = [level for level in levels if all(s <= a * (1 + SAME) for s, a in zip(sizes(level), asked, strict=True))]
    if not finer:
        listed = ", ".join(f"{level.name or 'the volume'}: {show(level.voxel_size_nm)}" for level in levels)
        raise BadRequest(f"no level of {show(wanted)} or finer", where=where, todo=f"choose --raw-voxel-size from {listed}")
    level = max(finer, key=lambda each: math.prod(each.voxel_size_nm))
    return level, (f"no level of {show(wanted)}: reading the next finer one, {level.name or 'the volume'} of "
                   f"{show(level.voxel_size_nm)}",)


def _chosen(level: Level, levels: Sequence[Level]) -> tuple[str, ...]:
    return (f"level {level.name} of {len(levels)}, {show(level.voxel_size_nm)}",) if len(levels) > 1 else ()


def named_level(level: Level, wanted: Triple | float | None, where: str) -> Level:
    """A level that the user named. Raises BadRequest when the voxel size that was asked for is another one."""
    sizes = level.voxel_size_nm if isinstance(wanted, tuple) else (min(level.voxel_size_nm),)
    asked = wanted if isinstance(wanted, tuple) else (wanted,)
    if wanted is not None and any(abs(s - a) > SAME * a for s, a in zip(sizes, asked, strict=True)):  # type: ignore[operator]
        raise BadRequest(f"the dataset has voxels of {show(level.voxel_size_nm)}, not {show(wanted)}", where=where,
                         todo="leave out --raw-voxel-size or name another --dataset")
    return level


def unstated(name: str, ratios: Triple | None, offsets: Triple | None, given: Triple | float | None, why: str, where: str
             ) -> tuple[Level, tuple[str, ...]]:
    """The level of a source that states no voxel size: what the user gave. `ratios`, numbers without a unit, are kept as
    proportions of the axes when one number was given; `offsets` are in the same unknown unit.

    Raises BadRequest when nothing was given.
    """
    if given is None:
        raise missing_scale(why, where)
    if isinstance(given, tuple):
        size = check_sizes(given, "raw_voxel_size")
    elif ratios is None:
        size = check_sizes((given,) * 3, "raw_voxel_size")
    else:
        size = check_sizes([r / min(ratios) * given for r in ratios], where)
    translation = (0.0, 0.0, 0.0)
    if ratios and offsets:
        translation = tuple(tidy(o / r * s) for o, r, s in zip(offsets, ratios, size, strict=True))  # type: ignore[assignment]
    return Level(name, size, translation), (f"{why}: taken as {show(size)}, as --raw-voxel-size says",)
