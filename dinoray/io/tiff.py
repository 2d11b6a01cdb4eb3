"""TIFF bytes -> image_CYX: plain, OME, ImageJ and the vendors' flavours that tifffile knows.

Order of work: walk the directory chain (tiff_check.py), find which page is which plane (tiff_layout.py),
compare everything declared with the limits, check every strip against the file's length, then decode.
tifffile itself would fill missing strips and planes with zeros and trust the metadata.
"""

from __future__ import annotations

import io
from math import prod

import numpy as np
import tifffile

from dinoray.errors import ItemError
from dinoray.io.decoded import DecodedImage, Limits, check_limits, finish
from dinoray.io.tiff_check import check_page, count_pages
from dinoray.io.tiff_layout import STACK_TODO, Layout, find_layout

_JPEG = (6, 7, 34892, 33007)


MAX_UNNAMED_CHANNELS = 16
"""Pages without axes that are taken for channels; microscopes rarely have more."""


def decode_tiff(data: bytes, uri: str, limits: Limits, z_projection: str = "refuse") -> DecodedImage:
    """Decode a TIFF of one image. Plain pages of one shape are channels; samples (RGB) are channels too.

    Raises ItemError as decode_image says; what tifffile raises for damaged files comes through.
    """
    num_pages = count_pages(data, uri, limits)
    with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as tif:
        tif.pages.cache = True
        pages = [tif.pages[i] for i in range(num_pages)]
        layout = find_layout(tif, pages, uri, limits)
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
            raise ItemError("too_large", f"{len(grid)} channels, the limit is {limits.max_channels}", where=uri,
                            todo="write one image per file")
        if len(grid) > MAX_UNNAMED_CHANNELS and not layout.names and "C" not in layout.axes:
            raise ItemError("stack", f"{len(grid)} pages without axes: up to {MAX_UNNAMED_CHANNELS} are taken for "
                            "channels, more are likely a stack", where=uri, todo=STACK_TODO)
        for p in used:
            check_page(p, data, uri, limits)
        return _read(data, grid, pages, layout, uri, z_projection)


def declared_pixel_size(data: bytes, uri: str, limits: Limits) -> float | None:
    """The pixel size in µm that a TIFF's metadata declare; raises as `decode_tiff`, but looks at no pixel."""
    num_pages = count_pages(data, uri, limits)
    with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as tif:
        tif.pages.cache = True
        return find_layout(tif, [tif.pages[i] for i in range(num_pages)], uri, limits).pixel_size_um


def _channel_grid(
    layout: Layout, pages: list[tifffile.TiffPage], uri: str, z_projection: str
) -> np.ndarray:
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
                        todo=STACK_TODO)
    numbers = np.arange(prod(layout.shape)).reshape(layout.shape)
    order = sorted(range(numbers.ndim), key=lambda i: (layout.axes[i] == "Z", i))
    depth = prod(n for a, n in long if a == "Z")
    return numbers.transpose(order).reshape(-1, depth)


def _read(
    data: bytes,
    grid_CZ: np.ndarray,
    pages: list[tifffile.TiffPage],
    layout: Layout,
    uri: str,
    z_projection: str,
) -> DecodedImage:
    if z_projection == "middle":
        grid_CZ = grid_CZ[:, grid_CZ.shape[1] // 2][:, None]
    page = pages[layout.pages[0]]
    palette = page.photometric == 3 and layout.palette
    if page.photometric not in (0, 1, 2, 3) and not (page.photometric == 6 and page.compression in _JPEG):
        name = getattr(page.photometric, "name", page.photometric)
        raise ItemError("unsupported", f"a TIFF with colours of type {name}", where=uri,
                        todo="convert it to RGB")
    keep = _samples_to_keep(page, layout)
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
                  is_rgb8=palette or layout.colour and page.photometric in (2, 6) and len(keep) == 3)


def _samples_to_keep(page: tifffile.TiffPage, layout: Layout) -> list[int]:
    """All samples but 8-bit alpha (ExtraSamples 1, 2). Unspecified extra samples are channels: infrared.

    tifffile tags the fourth channel of an array CYX as alpha, so planes apart are no alpha in its files.
    """
    if page.dtype != np.uint8 or not layout.colour or page.planarconfig == 2 and page.is_shaped:
        return list(range(page.samplesperpixel))
    extra = page.extrasamples if isinstance(page.extrasamples, tuple) else (page.extrasamples,)
    first = page.samplesperpixel - len(extra)
    return [i for i in range(page.samplesperpixel) if i < first or extra[i - first] not in (1, 2)]


def _plane(data: bytes, number: int, pages: list[tifffile.TiffPage], layout: Layout, uri: str) -> np.ndarray:
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
