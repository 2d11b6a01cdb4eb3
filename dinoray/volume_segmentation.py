"""`segment_volume`: the whole life of a job that segments a volume, from its metadata to `_SUCCESS`.

resolve -> open -> geometry and forecast -> take the output -> record the request -> arrays -> statistics units -> seal the plan ->
units of predictions, then of instances -> verify. Every step can be killed and is found again by the next run of the same command.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from math import prod
from typing import Any

from dinoray.config import canonical_json
from dinoray.config.volume_segmentation import SegmentVolumeJob
from dinoray.driver import refuse_if_held
from dinoray.errors import ChangedRequest
from dinoray.failpoints import reach
from dinoray.generations import generations
from dinoray.io.prediction_grid import MERGE, PredictionGrid
from dinoray.io.stores import open_store
from dinoray.io.volume_arrays import check_arrays, create_arrays
from dinoray.io.volumes import Volume
from dinoray.label_planning import Forecast, context_source, make_forecast, make_grid, open_source
from dinoray.label_units import arrays, stages
from dinoray.request import absolute, check_request, record_request, resume_command
from dinoray.resolve import resolve
from dinoray.runners.volume_windows import stored_tokens
from dinoray.session import Outcome, Session, open_session
from dinoray.slabs import check_alone_on
from dinoray.units import Plan, PlanWriter, item_digest, item_row
from dinoray.volume_extraction import check_inputs, volume_limits


def segment_volume(job: SegmentVolumeJob, say: Callable[[str], None] = print, *, command: str = "",
                   leave: Callable[[str], None] | None = None) -> Outcome:
    """Run the job to its end (or resume it). `say` gets the lines meant for the user; `leave` ends the process when
    `dinoray stop` asks for it.

    Raises BadRequest (nothing was run), ChangedRequest (the output belongs to another request), OutputHeld (another driver works on
    it), TooManyFailures, SystemicError, Stopped, NoProgress.
    """
    from dinoray.vision.fusion_checkpoint import read_fusion_config

    job = absolute(job)  # type: ignore[assignment]
    with contextlib.closing(open_source(job, read_fusion_config(job.checkpoint).raw_voxel_nm)) as volume:
        # the level is chosen once: whoever opens the volume later reads the same
        resolved = resolve(job.model_copy(update={"raw_voxel_size": volume.voxel_size_nm}))
        job = resolved.job  # type: ignore[assignment]
        model, config = resolved.loaded
        has_context = config.model.fusion != "none"
        stored_tokens(job, config, volume)
        store = open_store(job.out)
        command = command or resume_command(job)
        sealed = check_request(store, resolved)
        say(f"dinoray {resolved.fingerprint}  {resolved.description}  output {job.out}  resume with: {command}")
        for note in volume.notes:
            say(note)
        inputs = [[volume.ref.uri, volume.ref.size, volume.ref.version]]
        forecast = None
        if not sealed:
            grid = make_grid(job, config, volume, multiple=model.unet.unet.multiple, has_context=has_context)
            context_voxels = 0
            if has_context:
                level, factor = context_source(job, config, volume)
                context_voxels = 0 if job.context_tokens else prod(factor)
                say(f"context: voxels of {level.voxel_size_nm[0]:g} nm along z, {prod(factor)} of them in a pixel")
                if level is not volume:
                    level.close()
            else:
                say(_exactness(grid, job, config, model.unet.unet.receptive_radius))
            forecast = make_forecast(job, grid, instances=config.target == "affinities",
                                     values_per_voxel=prod(grid.factor) + 8 * config.model.base,
                                     raw_itemsize=volume.dtype.itemsize, context_voxels=context_voxels)
            for line in forecast.lines():
                say(line)
        refuse_if_held(store, job.takeover)
        del model
        with open_session(store, resolved, command, say, leave=leave) as session:
            if check_request(store, resolved):  # again: another driver may have sealed it since
                check_inputs(store, inputs)
                check_arrays(store, generations(store)[0].plan.facts["arrays"])
            else:
                if forecast is None:
                    raise ChangedRequest("the plan disappeared while this run began", where=store.url, todo="run it again")
                record_request(store, resolved, command)
                reach("plan.request")
                seal_segmentation(session, volume, config, forecast, inputs)
            return session.run()


def _exactness(grid: PredictionGrid, job: SegmentVolumeJob, config: Any, radius: int) -> str:
    """What the receptive radius says of blocks against the whole volume."""
    if config.model.norm in ("group", "instance"):
        return f"norm={config.model.norm}: a block differs a little from the whole volume (statistics over the window)"
    if config.model.inputs != "raw" and job.tokens is None:
        return "tokens are computed window by window: a block differs a little from the whole volume"
    if all(grid.lattice(a).count == 1 or (grid.halo[a] >= radius and not grid.blend) for a in range(3)):
        return f"receptive radius {radius} voxels: blocks give exactly what the whole volume gives"
    return f"receptive radius {radius} voxels, margins {'x'.join(map(str, grid.halo))}: with --halo-voxels of {radius} or more " \
        "and --no-blend blocks would give what the whole volume gives"


def seal_segmentation(session: Session, volume: Volume, config: Any, forecast: Forecast, inputs: list[list[Any]]) -> Plan:
    """Arrays, scaling, units stage by stage, and the plan's index last."""
    store, resolved, grid = session.store, session.resolved, forecast.grid
    for folder in ("dense", "labels.zarr"):  # metadata of a planning that did not come to its end
        for key, _ in list(store.list(folder)):
            store.delete(key)
    specs = arrays(grid, instances=forecast.instances, probabilities=forecast.probabilities)
    recorded = create_arrays(store, specs, {"grid": grid.as_dict(), **resolved.described})
    reach("plan.arrays")
    limits = volume_limits(session, volume)
    stored_tokens(resolved.job, config, volume, limits)  # type: ignore[arg-type]
    writer = PlanWriter(store, "_dinoray", resolved.fingerprint, max_items=2**31, max_bytes=2**62,
                        group_salt=lambda groups: canonical_json([limits, inputs]))
    ends, num_items, itemsize = [], 0, volume.dtype.itemsize * prod(grid.factor)
    for stage in stages(grid, forecast.unit_windows, instances=forecast.instances):
        for boxes in stage:
            for box in boxes:
                if box.array != MERGE:
                    check_alone_on(grid.labels, box.start, box.stop)
                item = box.item(volume.ref, prod(box.shape) * itemsize)
                writer.add(item_row(item), item_digest(item))
                num_items += 1
            writer.end_unit()
        ends.append(writer.num_units)
    writer.seal(num_items=num_items, num_bytes=volume.ref.size, inputs=inputs, arrays=recorded, stage_ends=ends,
                kind="volume-labels", noun=resolved.job.noun, grid=grid.as_dict(), limits=limits,
                threshold=resolved.job.threshold, instances=forecast.instances, probabilities=forecast.probabilities,
                numerics=resolved.numerics, described=resolved.described, metadata_columns=[],
                forecast={"windows": grid.windows_in_all(forecast.unit_windows), "windows_once": grid.windows_once,
                          "amplification": round(forecast.amplification, 4), "output_bytes": forecast.output_bytes,
                          "unit_bytes": forecast.unit_bytes, "window_bytes": forecast.window_bytes,
                          "component_bytes": forecast.component_bytes})
    return Plan(store)
