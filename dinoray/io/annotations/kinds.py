"""Which layout a source has, told from the names of its files; when several fit, the user says."""

from __future__ import annotations

import re
from collections import defaultdict

from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest
from dinoray.io.annotations import ctc, dsb
from dinoray.io.annotations.found import files_of
from dinoray.io.grouping import relative_to
from dinoray.io.objects import label_keys
from dinoray.io.storage_errors import storage_errors
from dinoray.io.stores import filesystem, on_inputs
from dinoray.io.walk import has_magic

_HEAD_BYTES = 65_536
_COCO = re.compile(rb'"(?:images|annotations)"\s*:\s*[\[{]')

KINDS = {
    "pairs": "images and label images of the same names in two folders (give `labels`)",
    "cellpose": "NNN_img.png with NNN_masks.png, or x.tif with x_cp_masks.tif, in one folder",
    "dsb": "<id>/images/<id>.png with <id>/masks/*.png",
    "coco": "a folder of images with a COCO JSON (as `labels`, or the only .json in the folder)",
    "ctc": "01/t000.tif with 01_GT/SEG/man_seg000.tif",
}


def kind_of(source: LabelledSource) -> str:
    """The layout of a source of kind `auto`. Raises BadRequest, with the list, when none or more than one fits."""
    if source.labels is not None:
        return _kind_by_labels(source.labels)
    items, listing = files_of(source.images)
    paths = [relative_to(listing.root, item.files[0].uri) for item in items]
    fits = [kind for kind, tell in (("dsb", _is_dsb), ("cellpose", _is_cellpose), ("ctc", _is_ctc)) if tell(paths)]
    if _has_coco_json(source):
        fits.append("coco")
    if len(fits) != 1:
        what = f"the layout may be {' or '.join(fits)}" if fits else "no layout is recognised"
        known = "; ".join(f"{kind}: {layout}" for kind, layout in KINDS.items())
        raise BadRequest(what, where=source.images, todo=f"say `kind`, one of {known}")
    return fits[0]


def _kind_by_labels(labels: str) -> str:
    """Of a source that says where its labels are."""
    if labels.lower().endswith(".json"):
        return "coco"
    files = [item.files[0].uri for item in files_of(labels)[0]]
    return "ctc" if all(ctc.SEG.fullmatch(uri) for uri in files) else "pairs"


def _is_ctc(paths: list[str]) -> bool:
    return any(ctc.SEG.fullmatch(path) for path in paths)


def _has_coco_json(source: LabelledSource) -> bool:
    """Whether a .json below the images begins like a COCO file: not every folder's notes in JSON make it one."""
    if has_magic(source.images):
        return False
    try:
        items, _ = files_of(f"{source.images.rstrip('/')}/**/*.json")
    except BadRequest:  # there is none
        return False
    return any(_COCO.search(_head(item.files[0].uri)) for item in items)


def _head(uri: str) -> bytes:
    with storage_errors(uri):
        path = filesystem(uri)[1]
        return on_inputs(uri, lambda fs: fs.cat_file(path, start=0, end=_HEAD_BYTES))


def _is_dsb(paths: list[str]) -> bool:
    parts = defaultdict(set)
    for path in paths:
        place = dsb.split(path)
        if place is not None:
            parts[place[0]].add(place[1])
    return any(len(found) == 2 for found in parts.values())


def _is_cellpose(paths: list[str]) -> bool:
    stems = {stem for path in paths for rank, stem in label_keys(path) if rank == 1}
    owners = {stem for path in paths for rank, stem in label_keys(path) if rank == 0}
    return bool(owners & (stems | {stem.removesuffix("_img") for stem in stems}))
