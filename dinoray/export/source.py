"""What an export reads: the files that receipts name, plate by plate, over all generations of an output.

Receipts decide, not the listing: a foreign file is not read, a missing one is noticed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.generations import Generation, generations, quarantined_now
from dinoray.io.grouping import natural
from dinoray.io.stores import Store
from dinoray.verification import open_run

OPEN_FILES = 8
"""Files read at once while the channels are looked up."""


@dataclass(frozen=True)
class Part:
    """One Parquet file of features: its key, rows by its receipt, plate, number of its generation."""

    key: str
    rows: int
    plate: str | None
    generation: int


@dataclass
class Source:
    """The files of an output in order, and what is not in them."""

    store: Store
    parts: list[Part]
    """In plan order, generation after generation."""
    units: int
    missing_units: int
    """Units without a receipt, or whose file is not what the receipt says (only with `partial`)."""
    generations: list[Generation] = field(repr=False)

    def plates(self) -> list[tuple[str | None, list[Part]]]:
        """(plate, its files), plates in natural order; files without a plate come first, under None."""
        groups: dict[str | None, list[Part]] = {}
        for part in self.parts:
            groups.setdefault(part.plate, []).append(part)
        return sorted(groups.items(), key=lambda pair: (pair[0] is not None, natural(pair[0] or "")))

    @contextlib.contextmanager
    def open(self, part: Part) -> Iterator[pq.ParquetFile]:
        """The file of a part. Raises OutputDamaged for one that cannot be read or has not the receipt's rows."""
        where = f"{self.store.url}/{part.key}"
        todo = "`dinoray verify --deep` lists all damage; delete the receipts that it names and run the same command again"
        try:
            with self.store.open(part.key) as file:
                opened = pq.ParquetFile(file)
                if opened.metadata.num_rows != part.rows:
                    raise OutputDamaged(f"{opened.metadata.num_rows} rows, the receipt says {part.rows}", where=where, todo=todo)
                yield opened
        except (pa.ArrowException, OSError) as error:
            raise OutputDamaged(f"a file of features cannot be read: {error}", where=where, todo=todo) from error

    def schema(self) -> pa.Schema:
        """The columns of all generations: a later one may have further `Metadata_*`. Raises BadRequest without any row."""
        if not self.parts:
            raise BadRequest("no image has features here, so there is nothing to export", where=self.store.url,
                             todo="`dinoray status` says why: all of them are quarantined, or no unit is done")
        schemas = []
        first = {part.generation: part for part in reversed(self.parts)}  # all files of a generation have one schema
        for _, part in sorted(first.items()):
            with self.open(part) as file:
                schemas.append(file.schema_arrow)
        return pa.unify_schemas(schemas)

    def scan(self, columns: list[str]) -> Iterator[pa.Table]:
        """These columns of every part (those that it has), in order; several files are read at once."""
        with ThreadPoolExecutor(OPEN_FILES) as pool:
            for start in range(0, len(self.parts), 8 * OPEN_FILES):
                yield from pool.map(partial(self._columns, columns), self.parts[start:start + 8 * OPEN_FILES])

    def _columns(self, columns: list[str], part: Part) -> pa.Table:
        with self.open(part) as file:
            return file.read([name for name in columns if name in file.schema_arrow.names], use_threads=False)

    def quarantined(self) -> Iterator[tuple[dict[str, str | None], str, int]]:
        """(metadata, item_id, how often) of the items that are quarantined by their latest receipt."""
        bad = Counter(quarantined_now(self.generations)["item_id"].to_pylist())
        for generation in self.generations:
            done = generation.ledger.done()
            for receipt in generation.ledger.receipts([u for u in generation.plan.unit_ids if u in done]):
                if receipt.quarantined:
                    for item in generation.plan.unit(receipt.number).items:
                        if count := bad.pop(item.item_id, 0):
                            yield item.metadata, item.item_id, count


def open_source(url: str, *, partial: bool = False) -> Source:
    """The files of a finished output. Raises BadRequest for no output, or an unfinished one unless `partial`;
    OutputDamaged when a file is missing or of another size than its receipt says (left out with `partial`)."""
    store, plan, _ = open_run(url)
    if plan.facts.get("kind") == "volume":
        raise BadRequest("these are features of a volume: boxes, not a table of rows", where=url, todo="read boxes of them with "
                         "dinoray.open_features(OUT)[z0:z1, y0:y1, x0:x1] in Python, or open OUT/dense/*.zarr")
    if plan.facts.get("kind") == "volume-labels":
        raise BadRequest("this is a segmented volume: labels, not profiles", where=url,
                         todo="open OUT/labels.zarr, in napari or zarr")
    if plan.facts.get("kind") == "cell-masks":
        raise BadRequest("this is a segmentation: masks and a table of cells, not profiles", where=url,
                         todo="read its Parquet files in OUT/cells, or dinoray.open_features(OUT).table() in Python")
    found = dict(store.list("features"))
    parts: list[Part] = []
    damaged: list[str] = []
    units = missing = 0
    parents = generations(store)
    for generation in parents:
        done = generation.ledger.done()
        units += len(generation.plan)
        missing += len(generation.plan.pending(done))
        for receipt in generation.ledger.receipts([u for u in generation.plan.unit_ids if u in done]):
            for stored in receipt.objects:
                if stored.key.startswith("features/"):
                    if found.get(stored.key) == stored.bytes:
                        parts.append(Part(stored.key, receipt.rows, receipt.plate, generation.number))
                    else:
                        damaged.append(stored.key)
    if damaged and not partial:
        raise OutputDamaged(f"{len(damaged)} files are missing or not of the size that their receipts say, the first: "
                            f"{damaged[0]}", where=url, todo="`dinoray verify` lists them and says what to do; "
                            "--partial exports the rest")
    if missing and not partial:
        raise BadRequest(f"{missing} of {units} units are not done, the output is incomplete", where=url,
                         todo="run the same command again to finish it, or export what is there with --partial")
    return Source(store, parts, units, missing + len(damaged), parents)
