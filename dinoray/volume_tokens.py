"""Stored tokens for a model: an output of `dinoray extract volume`, checked to be what the model would have computed itself."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dinoray.errors import BadRequest
from dinoray.io.stores import open_store
from dinoray.io.volume_grid import Triple, VolumeGrid
from dinoray.units import Plan
from dinoray.vision.stored_tokens import StoredTokens

REQUEST = "_dinoray/job.json"


def open_tokens(url: str, *, digest: str, raw_voxel_nm: Triple, name: str, limits: Sequence[float] | None = None) -> StoredTokens:
    """The tokens of an output of `dinoray extract volume`. `digest`: of the backbone that they must be of; `raw_voxel_nm`: of the
    voxels that they were made of; `limits`: raw values that became 0 and 1, where they must be these; `name`: of the setting.

    Raises BadRequest for other things than that.
    """
    store = open_store(url)
    try:
        record = json.loads(store.get(REQUEST))
        facts = Plan(store).facts
        grid, identity = VolumeGrid.read(facts["grid"]), record["identity"]
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError) as error:
        raise BadRequest(f"this is no output of `dinoray extract volume`: {error!r}", where=f"{name}: {url}",
                         todo="give the --out of an extraction that has ended") from error
    todo = "extract the tokens anew with the same backbone and settings, or leave them out"
    if identity["weights_digest"] != digest:
        raise BadRequest(f"the stored tokens are of other weights (digest {identity['weights_digest'][:12]}, the model has {digest[:12]})",
                         where=f"{name}: {url}", todo=todo)
    if any(abs(a - b) > 1e-3 * b for a, b in zip(grid.voxel_nm, raw_voxel_nm, strict=True)):
        raise BadRequest(f"the stored tokens were made of voxels of {grid.voxel_nm} nm, not of {raw_voxel_nm} nm",
                         where=f"{name}: {url}", todo=todo)
    settings = identity["settings"]
    if settings["layer"] is not None or settings["scaling"] == "slice" or settings["foreground"] is not None:
        raise BadRequest("the stored tokens are of another layer, of slices scaled one by one, or of the foreground alone",
                         where=f"{name}: {url}", todo="extract without --layer, --scaling slice and --foreground")
    if limits is not None and any(abs(a - b) > 0.02 * (limits[1] - limits[0]) for a, b in zip(facts["limits"], limits, strict=True)):
        raise BadRequest(f"the stored tokens were made with intensities {facts['limits'][0]:g}..{facts['limits'][1]:g} as 0..1, the "
                         f"others are {limits[0]:g}..{limits[1]:g}", where=f"{name}: {url}", todo=todo)
    return StoredTokens(store, grid)
