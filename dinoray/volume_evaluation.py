"""How good are the labels of a volume? Two label volumes -> scores, block by block, so that neither need fit in memory.

Both are placed by their own voxel sizes and translations in nm; they must lie on one grid. What the prediction does not cover
counts as background, unless only a region is asked for. Definitions: docs/evaluation.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from math import prod
from typing import Any

import numpy as np

from dinoray.errors import BadRequest, ItemError
from dinoray.io.stores import open_store
from dinoray.io.volume_grid import Shape
from dinoray.io.volumes import Volume, VolumeRequest, open_volume
from dinoray.vision.volume_metrics import (
    ClassScore,
    Contingency,
    InstanceScore,
    average_precision,
    class_scores,
    confusion,
    instance_score,
)

BLOCK = 256
"""Voxels a side of what is in memory of both."""


@dataclass(frozen=True)
class VolumeEvaluation:
    """The scores of a volume, with what they were made with. `classes` or `instances`, whichever was asked for."""

    voxels: int
    """Voxels with ground truth."""
    classes: list[ClassScore] = field(default_factory=list)
    instances: InstanceScore | None = None
    ap50: float = float("nan")
    """Objects matched at an IoU of 0.5 or more, over matched, missed and wrong ones."""
    true_objects: int = 0
    predicted_objects: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For a person."""
        lines = [f"{self.voxels:,} voxels with ground truth"]
        for score in self.classes:
            if score.true_voxels or score.predicted_voxels:
                lines.append(f"{score.name:<16} IoU {score.iou:.3f}  Dice {score.dice:.3f}  precision {score.precision:.3f}  "
                             f"recall {score.recall:.3f}  {score.true_voxels:,} true, {score.predicted_voxels:,} predicted voxels")
            else:
                lines.append(f"{score.name:<16} occurs neither in the truth nor in the prediction")
        if self.classes:
            known = [s.iou for s in self.classes[1:] if s.true_voxels]
            if known:
                lines.append(f"mean IoU of the {len(known)} classes of the truth but {self.classes[0].name}: {np.mean(known):.3f}")
        found = self.instances
        if found is not None:
            lines.append(f"{self.true_objects:,} true objects, {self.predicted_objects:,} predicted ones")
            lines.append(f"adapted Rand error {found.rand_error:.4f} (precision {found.rand_precision:.4f}, "
                         f"recall {found.rand_recall:.4f})")
            lines.append(f"variation of information {found.vi:.4f} bit: split {found.vi_split:.4f}, merge {found.vi_merge:.4f}")
            lines.append(f"AP at IoU 0.5 {self.ap50:.4f}")
        return lines

    def as_json(self) -> bytes:
        """All figures. NaN becomes null."""
        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, list):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and not np.isfinite(value) else value

        return (json.dumps(plain(asdict(self)), indent=1) + "\n").encode()


def open_labels(source: str, *, dataset: str | None = None, voxel_nm: Sequence[float] | None = None) -> Volume:
    """A label volume: a path or URL, or the --out of a `dinoray segment volume`. Raises BadRequest."""
    store = None
    try:
        store = open_store(source)
        is_output = store.exists("labels.zarr/zarr.json")
    except (BadRequest, OSError):
        is_output = False
    if is_output and store is not None and not store.exists("_SUCCESS"):
        raise BadRequest("this segmentation has not ended", where=source, todo="run its command again first")
    path = f"{source.rstrip('/')}/labels.zarr" if is_output else source
    size = None if voxel_nm is None else voxel_nm[0] if len(voxel_nm) == 1 else tuple(voxel_nm)
    volume = open_volume(VolumeRequest(path, raw_voxel_nm=size, dataset=dataset, mask=True))  # type: ignore[arg-type]
    if volume.dtype.kind not in "iub":
        volume.close()
        raise BadRequest(f"labels of the type {volume.dtype}", where=source, todo="give whole numbers")
    return volume


def evaluate_volume(pred: Volume, truth: Volume, *, classes: Sequence[str] = (), region: tuple[tuple[int, int], ...] | None = None,
                    unknown: int | None = None, settings: dict[str, Any] | None = None,
                    done: Callable[[int, int], None] = lambda n, of: None) -> VolumeEvaluation:
    """Scores of `pred` against `truth`: of `classes` by name, or of instances where none are named.

    region: of the truth, in its voxels, ((z0, z1), (y0, y1), (x0, x1)). unknown: label of the truth where nothing is known.
    Raises BadRequest for volumes on different grids or that do not meet, labels outside of `classes`, blocks that cannot be read.
    """
    shift = _shift(pred, truth)
    box = region or tuple((0, n) for n in truth.shape)
    if any(not 0 <= a < b <= n for (a, b), n in zip(box, truth.shape, strict=True)):
        raise BadRequest(f"a region of {box} in a volume of {truth.shape} voxels", where="--region",
                         todo="choose a box inside the truth")
    overlap = [min(b, s + n) - max(a, s) for (a, b), s, n in zip(box, shift, pred.shape, strict=True)]
    if min(overlap) <= 0:
        raise BadRequest("the prediction and the region of the truth do not meet", where=pred.ref.uri,
                         todo="check translations, voxel sizes and --region")
    table, pairs, voxels = np.zeros((len(classes),) * 2, np.int64), Contingency(), 0
    blocks = list(_blocks(box))
    for number, (start, stop) in enumerate(blocks, 1):
        (true, known), (found, _) = _read(truth, start, stop, (0, 0, 0), unknown), _read(pred, start, stop, shift)
        voxels += int(known.sum())
        if classes:
            try:
                table += confusion(found, true, len(classes), known)
            except ValueError as error:
                raise BadRequest(str(error), where="--classes", todo="name all classes, background first; leave --classes out for "
                                 "instances; --unknown leaves a label out") from error
        else:
            pairs.add(found, true, known)
        done(number, len(blocks))
    if not voxels:
        raise BadRequest("no voxel has ground truth", where=truth.ref.uri, todo="check --unknown and --region")
    if classes:
        return VolumeEvaluation(voxels, class_scores(table, list(classes)), settings=settings or {})
    overlaps = pairs.overlaps()
    return VolumeEvaluation(voxels, [], instance_score(pairs), average_precision(pairs), len(overlaps.truth_ids),
                            len(overlaps.pred_ids), settings or {})


def _shift(pred: Volume, truth: Volume) -> Shape:
    """Where the prediction begins, in voxels of the truth. Raises BadRequest."""
    for name, volume in (("prediction", pred), ("truth", truth)):
        if any(abs(a - b) > 0.01 * b for a, b in zip(volume.voxel_size_nm, truth.voxel_size_nm, strict=True)):
            raise BadRequest(f"the {name} has voxels of {pred.voxel_size_nm} nm, the truth of {truth.voxel_size_nm} nm",
                             where=volume.ref.uri,
                             todo="choose levels by --pred-voxel-size and --truth-voxel-size, or resample one")
    apart = [(a - b) / r for a, b, r in zip(pred.translation_nm, truth.translation_nm, truth.voxel_size_nm, strict=True)]
    if any(abs(a - round(a)) > 0.1 for a in apart):
        raise BadRequest(f"the prediction lies {', '.join(f'{a:.2f}' for a in apart)} voxels (z, y, x) beside the truth",
                         where=pred.ref.uri, todo="mend the translations: both must lie on one grid")
    return tuple(round(a) for a in apart)  # type: ignore[return-value]


def _blocks(box: tuple[tuple[int, int], ...]) -> Iterator[tuple[Shape, Shape]]:
    for start in product(*(range(a, b, BLOCK) for a, b in box)):
        yield start, tuple(min(s + BLOCK, b) for s, (_, b) in zip(start, box, strict=True))  # type: ignore[misc]


def _read(volume: Volume, start: Shape, stop: Shape, shift: Shape, unknown: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(labels int64, whether they are known) of a box in voxels of the truth; 0 outside of the volume, and where the label is
    `unknown`, which may be any that the volume's type holds. Raises BadRequest for what cannot be read."""
    found = np.zeros([b - a for a, b in zip(start, stop, strict=True)], np.int64)
    known = np.full(found.shape, unknown != 0)
    low = [max(a, s) for a, s in zip(start, shift, strict=True)]
    high = [min(b, s + n) for b, s, n in zip(stop, shift, volume.shape, strict=True)]
    if prod(max(0, b - a) for a, b in zip(low, high, strict=True)):
        try:
            values = volume.read(*(slice(a - s, b - s) for a, b, s in zip(low, high, shift, strict=True)))
        except ItemError as error:
            raise BadRequest(f"labels cannot be read: {error.what}", where=error.where,
                             todo="mend the file, or choose a --region") from error
        is_known = np.ones(values.shape, bool) if unknown is None else values != unknown
        values = np.where(is_known, values, values.dtype.type(0))
        if values.dtype == np.uint64 and values.size and int(values.max()) >= 2**63:
            raise BadRequest("labels above 2^63", where=volume.ref.uri, todo="renumber them")
        box = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        found[box], known[box] = values, is_known
    return found, known
