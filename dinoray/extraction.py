"""`extract_images`: the whole life of a job (of images or of cells), from listing to `_SUCCESS`. What the CLI and jobs/ call.

resolve -> record the request -> list -> statistics units -> seal the plan -> units in rounds -> verify.
Every step can be killed and is found again by the next run of the same command.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.parquet as pq

from dinoray.config import ExtractCellsJob, ExtractJob, canonical_json
from dinoray.errors import BadRequest, ChangedRequest, OutputDamaged, TooManyFailures
from dinoray.failpoints import reach
from dinoray.inputs import list_inputs
from dinoray.io.stores import LocalStore, Store, is_local, local_path, open_store
from dinoray.ledger import Ledger, Receipt, Tally
from dinoray.memory.meter import available_cores
from dinoray.planning import Spool, check_same_inputs, spool_items, write_plan
from dinoray.progress import Progress
from dinoray.resolve import Resolved, resolve
from dinoray.runners.build import RunnerSpec, build_runner
from dinoray.runners.local import run_units
from dinoray.units import CELL_ITEM_SCHEMA, ITEM_SCHEMA, Plan, PlanWriter, fingerprint_of
from dinoray.verification import verify_fast

logger = logging.getLogger(__name__)

STATS_UNIT_ITEMS = 64


@dataclass
class Outcome:
    """What a run came to."""

    out: str
    fingerprint: str
    num_units: int
    tally: Tally
    resume_command: str
    executed_units: int = 0
    verified: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 complete, 3 complete except quarantined items."""
        return 3 if self.tally.quarantined else 0


def extract_images(job: ExtractJob, say: Callable[[str], None] = print, *, command: str = "") -> Outcome:
    """Run the job to its end (or resume it). `say` gets the lines meant for the user.

    Raises BadRequest (nothing was run), ChangedRequest (the output belongs to another request),
    TooManyFailures, SystemicError, NoProgress.
    """
    job = absolute(job)
    resolved = resolve(job)
    store = open_store(job.out)
    command = command or resume_command(job)
    sealed = _check_request(store, resolved)
    say(f"dinoray {resolved.fingerprint}  {resolved.description}  output {job.out}  resume with: {command}")
    listing = list_inputs(job)
    progress = Progress(say)
    with progress, contextlib.closing(LocalPool(job, resolved) if job.no_ray else RayPool(job, resolved, say)) as pool, \
            spool_items(listing.items, sample=job.scaling_sample if job.scaling == "plate" and not sealed else 0) as spool:
        if listing.num_ignored:
            say(f"files passed over: {listing.describe_ignored()}")
        if sealed:
            plan = Plan(store)
            check_same_inputs(plan, spool)
        else:
            _record_request(store, resolved, command)
            reach("plan.request")
            if job.scaling == "plate":
                _statistics(store, resolved, spool, pool, progress)
            plan = _seal(store, resolved, spool, listing.root)
        ledger = Ledger(store)
        done = ledger.done()
        tally = Tally()
        for receipt in ledger.receipts([u for u in plan.unit_ids if u in done]):
            tally.add(receipt)
        outcome = Outcome(job.out, resolved.fingerprint, len(plan), tally, command)
        say(f"{plan.num_items} images in {len(plan)} units"
            + (f", {tally.units} units done before" if tally.units else ""))

        def check_failures() -> None:
            reason = tally.too_many_failures(job.max_failed_fraction)
            if reason:
                raise TooManyFailures(reason, where=job.out, todo=f"see `dinoray status {job.out}`; raise "
                                      "--max-failed-fraction to go on, or mend the inputs and use a new --out")

        def on_receipt(receipt: Receipt) -> None:
            tally.add(receipt)
            outcome.executed_units += 1
            progress.advance(tally)
            check_failures()

        check_failures()  # what earlier runs quarantined counts
        progress.begin("images", total=plan.num_items, tally=tally)
        if plan.pending(done):
            store.delete("_SUCCESS")  # it spoke of an output that was whole
            pool(RunnerSpec(job.runner, job.out, job=resolved.job.model_dump(mode="json"),
                            weights=None if job.no_ray else resolved.weights_location(), digest=resolved.digest),
                 lambda: plan.pending(ledger.done()), on_receipt)
        progress.end()
    return _finish(store, plan, ledger, outcome, say)


def _check_request(store: Store, resolved: Resolved) -> bool:
    """Compare with the request that the output was made for, if any; True when its plan is sealed. Writes nothing.

    Raises BadRequest for a folder of something else, ChangedRequest naming every setting that differs.
    """
    sealed = Plan.exists(store)
    if not sealed and Ledger(store).done():
        raise OutputDamaged("there are receipts, but the plan's index is gone", where=f"{store.url}/_dinoray/plan/index.parquet",
                            todo="restore it from a copy, or use a new --out")
    try:
        existing = json.loads(store.get("_dinoray/job.json"))
        before: tuple[str, Any] | None = existing["fingerprint"], existing["identity"]
    except FileNotFoundError:
        before = None
        stray = next((key for key, _ in store.list() if not key.startswith("_dinoray/tmp/")), None)
        if stray is not None:
            raise BadRequest(f"the output folder is not empty and not dinoray's (it holds {stray})", where=store.url,
                             todo="choose a new or empty folder for --out") from None
    except NotADirectoryError as error:
        raise BadRequest("the output folder is a file, or lies below one", where=store.url,
                         todo="choose a new or empty folder for --out") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OutputDamaged(f"the record of the job cannot be read: {error!r}", where=f"{store.url}/_dinoray/job.json",
                            todo="restore it from a copy, or use a new --out") from error
    if before is not None and before[0] != resolved.fingerprint:
        changes = differences(before[1], resolved.identity)
        if sealed:
            raise ChangedRequest("this output was made with other settings:\n  " + "\n  ".join(changes),
                                 where=store.url, todo="use another --out, or the same settings to resume")
    return sealed


def _record_request(store: Store, resolved: Resolved, command: str) -> None:
    """Write job.json: whose output this is from now on. Replaced until a plan is sealed."""
    content = {"fingerprint": resolved.fingerprint, "identity": resolved.identity, "command": command,
               "job": resolved.job.model_dump(mode="json"), "weights": resolved.weights_facts}
    store.put("_dinoray/job.json", json.dumps(content, indent=1, sort_keys=True).encode())


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`field: old -> new` for every leaf that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return lines
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def _statistics(store: Store, resolved: Resolved, spool: Spool, pool: Any, progress: Progress) -> None:
    """Run the statistics units over the sample and store the scaling beside the plan."""
    from dinoray.runners import statistics

    job = resolved.job
    settings = {k: resolved.identity["settings"][k] for k in ("z_projection", "max_pixels", "max_file_bytes")}
    fingerprint = fingerprint_of({"statistics": settings, "libraries": resolved.identity["numerics"]["libraries"]})
    writer = PlanWriter(store, statistics.PREFIX, fingerprint, max_items=STATS_UNIT_ITEMS, max_bytes=job.unit_bytes,
                        max_open=1)
    for row, digest in spool.sampled():
        writer.add(row, digest)
    writer.seal(num_items=sum(len(v) for v in spool.samples.values()))
    plan, ledger = Plan(store, statistics.PREFIX), Ledger(store, statistics.PREFIX)
    tally = Tally()
    progress.begin("statistics", total=plan.num_items, tally=tally)

    def on_receipt(receipt: Receipt) -> None:
        tally.add(receipt)
        progress.advance(tally)

    pool(RunnerSpec("statistics", job.out, statistics.PREFIX, job=job.model_dump(mode="json")),
         lambda: plan.pending(ledger.done()), on_receipt)
    progress.end()
    table = statistics.scaling_table(store, ledger.receipts(plan.unit_ids),
                                     (job.scaling_low_percent, job.scaling_high_percent))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    store.put("_dinoray/plan/scaling.parquet", sink.getbuffer())


def _seal(store: Store, resolved: Resolved, spool: Spool, root: str) -> Plan:
    """Write the plan; its index, put last, seals it."""
    job, salt = resolved.job, None
    if job.scaling == "plate":
        from dinoray.runners.statistics import read_scaling

        scaling = read_scaling(pq.read_table(io.BytesIO(store.get("_dinoray/plan/scaling.parquet"))))
        salt = lambda groups: canonical_json({g: scaling.get(g) for g in sorted(groups)})  # noqa: E731
    writer = PlanWriter(store, "_dinoray", resolved.fingerprint, max_items=job.unit_items, max_bytes=job.unit_bytes,
                        group_salt=salt, schema=CELL_ITEM_SCHEMA if isinstance(job, ExtractCellsJob) else ITEM_SCHEMA)
    write_plan(spool, writer, root=root, numerics=resolved.numerics, described=resolved.described)
    return Plan(store)


class LocalPool:
    """Runs units in this process."""

    def __init__(self, job: ExtractJob, resolved: Resolved):
        self.job, self.resolved = job, resolved

    def close(self) -> None:
        """Nothing to stop: the runner was closed after its last unit."""

    def __call__(self, spec: RunnerSpec, recompute_pending: Callable[[], list[int]],
                 on_receipt: Callable[[Receipt], None]) -> None:
        cores = available_cores()
        spec = replace(spec, decode_threads=self.job.decode_threads or max(2, cores),
                       compute_threads=self.job.compute_threads or cores)
        backbone = self.resolved.backbone if spec.kind == self.job.runner else None
        run_units(lambda: build_runner(spec, backbone), recompute_pending(), on_receipt)


class RayPool:
    """Runs units on Ray actors. Ray is started or joined at the first use: not for planning, not for nothing."""

    def __init__(self, job: ExtractJob, resolved: Resolved, say: Callable[[str], None]):
        self.job, self.resolved, self.say = job, resolved, say
        self._local: bool | None = None

    def _connect(self) -> None:
        from dinoray.cluster.resources import connect

        if self._local is None:
            began = time.monotonic()
            self._local = connect()
            self.say(f"Ray {'started on this machine' if self._local else 'cluster joined'} in {time.monotonic() - began:.1f} s")

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        if self._local is not None:
            from dinoray.cluster.resources import disconnect

            disconnect(self._local)

    def __call__(self, spec: RunnerSpec, recompute_pending: Callable[[], list[int]],
                 on_receipt: Callable[[Receipt], None]) -> None:
        from dinoray.cluster.pool import run_units as run_on_ray
        from dinoray.cluster.resources import actor_shape

        self._connect()
        device = self.resolved.device if spec.kind == self.job.runner else "cpu"
        shape = actor_shape(self.job.workers, device=device, decode_threads=self.job.decode_threads,
                            compute_threads=self.job.compute_threads)
        threads = max(2, shape.num_cpus - (device == "cuda"))
        spec = replace(spec, decode_threads=self.job.decode_threads or threads,
                       compute_threads=self.job.compute_threads or shape.num_cpus)
        if spec.kind == self.job.runner:
            self.resolved.release()  # its weights are staged by now; the actors hold the model, the driver need not
        run_on_ray(spec, recompute_pending, on_receipt, shape=shape, rounds=self.job.rounds,
                   stall_timeout_s=self.job.stall_timeout_s)


def _finish(store: Store, plan: Plan, ledger: Ledger, outcome: Outcome, say: Callable[[str], None]) -> Outcome:
    """Summary, verification, `_SUCCESS`, last line."""
    tally = outcome.tally
    if isinstance(store, LocalStore):
        store.sweep()
    store.put("_dinoray/summary.json", json.dumps(
        {"fingerprint": outcome.fingerprint, "num_units": len(plan), **tally.as_dict()}, indent=1, sort_keys=True).encode())
    reach("run.verify")
    outcome.verified = verify_fast(store, plan, ledger, write_success=True)
    bad = ""
    if tally.quarantined:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.reasons.items()))
        bad = f", {tally.quarantined} quarantined ({reasons})"
    if outcome.verified["without_objects"]:
        bad += f", {outcome.verified['without_objects']} without objects"
    if tally.degraded_units:
        bad += f", {tally.degraded_units} units with degraded numerics"
    say(f"look at it: dinoray report {shlex.quote(outcome.out)}")
    say(f"dinoray {outcome.fingerprint}  complete: {tally.items} images, {tally.rows} rows{bad}  output {outcome.out}  "
        f"same command again: {outcome.resume_command}")
    return outcome


def absolute(job: ExtractJob) -> ExtractJob:
    """The job with absolute local paths, so that its resume command works from any folder."""
    paths = {source: str(local_path(source)) if is_local(source) else source for source in job.sources}
    out = str(local_path(job.out)) if is_local(job.out) else job.out.rstrip("/")
    others = {name: str(local_path(url)) for name in ("labels", "centroids")
              if (url := getattr(job, name, None)) is not None and is_local(url)}
    return job.model_copy(update={"sources": tuple(paths.values()), "out": out, **others})


def resume_command(job: ExtractJob) -> str:
    """A command line that runs the same job again."""
    last = ["--", *job.sources] if any(source.startswith("-") for source in job.sources) else []
    words = ["dinoray", "extract", job.command, *([] if last else job.sources), "--out", job.out]
    default = type(job).model_fields
    for name, value in job.model_dump(mode="json").items():
        if name in ("sources", "out") or value == default[name].get_default(call_default_factory=True):
            continue
        if isinstance(default[name].get_default(call_default_factory=True), tuple) and \
                tuple(value) == default[name].get_default(call_default_factory=True):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag)
        elif isinstance(value, dict):
            words += [w for k, v in value.items() for w in (flag, f"{k}={v}")]
        elif isinstance(value, list):
            words += [flag, ",".join(str(v) for v in value)]
        else:
            words += [flag, str(value)]
    return shlex.join([*words, *last])
