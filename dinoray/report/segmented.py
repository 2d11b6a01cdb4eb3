"""What a segmentation found, read for its report: the table of its images, and a bounded sample of its cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.errors import OutputDamaged
from dinoray.report.run import Part, Run
from dinoray.report.sample import Sample, SampledItem, evenly, read_sample

MAX_IMAGES = 200_000
"""Images whose rows are read; of more, those of files spread evenly over the plan."""
MAX_CELLS = 100_000
"""Cells whose rows are read."""
_COLUMNS = ("item_id", "channel", "height", "width", "pixel_size_um", "num_cells", "scale", "scale_source", "median_diameter_px",
            "cell_fraction", "mask", "p50", "focus", "frac_saturated")


@dataclass
class Found:
    """`images`: a row per image (`_COLUMNS`), in plan order; `parts`: the file that each row is of; `cells`: a sample."""

    images: pa.Table
    parts: list[Part]
    num_images: int
    """Of the run."""
    cells: Sample

    @property
    def complete(self) -> bool:
        """Whether these are all images of the run."""
        return self.images.num_rows == self.num_images

    def values(self, name: str) -> np.ndarray:
        """A column of numbers of the images, float64 [n], NaN for null."""
        return self.images[name].to_numpy(zero_copy_only=False).astype(np.float64)

    def item(self, row: int) -> SampledItem:
        """The image of a row, to be found in the plan."""
        return SampledItem(self.images["item_id"][row].as_py(), self.parts[row], row, row + 1)


def read_segmented(run: Run) -> Found:
    """Read the images and a sample of cells. Raises OutputDamaged when a table that a receipt names is unreadable."""
    total = sum(part.rows for part in run.image_parts)
    chosen = run.image_parts
    if total > MAX_IMAGES:
        chosen = [chosen[i] for i in evenly(len(chosen), max(1, len(chosen) * MAX_IMAGES // total))]
    tables, parts = [_schema().empty_table()], []
    for part in chosen:
        try:
            with run.store.open(part.key) as file:
                table = pq.read_table(file, columns=list(_COLUMNS)).cast(_schema())
        except (OSError, pa.ArrowException, ValueError) as error:
            raise OutputDamaged(f"a table of images cannot be read: {error}", where=f"{run.store.url}/{part.key}",
                                todo="see `dinoray verify`, then run the segmentation again") from error
        tables.append(table)
        parts += [part] * table.num_rows
    return Found(pa.concat_tables(tables), parts, total, read_sample(run, max_rows=MAX_CELLS))


def _schema() -> pa.Schema:
    texts, numbers = ("item_id", "channel", "scale_source", "mask"), ("height", "width", "num_cells")
    types = dict.fromkeys(texts, pa.string()) | dict.fromkeys(numbers, pa.int64())
    return pa.schema([(name, types.get(name, pa.float64())) for name in _COLUMNS])


def intensity_column(cells: pa.Table, channel: str | None) -> str | None:
    """The column of mean intensities to show: of the channel that was segmented, else the first."""
    names = [name for name in cells.column_names if name.startswith("intensity_mean_")]
    wanted = f"intensity_mean_{channel}"
    return wanted if wanted in names else names[0] if names else None


def border_shares(cells: Sample) -> list[tuple[str, int, float]]:
    """(item id, cells, share of them that the image's border cuts) of the sampled images."""
    if "touches_border" not in cells.table.column_names:
        return []
    touching = cells.table["touches_border"].to_numpy(zero_copy_only=False).astype(bool)
    return [(one.item_id, one.stop - one.start, float(touching[one.start:one.stop].mean())) for one in cells.items]
