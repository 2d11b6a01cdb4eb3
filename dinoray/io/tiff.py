"""TIFF bytes -> image_CYX: plain, OME, ImageJ and the vendors' flavours that tifffile knows.

Order of work: walk the directory chain (tiff_check.py), find out which page is which plane, compare
everything declared with the limits, check every strip against the file's length, then decode.
tifffile itself would fill missing strips and planes with zeros and trust the metadata.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import prod

import numpy as np
import tifffile

from dinoray.errors import ItemError
from dinoray.io import ome
from dinoray.io.decoded import DecodedImage, Limits, check_limits, finish
from dinoray.io.tiff_check import check_page, count_pages

_SERIES_FLAVOURS = ("shaped", "lsm", "mmstack", "fluoview", "stk", "sis", "scanimage", "nih", "mdgel",
                    "svs", "scn", "qpi", "ndpi", "bif", "philips", "ndtiff")
_JPEG = (6, 7, 34892, 33007)


@dataclass(frozen=True)
class _Layout:
    """How the planes lie: leading axes (slowest first, Q = unknown), and the page of each plane.

    With `contiguous` all planes follow each other behind the only page's data.
    """

    axes: str
    shape: tuple[int, ...]
    pages: tuple[int, ...]
    contiguous: bool = False
    names: tuple[str, ...] | None = None
    pixel_size_um: float | None = None
    palette: bool = True
    """Whether a colour map is part of the image (in OME and ImageJ files it is only how to show it)."""


def decode_tiff(data: bytes, uri: str, limits: Limits, z_projection: str = "refuse") -> DecodedImage:
    """Decode a TIFF of one image. Plain pages of one shape are channels; samples (RGB) are channels too.

    Raises ItemError as decode_image says; what tifffile raises for damaged files comes through.
    """
    num_pages = count_pages(data, uri, limits)
    with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as tif:
        tif.pages.cache = True
        pages = [tif.pages[i] for i in range(num_pages)]
        layout = _layout(tif, pages, data, uri, limits)
        grid = _channel_grid(layout, pages, uri, z_projection)
        used = [pages[i] for i in dict.fromkeys(layout.pages)]
        page = used[0]
        if any((p.shape, p.dtype, p.axes) != (page.shape, page.dtype, page.axes) for p in used):
            raise ItemError("stack", "the pages differ in shape or pixel type: "
                            + ", ".join(sorted({f"{p.shape} {p.dtype}" for p in used})[:4]), where=uri,
                            todo="write one image per file")
        check_limits(uri, limits, height=page.imagelength, width=page.imagewidth, planes=prod(layout.shape),
                     samples=page.samplesperpixel, itemsize=page.dtype.itemsize if page.dtype else 1)
        if len(grid) > limits.max_channels:
            raise ItemError("too_large", f"{len(grid)} pages; pages without axes are read as channels, and "
                            f"the limit is {limits.max_channels}", where=uri,
                            todo="a stack is a volume: see `dinoray extract volume`")
        for p in used:
            check_page(p, data, uri, limits)
        return _read(data, grid, pages, layout, uri, z_projection)


def _layout(tif, pages, data, uri, limits) -> _Layout:
    page = pages[0]
    if page.is_ome:
        found = ome.read_planes(tif.ome_metadata, len(pages), uri, limits)
        if found is not None:
            return _ome_layout(found, page, uri)
        if len(pages) > 1:
            raise ItemError("stack", "the axes of the pages are in a companion file", where=uri,
                            todo="convert the set to one OME-TIFF per image")
    if page.is_imagej and tif.imagej_metadata:
        return _imagej_layout(tif.imagej_metadata, pages, data, uri)
    if any(getattr(tif, f"is_{flavour}") for flavour in _SERIES_FLAVOURS):
        return _series_layout(tif, uri)
    images = [i for i, p in enumerate(pages) if not p.subfiletype & 0b101]  # no thumbnails, no masks
    images = images or list(range(len(pages)))
    return _Layout("Q", (len(images),), tuple(images))


def _ome_layout(found: ome.OmePlanes, page, uri: str) -> _Layout:
    if (page.imagelength, page.imagewidth) != (found.height, found.width):
        raise ItemError("decode", f"the OME-XML declares {found.height} x {found.width} pixels, the page holds "
                        f"{page.imagelength} x {page.imagewidth}", where=uri)
    t, z, c = (sorted({key[i] for key in found.planes}) for i in range(3))
    keys = [(i, j, k) for i in t for j in z for k in c] if len(found.planes) <= len(t) * len(z) * len(c) else []
    missing = [key for key in keys if key not in found.planes]
    if missing or not keys:
        raise ItemError("truncated", f"the file lacks {len(missing)} planes of the OME image", where=uri)
    names = tuple(found.names[k] for k in c) if all(k in found.names for k in c) else None
    return _Layout("TZC", (len(t), len(z), len(c)), tuple(found.planes[key] for key in keys), names=names,
                   pixel_size_um=found.pixel_size_um, palette=False)


def _imagej_layout(meta: dict, pages, data: bytes, uri: str) -> _Layout:
    page = pages[0]
    sizes = {"C": int(meta.get("channels", 1)), "Z": int(meta.get("slices", 1)), "T": int(meta.get("frames", 1))}
    if min(sizes.values()) < 1:
        raise ItemError("decode", f"ImageJ metadata declare {sizes}", where=uri)
    if sizes["C"] == page.samplesperpixel and prod(sizes.values()) != len(pages):
        sizes["C"] = 1  # Bio-Formats declares the samples of a pixel as channels
    order = str(meta.get("order", "czt")).lower()
    axes = "".join(reversed(order)).upper() if sorted(order) == ["c", "t", "z"] else "TZC"
    total = prod(sizes.values())
    if total == 1 and len(pages) > 1:
        axes, sizes, total = "Q", {"Q": len(pages)}, len(pages)
    shape = tuple(sizes[axis] for axis in axes)
    contiguous = total > 1 and len(pages) == 1
    if contiguous and page.compression != 1 or not contiguous and total > len(pages):
        raise ItemError("truncated", f"ImageJ metadata promise {total} planes, the file holds {len(pages)}",
                        where=uri)
    unit = str(meta.get("unit", "")).replace("\\u00B5", "µ")
    x, y = (ome.to_um(_per_pixel(page, tag), unit) for tag in (282, 283))
    labels = meta.get("Labels")
    named = isinstance(labels, list) and len(labels) == total == sizes.get("C") == len(set(labels)) and all(labels)
    return _Layout(axes, shape, (0,) if contiguous else tuple(range(total)), contiguous,
                   tuple(map(str, labels)) if named else None, ome.isotropic(x, y), palette=False)


def _per_pixel(page, tag: int) -> float | None:
    """Units per pixel from an X/YResolution tag, whose value is pixels per unit."""
    value = page.tags.valueof(tag)
    if not isinstance(value, tuple) or len(value) != 2 or not value[0]:
        return None
    return value[1] / value[0]


def _series_layout(tif, uri: str) -> _Layout:
    """The flavours of tifffile: its `series` says the axes."""
    series = [s for s in tif.series if not s.keyframe.subfiletype & 0b101] or tif.series
    if len(series) != 1:
        raise ItemError("stack", f"the TIFF holds {len(series)} images", where=uri, todo="write one image per file")
    pages = series[0].pages
    leading = [(a, n) for a, n in zip(series[0].axes, series[0].shape, strict=True) if a not in "YXS"]
    if any(p is None for p in pages):
        raise ItemError("truncated", "the TIFF lacks planes that its metadata promise", where=uri)
    samples = series[0].keyframe.samplesperpixel
    if samples > 1 and ("C", samples) in leading and "S" not in series[0].axes:
        leading.remove(("C", samples))  # LSM: the samples of a page are the channels
    axes = "".join("Q" if a == "I" else a for a, _ in leading)
    shape = tuple(n for _, n in leading)
    contiguous = prod(shape) > 1 and len(pages) == 1
    if len(pages) != prod(shape) and not (contiguous and series[0].dataoffset is not None):
        raise ItemError("truncated", f"the metadata promise {prod(shape)} planes, the file holds {len(pages)}",
                        where=uri)
    return _Layout(axes, shape, tuple(p.index for p in pages), contiguous)


def _channel_grid(layout: _Layout, pages, uri: str, z_projection: str) -> np.ndarray:
    """Plane numbers [C, Z] (Z = 1 unless it is projected). Raises ItemError `stack` for other axes."""
    page = pages[layout.pages[0]]
    long = [(a, n) for a, n in zip(layout.axes, layout.shape, strict=True) if n > 1]
    z_free = z_projection in ("max", "middle")
    channels = [a for a, _ in long if a in "CQ"]
    samples = page.samplesperpixel > 1 or page.photometric == 3 and layout.palette
    if (
        len(channels) > 1 or page.imagedepth > 1 or channels and samples
        or any(a not in "CQ" and not (a == "Z" and z_free) for a, _ in long)
    ):
        axes = "".join(a for a, _ in long) + page.axes
        sizes = " x ".join(map(str, [*(n for _, n in long), *page.shape]))
        raise ItemError("stack", f"not one image but a stack: axes {axes}, {sizes} (Q = unknown)", where=uri,
                        todo="write one image per file, ask for a projection of Z, or use `extract volume`")
    numbers = np.arange(prod(layout.shape)).reshape(layout.shape)
    order = sorted(range(numbers.ndim), key=lambda i: (layout.axes[i] == "Z", i))
    depth = prod(n for a, n in long if a == "Z")
    return numbers.transpose(order).reshape(-1, depth)


def _read(data: bytes, grid_CZ: np.ndarray, pages, layout: _Layout, uri: str, z_projection: str) -> DecodedImage:
    if z_projection == "middle":
        grid_CZ = grid_CZ[:, grid_CZ.shape[1] // 2][:, None]
    page = pages[layout.pages[0]]
    palette = page.photometric == 3 and layout.palette
    if page.photometric not in (0, 1, 2, 3) and not (page.photometric == 6 and page.compression in _JPEG):
        name = getattr(page.photometric, "name", page.photometric)
        raise ItemError("unsupported", f"a TIFF with colours of type {name}", where=uri, todo="convert it to RGB")
    keep = _samples_to_keep(page)
    out = None
    for c, planes in enumerate(grid_CZ):
        plane = _plane(data, int(planes[0]), pages, layout, uri)[keep]
        for number in planes[1:]:
            plane = np.maximum(plane, _plane(data, int(number), pages, layout, uri)[keep])
        if len(grid_CZ) == 1:
            out = plane
            break
        if out is None:
            out = np.empty((len(grid_CZ), *plane.shape[1:]), plane.dtype)
        out[c] = plane[0]
    if palette:
        colours = np.asarray(page.tags.valueof(320)).reshape(3, -1)
        out = (colours[:, out[0]] >> 8).astype(np.uint8)
    return finish(out, uri, channel_names=layout.names, pixel_size_um=layout.pixel_size_um,
                  is_rgb8=palette or page.photometric in (2, 6) and len(keep) == 3)


def _samples_to_keep(page) -> list[int]:
    """All samples but alpha (ExtraSamples 1 and 2); unspecified extra samples are channels (near infrared)."""
    extra = page.extrasamples if isinstance(page.extrasamples, tuple) else (page.extrasamples,)
    first = page.samplesperpixel - len(extra)
    return [i for i in range(page.samplesperpixel) if i < first or i >= first and extra[i - first] not in (1, 2)]


def _plane(data: bytes, number: int, pages, layout: _Layout, uri: str) -> np.ndarray:
    """One plane as [samples, Y, X]."""
    page = pages[layout.pages[0 if layout.contiguous else number]]
    if layout.contiguous:
        offset = page.dataoffsets[0] + number * page.nbytes
        if page.compression != 1 or offset + page.nbytes > len(data):
            raise ItemError("truncated", f"the file ends before plane {number + 1} of {prod(layout.shape)}",
                            where=uri)
        dtype = page.dtype.newbyteorder(page.parent.byteorder)
        plane = np.frombuffer(data, dtype, page.size, offset).reshape(page.shape)
    else:
        plane = page.asarray(maxworkers=1)
    if page.axes == "YXS":
        return plane.transpose(2, 0, 1)
    return plane if page.axes == "SYX" else plane[None]
