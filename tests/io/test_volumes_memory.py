"""A read holds its answer and a few chunks, however large the volume and its shards; HDF5 over S3 ends cleanly."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dinoray.io.volumes import VolumeRequest, open_volume
from tests.io.volume_files import write_array, write_hdf5, write_n5

SHAPE = (128, 768, 1024)
"""96 MiB of bytes."""


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["zarr", "sharded", "n5", "hdf5"])
def test_a_slab_takes_a_fraction_of_the_volume(kind: str, data: np.ndarray, tmp_path: Path) -> None:
    if kind == "n5":
        path = write_n5(tmp_path / "a.n5", data, compression="raw", block_xyz=(64, 64, 32))
    elif kind == "hdf5":
        path = write_hdf5(tmp_path / "a.h5", {"raw": data}, chunks=(32, 64, 64))
    else:
        shards = {"shards": (128, 384, 512)} if kind == "sharded" else {}
        path = write_array(tmp_path / "a.zarr", data, 3, chunks=(32, 64, 64), compressors=None, **shards)
    with open_volume(VolumeRequest(str(path), raw_voxel_nm=1)) as volume:
        tracemalloc.start()
        try:
            slab = volume.read(slice(40, 44), slice(0, SHAPE[1]), slice(0, SHAPE[2]))
            thin = volume.read(np.array([3, 64, 127]), slice(0, SHAPE[1]), slice(0, 8))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        np.testing.assert_array_equal(slab, data[40:44])
        np.testing.assert_array_equal(thin, data[[3, 64, 127]][..., :8])
    assert peak < 16 * 2**20, f"{peak:,} bytes for an answer of {slab.nbytes:,}; the volume has {data.nbytes:,}"


REMOTE = """
import sys, h5py, numpy as np, fsspec
from dinoray.io.volumes import VolumeRequest, open_volume
with h5py.File(sys.argv[1], "w") as file:
    file.create_dataset("raw", data=np.ones((8, 8, 8), "u1"))
fsspec.filesystem("memory").pipe_file("/a.h5", open(sys.argv[1], "rb").read())
volume = open_volume(VolumeRequest("memory://a.h5", raw_voxel_nm=1))
assert volume.read(slice(0, 8), slice(0, 8), slice(0, 8)).all()
print("read")
"""


def test_a_process_that_forgets_to_close_remote_hdf5_ends_cleanly(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", REMOTE, str(tmp_path / "a.h5")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "read\n", done.stderr
