"""Which layout a source has, told from the names of its files; when several fit, the user says."""

from __future__ import annotations

from collections import defaultdict

from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest
from dinoray.io.annotations import dsb
from dinoray.io.annotations.found import files_of
from dinoray.io.grouping import relative_to
from dinoray.io.objects import label_keys

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
        return "pairs"
    items, listing = files_of(source.images)
    paths = [relative_to(listing.root, item.files[0].uri) for item in items]
    fits = [kind for kind, tell in (("dsb", _is_dsb), ("cellpose", _is_cellpose)) if tell(paths)]
    if len(fits) != 1:
        what = f"the layout may be {' or '.join(fits)}" if fits else "no layout is recognised"
        known = "; ".join(f"{kind}: {layout}" for kind, layout in KINDS.items())
        raise BadRequest(what, where=source.images, todo=f"say `kind`, one of {known}")
    return fits[0]


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
