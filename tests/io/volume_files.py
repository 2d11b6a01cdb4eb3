"""Volumes as other tools write them: OME-Zarr by zarr, N5 by tensorstore, HDF5 by h5py, stacks by tifffile and PIL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensorstore
import zarr
from ome_zarr_models.v04.image import ImageAttrs
from ome_zarr_models.v05 import Image

from tests.omezarr import write_group

KINDS = {"t": "time", "c": "channel"}


def voxels(shape: tuple[int, ...] = (23, 37, 41), dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    """Random numbers over the dtype's range (floats: 0 to 1), no two alike by plan."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, endpoint=True, dtype=np.dtype(dtype).newbyteorder("=")).astype(dtype)


def transforms(scale: list[float] | None, translation: list[float] | None = None) -> list[dict[str, Any]]:
    """coordinateTransformations."""
    return [{"type": kind, kind: values} for kind, values in (("scale", scale), ("translation", translation)) if values is not None]


def ome_attributes(axes: str, levels: dict[str, list[dict[str, Any]]], *, unit: str | None = "nanometer", version: str = "0.4",
                   whole: list[dict[str, Any]] | None = None, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The OME attributes of an image: {path: coordinateTransformations}, `whole` those of the multiscale."""
    described = [{"name": a, "type": KINDS.get(a, "space")} | ({"unit": unit} if unit and a in "zyx" else {}) for a in axes]
    multiscale: dict[str, Any] = {"name": "image", "axes": described, "datasets": [
        {"path": path, "coordinateTransformations": listed} for path, listed in levels.items()]}
    if whole is not None:
        multiscale["coordinateTransformations"] = whole
    if version == "0.4":
        multiscale["version"] = version
    found: dict[str, Any] = {"multiscales": [multiscale]}
    if names:
        found["omero"] = {"channels": [{"label": n, "color": "FFFFFF", "window": {"min": 0, "max": 1, "start": 0, "end": 1}}
                                       for n in names]}
    return found


def write_ome(folder: Path, arrays: dict[str, np.ndarray], attributes: dict[str, Any], version: str = "0.4",
              **options: Any) -> Path:
    """A group with OME attributes and its levels; `options` go to zarr.create_array."""
    write_group(folder, attributes, version)
    names = [axis["name"] for axis in attributes["multiscales"][0]["axes"]]
    for path, data in arrays.items():
        more = {} if version == "0.4" else {"dimension_names": names}
        write_array(folder / path, data, 2 if version == "0.4" else 3, **{**more, **options})
    return folder


def validate_ome(folder: Path, version: str) -> None:
    """What an independent reader of the standard says of a group: raises unless it is an OME-Zarr image."""
    group = zarr.open_group(str(folder), mode="r")
    if version == "0.4":
        ImageAttrs.model_validate(dict(group.attrs))
    else:
        Image.from_zarr(group)


def write_array(folder: Path, data: np.ndarray, version: int, attributes: dict[str, Any] | None = None,
                **options: Any) -> Path:
    """A plain array of Zarr v2 (keys with "/") or v3."""
    keys = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} if version == 2 else {}
    chunks = options.pop("chunks", tuple(min(16, n) for n in data.shape))
    array = zarr.create_array(str(folder), shape=data.shape, dtype=data.dtype, zarr_format=version, chunks=chunks,
                              attributes=attributes, **{**keys, **options})
    array[...] = data
    return folder


def write_n5(folder: Path, data_zyx: np.ndarray, attributes: dict[str, Any] | None = None, compression: str = "gzip",
             block_xyz: tuple[int, ...] = (16, 15, 14)) -> Path:
    """An N5 array by tensorstore, whose axes are x, y, z; `attributes` are added to its own."""
    packed: dict[str, Any] = {"type": compression}
    if compression == "blosc":
        packed |= {"cname": "lz4", "clevel": 5, "shuffle": 1}
    array = tensorstore.open({"driver": "n5", "kvstore": {"driver": "file", "path": str(folder)}, "metadata": {
        "dataType": data_zyx.dtype.name, "dimensions": data_zyx.shape[::-1], "blockSize": block_xyz,
        "compression": packed}}, create=True).result()
    array.write(data_zyx.T).result()
    return add_n5(folder, attributes or {})


def add_n5(folder: Path, attributes: dict[str, Any]) -> Path:
    """Attributes of an N5 group or array, beside those that it has."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "attributes.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | attributes))
    return folder


def write_hdf5(path: Path, datasets: dict[str, np.ndarray], attributes: dict[str, Any] | None = None, **options: Any) -> Path:
    """Datasets by h5py; `attributes` for each."""
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file.create_dataset(name, data=data, **options).attrs.update(attributes or {})
    return path
