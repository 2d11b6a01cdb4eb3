"""The report of a run over a volume: views through the middle, what was stored and what it cost, where everything lies."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from math import prod
from typing import Any

from dinoray.config import ExtractVolumeJob, recorded_job
from dinoray.errors import OutputDamaged
from dinoray.io.volume_grid import NORMAL, ArraySpec, VolumeGrid
from dinoray.io.zarr_reading import open_array
from dinoray.report.page import VOLUMES, environment, run_facts, stage_facts
from dinoray.report.pca import Basis
from dinoray.report.pictures import one_line
from dinoray.report.plots import number
from dinoray.report.quarantine import RETRY, TODO
from dinoray.report.run import Run
from dinoray.report.volume_raw import add_raw, opened
from dinoray.report.volume_sample import sample_tokens
from dinoray.report.volume_svg import define, panel, unit_of
from dinoray.report.volume_totals import ArrayTotals, VolumeTotals, place_nm
from dinoray.report.volume_views import FusedReader, View, choose_point, make_view
from dinoray.slabs import Slab
from dinoray.volume_planning import nm

EXAMPLES = 8
"""Quarantined slabs shown per reason."""
SAMPLING = {"interpolate": "linear between the two nearest slices", "nearest": "the nearest slice",
            "antialias": "the mean over the plane's thickness",
            "linspace": "evenly from the first to the last slice (not registered)"}
_FEATURES = {"planes": "the tokens of each plane; fused features are made of them when they are read",
             "fused": "the tokens of each plane, and their mean on the target grid"}


@dataclass
class Views:
    """What the section with the pictures shows."""

    views: list[View] = field(default_factory=list)
    basis: Basis | None = None
    is_middle: bool = True
    world_nm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Where the views meet."""
    drawn: list[dict[str, Any]] = field(default_factory=list)

    @property
    def problem(self) -> str:
        """Why raw voxels are missing, the same for all views."""
        return next((view.problem for view in self.views if view.problem), "")


@dataclass
class LostSlabs:
    """Slabs that are quarantined for one reason; `slabs`: (id, place, message) of the first."""

    name: str
    todo: str
    retry: str
    count: int = 0
    tokens: int = 0
    slabs: list[tuple[str, str, str]] = field(default_factory=list)


def render_volume(run: Run) -> str:
    """The page's text. Raises OutputDamaged for records or shards that are missing or cannot be read, TransientError,
    SystemicError."""
    volume = run.volume
    if volume is None:
        raise ValueError("a run over images has another page")
    try:
        head, job = _head(run, volume), recorded_job(run.job["job"])
        forecast = _forecast(run, volume)
    except (KeyError, TypeError, ValueError) as error:
        raise OutputDamaged(f"the records of the run lack {error}", where=f"{run.store.url}/_dinoray",
                            todo="restore job.json and plan/ from a copy") from error
    if not isinstance(job, ExtractVolumeJob):
        raise OutputDamaged("the record of the job is not that of a volume", where=f"{run.store.url}/_dinoray/job.json",
                            todo="restore it from a copy")
    lost = lost_slabs(run, volume.grid)
    arrays = _arrays(run, volume, _lost_tokens(run))
    return environment().get_template("volume.html.j2").render(
        head=head, run=run, tally=run.tally, volume=volume, views=draw_views(run, job), arrays=arrays,
        forecast=forecast, coordinates=_coordinates(run, volume.grid), reasons=lost, stages=stage_facts(run, VOLUMES),
        reading=_reading(run, volume.grid))


def draw_views(run: Run, job: ExtractVolumeJob) -> Views:
    """The three planes through the middle, or through where features are. Raises as `render_volume`."""
    volume: VolumeTotals = run.volume  # type: ignore[assignment]
    grid = volume.grid
    readers = {name: open_array(run.store, name) for name in grid.planes}
    sample = sample_tokens(readers, grid, volume.arrays)
    if sample.basis is None:
        return Views()
    reader = FusedReader(run.store, grid, is_stored=has_fused(run) and run.tally.units == run.num_units)
    point, is_middle = choose_point(reader, sample)
    centre = [(k + 0.5) * g for k, g in zip(point, grid.target_nm, strict=True)]
    corner = [t - r / 2 for t, r in zip(grid.translation_nm, grid.voxel_nm, strict=True)]
    found = Views(basis=sample.basis, is_middle=is_middle, world_nm=tuple(c + o for c, o in zip(centre, corner, strict=True)))  # type: ignore[arg-type]
    limits = None if job.scaling == "slice" else tuple(run.plan.facts["limits"])
    # a retry reads the volume as it is by then: each generation's slabs name the version that they were planned for
    versions = {part.plan.unit(0).items[0].files[0].version for part in run.generations if len(part.plan)}
    with opened(job, grid, versions) as source:
        for name in NORMAL:
            view = make_view(reader, name, point, sample.basis)
            add_raw(view, source, grid, limits)  # type: ignore[arg-type]
            found.views.append(view)
            rows, cols = view.axes
            place, cuts = (corner[rows], corner[cols]), (centre[rows], centre[cols])
            has_raw, has_tokens = view.raw is not None, name in grid.planes
            panels = [("raw", panel(view, ("raw",), place, cuts))] if has_raw else []
            panels.append(("fused features", panel(view, ("fused",), place, None if has_raw else cuts)))
            panels += [("both", panel(view, ("raw", "fused"), place))] if has_raw else []
            panels += [(f"tokens of {name} alone", panel(view, ("tokens",), place))] if has_tokens else []
            normal = NORMAL[name]
            found.drawn.append({"view": view, "defs": define(view), "panels": panels, "normal": "zyx"[normal],
                                "at": length(found.world_nm[normal]), "size": length(*(b - a for a, b in (view.rows, view.cols))),
                                "of": length(*(grid.extent_nm[a] for a in view.axes))})
    return found


def has_fused(run: Run) -> bool:
    """Whether the run writes fused features."""
    return "first_stage" in run.plan.facts


def length(*nanometres: float) -> str:
    """A length or place for people, or several in one unit: `2.1 µm`, `1.5 × 2.1 µm`."""
    size, name = unit_of(max(map(abs, nanometres)))
    return f"{' × '.join(f'{n / size:.4g}' for n in nanometres)} {name}"


def lost_slabs(run: Run, grid: VolumeGrid) -> list[LostSlabs]:
    """Quarantined slabs by reason, most frequent first. Raises OutputDamaged when a quarantine table is missing."""
    reasons: dict[str, LostSlabs] = {}
    for row in run.quarantined.to_pylist():
        name, slab = row["reason"], Slab.read(row["item_id"])
        retry = f"dinoray retry {shlex.quote(run.store.url)} --reason {shlex.quote(name)}" if name in RETRY else ""
        reason = reasons.setdefault(name, LostSlabs(name, TODO.get(name, "See the message."), retry))
        reason.count += 1
        reason.tokens += prod(slab.shape)
        if len(reason.slabs) < EXAMPLES:
            place = ", ".join(f"{axis} {low:,.10g} to {high:,.10g}"
                              for axis, (low, high) in zip("zyx", place_nm(grid, slab), strict=True))
            reason.slabs.append((slab.id, f"{place} nm", one_line(row["message"])))
    return sorted(reasons.values(), key=lambda reason: (-reason.count, reason.name))


def _lost_tokens(run: Run) -> dict[str, int]:
    """Quarantined tokens by array."""
    found: dict[str, int] = {}
    for row in run.quarantined.to_pylist():
        slab = Slab.read(row["item_id"])
        found[slab.array] = found.get(slab.array, 0) + prod(slab.shape)
    return found


def _head(run: Run, volume: VolumeTotals) -> dict[str, Any]:
    settings, grid = run.settings, volume.grid
    percentiles = f"percentiles {settings['scaling_low_percent']:g} to {settings['scaling_high_percent']:g} of the volume"
    scaling = {"volume": percentiles, "slice": "each slice's own minimum and maximum, in 8 bits",
               "dtype": "the full range of the dtype"}[settings["scaling"]]
    if settings["scaling"] == "volume":
        scaling += " (" + " to ".join(number(v) for v in run.plan.facts["limits"]) + ")"
    windows = ", ".join(f"{name} {' x '.join(str(grid.plane(name).lattice(a).window * grid.patch) for a in grid.plane(name).axes)}"
                        for name in grid.planes)
    layer = "last layer" if settings["layer"] is None else f"layer {settings['layer']}"
    seconds, tokens = run.stages.get("wall"), sum(t.computed for name, t in volume.arrays.items() if name != "fused")
    return {
        **run_facts(run), "shape": " × ".join(map(str, grid.shape)), "voxel": nm(grid.voxel_nm), "target": nm(grid.target_nm),
        "target_shape": " × ".join(map(str, grid.target_shape)), "extent": length(*grid.extent_nm),
        "crop": settings["crop"], "features": f"{grid.dim} numbers of the {layer}, {grid.dtype}: {_FEATURES[settings['output']]}",
        "planes": f"{', '.join(grid.planes)}; target planes: {SAMPLING[settings['slice_sampling']]}",
        "windows": f"{windows} px, halo {grid.halo_px} px, blended", "scaling": scaling, "foreground": settings["foreground"],
        "rate": number(tokens / seconds) if seconds else "",
        "later": [f"{g.kind} {g.number}: {g.plan.num_items:,} slabs" for g in run.generations[1:]],
    }


def _arrays(run: Run, volume: VolumeTotals, lost: dict[str, int]) -> list[dict[str, Any]]:
    """One row per stored array."""
    rows = []
    for spec in volume.grid.arrays(fused=has_fused(run)):
        totals, bad, size = volume.arrays.get(spec.name, ArrayTotals()), lost.get(spec.name, 0), prod(spec.shape)
        rows.append({"name": spec.name, "shape": " × ".join(map(str, (spec.dim, *spec.shape))), "pitch": _pitch(spec),
                     "dtype": spec.dtype, "bytes": totals.num_bytes, "full_bytes": spec.nbytes, "shards": totals.shards,
                     "size": size, "computed": totals.computed, "quarantined": bad,
                     "skipped": totals.covered - totals.computed - bad, "pending": size - totals.covered})
    return rows


def _pitch(spec: ArraySpec) -> str:
    return " × ".join(f"{p:g}" for p in spec.pitch_nm)


def _forecast(run: Run, volume: VolumeTotals) -> list[tuple[str, str, str, str]]:
    """(what, forecast, so far or measured, remark)."""
    forecast = run.plan.facts["forecast"]
    windows = sum(totals.windows for totals in volume.arrays.values())
    stored = sum(totals.num_bytes for totals in volume.arrays.values())
    skips = run.settings["foreground"] is not None
    return [("windows", f"{forecast['windows']:,}", f"{windows:,}",
             "of finished slabs" + (", those skipped as background included" if skips else "")),
            ("amplification", f"{forecast['amplification']:.2f}", f"{windows / forecast['windows_once']:.2f}",
             f"windows over the {forecast['windows_once']:,} of a run in one unit"),
            ("bytes of the arrays", f"{forecast['output_bytes']:,}", f"{stored:,}", "forecast before compression, stored after it"),
            ("peak memory beyond the model", f"{volume.predicted_bytes:,}", f"{volume.measured_bytes:,}",
             f"bytes of one worker; {run.job['job']['memory_bytes']:,} were allowed")]


def _coordinates(run: Run, grid: VolumeGrid) -> list[dict[str, str]]:
    """Where the raw volume and each array lie."""
    def row(name: str, shape: Any, pitch: Any, translation: Any) -> dict[str, str]:
        return {"name": name, "shape": " × ".join(map(str, shape)), "scale": ", ".join(f"{p:.10g}" for p in pitch),
                "translation": ", ".join(f"{t:.10g}" for t in translation)}

    return [row("the volume as read", grid.shape, grid.voxel_nm, grid.translation_nm),
            *(row(f"dense/{s.name}.zarr", s.shape, s.pitch_nm, s.translation_nm) for s in grid.arrays(fused=has_fused(run)))]


def _reading(run: Run, grid: VolumeGrid) -> dict[str, Any]:
    middle = [n // 2 for n in grid.target_shape]
    return {"out": repr(run.store.url), "url": run.store.url, "fused": has_fused(run), "plane": grid.planes[0],
            "box": ", ".join(f"{max(0, m - 8)}:{min(n, m + 8)}" for m, n in zip(middle, grid.target_shape, strict=True)),
            "nm": ", ".join(f"{t:.10g}:{t + 4 * g:.10g}" if "." in f"{t:.10g}" else f"{t:.10g}.0:{t + 4 * g:.10g}"
                            for t, g in zip(grid.fused.translation_nm, grid.target_nm, strict=True))}
