"""The regions of a context-fusion training: listed with the versions of their files, opened, looked at before the first step."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from dinoray.config.fusion import TrainContextFusionJob
from dinoray.config.volume_labels import LabelledVolume
from dinoray.errors import BadRequest
from dinoray.io.items import FileRef
from dinoray.io.stores import Store
from dinoray.io.volume_grid import Triple
from dinoray.training.volume_regions import Region
from dinoray.volume_tokens import tokens_fingerprint
from dinoray.wording import plural

SURVEY_KEY = "_dinoray/survey-volumes.json"
BLOCKS = 256
"""Boxes of labels of a region that are counted, at most, evenly among all."""
SIDE = 64
_LEVEL = re.compile(r"(^|/)s?\d+$")


@dataclass(frozen=True)
class ListedVolume:
    """A region as the listing saw it (kinds.Listed)."""

    image_id: str
    files: tuple[FileRef, ...]
    source: int
    box: tuple[Triple, Triple]
    """Corner and extent in nm."""
    tokens: tuple[tuple[str, str], ...] = ()
    """Stored tokens by setting, as fingerprints."""
    dataset: str = ""
    """Path of raw inside its container, without the name of a level of a pyramid (`s0`, `1`)."""


def listed(sources: Sequence[LabelledVolume]) -> list[ListedVolume]:
    """The regions of a set. Raises BadRequest for volumes that cannot be opened or do not fit each other."""
    found = []
    for number, source in enumerate(sources):
        region = Region(source, keep_bytes=0, scaling_sample=0)
        try:
            grid = region.raw_grid
            corner: Triple = tuple(f - p / 2 for f, p in zip(grid.first_nm, grid.pitch_nm, strict=True))  # type: ignore[assignment]
            tokens = tuple((name, tokens_fingerprint(url, name)) for name in ("tokens", "context_tokens")
                           if (url := getattr(source, name)) is not None)
            found.append(ListedVolume(f"{source.raw.rstrip('/').rsplit('/', 1)[-1]}[{source.region or 'all'}]",
                                      (region.raw_volume.ref, region.label_volume.ref), number, (corner, grid.extent_nm), tokens,
                                      _LEVEL.sub("", (source.raw_dataset or "").strip("/"))))
        finally:
            region.close()
    return found


def digest(volumes: Sequence[ListedVolume]) -> str:
    """32 hex digits over the regions and the versions of their files."""
    hasher = blake2b(digest_size=16)
    for volume in volumes:
        files = [(file.uri, file.size, file.version) for file in volume.files]
        hasher.update(repr((volume.source, volume.image_id, volume.box, files, volume.tokens)).encode())
    return hasher.hexdigest()


def _may_be_one(a: ListedVolume, b: ListedVolume) -> bool:
    """Whether two regions may be of one volume: of one file or folder, or one inside the other's, and not of two datasets there."""
    one, other = (volume.files[0].uri.rstrip("/") + "/" for volume in (a, b))
    return (one.startswith(other) or other.startswith(one)) and (a.dataset == b.dataset or "" in (a.dataset, b.dataset))


def refuse_shared(train: Sequence[ListedVolume], validation: Sequence[ListedVolume]) -> None:
    """Raise BadRequest when a voxel of raw is in both sets: what is validated on must not have been seen, by a context neither."""
    for a in train:
        for b in validation:
            if not _may_be_one(a, b):
                continue
            apart = any(p + e <= q + 1e-6 or q + f <= p + 1e-6 for p, e, q, f in zip(*a.box, *b.box, strict=True))
            if not apart:
                raise BadRequest(f"the regions {a.image_id} and {b.image_id} share voxels", where="validation",
                                 todo="choose `region`s that do not meet; leave a gap as wide as what is alike in your volume")


def context_pixel(region: Region, factor: int) -> Triple:
    """Side of the pixels of a context's slices: as many of them as the crop has raw voxels, over `factor` times its width."""
    return tuple(p * factor for p in region.raw_grid.pitch_nm)  # type: ignore[return-value]


def opened(job: TrainContextFusionJob, sources: Sequence[LabelledVolume], share: float, digest: str | None = None) -> list[Region]:
    """The regions of a set, to be sampled, with `share` of cache_bytes. Raises BadRequest.

    `digest`: of the backbone whose stored tokens are read; None leaves them closed.
    """
    found = []
    for name, used in (("tokens", job.inputs != "raw"), ("context_tokens", job.fusion != "none")):
        given = sum(getattr(source, name) is not None for source in sources)
        if given and not used:
            raise BadRequest(f"the model looks at no {name.replace('_', ' ')}", where=name,
                             todo="leave them out, or change inputs or fusion")
        if 0 < given < len(sources):
            raise BadRequest(f"{given} of {plural(len(sources), 'region')} have stored {name.replace('_', ' ')}", where=name,
                             todo="give them for all regions of a set, or for none")
    for source in sources:
        pixel = None
        if job.fusion != "none":
            first = Region(source, keep_bytes=0, scaling_sample=0)
            pixel = context_pixel(first, job.context_factor)
            first.close()
        found.append(Region(source, keep_bytes=int(share * job.cache_bytes / len(sources) / 3), context_nm=pixel,
                            scaling_sample=job.scaling_sample))
        if digest is not None:
            found[-1].attach(digest, job.context_factor)
    sizes = {(r.raw_grid.pitch_nm, r.label_grid.pitch_nm) for r in found}
    if len({tuple(round(v, 3) for pitch in size for v in pitch) for size in sizes}) > 1:
        raise BadRequest("the regions have voxels of different sizes: " + "; ".join(sorted(
            f"raw {a} nm, labels {b} nm" for a, b in sizes)),
                         where="train", todo="choose levels by raw_voxel_size and label_voxel_size")
    return found


def survey(job: TrainContextFusionJob, store: Store, say: Callable[[str], None], check: Callable[[], None]) -> dict[str, Any]:
    """Labels counted over the training regions: `counts` of the classes, or `instances` per region.

    Raises BadRequest for labels that are no classes of the job and for regions without anything.
    """
    try:
        return json.loads(store.get(SURVEY_KEY))
    except FileNotFoundError:
        pass
    counts, instances, complete = np.zeros(len(job.classes), np.int64), [], True
    for name, sources in (("train", job.train), ("validation", job.validation)):
        for number, source in enumerate(sources):
            region = Region(source, keep_bytes=0, scaling_sample=0)
            say(f"looking at the labels of {source.labels}")
            found, all_counted = _counted(region, check)
            complete &= all_counted
            region.close()
            if not found:
                raise BadRequest(f"not one voxel of {BLOCKS} boxes spread over the region has a label",
                                 where=f"{name}.{number}", todo="choose another region")
            if job.target == "classes" and (max(found) >= len(job.classes) or min(found) < 0):
                raise BadRequest(f"labels {min(found)}..{max(found)}, but {plural(len(job.classes), 'class')} "
                                 f"(0..{len(job.classes) - 1})", where=f"{name}.{number}",
                                 todo="name all classes in `classes`, and the label of unknown voxels in `unknown`")
            if name == "train":
                if job.target == "classes":
                    np.add.at(counts, list(found), list(found.values()))
                instances.append(sum(1 for label in found if label))
    if job.target == "classes":
        for k, name in enumerate(job.classes):
            if not counts[k]:
                say(f"class {k} ({name}) does not occur in the training regions: nothing can be learned of it" if complete else
                    f"class {k} ({name}) does not occur in the boxes of the training regions that were counted: taken as rare")
        if not counts[1:].any():
            raise BadRequest("the training regions hold background alone", where="train", todo="choose regions with labels")
        if not complete:  # a class that only the other boxes have must not get the weight of one that is not there
            counts = np.maximum(counts, 1)
    elif not sum(instances):
        raise BadRequest("the training regions hold no instance", where="train", todo="choose regions with labels")
    result = {"counts": counts.tolist(), "instances": instances}
    store.put(SURVEY_KEY, json.dumps(result).encode())
    return result


def _counted(region: Region, check: Callable[[], None]) -> tuple[dict[int, int], bool]:
    """(label -> voxels, over at most BLOCKS boxes spread evenly over a region; whether these are all)."""
    shape = region.label_grid.shape
    per_axis = tuple(-(-n // SIDE) for n in shape)
    chosen = np.unique(np.linspace(0, int(np.prod(per_axis)) - 1, BLOCKS).round().astype(np.int64))
    places = [tuple(int(i) * SIDE for i in place) for place in zip(*np.unravel_index(chosen, per_axis), strict=True)]
    found: dict[int, int] = {}
    for place in places:
        check()
        labels, known = region.labels(place, tuple(min(SIDE, n - p) for n, p in zip(shape, place, strict=True)))  # type: ignore[arg-type]
        for label, count in zip(*(v.tolist() for v in np.unique(labels[known], return_counts=True)), strict=True):
            found[label] = found.get(label, 0) + count
    return found, len(places) == int(np.prod(per_axis))
