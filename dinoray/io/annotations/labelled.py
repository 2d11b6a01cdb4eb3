"""LabelledImage: one image and the masks of its objects, by reference; small, and it travels between processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Protocol

import numpy as np

from dinoray.errors import BadRequest, ItemError
from dinoray.io.decoded import DecodedImage, Limits
from dinoray.io.images import load_item
from dinoray.io.items import FileRef, Item
from dinoray.io.label_images import check_sides


class Truth(Protocol):
    """Where the objects of one image are written: a label image, one mask per object, outlines in a JSON."""

    @property
    def files(self) -> tuple[FileRef, ...]:
        """The files that it is read from."""

    def read(self, limits: Limits) -> np.ndarray:
        """Labels [Y, X] int32, 0 for background. Raises ItemError, TransientError, SystemicError."""


@dataclass(frozen=True)
class LabelledImage:
    """One image of a labelled source, as the listing saw it."""

    image_id: str
    """Path below the source's root without extension (DSB: the folder's name), unique in its source."""
    files: tuple[FileRef, ...]
    """The files of the image, then those of its labels: what `digest` is over."""
    source: int
    """Number of the source in the job."""
    group: str
    """What intensity statistics may be shared over: plate or folder; the sequence (CTC); the image itself (DSB)."""
    pixel_size_um: float | None
    """What the source says; None: ask the image that `read` gives."""
    item: Item = field(repr=False)
    """The image alone, for what reads Items."""
    truth: Truth = field(repr=False)
    channel: str | None = None
    """Name or 0-based number of the one channel that `read` gives; None: all."""
    limits: Limits = field(default=Limits(), repr=False)

    def read(self) -> tuple[DecodedImage, np.ndarray]:
        """(the image, pixels_CYX in the file's own dtype; labels [Y, X] int32, C-contiguous, 0 for background).

        The ids are those of the label image (they may have gaps), or 1, 2, ... in the order of the masks or outlines.
        Raises ItemError: `bad_labels` for a label image that is none (fractions, colours, negative values, a binary mask) and
        outlines that cannot be drawn, `shape` when the sides differ, `channel_count` when the channel is not there, and what
        `load_item` has for unreadable files (`missing`, `changed`, `truncated`, `stack`, ...); TransientError, SystemicError.
        """
        image = load_item(self.item, self.limits).image
        if self.channel is not None:
            image = one_channel(image, self.channel, self.item.files[0].uri)
        if self.pixel_size_um is not None:
            image = replace(image, pixel_size_um=self.pixel_size_um)
        labels = self.read_labels()
        check_sides(labels.shape, image.pixels.shape[1:], self.truth.files[0].uri)
        return image, labels

    def read_labels(self) -> np.ndarray:
        """The labels alone, as `read` gives them. Raises the same, but `shape` only when the masks of one image differ."""
        return np.ascontiguousarray(self.truth.read(self.limits))


def one_channel(image: DecodedImage, channel: str, uri: str) -> DecodedImage:
    """The image with the one channel of this name or 0-based number; a name goes before a number.

    Raises ItemError `channel_count` when there is none.
    """
    names = image.channel_names or ()
    if channel in names:
        at = names.index(channel)
    elif channel.isdecimal() and int(channel) < len(image.pixels):
        at = int(channel)
    else:
        known = f"named {', '.join(names)}" if names else "without names"
        raise ItemError("channel_count", f"no channel {channel!r} among {len(image.pixels)} {known}", where=uri,
                        todo="give its 0-based number or its name")
    return DecodedImage(image.pixels[at:at + 1], names[at:at + 1] or None, image.pixel_size_um)


def digest(images: Iterable[LabelledImage]) -> str:
    """32 hex digits over the ids, channels and files (uri, size, version) of labelled images, in their order."""
    hasher = blake2b(digest_size=16)
    for image in images:
        files = [(file.uri, file.size, file.version) for file in image.files]
        hasher.update(repr((image.source, image.image_id, image.channel, image.pixel_size_um, files)).encode("utf-8", "replace"))
    return hasher.hexdigest()


def sample_weights(counts: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """Cumulative shares [len(counts)] float64 of the sources: a number u in [0, 1) belongs to source
    `np.searchsorted(shares, u, side="right")`, whatever the number of its images; one without images gets no share.

    Raises BadRequest when no source has images, and for weights that are not positive.
    """
    if len(counts) != len(weights) or not all(math.isfinite(w) and w > 0 for w in weights):
        raise BadRequest(f"weights {list(weights)} for {len(counts)} sources", where="weight", todo="one positive number each")
    shares = np.array([weight if count else 0.0 for count, weight in zip(counts, weights, strict=True)], np.float64)
    if not shares.any():
        raise BadRequest("no source has an image", where="images", todo="check the paths and ids")
    cumulative = np.cumsum(shares / shares.sum())
    cumulative[np.flatnonzero(shares)[-1]:] = 1.0  # rounding must leave no gap below 1
    return cumulative
