"""Helpers of the tests: OME-Zarr images and plates as other tools write them (0.4 = Zarr v2, 0.5 = Zarr v3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr

UNITS = {"t": ("time", "second"), "c": ("channel", None), "z": ("space", "micrometer"), "y": ("space", "micrometer"),
         "x": ("space", "micrometer")}


def image_attributes(axes: str, names: tuple[str, ...] | None = None, pixel_um: float = 0.5, version: str = "0.4",
                     unit: str = "micrometer") -> dict[str, Any]:
    """The OME attributes of an image of two levels "0" and "1" with a scale per axis."""
    described = [{"name": a, "type": UNITS[a][0]} | ({"unit": unit if UNITS[a][0] == "space" else UNITS[a][1]}
                                                     if UNITS[a][1] else {}) for a in axes]
    scale = [pixel_um if a in "yx" else 1.0 for a in axes]
    levels = [{"path": str(i), "coordinateTransformations": [
        {"type": "scale", "scale": [s * 2**i if a in "yx" else s for a, s in zip(axes, scale, strict=True)]}]} for i in (0, 1)]
    found: dict[str, Any] = {"multiscales": [{"axes": described, "datasets": levels, "name": "image"}]}
    if version == "0.4":
        found["multiscales"][0]["version"] = version
    if names:
        found["omero"] = {"channels": [{"label": name, "color": "FFFFFF"} for name in names]}
    return found


def write_group(folder: Path, attributes: dict[str, Any], version: str = "0.4") -> Path:
    """A group's documents with OME attributes."""
    folder.mkdir(parents=True, exist_ok=True)
    if version == "0.4":
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps(attributes))
    else:
        (folder / "zarr.json").write_text(json.dumps(
            {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"version": version, **attributes}}}))
    return folder


def write_image(folder: Path, pixels: np.ndarray, axes: str = "tczyx", *, version: str = "0.4",
                names: tuple[str, ...] | None = None, pixel_um: float = 0.5, **options: Any) -> Path:
    """An image of two levels; `options` go to zarr.create_array of both."""
    write_group(folder, image_attributes(axes, names, pixel_um, version), version)
    for level, step in enumerate((1, 2)):
        data = np.ascontiguousarray(pixels[..., ::step, ::step])
        chunks = options.get("chunks") or tuple(1 if a in "tcz" else min(32, n) for a, n in zip(axes, data.shape, strict=True))
        v2 = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} if version == "0.4" else {}
        array = zarr.create_array(str(folder / str(level)), shape=data.shape, dtype=data.dtype,
                                  zarr_format=2 if version == "0.4" else 3, overwrite=False,
                                  **{"chunks": chunks, **v2, **{k: v for k, v in options.items() if k != "chunks"}})
        array[:] = data
    return folder


def write_plate(folder: Path, wells: dict[str, list[np.ndarray]], *, version: str = "0.4", name: str = "plate",
                axes: str = "cyx", channels: tuple[str, ...] = ("DNA", "ER")) -> Path:
    """An HCS plate: {"A/1": [pixels of field 0, ...]}."""
    rows = sorted({well.split("/")[0] for well in wells})
    columns = sorted({well.split("/")[1] for well in wells}, key=int)
    plate = {"name": name, "rows": [{"name": r} for r in rows], "columns": [{"name": c} for c in columns],
             "wells": [{"path": w, "rowIndex": rows.index(w.split("/")[0]), "columnIndex": columns.index(w.split("/")[1])}
                       for w in wells]}
    if version == "0.4":
        plate["version"] = version
    write_group(folder, {"plate": plate}, version)
    for well, fields in wells.items():
        write_group(folder / well.split("/")[0], {}, version)
        write_group(folder / well, {"well": {"images": [{"path": str(i), "acquisition": 1} for i in range(len(fields))]}}, version)
        for i, pixels in enumerate(fields):
            write_image(folder / well / str(i), pixels, axes, version=version, names=channels)
    return folder
