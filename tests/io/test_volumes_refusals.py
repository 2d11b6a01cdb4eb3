"""What is no volume, or leaves a choice open, is refused before any work: what, where, and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from dinoray.errors import BadRequest, ItemError
from dinoray.io.volumes import VolumeRequest, open_volume
from tests.io.volume_files import add_n5, ome_attributes, transforms, voxels, write_array, write_hdf5, write_n5, write_ome
from tests.omezarr import write_group, write_image, write_plate

SMALL = voxels((4, 6, 8))


def refusal(path: Path | str, **kwargs: Any) -> str:
    """The message of the refusal, which must name a place and say what to do."""
    with pytest.raises(BadRequest) as caught:
        open_volume(VolumeRequest(str(path), **kwargs))
    assert caught.value.where and caught.value.todo, caught.value
    return str(caught.value)


def ome(folder: Path, axes: str = "zyx", scale: list[float] | None = None, data: np.ndarray = SMALL, change: Any = None,
        **kwargs: Any) -> Path:
    attributes = ome_attributes(axes, {"s0": transforms(scale or [1.0] * len(axes))}, **kwargs)
    if change is not None:
        change(attributes["multiscales"][0])
    return write_ome(folder / "a.zarr", {"s0": data}, attributes)


@pytest.mark.parametrize("dtype", ["bool", "uint32", "uint64", "int32", "int64"])
def test_labels_by_their_type(dtype: str, tmp_path: Path) -> None:
    data = np.zeros((4, 6, 8), dtype)
    data[2:] = 1
    assert "look like labels" in refusal(ome(tmp_path, data=data))
    assert "look like labels" in refusal(write_array(tmp_path / "b.zarr", data, 3), raw_voxel_nm=1)
    assert "look like labels" in refusal(write_hdf5(tmp_path / "a.h5", {"raw": data}), raw_voxel_nm=1)
    if dtype != "bool":
        assert "look like labels" in refusal(write_n5(tmp_path / "a.n5", data), raw_voxel_nm=1)


def test_labels_by_their_place_and_metadata(tmp_path: Path) -> None:
    path = ome(tmp_path)
    for name in ("labels", "labels/nuclei"):
        write_group(path / name, {})
    ome(path / "labels" / "nuclei")
    assert "below labels/" in refusal(path / "labels" / "nuclei" / "a.zarr")
    assert "below labels/" in refusal(path, dataset="labels/nuclei/a.zarr")
    write_group(tmp_path / "b.zarr", {"image-label": {}, **ome_attributes("zyx", {"s0": transforms([1.0] * 3)})})
    write_array(tmp_path / "b.zarr" / "s0", SMALL, 2)
    assert "label image" in refusal(tmp_path / "b.zarr") and "label image" in refusal(tmp_path / "b.zarr" / "s0")
    write_hdf5(tmp_path / "a.h5", {"volumes/labels/ids": SMALL})
    assert "below labels/" in refusal(tmp_path / "a.h5", dataset="volumes/labels/ids", raw_voxel_nm=1)
    add_n5(tmp_path / "a.n5" / "seg", {"painteraData": {"type": "label"}})
    write_n5(tmp_path / "a.n5" / "seg" / "data" / "s0", SMALL)
    assert "Paintera labels" in refusal(tmp_path / "a.n5", dataset="seg", raw_voxel_nm=1)
    for parent in ("labels", "a.zarr.labels"):  # a folder of the user's, not of a container
        open_volume(VolumeRequest(str(ome(tmp_path / parent)))).close()


@pytest.mark.parametrize("dtype", ["complex64", "S4", "float128", "O"])
def test_numbers_that_are_no_intensities(dtype: str, tmp_path: Path) -> None:
    path = write_array(tmp_path / "a.zarr", SMALL, 2)
    document = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps(document | {"dtype": {"S4": "|S4", "O": "|O"}.get(dtype, np.dtype(dtype).str)}))
    assert "type" in refusal(path, raw_voxel_nm=1)
    if dtype != "O":
        data = np.zeros((4, 6, 8), dtype)
        assert "are not intensities" in refusal(write_hdf5(tmp_path / "a.h5", {"raw": data}), raw_voxel_nm=1)


@pytest.mark.parametrize("axes", [["z", "y", "q"], ["z", "z", "x"], ["x", "y", ""], ["z", "y", "x", "p"]])
def test_unknown_axes(axes: list[str], tmp_path: Path) -> None:
    data = SMALL[..., None] if len(axes) == 4 else SMALL
    path = ome(tmp_path, "zyx", data=data, change=lambda m: m.update(axes=[{"name": a} for a in axes]))
    assert "unknown axes" in refusal(path)
    assert "unknown axes" in refusal(write_array(tmp_path / "b.zarr", data, 3, dimension_names=axes), raw_voxel_nm=1)


@pytest.mark.parametrize(("unit", "words"), [("second", "no length"), ("millisecond", "no length"), (None, "no unit"),
                                             ("pixel", "no unit"), ("arbitrary", "no unit")])
def test_wrong_units(unit: str | None, words: str, tmp_path: Path) -> None:
    path = ome(tmp_path, change=lambda m: m["axes"][0].pop("unit") if unit is None else m["axes"][0].update(unit=unit))
    assert words in refusal(path)
    if words == "no length":  # that is a mistake, not a gap that a flag could fill
        assert words in refusal(path, raw_voxel_nm=4)
    assert "type 'time'" in refusal(ome(tmp_path / "b", change=lambda m: m["axes"][0].update(type="time")))


@pytest.mark.parametrize("scale", [[0.0, 1.0, 1.0], [1.0, -1.0, 1.0], [float("nan"), 1.0, 1.0], [1.0, 1.0, float("inf")],
                                   [1.0, 1.0], [1.0, "1", 1.0], [1e-320, 1.0, 1.0], [True, 1.0, 1.0]])
def test_scales_that_are_none(scale: list[Any], tmp_path: Path) -> None:
    assert ("voxels of" if scale[0] == 1e-320 else "scale") in refusal(ome(tmp_path, scale=scale))


@pytest.mark.parametrize("kind", ["resolution", "voxel_size"])
@pytest.mark.parametrize("scale", [[0, 1, 1], [1, -1, 1], [1, 1], ["a", 1, 1], 3])
def test_scales_of_plain_arrays(kind: str, scale: Any, tmp_path: Path) -> None:
    refusal(write_array(tmp_path / "a.zarr", SMALL, 3, {kind: scale}))
    if kind == "resolution":
        refusal(write_n5(tmp_path / "a.n5", SMALL, {kind: scale}))
    refusal(write_hdf5(tmp_path / "a.h5", {"raw": SMALL}, {kind: json.dumps(scale) if "a" in str(scale) else scale}))


def test_no_scale_at_all(tmp_path: Path) -> None:
    for z in range(3):
        Image.fromarray(SMALL[z].astype("uint8")).save(tmp_path / f"{z}.png")
    tifffile.imwrite(tmp_path / "a.tif", SMALL, photometric="minisblack")
    paths = [ome(tmp_path / "x", change=lambda m: m["datasets"][0].pop("coordinateTransformations")),
             write_array(tmp_path / "a.zarr", SMALL, 2), write_n5(tmp_path / "a.n5", SMALL), tmp_path / "*.png", tmp_path / "a.tif",
             write_hdf5(tmp_path / "a.h5", {"raw": SMALL})]
    for path in paths:
        assert "--raw-voxel-size" in refusal(path)
        with open_volume(VolumeRequest(str(path), raw_voxel_nm=(3, 2, 1))) as volume:
            assert volume.voxel_size_nm == (3, 2, 1) and any("taken as 3 x 2 x 1 nm" in note for note in volume.notes)


def test_a_transformation_in_another_file(tmp_path: Path) -> None:
    path = ome(tmp_path, change=lambda m: m["datasets"][0].update(coordinateTransformations=[{"type": "scale", "path": "s"}]))
    assert "coordinate transformation" in refusal(path)


@pytest.mark.parametrize("shape", [(0, 6, 8), (4, 6, 0)])
def test_an_axis_of_size_zero(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = ome(tmp_path)
    document = json.loads((path / "s0" / ".zarray").read_text())
    (path / "s0" / ".zarray").write_text(json.dumps(document | {"shape": shape}))
    assert "size 0" in refusal(path)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", shape, "u1")
    assert "size 0" in refusal(tmp_path / "a.h5", raw_voxel_nm=1)
    path = write_n5(tmp_path / "a.n5", SMALL)
    add_n5(path, {"dimensions": shape[::-1]})
    assert "size 0" in refusal(path, raw_voxel_nm=1)


def test_two_axes(tmp_path: Path) -> None:
    assert "without depth" in refusal(write_image(tmp_path / "a.zarr", SMALL, "cyx"))
    for path in (write_array(tmp_path / "b.zarr", SMALL[0], 3), write_hdf5(tmp_path / "a.h5", {"raw": SMALL[0]}),
                 write_n5(tmp_path / "a.n5", SMALL[0], block_xyz=(4, 4))):
        refusal(path, raw_voxel_nm=1)
    tifffile.imwrite(tmp_path / "a.tif", SMALL[0])
    assert "without depth" in refusal(tmp_path / "a.tif", raw_voxel_nm=1)
    (tmp_path / "one").mkdir()
    tifffile.imwrite(tmp_path / "one" / "a.tif", SMALL[0])
    assert "one image" in refusal(tmp_path / "one", raw_voxel_nm=1)
    tifffile.imwrite(tmp_path / "t.tif", SMALL, imagej=True, metadata={"axes": "TYX"})
    assert "without depth" in refusal(tmp_path / "t.tif", raw_voxel_nm=1)


def test_time_and_channels_must_be_chosen(tmp_path: Path) -> None:
    path = ome(tmp_path, "tczyx", data=voxels((3, 2, 4, 6, 8)), names=("DNA", "ER"))
    assert "0 'DNA', 1 'ER'" in refusal(path, time=0)
    assert "3 times" in refusal(path, channel="ER") and "0 to 2" in refusal(path, channel="ER")
    for wrong in ("dna", 2, -1, "7", "", True):
        assert "--channel" in refusal(path, channel=wrong, time=0), wrong
    assert "--time" in refusal(path, channel=0, time=3) and "--time" in refusal(path, channel=0, time=-1)
    assert "no such axis" in refusal(ome(tmp_path / "b"), channel=1) and "no such axis" in refusal(ome(tmp_path / "c"), time=1)
    open_volume(VolumeRequest(str(path), channel="1", time=2)).close()


@pytest.mark.parametrize("crop", [((0, 5), (0, 6), (0, 8)), ((-1, 2), (0, 6), (0, 8)), ((2, 2), (0, 6), (0, 8)),
                                  ((3, 2), (0, 6), (0, 8)), ((0, 4), (0, 6)), ((0, 4), (0, 6), (0, 8.5)), ((0, 4), (0, 6), 3)])
def test_a_crop_outside(crop: Any, tmp_path: Path) -> None:
    assert "crop" in refusal(ome(tmp_path), crop=crop)


@pytest.mark.parametrize("size", [0, -4, float("nan"), float("inf"), (4, 4), (4, 4, 0), True])
def test_a_voxel_size_that_is_none(size: Any, tmp_path: Path) -> None:
    assert "voxel size" in refusal(ome(tmp_path), raw_voxel_nm=size)


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for name in ("no.zarr", "no.tif", "no.h5", "no/such/folder", "*.png", "empty", "empty.zarr", "notes.txt"):
        refusal(tmp_path / name, raw_voxel_nm=1)
    path = ome(tmp_path)
    assert "s3://" in refusal("https://example.org/a.zarr")
    assert "--dataset; there are: s0" in refusal(path, dataset="s7")
    for dataset in ("../b.zarr", "/", "a//b", ".."):
        refusal(path, dataset=dataset)
    write_group(tmp_path / "g.zarr", {})
    write_array(tmp_path / "g.zarr" / "raw", SMALL, 2)
    assert "there are: raw" in refusal(tmp_path / "g.zarr")
    assert "there are: raw" in refusal(write_n5(tmp_path / "g.n5" / "raw", SMALL).parent)
    (path / "s0" / ".zarray").unlink()
    assert "'s0'" in refusal(path)


def test_plates_and_wells(tmp_path: Path) -> None:
    path = write_plate(tmp_path / "p.zarr", {"A/1": [voxels((2, 8, 8))]})
    assert "plate" in refusal(path) and "well" in refusal(path / "A" / "1")
    assert "plate" in refusal(path, dataset="A/1")


def test_several_datasets_in_hdf5(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "a.h5", {"b/raw": SMALL, "a": SMALL})
    assert "--dataset: a, b/raw" in refusal(path, raw_voxel_nm=1)
    assert "--dataset: a, b/raw" in refusal(path, dataset="c", raw_voxel_nm=1)
    assert "a group" in refusal(path, dataset="b", raw_voxel_nm=1)
    refusal(write_hdf5(tmp_path / "none.h5", {}), raw_voxel_nm=1)
    refusal(path, dataset="a", channel=1, raw_voxel_nm=1)


def test_hdf5_that_leads_elsewhere(tmp_path: Path) -> None:
    other = write_hdf5(tmp_path / "other.h5", {"raw": SMALL})
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["out"] = h5py.ExternalLink(str(other), "raw")
        file["soft"] = h5py.SoftLink("/nowhere")
        layout = h5py.VirtualLayout(SMALL.shape, SMALL.dtype)
        layout[...] = h5py.VirtualSource(str(other), "raw", SMALL.shape)
        file.create_virtual_dataset("virtual", layout)
        (tmp_path / "raw.bin").write_bytes(SMALL.tobytes())
        file.create_dataset("external", SMALL.shape, SMALL.dtype, external=str(tmp_path / "raw.bin"))
    for name in ("out", "soft"):
        assert "link" in refusal(tmp_path / "a.h5", dataset=name, raw_voxel_nm=1)
    for name in ("virtual", "external"):
        assert "other files" in refusal(tmp_path / "a.h5", dataset=name, raw_voxel_nm=1)


def test_files_that_are_cut(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "a.h5", {"raw": voxels((8, 32, 32))})
    path.write_bytes(path.read_bytes()[:5000])
    assert "HDF5 file cannot be read" in refusal(path, raw_voxel_nm=1)
    tifffile.imwrite(tmp_path / "a.tif", SMALL, metadata=None, contiguous=False, photometric="minisblack")
    data = (tmp_path / "a.tif").read_bytes()
    for length in (0, 3, 9, len(data) // 2):
        (tmp_path / "a.tif").write_bytes(data[:length])
        refusal(tmp_path / "a.tif", raw_voxel_nm=1)


def test_links_and_special_files_inside_containers(tmp_path: Path) -> None:
    path = ome(tmp_path)
    outside = write_array(tmp_path / "secret", SMALL, 2)
    (path / "s1").symlink_to(outside)
    attributes = json.loads((path / ".zattrs").read_text())
    attributes["multiscales"][0]["datasets"] = [{"path": "s1", "coordinateTransformations": transforms([1.0] * 3)}]
    (path / ".zattrs").write_text(json.dumps(attributes))
    assert "link" in refusal(path)
    path = ome(tmp_path / "b")
    chunk = path / "s0" / "0" / "0" / "0"
    chunk.unlink()
    chunk.symlink_to(outside / "0" / "0" / "0")
    assert "link" in refusal(path)
    chunk.unlink()
    os.mkfifo(chunk)
    assert "no plain file" in refusal(path)


def test_no_chunk_at_all_and_keys_of_another_kind(tmp_path: Path) -> None:
    path = ome(tmp_path)
    (path / "s0" / "0" / "0" / "0").rename(path / "s0" / "0.0.0")
    assert "no chunk of the volume is stored; there is" in refusal(path)


def test_chunks_that_are_too_large_to_decode(tmp_path: Path) -> None:
    path = write_array(tmp_path / "a.zarr", SMALL, 3)
    document = json.loads((path / "zarr.json").read_text())
    document["shape"] = document["chunk_grid"]["configuration"]["chunk_shape"] = [4096, 1024, 1024]
    (path / "zarr.json").write_text(json.dumps(document))
    assert "bytes each" in refusal(path, raw_voxel_nm=1)
    bomb = write_array(tmp_path / "b.zarr", np.zeros((64, 64, 64), "u1"), 3, compressors=zarr.codecs.GzipCodec(), fill_value=1)
    document = json.loads((bomb / "zarr.json").read_text())
    document["shape"] = document["chunk_grid"]["configuration"]["chunk_shape"] = [8, 8, 8]
    (bomb / "zarr.json").write_text(json.dumps(document))
    with open_volume(VolumeRequest(str(bomb), raw_voxel_nm=1)) as volume, pytest.raises(ItemError) as caught:
        volume.read(slice(0, 8), slice(0, 8), slice(0, 8))
    assert caught.value.reason == "too_large"


def test_tiffs_and_folders_that_are_ambiguous(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "q.tif", voxels((2, 3, 6, 8)), photometric="minisblack")
    assert "unknown axes" in refusal(tmp_path / "q.tif", raw_voxel_nm=1)
    (tmp_path / "mixed").mkdir()
    for z in range(3):
        Image.fromarray(SMALL[z].astype("uint8")).save(tmp_path / "mixed" / f"{z}.png")
    Image.fromarray(SMALL[0].astype("uint8")).save(tmp_path / "mixed" / "preview.jpg")
    assert "3 .png, 1 .jpg" in refusal(tmp_path / "mixed", raw_voxel_nm=1)
    (tmp_path / "bad").mkdir()
    for z in range(9):
        (tmp_path / "bad" / f"{z}.png").write_bytes(b"not a picture")
    assert "not an image" in refusal(tmp_path / "bad", raw_voxel_nm=1)
    for path in (tmp_path / "mixed" / "*.png", tmp_path / "q.tif"):
        assert "--dataset" in refusal(path, dataset="x", raw_voxel_nm=1)


def test_n5_of_other_kinds(tmp_path: Path) -> None:
    path = write_n5(tmp_path / "a.n5", SMALL)
    for change in ({"dataType": "string"}, {"compression": {"type": "lz4"}}, {"blockSize": [0, 1, 1]}, {"dimensions": "x"},
                   {"compression": 3}, {"dataType": ["uint8"]}, {"blockSize": [16, 16]}, {"axes": ["a"], "dimensions": [1] * 4}):
        add_n5(path, change)
        refusal(path, raw_voxel_nm=1)
        path = write_n5(tmp_path / f"a{sorted(change)[0]}{len(str(change))}.n5", SMALL)
    write_n5(tmp_path / "p.n5" / "s0", SMALL, {"resolution": [1, 1, 1]})
    write_n5(tmp_path / "p.n5" / "s1", SMALL)
    assert "downsampling factors" in refusal(tmp_path / "p.n5")
