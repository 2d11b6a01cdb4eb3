"""The labelled images of a training: decoded when first needed, kept while they fit, at the scale that is trained at."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from dinoray.io.annotations import LabelledImage
from dinoray.vision.segmentation_input import planes


@dataclass(frozen=True)
class Pixels:
    """What the network gets of an image, and its labels: planes [3 or 1, Y, X] float32 in [0, 1] (one, where all three are
    equal), labels [Y, X] int32."""

    planes: np.ndarray
    labels: np.ndarray
    pixel_size_um: float | None = None

    @property
    def nbytes(self) -> int:
        """Held."""
        return self.planes.nbytes + self.labels.nbytes


class ImagePool:
    """Reads images, several threads at once; keeps the most recently used ones within `cache_bytes`."""

    def __init__(self, images: list[LabelledImage], *, channels: str, scaling: str, percents: tuple[float, float],
                 cache_bytes: int):
        self.images = images
        self._how = {"scaling": scaling, "percents": percents}
        self._channels = channels
        self._cache: OrderedDict[int, Pixels] = OrderedDict()
        self._held, self._limit, self._lock = 0, cache_bytes, threading.Lock()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, number: int) -> Pixels:
        """Image `number`. Raises ItemError when it cannot be read or used."""
        with self._lock:
            found = self._cache.get(number)
            if found is not None:
                self._cache.move_to_end(number)
                return found
        image, labels = self.images[number].read()
        rgb = planes(image, channels=self._channels, **self._how)
        if np.array_equal(rgb[0], rgb[1]) and np.array_equal(rgb[0], rgb[2]):
            rgb = rgb[:1].copy()
        found = Pixels(rgb, labels, image.pixel_size_um)
        with self._lock:
            if number not in self._cache and found.nbytes <= self._limit:
                self._cache[number] = found
                self._held += found.nbytes
            while self._held > self._limit:
                _, old = self._cache.popitem(last=False)
                self._held -= old.nbytes
        return found
