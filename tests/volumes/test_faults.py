"""Outputs of volumes after kills, torn shards, damaged chunks and poison: the bytes of a run that nothing disturbed.

Units are killed in processes of their own that begin from a fork server, so a start costs little.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.chaos.kills import Kill
from dinoray.chaos.striking import start_and_strike
from dinoray.errors import BadRequest, ChangedRequest, OutputDamaged
from dinoray.export.plain import export_table
from dinoray.export.profiles import export_profiles
from dinoray.io.stores import LocalStore
from dinoray.io.volume_arrays import shard_key, shards_of
from dinoray.io.volume_grid import VolumeGrid
from dinoray.io.zarr_reading import open_array
from dinoray.runners.volume_slabs import slab_geometry
from dinoray.slabs import Slab, UnitSizes, all_units, array_of, check_alone, choose_sizes, shard_keys
from dinoray.units import Plan
from dinoray.verification import open_run, verify_deep, verify_fast
from tests.runs import complete, data_objects
from tests.volumes.making import (
    SHALLOW,
    check_volume,
    forgive,
    make_volume,
    receipts_of,
    run_in_child,
    run_volume,
    use_backbone,
    volume_flags,
)

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_volume(tmp_path_factory.mktemp("source") / "v.zarr")


@pytest.fixture(scope="module")
def clean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused output of a run that nothing disturbs; its planes are those of --output planes."""
    out = tmp_path_factory.mktemp("clean") / "out"
    assert run_in_child("", source, out, output="fused") == 0
    check_volume(out)
    return out


@pytest.fixture
def out(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished output, which jobs in this process can resume."""
    use_backbone(monkeypatch, SHALLOW)
    shutil.copytree(clean, tmp_path / "out")
    return tmp_path / "out"


# ---------------------------------------------------------------- no shard has two owners


@st.composite
def grids(draw: st.DrawFn) -> VolumeGrid:
    """Geometries of any kind: long and short sides, anisotropic voxels, windows without and with a halo."""
    patch = draw(st.sampled_from([8, 16]))
    halo = draw(st.integers(0, 2))
    window = draw(st.integers(max(1, 4 * halo), 4 * halo + 6))
    voxel = tuple(draw(st.sampled_from([4.0, 8.0, 9.5, 40.0])) for _ in range(3))
    target = max(max(voxel), draw(st.sampled_from([16.0, 32.0, 100.0])))
    shape = tuple(draw(st.one_of(st.integers(1, 64), st.integers(65, 1500))) for _ in range(3))
    planes = tuple(p for p in ("xy", "xz", "yz") if draw(st.booleans())) or ("xy",)
    return VolumeGrid(shape, voxel, (0.0, 0.0, 0.0), (target,) * 3, patch, planes, window * patch, halo * patch,
                      draw(st.sampled_from([1, 2, 4, 16])), draw(st.sampled_from([16, 384, 4096])),
                      draw(st.sampled_from(["float16", "float32"])))


@settings(max_examples=60, deadline=None)
@given(grid=grids(), windows=st.one_of(st.none(), st.integers(1, 4)), planes=st.one_of(st.none(), st.integers(1, 40)),
       fused=st.booleans())
def test_slabs_share_no_object_and_cover_every_array(grid: VolumeGrid, windows: int | None, planes: int | None,
                                                     fused: bool) -> None:
    units = list(itertools.islice(all_units(grid, choose_sizes(grid, windows, planes), fused=fused), 3000))
    if len(units) == 3000:
        return  # enough is enough
    keys: Counter[str] = Counter()
    for slabs in units:
        assert len({slab.array for slab in slabs}) == 1, "a unit is of one array"
        check_alone(grid, slabs)
        keys.update(key for slab in slabs for key in shard_keys(grid, slab))
    assert set(keys.values()) == {1}, "an object that two slabs write"
    assert keys.keys() == {shard_key(spec, place) for spec in grid.arrays(fused=fused)
                           for place, _, _ in shards_of(spec, (0, 0, 0), spec.shape)}
    order = [slabs[0].array == "fused" for slabs in units]
    assert order == sorted(order), "fused slabs come after all that they read"


def test_a_slab_that_cuts_a_shard_is_not_planned() -> None:
    grid = VolumeGrid((640, 640, 640), (8.0,) * 3, (0.0,) * 3, (32.0,) * 3, 16, ("xy",), 128, 16, 8, 16, "float16")
    good = next(iter(UnitSizes(1, 8).units(grid)))[0]
    check_alone(grid, [good])
    spec = array_of(grid, "xy")
    for axis in range(3):
        stop = list(good.stop)
        stop[axis] -= 1
        with pytest.raises(BadRequest, match="cuts shards"):
            check_alone(grid, [Slab("xy", good.start, tuple(stop))])
        with pytest.raises(ValueError, match="whole shards"):
            shard_keys(grid, Slab("xy", good.start, tuple(stop)))
        assert spec.shape[axis] > good.stop[axis], "not the array's end"


def test_in_a_run_each_object_is_put_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """640 x 576 voxels in the plane: four units beside each other, whose windows overlap."""
    source = make_volume(tmp_path / "v.zarr", (32, 640, 576))
    use_backbone(monkeypatch, SHALLOW)
    puts: list[str] = []
    put = LocalStore.put

    def counted(self: LocalStore, key: str, data: bytes | memoryview) -> None:
        puts.append(key)
        put(self, key, data)

    monkeypatch.setattr(LocalStore, "put", counted)
    outcome = run_volume(source, tmp_path / "out", planes="xy,yz", output="fused", window_px=128, voxel_size=64)
    found = check_volume(tmp_path / "out")
    units = [unit for unit in open_run(str(tmp_path / "out"))[1].units()]
    assert sum(unit.items[0].item_id.startswith("xy/") for unit in units) >= 4 and outcome.num_units > 6
    dense = Counter(key for key in puts if key.startswith("dense/"))
    assert set(dense) == set(found) and set(dense.values()) == {1}, dense


# ---------------------------------------------------------------- kills


@pytest.mark.slow
def test_kills_of_the_driver_at_every_point_leave_the_bytes_of_a_clean_run(source: Path, clean: Path, tmp_path: Path) -> None:
    """One output is killed at point after point."""
    out, struck = tmp_path / "out", []
    points = ["plan.request", "stats.begin", "stats.data", "stats.receipt", "stats.done", "plan.arrays", "plan.file@1",
              "plan.seal@2", "volume.begin", "volume.data", "volume.receipt", "volume.done", "volume.receipt@2", "run.verify"]
    metadata: dict[str, tuple[bytes, int]] = {}
    for point in points:
        name, _, passage = point.partition("@")
        code = run_in_child(f"{name}=kill@{passage or 1}", source, out, output="fused")
        assert code in (KILLED, 0), (point, code)
        forgive(out)
        struck += [point] if code == KILLED else []
        if Plan.exists(LocalStore(out)):
            now = {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted((out / "dense").rglob("zarr.json"))}
            assert not metadata or now == metadata, f"{point}: metadata were written again"
            metadata = now
    assert run_in_child("", source, out, output="fused") == 0
    assert set(struck) >= set(points) - {"plan.file@1"}, struck
    assert check_volume(out) == data_objects(clean)
    assert len(metadata) == 8


def test_a_kill_between_the_planes_and_the_fused_array(source: Path, clean: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages = open_run(str(clean))[1].stages
    assert run_in_child(f"volume.done=kill@{len(stages[0])}", source, out, output="fused") == KILLED
    store, plan, ledger = open_run(str(out))
    assert [number for number in plan.pending(ledger.done())] == list(stages[1])
    assert not any("fused.zarr/0/c/" in key for key in data_objects(out))
    with pytest.raises(OutputDamaged, match=f"{len(stages[1])} of {len(plan)} units are not done"):
        verify_fast(store, write_success=False)
    assert run_in_child("volume.receipt=kill", source, out, output="fused") == KILLED
    assert any("fused.zarr/0/c/" in key for key in data_objects(out)), "killed between the fused shards and their receipt"
    assert run_in_child("", source, out, output="fused") == 0
    assert check_volume(out) == data_objects(clean)


@pytest.mark.slow
def test_kills_at_random_moments(source: Path, clean: Path, tmp_path: Path) -> None:
    rng, out = random.Random(7), tmp_path / "out"
    for _ in range(6):
        point = rng.choice(["item.load", "volume.begin", "volume.data", "volume.receipt", "volume.done", "stats.done"])
        assert run_in_child(f"{point}=kill@{rng.randint(1, 3)}", source, out, output="fused") in (KILLED, 0)
        forgive(out)
    assert run_in_child("", source, out, output="fused") == 0
    assert check_volume(out) == data_objects(clean)


@pytest.mark.slow
def test_the_real_command_killed_at_random_moments(source: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "dinoray.cli", "extract", "volume", str(source), *volume_flags(output="fused")]
    store, rng = LocalStore(tmp_path / "out"), random.Random(3)
    first = start_and_strike([*argv, "--out", str(tmp_path / "clean")], LocalStore(tmp_path / "clean"), [], rng=rng)
    assert first.code == 0, first.printed
    for moment in (0.3, 0.6):
        start = start_and_strike([*argv, "--out", str(tmp_path / "out")], store, [Kill("driver", moment=moment)], rng=rng,
                                 work_s=first.seconds)
        assert start.code in (KILLED, 0) and not start.again, start.printed
    complete([*argv, "--out", str(tmp_path / "out")])
    assert check_volume(tmp_path / "out") == check_volume(tmp_path / "clean")


# ---------------------------------------------------------------- torn shards, lost and changed metadata


def unit_of(out: Path, array: str) -> tuple[str, list[str]]:
    """The first unit of an array: its receipt's key and the keys of its shards."""
    receipt = next(r for r in receipts_of(out) if r.objects and r.objects[0].key.startswith(f"dense/{array}.zarr"))
    return f"_dinoray/receipts/{receipt.unit}.json", [o.key for o in receipt.objects]


def tear(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "foreign": b"no shard at all",
                      "flipped": data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]}[how])


@pytest.mark.parametrize("array", ["xz", "fused"])
@pytest.mark.parametrize("how", ["truncated", "empty", "foreign", "flipped"])
def test_a_torn_shard_without_a_receipt_is_replaced_and_with_one_is_named(source: Path, clean: Path, out: Path, array: str,
                                                                         how: str) -> None:
    receipt, keys = unit_of(out, array)
    tear(out / keys[0], how)
    store = LocalStore(out)
    with pytest.raises(OutputDamaged, match=keys[0]):
        verify_deep(store)
    if how != "flipped":  # of the same size: only its content tells
        with pytest.raises(OutputDamaged, match=keys[0]):
            verify_fast(store, write_success=False)
    (out / receipt).unlink()
    outcome = run_volume(source, out, output="fused")
    assert (outcome.exit_code, outcome.executed_units) == (0, 1)
    assert check_volume(out) == data_objects(clean)


@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
def test_tokens_that_are_damaged_between_the_stages_stop_the_run_and_are_named(source: Path, clean: Path, out: Path,
                                                                              how: str) -> None:
    fused, shards = unit_of(out, "fused")
    receipt, keys = unit_of(out, "xy")
    (out / fused).unlink()
    (out / shards[0]).unlink()
    forgive(out)  # its first start did end well
    if how == "deleted":
        (out / keys[0]).unlink()
    elif how == "flipped":  # in a compressed chunk, whose own checksum tells
        data = bytearray((out / keys[0]).read_bytes())
        data[len(data) // 2] ^= 1
        (out / keys[0]).write_bytes(data)
    else:
        tear(out / keys[0], how)
    with pytest.raises(OutputDamaged) as caught:
        run_volume(source, out, output="fused")
    assert keys[0] in f"{caught.value.where} {caught.value.what}"
    assert not (out / fused).exists() and not (out / shards[0]).exists(), "nothing was made of what is not whole"
    (out / receipt).unlink()
    assert run_volume(source, out, output="fused").executed_units == 2
    assert check_volume(out) == data_objects(clean)


def test_background_that_is_left_out_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backbone(monkeypatch, SHALLOW)
    source, out = make_volume(tmp_path / "v.zarr"), tmp_path / "out"
    for place in (2, 3):  # z from 64 on: chunks that are not stored are 0
        shutil.rmtree(source / f"0/c/{place}")
    run_volume(source, out, output="fused", foreground="1", scaling="dtype")
    found = check_volume(out)
    empty = {key for receipt in receipts_of(out) for key in receipt.empty}
    assert empty and not empty & found.keys() and all("xy.zarr" in key for key in empty)
    fused, shards = unit_of(out, "fused")
    (out / fused).unlink()
    (out / shards[0]).unlink()
    forgive(out)
    assert run_volume(source, out, output="fused", foreground="1", scaling="dtype").executed_units == 1
    assert check_volume(out) == found
    features = open_array(LocalStore(out), "fused")[:]
    assert np.isnan(features[:, 20:]).all() and np.isfinite(features[:, :8]).any()


def test_a_shard_that_no_receipt_names_is_named_by_verify(out: Path) -> None:
    _, keys = unit_of(out, "xy")
    extra = "/".join([*keys[0].split("/")[:-1], "99"])
    shutil.copy(out / keys[0], out / extra)
    with pytest.raises(OutputDamaged, match="no receipt names: .*99") as caught:
        verify_fast(LocalStore(out), write_success=False)
    assert "remove what no receipt names" in caught.value.todo


@pytest.mark.parametrize("name", ["zarr.json", "0/zarr.json"])
@pytest.mark.parametrize("how", ["deleted", "changed", "recompressed"])
def test_metadata_are_never_made_again(source: Path, out: Path, name: str, how: str) -> None:
    path = out / "dense/yz.zarr" / name
    receipt, _ = unit_of(out, "yz")
    (out / receipt).unlink()  # there is work to do
    before = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "changed":
        path.write_bytes(before.replace(b"float16", b"float32").replace(b"nanometer", b"micrometr"))
    else:  # the same JSON in other bytes
        path.write_bytes(json.dumps(json.loads(before)).encode())
    broken = {p: p.read_bytes() for p in (out / "dense").rglob("*") if p.is_file()}
    with pytest.raises(OutputDamaged, match="metadata of a feature array") as caught:
        run_volume(source, out, output="fused")
    assert name in caught.value.where
    assert {p: p.read_bytes() for p in (out / "dense").rglob("*") if p.is_file()} == broken
    path.write_bytes(before)
    assert run_volume(source, out, output="fused").executed_units == 1
    path.unlink()
    with pytest.raises(OutputDamaged, match=f"missing: dense/yz.zarr/{name}"):
        verify_fast(LocalStore(out), write_success=False)
    path.write_bytes(before[:-1] + b" ")
    with pytest.raises(OutputDamaged, match="metadata of a feature array"):
        verify_deep(LocalStore(out))
    with pytest.raises(OutputDamaged, match=f"dense/yz.zarr/{name}: the metadata of a feature array were changed") as caught:
        verify_fast(LocalStore(out), write_success=False)
    assert "back from a copy" in caught.value.todo and "receipts" not in caught.value.todo


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_verify_names_the_receipt_whose_deletion_mends_a_shard(source: Path, clean: Path, out: Path, damage: str) -> None:
    receipt, keys = unit_of(out, "xy")
    if damage == "gone":
        (out / keys[0]).unlink()
    else:
        (out / keys[0]).write_bytes((out / keys[0]).read_bytes()[:-1])
    (out / "dense/xy.zarr/zarr.json").write_bytes(b"{}")
    with pytest.raises(OutputDamaged, match="in 2 places") as caught:
        verify_fast(LocalStore(out), write_success=False)
    named = next(line for line in caught.value.what.splitlines() if keys[0] in line)
    assert named.endswith(f"(receipt: {receipt})")
    assert "delete the receipts named" in caught.value.todo and "back from a copy" in caught.value.todo
    shutil.copy(clean / "dense/xy.zarr/zarr.json", out / "dense/xy.zarr/zarr.json")
    (out / receipt).unlink()
    forgive(out)
    run_volume(source, out, output="fused")
    assert check_volume(out) == data_objects(clean)


@pytest.mark.parametrize("export", [export_table, export_profiles])
def test_an_export_says_that_this_is_a_volume(out: Path, export: Callable[[str], object]) -> None:
    with pytest.raises(BadRequest, match="features of a volume") as caught:
        export(str(out))
    assert "dinoray.open_features(OUT)[" in caught.value.todo


def test_a_finished_output_is_left_alone(source: Path, out: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (out / "dense").rglob("*") if p.is_file()}
    assert run_volume(source, out, output="fused").executed_units == 0
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (out / "dense").rglob("*") if p.is_file()} == before


def test_a_volume_that_changed_is_not_resumed(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backbone(monkeypatch, SHALLOW)
    source = make_volume(tmp_path / "v.zarr", (48, 48, 64))
    run_volume(source, tmp_path / "out")
    receipt, _ = unit_of(tmp_path / "out", "xy")
    (tmp_path / "out" / receipt).unlink()
    chunk = source / "0/c/0/0/1"
    chunk.write_bytes(bytes(byte ^ 1 for byte in chunk.read_bytes()))
    os.utime(chunk, ns=(1, 1))
    with pytest.raises(ChangedRequest, match="has changed since"):
        run_volume(source, tmp_path / "out")


# ---------------------------------------------------------------- damaged input, poison


def slabs_of_chunk(grid: VolumeGrid, chunk: tuple[int, int, int], side: int) -> set[str]:
    """Ids of the slabs of planes that read a chunk of the input."""
    found = set()
    for slab in itertools.chain.from_iterable(UnitSizes(1, 16).units(grid)):
        _, taps = slab_geometry(grid, slab, "interpolate")
        plane = grid.plane(slab.array)
        read = dict(zip((plane.normal, *plane.axes), taps.indices(), strict=True))
        if all((read[axis] // side == place).any() for axis, place in enumerate(chunk)):
            found.add(slab.id)
    return found


def test_a_damaged_chunk_quarantines_the_slabs_that_need_it_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backbone(monkeypatch, SHALLOW)
    source, fields = make_volume(tmp_path / "v.zarr", (32, 640, 320)), {
        "planes": "xy,yz", "output": "fused", "window_px": 128, "voxel_size": 64, "scaling": "dtype", "token_budget": 100}
    run_volume(source, tmp_path / "clean", **fields)
    expected = check_volume(tmp_path / "clean")
    chunk = source / "0/c/0/0/9"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:1000])
    outcome = run_volume(source, tmp_path / "out", **fields)
    assert outcome.exit_code == 3
    found = check_volume(tmp_path / "out")
    store, plan, ledger = open_run(str(tmp_path / "out"))
    grid = VolumeGrid.read(plan.facts["grid"])
    rows = ledger.quarantine(receipts_of(tmp_path / "out")).to_pylist()
    reasons = {row["item_id"]: row["reason"] for row in rows}
    needed = slabs_of_chunk(grid, (0, 0, 9), 32)
    planned = [Slab.read(item.item_id) for unit in plan.units() for item in unit.items]
    values = zarr.open_array(str(tmp_path / "out/dense/fused.zarr/0"), mode="r")[0]
    fused = {slab.id for slab in planned if slab.array == "fused"
             and np.isnan(values[tuple(slice(a, b) for a, b in zip(slab.start, slab.stop, strict=True))]).any()}
    assert {i for i, reason in reasons.items() if reason != "missing_tokens"} == needed
    assert {i for i, reason in reasons.items() if reason == "missing_tokens"} == fused
    assert {reasons[i] for i in needed} <= {"decode", "truncated"} and all("c/0/0/9" in r["message"] for r in rows
                                                                          if r["item_id"] in needed)
    assert 0 < len(needed) < sum(slab.array != "fused" for slab in planned)
    assert 0 < len(fused) < sum(slab.array == "fused" for slab in planned)
    lost = {key for slab in planned if slab.id in reasons for key in shard_keys(grid, slab)}
    assert all(found[key] == expected[key] for key in expected.keys() - lost)
    check_kept(tmp_path / "out", tmp_path / "clean", ("xy", "yz", "fused"))


def check_kept(out: Path, clean: Path, names: Sequence[str]) -> None:
    """What was computed is what a clean run computed; something is lacking in each array, but not all."""
    for name in names:
        one, other = (zarr.open_array(str(folder / f"dense/{name}.zarr/0"), mode="r")[:] for folder in (out, clean))
        known = ~np.isnan(one[0])
        assert 0 < known.mean() < 1
        np.testing.assert_array_equal(one[:, known], other[:, known])


@pytest.mark.slow
def test_a_sample_without_a_block_that_can_be_read_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backbone(monkeypatch, SHALLOW)
    (tmp_path / "in").mkdir()
    for z in range(20):
        tifffile.imwrite(tmp_path / f"in/s{z:02d}.tif", np.full((40, 44 if z == 7 else 48), z, np.uint8))
    with pytest.raises(BadRequest, match="1 block sampled for the intensity scaling, none can be used; the first: .*44") as caught:
        run_volume(tmp_path / "in", tmp_path / "out", raw_voxel_size=8)
    assert caught.value.where.endswith("s07.tif") and "--scaling dtype" in caught.value.todo
    volume = np.full((20, 40, 48), np.nan, np.float32)
    zarr.create_array(str(tmp_path / "nan.zarr"), shape=volume.shape, chunks=(20, 20, 20), dtype="float32")[:] = volume
    with pytest.raises(BadRequest, match="the first: NaN or infinite voxels in sample/0-20/0-40/0-48"):
        run_volume(tmp_path / "nan.zarr", tmp_path / "out2", raw_voxel_size=8)


def test_a_slab_that_kills_its_process_is_quarantined_alone(source: Path, tmp_path: Path) -> None:
    fields = {"output": "fused", "shallow": False, "unit_planes": 32}
    out = tmp_path / "out"
    assert run_in_child("", source, tmp_path / "clean", **fields) == 0
    expected = check_volume(tmp_path / "clean")
    poison = "xz/0-7/8-16/0-6"
    planned = [[item.item_id for item in unit.items] for unit in open_run(str(tmp_path / "clean"))[1].units()]
    assert any(poison in items and len(items) > 1 for items in planned)
    codes = [run_in_child(f"item.load~{poison}=kill@*", source, out, **fields) for _ in range(3)]
    assert codes == [KILLED, KILLED, 3]
    found = check_volume(out)
    _, plan, ledger = open_run(str(out))
    rows = ledger.quarantine(receipts_of(out)).to_pylist()
    grid = VolumeGrid.read(plan.facts["grid"])
    whole = next(Slab.read(i) for items in planned for i in items if i.startswith("fused/"))
    assert {row["item_id"]: row["reason"] for row in rows} == {poison: "crashed", whole.id: "missing_tokens"}
    lost = {*shard_keys(grid, Slab.read(poison)), *shard_keys(grid, whole)}
    assert all(found[key] == data for key, data in expected.items() if key not in lost)
    assert not any(key in found for key in shard_keys(grid, Slab.read(poison)))
    check_kept(out, tmp_path / "clean", ("xz", "fused"))
