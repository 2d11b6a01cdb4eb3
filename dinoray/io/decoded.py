"""What a decoded image is, and the limits that its header must keep before a pixel is decoded.

Every decoder (tiff.py, raster.py) ends in a `DecodedImage` or in an `ItemError`; nothing else gets out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dinoray.errors import ItemError
from dinoray.io.items import storable


@dataclass(frozen=True)
class Limits:
    """What one image may declare: a file of a few KB can declare a plane of 4 G pixels.

    They are compared with the header, so that a decompression bomb costs no memory.
    """

    max_pixels: int = 2**28
    """Y * X of a plane (268 M; a plane of 16384 x 16384)."""
    max_channels: int = 64
    """Channels of an image, and samples of a page."""
    max_pages: int = 4096
    """Pages (IFDs) of a TIFF, of whatever use they are."""
    max_bytes: int = 4 * 2**30
    """Decoded bytes of an item: Y * X * C * bytes of a pixel, before a projection of Z."""
    max_file_bytes: int = 4 * 2**30
    """Bytes of a file as stored."""


@dataclass(frozen=True)
class DecodedImage:
    """One image in the file's own numbers: nothing is scaled, inverted, or turned.

    EXIF and TIFF orientation tags are not applied (masks and coordinates made by other bioimage tools
    do not apply them), and a "min is white" TIFF is not inverted (as in tifffile and skimage).
    """

    pixels: np.ndarray
    """image_CYX, C-contiguous, native byte order, in the file's own dtype (bool becomes uint8 0/255)."""
    channel_names: tuple[str, ...] | None = None
    """From OME-XML or ImageJ labels (one for each channel), or the item's; None where nobody says."""
    pixel_size_um: float | None = None
    """In-plane size of a pixel in µm, from OME-XML or ImageJ metadata only: the resolution tags of other
    files are print resolutions (72 dpi) more often than sizes. None when X and Y differ by over 1 %."""
    is_rgb8: bool = False
    """Three 8-bit channels that are one colour image (alpha was dropped)."""
    is_stretched: bool = False
    """Fewer than 8 bits per value in the file, decoded to 0..255: good for looking, wrong for labels."""


def check_limits(
    uri: str, limits: Limits, *, height: int, width: int, planes: int = 1, samples: int = 1, itemsize: int = 1
) -> None:
    """Compare declared sizes with the limits: Y, X, planes and samples per plane, bytes of a sample.

    Raises ItemError `too_large`, or `decode` when a side is not positive.
    """
    if height < 1 or width < 1 or samples < 1 or planes < 1:
        raise ItemError("decode", f"an image of {height} x {width} pixels with {planes * samples} channels",
                        where=uri)
    num_bytes = height * width * planes * samples * itemsize
    if height * width > limits.max_pixels:
        what = f"{height} x {width} pixels; the limit is {limits.max_pixels:,} (--max-pixels)"
    elif samples > limits.max_channels:
        what = f"{samples} channels; the limit is {limits.max_channels}"
    elif num_bytes > limits.max_bytes:
        what = f"{num_bytes:,} bytes decoded; the limit is {limits.max_bytes:,} (--max-file-bytes)"
    else:
        return
    raise ItemError("too_large", f"the header declares {what}", where=uri)


def finish(
    pixels: np.ndarray,
    uri: str,
    *,
    channel_names: tuple[str, ...] | None = None,
    pixel_size_um: float | None = None,
    is_rgb8: bool = False,
) -> DecodedImage:
    """A DecodedImage of pixels_CYX: checks the dtype, makes it native and contiguous.

    Raises ItemError `unsupported` for complex and other dtypes.
    """
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * np.uint8(255)  # as in a PNG of 1 bit
    if pixels.dtype.kind not in "uif" or pixels.dtype.itemsize > 8:
        raise ItemError("unsupported", f"pixels of type {pixels.dtype} are not intensities", where=uri)
    pixels = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))
    if channel_names is not None and len(channel_names) != len(pixels):
        channel_names = None
    channel_names = channel_names and tuple(storable(name) for name in channel_names)
    return DecodedImage(pixels, channel_names, pixel_size_um, is_rgb8 and pixels.dtype == np.uint8)
