"""Which page of a TIFF is which plane: OME-XML, ImageJ metadata, the vendors' flavours, plain pages."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import tifffile

from dinoray.errors import ItemError
from dinoray.io import ome
from dinoray.io.decoded import Limits

_SERIES_FLAVOURS = ("shaped", "lsm", "mmstack", "fluoview", "stk", "sis", "scanimage", "nih", "mdgel",
                    "svs", "scn", "qpi", "ndpi", "bif", "philips", "ndtiff")
STACK_TODO = "write one image per file, or for focus stacks ask for a projection: --z-projection max (or middle)"


@dataclass(frozen=True)
class Layout:
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
    colour: bool = True
    """False when the metadata call the samples of a pixel channels, whatever the photometric tag says."""


def find_layout(tif: tifffile.TiffFile, pages: list[tifffile.TiffPage], uri: str, limits: Limits) -> Layout:
    """The layout of a TIFF's one image. Pages of a plain TIFF get the axis Q (unknown).

    Raises ItemError: `truncated` when planes are missing, `stack` for several images, `decode` for
    metadata that contradict the pages.
    """
    page = pages[0]
    if "<!ENTITY" in page.description:
        raise ItemError("unsupported", "a description with a document type (entity expansion)", where=uri)
    if page.is_ome:
        found = ome.read_planes(tif.ome_metadata, len(pages), uri, limits)
        if found is not None:
            return _ome_layout(found, page, uri)
        if len(pages) > 1:
            raise ItemError("stack", "the axes of the pages are in a companion file", where=uri,
                            todo="convert the set to one OME-TIFF per image")
    if page.is_imagej and tif.imagej_metadata:
        return _imagej_layout(tif.imagej_metadata, pages, uri)
    if any(getattr(tif, f"is_{flavour}") for flavour in _SERIES_FLAVOURS):
        return _series_layout(tif, uri)
    images = [i for i, p in enumerate(pages) if not p.subfiletype & 0b101]  # no thumbnails, no masks
    images = images or list(range(len(pages)))
    return Layout("Q", (len(images),), tuple(images))


def _ome_layout(found: ome.OmePlanes, page, uri: str) -> Layout:
    if (page.imagelength, page.imagewidth) != (found.height, found.width):
        raise ItemError("decode", f"the OME-XML declares {found.height} x {found.width} pixels, the page "
                        f"holds {page.imagelength} x {page.imagewidth}", where=uri)
    t, z, c = (sorted({key[i] for key in found.planes}) for i in range(3))
    missing = len(t) * len(z) * len(c) - len(found.planes)
    if missing or not found.planes:
        raise ItemError("truncated", f"the file lacks {missing} planes of the OME image", where=uri)
    keys = [(i, j, k) for i in t for j in z for k in c]
    names = tuple(found.names[k] for k in c) if all(k in found.names for k in c) else None
    return Layout("TZC", (len(t), len(z), len(c)), tuple(found.planes[key] for key in keys), names=names,
                   pixel_size_um=found.pixel_size_um, palette=False)


def _imagej_layout(meta: dict, pages: list[tifffile.TiffPage], uri: str) -> Layout:
    page = pages[0]
    names = {"C": "channels", "Z": "slices", "T": "frames"}
    sizes = {axis: int(meta.get(name, 1)) for axis, name in names.items()}
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
    if contiguous and not page.is_contiguous or not contiguous and total > len(pages):
        raise ItemError("truncated", f"ImageJ metadata promise {total} planes, the file holds {len(pages)}",
                        where=uri)
    unit = str(meta.get("unit", "")).replace("\\u00B5", "µ")
    x, y = (ome.to_um(_per_pixel(page, tag), unit) for tag in (282, 283))
    labels = meta.get("Labels")
    named = isinstance(labels, list) and len(labels) == total == sizes.get("C")
    named = named and all(labels) and len(set(labels)) == total
    return Layout(axes, shape, (0,) if contiguous else tuple(range(total)), contiguous,
                   tuple(map(str, labels)) if named else None, ome.isotropic(x, y), palette=False)


def _per_pixel(page, tag: int) -> float | None:
    """Units per pixel from an X/YResolution tag, whose value is pixels per unit."""
    value = page.tags.valueof(tag)
    if not isinstance(value, tuple) or len(value) != 2 or not value[0]:
        return None
    return value[1] / value[0]


def _series_layout(tif, uri: str) -> Layout:
    """The flavours of tifffile: its `series` says the axes."""
    series = [s for s in tif.series if not s.keyframe.subfiletype & 0b101] or tif.series
    if len(series) != 1:
        raise ItemError("stack", f"the TIFF holds {len(series)} images", where=uri,
                        todo="write one image per file")
    pages = series[0].pages
    leading = [(a, n) for a, n in zip(series[0].axes, series[0].shape, strict=True) if a not in "YXS"]
    if any(p is None for p in pages):
        raise ItemError("truncated", "the TIFF lacks planes that its metadata promise", where=uri)
    samples = series[0].keyframe.samplesperpixel
    colour = samples == 1 or "S" in series[0].axes
    if not colour:  # an array CYX of 3 or 4 channels by tifffile, LSM: one page, its samples are an axis
        axis = next((a for a, n in reversed(leading) if n == samples), "Q")
        if axis not in "CQ":
            raise ItemError("stack", f"not one image but a stack: axes {series[0].axes}, "
                            f"{' x '.join(map(str, series[0].shape))}", where=uri, todo=STACK_TODO)
        leading = [pair for pair in leading if pair != (axis, samples)]
    axes = "".join("Q" if a == "I" else a for a, _ in leading)
    shape = tuple(n for _, n in leading)
    total = prod(shape)
    contiguous = total > 1 and len(pages) == 1
    if len(pages) != total and not (contiguous and series[0].keyframe.is_contiguous):
        raise ItemError("truncated", f"the metadata promise {total} planes, the file holds {len(pages)}",
                        where=uri)
    if prod(series[0].shape) != total * prod(series[0].keyframe.shape):
        raise ItemError("decode", f"the metadata's shape {series[0].shape} is not that of {total} pages of "
                        f"{series[0].keyframe.shape}", where=uri)
    return Layout(axes, shape, tuple(p.index for p in pages), contiguous, colour=colour)
