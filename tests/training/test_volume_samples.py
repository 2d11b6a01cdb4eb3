"""Samples of volumes: functions of seed and index, filters, turns that keep all together, what spoils raw and never labels."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dinoray.config.fusion import VolumeAugmentation
from dinoray.errors import BadRequest, SystemicError
from dinoray.training.volume_augmentation import spoil
from dinoray.training.volume_regions import Region
from dinoray.training.volume_samples import CropSampler, centred
from dinoray.training.volume_turns import PLANE_OF, Turn, turns
from dinoray.vision.voxel_grids import VoxelGrid
from tests.training.volumes import build, fusion_job, make_pair, write_volume

NOTHING = {"p_tone": 0, "p_noise": 0, "p_blur": 0, "p_missing": 0, "p_shifted": 0}


def sampler(pair: tuple[Path, Path], context_nm=None, **fields) -> CropSampler:
    job = build(fusion_job(pair, "out", **fields))
    return CropSampler(job, [Region(source, keep_bytes=10**8, context_nm=context_nm) for source in job.train])


def test_a_sample_is_a_function_of_seed_and_index(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    one, other, reseeded = sampler(pair), sampler(pair), sampler(pair, seed=1)
    for index in (7, 3, 0):
        a, b, c = one.draw(index), other.draw(index), reseeded.draw(index)
        np.testing.assert_array_equal(a.crop.raw, b.crop.raw)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert not np.array_equal(a.crop.raw, c.crop.raw)
    assert len({one.draw(i).crop.raw.tobytes() for i in range(20)}) == 20


@pytest.mark.parametrize("factor", [1, 2])
def test_raw_context_and_labels_are_turned_together(factor: int, tmp_path: Path) -> None:
    """Coordinates as raw: after any turn, raw at a label voxel's centre is that of the voxel that its label came from."""
    shape = (32, 32, 32)
    number = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    fine = tuple(n * factor for n in shape)
    raw = np.kron(number, np.ones((factor,) * 3, np.uint32)).astype(np.float32)
    pair = write_volume(tmp_path / "raw", raw, (16.0 / factor,) * 3), write_volume(tmp_path / "labels", number, (16.0,) * 3)
    assert raw.shape == fine
    drawn = sampler(pair, (16.0,) * 3, crop_voxels=8, augmentation=NOTHING, fusion="gate",
                    model="vitt16", weights="random", context_factor=1)
    region = drawn.regions[0]
    seen = set()
    for index in range(40):
        sample = drawn.draw(index)
        back = np.rint(sample.crop.raw * (region.high - region.low) + region.low)
        inside = (sample.labels > region.low + 1) & (sample.labels < region.high - 1)  # percentiles cut the ends off
        np.testing.assert_allclose(back[::factor, ::factor, ::factor][inside], sample.labels[inside], atol=2)
        assert sample.crop.context is not None and sample.crop.context_grid is not None
        seen.add(tuple(np.sign(np.diff(sample.labels.astype(int), axis=a)).flat[0] for a in range(3)))
    assert len(seen) == 8, "all mirrorings are drawn"


def test_turns_of_grids_follow_those_of_arrays() -> None:
    grid = VoxelGrid((2, 3, 4), (-5.0, 1.0, 10.0), (4.0, 2.0, 1.0))
    fields = np.stack(np.meshgrid(*(grid.centres(a) for a in range(3)), indexing="ij"))
    for turn in turns("cube", (4, 4, 4), [(1.0, 1.0, 1.0)]):
        turned, where = turn.array(fields), turn.grid(grid)
        for axis in range(3):
            source, sign = turn.order[axis], -1 if turn.mirror[axis] else 1
            centres = where.centres(axis).reshape([-1 if a == axis else 1 for a in range(3)])
            np.testing.assert_allclose(turned[source] * sign, np.broadcast_to(centres, where.shape))


def test_tokens_of_a_plane_go_to_the_plane_that_it_became() -> None:
    turn = Turn((2, 0, 1), (True, False, False))
    planes = {name: (np.zeros((5, *shape)), centred(shape, (1.0, 1.0, 1.0))) for name, shape in
              {"xy": (8, 2, 2), "xz": (2, 8, 2), "yz": (2, 2, 8)}.items()}
    for name, (values, grid) in turn.tokens(planes).items():
        normal = {v: k for k, v in PLANE_OF.items()}[name]
        assert values.shape[1 + normal] == grid.shape[normal] == 8


def test_how_many_turns_voxels_allow() -> None:
    cube, flat = (8, 8, 8), (4, 8, 8)
    equal, thick, skewed = [(8.0,) * 3], [(40.0, 8.0, 8.0)], [(4.0, 5.0, 6.0)]
    assert [len(turns("auto", cube, s)) for s in (equal, thick, skewed)] == [48, 16, 8]
    assert len(turns("auto", flat, equal)) == 16, "turns that would change the crop's shape are left out"
    assert len(turns("none", cube, equal)) == 1 and len(turns("flips", cube, equal)) == 8
    assert len({(t.order, t.mirror) for t in turns("cube", cube, equal)}) == 48


def test_filters_and_a_region_without_what_they_ask_for(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    for index in range(10):
        sample = sampler(pair, min_foreground=0.35, min_ids=3).draw(index)
        assert (sample.labels[sample.known] != 0).mean() >= 0.35 and len(np.unique(sample.labels)) >= 3
    with pytest.raises(SystemicError, match="none of 5 places.*min_ids 900"):
        sampler(pair, min_ids=900, max_attempts=5).draw(0)
    empty = write_volume(tmp_path / "empty", np.zeros((40, 40, 40), np.uint8), (16.0,) * 3)
    with pytest.raises(SystemicError, match="0.0% foreground"):
        sampler((pair[0], empty), min_foreground=0.1, max_attempts=5).draw(0)
    assert not sampler((pair[0], empty)).draw(0).labels.any(), "crops of background alone are fine where nothing else is asked for"


def test_a_region_smaller_than_a_crop_is_padded_and_masked_and_a_much_smaller_one_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, (10, 40, 40))
    sample = sampler(pair, crop_voxels=16, augmentation=NOTHING | {"turns": "none"}).draw(0)
    assert sample.labels.shape == (16, 16, 16) and sample.known.any((1, 2)).sum() == 10
    with pytest.raises(BadRequest, match="not half as wide as a crop"):
        sampler(pair, crop_voxels=24)


def test_weights_share_out_the_samples(tmp_path: Path) -> None:
    a, b = make_pair(tmp_path / "a", seed=0), make_pair(tmp_path / "b", seed=5)
    job = build(fusion_job(a, "out") | {"train": [{"raw": str(a[0]), "labels": str(a[1]), "weight": 3.0},
                                                  {"raw": str(b[0]), "labels": str(b[1])}]})
    drawn = CropSampler(job, [Region(s, keep_bytes=10**8) for s in job.train])
    used = []
    drawn.at = lambda region, start, keep=drawn.at: used.append(region) or keep(region, start)  # type: ignore[method-assign]
    for i in range(200):
        drawn.draw(i)
    assert 0.65 < sum(r is drawn.regions[0] for r in used) / 200 < 0.85


def test_what_spoils_raw() -> None:
    grid, wide = centred((8, 8, 8), (10.0,) * 3), centred((8, 8, 8), (40.0,) * 3)
    rng = np.random.default_rng(0)
    raw, context = (rng.random((8, 8, 8), np.float32) for _ in range(2))
    off = {"p_tone": 0.0, "p_noise": 0.0, "p_blur": 0.0, "p_missing": 0.0, "p_shifted": 0.0}

    def run(seed: int = 0, **on) -> tuple[np.ndarray, np.ndarray]:
        return spoil(raw, grid, context, wide, VolumeAugmentation(**off | on), np.random.default_rng(seed))  # type: ignore[return-value]

    kept = run()
    np.testing.assert_array_equal(kept[0], raw)
    np.testing.assert_array_equal(kept[1], context)
    missing, around = run(p_missing=1)
    black = np.flatnonzero(~missing.any((1, 2)))
    assert len(black) == 1 and np.array_equal(np.delete(missing, black, 0), np.delete(raw, black, 0))
    dimmed = np.flatnonzero((around != context).any((1, 2)))
    assert dimmed.tolist() in ([3], [4]), "the section lies in the middle of the context"
    np.testing.assert_allclose(around[dimmed], 0.75 * context[dimmed], rtol=1e-6)  # one of the four sections of a pixel
    shifted, same = run(p_shifted=1)
    changed = np.flatnonzero((shifted != raw).any((1, 2)))
    assert len(changed) <= 1 and np.array_equal(same, context)
    assert any(len(np.flatnonzero((run(s, p_shifted=1)[0] != raw).any((1, 2)))) == 1 for s in range(5))
    for name in ("p_tone", "p_noise", "p_blur"):
        a, b = run(3, **{name: 1})
        assert not np.array_equal(a, raw) and not np.array_equal(b, context) and a.min() >= 0 and a.max() <= 1
    # one option leaves the others' choices as they were
    both, alone = run(4, p_missing=1, p_tone=1), run(4, p_tone=1)
    assert np.corrcoef(both[0].ravel(), alone[0].ravel())[0, 1] > 0.5
    assert all(np.array_equal(x, y) for x, y in zip(run(9, p_noise=1), run(9, p_noise=1), strict=True))


def test_numbers_drawn_are_independent_of_what_they_are_used_for() -> None:
    """Missing sections come at the same places whatever else is on."""
    grid = centred((16, 4, 4), (10.0,) * 3)
    raw = np.full((16, 4, 4), 0.5, np.float32)
    for seed, tone in product(range(6), (0.0, 1.0)):
        found, _ = spoil(raw, grid, None, None,
                         VolumeAugmentation(p_missing=1, p_tone=tone, p_noise=0, p_blur=0, p_shifted=0, brightness=0),
                         np.random.default_rng(seed))
        place = int(np.argmin(found.mean((1, 2))))
        drawn = np.random.default_rng(seed).random(14)
        assert place == int(drawn[1] * 16)
