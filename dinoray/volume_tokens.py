"""Stored tokens for a model: an output of `dinoray extract volume`, checked to be what the model would have computed itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from dinoray.config import canonical_json
from dinoray.errors import BadRequest
from dinoray.io.stores import open_store
from dinoray.io.volume_grid import NORMAL, Triple, VolumeGrid
from dinoray.units import Plan
from dinoray.vision.stored_tokens import StoredTokens

REQUEST = "_dinoray/job.json"
APART = {"tokens": 0.02, "context_tokens": 0.2}
"""By how much of the range of intensities the limits of a store may be off: those of a coarser level are narrower than raw's."""


def _record(url: str, name: str) -> dict[str, Any]:
    """job.json of a finished extraction of a volume. Raises BadRequest for other things."""
    store = open_store(url)
    todo = "give the --out of a `dinoray extract volume` that has ended"
    try:
        record = json.loads(store.get(REQUEST))
        kind = Plan(store).facts.get("kind")
        record["identity"]["settings"], record["identity"]["weights_digest"], record["fingerprint"]  # noqa: B018 - all are needed
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError) as error:
        raise BadRequest(f"this is no output of `dinoray extract volume`: {error!r}", where=f"{name}: {url}", todo=todo) from error
    if kind != "volume":
        raise BadRequest("these are not features of a volume", where=f"{name}: {url}", todo=todo)
    if not store.exists("_SUCCESS"):
        raise BadRequest("the extraction of these tokens has not ended", where=f"{name}: {url}", todo="run its command again first")
    return record


def tokens_fingerprint(url: str, name: str) -> str:
    """Of a finished extraction: of its settings, and of the volume that it read. Raises BadRequest for other things."""
    fingerprint = str(_record(url, name)["fingerprint"])
    inputs = canonical_json(Plan(open_store(url)).facts["inputs"])
    return f"{fingerprint}-{blake2b(inputs.encode(), digest_size=6).hexdigest()}"


def open_tokens(url: str, *, digest: str, raw_voxel_nm: Triple, name: str, limits: Sequence[float] | None = None) -> StoredTokens:
    """The tokens of an output of `dinoray extract volume`. `digest`: of the backbone that they must be of; `raw_voxel_nm`: of the
    voxels that they were made of; `limits`: raw values that became 0 and 1, where they must be these (to APART); `name`: of the
    setting, `tokens` or `context_tokens`.

    Raises BadRequest for other things than that.
    """
    record, store = _record(url, name), open_store(url)
    facts, identity = Plan(store).facts, record["identity"]
    grid, settings = VolumeGrid.read(facts["grid"]), identity["settings"]
    where, todo = f"{name}: {url}", "extract the tokens anew with the same backbone and settings, or leave them out"
    if identity["weights_digest"] != digest:
        raise BadRequest(f"the stored tokens are of other weights (digest {identity['weights_digest'][:12]}, "
                         f"the model has {digest[:12]})", where=where, todo=todo)
    if any(abs(a - b) > 1e-3 * b for a, b in zip(grid.voxel_nm, raw_voxel_nm, strict=True)):
        raise BadRequest(f"the stored tokens were made of voxels of {grid.voxel_nm} nm, not of {raw_voxel_nm} nm",
                         where=where, todo=todo)
    wanted = tuple(NORMAL) if max(raw_voxel_nm) <= 3 * min(raw_voxel_nm) else ("xy",)
    if grid.planes != wanted:
        raise BadRequest(f"the stored tokens are of the planes {', '.join(grid.planes)}, the model looks at {', '.join(wanted)}",
                         where=where, todo="extract them with --planes " + ",".join(wanted))
    if settings["layer"] is not None or settings["scaling"] == "slice" or settings["foreground"] is not None:
        raise BadRequest("the stored tokens are of another layer, of slices scaled one by one, or of the foreground alone",
                         where=where, todo="extract without --layer, --scaling slice and --foreground")
    if limits is not None and any(abs(a - b) > APART[name] * (limits[1] - limits[0])
                                  for a, b in zip(facts["limits"], limits, strict=True)):
        raise BadRequest(f"the stored tokens were made with intensities {facts['limits'][0]:g}..{facts['limits'][1]:g} as 0..1, "
                         f"the others are {limits[0]:g}..{limits[1]:g}", where=where, todo=todo)
    return StoredTokens(store, grid)
