"""Small files that ask for much: each is decoded in a child process with little memory (test_bombs.py)."""

from __future__ import annotations

import gzip
import io
import json
import re
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from dinoray.errors import ItemError
from dinoray.io.images import decode_image, load_item
from dinoray.io.sources import list_items
from tests.omezarr import image_attributes, write_group

MEMORY_BYTES = 3 * 2**30
"""Address space of the child; the interpreter with its libraries takes a good part of it."""
SECONDS = 20.0
"""For one bomb, on a slow machine."""


def png(width: int, height: int, extra: bytes = b"", rows: int = 1) -> bytes:
    """A gray PNG that declares a size and holds `rows` of zeros; `extra` chunks stand before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((width + 1) * rows), 9))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """One PNG chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def inflating_text() -> bytes:
    """A valid 8 x 8 PNG whose compressed text inflates to 1 GB."""
    packer = zlib.compressobj(9)
    block = bytes(2**24)
    packed = b"".join(packer.compress(block) for _ in range(64)) + packer.flush()
    return png(8, 8, chunk(b"zTXt", b"Comment\0\0" + packed) + chunk(b"iCCP", b"p\0\0" + packed), rows=8)


def tiff_tags(*tags: tuple[int, int, int, int], tail: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF of one directory with (code, type, count, value) tags."""
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", 8) + body + tail


def overlapping_directories() -> bytes:
    """Thousands of directories that share the bytes of their thousands of tags."""
    number, tags = 4000, 4000
    size = 8 + 2 * number + 12 * tags + 100
    data = bytearray(size)
    data[:8] = b"II*\0" + struct.pack("<I", 8)
    for i in range(number):
        struct.pack_into("<H", data, 8 + 2 * i, tags)
        end = 8 + 2 * i + 2 + 12 * tags
        if end + 4 <= size:
            struct.pack_into("<I", data, end, 8 + 2 * (i + 1))
    return bytes(data)


def many_strips() -> bytes:
    """A TIFF of 60 MB whose strip offsets would be 15 million Python integers."""
    count = 15_000_000
    return tiff_tags((256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (273, 4, count, 200), (279, 4, count, 200),
                     tail=bytes(200 + 4 * count))


def ome(xml: str) -> bytes:
    """A small TIFF with this description."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.arange(64, dtype=np.uint8).reshape(8, 8), description=xml, metadata=None)
    return buffer.getvalue()


def laughs(root: str) -> str:
    """XML entities that expand to 3 GB."""
    lines = ['<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a0 "lol">']
    lines += [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10)]
    return "".join(lines) + f"]><{root}>&a9;</{root}>"


def scans() -> bytes:
    """A JPEG of 4096 x 4096 pixels with 100,000 scans."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4096, 4096), np.uint8)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * 100_000 + b"\xff\xd9"


def frames() -> bytes:
    """A GIF of a million frames."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(buffer, "GIF")
    data = buffer.getvalue()
    at = data.index(b",\0\0\0\0\x08")
    return data[:at] + data[at:-1] * 1_000_000 + b";"


def image(data: Callable[[], bytes]) -> Callable[[], None]:
    """A bomb that is the bytes of one file."""
    return lambda: (decode_image(data(), "bomb"), None)[1]


def rle_zstd(nbytes: int) -> bytes:
    """A zstd frame without a content size: blocks of 128 KB in 4 bytes each."""
    blocks = nbytes // 2**17
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(
        struct.pack("<I", (i == blocks - 1) | 1 << 1 | 2**17 << 3)[:3] + b"\0" for i in range(blocks))


def stored(**changes: object) -> Callable[[], None]:
    """A bomb that is an OME-Zarr of 64 x 64 pixels: changed metadata of its array, and the bytes of its chunk."""
    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            top = write_group(Path(folder) / "a.zarr", image_attributes("yx"))
            array = {"zarr_format": 2, "shape": [64, 64], "chunks": [64, 64], "dtype": "<u2", "compressor": None,
                     "fill_value": 0, "order": "C", "filters": None, "dimension_separator": "/"}
            (top / "0" / "0").mkdir(parents=True)
            (top / "0" / ".zarray").write_text(json.dumps(array | {k: v for k, v in changes.items() if k != "data"}))
            (top / "0" / "0" / "0").write_bytes(changes.get("data", bytes(8192)))  # type: ignore[arg-type]
            for item in list_items([str(top)]).items:
                load_item(item)
    return run


def document(text: str, name: str = ".zattrs") -> Callable[[], None]:
    """A bomb that is a metadata document."""
    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "a.zarr").mkdir()
            (Path(folder) / "a.zarr" / name).write_text(text)
            for item in list_items([folder]).items:
                load_item(item)
    return run


def blosc(nbytes: int) -> bytes:
    """A blosc header that declares `nbytes`."""
    return struct.pack("<BBBBIII", 2, 1, 1, 2, nbytes, nbytes, 1024) + bytes(1008)


BOMBS: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "png declares 3.6 G pixels": (image(lambda: png(60_000, 60_000)), ("too_large",)),
    "png of zeros, 300 M pixels": (image(lambda: png(30_000, 10_000, rows=10_000)), ("too_large",)),
    "png text of 1 GB": (image(inflating_text), ("decode", "too_large", "")),
    "tiff directories overlap": (image(overlapping_directories), ("too_large", "truncated")),
    "tiff of 15 M strips": (image(many_strips), ("too_large",)),
    "tiff with entities": (image(lambda: ome(laughs("OME"))), ("unsupported",)),
    "tiff with entities, scn": (image(lambda: ome(laughs("scn"))), ("unsupported", "decode")),
    "ome of 10^9 planes": (image(lambda: ome(
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels '
        'DimensionOrder="XYZCT" Type="uint8" SizeX="8" SizeY="8" SizeZ="1000000000" SizeC="1000" SizeT="1000">'
        '<TiffData/></Pixels></Image></OME>')), ("truncated", "decode")),
    "jpeg of 100,000 scans": (image(scans), ("too_large",)),
    "gif of a million frames": (image(frames), ("stack",)),
    "zarr declares 2^78 pixels": (stored(shape=[2**39, 2**39]), ("too_large",)),
    "zarr chunk of 2^40 pixels": (stored(chunks=[2**20, 2**20]), ("too_large",)),
    "zarr chunk of 2^60 pixels": (stored(shape=[2**30, 2**30], chunks=[2**30, 2**30]), ("too_large",)),
    "zarr of 2^40 chunks": (stored(shape=[2**14, 2**14], chunks=[1, 1]), ("too_large",)),
    "blosc declares 2 GB": (stored(compressor={"id": "blosc"}, data=blosc(2**31 - 1)), ("too_large", "truncated")),
    "zstd declares 2^60": (stored(compressor={"id": "zstd"}, data=b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**60) + bytes(99)),
                           ("too_large",)),
    "zstd without a size, 8 GB": (stored(compressor={"id": "zstd"}, data=rle_zstd(2**33)), ("too_large",)),
    "gzip of 1 GB": (stored(compressor={"id": "gzip"}, data=gzip.compress(bytes(2**24), 9) * 64), ("too_large",)),
    "zlib of 1 GB": (stored(compressor={"id": "zlib"}, data=zlib.compress(bytes(2**28), 9)), ("too_large",)),
    "lz4 declares 4 GB": (stored(compressor={"id": "lz4"}, data=b"\xff" * 4 + bytes(99)), ("too_large",)),
    "pickled objects": (stored(dtype="|O", filters=[{"id": "pickle"}]), ("unsupported",)),
    "filter by name": (stored(filters=[{"id": "pickle", "protocol": 5}]), ("unsupported",)),
    "codec by name": (stored(compressor={"id": "zfpy"}), ("unsupported",)),
    "json 100,000 deep": (document("[" * 100_000), ("decode",)),
    "json object 100,000 deep": (document('{"multiscales":' * 100_000), ("decode",)),
    "json of 20 MB": (document(" " * 20_000_000), ("too_large",)),
    "json number of 10 MB": (document('{"multiscales": [' + "9" * 10_000_000 + "]}"), ("decode",)),
    "plate of 10^6 wells": (document(json.dumps({"plate": {"wells": [{"path": "A/1"}] * 200_000}})), ("decode",)),
}


def main() -> None:
    """Set the limit, then decode every bomb; one line of JSON each: name, reason, seconds, peak bytes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for name, (run, _) in BOMBS.items():
        began, reason = time.monotonic(), ""
        try:
            run()
        except ItemError as error:
            reason = error.reason
        # not getrusage: across fork and exec it remembers the parent's peak
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        print(json.dumps([name, reason, time.monotonic() - began, peak]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
