"""Volumes in: what every format's reader must give, against numpy and by writers that are not ours."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinoray.errors import ItemError
from dinoray.io import volume_chunks, volume_objects
from dinoray.io.volumes import Volume, VolumeRequest, open_volume
from tests.io.volume_files import (
    add_n5,
    ome_attributes,
    transforms,
    validate_ome,
    voxels,
    write_array,
    write_hdf5,
    write_n5,
    write_ome,
)
from tests.realdata import data_folder

SIZE = (40.0, 8.0, 4.0)


def ome_zarr(version: str, **options: Any):
    def write(folder: Path, data: np.ndarray) -> VolumeRequest:
        path = write_ome(folder / "a.zarr", {"s0": data}, ome_attributes("zyx", {"s0": transforms(list(SIZE))}, version=version),
                         version, **options)
        validate_ome(path, version)
        return VolumeRequest(str(path))
    return write


def plain_zarr(version: int, **options: Any):
    def write(folder: Path, data: np.ndarray) -> VolumeRequest:
        return VolumeRequest(str(write_array(folder / "a.zarr", data, version, **options)), raw_voxel_nm=SIZE)
    return write


def n5(compression: str):
    def write(folder: Path, data: np.ndarray) -> VolumeRequest:
        size = {"pixelResolution": {"unit": "um", "dimensions": [0.004, 0.008, 0.04]}}
        write_n5(folder / "a.n5" / "raw", data, size, compression)
        return VolumeRequest(str(folder / "a.n5"), dataset="raw")
    return write


def hdf5(**options: Any):
    def write(folder: Path, data: np.ndarray) -> VolumeRequest:
        path = write_hdf5(folder / "a.h5", {"volumes/raw": data}, {"element_size_um": [n / 1000 for n in SIZE]}, **options)
        return VolumeRequest(str(path))
    return write


def tiff(**options: Any):
    def write(folder: Path, data: np.ndarray) -> VolumeRequest:
        tifffile.imwrite(folder / "a.tif", data, photometric="minisblack", **options)
        return VolumeRequest(str(folder / "a.tif"), raw_voxel_nm=SIZE)
    return write


def slices(suffix: str):
    def write(folder: Path, data: np.ndarray) -> VolumeRequest:
        (folder / "stack").mkdir()
        for z, plane in enumerate(data):
            path = folder / "stack" / f"z{z + 8}{suffix}"  # z8, z9, z10: the natural order is not that of the text
            tifffile.imwrite(path, plane) if suffix == ".tif" else Image.fromarray(plane).save(path)
        (folder / "stack" / "slices.txt").write_text("made by hand")
        return VolumeRequest(str(folder / "stack"), raw_voxel_nm=SIZE)
    return write


BLOSC = zarr.codecs.BloscCodec(cname="lz4")
FORMATS = {
    "ome-0.4": (ome_zarr("0.4"), "uint16"), "ome-0.5": (ome_zarr("0.5"), "uint8"),
    "ome-0.5-sharded": (ome_zarr("0.5", chunks=(8, 8, 8), shards=(16, 24, 32)), "uint16"),
    "ome-0.5-sharded-float": (ome_zarr("0.5", chunks=(16, 8, 8), shards=(16, 16, 16)), "float32"),
    "zarr-2": (plain_zarr(2), "int16"), "zarr-2-F": (plain_zarr(2, order="F"), "uint16"), "zarr-2-big": (plain_zarr(2), ">u2"),
    "zarr-2-lz4": (plain_zarr(2, compressors=numcodecs.LZ4()), "uint8"),
    "zarr-2-zlib": (plain_zarr(2, compressors=numcodecs.Zlib()), "uint16"),
    "zarr-3": (plain_zarr(3), "float32"), "zarr-3-blosc": (plain_zarr(3, compressors=BLOSC), "uint16"),
    "zarr-3-big": (plain_zarr(3, serializer=zarr.codecs.BytesCodec(endian="big")), "uint16"),
    "zarr-3-raw": (plain_zarr(3, compressors=None, chunks=(5, 37, 41)), "float64"),
    "zarr-3-shard-crc": (plain_zarr(3, chunks=(8, 8, 8), shards=(16, 16, 16), filters=[zarr.codecs.TransposeCodec(order=(2, 0, 1))],
                                    compressors=[zarr.codecs.GzipCodec(), zarr.codecs.Crc32cCodec()]), "uint16"),
    "zarr-3-index-first": (plain_zarr(3, chunks=(16, 16, 16), compressors=None, filters=None, serializer=zarr.codecs.ShardingCodec(
        chunk_shape=(8, 8, 8), index_location="start")), "uint16"),
    "n5-gzip": (n5("gzip"), "uint16"), "n5-raw": (n5("raw"), "float32"), "n5-bzip2": (n5("bzip2"), "uint8"),
    "n5-xz": (n5("xz"), "int16"), "n5-blosc": (n5("blosc"), "uint16"), "n5-zstd": (n5("zstd"), "uint8"),
    "hdf5": (hdf5(), "uint8"), "hdf5-chunks": (hdf5(chunks=(8, 8, 8), compression="gzip", shuffle=True, fletcher32=True), "uint16"),
    "hdf5-big": (hdf5(chunks=(30, 40, 50), maxshape=(None, None, None), compression="lzf"), ">f4"),
    "tiff": (tiff(), "uint16"), "tiff-zlib": (tiff(compression="zlib"), "uint8"), "tiff-tiles": (tiff(tile=(16, 16)), "float32"),
    "tiff-big": (tiff(byteorder=">"), ">u2"), "tiff-bigtiff": (tiff(bigtiff=True, compression="zstd"), "int16"),
    "tiff-plain-pages": (tiff(metadata=None, contiguous=False), "uint16"),
    "png": (slices(".png"), "uint8"), "png-16": (slices(".png"), "uint16"), "tif": (slices(".tif"), "float32"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_numpy_array(name: str, tmp_path: Path) -> None:
    write, dtype = FORMATS[name]
    data = voxels(dtype=dtype)
    request = write(tmp_path, data)
    with open_volume(request) as volume:
        assert volume.shape == data.shape and volume.dtype == data.dtype.newbyteorder("=") and volume.dtype.isnative
        assert volume.voxel_size_nm == SIZE and volume.translation_nm == (0, 0, 0)
        assert volume.ref.uri == request.uri and volume.ref.size > 0 and volume.ref.version not in ("", "missing")
        whole = volume.read(slice(0, 23), slice(0, 37), slice(0, 41))
        assert whole.dtype == volume.dtype and whole.flags.c_contiguous
        np.testing.assert_array_equal(whole, data)
        np.testing.assert_array_equal(volume.read(slice(7, 19), slice(15, 17), slice(40, 41)), data[7:19, 15:17, 40:41])
        z, x = np.array([0, 1, 1, 15, 16, 22]), np.array([3, 40])
        np.testing.assert_array_equal(volume.read(z, slice(5, 37), x), data[z][:, 5:37][:, :, x])
        assert volume.read(slice(4, 4), slice(0, 9), np.array([], int)).shape == (0, 9, 0)
    crop = VolumeRequest(**{**asdict(request), "crop": ((3, 22), (1, 30), (17, 41))})
    with open_volume(crop) as part:
        assert part.shape == (19, 29, 24) and part.translation_nm == (3 * 40, 1 * 8, 17 * 4) and part.ref == volume.ref
        truth = data[3:22, 1:30, 17:]
        np.testing.assert_array_equal(part.read(np.array([0, 18]), slice(0, 29), slice(2, 24)), truth[[0, 18]][..., 2:])


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith(("zarr", "ome"))])
def test_tensorstore_decodes_all_that_it_knows_and_agrees_with_zarr(name: str, tmp_path: Path) -> None:
    write, dtype = FORMATS[name]
    with open_volume(write(tmp_path, voxels(dtype=dtype))) as volume:
        chunks = volume._source._chunks
        assert isinstance(chunks._decoder, volume_chunks._ZarrDecoder) == (name == "zarr-2-lz4")
        fast = chunks.decode((0, 1, 1))
        chunks._decoder = volume_chunks._ZarrDecoder(chunks._one)
        np.testing.assert_array_equal(fast, chunks.decode((0, 1, 1)))


def test_a_request_travels(tmp_path: Path) -> None:
    request = VolumeRequest("s3://b/a.zarr", (8.0, 4.0, 4.0), "raw/s0", "DNA", 3, ((0, 1), (2, 3), (4, 5)))
    assert VolumeRequest(**json.loads(json.dumps(asdict(request)))) == request == pickle.loads(pickle.dumps(request))


@pytest.mark.parametrize("index", [slice(0, 99), slice(-3, 2), slice(0, 8, 2), np.array([2, 1]), np.array([0, 23]), np.array([-1]),
                                   np.array([[0]]), np.array([0.5])])
def test_indices_outside_are_refused(index: Any, tmp_path: Path) -> None:
    with open_volume(plain_zarr(3)(tmp_path, voxels())) as volume, pytest.raises(IndexError):
        volume.read(index, slice(0, 1), slice(0, 1))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    data = voxels((30, 34, 26))
    folder = tmp_path_factory.mktemp("shared")
    request = ome_zarr("0.5", chunks=(7, 8, 9), shards=(14, 8, 18))(folder, data)
    with open_volume(VolumeRequest(request.uri, crop=((1, 30), (3, 34), (0, 25)))) as volume:
        yield volume, data[1:30, 3:34, 0:25]


def index(size: int) -> st.SearchStrategy[slice | np.ndarray]:
    pairs = st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda p: slice(min(p), max(p)))
    return pairs | st.lists(st.integers(0, size - 1), max_size=6).map(lambda v: np.array(sorted(v), int))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_indices_are_what_numpy_gives(shared: tuple[Volume, np.ndarray], data: st.DataObject) -> None:
    volume, truth = shared
    z, y, x = (data.draw(index(n)) for n in truth.shape)
    np.testing.assert_array_equal(volume.read(z, y, x), truth[z][:, y][:, :, x])


@pytest.mark.parametrize("name", ["ome-0.5-sharded", "n5-gzip", "hdf5-chunks", "tiff-zlib", "png"])
def test_threads_may_read_at_once(name: str, tmp_path: Path) -> None:
    write, dtype = FORMATS[name]
    data = voxels(dtype=dtype)
    with open_volume(write(tmp_path, data)) as volume, ThreadPoolExecutor(6) as pool:
        for z, got in enumerate(pool.map(lambda z: volume.read(slice(z, z + 2), slice(0, 37), slice(0, 41)), range(21))):
            np.testing.assert_array_equal(got, data[z:z + 2])


@pytest.mark.parametrize("name", ["zarr-2", "ome-0.5-sharded", "n5-gzip", "hdf5-chunks", "tiff-zlib", "tif"])
def test_each_chunk_is_decoded_once_and_no_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, dtype = FORMATS[name]
    with open_volume(write(tmp_path, voxels(dtype=dtype))) as volume:
        places: list[tuple[int, ...]] = []
        original = volume._source.piece
        monkeypatch.setattr(volume._source, "piece", lambda place: places.append(place) or original(place))
        volume.read(np.array([0, 1, 22]), slice(0, 37), slice(3, 5))
        z, y, x = volume.chunks
        wanted = {(a // z, b // y, c // x) for a in (0, 1, 22) for b in range(37) for c in (3, 4)}
        assert sorted(places) == sorted(wanted)


# ---------------------------------------------------------------- identity, and what happens to a volume that changes


@pytest.mark.parametrize("name", ["ome-0.4", "ome-0.5-sharded", "n5-gzip", "hdf5", "tiff", "tiff-zlib", "png"])
def test_a_change_changes_the_version_and_fails_the_read(name: str, tmp_path: Path) -> None:
    write, dtype = FORMATS[name]
    data = voxels(dtype=dtype)
    request = write(tmp_path, data)
    volume = open_volume(request)
    assert open_volume(request).ref == volume.ref
    (top,) = tmp_path.iterdir()
    shutil.rmtree(top) if top.is_dir() else top.unlink()
    write(tmp_path, data[::-1].copy())
    assert open_volume(request).ref.version != volume.ref.version
    with pytest.raises(ItemError) as caught:
        volume.read(slice(0, 23), slice(0, 37), slice(0, 41))
    assert caught.value.reason == "changed" and caught.value.todo
    volume.close()


@pytest.mark.parametrize("name", ["ome-0.4", "ome-0.5-sharded", "n5-gzip", "png"])
def test_a_chunk_that_went_is_missing(name: str, tmp_path: Path) -> None:
    write, dtype = FORMATS[name]
    request = write(tmp_path, voxels(dtype=dtype))
    volume = open_volume(request)
    chunk = max((p for p in Path(request.uri).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    chunk.unlink()
    assert open_volume(request).ref.version != volume.ref.version
    with pytest.raises(ItemError, match="no such file"):
        volume.read(slice(0, 23), slice(0, 37), slice(0, 41))


TORN = ["ome-0.4", "ome-0.5-sharded", "zarr-2-lz4", "zarr-2-zlib", "zarr-3-blosc", "zarr-3-raw", "n5-gzip", "n5-blosc",
        "n5-zstd", "n5-raw", "n5-xz", "n5-bzip2", "png", "tif"]
NOISE = ["ome-0.4", "ome-0.5-sharded", "zarr-2-lz4", "zarr-2-zlib", "zarr-3-blosc", "n5-gzip", "n5-blosc", "n5-zstd", "n5-xz",
         "n5-bzip2", "hdf5-chunks", "tiff-zlib", "png"]


def last_chunk(path: Path) -> tuple[Path, int]:
    """The file of the last chunk, and a place inside that chunk."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            stored = file["volumes/raw"].id
            chunk = stored.get_chunk_info(stored.get_num_chunks() - 1)
            return path, chunk.byte_offset + chunk.size // 2
    if path.suffix == ".tif":
        with tifffile.TiffFile(path) as tif:
            page = tif.pages[-1]
            return path, page.dataoffsets[0] + page.databytecounts[0] // 2
    documents = ("zarr.json", ".zarray", ".zattrs", ".zgroup", "attributes.json", "slices.txt")
    last = max(p for p in path.rglob("*") if p.is_file() and p.name not in documents)
    return last, last.stat().st_size // 2


@pytest.mark.parametrize(("name", "how"), [*((name, "torn") for name in TORN), *((name, "noise") for name in NOISE)])
def test_a_damaged_chunk_is_an_item_error_there_and_only_there(name: str, how: str, tmp_path: Path) -> None:
    write, dtype = FORMATS[name]
    data = voxels(dtype=dtype)
    request = write(tmp_path, data)
    file, middle = last_chunk(Path(request.uri))
    raw = file.read_bytes()
    changed = bytes((b * 7 + 13) % 256 for b in raw[middle:middle + 400])
    file.write_bytes(raw[:middle] if how == "torn" else raw[:middle] + changed + raw[middle + 400:])
    with open_volume(request) as volume:
        good, errors = 0, []
        for place in np.ndindex(*(-(-n // c) for n, c in zip(volume.shape, volume.chunks, strict=True))):
            box = tuple(slice(p * c, min((p + 1) * c, n)) for p, c, n in zip(place, volume.chunks, volume.shape, strict=True))
            try:
                good += np.array_equal(volume.read(*box), data[box])
            except ItemError as error:
                errors.append(error)
    assert errors and all(e.reason in ("decode", "truncated", "too_large") and e.where for e in errors), errors
    assert good, "the other chunks are as they were"


def test_a_chunk_that_is_not_stored_is_the_fill_value(tmp_path: Path) -> None:
    data = voxels()
    data[:16, :16, :16] = 7
    request = plain_zarr(3, fill_value=7)(tmp_path, data)
    assert not (Path(request.uri) / "c" / "0" / "0" / "0").exists()
    with open_volume(request) as volume:
        np.testing.assert_array_equal(volume.read(slice(0, 23), slice(0, 37), slice(0, 41)), data)
        total = int(np.prod([-(-n // c) for n, c in zip(volume.shape, volume.chunks, strict=True)]))
        stored = sum(path.is_file() for path in (Path(request.uri) / "c").rglob("*"))
        assert f"{total - stored} of {total} chunks {'is' if total - stored == 1 else 'are'} not stored: read as the fill value 7" \
            in volume.notes
    sharded = write_array(tmp_path / "b.zarr", data, 3, chunks=(8, 8, 8), shards=(16, 16, 16), fill_value=7)
    with open_volume(VolumeRequest(str(sharded), raw_voxel_nm=1)) as volume:
        np.testing.assert_array_equal(volume.read(slice(0, 23), slice(0, 37), slice(0, 41)), data)
    n5_top = write_n5(tmp_path / "c.n5", data, {"resolution": [1, 1, 1]})
    with open_volume(VolumeRequest(str(n5_top))) as volume:
        assert not any("not stored" in note for note in volume.notes), "all are"
    (n5_top / "0" / "0" / "0").unlink()
    with open_volume(VolumeRequest(str(n5_top))) as volume:
        assert any("1 of " in note and "is not stored: read as the fill value 0" in note for note in volume.notes), volume.notes
        assert not volume.read(slice(0, 14), slice(0, 15), slice(0, 16)).any()
        np.testing.assert_array_equal(volume.read(slice(14, 23), slice(0, 37), slice(0, 41)), data[14:])


@pytest.mark.parametrize("name", ["ome-0.4", "ome-0.5-sharded", "n5-gzip"])
def test_too_many_chunks_are_not_listed_and_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_objects, "MAX_LISTED", 3)
    write, dtype = FORMATS[name]
    data = voxels(dtype=dtype)
    request = write(tmp_path, data)
    with open_volume(request) as volume:
        assert any("too many to list" in note for note in volume.notes) and volume.ref.size == data.nbytes
        np.testing.assert_array_equal(volume.read(slice(0, 23), slice(0, 37), slice(0, 41)), data)
        chunk = max((p for p in Path(request.uri).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        chunk.unlink()
        assert open_volume(request).ref == volume.ref
        if name != "ome-0.5-sharded":  # the index of a shard is remembered
            assert not np.array_equal(volume.read(slice(0, 23), slice(0, 37), slice(0, 41)), data)  # fill


# ---------------------------------------------------------------- real data


def test_the_real_slices_are_read_in_order() -> None:
    folder = data_folder("fib25_neuroproof") / "training_sample2" / "grayscale_maps"
    with open_volume(VolumeRequest(str(folder), raw_voxel_nm=10)) as volume:
        assert volume.shape == (250, 250, 250) and volume.dtype == np.uint8 and volume.voxel_size_nm == (10, 10, 10)
        got = volume.read(np.array([0, 100, 249]), slice(10, 200), slice(0, 250))
        names = sorted(folder.glob("*.png"))
        for plane, z in zip(got, (0, 100, 249), strict=True):
            np.testing.assert_array_equal(plane, np.asarray(Image.open(names[z]))[10:200])


@pytest.mark.parametrize(("name", "file"), [("nuclei3d_cells3d", "nuclei.tif"), ("stardist_samples", "img3d.tif")])
def test_the_real_stacks_are_what_tifffile_reads(name: str, file: str) -> None:
    path = data_folder(name) / file
    with open_volume(VolumeRequest(str(path), raw_voxel_nm=(290, 260, 260))) as volume:
        truth = tifffile.imread(path)
        assert volume.dtype == truth.dtype and any("taken for z" in note for note in volume.notes)
        np.testing.assert_array_equal(volume.read(*(slice(0, n) for n in truth.shape)), truth)


def test_the_n5_of_a_real_volume(tmp_path: Path) -> None:
    truth = tifffile.imread(data_folder("nuclei3d_cells3d") / "nuclei.tif")
    write_n5(tmp_path / "a.n5" / "s0", truth, block_xyz=(64, 64, 32))
    add_n5(tmp_path / "a.n5", {"pixelResolution": {"unit": "um", "dimensions": [0.26, 0.26, 0.29]}})
    with open_volume(VolumeRequest(str(tmp_path / "a.n5"))) as volume:
        assert volume.voxel_size_nm == (290, 260, 260) and volume.level == "s0"
        np.testing.assert_array_equal(volume.read(slice(0, 60), slice(0, 256), slice(0, 256)), truth)
