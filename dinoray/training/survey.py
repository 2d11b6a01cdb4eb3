"""A look at every labelled image before training: can it be used, how large is it, how large are its cells.

A training on images of which some cannot be read would differ from what was asked for: they are listed with their reason,
left out, and above a share the training is refused before it starts.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.errors import BadRequest, ItemError
from dinoray.io.annotations import LabelledImage
from dinoray.io.stores import Store
from dinoray.training.augmentation import MAX_ZOOM
from dinoray.training.image_pool import ImagePool
from dinoray.vision.targets import diameters
from dinoray.wording import plural

SURVEY_SCHEMA = pa.schema([
    ("image_id", pa.string()), ("source", pa.int32()), ("height", pa.int32()), ("width", pa.int32()), ("objects", pa.int32()),
    ("median_diameter_px", pa.float32()), ("diameters_px", pa.list_(pa.float32())), ("pixel_size_um", pa.float64()),
    ("reason", pa.string()), ("message", pa.string()),
    ("content", pa.string()),
])
"""`objects` counts all cells of an image; its diameters are of those that the border does not cut, unless it cuts all.
`content` is a digest of what is trained on: planes, labels, pixel size."""
MAX_BAD_FRACTION = 0.1
CHUNK = 256
TOLD_EVERY_S = 10.0
SAME_SCALE = 1e-4
"""Pixel sizes so near the model's are the model's: rounding in a file's metadata must not blur every crop."""
DIAMETERS_KEPT = 2000
"""Diameters kept per image, evenly among them by size: their pooled median is what the checkpoint records."""


@dataclass(frozen=True)
class Survey:
    """A row of SURVEY_SCHEMA per image, in the order of the images."""

    table: pa.Table

    def good(self) -> list[int]:
        """Numbers of the images that can be used."""
        return [i for i, reason in enumerate(self.table["reason"].to_pylist()) if reason is None]

    def zooms(self, *, pixel_size_um: float | None, diameter_px: float | None) -> np.ndarray:
        """Factor by which each image is enlarged before it is trained on, float64 [n]; 1 without a target scale."""
        if pixel_size_um is not None:
            zooms = np.array(self.table["pixel_size_um"].to_pylist(), dtype=float) / pixel_size_um
            return np.where(np.abs(zooms - 1) < SAME_SCALE, 1.0, zooms)
        if diameter_px is not None:
            medians = np.array(self.table["median_diameter_px"].to_pylist(), dtype=float)
            typical = np.nanmedian(medians) if np.isfinite(medians).any() else diameter_px
            return diameter_px / np.where(np.isfinite(medians), medians, typical)  # an image without cells: as most are
        return np.ones(self.table.num_rows)

    def diameters(self, zooms: np.ndarray) -> np.ndarray:
        """Diameters of the cells at the scale of training, px, float64 [n]."""
        found = [np.asarray(sizes, dtype=float) * zoom
                 for sizes, zoom in zip(self.table["diameters_px"].to_pylist(), zooms, strict=True) if sizes]
        return np.concatenate(found) if found else np.zeros(0)

    def median_diameter(self, zooms: np.ndarray) -> float | None:
        """Median of `diameters`."""
        found = self.diameters(zooms)
        return float(np.median(found)) if len(found) else None

    def diameter_range(self, zooms: np.ndarray) -> tuple[float, float] | None:
        """Percentiles 5 and 95 of `diameters`: the sizes that the model has seen enough of."""
        found = self.diameters(zooms)
        return tuple(float(v) for v in np.percentile(found, (5, 95))) if len(found) else None  # type: ignore[return-value]


def survey_images(images: list[LabelledImage], pool: ImagePool, *, threads: int, pixel_size_needed: bool,
                  say: Callable[[str], None], name: str = "", check: Callable[[], None] = lambda: None) -> Survey:
    """Read every image once. `check` is called now and then, and raises to end it.

    Raises BadRequest when more than a tenth cannot be used, none of a source can, or none has a cell; `name` is the field of the
    job that they are of.
    """
    def look(number: int) -> dict:
        image = images[number]
        row = {"image_id": image.image_id, "source": image.source}
        try:
            pixels = pool.read(number)
            if pixel_size_needed and pixels.pixel_size_um is None:
                raise ItemError("no_pixel_size", "its pixel size is not known, and pixel_size_um needs one",
                                todo="give the source's pixel_size_um")
        except ItemError as error:
            return row | {"reason": error.reason, "message": str(error)}
        sizes = np.sort(diameters(pixels.labels))
        kept = sizes
        if len(sizes) > DIAMETERS_KEPT:
            kept = sizes[np.linspace(0, len(sizes) - 1, DIAMETERS_KEPT).round().astype(int)]
        content = hashlib.blake2b(repr((pixels.planes.shape, pixels.labels.shape, pixels.pixel_size_um)).encode(), digest_size=16)
        for array in (pixels.planes, pixels.labels):
            content.update(np.ascontiguousarray(array))
        return row | {"content": content.hexdigest(), "pixel_size_um": pixels.pixel_size_um, "height": pixels.labels.shape[0],
                      "width": pixels.labels.shape[1], "objects": np.count_nonzero(np.unique(pixels.labels)),
                      "median_diameter_px": float(np.median(sizes)) if len(sizes) else None, "diameters_px": kept.tolist()}

    rows, told = [], time.monotonic()
    with ThreadPoolExecutor(threads, thread_name_prefix="survey") as threads_:
        for begin in range(0, len(images), CHUNK):  # in parts: an interrupted one leaves no queue of millions behind
            rows += threads_.map(look, range(begin, min(begin + CHUNK, len(images))))
            check()
            if time.monotonic() - told >= TOLD_EVERY_S:
                told = time.monotonic()
                say(f"looked at {len(rows)} of {plural(len(images), 'labelled image')}")
    table = pa.Table.from_pylist(rows, schema=SURVEY_SCHEMA)
    bad = [row for row in table.to_pylist() if row["reason"] is not None]
    for row in bad[:10]:
        say(f"left out: {row['image_id']}: {row['reason']}: {row['message'].splitlines()[0]}")
    if len(bad) > MAX_BAD_FRACTION * len(images) or len(bad) == len(images):
        raise BadRequest(f"{len(bad)} of {plural(len(images), 'labelled image')} cannot be used, e.g. {bad[0]['image_id']}: "
                         f"{bad[0]['message']}", where=name, todo="mend or remove them (docs/training-data.md says what is read)")
    usable = {row["source"] for row in rows if row.get("reason") is None}
    for row in bad:
        if row["source"] not in usable:
            raise BadRequest(f"not one image of source {row['source']} can be used, e.g. {row['image_id']}: {row['message']}",
                             where=f"{name}.{row['source']}" if name else "", todo="mend it, or leave it out of the job")
    if bad:
        say(f"{plural(len(bad), 'labelled image')} of {len(images)} left out; all of them with reasons: _dinoray/survey-*.parquet")
    if not sum(n or 0 for n in table["objects"].to_pylist()):
        raise BadRequest(f"not one labelled image{f' for {name}' if name else ''} has a cell", where=name,
                         todo="labels are 0 on background and a number on each cell")
    return Survey(table)


def check_zooms(survey: Survey, name: str, *, pixel_size_um: float | None, diameter_px: float | None) -> None:
    """Raise BadRequest for an image that would be enlarged or shrunk beyond all meaning, before the training meets it."""
    zooms = survey.zooms(pixel_size_um=pixel_size_um, diameter_px=diameter_px)
    for number in survey.good():
        if not 1 / MAX_ZOOM <= zooms[number] <= MAX_ZOOM:
            row = {field: survey.table[field][number].as_py() for field in ("image_id", "pixel_size_um", "median_diameter_px")}
            raise BadRequest(f"{row['image_id']} would be enlarged {zooms[number]:g} times (pixel size {row['pixel_size_um']} um, "
                             f"cells of {row['median_diameter_px']} px)", where=name,
                             todo="mend its pixel size or labels, or leave it out")


def same_content(one: Survey, other: Survey) -> bool:
    """Whether the same is learned from both: the same images, with the same pixels and labels."""
    a, b = ([table.column(name).to_pylist() for name in ("source", "image_id", "reason", "content")]
            for table in (one.table, other.table))
    return a == b and all(content or reason for reason, content in zip(a[2], a[3], strict=True))


def store_survey(store: Store, name: str, survey: Survey) -> None:
    """Keep it beside the output, for workers and for a resumed run."""
    sink = io.BytesIO()
    pq.write_table(survey.table, sink, compression="zstd")
    store.put(f"_dinoray/survey-{name}.parquet", sink.getbuffer())


def stored_survey(store: Store, name: str) -> Survey | None:
    """The kept survey, or None."""
    try:
        data = store.get(f"_dinoray/survey-{name}.parquet")
    except FileNotFoundError:
        return None
    return Survey(pq.read_table(io.BytesIO(data), schema=SURVEY_SCHEMA))
