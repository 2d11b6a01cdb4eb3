"""One driver at work on one output: the lock, the pool, the totals, the generations in order, the end.

What `extract`, `retry` and `extend` share once they know which generations there are.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dinoray.config import UnitJob
from dinoray.driver import Driver
from dinoray.errors import TooManyFailures
from dinoray.failpoints import reach
from dinoray.generations import Generation, generations, replaced_reasons, settle, total_tally, unfinished_notes
from dinoray.io.stores import LocalStore, Store
from dinoray.ledger import Receipt, Tally
from dinoray.planning import Spool
from dinoray.pools import Pool, make_pool
from dinoray.progress import Progress
from dinoray.resolved import Resolved
from dinoray.runners.build import RunnerSpec
from dinoray.scale_notes import scale_notes
from dinoray.sealing import seal_generation
from dinoray.units import Plan
from dinoray.verification import verify_fast
from dinoray.wording import plural


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


@dataclass
class Session:
    """A driver that holds an output, with all it needs to plan and run generations."""

    store: Store
    resolved: Resolved
    command: str
    say: Callable[[str], None]
    driver: Driver
    pool: Pool
    progress: Progress

    @property
    def job(self) -> UnitJob:
        """The job, with every `auto` settled."""
        return self.resolved.job

    def seal(self, spool: Spool, **facts: Any) -> Plan:
        """Statistics, units and index of a generation (see sealing.py)."""
        return seal_generation(self.store, self.resolved, spool, self.pool, self.progress, self.driver.check, **facts)

    def run(self, first: Iterable[str] = ("first", "extend", "retry"), *, tolerant: bool = False) -> Outcome:
        """Run what is pending, generations of the kinds in `first` in that order, then verify.

        `tolerant`: a share of quarantined items above the limit does not stop a retry, which is there to lower it.
        """
        parts = generations(self.store)
        tally = total_tally(parts)
        outcome = Outcome(self.job.out, self.resolved.fingerprint, sum(len(p.plan) for p in parts), tally, self.command)
        inputs = sum(part.plan.num_items for part in parts if part.kind != "retry")
        self.say(f"{plural(inputs, self.job.noun)} in {plural(outcome.num_units, 'unit')}"
                 + (f", {plural(tally.units, 'unit')} done before" if tally.units else ""))
        if not tolerant:
            self._check_failures(tally)  # what earlier runs quarantined counts
        order = list(first)
        for part in sorted(parts, key=lambda p: (order.index(p.kind), p.number)):
            if part.plan.pending(part.ledger.done()):
                self._run_part(part, outcome, inputs)
        return self._finish(outcome)

    def _run_part(self, part: Generation, outcome: Outcome, inputs: int) -> None:
        tally = outcome.tally

        def on_receipt(receipt: Receipt) -> None:
            self.driver.check_lost()
            tally.add(receipt, replaces=replaced_reasons(part.plan, receipt.unit))
            outcome.executed_units += 1
            self.progress.advance(tally)
            if part.kind != "retry":
                self._check_failures(tally)

        self.progress.begin("retry" if part.kind == "retry" else f"{self.job.noun}s", total=inputs, tally=tally)
        self.store.delete("_SUCCESS")  # it spoke of an output that was whole
        job = self.job
        spec = RunnerSpec(job.runner, job.out, part.prefix, job=job.model_dump(mode="json"),
                          weights=None if job.no_ray else self.resolved.weights_location(), digest=self.resolved.digest)
        for stage in part.plan.stages:
            def pending(stage: range = stage) -> list[int]:
                return [number for number in part.plan.pending(part.ledger.done()) if number in stage]

            if pending():
                self.pool(spec, pending, on_receipt, self.driver.check)
        self.progress.end()

    def _check_failures(self, tally: Tally) -> None:
        reason = tally.too_many_failures(self.job.max_failed_fraction)
        if reason:
            out = shlex.quote(self.job.out)
            again = f"run `dinoray retry {out}`" if self.job.retried else "begin anew in another --out"
            raise TooManyFailures(reason, where=self.job.out, todo=f"see `dinoray status {out}`; mend the inputs and {again}, "
                                  "or raise --max-failed-fraction to go on")

    def _finish(self, outcome: Outcome) -> Outcome:
        """Summary, verification, `_SUCCESS`, last line."""
        tally = outcome.tally
        settle(tally, generations(self.store))
        if isinstance(self.store, LocalStore):
            self.store.sweep()
        self.store.put("_dinoray/summary.json", json.dumps(
            {"fingerprint": outcome.fingerprint, "num_units": outcome.num_units, **tally.as_dict()}, indent=1,
            sort_keys=True).encode())
        reach("run.verify")
        outcome.verified = verify_fast(self.store, write_success=True)
        bad, out = "", shlex.quote(outcome.out)
        if tally.quarantined:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.reasons.items()))
            bad = f", {tally.quarantined} quarantined ({reasons})"
            self.say(f"quarantined items: once they are mended, run: dinoray retry {out}" if self.job.retried else
                     "quarantined: labels are 0 there; mend the volume and segment it into a new --out")
        if outcome.verified["without_objects"]:
            bad += f", {outcome.verified['without_objects']} without objects"
        if tally.degraded_units:
            bad += f", {plural(tally.degraded_units, 'unit')} with degraded numerics"
        for note in unfinished_notes(self.store):
            self.say(note)
        for note in scale_notes(generations(self.store)):
            self.say(note)
        self.say(f"look at it: dinoray report {out}")
        done = f"{plural(tally.items, self.job.noun)}, {plural(tally.rows, self.job.row_noun)}"
        planned = generations(self.store)[0].plan.facts.get("num_tokens")
        if planned is not None:
            partly = ", those of quarantined slabs not counted" if tally.quarantined else ""
            done += f" of {planned:,} ({tally.rows / planned:.1%}{partly})"
            if not tally.rows:
                self.say("not one token was computed: " + ("every slab is quarantined" if tally.quarantined else
                         "there is no foreground (--foreground) anywhere in this volume"))
        self.say(f"dinoray {outcome.fingerprint}  complete: {done}{bad}  "
                 f"output {outcome.out}  same command again: {outcome.resume_command}")
        return outcome


@contextlib.contextmanager
def open_session(store: Store, resolved: Resolved, command: str, say: Callable[[str], None], *,
                 leave: Callable[[str], None] | None = None) -> Iterator[Session]:
    """Hold the output, and whatever the units will need. Raises OutputHeld when another driver does."""
    job = resolved.job
    driver = Driver(store, command, say, takeover=job.takeover)
    driver.leave = leave
    with driver, Progress(say) as progress, contextlib.closing(make_pool(job, resolved, say)) as pool:
        yield Session(store, resolved, command, say, driver, pool, progress)
