"""Pictures of masks against true ones: outlines of both on the image, and which objects were found, invented, missed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from dinoray.errors import DinorayError
from dinoray.io.images import load_item
from dinoray.io.items import Item
from dinoray.io.label_pairs import LabelPair
from dinoray.report.outlines import BOTH, PRED, TRUTH, boundaries, display_size, resized_labels
from dinoray.report.pictures import LIMITS, as_uint8, data_uri, one_line, shrink
from dinoray.vision import intensity
from dinoray.vision.instance_metrics import match, overlaps

SIDE = 560
"""Longest side of a picture, px; smaller images are enlarged by a whole factor, so that outlines stay thin."""
FOUND, INVENTED, MISSED, MIXED = (70, 190, 120), (232, 66, 80), (245, 166, 35), (150, 80, 200)
"""Objects: matched, predicted without a match, true without a match, and where the last two overlap."""
_PERCENTS = (0.1, 99.9)


@dataclass(frozen=True)
class MaskPicture:
    """Two pictures of one image as data URIs, or the `problem` why there are none. `note`: why the image itself is missing."""

    outlines: Markup = Markup("")
    objects: Markup = Markup("")
    size: str = ""
    note: str = ""
    problem: str = ""


def draw_masks(pair: LabelPair) -> MaskPicture:
    """Read the labels and the image of a pair again and draw them; trouble of files ends in `problem` or `note`."""
    try:
        pred, truth = pair.read(LIMITS)
    except DinorayError as error:
        return MaskPicture(problem=one_line(error.what))
    height, width = display_size(*truth.shape, SIDE)
    background, note = _background(pair.image, truth.shape, height, width)
    small_pred, small_truth = (resized_labels(labels, height, width) for labels in (pred, truth))
    return MaskPicture(data_uri(outlined(background, small_pred, small_truth), quality=88),
                       data_uri(classified(background, small_pred, small_truth, pred, truth), quality=88),
                       f"{truth.shape[1]:,} × {truth.shape[0]:,} px", note)


def outlined(background: np.ndarray, pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Outlines of both on the background, all [h, w]."""
    seen = background.copy()
    of_truth, of_pred = boundaries(truth), boundaries(pred)
    seen[of_truth], seen[of_pred], seen[of_truth & of_pred] = TRUTH, PRED, BOTH
    return seen


def classified(background: np.ndarray, pred: np.ndarray, truth: np.ndarray, whole_pred: np.ndarray,
               whole_truth: np.ndarray) -> np.ndarray:
    """Objects coloured by what became of them at IoU 0.5: matched in the whole images, drawn at the size of `pred` [h, w]."""
    table = overlaps(whole_pred, whole_truth)
    pairs = match(table, 0.5)
    found = np.isin(pred, table.pred_ids[table.pred[pairs]])
    invented = (pred > 0) & ~found
    missed = (truth > 0) & ~np.isin(truth, table.truth_ids[table.truth[pairs]]) & ~found
    seen = background // 3
    for where, colour in ((missed, MISSED), (invented, INVENTED), (missed & invented, MIXED), (found, FOUND)):
        seen[where] = (0.25 * background[where] + 0.75 * np.array(colour)).astype(np.uint8)
    seen[boundaries(pred)] //= 2
    return seen


def _background(item: Item | None, shape: tuple[int, ...], height: int, width: int) -> tuple[np.ndarray, str]:
    """(the image uint8 [h, w, 3], or black; why it is black)."""
    black = np.zeros((height, width, 3), np.uint8)
    if item is None:
        return black, "the image is not known: labels only"
    try:
        image = load_item(item, LIMITS).image
    except DinorayError as error:
        return black, f"the image cannot be shown: {one_line(error.what)}"
    if image.pixels.shape[1:] != tuple(shape):
        return black, "the image cannot be shown: it is not of the labels' size"
    if image.is_rgb8 and (image.pixels != image.pixels[:1]).any():
        planes = [plane / np.float32(255) for plane in image.pixels[:3]]
    else:
        gray = np.mean([_scaled(plane) for plane in image.pixels], axis=0, dtype=np.float32)
        planes = [gray, gray, gray]
    return as_uint8(np.stack([_resized(plane, height, width) for plane in planes], axis=-1)), ""


def _scaled(plane: np.ndarray) -> np.ndarray:
    values = plane[np.isfinite(plane)]
    low, high = np.percentile(values, _PERCENTS) if len(values) else (0.0, 0.0)
    if high <= low:
        return np.zeros(plane.shape, np.float32)
    return np.nan_to_num(intensity.scale(plane, float(low), float(high)), nan=0.0)


def _resized(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    if height <= plane.shape[0]:
        return shrink(plane, height, width)
    return np.asarray(Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
