"""Volumes larger than what an actor may take; what was predicted beside what was measured.

Every measured run is a process of its own, so that its peak is its own. Bytes are asserted, never seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from dinoray.memory.allocator import ARENAS, give_back, share_arenas
from dinoray.memory.meter import rss
from tests.runs import complete
from tests.volumes.making import check_volume, make_volume, receipts_of, run_alone, volume_flags

MB = 2**20
SIZES = {"unit_windows": None, "unit_planes": None, "token_budget": None}


@pytest.mark.slow
def test_a_volume_four_times_larger_than_the_budget_passes_within_it(tmp_path: Path) -> None:
    source, budget = make_volume(tmp_path / "v.zarr", (768, 768, 768), chunk=64), 768**3 // 4
    memory = run_alone(source, tmp_path / "out", "SHALLOW", unit_windows=None, unit_planes=None, token_budget=512, window_px=128,
                       voxel_size=128, output="fused", memory_bytes=budget)
    check_volume(tmp_path / "out")
    receipts = receipts_of(tmp_path / "out")
    assert sum(receipt.bytes_read for receipt in receipts) >= 3 * 2 * 48 * 768**2, "two slices of 768 x 768 for each target plane"
    assert 0 < memory["above_model"] <= memory["predicted"] <= budget, memory


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "voxel_nm", "dtype", "fields"), [
    ((256, 256, 256), (8, 8, 8), "uint8", {"window_px": 128, "output": "fused", "voxel_size": 32}),
    ((96, 512, 512), (8, 8, 8), "uint16", {"window_px": 512, "halo_px": 32, "planes": "xy,xz", "voxel_size": 64}),
    ((48, 256, 256), (40, 8, 8), "uint16", {"window_px": 128, "output": "fused", "planes": "xy,xz,yz", "voxel_size": 64,
                                            "dense_dtype": "float32", "foreground": "20"}),
])
def test_the_predicted_peak_is_one_to_three_times_the_measured_one(tmp_path: Path, shape: tuple[int, int, int],
                                                                   voxel_nm: tuple[float, float, float], dtype: str,
                                                                   fields: dict[str, object]) -> None:
    source = make_volume(tmp_path / "v.zarr", shape, voxel_nm=voxel_nm, dtype=dtype, chunk=64)
    memory = run_alone(source, tmp_path / "out", "WIDE", **{**SIZES, **fields})
    assert memory["above_model"] <= memory["predicted"] <= 3 * memory["above_model"], memory


def test_a_budget_that_no_slab_fits_is_refused_before_anything_is_begun(tmp_path: Path) -> None:
    source = make_volume(tmp_path / "v.zarr")
    for output in ("planes", "fused"):
        said = complete([sys.executable, "-m", "dinoray.cli", "extract", "volume", str(source), "--out", str(tmp_path / "out"),
                         *volume_flags(memory_bytes=30_000_000, output=output)], code=2)
        assert "one slab needs about" in said and "--memory-bytes" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_what_a_run_may_read_ahead_follows_from_its_budget(tmp_path: Path) -> None:
    """Every slab is read once, and with the smallest budget that is allowed only one of them is in memory."""
    from dinoray.volume_memory import SlabBytes

    slab = SlabBytes(read=10, held=4, compute=100, count=50)
    assert slab.smallest == 110
    assert [slab.ahead(budget, 8) for budget in (50, 110, 119, 120, 145, 10_000)] == [0, 0, 0, 1, 3, 7]
    assert SlabBytes(10, 4, 100, count=3).ahead(10_000, 8) == 2, "no more than there are"
    assert slab.predicted(110, 2, 8) == 110
    assert slab.predicted(145, 2, 8) == 100 + 4 + 2 * 10 + 1 * 4
    budgets = np.arange(110, 400)
    assert all(slab.predicted(int(b), 4, 8) <= b for b in budgets)


def test_freed_memory_goes_back_to_the_system() -> None:
    share_arenas()
    blocks = [np.ones(20_000, np.float32) for _ in range(1_000)]  # 80 kB each: below the size that is mapped by itself
    kept = blocks[-1]  # the top of the heap
    del blocks[:-1]
    before = rss()
    give_back()
    assert sys.platform != "linux" or before - rss() > 40 * MB, (before, rss())
    assert kept.sum() == 20_000 and ARENAS >= 1


def test_a_mask_counts_by_its_own_voxels() -> None:
    from dinoray.volume_memory import Mask

    coarse = Mask((32.0, 32.0, 64.0), (100, 100, 100), 1)
    assert coarse.box_bytes(320, 640, 640, axes=(0, 1, 2)) == 11 * 21 * 11 * 2
    assert coarse.box_bytes(640, 320, 10**6, axes=(2, 0, 1)) == 11 * 11 * 100 * 2, "never more than there is"
