"""Registration: features lie where their coordinates say, borders included. The backbone is a fake that returns, for each
token, the coordinates of its centre as it finds them in the pixels: three features, the raw voxel indices z, y, x."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinoray.io.fusion import fuse_box, plane_to_grid
from dinoray.io.items import FileRef
from dinoray.io.volume_grid import PlaneGrid, VolumeGrid
from dinoray.io.windows import TokenGrid
from dinoray.runners.volume_slabs import read_slab
from dinoray.slabs import UnitSizes

WINDOW, HALO, PATCH, BATCH = 64, 16, 16, 2
IN_PLANE, NORMAL_NEAREST = 0.01, 0.5


class Coordinates:
    """A volume whose voxels hold their own index along one axis, beyond its borders too (where a real one is padded)."""

    ref = FileRef("coordinates", 0, "1")

    def __init__(self, axis: int):
        self.axis = axis

    def read(self, *indices) -> np.ndarray:
        ranges = [np.arange(i.start, i.stop) if isinstance(i, slice) else i for i in indices]
        return np.broadcast_to(np.ix_(*ranges)[self.axis], [len(r) for r in ranges]).astype(np.float32)


@pytest.fixture
def unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices beyond the border are asked of the volume itself: padding is about content, this is about places."""
    monkeypatch.setattr("dinoray.io.slab_pixels.reflect", lambda index, size: index)


def make_grid(shape, voxel, target, planes=("xy", "xz", "yz"), edges="extrapolate", translation=(0.0, 0.0, 0.0)) -> VolumeGrid:
    return VolumeGrid(shape, voxel, translation, target, PATCH, planes, WINDOW, HALO, BATCH, 3, "float32", edges)


def tokens_of(plane: PlaneGrid, rule: str, volume=Coordinates) -> np.ndarray:
    """The tokens [3, z, y, x] of a plane, slab by slab through the pieces that the runner uses."""
    grid = plane.grid
    found = np.full((3, *plane.shape), np.nan, np.float32)
    for slabs in UnitSizes(2, 4).units(grid):
        for slab in slabs:
            if slab.array != plane.name:
                continue
            for axis in range(3):
                prepared = read_slab(volume(axis), grid, slab, rule)
                blend = TokenGrid(prepared.windows, prepared.num_planes, 1)
                height, width = prepared.windows.size_px
                for window, first in prepared.batches:
                    pixels = prepared.pixels[first:first + BATCH, window.y:window.y + height, window.x:window.x + width]
                    centres = pixels.reshape(len(pixels), height // PATCH, PATCH, width // PATCH, PATCH).mean(axis=(2, 4),
                                                                                                            dtype=np.float64)
                    blend.add(window, first, centres[..., None].astype(np.float32))
                box = tuple(slice(a, b) for a, b in zip(slab.start, slab.stop, strict=True))
                found[(axis, *box)] = blend.finished(lambda tokens, missing: tokens)[0]
    assert not np.isnan(found).any()
    return found


def reader(tokens: np.ndarray):
    return lambda z0, z1, y0, y1, x0, x1: tokens[:, z0:z1, y0:y1, x0:x1]


def centres(grid: VolumeGrid, axis: int) -> np.ndarray:
    """Raw voxel indices of the centres of the target voxels along an axis."""
    return (np.arange(grid.target_shape[axis]) + 0.5) * grid.target_nm[axis] / grid.voxel_nm[axis] - 0.5


def wanted(grid: VolumeGrid) -> np.ndarray:
    """Raw voxel indices [3, z, y, x] of the centres of all target voxels."""
    return np.stack(np.meshgrid(*(centres(grid, axis) for axis in range(3)), indexing="ij"))


def errors(grid: VolumeGrid, plane: PlaneGrid, rule: str) -> tuple[float, float]:
    """(largest error in the plane, along the normal) in raw voxels: in the plane at all target voxels, along the normal at
    all whose centre lies in the volume. A last plane with its centre beyond the volume is taken at the volume's face."""
    on_grid = plane_to_grid(reader(tokens_of(plane, rule)), plane, (0, 0, 0), grid.target_shape)
    error = np.abs(on_grid - wanted(grid))
    along = np.moveaxis(error[plane.normal], plane.normal, 0)
    beyond = np.maximum(0, centres(grid, plane.normal) - (grid.shape[plane.normal] - 0.5))
    assert (along[beyond > 0].max(initial=0) <= beyond.max() + NORMAL_NEAREST) and (beyond > 0).sum() <= 1
    return max(error[a].max() for a in plane.axes), along[beyond == 0].max()


def cases() -> Iterator[tuple]:
    shapes = [(96, 80, 64), (37, 101, 83), (18, 130, 40)]
    voxels = [((8.0, 8.0, 8.0), (32.0,) * 3), ((20.0, 8.0, 8.0), (40.0,) * 3), ((7.0, 11.0, 13.0), (29.3,) * 3),
              ((8.0, 8.0, 8.0), (8.0, 24.0, 50.0))]
    yield from product(shapes, voxels, ("xy", "xz", "yz"))


@pytest.mark.parametrize(("shape", "sizes", "name"), list(cases()))
def test_each_plane_on_the_target_grid(unpadded: None, shape, sizes, name: str) -> None:
    grid = make_grid(shape, *sizes)
    in_plane, normal = errors(grid, grid.plane(name), "interpolate")
    assert in_plane <= IN_PLANE
    assert normal <= IN_PLANE


@pytest.mark.parametrize("name", ["xy", "xz", "yz"])
def test_the_other_rules_along_the_normal(unpadded: None, name: str) -> None:
    grid = make_grid((37, 101, 83), (7.0, 11.0, 13.0), (29.3,) * 3)
    in_plane, normal = errors(grid, grid.plane(name), "nearest")
    assert in_plane <= IN_PLANE and IN_PLANE < normal <= NORMAL_NEAREST + 1e-4
    in_plane, normal = errors(grid, grid.plane(name), "antialias")
    assert in_plane <= IN_PLANE and normal <= IN_PLANE


@pytest.mark.parametrize("name", ["xy", "xz", "yz"])
def test_linspace_would_fail(unpadded: None, name: str) -> None:
    grid = make_grid((96, 96, 96), (8.0,) * 3, (32.0,) * 3)
    in_plane, normal = errors(grid, grid.plane(name), "linspace")
    assert in_plane <= IN_PLANE and normal > 1


def test_clamped_edges_and_align_corners_would_fail(unpadded: None) -> None:
    grid = make_grid((96, 80, 64), (8.0,) * 3, (32.0,) * 3, edges="clamp")
    plane = grid.plane("xy")
    assert errors(grid, plane, "interpolate")[0] > 1
    tokens = torch.from_numpy(tokens_of(plane, "interpolate")).transpose(0, 1)  # [z, 3, y, x]
    aligned = F.interpolate(tokens, size=grid.target_shape[1:], mode="bilinear", align_corners=True).transpose(0, 1).numpy()
    assert np.abs(aligned - wanted(grid))[1:].max() > 1


def test_the_average_of_the_planes_and_the_coordinates_of_a_crop(unpadded: None) -> None:
    crop, voxel, origin = (10, 3, 41), (20.0, 8.0, 8.0), (1000.0, -50.0, 12.0)
    translation = tuple(t + c * r for t, c, r in zip(origin, crop, voxel, strict=True))
    grid = make_grid((37, 101, 83), voxel, (40.0,) * 3, translation=translation)
    tokens = {name: tokens_of(grid.plane(name), "interpolate") for name in grid.planes}
    fused = fuse_box({name: reader(t) for name, t in tokens.items()}, grid, (0, 0, 0), grid.target_shape)
    inside = (wanted(grid) <= np.array(grid.shape).reshape(3, 1, 1, 1) - 0.5).all(axis=0)
    assert inside.mean() > 0.8 and np.abs(fused - wanted(grid))[:, inside].max() <= IN_PLANE
    # what the metadata say of every stored element, in nm of the uncropped volume's world, is where its pixels lie
    for spec, values in [*((grid.plane(name).array, tokens[name]) for name in grid.planes), (grid.fused, fused)]:
        for axis in range(3):
            said = spec.translation_nm[axis] + np.arange(spec.shape[axis]) * spec.pitch_nm[axis]
            index = np.moveaxis(values[axis], axis, -1) + crop[axis]
            error = np.abs(origin[axis] + index * voxel[axis] - said)
            last = origin[axis] + (crop[axis] + grid.shape[axis] - 0.5) * voxel[axis]
            assert error[..., said <= last].max() <= IN_PLANE * voxel[axis]


@pytest.mark.parametrize("voxel", [(8.0, 8.0, 8.0), (20.0, 8.0, 8.0), (7.0, 11.0, 13.0)])
def test_padding_by_reflection_moves_no_token_that_lies_inside(voxel) -> None:
    shape = (37, 101, 83)
    grid = make_grid(shape, voxel, (40.0,) * 3)

    class Inside(Coordinates):
        def read(self, *indices) -> np.ndarray:
            for size, i in zip(shape, indices, strict=True):
                first, last = (i.start, i.stop - 1) if isinstance(i, slice) else (i[0], i[-1])
                assert first >= 0 and last < size
            return super().read(*indices)

    for name in grid.planes:
        plane = grid.plane(name)
        found = tokens_of(plane, "interpolate", Inside)
        for axis in plane.axes:
            side = PATCH * plane.pixel_nm / voxel[axis]  # of a token, in raw voxels
            whole = int(shape[axis] / side + 1e-9)
            places = np.moveaxis(found[axis], axis, -1)[..., :whole]
            np.testing.assert_allclose(places, np.broadcast_to((np.arange(whole) + 0.5) * side - 0.5, places.shape), atol=IN_PLANE)
