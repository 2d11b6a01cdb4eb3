"""OME-XML of a TIFF -> which page is which (T, Z, C) plane, channel names, pixel size.

tifffile can do this too, but it trusts the XML: it makes lists of the sizes that the XML declares, opens
the other files of a set, and fills planes that it does not find with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from dinoray.errors import ItemError
from dinoray.io.decoded import Limits, check_limits

_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4,
       "m": 1e6, "å": 1e-4, "pm": 1e-6,
       "micrometer": 1.0, "micrometre": 1.0, "nanometer": 1e-3, "nanometre": 1e-3, "millimeter": 1e3,
       "millimetre": 1e3, "centimeter": 1e4, "meter": 1e6, "angstrom": 1e-4, "picometer": 1e-6}
"""The short forms are those of OME-XML and ImageJ, the words those of OME-Zarr."""
_MAX_XML = 2**26
"""Characters; parsed XML takes some ten times as many bytes."""


@dataclass(frozen=True)
class OmePlanes:
    """The planes of the one OME image that lies in a file: {(t, z, c): page index}."""

    planes: dict[tuple[int, int, int], int]
    names: dict[int, str]
    """Channel index -> name, for the channels that have one."""
    pixel_size_um: float | None
    height: int
    width: int
    voxel_size_um: tuple[float | None, float | None, float | None] = (None, None, None)
    """PhysicalSizeZ, Y, X."""


def to_um(value: str | float | None, unit: str) -> float | None:
    """A length in µm; None for relative units (pixel, reference frame), no value or a value not > 0."""
    factor = _UM.get(unit.strip().lower())
    if value is None or factor is None:
        return None
    try:
        size = float(value) * factor
    except ValueError:
        return None
    return size if 0 < size < float("inf") else None


def isotropic(x_um: float | None, y_um: float | None) -> float | None:
    """The common in-plane size in µm; None when unknown or when X and Y differ by over 1 %."""
    if x_um is None or y_um is None or abs(x_um - y_um) > 0.01 * max(x_um, y_um):
        return None
    return x_um


def read_planes(xml: str, num_pages: int, uri: str, limits: Limits) -> OmePlanes | None:
    """The planes of the OME image in this file of `num_pages` pages.

    None when the XML only points to a companion file. Planes in other files of a multi-file set are not
    this file's, and left out. Raises ItemError: `truncated` when a page is missing, `stack` for several
    images in one file, `too_large`, `unsupported` (document types), `decode` (damaged XML).
    """
    if len(xml) > _MAX_XML:
        raise ItemError("too_large", f"{len(xml):,} characters of OME-XML", where=uri)
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise ItemError("unsupported", "OME-XML with a document type (entity expansion)", where=uri)
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ItemError("decode", f"the OME-XML is damaged: {error}", where=uri) from error
    images = [p for image in root if _tag(image) == "Image" for p in image if _tag(p) == "Pixels"]
    if not images and any(_tag(element) == "BinaryOnly" for element in root):
        return None
    mine = [pixels for pixels in images if _blocks(pixels, root, images, uri)]
    if len(mine) != 1:
        reason = "stack" if mine else "decode"
        raise ItemError(reason, f"the OME-XML describes {len(mine)} images in this file", where=uri,
                        todo="write one image per file" if mine else "")
    return _planes(mine[0], _blocks(mine[0], root, images, uri), num_pages, uri, limits)


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _blocks(pixels: Any, root: Any, images: list[Any], uri: str) -> list[dict[str, str]]:
    """Attributes of the TiffData elements that lie in this file; one empty block when there are none."""
    blocks = [data for data in pixels if _tag(data) == "TiffData"]
    if not blocks:
        return [{}]
    uuids = {u.text for p in images for d in p if _tag(d) == "TiffData" for u in d if _tag(u) == "UUID"}
    own, name = root.get("UUID"), uri.rpartition("/")[2]
    found = []
    for block in blocks:
        uuid = next((u for u in block if _tag(u) == "UUID"), None)
        # a single UUID is this file even when the file was renamed
        here = uuid is None or len(uuids) == 1 or uuid.text == own
        if here or own is None and uuid.get("FileName") == name:
            found.append(dict(block.attrib))
    return found


def _planes(pixels: Any, blocks: list[dict[str, str]], num_pages: int, uri: str, limits: Limits) -> OmePlanes:
    try:
        order = pixels.attrib["DimensionOrder"][2:]
        sizes = {axis: int(pixels.attrib[f"Size{axis}"]) for axis in "XYZCT"}
        channels = [c for c in pixels if _tag(c) == "Channel"]
        samples = int(channels[0].get("SamplesPerPixel", 1)) if channels else 1
        sizes["C"] //= max(1, samples)
        if sorted(order) != ["C", "T", "Z"] or min(sizes.values()) < 1:
            raise ValueError(f"order {order}, sizes {sizes}")
        check_limits(uri, limits, height=sizes["Y"], width=sizes["X"], samples=max(1, samples))
        planes: dict[tuple[int, int, int], int] = {}
        for block in blocks:
            _add_block(planes, block, order, sizes, num_pages, uri)
    except (KeyError, ValueError) as error:
        raise ItemError("decode", f"the OME-XML is not understood: {error!r}", where=uri) from error
    names = {i: c.attrib["Name"] for i, c in enumerate(channels) if c.get("Name")}
    z, y, x = (to_um(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "ZYX")
    return OmePlanes(planes, names, isotropic(x, y), sizes["Y"], sizes["X"], (z, y, x))


def _add_block(
    planes: dict[tuple[int, int, int], int], block: dict[str, str], order: str, sizes: dict[str, int],
    num_pages: int, uri: str,
) -> None:
    """Enter the planes of one TiffData block: consecutive in `order`, on consecutive pages."""
    first = {axis: int(block.get(f"First{axis}", 0)) for axis in "CZT"}
    page = int(block.get("IFD", 0))
    total = sizes["C"] * sizes["Z"] * sizes["T"]
    at = first[order[0]] + sizes[order[0]] * (first[order[1]] + sizes[order[1]] * first[order[2]])
    if page < 0 or not 0 <= at < total or any(not 0 <= first[axis] < sizes[axis] for axis in "CZT"):
        raise ValueError(f"TiffData {block}")
    count = int(block.get("PlaneCount", block.get("NumPlanes", 1 if "IFD" in block else total - at)))
    for step in range(min(count, total - at)):
        if page + step >= num_pages:  # also what ends the loop when the XML declares 10^9 planes
            raise ItemError("truncated", f"the OME-XML promises {total} planes, the file holds {num_pages}",
                            where=uri)
        where, rest = {}, at + step
        for axis in order:
            rest, where[axis] = divmod(rest, sizes[axis])
        planes[where["T"], where["Z"], where["C"]] = page + step
