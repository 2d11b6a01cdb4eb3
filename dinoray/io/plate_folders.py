"""Folders of plate microscopes -> the plate, and what the folders below it say: TimePoint_1, ZStep_2, A01."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dinoray.io.plates import format_well

_LEVEL = re.compile(r"(?P<images>images)|timepoint_?(?P<Time>\d+)|zstep_?(?P<Plane>\d+)", re.IGNORECASE)
_HARMONY = re.compile(r"(?P<plate>.+?)__\d{4}-\d{2}-\d{2}T\d{2}_\d{2}_\d{2}(?:_\d+)?-Measurement ?\d+[a-z]?")
"""Harmony's export folder: PLATE__2020-11-08T18_18_23-Measurement 1."""


@dataclass(frozen=True)
class PlateFolder:
    """The folder of a plate: its `path` or URL, the plate's name ("" at the top of a file system), and
    Metadata_* that the folders tell: Time, Plane, and PlateFolder where it is not the plate's name."""

    path: str
    plate: str
    metadata: dict[str, str] = field(default_factory=dict)


def plate_folder(folder: str, well: str | None = None) -> PlateFolder:
    """Where an image lies: .../PLATE, .../PLATE/Images, .../PLATE/TimePoint_1/ZStep_1, .../PLATE/A01.

    `well` is the image's well: a folder of that name is no plate. A Harmony folder's plate is what stands
    before its date.
    """
    protocol, mark, rest = folder.rpartition("://")
    names = rest.rstrip("/").split("/")
    metadata: dict[str, str] = {}
    while names and names[-1]:
        level = _LEVEL.fullmatch(names[-1])
        if level is None and not (well and format_well(names[-1]) == well):
            break
        found = level.groupdict() if level else {}
        metadata |= {f"Metadata_{k}": found[k].lstrip("0") or "0" for k in ("Time", "Plane") if found.get(k)}
        names.pop()
    path, name = protocol + mark + "/".join(names), names[-1] if names else ""
    harmony = _HARMONY.fullmatch(name)
    if harmony:
        metadata["Metadata_PlateFolder"] = name
    return PlateFolder(path, harmony["plate"] if harmony else name, metadata)
