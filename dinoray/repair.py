"""`retry` and `extend`: new generations on an output that was made before. Nothing that was committed changes.

A retry plans the quarantined items again, as the sources list them now; an extension plans the inputs that the
output does not hold yet. Either is resumed by the same command, and by the first one.
"""

from __future__ import annotations

import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from dinoray.config import ExtractVolumeJob, SegmentVolumeJob, UnitJob, build_job
from dinoray.errors import BadRequest, ChangedRequest
from dinoray.generations import REQUEST, Generation, begin, generations, next_prefix, quarantined_now
from dinoray.inputs import list_inputs
from dinoray.io.items import Item
from dinoray.io.stores import is_local, local_path, open_store
from dinoray.io.volume_arrays import check_arrays
from dinoray.planning import id_hash, spool_items
from dinoray.request import absolute, differences, read_identity, read_request
from dinoray.resolve import resolve
from dinoray.resolved import Resolved
from dinoray.sealing import known_scaling
from dinoray.session import Outcome, Session, open_session
from dinoray.units import item_digest
from dinoray.verification import open_run
from dinoray.volume_repair import plan_volume_retry

OBJECT_FIELDS = ("labels", "centroids")
"""Fields of a job of cells that an extension may have of its own."""
NEVER_MENDED = frozenset({"duplicate_id"})
"""Reasons that a second look cannot change while the plan stands."""


def retry(out: str, *, reasons: Iterable[str] = (), say: Callable[[str], None] = print,
          leave: Callable[[str], None] | None = None, **execution: Any) -> Outcome:
    """Plan and run the quarantined items of an output again (`reasons`: only these). `execution`: fields of the job
    that do not change results, such as workers.

    Raises BadRequest for a reason that no item has, and what `extract_images` raises.
    """
    wanted, out = set(reasons), _absolute(out)
    command = shlex.join(["dinoray", "retry", out, *(word for reason in sorted(wanted) for word in ("--reason", reason))])
    job, resolved = _again(out, execution)
    if isinstance(job, SegmentVolumeJob):
        raise BadRequest("boxes of a segmented volume are not tried again by themselves: labels of all others may depend on them",
                         where=job.out, todo="mend the volume and segment it into a new --out")
    store = open_store(job.out)
    say(f"dinoray {resolved.fingerprint}  {resolved.description}  output {job.out}  resume with: {command}")
    with open_session(store, resolved, command, say, leave=leave) as session:
        parts = generations(store)
        if "arrays" in parts[0].plan.facts:
            check_arrays(store, parts[0].plan.facts["arrays"])
        open_parts = [part for part in parts if part.kind == "retry" and part.plan.pending(part.ledger.done())]
        if open_parts:
            say(f"an earlier retry is finished first ({sum(p.plan.num_items for p in open_parts)} items)")
        elif rows := _rows_to_retry(parts, wanted, say):
            (plan_volume_retry if isinstance(job, ExtractVolumeJob) else _plan_retry)(session, parts, rows)
        return session.run(("retry", "first", "extend"), tolerant=True)


def extend(out: str, sources: Iterable[str], *, say: Callable[[str], None] = print,
           leave: Callable[[str], None] | None = None, **execution: Any) -> Outcome:
    """Add the inputs of `sources` that the output does not hold yet, with the settings it was made with.

    Raises ChangedRequest when an input that it holds has changed, BadRequest, and what `extract_images` raises.
    """
    out, sources = _absolute(out), [_absolute(source) for source in sources]
    where = {name: execution[name] for name in OBJECT_FIELDS if execution.get(name) is not None}
    command = shlex.join(["dinoray", "extend", out, *sources, *(w for name, url in where.items() for w in (f"--{name}", url))])
    job, resolved = _again(out, execution)
    if isinstance(job, ExtractVolumeJob | SegmentVolumeJob):
        raise BadRequest("the output of a volume cannot be extended: its arrays have one size", where=job.out,
                         todo=f"{job.verb} the other volume (or crop) into an --out of its own")
    more = absolute(job.model_copy(update={"sources": tuple(sources)})).sources
    if not more:
        raise BadRequest("no source", where="SRC", todo="name what to add: folders, files, globs, URLs, manifests")
    store = open_store(job.out)
    say(f"dinoray {resolved.fingerprint}  {resolved.description}  output {job.out}  resume with: {command}")
    with open_session(store, resolved, command, say, leave=leave) as session:
        parts = generations(store)
        known = _Known(parts)
        listing = list_inputs(job.model_copy(update={"limit": None}), list(more), root=parts[0].plan.facts["root"])
        groups = _scaled_groups(session)
        fresh = known.fresh(listing.items)
        first = next(fresh, None)
        if first is None and not known.changed:
            say(f"nothing to add: all {known.seen} inputs are planned already")
        if known.changed and first is None:
            known.refuse(store.url)
        prefix = next_prefix(store, parts, "extend", command)
        if first is None:
            store.delete(f"{prefix}/{REQUEST}")  # of an earlier try: what it asked for is there by now
        else:
            begin(store, prefix, command)
            with spool_items(chain([first], fresh), sample=job.scaling_sample if job.scaling == "plate" else 0,
                             sample_if=lambda item: item.group not in groups) as spool:
                if known.changed:
                    store.delete(f"{prefix}/{REQUEST}")
                known.refuse(store.url)
                say(f"{spool.num_items} inputs are new, {known.seen - spool.num_items} are planned already")
                columns = set(parts[0].plan.facts["metadata_columns"]) | set(spool.metadata_columns)
                spool.metadata_columns = tuple(sorted(columns))
                session.seal(spool, prefix=prefix, root=parts[0].plan.facts["root"], sources=list(more),
                             objects={name: getattr(job, name) for name in OBJECT_FIELDS if hasattr(job, name)})
        return session.run(tolerant=False)


def _absolute(url: str) -> str:
    """A local path as it must be named from any other folder."""
    return str(local_path(url)) if is_local(url) else url


def _again(out: str, execution: dict[str, Any]) -> tuple[UnitJob, Resolved]:
    """The job of an output, with other execution settings; it must still compute the same."""
    store, _, _ = open_run(out)
    recorded, fingerprint = read_request(store)
    given = {name: value for name, value in execution.items() if value is not None}
    # `out` as given now: the folder may have been moved since
    job = absolute(build_job(type(recorded), recorded.model_dump() | given | {"out": out}))
    resolved = resolve(job)
    if resolved.fingerprint != fingerprint:
        raise ChangedRequest("this output was made with other settings or library versions:\n  "
                             + "\n  ".join(differences(read_identity(store), resolved.identity)), where=store.url,
                             todo="use the versions it was made with (constraints.txt), or a new --out")
    return job, resolved


def _rows_to_retry(parts: list[Generation], wanted: set[str], say: Callable[[str], None]) -> list[dict[str, str]]:
    """The quarantined items to plan again, rows of QUARANTINE_SCHEMA."""
    rows = quarantined_now(parts).to_pylist()
    found = Counter(row["reason"] for row in rows)
    if unknown := wanted - found.keys():
        raise BadRequest(f"no item is quarantined for {', '.join(sorted(unknown))}", where="--reason",
                         todo="reasons here: " + (", ".join(f"{r} ({n})" for r, n in sorted(found.items())) or "none"))
    wanted = wanted | {"missing_tokens"} if wanted else wanted  # of a volume: they wait for others that are tried again
    rows = [row for row in rows if (row["reason"] in wanted if wanted else row["reason"] not in NEVER_MENDED)]
    if not rows:
        say("nothing to retry" + (f": what is left ({sum(found.values())} items) cannot be mended by a retry" if found else ""))
    return rows


def _plan_retry(session: Session, parts: list[Generation], rows: list[dict[str, str]]) -> None:
    """Seal a generation of these items, as their sources list them now."""
    old: dict[str, list[str]] = {}
    for row in rows:
        old.setdefault(row["item_id"], []).append(row["reason"])
    job, root = session.job, parts[0].plan.facts["root"]

    def listed() -> Iterator[Item]:
        seen: set[tuple[str, str]] = set()
        for part in parts:
            if part.kind == "retry":
                continue
            sources = part.plan.facts["sources"] if part.kind == "extend" else list(job.sources)
            rules = job if part.kind == "first" else job.model_copy(update={"limit": None, **part.plan.facts["objects"]})
            for item in list_inputs(rules, sources, root=root).items:
                key = (item.item_id, item.files[0].uri)
                if item.item_id in old and key not in seen:
                    seen.add(key)
                    yield item

    groups = _scaled_groups(session)
    items = listed()
    first = next(items, None)
    if first is None:
        session.say(f"none of the {len(rows)} quarantined items is listed by the sources any more")
        return
    with spool_items(chain([first], items), sample=job.scaling_sample if job.scaling == "plate" else 0,
                     sample_if=lambda item: item.group not in groups or "no_scaling" in old[item.item_id]) as spool:
        spool.metadata_columns = tuple(parts[0].plan.facts["metadata_columns"])
        missing = len(rows) - spool.num_items
        session.say(f"{spool.num_items} of {len(rows)} quarantined items are tried again"
                    + (f"; {missing} are not listed by the sources any more" if missing else ""))
        number = 1 + sum(part.kind == "retry" for part in parts)
        session.seal(spool, prefix=next_prefix(session.store, parts, "retry", ""), root=root, suffix=f".r{number}",
                     replaces=lambda ids: dict(Counter(old[item_id].pop() for item_id in ids if old[item_id])))


def _scaled_groups(session: Session) -> set[str]:
    """The groups whose intensity scaling is known."""
    return set(known_scaling(session.store)["group"].to_pylist()) if session.job.scaling == "plate" else set()


class _Known:
    """The inputs that an output has planned, in 16 bytes each."""

    def __init__(self, parts: list[Generation]):
        ids, digests = array("Q"), array("Q")
        for part in parts:
            for unit in part.plan.units():
                ids.extend(id_hash(item.item_id) for item in unit.items)
                digests.extend(_short(item) for item in unit.items)
        order = np.argsort(np.frombuffer(ids, np.uint64), kind="stable")
        ordered = np.frombuffer(ids, np.uint64)[order]
        last = np.append(ordered[1:] != ordered[:-1], True)  # of one id, what the latest generation planned
        self._ids, self._digests = ordered[last], np.frombuffer(digests, np.uint64)[order][last]
        self.seen = 0
        self.changed: list[str] = []

    def fresh(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items that are not planned; `changed` gathers those that are, with other content."""
        for item in items:
            self.seen += 1
            key = np.uint64(id_hash(item.item_id))
            at = int(np.searchsorted(self._ids, key))
            if at == len(self._ids) or self._ids[at] != key:
                yield item
            elif int(self._digests[at]) != _short(item) and item.problem is None:
                self.changed.append(item.item_id)

    def refuse(self, where: str) -> None:
        """Raise ChangedRequest when inputs that are planned have changed."""
        if self.changed:
            raise ChangedRequest(f"{len(self.changed)} inputs have changed since they were planned (e.g. {self.changed[0]})",
                                 where=where, todo="committed results are never replaced: use `dinoray retry` if they are "
                                 "quarantined, else a new --out, or leave them out of the sources")


def _short(item: Item) -> int:
    return int.from_bytes(item_digest(item)[:8], "little")
