"""The pictures of a volume's report: features lie where the raw voxels are, what is not computed has no colour, and reads
stay bounded whatever the volume's size."""

from __future__ import annotations

import base64
import io
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinoray.config import ExtractVolumeJob
from dinoray.io.items import FileRef
from dinoray.io.stores import LocalStore
from dinoray.io.volume_arrays import create_arrays
from dinoray.io.volume_grid import NORMAL, VolumeGrid
from dinoray.io.volumes import VolumeRequest, open_volume
from dinoray.io.zarr_reading import open_array
from dinoray.ledger import Receipt, StoredObject
from dinoray.report import volume_raw
from dinoray.report.pca import Basis
from dinoray.report.volume_raw import add_raw, opened, read_raw
from dinoray.report.volume_sample import TokenSample, sample_tokens
from dinoray.report.volume_svg import define, nice_below, panel, unit_of
from dinoray.report.volume_totals import ArrayTotals, VolumeTotals, place_nm
from dinoray.report.volume_views import READ_BYTES, FusedReader, Placed, choose_field, choose_point, make_view
from dinoray.slabs import Slab
from dinoray.units import Unit
from tests.io.volumes import put_array
from tests.report.volumes import MOVE, VOXEL, averaged, noise, write_volume

GRAY = Basis(np.zeros(4), np.eye(3, 4), np.zeros(3), np.full(3, 255.0), (1.0,), 1, 1)
"""Feature values 0..255 as they are."""
BAR = ((30, 44), (55, 77), (20, 52))
"""A bright box, in voxels."""
SHAPE = (70, 110, 90)


def grid_of(shape: tuple[int, int, int] = SHAPE, **fields: object) -> VolumeGrid:
    """A grid with tokens of 4 voxels, coarser than the target voxels."""
    return VolumeGrid(**{"shape": shape, "voxel_nm": VOXEL, "translation_nm": MOVE, "target_nm": (36.0, 28.0, 30.0), "patch": 4,
                         "planes": ("xy", "xz", "yz"), "window_px": 32, "halo_px": 8, "micro_batch": 4, "dim": 4,
                         "dtype": "float32", **fields})


def bar(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A dark volume with the bright box."""
    values = np.zeros(shape, np.uint8)
    values[tuple(slice(*b) for b in BAR)] = 255
    return values


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalStore, VolumeGrid, Path]:
    """An output whose tokens are the brightness below them, and its raw volume."""
    folder, grid = tmp_path_factory.mktemp("bar"), grid_of()
    raw = write_volume(folder / "raw.zarr", bar())
    store, specs = LocalStore(str(folder / "out")), grid.arrays(fused=False)
    create_arrays(store, specs, {"grid": grid.as_dict()})
    for spec in specs:
        put_array(store, spec, averaged(bar(), grid, spec))
    return store, grid, raw


def centre_nm(placed: Placed) -> tuple[float, float]:
    """(row, column) of the centre of brightness in nm from the volume's corner."""
    gray = placed.pixels[..., 0].astype(np.float64)
    if placed.pixels.shape[2] == 4:
        gray = gray * (placed.pixels[..., 3] > 0)
    found = []
    for axis, (low, high) in enumerate((placed.rows, placed.cols)):
        n = gray.shape[axis]
        at = low + (np.arange(n) + 0.5) * (high - low) / n
        found.append(float((gray.sum(axis=1 - axis) * at).sum() / gray.sum()))
    return tuple(found)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["xy", "xz", "yz"])
def test_a_bar_lies_at_one_place_in_raw_fused_and_tokens(stored: tuple[LocalStore, VolumeGrid, Path], name: str) -> None:
    store, grid, path = stored
    point = tuple(int((a + b) / 2 * r / g) for (a, b), r, g in zip(BAR, VOXEL, grid.target_nm, strict=True))
    view = make_view(FusedReader(store, grid, is_stored=False), name, point, GRAY)
    with open_volume(VolumeRequest(str(path))) as volume:
        add_raw(view, volume, grid, (0.0, 255.0))
    assert view.is_whole and view.known == 1.0 and view.raw is not None and not view.problem
    plane = grid.plane(name)
    for axis, of in zip(view.axes, range(2), strict=True):
        truth = sum(BAR[axis]) / 2 * VOXEL[axis]
        half = plane.pitch_nm[axis] / 2
        assert abs(centre_nm(view.raw)[of] - truth) < 0.01 * VOXEL[axis]
        assert abs(centre_nm(view.tokens)[of] - truth) < 0.2 * half
        assert abs(centre_nm(view.fused)[of] - truth) < 0.3 * half


def test_the_page_places_pictures_by_their_coordinates(stored: tuple[LocalStore, VolumeGrid, Path]) -> None:
    store, grid, path = stored
    view = make_view(FusedReader(store, grid, is_stored=False), "xz", (13, 20, 10), GRAY)
    with open_volume(VolumeRequest(str(path))) as volume:
        add_raw(view, volume, grid, (0.0, 255.0))
    pictures = {}
    for name, x, y, width, height, uri in re.findall(r'<image id="xz-(\w+)" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)" .*?'
                                                     r'base64,(.*?)"', define(view)):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.replace("&#43;", "+")))))
        gray = pixels if pixels.ndim == 2 else pixels[..., 0]
        x, y, width, height = map(float, (x, y, width, height))
        pictures[name] = Placed(gray[..., None], (y, y + height), (x, x + width))
    assert pictures.keys() == {"raw", "fused", "tokens"}
    truth = [sum(BAR[a]) / 2 * VOXEL[a] for a in view.axes]
    for name, half in (("raw", VOXEL), ("tokens", grid.plane("xz").pitch_nm), ("fused", grid.plane("xz").pitch_nm)):
        for found, expected, axis in zip(centre_nm(pictures[name]), truth, view.axes, strict=True):
            assert abs(found - expected) < half[axis] / 2, name
    # all panels show the same part of the plane: the volume's own extent
    boxes = {re.search(r'<svg x="[^"]*" y="[^"]*" width="([^"]*)" height="([^"]*)" viewBox="([^"]*)"', panel(view, layers, (0, 0)))
             .groups() for layers in (("raw",), ("fused",), ("raw", "fused"), ("tokens",))}  # type: ignore[union-attr]
    (width, height, box), = boxes
    assert [float(n) for n in box.split()] == [0, 0, 90 * 10, 70 * 12]
    assert float(width) / float(height) == pytest.approx(900 / 840)


def test_a_misplaced_bar_is_seen(stored: tuple[LocalStore, VolumeGrid, Path]) -> None:
    """The test above can fail: tokens that begin one token late are off by one."""
    store, grid, _ = stored
    view = make_view(FusedReader(store, grid, is_stored=False), "xy", (12, 18, 12), GRAY)
    pitch = grid.plane("xy").pitch_nm[1]
    late = Placed(view.tokens.pixels, (view.tokens.rows[0] + pitch, view.tokens.rows[1] + pitch), view.tokens.cols)
    assert abs(centre_nm(late)[0] - sum(BAR[1]) / 2 * VOXEL[1]) > pitch / 2


def test_what_is_not_computed_has_no_colour(tmp_path: Path) -> None:
    grid = grid_of()
    store, specs = LocalStore(str(tmp_path)), grid.arrays(fused=False)
    create_arrays(store, specs, {"grid": grid.as_dict()})
    for spec in specs:
        values = averaged(bar(), grid, spec)
        values[:, :, :, :spec.shape[2] // 3] = np.nan
        put_array(store, spec, values)
    view = make_view(FusedReader(store, grid, is_stored=False), "xy", (12, 18, 15), GRAY)
    alpha = view.fused.pixels[..., 3]
    assert not alpha[:, :6].any() and (alpha[:, 14:] == 255).all() and set(np.unique(alpha)) == {0, 255}
    assert not view.fused.pixels[alpha == 0].any() and 0.5 < view.known < 0.8
    assert 'fill="url(#hatch)"' in panel(view, ("fused",), (0, 0))


def test_the_views_go_through_the_middle_or_where_features_are(tmp_path: Path) -> None:
    grid = grid_of()
    store, specs = LocalStore(str(tmp_path)), grid.arrays(fused=False)
    create_arrays(store, specs, {"grid": grid.as_dict()})
    reader, totals = FusedReader(store, grid, is_stored=False), VolumeTotals(grid)
    assert choose_point(reader, TokenSample()) == ((12, 16, 15), True)  # nothing anywhere: the middle
    for spec in specs:  # only in the last fifth along y
        values = averaged(bar(), grid, spec)
        values[:, :, :spec.shape[1] * 4 // 5] = np.nan
        put_array(store, spec, values)
        totals.arrays[spec.name] = ArrayTotals(places=[(k, i, j) for k in range(-(-spec.shape[0] // spec.shards[0]))
                                                       for i in range(-(-spec.shape[1] // spec.shards[1]))
                                                       for j in range(-(-spec.shape[2] // spec.shards[2]))])
    sample = sample_tokens({name: open_array(store, name) for name in grid.planes}, grid, totals.arrays)
    point, is_middle = choose_point(reader, sample)
    assert not is_middle and point[1] >= 25 and 3 < point[0] < 20 and 4 < point[2] < 26
    assert not np.isnan(reader.read(point, tuple(n + 1 for n in point))).any()
    assert sample.basis is not None and np.isfinite(sample.basis.components).all()
    again = sample_tokens({name: open_array(store, name) for name in grid.planes}, grid, totals.arrays)
    assert again.basis is not None and (again.basis.components == sample.basis.components).all()


@pytest.mark.parametrize("is_stored", [False, True])
def test_views_of_a_huge_volume_are_bounded(tmp_path: Path, is_stored: bool) -> None:
    grid = VolumeGrid((40_000, 40_000, 40_000), (8.0,) * 3, (0.0,) * 3, (32.0,) * 3, 16, ("xy", "xz", "yz"), 512, 32, 4, 1024,
                      "float16")
    store = LocalStore(str(tmp_path))
    create_arrays(store, grid.arrays(fused=True), {"grid": grid.as_dict()})
    reader = FusedReader(store, grid, is_stored=is_stored)
    point = (5000, 20, 9990)
    for normal in NORMAL.values():
        start, stop = choose_field(reader, normal, point)
        assert READ_BYTES / 4 < reader.cost(start, stop) <= READ_BYTES
        assert all(0 <= a <= p < b <= n for a, p, b, n in zip(start, point, stop, grid.target_shape, strict=True))
        assert stop[normal] - start[normal] == 1
    tracemalloc.start()
    try:
        view = make_view(reader, "xy", point, Basis(np.zeros(1024, np.float32), np.eye(3, 1024, dtype=np.float32), np.zeros(3),
                                                    np.ones(3), (1.0,), 1, 1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not view.is_whole and view.known == 0 and peak < 400e6


def test_raw_is_read_coarsely_and_still_in_place(stored: tuple[LocalStore, VolumeGrid, Path],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    store, grid, path = stored
    view = make_view(FusedReader(store, grid, is_stored=False), "xy", (12, 18, 12), GRAY)
    monkeypatch.setattr(volume_raw, "MOST_READ_PX", 40)
    with open_volume(VolumeRequest(str(path))) as volume:
        placed, note = read_raw(view, volume, grid, (0.0, 255.0))
        assert note == "y: every 3, x: every 3" and placed is not None and placed.pixels.shape == (37, 30, 3)
        for found, axis in zip(centre_nm(placed), view.axes, strict=True):
            assert abs(found - sum(BAR[axis]) / 2 * VOXEL[axis]) < 1.01 * VOXEL[axis]
        monkeypatch.setattr(volume_raw, "READ_BYTES", 1000)  # less than one chunk
        add_raw(view, volume, grid, None)
    assert view.raw is None and "chunks would have to be read" in view.problem


def test_raw_between_two_slices_is_their_mean_by_distance(tmp_path: Path) -> None:
    values = np.repeat(np.repeat(np.arange(20, dtype=np.uint8)[:, None, None] * 10, 32, 1), 32, 2)
    grid = grid_of((20, 32, 32), target_nm=(30.0, 28.0, 30.0))
    store = LocalStore(str(tmp_path / "out"))
    create_arrays(store, grid.arrays(fused=False), {})
    view = make_view(FusedReader(store, grid, is_stored=False), "xy", (3, 4, 4), GRAY)
    with open_volume(VolumeRequest(str(write_volume(tmp_path / "raw.zarr", values)))) as volume:
        placed, _ = read_raw(view, volume, grid, (0.0, 255.0))
    assert placed is not None and view.at_nm == 105.0  # 105 / 12 - 1/2 = slice 8.25
    assert (placed.pixels == 83).all() or (placed.pixels == 82).all()


def test_a_volume_that_changed_is_not_drawn(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "raw.zarr", noise((20, 32, 32)))
    job = ExtractVolumeJob(sources=(str(path),), out=str(tmp_path / "out"))
    grid = grid_of((20, 32, 32))
    with open_volume(VolumeRequest(str(path))) as volume:
        now = volume.ref.version
    with opened(job, grid, {"an earlier version", now}) as source:
        assert not isinstance(source, str)
    with opened(job, grid, {"an earlier version"}) as source:
        assert "changed" in source
    with opened(job, grid_of((20, 32, 40)), {now}) as source:
        assert "changed" in source
    with opened(job.model_copy(update={"sources": (str(tmp_path / "gone.zarr"),)}), grid, {now}) as source:
        assert "no such file or folder" in source


def test_where_a_slab_lies_in_nm() -> None:
    grid = grid_of()
    (z, y, x) = place_nm(grid, Slab("xy", (0, 0, 8), (8, 16, 99)))
    assert z == (594.0, 594.0 + 8 * 36) and y == (-44.0, -44.0 + 16 * 32) and x == (995.0 + 8 * 32, 995.0 + 900)


def test_a_retry_adds_what_it_computed_and_covers_nothing_twice() -> None:
    grid = grid_of()
    first, second = Slab("xy", (0, 0, 0), (8, 28, 23)), Slab("xy", (8, 0, 0), (16, 28, 23))
    tokens = 8 * 28 * 23
    totals, file = VolumeTotals(grid), FileRef("/nowhere", 1, "1")

    def receipt(*slabs: Slab, rows: int, keys: list[str], **fields: object) -> tuple[Receipt, Unit]:
        unit = Unit(0, "u", tuple(slab.item(file, 1) for slab in slabs))
        stored = [StoredObject(key, 10, "") for key in [*keys, "_dinoray/quarantine/u.parquet"]]
        return Receipt("u", 0, "f", rows=rows, objects=stored, items=len(slabs), **fields), unit

    totals.add(*receipt(first, second, rows=tokens, keys=["dense/xy.zarr/0/c/0/0/0/0"], memory={"predicted": 7, "above_model": 3}),
               again=False)
    windows = totals.arrays["xy"].windows
    totals.add(*receipt(second, rows=tokens - 5, keys=["dense/xy.zarr/0/c/0/1/0/0"], memory={"above_model": 4}), again=True)
    found = totals.arrays["xy"]
    assert (found.covered, found.computed, found.windows) == (2 * tokens, 2 * tokens - 5, windows)
    assert (found.shards, found.num_bytes) == (2, 20)
    assert found.places == [(0, 0, 0), (1, 0, 0)] and (totals.predicted_bytes, totals.measured_bytes) == (7, 4)


def test_stored_shards_are_thinned_evenly() -> None:
    totals = ArrayTotals()
    for k in range(10_000):
        totals.store((k, 0, 0), 7)
    assert totals.shards == 10_000 and totals.num_bytes == 70_000 and 1000 < len(totals.places) <= 4096
    assert len(set(np.diff([place[0] for place in totals.places]))) == 1


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 1e12))
def test_round_lengths(length: float) -> None:
    nice = nice_below(length)
    assert length / 2.51 < nice <= length * 1.000001 and f"{nice:.0e}"[0] in "125"
    size, name = unit_of(length)
    assert name in ("nm", "µm", "mm") and (length / size < 2000 or name == "mm")
