"""Which level, scale, channel and time point of a volume is read, and where it lies in the world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile

from dinoray.errors import BadRequest, ItemError
from dinoray.io import volume_objects, zarr_objects
from dinoray.io.volume_levels import Level, choose_level
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
from tests.omezarr import write_group

FULL = voxels((16, 20, 24))


def opened(path: Path, **kwargs: Any) -> Volume:
    return open_volume(VolumeRequest(str(path), **kwargs))


def whole(volume: Volume) -> np.ndarray:
    return volume.read(*(slice(0, n) for n in volume.shape))


def pyramid(folder: Path, version: str = "0.4", unit: str | None = "micrometer", factor: float = 0.001, **kwargs: Any) -> Path:
    """Three levels: 40 x 8 x 8, 80 x 16 x 16 and 80 x 32 x 32 nm, whose first voxels lie as averaging puts them."""
    steps = {"s0": (1, 1, 1), "s1": (2, 2, 2), "s2": (2, 4, 4)}
    size = np.array([40, 8, 8]) * factor
    levels = {name: transforms((size * step).tolist(), ((np.array(step) - 1) / 2 * size).tolist()) for name, step in steps.items()}
    arrays = {name: FULL[::z, ::y, ::x] for name, (z, y, x) in steps.items()}
    return write_ome(folder, arrays, ome_attributes("zyx", levels, unit=unit, version=version, **kwargs), version)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(("asked", "level", "size", "translation", "said"), [
    (None, "s0", (40, 8, 8), (0, 0, 0), "level s0 of 3"), (8, "s0", (40, 8, 8), (0, 0, 0), "level s0 of 3"),
    (16, "s1", (80, 16, 16), (20, 4, 4), "level s1 of 3"), (16.01, "s1", (80, 16, 16), (20, 4, 4), "level s1 of 3"),
    (20, "s1", (80, 16, 16), (20, 4, 4), "no level of 20 nm: reading the next finer one, s1 of 80 x 16 x 16 nm"),
    ((80, 16, 16), "s1", (80, 16, 16), (20, 4, 4), "level s1 of 3"), ((80, 32, 32), "s2", (80, 32, 32), (20, 12, 12), "s2"),
    ((40, 32, 32), "s0", (40, 8, 8), (0, 0, 0), "next finer one, s0"),
    (1000, "s2", (80, 32, 32), (20, 12, 12), "next finer one, s2")])
def test_the_level_is_the_exact_one_or_the_next_finer(version: str, asked: Any, level: str, size: Any, translation: Any,
                                                      said: str, tmp_path: Path) -> None:
    path = pyramid(tmp_path / "a.zarr", version)
    validate_ome(path, version)
    with opened(path, raw_voxel_nm=asked) as volume:
        assert (volume.level, volume.voxel_size_nm, volume.translation_nm) == (level, size, translation)
        assert len(volume.notes) == 1 and said in volume.notes[0]
        z, y, x = (s // f for s, f in zip(size, (40, 8, 8), strict=True))
        np.testing.assert_array_equal(whole(volume), FULL[::z, ::y, ::x])


@pytest.mark.parametrize("asked", [7.9, (40, 8, 4), (20, 16, 16)])
def test_no_finer_level_lists_what_there_is(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="s1: 80 x 16 x 16 nm"):
        opened(pyramid(tmp_path / "a.zarr"), raw_voxel_nm=asked)


def test_the_finest_is_not_always_the_first() -> None:
    levels = [Level("b", (16.0,) * 3), Level("a", (8.0,) * 3), Level("c", (32.0,) * 3)]
    assert choose_level(levels, None, "")[0].name == "a" and choose_level(levels, 31.0, "")[0].name == "b"


@pytest.mark.parametrize("unit", [None, "", "pixel", "parsec"])
def test_no_unit_needs_the_user_and_keeps_the_proportions(unit: str | None, tmp_path: Path) -> None:
    path = pyramid(tmp_path / "a.zarr", unit=unit, factor=0.125)
    with pytest.raises(BadRequest, match="no unit of length") as caught:
        opened(path)
    assert "--raw-voxel-size" in caught.value.todo
    with opened(path, raw_voxel_nm=4) as volume:
        assert volume.level == "s0" and volume.voxel_size_nm == (20, 4, 4) and "taken as 20 x 4 x 4 nm" in volume.notes[0]
    with opened(path, raw_voxel_nm=(30, 4, 4), dataset="s1") as volume:  # half a voxel of s0 in the same proportion
        assert volume.voxel_size_nm == (30, 4, 4) and volume.translation_nm == (7.5, 1, 1)


@pytest.mark.parametrize(("unit", "nm"), [("nanometer", 1), ("angstrom", 0.1), ("micrometer", 1e3), ("millimeter", 1e6), ("nm", 1)])
def test_units_of_length(unit: str, nm: float, tmp_path: Path) -> None:
    with opened(pyramid(tmp_path / "a.zarr", unit=unit, factor=1), raw_voxel_nm=8 * nm) as volume:
        assert volume.voxel_size_nm == pytest.approx((40 * nm, 8 * nm, 8 * nm), rel=1e-12)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_transformations_of_the_level_come_first_then_those_of_the_image(version: str, tmp_path: Path) -> None:
    levels = {"0": transforms([2.0, 1.0, 1.0], [10.0, 20.0, 30.0])}
    whole_image = transforms([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
    path = write_ome(tmp_path / "a.zarr", {"0": FULL}, ome_attributes("zyx", levels, whole=whole_image, version=version), version)
    validate_ome(path, version)
    with opened(path, crop=((1, 3), (0, 5), (2, 9))) as volume:
        assert volume.voxel_size_nm == (6, 4, 5) and volume.translation_nm == (31 + 6, 82, 153 + 10)
        np.testing.assert_array_equal(whole(volume), FULL[1:3, 0:5, 2:9])


@pytest.mark.parametrize(("axes", "version"), [("tczyx", "0.4"), ("tczyx", "0.5"), ("czyx", "0.5"), ("tzyx", "0.4"), ("zyx", "0.5"),
                                               ("ctzyx", "0.4"), ("cxyz", "0.4"), ("zcyx", "0.4"), ("zyxc", "0.4")])
def test_axes_in_any_order(axes: str, version: str, tmp_path: Path) -> None:
    sizes = {"t": 3, "c": 2, "z": 9, "y": 10, "x": 11}
    data = voxels(tuple(sizes[a] for a in axes))
    scale = [{"z": 40.0, "y": 8.0, "x": 4.0}.get(a, 1.0) for a in axes]
    attributes = ome_attributes(axes, {"s0": transforms(scale)}, names=("DNA", "ER"), version=version)
    path = write_ome(tmp_path / "a.zarr", {"s0": data}, attributes, version, chunks=(2,) * len(axes))
    asked = ({"channel": "ER"} if "c" in axes else {}) | ({"time": 2} if "t" in axes else {})
    with opened(path, **asked) as volume:
        assert volume.shape == (9, 10, 11) and volume.voxel_size_nm == (40, 8, 4) and volume.chunks == (2, 2, 2)
        truth = data[tuple({"t": 2, "c": 1}.get(a, slice(None)) for a in axes)]
        left = [a for a in axes if a in "zyx"]
        np.testing.assert_array_equal(whole(volume), truth.transpose([left.index(a) for a in "zyx"]))


def test_other_channels_do_not_change_the_identity(tmp_path: Path) -> None:
    data = voxels((2, 8, 8, 8))
    path = write_ome(tmp_path / "a.zarr", {"s0": data}, ome_attributes("czyx", {"s0": transforms([1.0] * 4)}), chunks=(1, 8, 8, 8))
    first, second = (opened(path, channel=c).ref for c in (0, 1))
    (path / "s0" / "1" / "0" / "0" / "0").write_bytes(b"other")
    assert opened(path, channel=0).ref == first and opened(path, channel=1).ref != second


def test_the_listing_of_a_channel_is_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (volume_objects, zarr_objects):
        monkeypatch.setattr(limit, "MAX_LISTED" if limit is volume_objects else "MAX_OBJECTS", 4)
    data = voxels((3, 8, 8, 8))
    options = {"attributes": {"axis_names": list("czyx"), "resolution": [1, 1, 1]}, "chunks": (1, 4, 8, 8)}
    with opened(write_array(tmp_path / "a.zarr", data, 3, **options), channel=2) as volume:  # two chunks in c/2/
        assert not volume.notes
    # v2 with "." has all chunks in one folder
    path = write_array(tmp_path / "b.zarr", data, 2, **options, chunk_key_encoding={"name": "v2", "separator": "."})
    with opened(path, channel=2) as volume:
        assert "too many to list" in volume.notes[0]
        np.testing.assert_array_equal(whole(volume), data[2])
    path = write_array(tmp_path / "c.zarr", data[0], 3, {"resolution": [1, 1, 1]})
    for name in "abcdefg":
        (path / "c" / name).write_bytes(b"stray")
    with opened(path) as volume:
        assert "too many to list" in volume.notes[0]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_level_by_name_or_path_has_the_scale_of_its_image(version: str, tmp_path: Path) -> None:
    path = pyramid(tmp_path / "box.zarr" / "recon" / "em", version)
    write_group(tmp_path / "box.zarr", {}, version)
    for volume in (opened(tmp_path / "box.zarr", dataset="recon/em/s1"), opened(path / "s1"),
                   opened(path, dataset="s1", raw_voxel_nm=16),
                   opened(tmp_path / "box.zarr", dataset="/recon/em/", raw_voxel_nm=16)):
        with volume:
            assert volume.voxel_size_nm == (80, 16, 16) and volume.translation_nm == (20, 4, 4) and volume.level == "s1"
    with pytest.raises(BadRequest, match="80 x 16 x 16 nm, not 8 nm"):
        opened(path, dataset="s1", raw_voxel_nm=8)


def test_bioformats2raw_with_one_image(tmp_path: Path) -> None:
    write_group(tmp_path / "a.zarr", {"bioformats2raw.layout": 3})
    pyramid(tmp_path / "a.zarr" / "0")
    with opened(tmp_path / "a.zarr", raw_voxel_nm=16) as volume:
        assert volume.level == "s1"
    pyramid(tmp_path / "a.zarr" / "1")
    with pytest.raises(BadRequest, match="--dataset: 0, 1"):
        opened(tmp_path / "a.zarr")
    with opened(tmp_path / "a.zarr", dataset="1") as volume:
        assert volume.level == "s0"


# ---------------------------------------------------------------- plain arrays


@pytest.mark.parametrize("version", [2, 3])
def test_funlib_attributes(version: int, tmp_path: Path) -> None:
    attributes = {"voxel_size": [40, 4, 4], "offset": [400, 0, 8], "axis_names": ["c^", "z", "y", "x"], "units": ["nm"] * 3}
    data = voxels((2, 8, 9, 10))
    with opened(write_array(tmp_path / "a.zarr" / "raw", data, version, attributes), channel=1) as volume:
        assert volume.voxel_size_nm == (40, 4, 4) and volume.translation_nm == (420, 2, 10)  # offset is the corner
        np.testing.assert_array_equal(whole(volume), data[1])
    with opened(write_array(tmp_path / "b.zarr", FULL, version, {"resolution": [0.04, 0.008, 0.004], "units": "um"})) as volume:
        assert volume.voxel_size_nm == (40, 8, 4) and volume.translation_nm == (0, 0, 0)
    with opened(write_array(tmp_path / "c.zarr", FULL, version, {"resolution": [40, 4, 4]})) as volume:
        assert volume.voxel_size_nm == (40, 4, 4)


def test_names_of_dimensions(tmp_path: Path) -> None:
    data = voxels((3, 8, 9, 10))
    for path in (write_array(tmp_path / "a.zarr", data, 2, {"_ARRAY_DIMENSIONS": ["time", "x", "y", "z"]}),
                 write_array(tmp_path / "b.zarr", data, 3, dimension_names=["T", "X", "Y", "Z"])):
        with opened(path, raw_voxel_nm=5, time=2) as volume:
            assert volume.voxel_size_nm == (5, 5, 5) and "taken as 5 nm" in volume.notes[0]
            np.testing.assert_array_equal(whole(volume), data[2].T)


# ---------------------------------------------------------------- N5


def n5_pyramid(folder: Path, group: dict[str, Any], levels: list[dict[str, Any]]) -> Path:
    for number, attributes in enumerate(levels):
        write_n5(folder / f"s{number}", FULL[::2**number, ::2**number, ::2**number], attributes)
    return add_n5(folder, group)


UM = {"unit": "um", "dimensions": [0.004, 0.008, 0.04]}
PYRAMIDS = {  # every layout says 40 x 8 x 4 nm, then twice that, begun half a voxel later
    "n5-viewer": ({"pixelResolution": UM}, [{}, {"downsamplingFactors": [2, 2, 2]}]),
    "scales": ({"pixelResolution": UM, "scales": [[1, 1, 1], [2, 2, 2]]}, [{}, {}]),
    "paintera": ({"resolution": [4, 8, 40], "multiScale": True}, [{}, {"downsamplingFactors": [2, 2, 2]}]),
    "repeated": ({}, [{"resolution": [4, 8, 40]}, {"resolution": [4, 8, 40], "downsamplingFactors": [2, 2, 2]}]),
    "own": ({}, [{"resolution": [4, 8, 40]}, {"resolution": [8, 16, 80], "downsamplingFactors": [2, 2, 2]}]),
    "cosem": ({}, [{"transform": {"axes": ["z", "y", "x"], "scale": [40, 8, 4], "translate": [0, 0, 0], "units": ["nm"] * 3}},
                   {"transform": {"axes": ["x", "y", "z"], "scale": [8, 16, 80], "translate": [2, 4, 20], "units": ["nm"] * 3}}]),
    "multiscales": ({"multiscales": [{"datasets": [{"path": f"s{i}", "transform": {
        "axes": ["z", "y", "x"], "scale": [40 * f, 8 * f, 4 * f], "translate": [20 * i, 4 * i, 2 * i], "units": ["nm"] * 3}}
        for i, f in enumerate((1, 2))]}]}, [{}, {}]),
}


@pytest.mark.parametrize("layout", PYRAMIDS)
def test_layouts_of_n5(layout: str, tmp_path: Path) -> None:
    path = n5_pyramid(tmp_path / "a.n5" / "em", *PYRAMIDS[layout])
    for asked, level, size, translation in ((None, "s0", (40, 8, 4), (0, 0, 0)), (8, "s1", (80, 16, 8), (20, 4, 2))):
        for volume in (opened(tmp_path / "a.n5", dataset="em", raw_voxel_nm=asked), opened(path / level),
                       opened(tmp_path / "a.n5", dataset=f"em/{level}")):
            with volume:
                assert (volume.level, volume.voxel_size_nm, volume.translation_nm) == (level, size, translation)
                step = 2 ** int(level[1:])
                np.testing.assert_array_equal(whole(volume), FULL[::step, ::step, ::step])


def test_paintera_data_and_offset(tmp_path: Path) -> None:
    add_n5(tmp_path / "a.n5" / "raw", {"painteraData": {"type": "raw"}})
    n5_pyramid(tmp_path / "a.n5" / "raw" / "data", {"resolution": [4, 8, 40], "offset": [100, 0, 1000]},
               [{}, {"downsamplingFactors": [2, 2, 2]}])
    with opened(tmp_path / "a.n5", dataset="raw", raw_voxel_nm=8) as volume:
        assert volume.voxel_size_nm == (80, 16, 8) and volume.translation_nm == (1020, 4, 102)


def test_n5_with_channels_and_cut_blocks(tmp_path: Path) -> None:
    data = voxels((2, 9, 10, 11))
    path = write_n5(tmp_path / "a.n5", data, {"axes": ["x", "y", "z", "c"], "resolution": [1, 1, 1]}, block_xyz=(8, 8, 8, 2))
    with opened(path, channel=1) as volume:
        np.testing.assert_array_equal(whole(volume), data[1])
    path = write_n5(tmp_path / "b.n5", FULL, {"resolution": [1, 1, 1]}, "raw", block_xyz=(16, 16, 16))
    block = FULL[:, :16, 16:]  # Java writers store the last blocks as they are cut
    header = b"\0\0\0\3" + b"".join(n.to_bytes(4, "big") for n in block.shape[::-1])
    (path / "1" / "0" / "0").write_bytes(header + block.astype(">u2").tobytes())
    with opened(path) as volume:
        np.testing.assert_array_equal(whole(volume), FULL)


# ---------------------------------------------------------------- HDF5, TIFF, slices


def test_hdf5_datasets_channels_and_attributes(tmp_path: Path) -> None:
    data = voxels((2, 8, 9, 10))
    path = write_hdf5(tmp_path / "a.h5", {"raw": data, "flat": data[0, 0]}, {"resolution": [40, 4, 4], "offset": [40, 0, 0]})
    with h5py.File(path, "r+") as file:
        for i, label in enumerate("czyx"):
            file["raw"].dims[i].label = label
    with opened(path, channel=1) as volume:
        assert volume.voxel_size_nm == (40, 4, 4) and volume.translation_nm == (60, 2, 2) and volume.level == "raw"
        np.testing.assert_array_equal(whole(volume), data[1])
    tags = '{"axes": [{"key": "z"}, {"key": "y"}, {"key": "x"}, {"key": "c"}]}'
    path = write_hdf5(tmp_path / "b.h5", {"exported_data": np.moveaxis(data, 0, -1)}, {"axistags": tags})
    with opened(path, channel=0, raw_voxel_nm=5) as volume:
        np.testing.assert_array_equal(whole(volume), data[0])


@pytest.mark.parametrize("contiguous", [True, False])
def test_imagej_and_ome_tiff_state_their_voxels(contiguous: bool, tmp_path: Path) -> None:
    data = voxels((5, 2, 9, 10))
    options: dict[str, Any] = {} if contiguous else {"compression": "zlib"}
    tifffile.imwrite(tmp_path / "ij.tif", data, imagej=True, resolution=(1 / 0.25, 1 / 0.5),
                     metadata={"axes": "ZCYX", "spacing": 2.0, "unit": "um"}, **options)
    tifffile.imwrite(tmp_path / "ome.tif", data, ome=True, metadata={
        "axes": "ZCYX", "PhysicalSizeZ": 2000, "PhysicalSizeZUnit": "nm", "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.25,
        "Channel": {"Name": ["DNA", "ER"]}}, **options)
    for name, channel in (("ij.tif", 1), ("ome.tif", "ER")):
        with opened(tmp_path / name, channel=channel) as volume:
            assert volume.voxel_size_nm == pytest.approx((2000, 500, 250)) and volume.shape == (5, 9, 10)
            np.testing.assert_array_equal(whole(volume), data[:, 1])
        with pytest.raises(BadRequest, match="--channel"):
            opened(tmp_path / name)
        with pytest.raises(BadRequest, match="no level of 100 nm or finer"):
            opened(tmp_path / name, channel=0, raw_voxel_nm=100)


def test_a_tiff_whose_z_is_unknown_needs_the_user(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", FULL, ome=True, metadata={"axes": "ZYX", "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.5})
    with pytest.raises(BadRequest, match="z: unknown, y: 0.5"):
        opened(tmp_path / "a.tif")
    with opened(tmp_path / "a.tif", raw_voxel_nm=(900, 500, 500)) as volume:
        assert volume.voxel_size_nm == (900, 500, 500)


def test_colour_slices_have_channels(tmp_path: Path) -> None:
    data = voxels((4, 8, 9, 3), "uint8")
    for z, plane in enumerate(data):
        tifffile.imwrite(tmp_path / f"{z}.tif", plane, photometric="rgb")
    with pytest.raises(BadRequest, match="--channel"):
        opened(tmp_path, raw_voxel_nm=10)
    with opened(tmp_path, raw_voxel_nm=10, channel=2) as volume:
        np.testing.assert_array_equal(whole(volume), data[..., 2])


def test_slices_gaps_junk_globs_and_odd_ones(tmp_path: Path) -> None:
    for z in (1, 2, 5, 6, 10):
        tifffile.imwrite(tmp_path / f"iso.{z}.tif", FULL[z % 16])
    (tmp_path / "slices.txt").write_text("")
    (tmp_path / ".hidden.tif").write_bytes(b"")
    with opened(tmp_path, raw_voxel_nm=10) as volume:
        assert volume.shape[0] == 5 and "passed over: 1 .txt, 1 hidden file" in volume.notes
        assert any("5 numbers are missing between 1 and 10 (3, 4, 7, 8, 9)" in note for note in volume.notes), volume.notes
        np.testing.assert_array_equal(whole(volume), FULL[[1, 2, 5, 6, 10]])
    with opened(tmp_path / "iso.[12].tif", raw_voxel_nm=10) as volume:
        assert volume.shape[0] == 2 and len(volume.notes) == 1
    tifffile.imwrite(tmp_path / "iso.5.tif", FULL[5][:-1])
    with opened(tmp_path, raw_voxel_nm=10) as volume:
        with pytest.raises(ItemError) as caught:
            whole(volume)
        assert caught.value.reason == "shape" and "iso.5.tif" in caught.value.where
        np.testing.assert_array_equal(volume.read(np.array([0, 1, 3]), slice(0, 20), slice(0, 24)), FULL[[1, 2, 6]])
    (tmp_path / "iso.1.tif").write_bytes(b"no image at all")
    with opened(tmp_path, raw_voxel_nm=10) as volume:
        assert any("iso.1.tif" in note for note in volume.notes) and volume.shape == (5, 20, 24)
