"""What must hold for a TIFF before tifffile may decode it: bounds, sizes, and no missing strips.

tifffile skips tags whose values lie behind the end of the file and fills missing strips with zeros: a
truncated file would give a half-black image.
"""

from __future__ import annotations

import math
import struct

from dinoray.errors import ItemError
from dinoray.io.decoded import Limits, check_limits
from dinoray.io.raster import jpeg_size

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
               16: 8, 17: 8, 18: 8}
_MAX_TAGS = 4096
_MAX_ALL_TAGS = 2**18
"""Tags of all directories together: directories may overlap, so that a small file declares millions."""
_MAX_NUMBERS = 2**20
"""Numbers in a tag (they become Python objects of 36 bytes); a plane of 16384 x 16384 in tiles of 16 has as many."""
_JPEG = {7, 33007}
_JPEG2000 = {33003, 33004, 33005, 34712}
_CODECS = {1, 5, 8, 32946, 32773, 34925, 50000} | _JPEG | _JPEG2000
"""Compressions read: those whose output is bounded by the declared size, or whose header is checked here."""


def count_pages(data: bytes, uri: str, limits: Limits) -> int:
    """Walk the chain of directories; the number of pages.

    Raises ItemError `truncated` when a directory or the value of a tag lies behind the end of the file,
    `too_large` for more than `limits.max_pages`, or tags that are too many or too long together, `decode`
    for a loop or thousands of tags in one directory.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    head, count_format, entry, pointer = (8, "Q", 20, "Q") if big else (4, "H", 12, "I")
    pointer_bytes, count_bytes = struct.calcsize(pointer), struct.calcsize(count_format)
    if len(data) < head + pointer_bytes:
        raise ItemError("truncated", "the TIFF ends within its header", where=uri)
    offset = struct.unpack_from(order + pointer, data, head)[0]
    seen: set[int] = set()
    all_tags = all_bytes = 0
    while offset:
        if offset in seen:
            raise ItemError("decode", "the directories of the TIFF form a loop", where=uri)
        if len(seen) >= limits.max_pages:
            raise ItemError("too_large", f"more than {limits.max_pages} pages", where=uri,
                            todo="write one image per file")
        seen.add(offset)
        if offset + count_bytes > len(data):
            raise ItemError("truncated", f"the TIFF ends before the directory of page {len(seen)}", where=uri)
        tags = struct.unpack_from(order + count_format, data, offset)[0]
        if tags > _MAX_TAGS:
            raise ItemError("decode", f"a directory of {tags} tags", where=uri)
        all_tags += tags
        if all_tags > _MAX_ALL_TAGS:
            raise ItemError("too_large", f"over {_MAX_ALL_TAGS:,} tags", where=uri)
        end = offset + count_bytes + tags * entry
        if end > len(data):
            raise ItemError("truncated", f"the TIFF ends within the directory of page {len(seen)}", where=uri)
        for at in range(offset + count_bytes, end, entry):
            code, kind, count = struct.unpack_from(order + "HH" + pointer, data, at)
            size = _TYPE_BYTES.get(kind, 0) * count
            all_bytes += size
            if count > _MAX_NUMBERS and _TYPE_BYTES.get(kind, 0) > 1 or all_bytes > 2 * len(data) + 2**24:
                raise ItemError("too_large", f"a tag of {count:,} values in a file of {len(data):,} bytes", where=uri)
            if size > pointer_bytes:
                value = struct.unpack_from(order + pointer, data, at + entry - pointer_bytes)[0]
                if value + size > len(data):
                    raise ItemError("truncated", f"the TIFF ends before the value of tag {code}", where=uri)
        # some writers leave out the last pointer
        offset = struct.unpack_from(order + pointer, data, end)[0] if end + pointer_bytes <= len(data) else 0
    if not seen:
        raise ItemError("decode", "the TIFF has no page", where=uri)
    return len(seen)


def check_page(page, data: bytes, uri: str, limits: Limits) -> None:
    """Check one page (tifffile.TiffPage): type, codec, declared and tile sizes, and every strip or tile.

    Raises ItemError `unsupported`, `too_large`, `truncated` (strips that are missing, or behind the end).
    """
    if page.dtype is None:
        raise ItemError("unsupported", f"a TIFF of {page.bitspersample} bits with sample format "
                        f"{page.sampleformat}", where=uri)
    if page.compression not in _CODECS:
        name = getattr(page.compression, "name", page.compression)
        raise ItemError("unsupported", f"a TIFF with {name} compression", where=uri,
                        todo="write it with LZW, deflate, zstd, JPEG or JPEG 2000 compression")
    check_limits(uri, limits, height=page.imagelength, width=page.imagewidth, planes=page.imagedepth,
                 samples=page.samplesperpixel, itemsize=page.dtype.itemsize)
    if page.is_tiled:
        height, width, depth = page.tilelength, page.tilewidth, page.tiledepth
        if min(height, width, depth) < 1:
            raise ItemError("decode", f"tiles of {height} x {width} pixels", where=uri)
        if height * width * depth > max(4 * page.imagelength * page.imagewidth, 2**22):
            raise ItemError("too_large", f"tiles of {depth} x {height} x {width} pixels in an image of "
                            f"{page.imagelength} x {page.imagewidth}", where=uri)
        across = math.ceil(page.imagelength / height) * math.ceil(page.imagewidth / width)
        expected = across * math.ceil(page.imagedepth / depth)
    else:
        height, width = page.rowsperstrip, page.imagewidth
        if height < 1:
            raise ItemError("decode", "strips of 0 rows", where=uri)
        expected = math.ceil(page.imagelength / height) * page.imagedepth
    expected *= page.samplesperpixel if page.planarconfig == 2 else 1
    offsets, counts = page.dataoffsets, page.databytecounts
    missing = max(0, expected - min(len(offsets), len(counts)))
    missing += sum(1 for o, n in zip(offsets, counts, strict=False) if o == 0 or n == 0)
    if missing:
        raise ItemError("truncated", f"{missing} of {expected} strips or tiles were never written", where=uri)
    for offset, count in zip(offsets, counts, strict=False):
        if offset + count > len(data):
            raise ItemError("truncated", f"the file ends {offset + count - len(data):,} bytes before the "
                            "end of its pixels", where=uri)
    if page.is_contiguous and offsets[0] + page.nbytes > len(data):
        raise ItemError("truncated", f"the file holds {len(data):,} bytes, its pixels alone {page.nbytes:,}",
                        where=uri)
    if page.compression in _JPEG | _JPEG2000:
        for offset, count in zip(offsets, counts, strict=False):
            _check_stream(page, memoryview(data)[offset:offset + count], height, width, uri)


def _check_stream(page, stream: memoryview, height: int, width: int, uri: str) -> None:
    """A JPEG or JPEG 2000 tile declares its size once more; libjpeg only warns when it is cut short."""
    if page.compression in _JPEG:
        if b"\xff\xd9" not in bytes(stream[-64:]):
            raise ItemError("truncated", "a JPEG tile is cut short", where=uri)
        found_height, found_width, _ = jpeg_size(stream, uri)
    else:
        at = bytes(stream[:4096]).find(b"\xff\x4f\xff\x51")
        if at < 0 or at + 24 > len(stream):
            raise ItemError("decode", "a JPEG 2000 tile has no header", where=uri)
        right, bottom, left, top = struct.unpack_from(">IIII", stream, at + 8)
        found_height, found_width = bottom - top, right - left
    if found_height > height or found_width > width:
        raise ItemError("too_large", f"a tile declares {found_height} x {found_width} pixels instead of "
                        f"{height} x {width}", where=uri)
