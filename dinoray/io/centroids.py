"""Tables of cells: CSV or Parquet, one row per cell, with its image, its centroid and its id.

Columns, in any case:

* the image: `item_id` (or `id`), a path (`uri`, `path`, `image`, `file`; CellProfiler's `PathName_*` + `FileName_*`),
  or `Metadata_Plate` + `Metadata_Well` + `Metadata_Site`; the first of these that the table has;
* the centroid: `x` and `y` (also `x_px`, `centroid_x`, `centroid_x_px`; skimage's `centroid-1`, `centroid-0`;
  CellProfiler's `Location_Center_X`, `AreaShape_Center_X`, with or without `Nuclei_`) in px from the centre of the first
  pixel, or `x_um` and `y_um` in µm;
* the object: `object_id` (`ObjectNumber`, `Nuclei_ObjectNumber`, `label`, ...), else 1..n per image in the table's order.
"""

from __future__ import annotations

import contextlib
import math
import posixpath
import re
import sqlite3
from typing import Literal

import numpy as np

from dinoray.errors import BadRequest
from dinoray.io.items import Objects
from dinoray.io.manifests import FILE_COLUMNS, ID_COLUMNS
from dinoray.io.plates import format_well
from dinoray.io.stores import is_local, local_path
from dinoray.io.text_tables import text_rows

_PX = (("x", "y"), ("x_px", "y_px"), ("centroid_x", "centroid_y"), ("centroid_x_px", "centroid_y_px"),
       ("centroid-1", "centroid-0"))
_UM = (("x_um", "y_um"), ("centroid_x_um", "centroid_y_um"))
_CELLPROFILER = re.compile(r"(?:(\w+)_)?(location|areashape)_center_x")
_INTEGER = re.compile(r"([+-]?[0-9]{1,19})(?:\.0*)?")  # pandas writes integers as 3.0 where one is missing
_PREFERRED = ("nuclei", "cells", "")
_POSITION = ("plate", "well", "site")


class CentroidTable:
    """The rows of a table in a temporary database, by the image's name. Raises BadRequest for tables that are none."""

    def __init__(self, url: str):
        if not url.lower().endswith((".csv", ".parquet")):
            raise BadRequest("a table of centroids is a .csv or .parquet file", where=url)
        self.url = str(local_path(url)) if is_local(url) else url
        self.folder = posixpath.dirname(self.url)
        self.by_position = False
        self.unit: Literal["px", "um"] = "px"
        self.example = ""
        self._has_ids = False
        self._db = sqlite3.connect("")  # a temporary file of its own
        self._db.execute("CREATE TABLE objects (name TEXT, n INTEGER, id INTEGER, y REAL, x REAL)")
        try:
            self._fill()
        except BaseException:
            self._db.close()
            raise
        self._db.execute("CREATE INDEX by_name ON objects (name, n)")

    def close(self) -> None:
        """Forget the rows."""
        self._db.close()

    def objects_of(self, names: list[str]) -> tuple[Objects, str | None]:
        """(objects, problem) of the image that has any of these names; no rows are no objects."""
        marks = ", ".join("?" * len(names))
        rows = self._db.execute(f"SELECT id, y, x FROM objects WHERE name IN ({marks}) ORDER BY n", names).fetchall()
        ids = np.array([row[0] for row in rows], np.int64) if self._has_ids else np.arange(1, len(rows) + 1)
        y, x = (np.array([row[i] for row in rows], np.float64) for i in (1, 2))  # SQLite keeps NaN as NULL, here NaN again
        lost = np.flatnonzero(~(np.isfinite(y) & np.isfinite(x)))
        if len(lost):
            return Objects(b"", self.unit), f"bad_centroids: object {ids[lost[0]]} and {len(lost) - 1} more have no coordinates"
        values, counts = np.unique(ids, return_counts=True)
        if len(values) < len(ids):
            return Objects(b"", self.unit), f"bad_centroids: object_id {values[counts > 1][0]} occurs more than once"
        return Objects.pack(ids, y, x, self.unit), None

    def _fill(self) -> None:
        columns: _Columns | None = None
        n = 0
        for header, rows in text_rows(self.url):
            columns = columns or _Columns(header, self.url)
            values = {i: [row[i] for row in rows] for i in columns.used}
            names = [columns.name(parts) for parts in zip(*(values[i] for i in columns.image), strict=True)]
            ids = [columns.integer(v, n + i) for i, v in enumerate(values[columns.object_id])] if columns.object_id is not None \
                else [None] * len(rows)
            y, x = ([columns.number(v, n + i) for i, v in enumerate(values[column])] for column in (columns.y, columns.x))
            self._db.executemany("INSERT INTO objects VALUES (?, ?, ?, ?, ?)",
                                 zip(names, range(n, n + len(rows)), ids, y, x, strict=True))
            self.example = self.example or next(iter(names), "").replace("\0", " ").strip()
            n += len(rows)
        if columns is None or not n:
            raise BadRequest("the table of centroids has no rows", where=self.url)
        self.by_position, self.unit, self._has_ids = columns.by_position, columns.unit, columns.object_id is not None


class _Columns:
    """Which column is what, by position."""

    def __init__(self, names: list[str], url: str):
        self.url = url
        self.names = names
        lower = [name.strip().lower() for name in names]
        found = f"found columns: {', '.join(names)}"
        twice = {name for name in lower if lower.count(name) > 1}
        self.image = self._image(lower)
        if not self.image:
            raise BadRequest("the table does not say which image a cell is in", where=url, todo="add item_id, a path, or "
                             f"Metadata_Plate, Metadata_Well and Metadata_Site; {found}")
        self.by_position = len(self.image) == 3
        x, y, self.unit, prefix = self._centre(lower, found)
        ids = [f"{prefix}_objectnumber", f"{prefix}_number_object_number"] if prefix else []
        ids = ["object_id", *ids, "objectnumber", "metadata_objectnumber", "number_object_number", "label"]
        object_id = next((name for name in ids if name in lower), None)
        used = {lower[i] for i in self.image} | {x, y, object_id}
        if used & twice:
            raise BadRequest(f"two columns are called {sorted(used & twice)[0]!r}", where=url, todo=found)
        self.x, self.y = lower.index(x), lower.index(y)
        self.object_id = None if object_id is None else lower.index(object_id)
        self.used = {*self.image, self.x, self.y, *([] if self.object_id is None else [self.object_id])}

    @staticmethod
    def _image(lower: list[str]) -> list[int]:
        for name in (*ID_COLUMNS, *FILE_COLUMNS):
            if name in lower:
                return [lower.index(name)]
        for i, name in enumerate(lower):
            if name.startswith("filename_"):
                path = name.replace("filename_", "pathname_", 1)
                return [lower.index(path), i] if path in lower else [i]
        for prefix in ("metadata_", "image_metadata_"):
            if all(f"{prefix}{name}" in lower for name in _POSITION):
                return [lower.index(f"{prefix}{name}") for name in _POSITION]
        return []

    def _centre(self, lower: list[str], found: str) -> tuple[str, str, Literal["px", "um"], str]:
        """(column of x, of y, unit, CellProfiler's name of the objects)."""
        for unit, pairs in (("px", _PX), ("um", _UM)):
            for x, y in pairs:
                if x in lower and y in lower:
                    return x, y, unit, ""  # type: ignore[return-value]
        kinds: dict[str, str] = {}
        for name in sorted(lower, reverse=True):  # location_ before areashape_, so that the former wins
            match = _CELLPROFILER.fullmatch(name)
            if match and f"{name[:-1]}y" in lower:
                kinds.setdefault(match[1] or "", name)
        prefix = next((p for p in _PREFERRED if p in kinds), next(iter(kinds)) if len(kinds) == 1 else None)
        if prefix is None:
            what = f"several kinds of objects ({', '.join(kinds)})" if kinds else "no columns x and y"
            raise BadRequest(f"the table of centroids has {what}", where=self.url,
                             todo=f"name the columns x and y (px) or x_um and y_um; {found}")
        return kinds[prefix], f"{kinds[prefix][:-1]}y", "px", prefix

    def name(self, parts: tuple[str | None, ...]) -> str:
        """The image's name in one row."""
        if self.by_position:
            return position_key(*parts)
        path = posixpath.join(*((part or "").strip().replace("\\", "/") for part in parts))
        return path if "://" in path or not path else posixpath.normpath(path)

    def number(self, text: str | None, row: int) -> float | None:
        """A coordinate; None where there is none (empty, NaN)."""
        try:
            value = float(text) if text and text.strip() else math.nan
        except ValueError as error:
            raise BadRequest(f"not a coordinate: {text!r}", where=f"{self.url} row {row + 1}") from error
        return value if math.isfinite(value) else None

    def integer(self, text: str | None, row: int) -> int:
        """An object id."""
        match = _INTEGER.fullmatch((text or "").strip())
        if match is None or not -2**63 <= int(match[1]) < 2**63:
            raise BadRequest(f"not an object id: {text!r}", where=f"{self.url} row {row + 1}",
                             todo="ids are integers; leave the column out to count 1..n per image")
        return int(match[1])


def position_key(plate: str | None, well: str | None, site: str | None) -> str:
    """One text for a position on a plate: well "c3" and "C03", site "01" and "1" are the same."""
    text = (site or "").strip()
    with contextlib.suppress(ValueError, OverflowError):  # a site may have a name
        text = str(int(float(text)))
    return "\0".join(((plate or "").strip(), format_well((well or "").strip()), text))
