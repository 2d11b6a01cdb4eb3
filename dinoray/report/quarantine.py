"""Quarantined inputs by reason: how many, the first of them, and what to do."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from dinoray.report.pictures import one_line
from dinoray.report.run import Run

EXAMPLES = 5
"""Items shown per reason."""

TODO = {
    "missing": "The file is not there. Restore it, or take it off the manifest.",
    "changed": "The file was replaced after it was listed: retry takes it as it is now.",
    "empty": "0 bytes: copy or export the file again.",
    "truncated": "The file ends early, usually an interrupted copy: copy it again.",
    "decode": "The file is damaged, or its writer is unusual: open it elsewhere, export it again.",
    "not_image": "Not an image: take it out of the folder, or narrow SRC with a glob (*.tif).",
    "unsupported": "Convert to OME-TIFF or PNG (for instance with bfconvert).",
    "stack": "A stack, and one plane is wanted: `--z-projection max` or middle for focus stacks, else split it.",
    "too_large": "Above a limit that guards memory: raise `--max-pixels` or `--max-file-bytes` if the size is real.",
    "too_small": "Smaller than one patch: `--size resize`, or leave such images out.",
    "channel_count": "Not the channels that the pattern, manifest or `--channels` asks for: complete the set, or "
                     "correct `--channels` or `--pattern`.",
    "shape": "The channels of one field differ in size or type: check the export of that field.",
    "duplicate_id": "An earlier input has the same id: give each its own id in the manifest.",
    "nan": "NaN or infinity among the pixels: fill or mask them.",
    "constant": "One value everywhere, nothing to see: check the acquisition.",
    "no_scaling": "None of the sampled images of that plate and channel could be read: raise `--scaling-sample`, or "
                  "use `--scaling image`.",
    "pixel_size": "A size in µm needs the pixel size: give `--pixel-size-um`.",
    "nonfinite": "The features came out as NaN or infinity: use `--precision float32`.",
    "scale": "Too far from the scale of the model's training: give the cells' size by `--diameter-px`, or `--pixel-size-um`.",
    "overflow": "Features beyond float16: use float32 for `--vector-dtype` or `--dense-dtype`.",
    "device_memory": "One image is too large for the device: `--size tiles`, or a smaller `--tile-px`.",
    "no_pixel_size": "A crop in µm needs the pixel size: give `--pixel-size-um`.",
    "crashed": "The process that worked on this image alone died twice: open it elsewhere, export it again.",
    "timeout": "No sign of life while this image was worked on alone, twice: open it elsewhere, export it again.",
    "bad_path": "The table names a path that is not allowed: mend that row.",
    "bad_id": "The id cannot be stored: rename the file, or give the id in a manifest.",
    "pattern_mismatch": "The file's name does not match `--pattern`: rename it, or narrow SRC with a glob.",
    "duplicate_channel": "Two files for one channel of a field: remove one, or correct `--pattern`.",
    "missing_labels": "No label image of this name: make it, or correct its name.",
    "ambiguous_labels": "Several label images fit: keep one, or name them in a manifest.",
    "bad_labels": "Labels are 2D images of integers, one value for each cell: export them so.",
    "missing_tokens": "Slabs of planes that it is made of are quarantined: mend those, then `dinoray retry OUT` for all reasons.",
    "bad_centroids": "Coordinates or ids in the table cannot be used: mend those rows.",
}


RETRY = frozenset({"missing", "changed", "empty", "truncated", "decode", "channel_count", "no_scaling", "shape", "nan", "constant",
                   "device_memory", "crashed", "timeout", "duplicate_channel", "missing_labels", "ambiguous_labels",
                   "bad_labels"})
"""Reasons that the same settings can mend, once the files (or the machine) are in order."""


@dataclass
class Reason:
    """One reason: how many inputs, what to do, and the first ones as (item id, message)."""

    name: str
    count: int
    todo: str
    retry: str = ""
    """The command that tries these inputs again after they were mended; empty where other settings are needed."""
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PlateLoss:
    """What a plate lost: planned inputs of its finished units, quarantined ones, and their share."""

    plate: str
    items: int
    quarantined: int

    @property
    def share(self) -> float:
        """Quarantined inputs as a share of all."""
        return self.quarantined / max(1, self.items)


def quarantine_reasons(run: Run) -> list[Reason]:
    """What is quarantined by the latest receipts, by reason, most frequent first, with the first items in plan
    order. Raises OutputDamaged when a quarantine table that a receipt names is missing."""
    out, reasons = shlex.quote(run.store.url), {}
    for row in run.quarantined.to_pylist():
        name = row["reason"]
        reason = reasons.get(name)
        if reason is None:
            retry = f"dinoray retry {out} --reason {shlex.quote(name)}" if name in RETRY else ""
            reason = reasons[name] = Reason(name, 0, TODO.get(name, "See the message."), retry)
        reason.count += 1
        if len(reason.examples) < EXAMPLES:
            reason.examples.append((row["item_id"], one_line(row["message"])))
    return sorted(reasons.values(), key=lambda reason: (-reason.count, reason.name))


def plates_by_loss(run: Run) -> list[PlateLoss]:
    """The plates with quarantined inputs, the largest share first."""
    found = [PlateLoss(name, items, bad) for name, (items, bad) in run.tally.plates.items() if name and bad > 0]
    return sorted(found, key=lambda loss: (-loss.share, loss.plate))
