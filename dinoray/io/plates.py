"""File names of plate microscopes -> well, site, channel: one regex with named groups per microscope.

A pattern is matched with `fullmatch` against the file's name, or against the path below the root when the
regex contains a `/`. Groups:

* `channel` (needed): which file of the image this is. Its text is the channel's name (`ch5`, `w1`).
* `token`, `token2`, ...: what to cut out of the path so that all files of an image get one key. Without
  them the text of `channel` is cut out.
* `well`, or `row` and `col`: become Metadata_Well ("C03", rows after Z are AA, AB, ...).
* `site`, `plane`, `time`, `plate` and every other group NAME: Metadata_<Name>, numbers without leading zeros.

Different planes and times are different images: they stay in the key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

try:  # the parser of `re`, moved in python 3.11
    from re import _parser as sre_parse
except ImportError:  # pragma: no cover
    import sre_parse

from dinoray.errors import BadRequest

MAX_NAME = 512
"""Longer names match no pattern (bounds the time of a regex; file systems allow 255 bytes)."""


@dataclass(frozen=True)
class Pattern:
    """A file-name pattern; `ignore` are files of the microscope that are no images (thumbnails)."""

    name: str
    regex: re.Pattern[str]
    ignore: re.Pattern[str] | None = None
    whole_path: bool = False
    """Match the path below the root instead of the file's name."""
    ignored_as: str = "thumbnail"
    """What the files of `ignore` are called when they are counted."""


@dataclass(frozen=True)
class ParsedName:
    """What a path says: the key shared by all channels, this file's channel, and the metadata."""

    key_without_channel: str
    channel: str
    metadata: dict[str, str] = field(default_factory=dict)


def _shipped(name: str, regex: str, ignore: str | None = None, ignored_as: str = "thumbnail") -> Pattern:
    return Pattern(name, re.compile(regex, re.ASCII), re.compile(ignore, re.ASCII) if ignore else None,
                   ignored_as=ignored_as)


_TIFF = r"\.(?i:tiff?)"
_GUID = r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}"
SHIPPED: dict[str, Pattern] = {pattern.name: pattern for pattern in (
    # Opera Phenix / Operetta, Harmony: r01c01f01p01-ch1sk1fk1fl1.tiff (row, column, field, plane, channel,
    # time, flim); older exports end after sk, some after the channel
    _shipped("phenix", r"r(?P<row>\d{2,})c(?P<col>\d{2,})f(?P<site>\d{2,})p(?P<plane>\d{2,})"
                       r"-(?P<channel>ch\d+)(?:t(?P<timepoint>\d+))?(?:sk(?P<time>\d+))?(?:fk\d+)?(?:fl\d+)?"
                       + _TIFF),
    # ImageXpress (MetaXpress): [plate_]A01_s1_w1[_z1][GUID].tif; the GUID differs from file to file
    _shipped("imagexpress", r"(?:(?P<plate>[^/]+?)_)?(?P<well>[A-Z]{1,2}\d{2})(?:_s(?P<site>\d+))?"
                            r"(?P<token>_(?P<channel>w\d+))(?:_z(?P<plane>\d+))?(?:_t(?P<time>\d+))?"
                            rf"(?P<token2>{_GUID})?{_TIFF}",
             ignore=rf".*_thumb(?:{_GUID})?{_TIFF}"),
    # Yokogawa CV7000/CV8000: plate_A01_T0001F001L01A01Z01C01.tif; A (the action) goes with the channel. The
    # dark and shading images of the camera (DC_sCMOS #1_CAM1.tif, SC_BP445-45_40x_M10_CH01.tif) lie beside
    _shipped("yokogawa", r"(?P<plate>[^/]+?)_(?P<well>[A-Z]{1,2}\d{2})_T(?P<time>\d{4})F(?P<site>\d{3,4})L\d{2}"
                         r"(?P<token>A\d{2})Z(?P<plane>\d{2,3})(?P<token2>(?P<channel>C\d{2}))\.(?i:tiff?|png)",
             ignore=rf"(?:DC|SC)_.*{_TIFF}", ignored_as="camera correction image"),
)}

_METADATA = {"site": "Site", "plane": "Plane", "time": "Time", "timepoint": "Timepoint", "plate": "Plate",
             "well": "Well", "source": "Source", "batch": "Batch"}
_CUT = re.compile(r"token\d*")
_WELL = re.compile(r"([A-Za-z]{1,2})[-_ ]?0*(\d{1,3})")


def get_pattern(text: str) -> Pattern:
    """A shipped pattern by name, else the regex `text`.

    Raises BadRequest when it does not compile, has no group `channel`, or nests unbounded repeats (which
    can take hours on one name).
    """
    if text.lower() in SHIPPED:
        return SHIPPED[text.lower()]
    todo = f"shipped patterns: {', '.join(SHIPPED)}; else a regex with a named group (?P<channel>...)"
    if "(" not in text:
        raise BadRequest(f"unknown pattern {text!r}", where="pattern", todo=todo)
    try:
        regex = re.compile(text)
        parsed = sre_parse.parse(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadRequest(f"the regex does not compile: {error}", where=f"pattern {text!r}",
                         todo=todo) from error
    if "channel" not in regex.groupindex:
        raise BadRequest("the regex has no group `channel`", where=f"pattern {text!r}", todo=todo)
    if _nests_repeats(parsed):
        raise BadRequest("the regex repeats a repeat without bound, like (a+)+: it may never end",
                         where=f"pattern {text!r}", todo="write one repeat: a+")
    return Pattern(text, regex, whole_path="/" in text)


def _nests_repeats(parsed, inside: bool = False) -> bool:
    """Whether an unbounded repeat lies within another one in the parse tree of `re`."""
    for operator, argument in parsed:
        within = inside
        if str(operator) in ("MAX_REPEAT", "MIN_REPEAT"):
            unbounded = argument[1] >= 64
            if unbounded and inside:
                return True
            within = inside or unbounded
        for child in argument if isinstance(argument, (tuple, list)) else ():
            parts = child if isinstance(child, list) else [child]
            if any(isinstance(part, sre_parse.SubPattern) and _nests_repeats(part, within) for part in parts):
                return True
    return False


def parse(pattern: Pattern, path: str) -> ParsedName | None:
    """Parse a file's POSIX path below the root (or bare name); None when it does not match."""
    start = 0 if pattern.whole_path else path.rfind("/") + 1
    name = path[start:]
    match = pattern.regex.fullmatch(name) if len(name) <= MAX_NAME else None
    if match is None or match["channel"] is None:
        return None
    groups = pattern.regex.groupindex
    tokens = [name for name in groups if _CUT.fullmatch(name)] or ["channel"]
    key = name
    spans = sorted((match.span(token) for token in tokens if match[token] is not None), reverse=True)
    for begin, end in spans:
        key = key[:begin] + key[end:]
    return ParsedName(path[:start] + key, match["channel"], _metadata(match))


def _metadata(match: re.Match[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    groups = match.groupdict()
    for name, text in groups.items():
        if text is None or name in ("channel", "row", "col") or _CUT.fullmatch(name):
            continue
        column = _METADATA.get(name.lower(), name)
        if column == "Well":
            text = format_well(text)
        elif text.isdecimal() and column != "Plate":
            text = text.lstrip("0") or "0"
        found["Metadata_" + column] = text
    row, col = groups.get("row"), groups.get("col")
    if row is not None and col is not None and "Metadata_Well" not in found:
        letters = row_letters(int(row)) if row.isdecimal() else row
        found["Metadata_Well"] = format_well(letters + col)
    else:
        found |= {f"Metadata_{name}": text for name, text in (("Row", row), ("Col", col)) if text is not None}
    return found


def row_letters(row: int) -> str:
    """Plate row 1 -> "A", 26 -> "Z", 27 -> "AA" (1536-well plates)."""
    if row < 1:
        return str(row)
    letters = ""
    while row > 0:
        row, rest = divmod(row - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


def format_well(text: str) -> str:
    """ "c3" and "C03" -> "C03"; what is no letter-number name stays as it is."""
    match = _WELL.fullmatch(text)
    return f"{match[1].upper()}{int(match[2]):02d}" if match else text


def detect(names: list[str]) -> Pattern | None:
    """The shipped pattern that all file names of a folder match (ignored ones aside), or None."""
    for pattern in SHIPPED.values():
        wanted = [name for name in names if not (pattern.ignore and pattern.ignore.fullmatch(name))]
        if wanted and all(len(name) <= MAX_NAME and pattern.regex.fullmatch(name) for name in wanted):
            return pattern
    return None
