"""Small labelled images on disk, for the tests of every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from dinoray.config.labelled import LabelledSource
from dinoray.io.annotations import LabelledImage, list_labelled


def squares(shape: tuple[int, int] = (20, 24), count: int = 3) -> np.ndarray:
    """Labels [Y, X] uint16: `count` squares of 3 px, ids 1..count."""
    labels = np.zeros(shape, np.uint16)
    for i in range(count):
        y, x = divmod(i, shape[1] // 5)
        labels[5 * y + 1:5 * y + 4, 5 * x + 1:5 * x + 4] = i + 1
    assert labels.max() == count
    return labels


def write(path: Path, pixels: np.ndarray, **options) -> Path:
    """A TIFF or PNG, by the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, pixels, **({"photometric": "minisblack"} | options))
    else:
        Image.fromarray(pixels).save(path)
    return path


def picture(path: Path, shape: tuple[int, int] = (20, 24), seed: int = 0) -> Path:
    """An image of noise, uint16 in a TIFF, uint8 in a PNG."""
    top, dtype = (4000, np.uint16) if path.suffix == ".tif" else (256, np.uint8)
    return write(path, np.random.default_rng(seed).integers(0, top, shape).astype(dtype))


def listed(images: Path | str, labels: Path | str | None = None, *, check_all: bool = False, **fields) -> list[LabelledImage]:
    """The labelled images of a source."""
    source = LabelledSource(images=str(images), labels=None if labels is None else str(labels), **fields)
    return list_labelled(source, check_all=check_all)
