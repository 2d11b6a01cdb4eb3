"""Quarantined inputs by reason: how many, the first of them, and what to do."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from dinoray.errors import OutputDamaged
from dinoray.report.pictures import one_line
from dinoray.report.sample import Run

EXAMPLES = 5
"""Items shown per reason."""
MAX_TABLES = 200
"""Quarantine tables read at most while looking for examples."""

TODO = {
    "missing": "The file is not there. Restore it, or take it off the manifest.",
    "changed": "The file was replaced after it was listed. Use a new `--out` for the new files.",
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
    "overflow": "Features beyond float16: use float32 for `--vector-dtype` or `--dense-dtype`.",
    "device_memory": "One image is too large for the device: `--size tiles`, or a smaller `--tile-px`.",
    "poison": "The process died on this image twice while others were fine: look at it apart.",
}


@dataclass
class Reason:
    """One reason: how many inputs, what to do, and the first ones as (item id, message)."""

    name: str
    count: int
    todo: str
    examples: list[tuple[str, str]] = field(default_factory=list)


def quarantine_reasons(run: Run) -> list[Reason]:
    """All reasons, most frequent first, with the first items in plan order.

    Raises OutputDamaged when a quarantine table that a receipt names is missing.
    """
    counts = sorted(run.tally.reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    reasons = {name: Reason(name, count, TODO.get(name, "See the message.")) for name, count in counts}
    wanted = {name: min(EXAMPLES, reason.count) for name, reason in reasons.items()}
    for unit in run.with_quarantine[:MAX_TABLES]:
        if all(len(reasons[name].examples) >= count for name, count in wanted.items()):
            break
        key = f"{run.ledger.prefix}/quarantine/{unit}.parquet"
        try:
            table = pq.read_table(io.BytesIO(run.store.get(key)))
        except FileNotFoundError as error:
            raise OutputDamaged("a quarantine table is missing", where=f"{run.store.url}/{key}",
                                todo="see `dinoray verify`") from error
        for row in table.to_pylist():
            reason = reasons.get(row["reason"])
            if reason is not None and len(reason.examples) < EXAMPLES:
                reason.examples.append((row["item_id"], one_line(row["message"])))
    return list(reasons.values())
