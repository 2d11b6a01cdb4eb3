"""Volumes whose metadata and chunks are anything: only typed errors come out, and reads stay small.

A few hundred examples each here, eight times as many under `-m slow`, as in test_fuzz.py.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, ItemError
from dinoray.io.volumes import VolumeRequest, open_volume
from tests.hostile.test_fuzz import JSON, changed, mutated, only
from tests.io.volume_files import ome_attributes, transforms, voxels, write_array, write_hdf5, write_n5, write_ome
from tests.omezarr import write_group

DATA = voxels((8, 8, 8), "uint8")


def look(path: Path, **kwargs: Any) -> None:
    """Open and read a corner: what an actor would do."""
    with open_volume(VolumeRequest(str(path), **kwargs)) as volume:
        assert len(volume.shape) == 3 and min(volume.shape) > 0 and all(np.isfinite(volume.voxel_size_nm + volume.translation_nm))
        json.dumps([volume.notes, volume.level, volume.ref.version])
        if np.prod(volume.chunks) <= 2**22:
            volume.read(*(slice(0, min(4, n)) for n in volume.shape))


@only(BadRequest, ItemError)
def ome_group(value: Any) -> None:
    """Any JSON as the attributes of a group that holds an array."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / "a.zarr"
        write_array(top / "s0", DATA, 2)
        (top / ".zattrs").write_text(json.dumps(value))
        look(top, raw_voxel_nm=4, channel=0)


def documents(version: int, **options: Any) -> tuple[bytes, bytes]:
    """The document and the one object of a plain array."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_array(Path(folder) / "a", DATA, version, **options)
        name, key = (".zarray", "0/0/0") if version == 2 else ("zarr.json", "c/0/0/0")
        return (path / name).read_bytes(), (path / key).read_bytes()


ARRAYS = [documents(2), documents(3), documents(3, chunks=(4, 4, 4), shards=(8, 8, 8)), documents(2, order="F", compressors=None)]


@only(BadRequest, ItemError)
def plain_array(value: tuple[int, bytes, bytes, Any]) -> None:
    """Any document, attributes and chunk of a plain array."""
    which, document, chunk, attributes = value
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / "a.zarr"
        name, key = (".zarray", "0/0/0") if which in (0, 3) else ("zarr.json", "c/0/0/0")
        (top / key).parent.mkdir(parents=True)
        (top / name).write_bytes(document)
        (top / ".zattrs").write_text(json.dumps(attributes))
        (top / key).write_bytes(chunk)
        look(top, raw_voxel_nm=4)


def n5_parts(compression: str) -> tuple[dict[str, Any], bytes]:
    """The attributes and the one block of an N5 array."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_n5(Path(folder) / "a", DATA, compression=compression, block_xyz=(8, 8, 8))
        return json.loads((path / "attributes.json").read_text()), (path / "0" / "0" / "0").read_bytes()


N5 = [n5_parts(c) for c in ("gzip", "raw", "xz", "bzip2", "blosc", "zstd")]
N5_MORE = {"pixelResolution": {"unit": "um", "dimensions": [1, 2, 3]}, "downsamplingFactors": [[1, 1, 1], [2, 2, 2]],
           "scales": [[1, 1, 1]], "resolution": [1, 2, 3], "units": ["nm", "nm", "nm"], "offset": [0, 0, 1],
           "axes": ["x", "y", "z"],
           "transform": {"axes": ["z", "y", "x"], "scale": [1, 2, 3], "translate": [0, 0, 0], "units": ["nm", "nm", "nm"]},
           "multiscales": [{"datasets": [{"path": "s0", "transform": {"scale": [1, 2, 3]}}]}], "painteraData": {"type": "raw"}}


@only(BadRequest, ItemError)
def n5_array(value: tuple[Any, bytes, Any, bool]) -> None:
    """Any attributes of an N5 array and of its group, and any block."""
    attributes, block, group, named = value
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / "a.n5"
        (top / "s0" / "0" / "0").mkdir(parents=True)
        (top / "attributes.json").write_text(json.dumps(group))
        (top / "s0" / "attributes.json").write_text(json.dumps(attributes))
        (top / "s0" / "0" / "0" / "0").write_bytes(block)
        look(top, raw_voxel_nm=None if named else 4, dataset="s0" if named else None)


@only(BadRequest, ItemError)
def hdf5_attributes(value: dict[str, Any]) -> None:
    """Any attributes of an HDF5 dataset that h5py can store."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        with h5py.File(path, "w") as file:
            dataset = file.create_dataset("raw", data=DATA)
            for key, each in value.items():
                try:
                    dataset.attrs[key] = each if not isinstance(each, dict) else json.dumps(each)
                except (TypeError, ValueError, OSError):  # what h5py cannot write, no file can hold
                    continue
        look(path)


def hdf5_file(**options: Any) -> bytes:
    """A small HDF5 file."""
    with tempfile.TemporaryDirectory() as folder:
        return write_hdf5(Path(folder) / "a.h5", {"raw": DATA}, {"resolution": [4, 4, 4]}, **options).read_bytes()


HDF5_FILES = [hdf5_file(), hdf5_file(chunks=(4, 4, 4), compression="gzip", shuffle=True, fletcher32=True)]


@only(BadRequest, ItemError)
def hdf5_bytes(data: bytes) -> None:
    """Any bytes as an HDF5 file."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.h5").write_bytes(data)
        look(Path(folder) / "a.h5")


def tiff_bytes(**options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, DATA, photometric="minisblack", **options)
    return buffer.getvalue()


TIFFS = [tiff_bytes(), tiff_bytes(compression="zlib"),
         tiff_bytes(imagej=True, metadata={"axes": "ZYX", "spacing": 2.0, "unit": "um"}),
         tiff_bytes(ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": 1}), tiff_bytes(metadata=None, contiguous=False)]


@only(BadRequest, ItemError)
def tiff_stack(data: bytes) -> None:
    """Any bytes as a stack."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.tif").write_bytes(data)
        look(Path(folder) / "a.tif", raw_voxel_nm=4)


@only(BadRequest, ItemError)
def request(value: tuple[Any, Any, Any, Any, Any]) -> None:
    """Any values in a request."""
    raw, dataset, channel, time, crop = value
    with tempfile.TemporaryDirectory() as folder:
        attributes = ome_attributes("czyx", {"s0": transforms([1.0] * 4)}, names=("a", "b"))
        top = write_ome(Path(folder) / "a.zarr", {"s0": np.stack([DATA, DATA])}, attributes)
        look(top, raw_voxel_nm=raw, dataset=dataset, channel=channel, time=time, crop=crop)


OME = [ome_attributes("zyx", {"s0": transforms([1.0] * 3, [0.0] * 3)}, whole=transforms([1.0] * 3), names=("a",)),
       {"bioformats2raw.layout": 3}, {"plate": {}}]
ATTRIBUTES = {"resolution": [1, 1, 1], "voxel_size": [1, 1, 1], "offset": [0, 0, 0], "units": ["nm"] * 3,
              "axis_names": ["z", "y", "x"], "_ARRAY_DIMENSIONS": ["z", "y", "x"], "transform": N5_MORE["transform"]}
HDF5 = {"element_size_um": [1, 1, 1], "resolution": [1, 1, 1], "offset": [0, 0, 0], "units": "nm", "axes": "zyx",
        "axistags": '{"axes": [{"key": "z"}]}'}
NUMBER = st.integers(-2, 9) | st.floats() | st.sampled_from(["nm", "0", "a", "s0", "..", "", None, True, 2**70])
PROPERTIES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None], int]] = {
    "ome group": (st.one_of(JSON, changed(*OME)), ome_group, 200),
    "plain array": (st.one_of([
        st.tuples(st.just(i), st.one_of(st.just(d), mutated(d), changed(json.loads(d)).map(lambda v: json.dumps(v).encode())),
                  st.just(c) | mutated(c), changed(ATTRIBUTES)) for i, (d, c) in enumerate(ARRAYS)]), plain_array, 250),
    "n5 array": (st.one_of([
        st.tuples(st.just(a) | changed(a | N5_MORE), st.just(b) | mutated(b), changed(N5_MORE) | JSON, st.booleans())
        for a, b in N5]), n5_array, 250),
    "hdf5 attributes": (changed(HDF5).filter(lambda v: isinstance(v, dict)), hdf5_attributes, 100),
    "hdf5 bytes": (mutated(*HDF5_FILES), hdf5_bytes, 150),
    "tiff stack": (mutated(*TIFFS), tiff_stack, 200),
    "request": (st.tuples(NUMBER | st.lists(NUMBER, max_size=4).map(tuple),
                          st.none() | st.text(max_size=6) | st.sampled_from(["s0", "../x"]), NUMBER,
                          NUMBER, st.none() | st.lists(st.lists(NUMBER, max_size=3).map(tuple), max_size=4).map(tuple)),
                request, 100),
}


def run(name: str, times: int) -> None:
    strategy, check, examples = PROPERTIES[name]

    @settings(max_examples=examples * times, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def holds(value: Any) -> None:
        check(value)

    holds()


@pytest.mark.parametrize("name", PROPERTIES)
def test_only_typed_errors_come_out(name: str) -> None:
    run(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_only_typed_errors_come_out_of_many(name: str) -> None:
    run(name, 8)


def test_an_n5_block_cannot_blow_up(tmp_path: Path) -> None:
    write_group(tmp_path / "unused", {})
    for compression in ("gzip", "bzip2", "xz", "zstd", "blosc"):
        path = write_n5(tmp_path / f"{compression}.n5", np.ones((64, 256, 256), "u1"), {"resolution": [1, 1, 1]}, compression,
                        block_xyz=(256, 256, 64))
        block = path / "0" / "0" / "0"
        small = b"\0\0\0\3" + b"\0\0\0\4" * 3
        block.write_bytes(small + block.read_bytes()[16:])
        with open_volume(VolumeRequest(str(path))) as volume, pytest.raises(ItemError) as caught:
            volume.read(slice(0, 4), slice(0, 4), slice(0, 4))
        assert caught.value.reason == "too_large", compression
