"""The table of cells: position, shape, intensities and neighbours of every object of one label image.

Vectorised over objects: sums over runs (`label_runs`), so that 70,000 cells cost about as much as 70. Definitions
are scikit-image's `regionprops` where it has them; lengths are in px, coordinates those of pixel centres (the first
pixel's is 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dinoray.errors import BadRequest
from dinoray.vision.label_runs import Runs, runs
from dinoray.vision.neighbours import TOUCHING, nearest, pairs_within, partners
from dinoray.vision.outlines import convex_area, crofton_perimeter

_ROWS = 256


def cell_table(labels: np.ndarray, intensity: np.ndarray | None = None, channel_names: Sequence[str] = (),
               pixel_size_um: float | None = None, neighbour_distance_px: float = 10.0) -> dict[str, np.ndarray]:
    """Columns of equal length, one row per object of `labels` int [Y, X], ascending by id.

    `object_id` (int64), `centroid_y_px`, `centroid_x_px`, `y0`, `x0`, `y1`, `x1` (half-open box), `area_px`, `area_um2`
    (NaN without a pixel size), `equivalent_diameter_px`, `perimeter_px` (Crofton, 4 directions), `major_axis_px`,
    `minor_axis_px`, `eccentricity`, `orientation` (radians from the rows' axis, -pi/2..pi/2), `solidity`, `extent`,
    `form_factor` = 4 pi area / perimeter^2 (about 1 for a disc; cut at 1, which small objects exceed on a raster),
    `touches_border`; `neighbours_touching` (objects that share a side or corner), `neighbours_within` (objects whose
    nearest pixel centre is at most `neighbour_distance_px` from one of this object), `nearest_neighbour_px`
    (centroid to centroid, NaN for a single object).

    With `intensity` [C, Y, X] (raw counts of any integer or float dtype): `intensity_mean_<name>`, `_std_` (of the
    population), `_min_`, `_max_` and `_integrated_` for each of `channel_names`, float64.

    Raises BadRequest for what is no label image, an intensity image of another size or number of channels, names that
    repeat, a pixel size that is not above 0, and a negative neighbour distance.
    """
    if pixel_size_um is not None and not pixel_size_um > 0:
        raise BadRequest(f"pixel_size_um={pixel_size_um}", todo="give a size above 0, or None where it is not known")
    if not neighbour_distance_px >= 0:
        raise BadRequest(f"neighbour_distance_px={neighbour_distance_px}", todo="give 0 or more")
    found = runs(labels)
    numbered, n = found.image(), len(found.ids)
    table = {"object_id": found.ids.astype(np.int64)} | _geometry(found, pixel_size_um)
    area = table["area_px"]
    table["perimeter_px"] = crofton_perimeter(numbered, n)
    table["solidity"] = area / convex_area(found)
    table["form_factor"] = np.minimum(1.0, 4 * np.pi * area / table["perimeter_px"] ** 2)
    table["neighbours_touching"] = partners(pairs_within(numbered, n, TOUCHING), n)
    table["neighbours_within"] = partners(pairs_within(numbered, n, neighbour_distance_px), n)
    table["nearest_neighbour_px"] = nearest(np.stack([table["centroid_y_px"], table["centroid_x_px"]], axis=1))
    if intensity is not None:
        _check_channels(intensity, numbered.shape, channel_names)
        for channel, name in zip(intensity, channel_names, strict=True):
            table |= {f"intensity_{statistic}_{name}": column for statistic, column in _intensity(found, numbered, channel).items()}
    return table


def _geometry(found: Runs, pixel_size_um: float | None) -> dict[str, np.ndarray]:
    height, width = found.shape
    length, middle = found.length, (found.x0 + found.x1 - 1) / 2
    area = found.total(length)
    y, x = found.total(length * found.y) / area, found.total(length * middle) / area
    y0, y1 = found.extreme(found.y, np.minimum), found.extreme(found.y, np.maximum) + 1
    x0, x1 = found.extreme(found.x0, np.minimum), found.extreme(found.x1, np.maximum)
    # second moments about the centroid; a run of n pixels has n (n^2 - 1) / 12 about its own middle
    off_y, off_x = found.y - y[found.index], middle - x[found.index]
    var_y = found.total(length * off_y ** 2) / area
    var_x = found.total(length * off_x ** 2 + length * (length ** 2 - 1) / 12) / area
    cov = found.total(length * off_y * off_x) / area
    half_trace, root = (var_y + var_x) / 2, np.hypot((var_y - var_x) / 2, cov)
    large, small = half_trace + root, np.maximum(half_trace - root, 0)
    with np.errstate(invalid="ignore"):
        eccentricity = np.where(large > 0, np.sqrt(1 - small / large), 0.0)
    angle = np.where(var_x == var_y, np.where(cov > 0, np.pi / 4, -np.pi / 4), 0.5 * np.arctan2(2 * cov, var_y - var_x))
    return {
        "centroid_y_px": y, "centroid_x_px": x, "y0": y0, "x0": x0, "y1": y1, "x1": x1,
        "area_px": area.astype(np.int64),
        "area_um2": area * (pixel_size_um ** 2 if pixel_size_um is not None else np.nan),
        "equivalent_diameter_px": 2 * np.sqrt(area / np.pi),
        "major_axis_px": 4 * np.sqrt(large), "minor_axis_px": 4 * np.sqrt(small),
        "eccentricity": eccentricity, "orientation": angle, "extent": area / ((y1 - y0) * (x1 - x0)),
        "touches_border": (y0 == 0) | (x0 == 0) | (y1 == height) | (x1 == width),
    }


def _check_channels(intensity: np.ndarray, shape: tuple[int, int], names: Sequence[str]) -> None:
    if intensity.ndim != 3 or intensity.shape[1:] != shape:
        raise BadRequest(f"intensities {intensity.shape} for labels {shape}", todo="give [C, Y, X] of the labels' size")
    if len(names) != len(intensity) or len(set(names)) != len(names):
        raise BadRequest(f"{len(intensity)} channels and the names {list(names)}", todo="give each channel a name of its own")


def _intensity(found: Runs, numbered: np.ndarray, channel: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, std, min, max and sum of one channel [Y, X] over each object, float64 [n]; some rows at a time, two passes."""
    m, (height, _) = len(found.index), found.shape
    sums, low, high, squares = (np.zeros(m) for _ in range(4))
    tops = range(0, height, _ROWS)
    cuts = np.searchsorted(found.y, [*tops, height])
    bands = [(slice(cuts[i], cuts[i + 1]), slice(top, top + _ROWS)) for i, top in enumerate(tops) if cuts[i + 1] > cuts[i]]

    def values(band: slice, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """The objects' pixels of some rows, run after run, and where each run begins among them."""
        length = found.length[band]
        return channel[rows][numbered[rows] > 0].astype(np.float64), np.cumsum(length) - length

    for band, rows in bands:
        pixels, begins = values(band, rows)
        sums[band] = np.add.reduceat(pixels, begins)
        low[band], high[band] = np.minimum.reduceat(pixels, begins), np.maximum.reduceat(pixels, begins)
    area, total = found.total(found.length), found.total(sums)
    mean = total / area
    for band, rows in bands:
        pixels, begins = values(band, rows)
        squares[band] = np.add.reduceat((pixels - np.repeat(mean[found.index[band]], found.length[band])) ** 2, begins)
    return {"mean": mean, "std": np.sqrt(found.total(squares) / area), "min": found.extreme(low, np.minimum),
            "max": found.extreme(high, np.maximum), "integrated": total}
