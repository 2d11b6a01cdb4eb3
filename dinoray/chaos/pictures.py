"""A small collection for the kill test, made of the pictures that ship inside scikit-image."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

NAMES = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "ihc", "moon",
         "page", "retina", "rocket", "text")
SIDE = 128
BROKEN = "c/broken.png"


def make_pictures(folder: Path) -> int:
    """Write 30 pictures in two folders and a cut-off one below `folder`; returns how many files.

    `a/`: RGB and gray PNG, 8 bits, 128 x 128..160 px. `b/`: 16-bit TIFF, every third with three channels.
    """
    data = Path(str(files("skimage"))) / "data"
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        source = next(data.glob(f"{name}.*"))
        with Image.open(source) as picture:
            size = (SIDE + 16 * (number % 3), SIDE)
            rgb = picture.convert("RGB").resize(size, Image.Resampling.BOX)
        (rgb if number % 2 else rgb.convert("L")).save(folder / "a" / f"{name}.png")
        planes = np.moveaxis(np.asarray(rgb), -1, 0).astype(np.uint16) * np.uint16(200) + np.uint16(100 * number)
        pixels, axes = (planes, "CYX") if number % 3 == 0 else (planes[1], "YX")
        tifffile.imwrite(folder / "b" / f"{name}.tif", pixels, photometric="minisblack", metadata={"axes": axes}, ome=False)
    whole = (folder / "a" / f"{NAMES[0]}.png").read_bytes()
    (folder / BROKEN).write_bytes(whole[: len(whole) // 2])
    return 2 * len(NAMES) + 1
