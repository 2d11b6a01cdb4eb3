"""Pictures of segmented images: the image as the model saw it, and the outlines of its cells to lie over it.

Of an image larger than `WINDOW` px the window with most cell area is shown, so that outlines can be told apart; of one that
is too large to be decoded for a picture, the cells in its middle alone. An image
that cannot be read again is told of, and its cells are shown as coloured areas.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from dinoray.errors import DinorayError, ItemError
from dinoray.io.images import load_item
from dinoray.io.items import Item
from dinoray.io.mask_files import read_mask, read_mask_part
from dinoray.report import outlines
from dinoray.report.gallery import planned_items
from dinoray.report.pictures import LIMITS, READERS, as_uint8, data_uri, one_line, read_scaling, shrink
from dinoray.report.plots import number
from dinoray.report.run import Run
from dinoray.report.sample import evenly
from dinoray.report.segmented import Found
from dinoray.vision.intensity import Scaling
from dinoray.vision.segmentation_input import planes

SPREAD, EXTREMES = 6, 2
"""Images spread evenly over the collection; images with most cells, with fewest, ..."""
WINDOW = 1024
"""Longest side of what is shown of an image, in px of the image."""
SIDE = 560
"""Longest side of a picture, px: about twice what a page of usual width shows, for those who enlarge it."""
THICKNESS = 2
"""Of outlines at that size: about one pixel as shown."""
_SOURCES = {"diameter": "from the diameter given", "pixel_size": "from the pixel size", "estimated": "estimated",
            "unknown": "unknown: as it is"}


@dataclass
class Overlay:
    """One image on the page. Without `outlines` there is no picture: `problem` says why."""

    item_id: str
    why: str
    facts: str
    image: Markup = Markup("")
    outlines: Markup = Markup("")
    aspect: str = "1 / 1"
    part: str = ""
    """Which part of a larger image is shown."""
    problem: str = ""
    """Why the image is not shown beside its cells, or why nothing is."""
    small: bool = False


def choose(found: Found) -> dict[int, str]:
    """Row of the table of images -> what it is shown for, in plan order."""
    counts, scales = found.values("num_cells"), found.values("scale")
    reasons: dict[int, list[str]] = {row: [] for row in evenly(len(counts), SPREAD)}
    if len(counts) > 1 and counts.max() > counts.min():
        for row in np.argsort(-counts, kind="stable")[:EXTREMES].tolist():
            reasons.setdefault(row, []).append("most cells")
        for row in np.argsort(counts, kind="stable")[:EXTREMES].tolist():
            reasons.setdefault(row, []).append("fewest cells" if counts[row] else "no cells")
    known = np.flatnonzero(np.isfinite(scales))
    if len(known) > 1 and scales[known].max() > 1.01 * scales[known].min():
        reasons.setdefault(int(known[np.argmax(scales[known])]), []).append("enlarged most for the model")
        reasons.setdefault(int(known[np.argmin(scales[known])]), []).append("enlarged least for the model")
    return {row: ", ".join(dict.fromkeys(reasons[row])) for row in sorted(reasons)}


def draw_overlays(run: Run, found: Found) -> list[Overlay]:
    """Read the chosen images and masks and draw them. Raises OutputDamaged when a mask is missing or unreadable.

    Memory: two decoded images and masks of at most `LIMITS.max_pixels`, and the pictures.
    """
    chosen = choose(found)
    items = {item.item_id: item for item in planned_items(run, [found.item(row) for row in chosen])}
    scaling = read_scaling(run) if run.settings["scaling"] == "plate" else None
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda row: _draw(run, found, row, chosen[row], items[found.item(row).item_id], scaling), chosen))


def _draw(run: Run, found: Found, row: int, why: str, item: Item, scaling: Scaling | None) -> Overlay:
    record = {name: found.images[name][row].as_py() for name in found.images.column_names}
    height, width = record["height"], record["width"]
    overlay = Overlay(item.item_id, why, _facts(record))
    is_large = height * width > LIMITS.max_pixels
    if is_large:  # its middle, without the image: that would be decoded whole
        y, x = (max(0, (side - WINDOW) // 2) for side in (height, width))
        part, where = read_mask_part(run.store, record["mask"], slice(y, y + WINDOW), slice(x, x + WINDOW)), "its middle"
    else:
        labels = read_mask(run.store, record["mask"])
        y, x = densest_window(labels)
        part, where = labels[y:y + WINDOW, x:x + WINDOW], "where most cells are"
    shown = outlines.display_size(*part.shape, SIDE)
    overlay.aspect, overlay.small = f"{shown[1]} / {shown[0]}", max(part.shape) * 4 <= SIDE
    if part.shape != (height, width):
        overlay.part = f"shown: {part.shape[1]:,} × {part.shape[0]:,} px from x {x:,}, y {y:,}, {where}"
    pixels, overlay.problem = (None, "the image is too large to be read again for a picture") if is_large else \
        _image(run, item, (height, width), scaling)
    if pixels is None:
        overlay.outlines = outlines.filled_cells(part, *shown)
    else:
        overlay.image = data_uri(_resized(pixels[:, y:y + WINDOW, x:x + WINDOW], *shown))
        overlay.outlines = outlines.cell_outlines(part, *shown, thickness=THICKNESS)
    return overlay


def _image(run: Run, item: Item, shape: tuple[int, ...], scaling: Scaling | None) -> tuple[np.ndarray | None, str]:
    """(planes float32 [3, Y, X] as the model saw them, or None; why there are none)."""
    settings, percents = run.settings, run.plan.facts["described"]["checkpoint"]["scaling_percents"]
    try:
        image = load_item(item, LIMITS, z_projection=settings.get("z_projection", "refuse")).image
        seen = planes(image, channels=settings["channel"], scaling=settings["scaling"],
                      percents=tuple(percents), group=item.group, table=scaling)
    except DinorayError as error:
        reason = f"{error.reason}: " if isinstance(error, ItemError) else ""
        return None, one_line(f"{reason}{error.what}")
    if seen.shape[1:] != shape:
        return None, "the image has other sides than its mask: it was replaced since"
    return seen, ""


def densest_window(labels: np.ndarray) -> tuple[int, int]:
    """(y, x) of the window of at most `WINDOW` px a side with most cell area, on a grid of half windows; the first of equals."""
    step = WINDOW // 2
    starts = [sorted({min(at, side - WINDOW) for at in range(0, side - WINDOW + step, step)}) if side > WINDOW else [0]
              for side in labels.shape]
    sums = {(y, x): int(np.count_nonzero(labels[y:y + WINDOW, x:x + WINDOW])) for y in starts[0] for x in starts[1]}
    return max(sums, key=lambda place: sums[place])


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Planes [3, y, x] in [0, 1] as uint8 [height, width, 3]."""
    if height <= pixels.shape[1]:
        return as_uint8(np.stack([shrink(plane, height, width) for plane in pixels], axis=-1))
    image = Image.fromarray(as_uint8(np.moveaxis(pixels, 0, -1)))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _facts(record: dict) -> str:
    """One line on an image."""
    count, diameter = record["num_cells"], record["median_diameter_px"]
    said = [f"{count:,} cell{'' if count == 1 else 's'}"]
    if diameter is not None:
        said.append(f"median diameter {number(diameter)} px")
    said.append(f"{record['width']:,} × {record['height']:,} px")
    if record["pixel_size_um"]:
        said.append(f"{number(record['pixel_size_um'])} µm/px")
    if record["scale"] is not None:
        said.append(f"× {number(record['scale'])} for the model, {scale_words(record['scale_source'])}")
    return " · ".join(said)


def scale_words(source: str | None) -> str:
    """Where a scale comes from, for people."""
    return _SOURCES.get(source or "", source or "not recorded")
