"""Shared fixtures: small image folders, and an environment in which Ray stays on this machine and is short-lived."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TMPDIR", tempfile.mkdtemp(prefix="dr-", dir="/tmp"))  # unix sockets need a short path
os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on the Ray of the session starts Ray too (tests/lanes.py)."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


def texture(shape: tuple[int, ...], seed: int, dtype: str = "uint8") -> np.ndarray:
    """A smooth random picture [...] that uses most of the dtype's range."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((*shape[:-2], -(-shape[-2] // 8), -(-shape[-1] // 8)))
    fine = np.kron(coarse, np.ones((8, 8)))[..., : shape[-2], : shape[-1]] + 0.2 * rng.random(shape)
    top = np.iinfo(dtype).max if np.issubdtype(np.dtype(dtype), np.integer) else 1.0
    return (fine / fine.max() * top).astype(dtype)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten pictures in two folders: RGB and gray PNG, 16-bit and multi-channel TIFF, several shapes."""
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    for i in range(5):
        rgb = np.moveaxis(texture((3, 64, 64 + 16 * (i % 2)), i), 0, -1)
        Image.fromarray(np.ascontiguousarray(rgb)).save(folder / "a" / f"rgb{i}.png")
    for i in range(3):
        tifffile.imwrite(folder / "b" / f"gray{i}.tif", texture((48, 80), 10 + i, "uint16"), photometric="minisblack")
    for i in range(2):
        tifffile.imwrite(folder / "b" / f"multi{i}.tif", texture((4, 64, 64), 20 + i, "uint16"),
                         photometric="minisblack", metadata={"axes": "CYX"}, ome=False)
    return folder


@pytest.fixture(scope="session")
def local_ray():
    """One local Ray of two CPUs for all tests that run jobs in this process."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20,
             _node_ip_address="127.0.0.1", log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
