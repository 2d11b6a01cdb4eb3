"""Overlapping windows of one image, and their predictions blended back into one map: pure geometry.

An axis longer than the window is covered by n = ceil((side - overlap) / (window - overlap)) windows whose starts are
spread evenly, so that the first begins at 0, the last ends at the image's border, neighbours overlap by at least
`overlap`, and no window computes invented pixels. An axis of the window's length or less is one window, no longer
than the next multiple of the patch size: only there is the image padded, at its bottom or right, by its mirror image.

Weights fall off towards a window's sides like half a cosine over `overlap` px. The ramp is sampled at the pixels'
centres, so it is nowhere 0: every pixel has a weight, and needs no filling. The weights of one axis are divided by
their sum, and a window's weight is the product of its two axes: they add up to 1 at every pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from dinoray.errors import BadRequest


def _check(side: int, window: int, overlap: int) -> None:
    if side < 1 or window < 1 or not 0 <= overlap < window:
        raise BadRequest(f"windows of {window} px that overlap by {overlap} px cannot cover an axis of {side} px",
                         todo="an overlap is at least 0 and less than the window")


def starts(side: int, window: int, overlap: int, multiple: int = 1) -> list[int]:
    """First pixels of the windows of an axis of `side` px; the last ends at `side`, or beyond it when side < window.

    They are multiples of `multiple` where side, window and overlap are.
    """
    _check(side, window, overlap)
    n = max(1, math.ceil((side - overlap) / (window - overlap)))
    return [0] if n == 1 else [multiple * round(i * ((side - window) // multiple) / (n - 1)) for i in range(n)]


def window_side(side: int, window: int, multiple: int) -> int:
    """The window's length on an axis of `side` px: `window`, or the least multiple of the patch size that holds it."""
    if multiple < 1 or window < 1 or window % multiple:
        raise BadRequest(f"a window of {window} px is not a multiple of the patch size {multiple}",
                         todo=f"use {max(1, window // max(1, multiple)) * multiple}")
    return min(window, math.ceil(side / multiple) * multiple)


def padded_side(side: int, window: int, overlap: int, multiple: int) -> int:
    """The length to which an axis of `side` px is padded: `side` itself where it is `window` or longer."""
    _check(side, window, overlap)
    return max(side, window_side(side, window, multiple))


def ramp(window: int, overlap: int) -> np.ndarray:
    """Weights float64 [window] of a window's pixels along one axis, before they are divided by their sum; all > 0."""
    reach = np.minimum(np.arange(window) + 0.5, np.arange(window)[::-1] + 0.5)
    return 0.5 - 0.5 * np.cos(np.pi * np.minimum(reach / max(overlap, 1), 1.0))


def _axis_weights(padded: int, window: int, overlap: int, begins: list[int]) -> np.ndarray:
    """Weights float64 [n, window] of one axis: at every pixel those of all windows add up to 1."""
    shape, total = ramp(window, overlap), np.zeros(padded)
    for begin in begins:
        total[begin:begin + window] += shape
    return np.stack([shape / total[begin:begin + window] for begin in begins])


class Blend:
    """The windows of images of one size, and how predictions of them become one map.

    `window` and `overlap` in px; `multiple` is the patch size, of which `window` must be a multiple. `shape` is
    (wy, wx): it shrinks with a small image, axis by axis, so that a 40 x 100 image does not cost a 256 x 256 window.
    Windows of the same `shape` may stand in one batch, whichever image they come from. `boxes` holds the first (y, x)
    of each window in the padded image, row by row; it depends on nothing but the arguments.

    With `aligned` every window begins at a multiple of `multiple`: the image is padded to multiples, and the overlap must
    be one. What has a pixel per patch (the tokens of the windows) is then blended by `coarse`.
    """

    def __init__(self, height: int, width: int, window: int, overlap: int, multiple: int = 16, aligned: bool = False):
        self.height, self.width, self.window, self.overlap = height, width, window, overlap
        self.padded = (padded_side(height, window, overlap, multiple), padded_side(width, window, overlap, multiple))
        self.multiple = multiple if aligned else 1
        if overlap % self.multiple:
            raise BadRequest(f"an overlap of {overlap} px is not a multiple of the patch size {multiple}",
                             todo=f"use {overlap // multiple * multiple}")
        if aligned:
            self.padded = tuple(math.ceil(side / multiple) * multiple for side in self.padded)
        self.shape = (window_side(height, window, multiple), window_side(width, window, multiple))
        # an axis of one window has no neighbour, and its (shrunken) window may be shorter than the overlap
        rows, columns = (starts(side, window, overlap, self.multiple) if side > window else [0]
                         for side in (self.padded if aligned else (height, width)))
        self.boxes = [(y, x) for y in rows for x in columns]
        weights = [_axis_weights(padded, side, overlap, begins)
                   for padded, side, begins in zip(self.padded, self.shape, (rows, columns), strict=True)]
        self._weights = {(y, x): (weights[0][i], weights[1][j]) for i, y in enumerate(rows) for j, x in enumerate(columns)}

    def coarse(self) -> Blend:
        """The same windows of the image that has one pixel per patch of this one; of an `aligned` Blend."""
        p = self.multiple
        return Blend(math.ceil(self.height / p), math.ceil(self.width / p), self.window // p, self.overlap // p, multiple=1)

    def pad(self, image: np.ndarray) -> np.ndarray:
        """The image [C, H, W] as [C, Hp, Wp]: mirrored at the bottom and right (numpy's "reflect": the border pixel is
        not repeated), as often as the padding needs. The image itself where nothing is missing."""
        if image.ndim != 3 or image.shape[1:] != (self.height, self.width):
            raise BadRequest(f"an image of shape {image.shape} in a place for [C, {self.height}, {self.width}]",
                             todo="make a Blend for each size of image")
        missing = [(0, padded - side) for padded, side in zip(self.padded, image.shape[1:], strict=True)]
        return np.pad(image, [(0, 0), *missing], mode="reflect") if any(end for _, end in missing) else image

    def windows(self, image: np.ndarray) -> Iterator[np.ndarray]:
        """The windows [C, wy, wx] of an image [C, H, W], in the order of `boxes`; views of the padded image."""
        padded, (wy, wx) = self.pad(image), self.shape
        for y, x in self.boxes:
            yield padded[:, y:y + wy, x:x + wx]

    def weight(self, box: tuple[int, int]) -> np.ndarray:
        """The weight float64 [wy, wx] of a window; those of all windows add up to 1 at every pixel of the padded image."""
        down, across = self._weights[box]
        return down[:, None] * across[None, :]

    def merge(self, predictions: Iterable[np.ndarray], dtype: type = np.float64) -> np.ndarray:
        """One map float32 [..., H, W] of the windows' predictions [..., wy, wx], in the order of `boxes`, taken one by one.

        Added up in `dtype`. Predicting each window by itself gives the image back to 1e-6 of its largest value. Raises
        BadRequest for another number or shape of predictions.
        """
        merged, (wy, wx), taken = np.zeros(self.padded, dtype), self.shape, 0
        for prediction in predictions:
            if not taken:
                merged = np.zeros((*prediction.shape[:-2], *self.padded), dtype)
            if taken == len(self.boxes) or prediction.shape != (*merged.shape[:-2], *self.shape):
                raise BadRequest(f"prediction {taken + 1}, {prediction.shape}, for {len(self.boxes)} windows {self.shape}",
                                 todo="give one prediction for each window, in the order of `boxes`")
            y, x = self.boxes[taken]
            merged[..., y:y + wy, x:x + wx] += self.weight((y, x)).astype(dtype, copy=False) * prediction
            taken += 1
        if taken != len(self.boxes):
            raise BadRequest(f"{taken} predictions for {len(self.boxes)} windows",
                             todo="give one prediction for each window, in the order of `boxes`")
        return merged[..., :self.height, :self.width].astype(np.float32, copy=False)
