"""What the model sees of a window of a volume: scaled raw voxels, the wider context around it, stored tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dinoray.config.volume_segmentation import SegmentVolumeJob
from dinoray.errors import BadRequest, ItemError
from dinoray.io.prediction_grid import PredictionGrid
from dinoray.io.volume_grid import Shape, Triple
from dinoray.io.volume_pieces import Piece, Pieces, context_box, context_values
from dinoray.io.volumes import Volume
from dinoray.label_planning import context_source, open_source
from dinoray.vision.fusion_checkpoint import FusionConfig
from dinoray.vision.fusion_model import VolumeCrop
from dinoray.vision.stored_tokens import StoredTokens
from dinoray.vision.voxel_grids import VoxelGrid
from dinoray.volume_tokens import open_tokens


class Layer:
    """Raw voxels of all windows of a layer, read at once; `lost` is why that was not possible: then window by window."""

    def __init__(self, start: Shape, piece: Piece | None, error: ItemError | None = None):
        self.start, self.piece, self.error = start, piece, error


class WindowReader:
    """Reads windows of one volume. Safe to use from several threads."""

    def __init__(self, grid: PredictionGrid, volume: Volume, limits: Sequence[float], *,
                 context: tuple[Volume, Shape] | None = None, tokens: StoredTokens | None = None,
                 context_tokens: StoredTokens | None = None):
        """`context`: the level that serves it and its voxels per pixel; None for a model without one."""
        self.grid, self.volume, self.context = grid, volume, context
        self.tokens, self.context_tokens = tokens, context_tokens
        self._low, self._gain = np.float32(limits[0]), np.float32(1 / (limits[1] - limits[0]))

    def close(self) -> None:
        """Close the volumes."""
        for volume in {id(v): v for v in (self.volume, *(self.context or ())[:1])}.values():
            volume.close()

    def layer(self, z: int, rows: range, columns: range) -> Layer:
        """Raw voxels of the windows (z, rows, columns) of the lattice. Raises TransientError, SystemicError."""
        start = self.grid.seen((z, rows[0], columns[0]))[0]
        stop = self.grid.seen((z, rows[-1], columns[-1]))[1]
        try:
            return Layer(start, self._raw(start, stop))
        except ItemError as error:
            return Layer(start, None, error)

    def crop(self, place: Shape, layer: Layer) -> VolumeCrop:
        """What the model sees for a window. Raises ItemError where that cannot be read."""
        grid = self.grid
        start, stop = grid.seen(place)
        shape: Shape = tuple(b - a for a, b in zip(start, stop, strict=True))  # type: ignore[assignment]
        if layer.piece is None:
            raw = self._raw(start, stop).values
        else:
            box = tuple(slice((a - o) * f, (b - o) * f) for a, b, o, f in zip(start, stop, layer.start, grid.factor, strict=True))
            raw = layer.piece.values[box]
        centre: Triple = tuple(t + (a + b - 1) / 2 * p for t, a, b, p  # type: ignore[assignment]
                               in zip(grid.translation_nm, start, stop, grid.voxel_nm, strict=True))
        found = VolumeCrop(_centred(shape, grid.voxel_nm), self._scaled(raw), _centred(raw.shape, grid.raw_voxel_nm))  # type: ignore[arg-type]
        if self.tokens is not None:
            found = replace(found, tokens=self.tokens.around(centre, found.target_grid))
        return found if self.context is None else self._with_context(found, centre, raw.shape)  # type: ignore[arg-type]

    def _with_context(self, crop: VolumeCrop, centre: Triple, pixels: Shape) -> VolumeCrop:
        level, factor = self.context  # type: ignore[misc]
        pitch = tuple(r * f for r, f in zip(level.voxel_size_nm, factor, strict=True))
        box = context_box(level, factor, centre, pixels)
        own = VoxelGrid(pixels, tuple(f - c for f, c in zip(box.corner_nm, centre, strict=True)), pitch)  # type: ignore[arg-type]
        crop = replace(crop, context_grid=own, context_inside=box.inside)
        if self.context_tokens is not None:
            return replace(crop, context_tokens=self.context_tokens.around(centre, own))
        return replace(crop, context=self._scaled(_finite(context_values(Pieces(level), box, factor), level)))

    def _raw(self, start: Shape, stop: Shape) -> Piece:
        factor = self.grid.factor
        piece = Pieces(self.volume).read([a * f for a, f in zip(start, factor, strict=True)],
                                         [(b - a) * f for a, b, f in zip(start, stop, factor, strict=True)])
        return Piece(_finite(piece.values, self.volume), piece.inside)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return np.clip((values.astype(np.float32) - self._low) * self._gain, 0, 1)


def open_reader(job: SegmentVolumeJob, config: FusionConfig, facts: dict[str, Any]) -> WindowReader:
    """The reader of a job, with what its plan fixed. Raises BadRequest, TransientError, SystemicError."""
    grid, volume = PredictionGrid.read(facts["grid"]), open_source(job, config.raw_voxel_nm)
    context = None if config.model.fusion == "none" else context_source(job, config, volume)
    return WindowReader(grid, volume, facts["limits"], context=context, **stored_tokens(job, config, volume, facts["limits"]))


def stored_tokens(job: SegmentVolumeJob, config: FusionConfig, volume: Volume,
                  limits: Sequence[float] | None = None) -> dict[str, StoredTokens]:
    """The stored tokens that a job names, by setting. Raises BadRequest for others' tokens."""
    found = {}
    for name, factor in (("tokens", 1), ("context_tokens", config.context_factor)):
        url = getattr(job, name)
        if url is not None and config.backbone is not None:
            pixel: Triple = tuple(r * factor for r in volume.voxel_size_nm)  # type: ignore[assignment]
            found[name] = open_tokens(url, digest=config.backbone.digest, limits=limits, name=name, raw_voxel_nm=pixel)
            _check_cover(found[name], volume, pixel, name)
    return found


def _check_cover(tokens: StoredTokens, volume: Volume, pixel_nm: Triple, name: str) -> None:
    """Raise BadRequest for tokens that do not reach over the whole volume: beyond their array the outermost ones would go on."""
    for axis in range(3):
        (ours, our_end), (theirs, their_end) = (
            (first - size / 2, first + (n - 0.5) * size)
            for first, size, n in ((volume.translation_nm[axis], volume.voxel_size_nm[axis], volume.shape[axis]),
                                   (tokens.grid.translation_nm[axis], tokens.grid.voxel_nm[axis], tokens.grid.shape[axis])))
        slack = pixel_nm[axis] * (0.5 if name == "tokens" else 1)
        if theirs > ours + slack or their_end < our_end - slack:
            raise BadRequest(f"the stored tokens are of {theirs:g} to {their_end:g} nm along {'zyx'[axis]}, what is segmented is "
                             f"{ours:g} to {our_end:g} nm", where=f"{name}: {tokens.url}",
                             todo="extract the tokens of the whole volume, or choose their part with --crop")


def _finite(values: np.ndarray, volume: Volume) -> np.ndarray:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = values.size - int(np.count_nonzero(np.isfinite(values)))
        raise ItemError("nan", f"{bad} of {values.size} voxels are NaN or infinite", where=volume.ref.uri,
                        todo="fill them, or leave them out with --crop")
    return values


def _centred(shape: Shape, pitch_nm: Triple) -> VoxelGrid:
    return VoxelGrid(shape, tuple(-(n - 1) / 2 * p for n, p in zip(shape, pitch_nm, strict=True)), pitch_nm)  # type: ignore[arg-type]
