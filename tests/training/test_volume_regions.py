"""Regions: what is read where, mirrored and masked beyond them, nothing outside ever read; grids that do not fit are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dinoray.config.volume_labels import LabelledVolume
from dinoray.errors import BadRequest
from dinoray.io.items import FileRef
from dinoray.training.volume_regions import Region
from dinoray.training.volume_sets import _LEVEL, ListedVolume, refuse_shared
from tests.training.volumes import write_volume


def coordinates(shape: tuple[int, int, int], axis: int) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(3)]), shape).astype(np.uint16)


def region(tmp_path: Path, raw: np.ndarray, labels: np.ndarray, *, raw_nm=(8.0,) * 3, label_nm=(16.0,) * 3, label_from=None,
           keep: int = 0, context_nm=None, **fields) -> Region:
    folder = tmp_path / f"v{len(list(tmp_path.iterdir()))}"
    sources = write_volume(folder / "raw", raw, raw_nm), write_volume(folder / "labels", labels, label_nm, label_from)
    return Region(LabelledVolume(raw=str(sources[0]), labels=str(sources[1]), **fields), keep_bytes=keep, context_nm=context_nm)


@pytest.mark.parametrize("keep", [0, 10**9])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_raw_lies_under_its_labels(axis: int, keep: int, tmp_path: Path) -> None:
    shape, coarse = (40, 48, 56), (20, 24, 28)
    found = region(tmp_path, coordinates(shape, axis), coordinates(coarse, axis), keep=keep)
    assert found.factor == (2, 2, 2) and found.label_grid.shape == coarse
    labels, known = found.labels((3, 4, 5), (6, 7, 8))
    raw = found.raw((3, 4, 5), (6, 7, 8))
    assert labels.shape == (6, 7, 8) and known.all() and raw.values.shape == (12, 14, 16) and raw.known.all()
    back = raw.values * (found.high - found.low) + found.low
    first = np.moveaxis(back, axis, 0)[:, 0, 0]
    start = (3, 4, 5)[axis] * 2
    inner = slice(1, -1) if axis == 0 else slice(None)
    np.testing.assert_allclose(first[inner], np.arange(start, start + len(first))[inner], atol=0.01)
    assert np.moveaxis(labels, axis, 0)[0, 0, 0] == (3, 4, 5)[axis]
    found.close()


def test_labels_of_a_part_of_raw_are_found_by_their_translation(tmp_path: Path) -> None:
    raw = coordinates((40, 40, 40), 0)
    labels = np.ones((8, 8, 8), np.uint8)
    found = region(tmp_path, raw, labels, label_from=(8 * 10 + 8.0, 8.0, 8.0))  # from raw voxel 10 on
    assert found.label_grid.shape == (8, 8, 8)
    values = found.raw((0, 0, 0), (1, 1, 1)).values * (found.high - found.low) + found.low
    np.testing.assert_allclose(values[:, 0, 0], [10, 11], atol=0.01)
    labels_, known = found.labels((-2, 0, 0), (4, 8, 8))
    assert known.tolist()[0][0] == [False] * 8 and known[2:].all(), "what is outside is mirrored and not known"
    assert labels_.shape == (4, 8, 8)


def test_nothing_outside_of_a_region_is_read(tmp_path: Path) -> None:
    """Voxels outside are poison: crops and contexts of all places never hold one."""
    raw = np.full((40, 40, 40), 999, np.uint16)
    raw[8:32, 8:40] = coordinates((24, 32, 40), 2)
    labels = np.full((40, 40, 40), 77, np.uint8)
    labels[8:32, 8:40] = 1
    found = region(tmp_path, raw, labels, label_nm=(8.0,) * 3, region="8:32,8:40,0:40", context_nm=(16.0,) * 3)
    assert found.label_grid.shape == (24, 32, 40) and found.high < 45
    for start in ((-8, -8, -8), (0, 0, 0), (20, 28, 36), (10, 10, 10)):
        piece = found.raw(start, (12, 12, 12))
        assert piece.values.max() <= 1 and float(piece.values.max() * (found.high - found.low) + found.low) <= 40
        grid = found.label_grid.part(start, (12, 12, 12))
        context, _, where = found.context(grid.centre_nm, (12, 12, 12))
        assert float(context.max() * (found.high - found.low) + found.low) <= 40
        assert where.extent_nm == (192.0,) * 3
        assert np.abs(np.array(where.centre_nm) - grid.centre_nm).max() <= 4
        values, known = found.labels(start, (12, 12, 12))
        assert set(np.unique(values[known])) <= {1}
        inside = [(np.arange(s, s + 12) >= 0) & (np.arange(s, s + 12) < n) for s, n in zip(start, (24, 32, 40), strict=True)]
        assert (known == inside[0][:, None, None] & inside[1][None, :, None] & inside[2][None, None, :]).all()


def test_a_context_is_the_mean_of_its_voxels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 200, (32, 32, 32)).astype(np.uint8)
    found = region(tmp_path, raw, np.ones((32, 32, 32), np.uint8), label_nm=(8.0,) * 3, context_nm=(16.0,) * 3)
    assert found.context_factor == (2, 2, 2)
    values, inside, grid = found.context((128.0, 128.0, 128.0), (8, 8, 8))
    means = raw[8:24, 8:24, 8:24].reshape(8, 2, 8, 2, 8, 2).mean((1, 3, 5))
    np.testing.assert_allclose(values, np.clip((means - found.low) / (found.high - found.low), 0, 1), atol=1e-5)
    assert all(part.all() for part in inside)
    unread, inside, _ = found.context((0.0, 128.0, 128.0), (8, 8, 8), read=False)
    assert unread is None and inside[0].tolist() == [False] * 4 + [True] * 4
    assert grid.first_nm == (72.0,) * 3 and grid.pitch_nm == (16.0,) * 3


def test_unknown_labels_are_masked(tmp_path: Path) -> None:
    labels = np.ones((16, 16, 16), np.uint8)
    labels[4] = 255
    found = region(tmp_path, coordinates((16, 16, 16), 0), labels, label_nm=(8.0,) * 3, unknown=255)
    _, known = found.labels((0, 0, 0), (16, 16, 16))
    assert not known[4].any() and known[:4].all() and known[5:].all()


@pytest.mark.parametrize(("label_nm", "label_from", "dtype", "words"), [
    ((12.0,) * 3, None, np.uint8, "whole number"), ((4.0,) * 3, None, np.uint8, "whole number"),
    ((16.0,) * 3, (10.0, 8.0, 8.0), np.uint8, "beside the raw grid"), ((16.0,) * 3, (9000.0, 8.0, 8.0), np.uint8, "do not meet"),
    ((16.0,) * 3, None, np.float32, "")])
def test_labels_that_do_not_fit_are_refused(label_nm, label_from, dtype, words, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=words):
        region(tmp_path, coordinates((32, 32, 32), 0), np.ones((16, 16, 16), dtype), label_nm=label_nm, label_from=label_from)


def test_a_raw_without_contrast_or_with_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="nearly everywhere"):
        region(tmp_path, np.full((16, 16, 16), 7, np.uint8), np.ones((8, 8, 8), np.uint8))
    raw = coordinates((16, 16, 16), 0).astype(np.float32)
    raw[3, 3, 3] = np.nan
    with pytest.raises(BadRequest, match="NaN"):
        region(tmp_path, raw, np.ones((8, 8, 8), np.uint8))


@pytest.mark.parametrize(("one", "other", "shared"), [
    (("em.zarr", ""), ("em.zarr", ""), True), (("em.zarr", ""), ("em.zarr/0", ""), True),
    (("em.zarr/1", ""), ("em.zarr", ""), True), (("em.zarr", ""), ("em.zarr2", ""), False),
    (("c.h5", "a/raw"), ("c.h5", "b/raw"), False), (("c.h5", "a/raw"), ("c.h5", "a/raw"), True),
    (("c.n5", "a/s0"), ("c.n5", "a/s1"), True), (("c.n5", "a"), ("c.n5", ""), True), (("c.n5", "s0"), ("c.n5", "s1"), True)])
def test_regions_of_one_volume_must_not_meet_and_those_of_two_may(one, other, shared) -> None:
    box = ((0.0,) * 3, (10.0,) * 3)
    a, b = (ListedVolume("v", (FileRef(f"/d/{uri}", 1, "1"),), 0, box, dataset=_LEVEL.sub("", dataset))
            for uri, dataset in (one, other))
    beside = replace(b, box=((0.0, 0.0, 10.0), (10.0,) * 3))
    refuse_shared([a], [beside])
    if shared:
        with pytest.raises(BadRequest, match="share voxels"):
            refuse_shared([a], [b])
    else:
        refuse_shared([a], [b])
