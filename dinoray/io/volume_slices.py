"""A folder or glob of images -> a volume whose slices are the files, in the natural order of their names.

The shape and type are those of a slice that is decoded when the volume is opened; a slice that differs is an ItemError when
it is read. What is no image is passed over and said; a number missing from the sequence too.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections import Counter

import numpy as np

from dinoray.errors import BadRequest, ItemError
from dinoray.io.decoded import DecodedImage, Limits
from dinoray.io.grouping import natural
from dinoray.io.images import decode_image
from dinoray.io.items import FileRef
from dinoray.io.reading import read_file
from dinoray.io.stores import is_local
from dinoray.io.volume_grid import Shape
from dinoray.io.volume_levels import unstated
from dinoray.io.volume_objects import digest_ref
from dinoray.io.volume_source import MAX_PIECE_BYTES, About, Source, VolumeRequest, check_array, check_piece, pick
from dinoray.io.walk import LocalTree, Matcher, RemoteTree, count, has_magic, is_image_name, walk
from dinoray.wording import plural

logger = logging.getLogger(__name__)
LIMITS = Limits(max_pixels=2**31, max_bytes=MAX_PIECE_BYTES, max_file_bytes=MAX_PIECE_BYTES)
_TRIED = 5
"""Slices that are tried when the first ones cannot be decoded."""


def open_slices(uri: str, request: VolumeRequest) -> Source:
    """The Source of a folder or glob of slices. Raises BadRequest, errors of storage."""
    if request.dataset is not None:
        raise BadRequest("a folder of slices holds no datasets", where=uri, todo="leave out --dataset")
    files, ignored = _listed(uri)
    notes = []
    if ignored:
        notes.append("passed over: " + ", ".join(f"{n} {kind}" for kind, n in sorted(ignored.items())))
    if not files:
        raise BadRequest(f"no image{'; ' + notes[0] if notes else ''}", where=uri,
                         todo="name a folder of slices (.png, .tif, .jpg), or a Zarr, N5, HDF5 or TIFF volume")
    kinds = Counter(_suffix(file) for file in files)
    if len(kinds) > 1:
        raise BadRequest("several kinds of images: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()), where=uri,
                         todo=f"choose with a glob, such as '{posixpath.dirname(files[0].uri)}/*{kinds.most_common(1)[0][0]}'")
    if len(files) < 2:
        raise BadRequest("one image, not a volume", where=uri, todo="images are read by `dinoray extract images`")
    notes += _gaps([posixpath.basename(file.uri) for file in files])
    _request_time(request, uri)
    first, shown = _first(files, notes)
    channel = pick("channel", len(first.pixels), first.channel_names, request.channel, shown.uri)
    shape = (len(files), *first.pixels.shape[1:])
    check_array(shape, first.pixels.dtype, shown.uri, mask=request.mask)
    check_piece(first.pixels.shape, first.pixels.dtype, shown.uri)
    level, more = unstated("0", None, None, request.raw_voxel_nm, "slices state no voxel size", uri)
    lines = (f"{f.uri.removeprefix(uri)}\0{f.size}\0{f.version}\n".encode("utf-8", "surrogateescape") for f in files)
    ref = digest_ref(uri, sum(max(0, f.size) for f in files), lines)
    about = About(shape, first.pixels.dtype, (1, *shape[1:]), level.voxel_size_nm, level.translation_nm, ref,  # type: ignore[arg-type]
                  (*more, *notes), level.name)
    return SlicesSource(about, files, channel, len(first.pixels))


def _request_time(request: VolumeRequest, uri: str) -> None:
    pick("time", None, None, request.time, uri)


def _suffix(file: FileRef) -> str:
    suffix = os.path.splitext(file.uri)[1].lower()
    return {".tiff": ".tif", ".jpeg": ".jpg"}.get(suffix, suffix)


def _listed(uri: str) -> tuple[list[FileRef], dict[str, int]]:
    """The images of a folder (not of the folders in it) or glob in natural order, and what was passed over, by kind."""
    tree = LocalTree() if is_local(uri) else RemoteTree(uri)
    path = uri if isinstance(tree, LocalTree) else tree.path.rstrip("/")
    ignored: dict[str, int] = {}
    files: list[FileRef] = []
    if not (has_magic(path) and not (is_local(uri) and os.path.isdir(path))):
        for entry in tree.list(path):
            if entry.is_folder or entry.name.startswith("."):
                count(ignored, "folder" if entry.is_folder else "hidden file")
            elif entry.file is None or not is_image_name(entry.name):
                count(ignored, os.path.splitext(entry.name)[1].lower() or "no extension")
            else:
                files.append(entry.file)
    else:
        parts = path.split("/")
        at = next(i for i, part in enumerate(parts) if has_magic(part))
        base = "/".join(parts[:at]) or ("/" if path.startswith("/") else "")
        for _, entries in walk(tree, base, [Matcher(base, "/".join(parts[at:]))], ignored=ignored):
            files += [entry.file for entry in entries if entry.file]
        ignored = {}  # what a glob leaves out is what it was written for
    return sorted(files, key=lambda file: (natural(file.uri), file.uri)), ignored


def _gaps(names: list[str]) -> list[str]:
    """A line when numbers are missing from the names: of the one group of digits that counts them."""
    groups = [re.findall(r"\d+", name) for name in names]
    if len({len(group) for group in groups}) != 1:
        return []
    columns = [i for i in range(len(groups[0])) if len({int(group[i]) for group in groups}) > 1]
    if len(columns) != 1:
        return []
    numbers = sorted({int(group[columns[0]]) for group in groups})
    step = min(b - a for a, b in zip(numbers, numbers[1:], strict=False))
    missing = [n for a, b in zip(numbers, numbers[1:], strict=False) for n in range(a + step, b, step)][:1001]
    if not missing:
        return []
    total = f"over {len(missing) - 1:,} numbers are" if len(missing) > 1000 else \
        f"{plural(len(missing), 'number')} {'is' if len(missing) == 1 else 'are'}"
    return [f"{total} missing between {numbers[0]} and {numbers[-1]} ({', '.join(map(str, missing[:5]))}"
            f"{', ...' if len(missing) > 5 else ''}): the slices on both sides are taken for neighbours"]


def _first(files: list[FileRef], notes: list[str]) -> tuple[DecodedImage, FileRef]:
    """The first slice that can be decoded. Raises the ItemError of the first when there is none."""
    errors: list[ItemError] = []
    for file in files[:_TRIED]:
        try:
            image = _decoded(file)
        except ItemError as error:
            errors.append(error)
            notes.append(f"not readable: {error}")
            continue
        return image, file
    raise errors[0]


def _decoded(file: FileRef) -> DecodedImage:
    return decode_image(read_file(file, LIMITS), file.uri, LIMITS)


class SlicesSource(Source):
    """One file per slice."""

    def __init__(self, about: About, files: list[FileRef], channel: int, num_channels: int):
        self.about, self._files, self._channel, self._num_channels = about, files, channel, num_channels

    def piece(self, place: Shape) -> np.ndarray:
        file = self._files[place[0]]
        pixels = _decoded(file).pixels
        expected = (self._num_channels, *self.about.shape[1:])
        if pixels.shape != expected or pixels.dtype != self.about.dtype:
            raise ItemError("shape", f"a slice of {' x '.join(map(str, pixels.shape))} (channels, y, x) {pixels.dtype}; the others "
                            f"are {' x '.join(map(str, expected))} {self.about.dtype}", where=file.uri,
                            todo="mend the slice, or leave it out with a glob")
        return pixels[self._channel][None]
