"""PNG, JPEG, BMP, GIF and WebP bytes -> image_CYX. Headers are read here, pixels by libpng and Pillow.

PNG goes through imagecodecs because Pillow cuts 16-bit colour down to 8. Pillow's plug-ins are used
directly, because `Image.open` has a pixel limit of its own that is global to the process.
"""

from __future__ import annotations

import io
import struct
from dataclasses import replace

import imagecodecs
import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, WebPImagePlugin

from dinoray.errors import ItemError
from dinoray.io.decoded import DecodedImage, Limits, check_limits, finish

_PNG_SAMPLES = {0: 1, 2: 3, 3: 4, 4: 2, 6: 4}  # by colour type; a palette with tRNS decodes to RGBA
_PLUGINS = {
    "bmp": BmpImagePlugin.BmpImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "jpeg": JpegImagePlugin.JpegImageFile,
}
_JPEG_SOF = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: what libjpeg decodes
_MAX_SCANS = 200
"""Progressive JPEGs have some ten; a scan of 10 bytes costs as much time as a whole image."""
_JPEG_OTHER_SOF = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # lossless, arithmetic, ...


def decode_png(data: bytes, uri: str, limits: Limits) -> DecodedImage:
    """PNG of 1..16 bits, grey, colour or palette (-> RGB), alpha dropped. Bits below 8 become 0..255.

    Raises ItemError `truncated`, `too_large`, `stack` (animated), `decode` (checksum, contents).
    """
    height, width, bits, colour = _check_png(data, uri)
    check_limits(uri, limits, height=height, width=width, samples=_PNG_SAMPLES[colour],
                 itemsize=2 if bits == 16 else 1)
    pixels = imagecodecs.png_decode(data)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] in (2, 4):  # LA, RGBA, and the tRNS chunk's transparent colour
        pixels = pixels[:, :, :-1]
    image = finish(pixels.transpose(2, 0, 1), uri, is_rgb8=pixels.shape[2] == 3)
    return replace(image, is_stretched=bits < 8 and colour == 0)


def _check_png(data: bytes, uri: str) -> tuple[int, int, int, int]:
    """Height, width, bits, colour type.

    Walks all chunks, because the decoder reads no further when it has the last row, and so does not
    notice what is cut off behind it. Checksums are libpng's work.
    """
    at, header, has_pixels = 8, None, False
    while True:
        if at + 12 > len(data):
            raise ItemError("truncated", "the PNG ends before its last chunk", where=uri)
        size, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + size > len(data):
            raise ItemError("truncated", f"the PNG ends within a {kind!r} chunk", where=uri)
        if header is None and kind != b"IHDR" or kind == b"IHDR" and size != 13:
            raise ItemError("decode", "the PNG does not begin with its header", where=uri)
        if kind == b"IHDR":
            header = struct.unpack_from(">IIBB", data, at + 8)
        if kind == b"acTL" and struct.unpack_from(">I", data, at + 8)[0] > 1:
            raise ItemError("stack", "an animated PNG holds several frames", where=uri,
                            todo="export the frames as single images")
        has_pixels |= kind == b"IDAT"
        at += 12 + size
        if kind == b"IEND":
            break
    width, height, bits, colour = header
    if colour not in _PNG_SAMPLES or not has_pixels:
        raise ItemError("decode", f"the PNG has no pixels or an unknown colour type {colour}", where=uri)
    return height, width, bits, colour


def jpeg_size(data: bytes | memoryview, uri: str) -> tuple[int, int, int]:
    """Y, X and components that a JPEG stream declares in its frame header.

    Raises ItemError `truncated` when there is none, `unsupported` for lossless and arithmetic coding,
    `too_large` for hundreds of scans.
    """
    scans = bytes(data).count(b"\xff\xda")  # in pixel data 0xFF is followed by 0
    if scans > _MAX_SCANS:
        raise ItemError("too_large", f"a JPEG of {scans:,} scans, each of which is decoded over the whole image", where=uri)
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise ItemError("decode", "the JPEG's markers are damaged", where=uri)
        marker = data[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # fill byte, or no length follows
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _JPEG_SOF and at + 10 <= len(data):
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            if precision != 8:
                raise ItemError("unsupported", f"a JPEG of {precision} bits", where=uri)
            return height, width, components
        if marker in _JPEG_OTHER_SOF:
            raise ItemError("unsupported", f"a JPEG with frame type 0x{marker:02X}", where=uri)
        if marker in (0xD9, 0xDA):
            raise ItemError("decode", "the JPEG has no frame header before its data", where=uri)
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise ItemError("truncated", "the JPEG ends before its frame header", where=uri)


def decode_jpeg(data: bytes, uri: str, limits: Limits) -> DecodedImage:
    """JPEG: grey -> 1 channel, YCbCr, RGB and CMYK -> RGB. EXIF orientation is not applied."""
    height, width, components = jpeg_size(data, uri)
    check_limits(uri, limits, height=height, width=width, samples=components)
    return _decode_pillow(data, uri, limits, "jpeg")


def decode_other(data: bytes, uri: str, limits: Limits, kind: str) -> DecodedImage:
    """BMP, GIF or WebP (`kind`) of one frame. Raises ItemError `stack` for an animation."""
    return _decode_pillow(data, uri, limits, kind)


def _decode_pillow(data: bytes, uri: str, limits: Limits, kind: str) -> DecodedImage:
    with _PLUGINS[kind](io.BytesIO(data)) as image:
        if kind != "jpeg":
            check_limits(uri, limits, height=image.height, width=image.width, samples=4)
        if kind != "jpeg" and getattr(image, "is_animated", False):  # n_frames would walk through millions of them
            raise ItemError("stack", f"the {kind.upper()} holds several frames", where=uri,
                            todo="export the frames as single images")
        try:
            image.load()
        except (OSError, SyntaxError, EOFError) as error:
            reason = "truncated" if "truncated" in str(error) or isinstance(error, EOFError) else "decode"
            raise ItemError(reason, f"the {kind.upper()} cannot be decoded: {error}", where=uri) from error
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        pixels = np.asarray(image)
    if pixels.ndim == 2:
        return finish(pixels[None], uri)
    return finish(pixels.transpose(2, 0, 1), uri, is_rgb8=True)
