"""The labelled volumes of benchmarks/volumes_learning.py, written as OME-Zarr once."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import h5py
import imageio.v3 as imageio
import numpy as np
import tifffile
import zarr

FIB_NM = 10.0


def write_zarr(folder: Path, values: np.ndarray, voxel_nm: tuple[float, float, float]) -> Path:
    """An OME-Zarr 0.5 of one level, its outer corner at the origin."""
    if (folder / "zarr.json").exists():
        return folder
    array = zarr.create_array(folder / "0", shape=values.shape, dtype=values.dtype,
                              chunks=tuple(min(64, n) for n in values.shape), zarr_format=3)
    array[:] = values
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(voxel_nm)},
                                                        {"type": "translation", "translation": [v / 2 for v in voxel_nm]}]}
    (folder / "zarr.json").write_text(json.dumps({
        "zarr_format": 3, "node_type": "group",
        "attributes": {"ome": {"version": "0.5", "multiscales": [{"name": folder.stem, "axes": axes, "datasets": [level]}]}}}))
    return folder


def fib25(data: Path, out: Path) -> tuple[Path, Path]:
    """(raw uint8, bodies uint32), 250^3 voxels of 10 nm, of fib25_neuroproof."""
    sample = data / "fib25_neuroproof/training_sample2"
    raw = np.stack([imageio.imread(path) for path in sorted((sample / "grayscale_maps").glob("iso.*.png"))])
    with h5py.File(io.BytesIO(gzip.decompress((sample / "groundtruth.h5.gz").read_bytes()))) as file:
        stack, transforms = file["stack"][:], file["transforms"][:]
    lut = np.zeros(int(max(stack.max(), transforms[:, 0].max())) + 1, np.int64)
    lut[transforms[:, 0]] = transforms[:, 1]
    bodies = np.unique(lut[stack], return_inverse=True)[1].reshape(stack.shape).astype(np.uint32)
    if lut[stack].min() > 0:
        bodies += 1
    size = (FIB_NM,) * 3
    return write_zarr(out / "fib25.zarr", raw, size), write_zarr(out / "fib25_bodies.zarr", bodies, size)


def nuclei(data: Path, out: Path) -> tuple[Path, Path]:
    """(raw uint16, nuclei uint32), 60 x 256 x 256.

    The file states no voxel size: 290 x 260 x 260 nm, as scikit-image says of cells3d.
    """
    folder, size = data / "nuclei3d_cells3d", (290.0, 260.0, 260.0)
    return (write_zarr(out / "nuclei.zarr", tifffile.imread(folder / "nuclei.tif"), size),
            write_zarr(out / "nuclei_labels.zarr", tifffile.imread(folder / "nuclei_label.tif").astype(np.uint32), size))


def stardist(data: Path, out: Path) -> tuple[Path, Path]:
    """(raw, labels) of StarDist's 3D sample; no voxel size is known: 1000 nm are written."""
    folder, size = data / "stardist_samples", (1000.0,) * 3
    return (write_zarr(out / "stardist3d.zarr", tifffile.imread(folder / "img3d.tif"), size),
            write_zarr(out / "stardist3d_labels.zarr", tifffile.imread(folder / "mask3d.tif").astype(np.uint32), size))
