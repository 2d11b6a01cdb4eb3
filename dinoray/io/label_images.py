"""What a label image is: one non-negative integer per pixel, 0 for background, a number for each object."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from dinoray.errors import ItemError
from dinoray.io.decoded import DecodedImage

BINARY_PIECES = 4
"""A label image of one object in so many pieces is taken for a mask of all objects."""
_INT32_MAX = np.iinfo(np.int32).max


def label_plane(image: DecodedImage, shape: tuple[int, ...] | None, uri: str) -> np.ndarray:
    """A decoded label image as [Y, X] of non-negative integers, in the file's own dtype.

    shape: the sides that the image has, None where they are not known.
    Raises ItemError `bad_labels` (several channels, floats, negative or huge values), `shape` when its sides are not
    the image's.
    """
    labels = image.pixels
    if len(labels) != 1:
        raise ItemError("bad_labels", f"a label image has one channel, this one {len(labels)}", where=uri,
                        todo="write one integer per pixel: 0 for background, a number for each cell")
    if image.is_stretched:
        raise ItemError("bad_labels", "a PNG of fewer than 8 bits per pixel, whose values were stretched to 0..255", where=uri,
                        todo="write labels with 8 or 16 bits, or as TIFF")
    if labels.dtype.kind not in "ui":
        raise ItemError("bad_labels", f"labels are integers, this file holds {labels.dtype}", where=uri,
                        todo="write them as an integer type, e.g. uint16 or int32")
    if shape is not None:
        check_sides(labels.shape[1:], shape, uri)
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise ItemError("bad_labels", f"the labels reach down to {labels.min()}", where=uri, todo="0 is background, cells above")
    if labels.dtype == np.uint64 and labels.max() > np.iinfo(np.int64).max:
        raise ItemError("bad_labels", f"the labels reach {labels.max()}, which int64 cannot hold", where=uri)
    return labels[0]


def check_sides(labels: tuple[int, ...], image: tuple[int, ...], uri: str) -> None:
    """Raises ItemError `shape` when labels [Y, X] and image [Y, X] have different sides."""
    if tuple(labels) != tuple(image):
        raise ItemError("shape", f"the labels are {labels[0]} x {labels[1]} px, the image {image[0]} x {image[1]}", where=uri)


def label_like(image: DecodedImage, uri: str) -> DecodedImage:
    """The image with what loses nothing undone: equal colour channels become one, whole floats below 2^31 integers.

    Viewers and array tools write label images so. Raises ItemError `bad_labels` for channels that differ, and for floats
    that are no ids (fractions, NaN, 2^31 and above).
    """
    pixels = image.pixels
    if len(pixels) == 3:
        if not (np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])):
            raise ItemError("bad_labels", "three channels that differ: a picture of labels in colours, not labels", where=uri,
                            todo="write one integer per pixel: 0 for background, a number for each cell")
        pixels = pixels[:1]
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all() or (pixels != np.floor(pixels)).any() or np.abs(pixels).max() > _INT32_MAX:
            raise ItemError("bad_labels", f"labels are integers, this file holds {pixels.dtype} with fractions, NaN, or values of "
                            "2^31 and above", where=uri,
                            todo="write the labels themselves, as an integer type")
        pixels = pixels.astype(np.int64)
    return DecodedImage(pixels, is_stretched=image.is_stretched)


def refuse_binary(labels: np.ndarray, uri: str) -> None:
    """Raises ItemError `bad_labels` when labels [Y, X] have one value in BINARY_PIECES or more separate pieces (8-connected)."""
    pieces = pieces_of_one_value(labels)
    if pieces >= BINARY_PIECES:
        raise ItemError("bad_labels", f"one value ({labels.max()}) in {pieces} separate pieces: a binary mask, not labels",
                        where=uri, todo="give each cell its own number (skimage.measure.label)")


def pieces_of_one_value(labels: np.ndarray) -> int:
    """The separate pieces (8-connected) of labels [Y, X] that have one value besides 0; 0 where they have none or several."""
    top = labels.max(initial=0)
    objects = labels != 0
    if top == 0 or (objects & (labels != top)).any():
        return 0
    return int(ndimage.label(objects, np.ones((3, 3)))[1])


def int32_ids(labels: np.ndarray) -> np.ndarray:
    """Labels [Y, X] as int32: the ids as stored where they fit, else 1, 2, ... in their order. 0 stays 0."""
    if labels.max(initial=0) <= _INT32_MAX:
        return labels.astype(np.int32)
    ids, places = np.unique(labels, return_inverse=True)
    return (places.reshape(labels.shape) + (ids[0] != 0)).astype(np.int32)
