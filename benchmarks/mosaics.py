"""Mosaics found again: images that are tiles of one larger field, by the borders that continue each other.

Two images are joined when the rows (columns) on both sides of the seam correlate, and differ no more than neighbouring
rows inside these images do. Joins are taken from the best on, and only where the tiles still fit on one grid. The control
is the same with one border reversed, where no join can be true. Images that overlap, and copies, are found by correlating
thumbnails at all shifts. Used by benchmarks/dsb_splits.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import fft, ndimage

CORRELATION = 0.5
"""Least correlation of two facing borders."""
RATIO = 1.3
"""Most mean difference of two facing borders, relative to that of neighbouring rows inside: true seams have 0.7 to 1.3."""
LEAST_STEP = 0.25
"""Gray levels below which neighbouring rows inside count as this different: else empty borders would divide by 0."""
THUMB = 64
"""Side of the thumbnails that overlaps are looked for in, in px."""
SHARE = 0.25
"""Least share of its area that an image has in common with another to be looked at as overlapping."""
SAME = 0.7
"""Least correlation of overlapping thumbnails without their slow changes; overlaps have 0.86 and more."""
PLACES = 10.0
"""Least number of blocks of 4 x 4 px that carry the correlation: two sparse fields correlate at 0.95 when one nucleus falls on
another (6.6 places at most, above 0.7); overlaps have 36 and more."""


@dataclass(frozen=True)
class Picture:
    """One image, gray, and what is told from its pixels."""

    image_id: str
    gray: np.ndarray
    """[Y, X] float32, in 8-bit levels."""
    modality: str


Mosaic = dict[tuple[int, int], str]
"""{(row, column): image}; the origin is any of its tiles."""


@dataclass(frozen=True)
class Join:
    """Image b continues image a to the right (0, 1) or below (1, 0)."""

    correlation: float
    ratio: float
    a: str
    b: str
    step: tuple[int, int]


def borders(pictures: list[Picture], step: tuple[int, int], end: bool) -> tuple[np.ndarray, np.ndarray]:
    """(the last or first row or column of each picture [N, L], mean difference to the one beside it inside [N])."""
    outer, inner = (-1, -2) if end else (0, 1)
    rows = [(p.gray[outer], p.gray[inner]) if step == (1, 0) else (p.gray[:, outer], p.gray[:, inner]) for p in pictures]
    edge = np.array([row for row, _ in rows], np.float64)
    return edge, np.abs(edge - np.array([row for _, row in rows])).mean(1)


def joins(pictures: list[Picture], *, reverse: bool = False) -> list[Join]:
    """Joins among pictures of one size, the best first. reverse: the control."""
    found = []
    for step in ((0, 1), (1, 0)):
        a, step_a = borders(pictures, step, end=True)
        b, step_b = borders(pictures, step, end=False)
        b = b[:, ::-1] if reverse else b
        za, zb = (x - x.mean(1, keepdims=True) for x in (a, b))
        norms = np.sqrt(np.outer((za ** 2).sum(1), (zb ** 2).sum(1)))
        correlation = za @ zb.T / np.maximum(norms, 1e-9)
        difference = np.array([np.abs(row - b).mean(1) for row in a])
        ratio = difference / np.maximum((step_a[:, None] + step_b[None]) / 2, LEAST_STEP)
        fits = (correlation >= CORRELATION) & (ratio <= RATIO) & ~np.eye(len(pictures), dtype=bool)
        found += [Join(round(float(correlation[i, j]), 6), round(float(ratio[i, j]), 6), pictures[i].image_id, pictures[j].image_id,
                       step) for i, j in np.argwhere(fits)]
    return sorted(found, key=lambda join: (-join.correlation, join.ratio, join.a, join.b))


def assemble(names: list[str], found: list[Join]) -> tuple[list[Mosaic], int]:
    """(mosaics, joins that fitted): every image is in one mosaic, many alone."""
    place = {name: (name, 0, 0) for name in names}
    mosaics = {name: {(0, 0): name} for name in names}
    taken = 0
    for join in found:
        (first, ya, xa), (second, yb, xb) = place[join.a], place[join.b]
        dy, dx = ya + join.step[0] - yb, xa + join.step[1] - xb
        if first == second:
            taken += (dy, dx) == (0, 0)
            continue
        moved = {(y + dy, x + dx): name for (y, x), name in mosaics[second].items()}
        if moved.keys() & mosaics[first].keys():
            continue
        mosaics[first] |= moved
        del mosaics[second]
        place |= {name: (first, y, x) for (y, x), name in moved.items()}
        taken += 1
    return [dict(sorted(mosaic.items())) for mosaic in mosaics.values()], taken


@dataclass(frozen=True)
class Overlap:
    """Two images of one field: `share` of the area is in both; 1 is a copy."""

    a: str
    b: str
    share: float


def overlaps(pictures: list[Picture]) -> list[Overlap]:
    """Pairs of one size and modality that show in part the same, wherever it lies in them."""
    found = []
    for group in by(pictures, stratum).values():
        thumbs = np.array([np.asarray(Image.fromarray(p.gray).resize((THUMB, THUMB), Image.Resampling.BOX)) for p in group])
        thumbs = thumbs - ndimage.gaussian_filter(thumbs, (0, 3, 3))
        thumbs /= np.maximum(thumbs.std((1, 2), keepdims=True), 1e-3)
        for i, j, shift in shifts(thumbs):
            share, correlation, places = compare(thumbs[i], thumbs[j], shift)
            if correlation >= SAME and places >= PLACES:
                found.append(Overlap(group[i].image_id, group[j].image_id, share))
    return found


def shifts(thumbs: np.ndarray) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(i, j, the shift (y, x) at which j correlates best with i) of all pairs of thumbs [N, T, T] that may overlap."""
    size = (2 * THUMB, 2 * THUMB)
    away = np.maximum(THUMB - np.abs(fft.fftfreq(2 * THUMB, 1 / (2 * THUMB))), 0)
    common = np.outer(away, away)
    weight = np.where(common >= SHARE * THUMB ** 2, 1 / np.sqrt(np.maximum(common, 1)), 0).astype(np.float32)
    spectra = fft.rfft2(thumbs, size)
    for i in range(len(thumbs) - 1):
        peaks = (fft.irfft2(spectra[i].conj() * spectra[i + 1:], size) * weight).reshape(len(thumbs) - i - 1, -1)
        best = peaks.argmax(1)
        for j in np.flatnonzero(np.take_along_axis(peaks, best[:, None], 1)[:, 0] > SAME / 2 * SHARE ** 0.5 * THUMB):
            y, x = divmod(int(best[j]), 2 * THUMB)
            yield i, i + 1 + int(j), (y - 2 * THUMB * (y > THUMB), x - 2 * THUMB * (x > THUMB))


def compare(a: np.ndarray, b: np.ndarray, shift: tuple[int, int]) -> tuple[float, float, float]:
    """(share of the area, correlation, number of places that carry it) of thumbnails where b shifted lies on a."""
    of_a = a[tuple(slice(max(0, -s), THUMB - max(0, s)) for s in shift)]
    of_b = b[tuple(slice(max(0, s), THUMB + min(0, s)) for s in shift)]
    of_a, of_b = of_a - of_a.mean(), of_b - of_b.mean()
    correlation = (of_a * of_b).sum() / max(float(np.linalg.norm(of_a) * np.linalg.norm(of_b)), 1e-9)
    rows, columns = (side // 4 for side in of_a.shape)
    blocks = (of_a * of_b)[:rows * 4, :columns * 4].reshape(rows, 4, columns, 4).sum((1, 3))
    return of_a.size / THUMB ** 2, float(correlation), float(blocks.sum() ** 2 / max(float((blocks ** 2).sum()), 1e-9))


def copies(found: list[Overlap]) -> dict[str, str]:
    """Image -> the first image (by id) with the same content, for images that have one."""
    same: dict[str, str] = {}
    for overlap in sorted(found, key=lambda overlap: (overlap.a, overlap.b)):
        if overlap.share == 1:
            same.setdefault(overlap.b, same.get(overlap.a, overlap.a))
    return same


def by(pictures: list[Picture], key) -> dict:
    """Pictures in groups, in the order of ids."""
    groups = defaultdict(list)
    for picture in sorted(pictures, key=lambda p: p.image_id):
        groups[key(picture)].append(picture)
    return dict(groups)


def stratum(picture: Picture) -> tuple[str, int, int]:
    """What joined images share: modality and size."""
    return picture.modality, *picture.gray.shape


def components(pictures: list[Picture], *, reverse: bool = False) -> tuple[list[Mosaic], dict[tuple, list[int]]]:
    """(mosaics, {stratum: [pairs of borders compared, joins taken]}); give it no copies: one place has one tile."""
    mosaics, counts = [], {}
    for key, group in sorted(by(pictures, stratum).items()):
        found, taken = assemble([p.image_id for p in group], joins(group, reverse=reverse))
        mosaics += found
        counts[key] = [2 * len(group) * (len(group) - 1), taken]
    return sorted(mosaics, key=lambda mosaic: min(mosaic.values())), counts


def is_whole(mosaic: Mosaic) -> bool:
    """Whether a mosaic of several tiles is a full rectangle: no neighbour of its tiles can be elsewhere unseen."""
    rows, columns = {y for y, _ in mosaic}, {x for _, x in mosaic}
    return len(rows) > 1 and len(columns) > 1 and len(rows) * len(columns) == len(mosaic)


def montage(pictures: list[Picture], folder: Path, tile: int = 64) -> None:
    """One PNG per kind of image with its mosaics of several tiles, stitched, with a gap between mosaics."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {p.image_id: p for p in pictures}
    sheets = defaultdict(list)
    for mosaic in components(pictures)[0]:
        if len(mosaic) > 1:
            sheets[stratum(known[next(iter(mosaic.values()))])].append(mosaic)
    for key, mosaics in sheets.items():
        blocks = []
        for mosaic in mosaics:
            top, left = (min(place[axis] for place in mosaic) for axis in (0, 1))
            bottom, right = (max(place[axis] for place in mosaic) + 1 for axis in (0, 1))
            block = np.zeros(((bottom - top) * tile, (right - left) * tile), np.uint8)
            light = max(40.0, max(float(np.percentile(known[name].gray, 99.5)) for name in mosaic.values()))
            for (y, x), name in mosaic.items():
                small = Image.fromarray(np.clip(known[name].gray * 255 / light, 0, 255).astype(np.uint8)).resize((tile, tile))
                block[(y - top) * tile:(y - top + 1) * tile, (x - left) * tile:(x - left + 1) * tile] = np.asarray(small)
            blocks.append(block)
        side = max(max(block.shape) for block in blocks) + 8
        columns = max(1, 1600 // side)
        sheet = np.full((-(-len(blocks) // columns) * side, columns * side), 90, np.uint8)
        for i, block in enumerate(blocks):
            y, x = i // columns * side, i % columns * side
            sheet[y:y + block.shape[0], x:x + block.shape[1]] = block
        Image.fromarray(sheet).save(folder / f"{key[0]}_{key[1]}x{key[2]}.png")
