"""Regions of volumes with labels, as a training sees them: grids in nm, crops of any place, mirrored and masked beyond the region.

Nothing outside of a region is ever read, so regions that do not touch share no voxel, however wide a context is. Lengths are nm in
the coordinates of the raw volume.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from hashlib import blake2b
from itertools import product

import numpy as np

from dinoray.config.volume_labels import LabelledVolume
from dinoray.errors import BadRequest, ItemError, SystemicError
from dinoray.io.volume_grid import Shape, Triple
from dinoray.io.volume_pieces import Piece, Pieces, context_box, context_level, context_values, folds, whole_ratio
from dinoray.io.volumes import Volume, VolumeRequest, open_volume
from dinoray.vision.quality import percentiles
from dinoray.vision.stored_tokens import StoredTokens
from dinoray.vision.voxel_grids import VoxelGrid
from dinoray.volume_tokens import open_tokens

ALIGNED = 0.05
"""Share of a raw voxel by which the grids of raw and labels may be apart: rounding of metadata."""
BLOCK = 64
"""Voxels a side of a block of the sample that fixes the scaling."""
MOST_BLOCKS_A_SIDE = 128
PERCENTS = (0.1, 99.9)


class _Held:
    """A volume that is kept in memory once it was read, where it may be."""

    def __init__(self, volume: Volume, keep: bool):
        self.volume, self._keep = volume, keep
        self._values: np.ndarray | None = None
        self._lock = threading.Lock()

    def read(self, start: Sequence[int], shape: Sequence[int]) -> Piece:
        """The box [start, start + shape), which may reach beyond the volume. Raises what `Volume.read` raises."""
        if not self._keep:
            return Pieces(self.volume).read(start, shape)
        with self._lock:
            if self._values is None:
                self._values = self.volume.read(*(slice(0, n) for n in self.volume.shape))
        folded, inside = folds(start, shape, self.volume.shape)
        return Piece(self._values[np.ix_(*folded)], inside)  # type: ignore[arg-type]


class Region:
    """One LabelledVolume, open. Safe to read from several threads."""

    def __init__(self, source: LabelledVolume, *, keep_bytes: int, context_nm: Triple | None = None, scaling_sample: int = 64):
        """`keep_bytes`: of each volume that may be kept in memory; `context_nm`: pixels of the context's slices (a coarser level of
        raw serves it where there is one); `scaling_sample`: blocks that fix the scaling, 0 where no raw voxel will be read. Raises
        BadRequest for volumes that do not fit each other."""
        self.source = source
        self.raw_volume = open_volume(_request(source, source.raw_voxel_size))
        self.label_volume = open_volume(VolumeRequest(source.labels, raw_voxel_nm=_nm(source.label_voxel_size),
                                                      dataset=source.label_dataset, mask=True))
        if self.label_volume.dtype.kind not in "iub":
            raise BadRequest(f"labels of the type {self.label_volume.dtype}", where=source.labels, todo="give whole numbers")
        self.factor = _factor(self.raw_volume, self.label_volume, source)
        # the label voxels that lie in the region, and where they begin, in raw voxels
        self.raw_grid = VoxelGrid(self.raw_volume.shape, self.raw_volume.translation_nm, self.raw_volume.voxel_size_nm)
        whole = VoxelGrid(self.label_volume.shape, self.label_volume.translation_nm, self.label_volume.voxel_size_nm)
        self._label_from, count = _covered(whole, self.raw_grid, source)
        self.label_grid = whole.part(self._label_from, count)
        self.context_volume, self.context_factor = self._context(context_nm)
        keep = [v.dtype.itemsize * int(np.prod(v.shape)) <= keep_bytes
                for v in (self.raw_volume, self.context_volume, self.label_volume)]
        self._raw, self._labels = _Held(self.raw_volume, keep[0]), _Held(self.label_volume, keep[2])
        self._coarse = self._raw if self.context_volume is self.raw_volume else _Held(self.context_volume, keep[1])
        self.low, self.high = self._range(scaling_sample) if scaling_sample else (0.0, 1.0)
        self.tokens: StoredTokens | None = None
        """Stored tokens of the raw voxels, where there are any."""
        self.context_tokens: StoredTokens | None = None
        """The same of the context."""

    def attach(self, digest: str, context_factor: int) -> None:
        """Open the stored tokens that the source names. `digest`: of the backbone. Raises BadRequest for others' tokens."""
        for name, factor in (("tokens", 1), ("context_tokens", context_factor)):
            url = getattr(self.source, name)
            if url is not None:
                pixel: Triple = tuple(p * factor for p in self.raw_grid.pitch_nm)  # type: ignore[assignment]
                found = open_tokens(url, digest=digest, raw_voxel_nm=pixel, name=name, limits=(self.low, self.high))
                self._check_place(found, name, pixel)
                setattr(self, name, found)

    def _check_place(self, tokens: StoredTokens, name: str, slack_nm: Triple) -> None:
        """Raise BadRequest for tokens of another place: of more than the region they would have seen what it must not."""
        grid = tokens.grid
        for axis in range(3):
            ours = self.raw_grid.first_nm[axis] - self.raw_grid.pitch_nm[axis] / 2
            theirs = grid.translation_nm[axis] - grid.voxel_nm[axis] / 2
            ends = (ours + self.raw_grid.extent_nm[axis], theirs + grid.shape[axis] * grid.voxel_nm[axis])
            slack = 0.5 * self.raw_grid.pitch_nm[axis] if name == "tokens" else slack_nm[axis]
            if abs(ours - theirs) > slack or abs(ends[0] - ends[1]) > slack:
                raise BadRequest(f"the stored tokens are of {theirs:g} to {ends[1]:g} nm along {'zyx'[axis]}, the region is "
                                 f"{ours:g} to {ends[0]:g} nm", where=f"{name}: {tokens.url}",
                                 todo="extract the tokens of this region alone, with --crop")

    def close(self) -> None:
        """Close the volumes."""
        for volume in {id(v): v for v in (self.raw_volume, self.context_volume, self.label_volume)}.values():
            volume.close()

    # ---------------------------------------------------------------- reading

    def labels(self, start: Shape, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """(labels, known), both [z, y, x], of label voxels [start, start + shape) of the region. Raises SystemicError."""
        piece = _Read(self._labels).read([a + b for a, b in zip(start, self._label_from, strict=True)], shape)
        known = piece.known
        for axis, (first, n) in enumerate(zip(start, shape, strict=True)):
            at = np.arange(first, first + n)
            outside = (at < 0) | (at >= self.label_grid.shape[axis])
            known &= ~outside.reshape([-1 if a == axis else 1 for a in range(3)])
        if self.source.unknown is not None:
            known &= piece.values != self.source.unknown
        return piece.values, known

    def raw(self, start: Shape, shape: Shape) -> Piece:
        """Raw voxels that label voxels [start, start + shape) are made of, scaled: float32, about 0..1. Raises SystemicError."""
        corner = [round((self.label_grid.first_nm[a] - self.label_grid.pitch_nm[a] / 2
                         - self.raw_grid.first_nm[a] + self.raw_grid.pitch_nm[a] / 2) / self.raw_grid.pitch_nm[a])
                  for a in range(3)]
        first = [c + s * f for c, s, f in zip(corner, start, self.factor, strict=True)]
        piece = _Read(self._raw).read(first, [n * f for n, f in zip(shape, self.factor, strict=True)])
        return Piece(self._scaled(piece.values), piece.inside)

    def context(self, centre_nm: Triple, shape: Shape, *,
                read: bool = True) -> tuple[np.ndarray | None, tuple[np.ndarray, ...], VoxelGrid]:
        """(pixels, which of them hold some of the region, their grid) of the context around a place.

        `shape` pixels, each the mean of `context_factor` voxels of the level that serves it, scaled (None without `read`). The
        grid's middle is within half a voxel of that level of the place. Raises SystemicError.
        """
        box = context_box(self.context_volume, self.context_factor, centre_nm, shape)
        pitch = tuple(r * f for r, f in zip(self.context_volume.voxel_size_nm, self.context_factor, strict=True))
        values = self._scaled(context_values(_Read(self._coarse), box, self.context_factor)) if read else None
        return values, box.inside, VoxelGrid(shape, box.corner_nm, pitch)  # type: ignore[arg-type]

    # ---------------------------------------------------------------- opening

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return np.clip((values.astype(np.float32) - np.float32(self.low)) * np.float32(1 / (self.high - self.low)), 0, 1)

    def _context(self, pixel_nm: Triple | None) -> tuple[Volume, Shape]:
        """(the level, its voxels per pixel) for pixels of `pixel_nm`."""
        if pixel_nm is None:
            return self.raw_volume, (1, 1, 1)
        coarser = None
        if self.source.box() is None:  # a coarser level covers the same place
            with contextlib.suppress(BadRequest):
                coarser = open_volume(_request(self.source, pixel_nm))
        if coarser is not None and coarser.voxel_size_nm == self.raw_volume.voxel_size_nm:
            coarser.close()
            coarser = None
        found = context_level(self.raw_volume, coarser, pixel_nm)
        if coarser is not None and found[0] is not coarser:
            coarser.close()
        return found

    def _range(self, count: int) -> tuple[float, float]:
        """Percentiles 0.1 and 99.9 of a sample of the region's blocks, those whose place has the smallest hash."""
        per_axis = [-(-n // BLOCK) for n in self.raw_volume.shape]
        steps = [max(1, n // MOST_BLOCKS_A_SIDE) for n in per_axis]  # of a huge region every n-th block is a candidate
        places = list(product(*(range(0, n, s) for n, s in zip(per_axis, steps, strict=True))))
        places.sort(key=lambda p: blake2b("-".join(map(str, p)).encode(), digest_size=8).digest())
        values = []
        for place in places[:count]:
            box = [slice(i * BLOCK, min((i + 1) * BLOCK, n)) for i, n in zip(place, self.raw_volume.shape, strict=True)]
            try:
                values.append(self.raw_volume.read(*box).ravel())
            except ItemError as error:
                raise BadRequest(f"raw cannot be read: {error.what}", where=error.where,
                                 todo="mend it, or choose another region") from error
        sample = np.concatenate(values)
        if sample.dtype.kind == "f" and not np.isfinite(sample).all():
            raise BadRequest("raw holds NaN or infinite voxels", where=self.source.raw, todo="fill them, or choose another region")
        low, high = percentiles(sample, PERCENTS)
        if not high > low:
            raise BadRequest(f"raw is {low:g} nearly everywhere", where=self.source.raw,
                             todo="choose a region with something in it")
        return low, high


def _nm(size: tuple[float, ...] | None) -> Triple | float | None:
    return None if size is None else size[0] if len(size) == 1 else size  # type: ignore[return-value]


def _request(source: LabelledVolume, size: tuple[float, ...] | None) -> VolumeRequest:
    channel = int(source.channel) if source.channel is not None and source.channel.isdecimal() else source.channel
    return VolumeRequest(source.raw, raw_voxel_nm=_nm(size), dataset=source.raw_dataset, channel=channel, crop=source.box())  # type: ignore[arg-type]


class _Read:
    """What is kept of a volume, with errors as a training has them."""

    def __init__(self, held: _Held):
        self._held = held

    def read(self, start: Sequence[int], shape: Sequence[int]) -> Piece:
        """As `_Held.read`. Raises SystemicError."""
        held = self._held
        try:
            piece = held.read(start, shape)
        except ItemError as error:
            raise SystemicError(f"a training volume cannot be read: {error.what}", where=error.where,
                                todo="restore it, then run the same command again: it resumes from the last state") from error
        if piece.values.dtype.kind == "f" and not np.isfinite(piece.values).all():
            raise SystemicError("a training volume holds NaN or infinite voxels", where=held.volume.ref.uri, todo="fill them, or "
                                "leave them out by `region`")
        return piece


def _factor(raw: Volume, labels: Volume, source: LabelledVolume) -> Shape:
    """Raw voxels per label voxel along each axis. Raises BadRequest where that is no whole number."""
    whole = whole_ratio(labels.voxel_size_nm, raw.voxel_size_nm)
    if whole is None:
        ratio = [g / r for g, r in zip(labels.voxel_size_nm, raw.voxel_size_nm, strict=True)]
        raise BadRequest(f"labels of {'x'.join(f'{v:g}' for v in labels.voxel_size_nm)} nm over raw voxels of "
                         f"{'x'.join(f'{v:g}' for v in raw.voxel_size_nm)} nm: the ratio {', '.join(f'{r:.3g}' for r in ratio)} is "
                         "no whole number", where=source.labels,
                         todo="choose levels by raw_voxel_size and label_voxel_size, or resample one")
    return whole


def _covered(labels: VoxelGrid, raw: VoxelGrid, source: LabelledVolume) -> tuple[Shape, Shape]:
    """(start, shape) of the label voxels that lie within raw. Raises BadRequest when none does or the grids are shifted."""
    start, shape = [], []
    for axis in range(3):
        size, fine = labels.pitch_nm[axis], raw.pitch_nm[axis]
        corner = labels.first_nm[axis] - size / 2 - (raw.first_nm[axis] - fine / 2)  # of the labels, from raw's
        apart = abs(corner / fine - round(corner / fine))
        if apart > ALIGNED:
            raise BadRequest(f"labels lie {apart:.2f} raw voxels beside the raw grid along {'zyx'[axis]}", where=source.labels,
                             todo="mend the translation in the metadata, or resample the labels onto the raw grid")
        low = max(0, -int(np.floor(corner / size + 1e-6)))
        high = min(labels.shape[axis], int(np.floor((raw.extent_nm[axis] - corner) / size + 1e-6)))
        if high <= low:
            raise BadRequest(f"labels and raw do not meet along {'zyx'[axis]}", where=source.labels,
                             todo="check translations, voxel sizes and `region`")
        start.append(low)
        shape.append(high - low)
    return tuple(start), tuple(shape)  # type: ignore[return-value]
