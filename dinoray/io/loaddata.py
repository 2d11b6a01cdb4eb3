"""CellProfiler LoadData tables: which columns are images, what identifies a row, which files it names.

One row is one field with one file per channel: `FileName_<X>` with `PathName_<X>`, or `URL_<X>` (which wins
where both are filled, as in CellProfiler). `FileName_OrigDNA` is the channel DNA: JUMP puts `Orig` before the
name of every raw channel. `Illum*` are correction functions, no images of the field: passed over and counted.
The columns of CellProfiler's own Image tables (`Image_FileName_...`) are understood too.
"""

from __future__ import annotations

import re

from dinoray.errors import BadRequest, ItemError
from dinoray.io.table_paths import bad_path, from_cell, inside

_COLUMN = re.compile(r"(?:Image_)?(FileName|PathName|URL|Series|Frame)_(.+)")
_METADATA = re.compile(r"(?:Image_)?Metadata_(.+)", re.IGNORECASE)
_ORIG = re.compile(r"Orig_?(?=[A-Z0-9])")
_STANDARD = {name.lower(): f"Metadata_{name}" for name in ("Source", "Batch", "Plate", "Well", "Site")}
_ALSO_IN_ID = ("Plane", "ZPlane", "Z", "ZStep", "Time", "TimePoint", "Timepoint", "T", "AbsTime", "Cycle")
"""Metadata that tell two images of one site apart."""


def is_load_data(names: list[str]) -> bool:
    """Whether a table's columns are those of LoadData: a file name or URL of at least one image."""
    found = [match for name in names if (match := _COLUMN.fullmatch(name.strip()))]
    return any(match[1] in ("FileName", "URL") for match in found)


class LoadData:
    """Which column is what, by position. Raises BadRequest when two columns claim one channel, or none does."""

    def __init__(self, names: list[str], uri: str):
        columns: dict[str, dict[str, int]] = {}
        self.metadata: dict[int, str] = {}
        self.passed_over = {"illumination column": 0, "other column": 0}
        """Columns of the table that are no images and no metadata: {kind: count}."""
        for i, name in enumerate(names):
            match, metadata = _COLUMN.fullmatch(name.strip()), _METADATA.fullmatch(name.strip())
            if metadata:
                self.metadata[i] = _STANDARD.get(metadata[1].lower(), f"Metadata_{metadata[1]}")
            elif match and match[2].startswith("Illum"):
                self.passed_over["illumination column"] += match[1] in ("FileName", "URL")
            elif match:
                if match[1] in columns.setdefault(match[2], {}):
                    raise BadRequest(f"two columns {match[1]}_{match[2]}", where=uri, todo="remove one of them")
                columns[match[2]][match[1]] = i
            else:
                self.passed_over["other column"] += 1
        images = {image: found for image, found in columns.items() if found.keys() & {"FileName", "URL"}}
        self.channels = tuple(_ORIG.sub("", image, count=1) if _ORIG.match(image) else image for image in images)
        self._images = tuple(images.values())
        found = f"found columns: {', '.join(names)}"
        if not images:
            raise BadRequest("a LoadData table needs FileName_<channel> or URL_<channel>; only illumination "
                             "functions are named", where=uri, todo=found)
        if len(set(self.channels)) < len(self.channels):
            raise BadRequest("two columns of a LoadData table mean one channel (Orig before a channel's name is left "
                             "out)", where=uri, todo=found)
        if len(set(self.metadata.values())) < len(self.metadata):
            raise BadRequest("two columns mean the same metadata", where=uri, todo=found)
        self._by_name = {name: i for i, name in self.metadata.items()}

    def files(self, row: tuple[str | None, ...], folder: str) -> list[str | None]:
        """The path or URL of each channel, None where the row names none.

        Relative paths start at `folder`, the table's. Raises ItemError `bad_path` (also for `..` anywhere,
        and a FileName that is absolute) and `unsupported` for a plane inside a file (Series, Frame).
        """
        return [self._file(row, columns, folder) for columns in self._images]

    def _file(self, row: tuple[str | None, ...], columns: dict[str, int], folder: str) -> str | None:
        def cell(kind: str) -> str:
            return (row[columns[kind]] or "").strip() if kind in columns else ""

        for kind in ("Series", "Frame"):
            if cell(kind) not in ("", "0", "0.0"):
                raise ItemError("unsupported", f"the row names a plane inside a file ({kind} {cell(kind)})",
                                todo="write one image per file, or read the files themselves with --z-projection")
        url, name, path = cell("URL"), cell("FileName"), cell("PathName")
        if url:
            return inside(from_cell(inside(url), folder), percent=url.lower().startswith("file:"))
        if not name:
            return None
        inside(name)
        if name.startswith(("/", "~")) or "://" in name or "\\" in name or name.lower().startswith("file:"):
            raise bad_path("a FileName that is no name below its PathName", name)
        if not path:
            return from_cell(name, folder)
        base = inside(from_cell(inside(path), folder), percent=path.lower().startswith("file:"))
        return from_cell(f"{base.rstrip('/')}/{name}", folder)

    def item_id(self, row: tuple[str | None, ...]) -> str:
        """[Source/][Batch/]Plate/Well-Site, with plane and time where there are columns of them; "" without
        plate, well and site: then the path of the first file is the id."""
        def value(name: str) -> str:
            i = self._by_name.get(f"Metadata_{name}")
            text = (row[i] or "").strip() if i is not None else ""
            text = text.replace("%", "%25").replace("/", "%2F")
            return text.replace(".", "%2E") if text in (".", "..") else text

        if not (value("Plate") and value("Well") and value("Site")):
            return ""
        place = [name for name in (value("Source"), value("Batch"), value("Plate")) if name]
        more = [f"{name.lower()}{value(name)}" for name in _ALSO_IN_ID if value(name)]
        return "/".join([*place, "-".join([value("Well"), value("Site"), *more])])
