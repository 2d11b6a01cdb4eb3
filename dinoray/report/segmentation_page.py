"""The page of a run of `dinoray segment cells`: what was found, pictures with outlines, distributions, plates, what to look at."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from dinoray.errors import OutputDamaged
from dinoray.report import plots
from dinoray.report.overlays import Overlay, draw_overlays, scale_words
from dinoray.report.page import CELLS, environment, run_facts, stage_facts
from dinoray.report.platemaps import view_plates
from dinoray.report.plates import read_plates
from dinoray.report.plots import number
from dinoray.report.quarantine import plates_by_loss, quarantine_reasons
from dinoray.report.run import Run
from dinoray.report.scatter import POINTS, scatter
from dinoray.report.segmented import Found, border_shares, intensity_column, read_segmented

PLATES_LISTED = 12
LISTED = 4
"""Images listed for each reason to look at them."""
BLURRED = 3
"""An image is listed for its focus where that is so many times below the median image's."""
ENOUGH_CELLS = 5
"""Images of fewer cells say little by the share of their cells at the border."""


def render_segmentation(run: Run) -> str:
    """The page's text. Raises OutputDamaged when a table, a mask or a record is missing or unreadable."""
    found = read_segmented(run)
    overlays = draw_overlays(run, found)
    losses = plates_by_loss(run)
    plates = read_plates(replace(run, parts=run.image_parts))
    return environment().get_template("segmentation.html.j2").render(
        head=_head(run), run=run, tally=run.tally, found=found, totals=_totals(run, found), overlays=overlays,
        lost_images=sum(not one.image for one in overlays), scales=_scales(found), plots=_plots(found), scatters=_scatters(found),
        listed=_listed(found), plates=view_plates(plates),
        stages=stage_facts(run, CELLS), reasons=quarantine_reasons(run), losses=losses[:PLATES_LISTED], num_losses=len(losses),
        lost="masks", reading=repr(run.store.url), examples=_first(overlays))


def _head(run: Run) -> dict[str, Any]:
    try:
        settings, described = run.settings, run.plan.facts["described"]
        trained, low_high = described["checkpoint"], described["checkpoint"]["scaling_percents"]
        scaling = {"plate": "per plate or folder and channel", "image": "per image", "dtype": "the full range of the dtype"}
        percents = "" if settings["scaling"] == "dtype" else f", percentiles {low_high[0]:g} to {low_high[1]:g}"
        markers = {"components": f"connected parts above {settings['peak']:g}",
                   "hmaxima": f"maxima above {settings['peak']:g} that rise by {settings['marker_height']:g}"}
        smallest = f"; smaller than {settings['min_area_px']} px dropped" if settings["min_area_px"] else ""
        size, pixel = trained["median_diameter_px"], trained["pixel_size_um"]
        given = [f"{name} given: {settings[key]:g} {unit}" for name, key, unit in
                 (("diameter", "diameter_px", "px"), ("pixel size", "pixel_size_um", "µm")) if settings[key] is not None]
        return {**run_facts(run), "random": False, "checkpoint": run.job["weights"]["source"],
                "cells": f"{markers[settings['markers']]}, filled down to {settings['fill']:g}{smallest}",
                "trained": ", ".join(([f"median diameter {number(size)} px"] if size else []) +
                                     ([f"{number(pixel)} µm/px"] if pixel else [])) or "not recorded",
                "given": "; ".join(given), "channel": settings["channel"],
                "scaling": f"{scaling[settings['scaling']]}{percents}",
                "masks": {"tiff": "int32 TIFF", "zarr": "OME-Zarr labels"}[settings["masks"]],
                "later": [f"{g.kind} {g.number}: {g.plan.num_items:,} images" for g in run.generations[1:]]}
    except (KeyError, TypeError) as error:
        raise OutputDamaged(f"the records of the run lack {error}", where=f"{run.store.url}/_dinoray",
                            todo="restore job.json and plan/ from a copy") from error


def _totals(run: Run, found: Found) -> dict[str, Any]:
    counts, diameters = found.values("num_cells"), found.values("median_diameter_px")
    known = diameters[np.isfinite(diameters)]
    return {"images": found.num_images, "cells": run.tally.rows, "empty": int((counts == 0).sum()),
            "median_cells": number(float(np.median(counts))) if len(counts) else "–",
            "median_diameter": number(float(np.median(known))) if len(known) else "–"}


def _scales(found: Found) -> list[dict[str, Any]]:
    """How images came to the model's scale: per source the number of images and their factors."""
    sources, factors = found.images["scale_source"].to_pylist(), found.values("scale")
    rows = []
    for source, count in sorted(Counter(sources).items(), key=lambda pair: (-pair[1], str(pair[0]))):
        mine = factors[[one == source for one in sources]]
        mine = mine[np.isfinite(mine)]
        low, median, high = (number(float(v)) for v in np.percentile(mine, (0, 50, 100))) if len(mine) else ("–",) * 3
        rows.append({"source": scale_words(source), "count": count, "median": median, "low": low, "high": high,
                     "plot": plots.histogram(mine)})
    return rows


def _plots(found: Found) -> list[tuple[str, str, plots.Histogram]]:
    """(title, what of, histogram)."""
    images, cells = "images", "cells"
    shown = [("cells in an image", images, found.values("num_cells")),
             ("share of the image covered", images, found.values("cell_fraction")),
             ("focus (sharpness)", images, found.values("focus")), ("median intensity", images, found.values("p50"))]
    columns = [("equivalent_diameter_px", "diameter, px"), ("area_um2", "area, µm²"), ("form_factor", "form factor (1: a disc)"),
               ("solidity", "solidity (1: convex)"), ("neighbours_within", "neighbours"),
               ("nearest_neighbour_px", "distance to the nearest cell, px")]
    table = found.cells.table
    shown += [(title, cells, table[name].to_numpy(zero_copy_only=False).astype(np.float64)) for name, title in columns
              if name in table.column_names and table[name].null_count < table.num_rows]
    return [(title, what, plots.histogram(values)) for title, what, values in shown]


def _scatters(found: Found) -> list[dict[str, Any]]:
    """Mean intensity of the sampled cells over their area; cells in an image over their size."""
    table, shown = found.cells.table, []
    channels = found.images["channel"].to_pylist()
    name = intensity_column(table, Counter(channels).most_common(1)[0][0] if channels else None)
    if name is not None and "area_px" in table.column_names:
        area, mean = (table[column].to_numpy(zero_copy_only=False).astype(np.float64) for column in ("area_px", name))
        channel = name.removeprefix("intensity_mean_")[:60]
        shown.append({"title": "Intensity and area of cells",
                      "svg": scatter(area, mean, x_label="area, px", y_label="mean intensity"),
                      "note": f"One point for each of {min(len(area), POINTS):,} cells; raw counts of channel {channel}."})
    diameter, counts = found.values("median_diameter_px"), found.values("num_cells")
    shown.append({"title": "Number and size of cells",
                  "svg": scatter(diameter, counts, x_label="median diameter, px", y_label="cells"),
                  "note": f"One point for each of {min(int(np.isfinite(diameter).sum()), POINTS):,} images with cells."})
    return [one for one in shown if one["svg"]]


def _listed(found: Found) -> list[dict[str, Any]]:
    """Images to look at first, and why; each once, for the first of its reasons."""
    counts, scales, covered, focus = (found.values(name) for name in ("num_cells", "scale", "cell_fraction", "focus"))
    shares = sorted((one for one in border_shares(found.cells) if one[1] >= ENOUGH_CELLS and one[2] > 0), key=lambda one: -one[2])
    rows = {item_id: row for row, item_id in enumerate(found.images["item_id"].to_pylist())}
    wanted = [(rows[item_id], f"{share:.0%} of {count:,} cells are cut by the border") for item_id, count, share in shares[:LISTED]
              if item_id in rows]
    wanted += [(int(row), f"cells cover {covered[row]:.0%} of it") for row in np.argsort(-covered, kind="stable")[:LISTED]
               if covered[row] > 0.5]
    far = np.abs(np.log(np.where(scales > 0, scales, 1.0)))
    wanted += [(int(row), f"resampled by {number(float(scales[row]))} for the model")
               for row in np.argsort(-far, kind="stable")[:LISTED] if far[row] > np.log(1.5)]
    wanted += [(int(row), "no cells") for row in np.flatnonzero(counts == 0)[:LISTED]]
    wanted += [(int(row), f"little focus: {number(float(focus[row]))}") for row in np.argsort(focus, kind="stable")[:LISTED]
               if counts[row] and focus[row] < np.median(focus) / BLURRED]
    said: dict[int, list[str]] = {}
    for row, why in wanted:
        said.setdefault(row, []).append(why)
    return [{"item_id": found.images["item_id"][row].as_py(), "why": "; ".join(why), "cells": int(counts[row]),
             "covered": f"{covered[row]:.0%}", "scale": number(float(scales[row])) if np.isfinite(scales[row]) else "–",
             "source": scale_words(found.images["scale_source"][row].as_py())} for row, why in said.items()]


def _first(overlays: list[Overlay]) -> str | None:
    """An item id for the lines on reading, as Python writes it."""
    return repr(overlays[0].item_id) if overlays else None
