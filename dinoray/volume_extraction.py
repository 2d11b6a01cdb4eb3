"""`extract_volume`: the whole life of a job over a volume, from its metadata to `_SUCCESS`.

resolve -> open -> geometry and forecast -> take the output -> record the request -> arrays -> statistics units -> seal
the plan -> units of planes, then of the fused array -> verify. Every step can be killed and is found again by the next
run of the same command.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from math import prod
from typing import Any

from dinoray.config import ExtractVolumeJob, canonical_json
from dinoray.driver import refuse_if_held
from dinoray.errors import BadRequest, ChangedRequest
from dinoray.failpoints import reach
from dinoray.generations import generations
from dinoray.io.stores import Store, open_store
from dinoray.io.volume_arrays import check_arrays, create_arrays
from dinoray.io.volume_grid import VolumeGrid
from dinoray.io.volumes import Volume
from dinoray.memory.meter import available_cores
from dinoray.request import absolute, check_request, record_request, resume_command
from dinoray.resolve import resolve
from dinoray.resolved import Resolved
from dinoray.runners.statistics import distinct_values
from dinoray.runners.volume_statistics import sample_blocks, why_unusable
from dinoray.sealing import run_statistics
from dinoray.session import Outcome, Session, open_session
from dinoray.slabs import Slab, all_units, check_alone
from dinoray.units import Plan, PlanWriter, item_digest, item_row
from dinoray.vision.intensity import full_range
from dinoray.volume_inputs import check_mask, open_mask, open_source
from dinoray.volume_planning import Forecast, make_forecast, make_grid
from dinoray.wording import plural

STATS_UNIT_BYTES = 2**26
FEW_VALUES = 128
"""So few different values in a sample of 16-bit voxels are noticed: intensities have more."""


def extract_volume(job: ExtractVolumeJob, say: Callable[[str], None] = print, *, command: str = "",
                   leave: Callable[[str], None] | None = None) -> Outcome:
    """Run the job to its end (or resume it). `say` gets the lines meant for the user; `leave` ends the process when
    `dinoray stop` asks for it.

    Raises BadRequest (nothing was run), ChangedRequest (the output belongs to another request), OutputHeld (another
    driver works on it), TooManyFailures, SystemicError, Stopped, NoProgress.
    """
    job = absolute(job)  # type: ignore[assignment]
    with contextlib.closing(open_source(job)) as volume:  # its metadata are read before a model is loaded
        resolved = resolve(job)
        job = resolved.job  # type: ignore[assignment]
        store = open_store(job.out)
        command = command or resume_command(job)
        sealed = check_request(store, resolved)
        say(f"dinoray {resolved.fingerprint}  {resolved.description}  output {job.out}  resume with: {command}")
        for note in volume.notes:
            say(note)
        mask = open_mask(job, volume)
        if mask is not None:
            for note in mask.notes:
                say(f"mask: {note}")
            check_mask(volume, mask)
        inputs = [[v.ref.uri, v.ref.size, v.ref.version] for v in (volume, mask) if v]
        forecast = None
        if not sealed:
            config = resolved.loaded.config
            grid = make_grid(job, volume, patch=config.patch_size, dim=config.dim, token_budget=job.token_budget or 0, say=say)
            forecast = make_forecast(job, grid, volume, mask, threads=job.compute_threads or available_cores())
            for line in forecast.lines():
                say(line)
        refuse_if_held(store, job.takeover)
        with open_session(store, resolved, command, say, leave=leave) as session:
            if check_request(store, resolved):  # again: another driver may have sealed it since
                check_inputs(store, inputs)
                check_arrays(store, generations(store)[0].plan.facts["arrays"])
            else:
                if forecast is None:
                    raise ChangedRequest("the plan disappeared while this run began", where=store.url, todo="run it again")
                record_request(store, resolved, command)
                reach("plan.request")
                seal_volume(session, volume, forecast, inputs)
            return session.run()


def seal_volume(session: Session, volume: Volume, forecast: Forecast, inputs: list[list[Any]]) -> Plan:
    """Arrays, scaling, units, and the plan's index last."""
    store, resolved = session.store, session.resolved
    for key, _ in list(store.list("dense")):  # metadata of a planning that did not come to its end
        store.delete(key)
    grid, fused = forecast.grid, forecast.fused
    arrays = create_arrays(store, grid.arrays(fused=fused), {"grid": grid.as_dict(), **resolved.described})
    reach("plan.arrays")
    limits = volume_limits(session, volume)
    writer = PlanWriter(store, "_dinoray", resolved.fingerprint, max_items=2**31, max_bytes=2**62,
                        group_salt=lambda groups: canonical_json([limits, inputs]))
    first_stage, num_items, itemsize = None, 0, volume.dtype.itemsize
    for slabs in all_units(grid, forecast.sizes, fused=fused):
        check_alone(grid, slabs)
        if slabs[0].array == "fused" and first_stage is None:
            first_stage = writer.num_units
        for slab in slabs:
            item = slab.item(volume.ref, raw_bytes(grid, slab, itemsize))
            writer.add(item_row(item), item_digest(item))
            num_items += 1
        writer.end_unit()
    writer.seal(num_tokens=sum(prod(spec.shape) for spec in grid.arrays(fused=fused)), num_items=num_items,
                num_bytes=volume.ref.size, inputs=inputs, arrays=arrays,
                unit_sizes={"windows": forecast.sizes.windows, "planes": forecast.sizes.planes},
                forecast={"windows": forecast.windows, "windows_once": forecast.windows_once,
                          "amplification": round(forecast.amplification, 4), "output_bytes": forecast.output_bytes},
                **volume_facts(resolved, grid, limits), **({} if first_stage is None else {"first_stage": first_stage}))
    return Plan(store)


def volume_facts(resolved: Resolved, grid: VolumeGrid, limits: list[float]) -> dict[str, Any]:
    """What the plan of every generation over a volume says to its runners."""
    return {"kind": "volume", "noun": resolved.job.noun, "grid": grid.as_dict(), "limits": limits,
            "numerics": resolved.numerics, "described": resolved.described, "metadata_columns": []}


def raw_bytes(grid: VolumeGrid, slab: Slab, itemsize: int) -> int:
    """Raw bytes below a slab, without its halo: for the plan's totals."""
    pitch = grid.fused.pitch_nm if slab.array == "fused" else grid.plane(slab.array).pitch_nm
    voxels = 1.0
    for n, p, r in zip(slab.shape, pitch, grid.voxel_nm, strict=True):
        voxels *= n * p / r
    return round(voxels) * itemsize


def volume_limits(session: Session, volume: Volume) -> list[float]:
    """The raw values that become 0 and 1."""
    job, resolved = session.job, session.resolved
    if job.scaling == "slice":
        return [0.0, 255.0]
    if job.scaling == "dtype":
        return list(full_range(volume.dtype))
    blocks = sample_blocks(volume, job.scaling_sample)
    settings = {"blocks": len(blocks), **{k: resolved.identity["settings"][k] for k in
                                          ("raw_voxel_size", "dataset", "channel", "time", "crop")}}
    table = run_statistics(session.store, resolved, ((item_row(item), item_digest(item)) for item in blocks), len(blocks), settings,
                           session.pool, session.progress, session.driver.check, "_dinoray/stats", unit_bytes=STATS_UNIT_BYTES,
                           kind="volume-statistics")
    if not table.num_rows:
        error = why_unusable(volume, blocks[0])
        raise BadRequest(f"{plural(len(blocks), 'block')} sampled for the intensity scaling, none can be used"
                         + (f"; the first: {error.what}" if error else ""), where=error.where if error else volume.ref.uri,
                         todo=(f"{error.todo}; " if error and error.todo else "") + "is the volume whole, and free of NaN? "
                         "--scaling dtype needs no sample: what cannot be read is then quarantined") from error
    row = table.to_pylist()[0]
    if volume.dtype.kind in "iu" and volume.dtype.itemsize > 1 and row["num_values"] > FEW_VALUES * 100:
        distinct = distinct_values(session.store, "_dinoray/stats")
        if distinct <= FEW_VALUES:
            session.say(f"only {distinct} different values among {row['num_values']:,} sampled voxels of type {volume.dtype}: are "
                        "these labels? Features of a label image mean nothing")
    if row["high"] <= row["low"]:
        raise BadRequest(f"the sampled blocks hold one value only ({row['low']:g}, percentiles {resolved.percents[0]:g} and "
                         f"{resolved.percents[1]:g})", where=volume.ref.uri,
                         todo="is this the right volume and level? Raise --scaling-sample, or use --scaling dtype")
    return [row["low"], row["high"]]


def check_inputs(store: Store, inputs: list[list[Any]]) -> None:
    """Raises ChangedRequest when the volume or the mask is not what the output was planned for."""
    parts = generations(store)
    for number, (uri, _, version) in enumerate(inputs):
        known = [part.plan.facts["inputs"][number] for part in parts]  # a retry takes the volume as it is then
        old_uri = known[0][0]
        if version not in [old_version for _, _, old_version in known]:
            raise ChangedRequest(f"{uri} has changed since this output was planned" + ("" if uri == old_uri else
                                 f" (from {old_uri})"), where=store.url,
                                 todo="restore it to resume, `dinoray retry OUT` if slabs of it were quarantined, or use "
                                 "another --out")
