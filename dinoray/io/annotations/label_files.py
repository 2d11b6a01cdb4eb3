"""Truth in image files: one label image, or one mask for each object."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dinoray.errors import ItemError
from dinoray.io.decoded import DecodedImage, Limits
from dinoray.io.images import load_item
from dinoray.io.items import FileRef, Item
from dinoray.io.label_images import int32_ids, label_like, label_plane, refuse_binary


@dataclass(frozen=True)
class LabelFile:
    """One label image."""

    file: FileRef
    may_be_binary: bool = False
    """Whether one value in many pieces is read as one object: a prediction may be that bad, and one file does not tell."""

    @property
    def files(self) -> tuple[FileRef, ...]:
        return (self.file,)

    def read(self, limits: Limits) -> np.ndarray:
        uri = self.file.uri
        labels = label_plane(label_like(_decoded(self.file, limits), uri), None, uri)
        if not self.may_be_binary:
            refuse_binary(labels, uri)
        return int32_ids(labels)


@dataclass(frozen=True)
class MaskFiles:
    """One mask per object, by name: object i + 1 is the i-th file. Where masks overlap the lower number stays."""

    files: tuple[FileRef, ...]

    def read(self, limits: Limits) -> np.ndarray:
        labels: np.ndarray | None = None
        for number, file in enumerate(self.files, 1):
            plane = _mask(_decoded(file, limits), file.uri)
            if labels is None:
                labels = np.zeros(plane.shape, np.int32)
            if plane.shape != labels.shape:
                raise ItemError("shape", f"this mask is {plane.shape[0]} x {plane.shape[1]} px, the first one of the image "
                                f"{labels.shape[0]} x {labels.shape[1]}", where=file.uri)
            labels[plane & (labels == 0)] = number
        if labels is None:
            raise ItemError("missing_labels", "no mask at all", where="masks")
        return labels


def _decoded(file: FileRef, limits: Limits) -> DecodedImage:
    return load_item(Item(file.uri, (file,)), limits).image


def _mask(image: DecodedImage, uri: str) -> np.ndarray:
    """Pixels of one object [Y, X] bool. Raises ItemError `bad_labels` when there is more than one value above 0."""
    image = label_like(image, uri)
    plane = label_plane(DecodedImage(image.pixels), None, uri)  # of few bits: stretched, which a mask survives
    if ((plane != 0) & (plane != plane.max())).any():
        raise ItemError("bad_labels", "a mask of one object has one value besides 0, this one several", where=uri,
                        todo="one binary image per object, or one label image per image (kind: pairs)")
    return plane != 0
