"""A LabelledSource -> its labelled images: the layout told, the ids chosen, everything wrong said at once."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable

from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest
from dinoray.io.annotations.coco import CocoObjects, list_coco
from dinoray.io.annotations.ctc import list_ctc
from dinoray.io.annotations.dsb import list_dsb
from dinoray.io.annotations.found import Found
from dinoray.io.annotations.headers import declared_sides
from dinoray.io.annotations.kinds import kind_of
from dinoray.io.annotations.labelled import LabelledImage
from dinoray.io.annotations.pairs import list_cellpose, list_pairs
from dinoray.io.stores import read_bytes

logger = logging.getLogger(__name__)

_LISTERS: dict[str, Callable[[LabelledSource], list[Found]]] = {
    "pairs": list_pairs, "cellpose": list_cellpose, "dsb": list_dsb, "coco": list_coco, "ctc": list_ctc,
}
_NAMED = 5
"""Images that a message names."""


def list_labelled(source: LabelledSource, *, index: int = 0, check_all: bool = False) -> list[LabelledImage]:
    """The labelled images of a source, sorted by image_id (code points). No pixel is read.

    index: the source's number in the job. check_all: compare the sides of images and labels by their headers, where these
    are cheap to read (local PNG and TIFF); else `LabelledImage.read` finds out.
    Raises BadRequest for what does not exist or fits no layout, or several; for images without labels or with several
    (up to five are named), for one id twice, for ids that are not there; TransientError, SystemicError for storage trouble.
    """
    kind = kind_of(source) if source.kind == "auto" else source.kind
    found = _chosen(_LISTERS[kind](source), source)
    twice = [image_id for image_id, n in Counter(image.image_id for image in found).items() if n > 1]
    _refuse(twice, len(found), "images have an id that another has too (names differ in the extension only)", source)
    broken = [f"{image.image_id}: {image.problem}" for image in found if image.problem or image.truth is None]
    _refuse(broken, len(found), f"images cannot be used as {kind}", source)
    images = [LabelledImage(image.image_id, (*image.item.files, *image.truth.files), index, image.group, source.pixel_size_um,
                            image.item, image.truth, source.channel) for image in found if image.truth is not None]
    if check_all:
        differ = [text for image in images if (text := _sides_differ(image))]
        _refuse(differ, len(images), "images have labels of another size", source)
    return sorted(images, key=lambda image: image.image_id)


def _sides_differ(image: LabelledImage) -> str | None:
    """What the headers say against an image and its labels; None when nothing."""
    sides = declared_sides(image.item.files[0])
    if isinstance(image.truth, CocoObjects):
        labels = {(image.truth.image.height, image.truth.image.width)}
    else:
        labels = {declared_sides(file) for file in image.truth.files}
    others = sorted(found for found in labels if found not in (None, sides))
    if sides is None or not others:
        return None
    return f"{image.image_id}: {sides[0]} x {sides[1]} px, its labels {others[0][0]} x {others[0][1]}"


def _refuse(names: list[str], total: int, what: str, source: LabelledSource) -> None:
    if names:
        shown = "; ".join(sorted(names)[:_NAMED]) + (f"; and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
        raise BadRequest(f"{len(names):,} of {total:,} {what}: {shown}", where=source.images,
                         todo="mend or remove them, or choose others with `ids`; layouts: docs/training-data.md")


def _chosen(found: list[Found], source: LabelledSource) -> list[Found]:
    """The images that `ids` asks for; of a list in a file the source may hold a part."""
    if source.ids is None:
        return found
    wanted = set(source.ids) if isinstance(source.ids, tuple) else set(ids_of_file(source.ids))
    chosen = [image for image in found if image.image_id in wanted]
    missing = sorted(wanted - {image.image_id for image in chosen})
    if not chosen or missing and isinstance(source.ids, tuple):
        example = f"; it has ids like {found[0].image_id!r}" if found else ""
        raise BadRequest(f"{len(missing):,} of {len(wanted):,} ids are not in the source: {', '.join(missing[:_NAMED])}{example}",
                         where=source.images, todo="check `ids`")
    if missing:
        logger.info("%s holds %d of the %d images of %s", source.images, len(chosen), len(wanted), source.ids)
    return chosen


def ids_of_file(reference: str) -> list[str]:
    """The list of ids at `FILE.json#key/key`. Raises BadRequest when it is not there or is none."""
    path, _, keys = reference.partition("#")
    try:
        value = json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise BadRequest("no such file of ids", where=path, todo="check `ids`") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the file of ids is no JSON: {error}", where=path) from error
    for key in keys.split("/"):
        if not isinstance(value, dict) or key not in value:
            known = f"; known: {', '.join(sorted(value))}" if isinstance(value, dict) else ""
            raise BadRequest(f"no key {key!r}{known}", where=reference, todo="FILE.json#key/key names a list of ids")
        value = value[key]
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise BadRequest("not a list of ids (texts)", where=reference, todo="FILE.json#key/key names a list of ids")
    return value
