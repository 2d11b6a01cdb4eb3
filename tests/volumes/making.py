"""Helpers of the tests of volumes: small deterministic volumes, jobs over them in this process or in one that dies, and
outputs checked and compared byte for byte."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zarr

from dinoray.config import ExtractVolumeJob
from dinoray.io.stores import open_store
from dinoray.io.volume_arrays import shard_key, shards_of
from dinoray.io.volume_grid import VolumeGrid
from dinoray.ledger import Ledger, Receipt
from dinoray.session import Outcome
from dinoray.verification import open_run, verify_deep
from dinoray.vision import weights
from dinoray.vision.variants import BackboneConfig
from dinoray.volume_extraction import extract_volume
from tests.conftest import texture
from tests.runs import data_objects, tiny_backbone

SHALLOW = BackboneConfig("shallow16", patch_size=16, dim=64, depth=2, heads=4, ffn="mlp", ffn_hidden=256)
"""Two layers: what a volume takes is mostly its pixels and tokens."""
WIDE = BackboneConfig("wide16", patch_size=16, dim=384, depth=2, heads=6, ffn="mlp", ffn_hidden=1536)
"""Two layers as wide as ViT-S."""
REPOSITORY = Path(__file__).parents[2]
JOB = {"model": "vitt16", "weights": "random", "no_ray": True, "window_px": 64, "halo_px": 16, "unit_windows": 1,
       "unit_planes": 16, "token_budget": 200, "decode_threads": 2, "compute_threads": 2}


def make_volume(folder: Path, shape: tuple[int, int, int] = (112, 80, 96), *, voxel_nm: tuple[float, float, float] = (8, 8, 8),
                translation_nm: tuple[float, float, float] = (0, 0, 0), dtype: str = "uint8", seed: int = 0,
                chunk: int = 32) -> Path:
    """An OME-Zarr 0.5 of one level, written chunk by chunk without compression: it may be larger than memory."""
    array = zarr.create_array(folder / "0", shape=shape, dtype=dtype, chunks=(chunk,) * 3, compressors=None, zarr_format=3)
    tile = texture((chunk,) * 3, seed, dtype)
    for place in itertools.product(*(range(0, n, chunk) for n in shape)):
        z, y, x = (n // chunk for n in place)
        box = tuple(slice(a, min(a + chunk, n)) for a, n in zip(place, shape, strict=True))
        array[box] = np.roll(tile, (7 * z + y, 5 * y + x, 3 * x + z), (0, 1, 2))[tuple(slice(0, b.stop - b.start) for b in box)]
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(voxel_nm)},
                                                        {"type": "translation", "translation": list(translation_nm)}]}
    (folder / "zarr.json").write_text(json.dumps({
        "zarr_format": 3, "node_type": "group",
        "attributes": {"ome": {"version": "0.5", "multiscales": [{"name": "v", "axes": axes, "datasets": [level]}]}}}))
    return folder


def volume_job(source: Path | str, out: Path | str, **fields: object) -> ExtractVolumeJob:
    """The job: small windows, small units, the small random model, without Ray, unless said otherwise."""
    return ExtractVolumeJob(sources=(str(source),), out=str(out), **{**JOB, **fields})


def run_volume(source: Path | str, out: Path | str, **fields: object) -> Outcome:
    """Run the job in this process."""
    return extract_volume(volume_job(source, out, **fields), say=lambda line: None)


def volume_flags(**fields: object) -> list[str]:
    """The flags of `run_volume`'s job, for the real command."""
    flags: list[str] = []
    for name, value in {**JOB, **fields}.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [] if value is False else [flag, str(value)]
    return flags


def use_backbone(monkeypatch: pytest.MonkeyPatch, config: BackboneConfig) -> None:
    """Let jobs in this process compute with a random backbone of this shape, whatever model they name."""
    backbone = tiny_backbone(config)
    monkeypatch.setattr("dinoray.vision.weights.load_backbone", lambda *args, **kwargs: backbone)


def _in_child(points: str, source: str, out: str, shallow: bool, fields: dict[str, object]) -> None:
    os.environ["DINORAY_FAILPOINTS"] = points
    if shallow:
        backbone = tiny_backbone(SHALLOW)
        weights.load_backbone = lambda *args, **kwargs: backbone  # type: ignore[assignment]
    os._exit(run_volume(source, out, **fields).exit_code)


def run_in_child(points: str, source: Path, out: Path, *, shallow: bool = True, **fields: object) -> int:
    """Run the job in a process of its own that meets these failpoints; its exit code, -9 when it was killed.

    `shallow`: with the SHALLOW backbone, which the children of isolated units do not know.
    """
    context = multiprocessing.get_context("forkserver")  # has torch loaded: a start takes a moment, not seconds
    context.set_forkserver_preload(["dinoray.runners.volume_features", "dinoray.resolve", "tests.volumes.making"])
    process = context.Process(target=_in_child, args=(points, str(source), str(out), shallow, fields))
    process.start()
    process.join(120)
    try:
        assert process.exitcode is not None, "the run hangs"
        return process.exitcode
    finally:
        process.kill()
        process.join()


def forgive(out: Path) -> None:
    """Note of every start that it ended in good order: a unit that died twice would be run in a child, which meets the
    failpoints too and loads the model that the job names."""
    store = open_store(str(out))
    for prefix in ("_dinoray", "_dinoray/stats"):
        for key, _ in store.list(f"{prefix}/attempts"):
            unit, _, number = key.rsplit("/", 1)[1].rpartition("-")
            Ledger(store, prefix).end(unit, int(number), "forgiven")


def receipts_of(out: Path | str) -> list[Receipt]:
    """All receipts of the first generation, in plan order."""
    _, plan, ledger = open_run(str(out))
    return list(ledger.receipts(plan.unit_ids))


def check_volume(out: Path | str) -> dict[str, bytes]:
    """Everything that must hold of a finished output, from its files alone; returns its dense/ objects."""
    store, plan, ledger = open_run(str(out))
    verify_deep(store)
    receipts = list(ledger.receipts(plan.unit_ids))
    assert [key.rsplit("/", 1)[1] for key, _ in sorted(store.list("_dinoray/receipts"))] == sorted(
        f"{unit}.json" for unit in plan.unit_ids), "a receipt for each unit, and no other"
    found = data_objects(out)
    metadata = {record["key"] for record in plan.facts["arrays"]}
    stored = Counter(o.key for receipt in receipts for o in receipt.objects if o.key.startswith("dense/"))
    owned = stored + Counter(key for receipt in receipts for key in receipt.empty)
    assert set(owned.values()) <= {1}, "no key is named by two receipts"
    assert set(found) == set(stored) | metadata
    grid = VolumeGrid.read(plan.facts["grid"])
    fused = len(plan.stages) > 1
    everything = {shard_key(spec, place) for spec in grid.arrays(fused=fused)
                  for place, _, _ in shards_of(spec, (0, 0, 0), spec.shape)}
    assert set(owned) <= everything
    if not sum(receipt.quarantined for receipt in receipts):
        assert set(owned) == everything
    assert not list(store.list("_dinoray/tmp"))
    assert json.loads(store.get("_SUCCESS"))["units"] == len(plan)
    return found


_ALONE = """
import json, sys
from tests.runs import tiny_backbone
from tests.volumes import making
backbone = tiny_backbone(getattr(making, sys.argv[1]))
making.weights.load_backbone = lambda *args, **kwargs: backbone
sys.exit(making.run_volume(*sys.argv[2:4], **json.loads(sys.argv[4])).exit_code)
"""


def run_alone(source: Path, out: Path, backbone: str = "WIDE", **fields: object) -> dict[str, int]:
    """Run the job in a fresh process, with a backbone of this module by name; the receipts' `memory`, the largest of each."""
    done = subprocess.run([sys.executable, "-c", _ALONE, backbone, str(source), str(out), json.dumps(fields)], cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, int] = {}
    for receipt in receipts_of(out):
        found = {name: max(value, found.get(name, 0)) for name, value in receipt.memory.items()}
    return found
