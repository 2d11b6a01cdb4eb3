"""A TIFF stack -> a volume whose slices are pages: plain pages, OME, ImageJ and the vendors' flavours.

Directories are checked and axes found as for images (tiff_check.py, tiff_layout.py). Pages are decoded one by one when they
are asked for. A stack on an object store is copied once to a temporary file: its directories lie all over it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import numpy as np
import tifffile

from dinoray.errors import BadRequest, DinorayError, ItemError
from dinoray.io import ome
from dinoray.io.decoded import Limits
from dinoray.io.items import FileRef
from dinoray.io.stores import is_local
from dinoray.io.tiff_check import check_page, count_pages
from dinoray.io.tiff_layout import Layout, find_layout
from dinoray.io.volume_grid import Shape
from dinoray.io.volume_levels import Level, check_sizes, choose_level, unstated
from dinoray.io.volume_objects import check_same, read_part, ref_of
from dinoray.io.volume_source import MAX_PIECE_BYTES, About, Source, VolumeRequest, check_array, check_piece, pick

LIMITS = Limits(max_pixels=2**31, max_pages=2**17, max_bytes=MAX_PIECE_BYTES, max_file_bytes=2**50)
"""Of a page, and of how many there are. Directories may hold 2**18 tags together: some 15,000 pages."""
_COPY_BYTES = 2**24
_JPEG_COLOURS = (6, 7, 34892, 33007)


def open_tiff(uri: str, request: VolumeRequest) -> Source:
    """The Source of a TIFF. Raises BadRequest, ItemError (of metadata), errors of storage."""
    if request.dataset is not None:
        raise BadRequest("a TIFF holds no datasets", where=uri, todo="leave out --dataset")
    ref = ref_of(uri)
    file = open(uri, "rb") if is_local(uri) else _copied(ref)  # noqa: SIM115  (the Source closes it)
    with contextlib.ExitStack() as opened:
        opened.callback(file.close)
        if ref.size < 8:
            raise ItemError("truncated", f"the file holds {ref.size:,} bytes", where=uri)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        opened.callback(_close, data)
        try:
            source = _open(uri, ref, request, file, data)
        except DinorayError:
            raise
        except Exception as error:  # tifffile raises a dozen types for damaged files
            raise ItemError("decode", f"the TIFF cannot be read: {type(error).__name__}: {error}"[:300], where=uri) from error
        source.opened = opened.pop_all()
        return source


def _close(data: mmap.mmap) -> None:
    with contextlib.suppress(BufferError):  # a failed check still looks at it: it goes with the last view
        data.close()


def _copied(ref: FileRef) -> BinaryIO:
    """A nameless temporary file with the bytes of a remote one."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (the Source closes it)
    try:
        for begin in range(0, ref.size, _COPY_BYTES):
            file.write(read_part(ref, begin, min(ref.size, begin + _COPY_BYTES)))
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file  # type: ignore[return-value]


@dataclass(frozen=True)
class _Axes:
    """Plane number (in the layout) of each slice, and which sample of a pixel is read."""

    planes: np.ndarray
    sample: int
    note: str = ""


def _open(uri: str, ref: FileRef, request: VolumeRequest, file: BinaryIO, data: mmap.mmap) -> TiffSource:
    num_pages = count_pages(data, uri, LIMITS)
    tif = tifffile.TiffFile(file, name=uri.rpartition("/")[2], _multifile=False)
    tif.filehandle.set_lock(True)
    tif.pages.cache = True
    pages = [tif.pages[i] for i in range(num_pages)]
    layout = find_layout(tif, pages, uri, LIMITS)
    page = pages[layout.pages[0]]
    if page.imagedepth > 1:
        raise BadRequest("a TIFF of volumetric tiles", where=uri, todo="write it with one slice per page, or as OME-Zarr")
    if page.photometric == 3 and layout.palette or page.photometric not in (0, 1, 2, 3) and not (
            page.photometric == 6 and page.compression in _JPEG_COLOURS):
        raise BadRequest("a TIFF with a colour map or unusual colours", where=uri, todo="convert it to grey values")
    axes = _axes(layout, page, request, uri)
    check_page(page, data, uri, LIMITS)
    shape = (len(axes.planes), page.imagelength, page.imagewidth)
    check_array(shape, page.dtype, uri, mask=request.mask)
    chunks = (1, *shape[1:])
    check_piece((page.samplesperpixel, *chunks), page.dtype, uri)
    level, notes = _size(tif, layout, page, num_pages, request, uri)
    notes += (axes.note,) if axes.note else ()
    if not is_local(uri):
        notes += (f"the stack of {ref.size:,} bytes is copied to a temporary file by every process that reads it",)
    about = About(shape, page.dtype.newbyteorder("="), chunks, level.voxel_size_nm, level.translation_nm, ref, notes, level.name)
    return TiffSource(about, uri, file, data, [pages[i] for i in layout.pages], layout, axes)


def _axes(layout: Layout, page: tifffile.TiffPage, request: VolumeRequest, uri: str) -> _Axes:
    """What of the planes is z. Pages without axes are taken for z. Raises BadRequest."""
    sizes = dict(zip(layout.axes, layout.shape, strict=False))
    known = "".join(a for a in layout.axes if sizes[a] > 1)
    if len(set(layout.axes)) < len(layout.axes) or any(a not in "TCZQ" for a in known) or "Z" in known and "Q" in known:
        raise BadRequest(f"unknown axes {layout.axes} of {' x '.join(map(str, layout.shape))} pages (Q: not named)", where=uri,
                         todo="write it with the axes Z, Y, X (and T, C), as OME-TIFF or for ImageJ")
    depth = "Q" if "Q" in known else "Z"
    if depth not in known:
        raise BadRequest(f"an image without depth, not a volume (axes {known}YX)", where=uri,
                         todo="images are read by `dinoray extract images`; name the axis of the slices Z")
    samples = page.samplesperpixel
    if samples > 1 and sizes.get("C", 1) > 1:
        raise BadRequest("channels in pages and in pixels too", where=uri, todo="write it with one channel per page")
    at = {"T": pick("time", sizes.get("T"), None, request.time, uri)}
    if samples > 1:
        sample, at["C"] = pick("channel", samples, layout.names if layout.names and len(layout.names) == samples else None,
                               request.channel, uri), 0
    else:
        sample, at["C"] = 0, pick("channel", sizes.get("C"), layout.names, request.channel, uri)
    numbers = np.arange(prod(layout.shape)).reshape(layout.shape)
    planes = numbers[tuple(slice(None) if a == depth else at.get(a, 0) for a in layout.axes)]
    return _Axes(planes, sample, "the pages name no axis: they are taken for z" if depth == "Q" else "")


def _size(tif: tifffile.TiffFile, layout: Layout, page: tifffile.TiffPage, num_pages: int, request: VolumeRequest, uri: str
          ) -> tuple[Level, tuple[str, ...]]:
    """The voxel size by OME-XML or ImageJ; other files' resolutions are for print."""
    sizes: tuple[float | None, ...] = (None, None, None)
    if page.is_ome:
        found = ome.read_planes(tif.ome_metadata, num_pages, uri, LIMITS)
        sizes = found.voxel_size_um if found else sizes
    elif page.is_imagej and tif.imagej_metadata:
        meta = tif.imagej_metadata
        unit = str(meta.get("unit", "")).replace("\\u00B5", "µ")
        y, x = (ome.to_um(_per_pixel(page, tag), unit) for tag in (283, 282))
        sizes = ome.to_um(meta.get("spacing"), unit), y, x
    if any(s is None for s in sizes):
        said = ", ".join(f"{a}: {'unknown' if s is None else f'{s:g} µm'}" for a, s in zip("zyx", sizes, strict=True))
        return unstated("0", None, None, request.raw_voxel_nm, f"the TIFF does not state its voxel size ({said})", uri)
    level = Level("0", check_sizes([s * 1000 for s in sizes], uri))  # type: ignore[operator]
    return choose_level([level], request.raw_voxel_nm, uri)


def _per_pixel(page: tifffile.TiffPage, tag: int) -> float | None:
    value = page.tags.valueof(tag)
    return value[1] / value[0] if isinstance(value, tuple) and len(value) == 2 and value[0] else None


class TiffSource(Source):
    """Slices are planes of the layout; `pages` are those of the layout, one only when the planes follow each other."""

    opened: contextlib.ExitStack

    def __init__(self, about: About, uri: str, file: BinaryIO, data: mmap.mmap, pages: list[tifffile.TiffPage], layout: Layout,
                 axes: _Axes):
        self.about, self._uri, self._file, self._data = about, uri, file, data
        self._pages, self._layout, self._axes = pages, layout, axes

    def check(self) -> None:
        if is_local(self._uri):  # else what is read is a copy of our own
            check_same(self.about.ref)

    def piece(self, place: Shape) -> np.ndarray:
        number = int(self._axes.planes[place[0]])
        page = self._pages[0 if self._layout.contiguous else number]
        first = self._pages[0]
        where = f"{self._uri}: page {number}"
        if (page.shape, page.dtype, page.axes) != (first.shape, first.dtype, first.axes):
            raise ItemError("shape", f"{page.shape} {page.dtype} instead of {first.shape} {first.dtype}", where=where,
                            todo="write a stack of pages of one shape and type")
        if self._layout.contiguous:
            plane = self._raw(page, page.dataoffsets[0] + number * page.nbytes, where)
        else:
            check_page(page, self._data, where, LIMITS)
            plane = self._decoded(page, where)
        if page.axes == "YXS":
            plane = plane[..., self._axes.sample]
        elif page.axes == "SYX":
            plane = plane[self._axes.sample]
        return plane[None]

    def _raw(self, page: tifffile.TiffPage, offset: int, where: str) -> np.ndarray:
        """A plane that is stored as it is."""
        if page.compression != 1:
            raise ItemError("truncated", "the file holds the first plane only", where=where)
        data = os.pread(self._file.fileno(), page.nbytes, offset)
        if len(data) != page.nbytes:
            raise ItemError("truncated", "the file ends before this plane", where=where, todo="copy it again")
        return np.frombuffer(data, page.dtype.newbyteorder(page.parent.byteorder)).reshape(page.shape)

    def _decoded(self, page: tifffile.TiffPage, where: str) -> np.ndarray:
        try:
            return page.asarray(maxworkers=1)
        except MemoryError as error:
            raise ItemError("too_large", "decoding asked for more memory than there is", where=where) from error
        except Exception as error:  # as in images.decode_image
            raise ItemError("decode", f"the page cannot be decoded: {type(error).__name__}: {error}"[:300], where=where) from error

    def close(self) -> None:
        self.opened.close()
