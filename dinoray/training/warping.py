"""Crops of an image and its labels under one map: symmetry, rotation, scale and place, resampled once, straight into the crop.

Coordinates: pixel i covers [i, i + 1), its centre lies at i + 0.5. The crop's centre is put on a point of the image, and
offsets from it are mapped by `(1 / scale) * rotation * symmetry`. Beyond the image's border lies its mirror image (the
border pixel repeated), for labels as for pixels. Only the part of the image under the crop is touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage import measure

from dinoray.errors import BadRequest
from dinoray.vision.crops import mirrored
from dinoray.vision.resampling2d import blur_sigma

SPECK_PX = 3
"""A piece of fewer px beside a larger piece of its object is a crumb of resampling, not an object (see `instances`)."""


@dataclass(frozen=True, slots=True)
class Warp:
    """Where a crop comes from: its centre (y, x) in the image's frame; `symmetry` 0..7 (bit 0 flips x, bit 1 flips y,
    bit 2 swaps the axes before), `angle_deg`, and `scale`: px of the crop for each px of the image."""

    centre_y: float
    centre_x: float
    symmetry: int = 0
    angle_deg: float = 0.0
    scale: float = 1.0

    @property
    def is_exact(self) -> bool:
        """Whether every pixel of the crop is a pixel of the image: neither turned by an angle nor scaled."""
        return self.angle_deg == 0 and self.scale == 1

    @property
    def matrix(self) -> np.ndarray:
        """float64 [2, 2]: offsets (y, x) from the crop's centre -> offsets from the centre in the image."""
        flip_x, flip_y = (-1.0 if self.symmetry & bit else 1.0 for bit in (1, 2))
        symmetry = np.array([[0, flip_x], [flip_y, 0]]) if self.symmetry & 4 else np.diag([flip_y, flip_x])
        angle = math.radians(self.angle_deg)
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return rotation @ symmetry / self.scale


def warp(image: np.ndarray, labels: np.ndarray, where: Warp, crop_px: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [C, crop_px, crop_px], labels of the same dtype [crop_px, crop_px]) under one map.

    Pixels: linear, after a Gaussian where the crop is smaller (`resampling2d.blur_sigma`; below a sigma of 0.25 px it would
    change nothing that can be seen). Labels: the id of the pixel in which the point lies. An exact warp copies pixels; its
    centre is moved to the nearest place where the pixels' grids agree.
    """
    if where.is_exact:
        y0, x0 = (math.floor(centre - crop_px / 2 + 0.5) for centre in (where.centre_y, where.centre_x))
        crop, ids = _cut(image, y0, x0, crop_px, crop_px), _cut(labels, y0, x0, crop_px, crop_px)
        return (np.ascontiguousarray(_turned(crop, where.symmetry), dtype=np.float32),
                np.ascontiguousarray(_turned(ids, where.symmetry)))
    matrix, centre = where.matrix, np.array([where.centre_y, where.centre_x])
    origin = centre - matrix @ np.full(2, (crop_px - 1) / 2)  # in the image's frame: the centre of the crop's first pixel
    steps = np.arange(crop_px)
    y, x = (origin[i] + matrix[i, 0] * steps[:, None] + matrix[i, 1] * steps[None, :] for i in (0, 1))
    sigma = blur_sigma(where.scale)
    sigma = sigma if sigma >= 0.25 else 0.0
    margin = 1 + math.ceil(4 * sigma)
    # an affine map has its extremes in the corners
    first_y, first_x = (math.floor(v[[0, 0, -1, -1], [0, -1, 0, -1]].min()) - margin for v in (y, x))
    last_y, last_x = (math.floor(v[[0, 0, -1, -1], [0, -1, 0, -1]].max()) + margin for v in (y, x))
    size_y, size_x = last_y - first_y + 1, last_x - first_x + 1
    rows, columns = mirrored(first_y, size_y, labels.shape[0]), mirrored(first_x, size_x, labels.shape[1])
    ids = labels[rows[np.floor(y).astype(np.intp) - first_y], columns[np.floor(x).astype(np.intp) - first_x]]
    block = without_copies(_cut(image, first_y, first_x, size_y, size_x))
    if sigma:
        block = ndimage.gaussian_filter(block, (0, sigma, sigma), mode="nearest", output=np.float32)
    out = np.empty((len(image), crop_px, crop_px), np.float32)
    offset = origin - 0.5 - (first_y, first_x)  # indices of the block: 0 is the centre of its first pixel
    for channel, into in zip(block, out, strict=False):
        ndimage.affine_transform(channel, matrix, offset, output=into, order=1, mode="nearest")
    out[len(block):] = out[0]
    return out, ids


def without_copies(planes: np.ndarray) -> np.ndarray:
    """The first of planes [C, Y, X] as [1, Y, X] where the others equal it (a grey image, most often), else all of them."""
    return planes[:1] if all(np.array_equal(planes[0], other) for other in planes[1:]) else planes


def _cut(planes: np.ndarray, y0: int, x0: int, height: int, width: int) -> np.ndarray:
    """planes [..., y0:y0 + height, x0:x0 + width] of the endlessly mirrored image; a view where it lies inside."""
    rows, columns = planes.shape[-2:]
    if y0 >= 0 and x0 >= 0 and y0 + height <= rows and x0 + width <= columns:
        return planes[..., y0:y0 + height, x0:x0 + width]
    return planes[..., mirrored(y0, height, rows)[:, None], mirrored(x0, width, columns)[None, :]]


def _turned(planes: np.ndarray, symmetry: int) -> np.ndarray:
    """A view of square planes [..., n, n] under one of the 8 symmetries, as `Warp.matrix` has them."""
    if symmetry & 4:
        planes = planes.swapaxes(-1, -2)
    if symmetry & 2:
        planes = planes[..., ::-1, :]
    return planes[..., ::-1] if symmetry & 1 else planes


def instances(ids: np.ndarray) -> np.ndarray:
    """int32 [Y, X], numbered 1..n: each connected piece (8 neighbours) of an id becomes an instance of its own.

    A crop's border cuts an object into pieces, and mirroring doubles it: they are separate things to see. Only a speck
    (below `SPECK_PX`) beside a larger piece of its id stays with the largest one: nearest-neighbour resampling crumbles
    thin tips, and a crumb that were an object of its own would be a peak of 1 in a distance map.
    """
    pieces = measure.label(ids, background=0, connectivity=2)
    area = np.bincount(pieces.ravel())
    specks = np.flatnonzero(area[1:] < SPECK_PX) + 1
    if len(specks):
        of = np.zeros(len(area), ids.dtype)  # the id that a piece belongs to
        of[pieces.ravel()] = ids.ravel()
        order = np.lexsort((-area[1:], of[1:])) + 1  # by id, the largest piece first
        largest = order[np.searchsorted(of[order], of[specks])]
        into = np.arange(len(area))
        into[specks] = largest
        _, numbers = np.unique(into, return_inverse=True)  # 0 stays 0
        pieces = numbers[pieces]
    return pieces.astype(np.int32)


def plain_crop(image: np.ndarray, labels: np.ndarray, y0: int, x0: int, crop_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The crop whose first pixel is (y0, x0), unchanged: (float32 [C, crop_px, crop_px], int32 [crop_px, crop_px]).

    Mirrored beyond the border; labels as `instances` numbers them. `image` [C, Y, X], `labels` [Y, X] of whole numbers.
    Raises BadRequest when the two do not fit each other.
    """
    check_pair(image, labels, crop_px)
    crop, ids = warp(image, labels, Warp(y0 + crop_px / 2, x0 + crop_px / 2), crop_px)
    return crop, instances(ids)


def grid_crops(height: int, width: int, crop_px: int) -> list[tuple[int, int]]:
    """(y0, x0) of the fewest crops that cover an image, row by row: spread evenly, none beyond the border unless a side
    is shorter than `crop_px` (then it starts at 0). Raises BadRequest when a number is below 1."""
    if min(height, width, crop_px) < 1:
        raise BadRequest(f"no crops of {crop_px} px cover {height} x {width} px")

    def starts(side: int) -> list[int]:
        n = -(-side // crop_px)
        return [0] if n == 1 else [round(i * (side - crop_px) / (n - 1)) for i in range(n)]

    return [(y0, x0) for y0 in starts(height) for x0 in starts(width)]


def check_pair(image: np.ndarray, labels: np.ndarray, crop_px: int) -> None:
    """Raises BadRequest unless `image` is [C, Y, X], `labels` [Y, X] of whole numbers with the same sides, `crop_px` >= 1."""
    if image.ndim != 3 or labels.ndim != 2 or image.shape[1:] != labels.shape or 0 in image.shape:
        raise BadRequest(f"an image of shape {image.shape} and labels of shape {labels.shape} do not fit",
                         todo="give image [C, Y, X] and labels [Y, X]")
    if labels.dtype.kind not in "iu":
        raise BadRequest(f"labels of type {labels.dtype} are not ids", todo="give whole numbers, 0 for background")
    if crop_px < 1:
        raise BadRequest(f"a crop of {crop_px} px", todo="crop_px must be at least 1")
