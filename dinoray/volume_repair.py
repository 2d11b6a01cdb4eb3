"""`retry` of a volume: its quarantined slabs are planned again, with the volume as it is now.

Shards of such slabs are put anew, whole ones by the same bytes; no other object is touched. The latest receipt that names
a shard counts.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from itertools import groupby

from dinoray.config import canonical_json
from dinoray.errors import ChangedRequest
from dinoray.generations import Generation, next_prefix
from dinoray.io.volume_grid import VolumeGrid
from dinoray.session import Session
from dinoray.slabs import Slab
from dinoray.units import PlanWriter, item_digest, item_row
from dinoray.volume_extraction import raw_bytes, volume_facts
from dinoray.volume_inputs import open_mask, open_source

UNIT_SLABS = 16
"""Slabs of a retry's unit: they lie anywhere in the volume."""


def plan_volume_retry(session: Session, parts: list[Generation], rows: list[dict[str, str]]) -> None:
    """Seal a generation of the slabs in `rows` (of QUARANTINE_SCHEMA). Raises ChangedRequest for another volume."""
    first, job, store = parts[0].plan.facts, session.job, session.store
    grid = VolumeGrid.read(first["grid"])
    with contextlib.closing(open_source(job)) as volume:
        mask = open_mask(job, volume)
        found = (volume.shape, volume.voxel_size_nm, volume.translation_nm)
        planned = (grid.shape, grid.voxel_nm, grid.translation_nm)
        if found != planned:
            raise ChangedRequest(f"the volume has another shape or place than when it was planned: {found} instead of {planned}",
                                 where=volume.ref.uri, todo="restore it, or use a new --out")
        inputs = [[v.ref.uri, v.ref.size, v.ref.version] for v in (volume, mask) if v is not None]
        reasons = {row["item_id"]: row["reason"] for row in rows}
        slabs = sorted(map(Slab.read, reasons), key=lambda s: (s.array == "fused", s.array, s.start))
        session.say(f"{len(slabs)} quarantined slabs are tried again")
        prefix, replaced = next_prefix(store, parts, "retry", ""), {}
        writer = PlanWriter(store, prefix, session.resolved.fingerprint, max_items=UNIT_SLABS, max_bytes=2**62, id_salt=prefix,
                            group_salt=lambda groups: canonical_json([first["limits"], inputs]))
        writer.on_unit = lambda unit_id, ids: replaced.update({unit_id: dict(Counter(reasons[i] for i in ids))})
        stages = {}
        for name, group in groupby(slabs, key=lambda s: s.array):
            if name == "fused":
                stages["first_stage"] = writer.num_units
            for slab in group:
                item = slab.item(volume.ref, raw_bytes(grid, slab, volume.dtype.itemsize))
                writer.add(item_row(item), item_digest(item))
            writer.end_unit()
    writer.seal(num_items=len(slabs), num_bytes=volume.ref.size, inputs=inputs, unit_sizes=first["unit_sizes"],
                suffix=f".r{1 + sum(part.kind == 'retry' for part in parts)}", replaces=replaced,
                **volume_facts(session.resolved, grid, first["limits"]), **stages)
