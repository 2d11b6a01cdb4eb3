"""Image bytes -> image_CYX in the file's own dtype; and the files of an Item -> one image.

Formats are told by content, not by extension. Whatever is wrong with the bytes ends in an `ItemError`
with one of these reasons: `empty`, `truncated`, `not_image`, `unsupported`, `too_large`, `stack`,
`decode`; reading adds `missing`, `changed`, `channel_count`, `shape` and the item's own `problem`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from dinoray.errors import DinorayError, ItemError
from dinoray.io import ome_zarr_pixels, raster, tiff
from dinoray.io.decoded import DecodedImage, Limits, check_limits
from dinoray.io.items import FileRef, Item
from dinoray.io.reading import read_file
from dinoray.io.storage_errors import storage_errors
from dinoray.io.stores import filesystem, on_inputs

__all__ = ["DecodedImage", "Limits", "LoadedItem", "decode_image", "load_item", "sniff"]

_SIGNATURES = {
    b"II*\0": "tiff", b"MM\0*": "tiff", b"II+\0": "tiff", b"MM\0+": "tiff",
    b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF87a": "gif", b"GIF89a": "gif", b"BM": "bmp",
}
_LARGE_BYTES = 2**26
_KNOWN = {  # formats that we can name but not read: better than "not an image"
    b"\0\0\0\x0cjP  ": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", b"ZISRAWFILE": "Zeiss CZI",
    b"\xda\xce\xbe\x0a": "Nikon ND2", b"\x70\0\0\0": "Leica LIF", b"\x89HDF\r\n\x1a\n": "HDF5",
    b"%PDF": "PDF", b"v/1\x01": "OpenEXR", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip",
    b"\x93NUMPY": "NumPy", b"8BPS": "Photoshop", b"NRRD0": "NRRD", b"\xff\x0a": "JPEG XL",
}


def sniff(data: bytes, uri: str) -> str:
    """The format by the first bytes: tiff, png, jpeg, gif, bmp, webp.

    Raises ItemError `empty`, `truncated` (shorter than a signature), `unsupported`, `not_image`.
    """
    if not data:
        raise ItemError("empty", "the file holds 0 bytes", where=uri)
    head = bytes(data[:16])
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    for signature, name in _KNOWN.items():
        if head.startswith(signature):
            raise ItemError("unsupported", f"{name} files are not read", where=uri,
                            todo="convert to OME-TIFF or PNG (for instance with bioformats2raw or bfconvert)")
    if head[4:8] == b"ftyp":
        raise ItemError("unsupported", "HEIF, AVIF and video files are not read", where=uri,
                        todo="convert to PNG or JPEG")
    if len(head) < 8 and any(signature.startswith(head) for signature in _SIGNATURES):
        raise ItemError("truncated", f"the file ends after {len(head)} bytes", where=uri)
    raise ItemError("not_image", f"not an image: it begins with {head[:8]!r}", where=uri)


def decode_image(
    data: bytes, uri: str, limits: Limits | None = None, *, z_projection: str = "refuse"
) -> DecodedImage:
    """Decode the bytes of one image file to pixels_CYX in the file's own dtype.

    `uri` is only for messages. `z_projection` says what becomes of a Z axis longer than 1: "refuse",
    "max" (maximum over Z) or "middle" (plane Z // 2); T and other axes are always refused.
    Raises ItemError (reasons in the module's docstring), and nothing else for any bytes.
    """
    limits = limits or Limits()
    if len(data) > limits.max_file_bytes:
        raise ItemError("too_large", f"a file of {len(data):,} bytes; the limit is {limits.max_file_bytes:,}",
                        where=uri)
    kind = sniff(data, uri)
    try:
        if kind == "tiff":
            return tiff.decode_tiff(data, uri, limits, z_projection)
        if kind == "png":
            return raster.decode_png(data, uri, limits)
        if kind == "jpeg":
            return raster.decode_jpeg(data, uri, limits)
        return raster.decode_other(data, uri, limits, kind)
    except DinorayError:
        raise
    except MemoryError as error:
        raise ItemError("too_large", "decoding asked for more memory than there is", where=uri) from error
    except Exception as error:  # the decoders raise a dozen types of their own for damaged files
        raise ItemError("decode", f"the {kind} cannot be decoded: {type(error).__name__}: {error}",
                        where=uri) from error


def declared_pixel_size(data: bytes, uri: str, limits: Limits | None = None) -> float | None:
    """The pixel size in µm that an image file declares, as `decode_image` would give it; no pixel is decoded.

    Raises ItemError as `decode_image` does.
    """
    limits = limits or Limits()
    if sniff(data, uri) != "tiff":
        return None  # the other formats know print resolutions only
    try:
        return tiff.declared_pixel_size(data, uri, limits)
    except DinorayError:
        raise
    except Exception as error:  # as in decode_image
        raise ItemError("decode", f"the TIFF cannot be read: {type(error).__name__}: {error}", where=uri) from error


@dataclass(frozen=True)
class LoadedItem:
    """The image of an item and what it cost: seconds of reading and of decoding, bytes as stored."""

    image: DecodedImage
    read_s: float
    decode_s: float
    num_bytes: int


def load_item(
    item: Item,
    limits: Limits | None = None,
    *,
    num_channels: int | None = None,
    z_projection: str = "refuse",
) -> LoadedItem:
    """Read and decode all files of an item; one file per channel is stacked to image_CYX.

    A bad file fails the whole item (the message names the file). With `num_channels` the image must have
    that many. Raises ItemError for the item, TransientError when storage failed in a way that may pass,
    SystemicError when access is denied.
    """
    limits = limits or Limits()
    if item.problem is not None:
        reason, _, detail = item.problem.partition(": ")
        raise ItemError(reason, detail or f"the listing found {reason}", where=item.item_id)
    if len(item.files) != max(1, len(item.channels)):
        raise ItemError("channel_count", f"{len(item.files)} files for {len(item.channels)} channels",
                        where=item.item_id)
    read_s = decode_s = 0.0
    planes, pixels = [], None
    for index, file in enumerate(item.files):
        began = time.perf_counter()
        if ome_zarr_pixels.is_ome_zarr(file):
            field = ome_zarr_pixels.fetch(file, limits, z_projection)
            read = time.perf_counter()
            image = ome_zarr_pixels.decode(field, z_projection)
            del field
        else:
            _refuse_early(file, limits)
            data = read_file(file, limits)
            read = time.perf_counter()
            image = decode_image(data, file.uri, limits, z_projection=z_projection)
            del data
        if item.channels:
            pixels = _place(image, index, pixels, item, limits)
            planes.append(replace(image, pixels=pixels))  # keeps no second copy of the plane
        read_s += read - began
        decode_s += time.perf_counter() - read
    if item.channels:
        sizes = {plane.pixel_size_um for plane in planes}
        image = DecodedImage(pixels, item.channels, sizes.pop() if len(sizes) == 1 else None, False)
    if num_channels is not None and len(image.pixels) != num_channels:
        raise ItemError("channel_count", f"{len(image.pixels)} channels instead of {num_channels}",
                        where=item.item_id)
    return LoadedItem(image, read_s, decode_s, item.num_bytes)


def _place(image: DecodedImage, index: int, pixels, item: Item, limits: Limits) -> np.ndarray:
    """Put a one-channel image into pixels_CYX at `index`; the first one makes the array."""
    uri = item.files[index].uri
    if len(image.pixels) != 1:
        raise ItemError("channel_count", f"the file of channel {item.channels[index]!r} holds "
                        f"{len(image.pixels)} channels instead of one", where=uri)
    _, height, width = image.pixels.shape
    if pixels is None:
        check_limits(uri, limits, height=height, width=width, planes=len(item.files),
                     itemsize=image.pixels.itemsize)
        pixels = np.empty((len(item.files), height, width), image.pixels.dtype)
    if image.pixels.shape[1:] != pixels.shape[1:] or image.pixels.dtype != pixels.dtype:
        raise ItemError(
            "shape", f"channel {item.channels[index]!r} is {height} x {width} {image.pixels.dtype}, channel "
            f"{item.channels[0]!r} is {pixels.shape[1]} x {pixels.shape[2]} {pixels.dtype}", where=uri)
    pixels[index] = image.pixels[0]
    return pixels


def _refuse_early(file: FileRef, limits: Limits) -> None:
    """Look at the first bytes of a large file before all of it is read: it may be no image at all."""
    if file.version == "missing" or not _LARGE_BYTES < file.size <= limits.max_file_bytes:
        return
    with storage_errors(file.uri):
        path = filesystem(file.uri)[1]
        head = on_inputs(file.uri, lambda fs: fs.cat_file(path, start=0, end=16))
    sniff(head, file.uri)
