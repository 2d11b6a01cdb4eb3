"""The sides that a local PNG or TIFF declares: a few hundred bytes read, no pixel decoded."""

from __future__ import annotations

import struct

import tifffile

from dinoray.io.items import FileRef
from dinoray.io.stores import is_local, local_path

_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def declared_sides(file: FileRef) -> tuple[int, int] | None:
    """(Y, X) of a local PNG, or of the first page of a local TIFF; None where that is not cheap to know (remote files,
    other formats) and for files that cannot be read, whose reader says why.
    """
    if not is_local(file.uri) or file.size <= 0:
        return None
    path = local_path(file.uri)
    with open(path, "rb") as stream:
        head = stream.read(24)
    if head.startswith(_PNG) and len(head) == 24:
        width, height = struct.unpack(">II", head[16:])
        return height, width
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            return int(page.imagelength), int(page.imagewidth)
    except (tifffile.TiffFileError, ValueError, KeyError, IndexError, TypeError, struct.error):
        return None  # damaged: reading it tells more
