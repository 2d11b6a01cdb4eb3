"""Cell Tracking Challenge folders: frames `01/t000.tif`, segmentations `01_GT/SEG/man_seg000.tif` of some of them."""

from __future__ import annotations

import logging
import posixpath
import re

from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest
from dinoray.io.annotations.found import Found, files_of
from dinoray.io.annotations.label_files import LabelFile
from dinoray.io.grouping import relative_to
from dinoray.io.items import FileRef
from dinoray.io.objects import image_stem

logger = logging.getLogger(__name__)

_FRAME = re.compile(r"(?P<above>.*?)(?P<sequence>\d\d)/t(?P<frame>\d+)\.tiff?", re.IGNORECASE)
SEG = re.compile(r"(?P<above>.*?)(?P<sequence>\d\d)_(?P<truth>GT|ST)/SEG/man_seg(?P<frame>\d+)\.tiff?", re.IGNORECASE)
_SLICE = re.compile(r".*_(?:GT|ST)/SEG/man_seg_\d+_\d+\.tiff?", re.IGNORECASE)
_Key = tuple[str, str, int]
"""Folder above, sequence, frame."""


def list_ctc(source: LabelledSource) -> list[Found]:
    """The frames with a segmentation: gold truth (`_GT`), or what `labels` names (`01_ST/SEG`, `*_ST/SEG`).

    Raises BadRequest for slices of 3D truth, for truth without its frame, and when no frame has one.
    """
    items, listing = files_of(source.images)
    truth = _truth([item.files[0] for item in items] if source.labels is None
                   else [item.files[0] for item in files_of(source.labels)[0]], gold_only=source.labels is None)
    if not truth:
        raise BadRequest("no 01_GT/SEG/man_seg000.tif", where=source.labels or source.images,
                         todo="name the folder that holds 01 and 01_GT, or the SEG folder as `labels`")
    found, frames = [], 0
    for item in items:
        match = _FRAME.fullmatch(item.files[0].uri)
        if match is None:
            continue
        frames += 1
        file = truth.pop((match["above"], match["sequence"], int(match["frame"])), None)
        if file is not None:
            path = relative_to(listing.root, item.files[0].uri)
            found.append(Found(image_stem(path), item, posixpath.dirname(path) or ".", LabelFile(file), item.problem))
    if truth:
        names = ", ".join(file.uri for _, file in sorted(truth.items())[:5])
        raise BadRequest(f"{len(truth):,} segmentations without their frame: {names}", where=source.images,
                         todo="a segmentation 01_GT/SEG/man_seg000.tif belongs to 01/t000.tif beside 01_GT")
    logger.info("%s: %d of %d frames have a segmentation", source.images, len(found), frames)
    return found


def _truth(files: list[FileRef], *, gold_only: bool) -> dict[_Key, FileRef]:
    truth: dict[_Key, FileRef] = {}
    for file in files:
        if _SLICE.fullmatch(file.uri):
            raise BadRequest("a segmentation of one slice of a 3D frame", where=file.uri, todo="2D sequences only")
        match = SEG.fullmatch(file.uri)
        if match is None or gold_only and match["truth"].upper() != "GT":
            continue
        key = (match["above"], match["sequence"], int(match["frame"]))
        if key in truth:
            raise BadRequest(f"two segmentations of one frame: {truth[key].uri}", where=file.uri,
                             todo="name one kind of truth as `labels`, such as ROOT/*_ST/SEG")
        truth[key] = file
    return truth
