"""The request that an output was made for: `_dinoray/job.json`, written once, compared on every later run."""

from __future__ import annotations

import json
import shlex
from typing import Any

from dinoray.config import UnitJob, build_job, recorded_model
from dinoray.errors import BadRequest, ChangedRequest, OutputDamaged
from dinoray.io.stores import Store, is_local, local_path
from dinoray.ledger import Ledger
from dinoray.resolved import Resolved
from dinoray.units import Plan
from dinoray.verification import training_record

KEY = "_dinoray/job.json"
_OTHERS = ("_dinoray/tmp/", "_dinoray/driver.json", "_dinoray/stop.json")
"""What may lie in a folder that is otherwise empty."""


def check_request(store: Store, resolved: Resolved) -> bool:
    """Compare with the request that the output was made for, if any; True when its plan is sealed. Writes nothing.

    Raises BadRequest for a folder of something else, ChangedRequest naming every setting that differs.
    """
    if training_record(store):
        raise ChangedRequest("this is the output of a training", where=store.url, todo="use another --out")
    sealed = Plan.exists(store)
    if not sealed and Ledger(store).done():
        raise OutputDamaged("there are receipts, but the plan's index is gone", where=f"{store.url}/_dinoray/plan/index.parquet",
                            todo="restore it from a copy, or use a new --out")
    try:
        existing = json.loads(store.get(KEY))
        before: tuple[str, Any] | None = existing["fingerprint"], existing["identity"]
    except FileNotFoundError:
        before = None
        stray = next((key for key, _ in store.list() if not key.startswith(_OTHERS)), None)
        if stray is not None:
            raise BadRequest(f"the output folder is not empty and not dinoray's (it holds {stray})", where=store.url,
                             todo="choose a new or empty folder for --out") from None
    except NotADirectoryError as error:
        raise BadRequest("the output folder is a file, or lies below one", where=store.url,
                         todo="choose a new or empty folder for --out") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OutputDamaged(f"the record of the job cannot be read: {error!r}", where=f"{store.url}/{KEY}",
                            todo="restore it from a copy, or use a new --out") from error
    if before is not None and before[0] != resolved.fingerprint:
        changes = differences(before[1], resolved.identity)
        if sealed:
            raise ChangedRequest("this output was made with other settings:\n  " + "\n  ".join(changes),
                                 where=store.url, todo="use another --out, or the same settings to resume")
    return sealed


def record_request(store: Store, resolved: Resolved, command: str) -> None:
    """Write job.json: whose output this is from now on. Replaced until a plan is sealed."""
    content = {"fingerprint": resolved.fingerprint, "identity": resolved.identity, "command": command,
               "job": resolved.job.model_dump(mode="json"), "weights": resolved.weights_facts}
    store.put(KEY, json.dumps(content, indent=1, sort_keys=True).encode())


def read_identity(store: Store) -> dict[str, Any]:
    """All that changes results, as the output was made with."""
    return json.loads(store.get(KEY))["identity"]


def read_request(store: Store) -> tuple[UnitJob, str]:
    """The job that an output was made by, and its fingerprint. Raises BadRequest, OutputDamaged."""
    if training_record(store):
        raise BadRequest("this is the output of a training, which has no units", where=store.url,
                         todo="to train on with other data or settings, use another out")
    try:
        record = json.loads(store.get(KEY))
        return build_job(recorded_model(record["job"]), record["job"]), str(record["fingerprint"])
    except FileNotFoundError as error:
        raise BadRequest("this is not an output of dinoray", where=store.url, todo="give the --out of a run") from error
    except (ValueError, KeyError, TypeError, BadRequest) as error:
        raise OutputDamaged(f"the record of the job cannot be read: {error!r}", where=f"{store.url}/{KEY}",
                            todo="restore it from a copy, or use a new --out") from error


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`field: old -> new` for every leaf that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return lines
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def absolute(job: UnitJob) -> UnitJob:
    """The job with absolute local paths, so that its resume command works from any folder."""
    paths = {source: str(local_path(source)) if is_local(source) else source for source in job.sources}
    out = str(local_path(job.out)) if is_local(job.out) else job.out.rstrip("/")
    others = {name: str(local_path(url)) for name in ("labels", "centroids", "foreground", "checkpoint", "tokens", "context_tokens")
              if (url := getattr(job, name, None)) in job.other_inputs() and is_local(url)}
    return job.model_copy(update={"sources": tuple(paths.values()), "out": out, **others})


def resume_command(job: UnitJob) -> str:
    """A command line that runs the same job again."""
    last = ["--", *job.sources] if any(source.startswith("-") for source in job.sources) else []
    words = ["dinoray", job.verb, job.command, *([] if last else job.sources), "--out", job.out]
    default = type(job).model_fields
    for name, value in job.model_dump(mode="json").items():
        if name in ("sources", "out", "takeover") or value == default[name].get_default(call_default_factory=True):
            continue
        if isinstance(default[name].get_default(call_default_factory=True), tuple) and \
                tuple(value) == default[name].get_default(call_default_factory=True):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, dict):
            words += [w for k, v in value.items() for w in (flag, f"{k}={v}")]
        elif isinstance(value, list):
            words += [flag, ",".join(str(v) for v in value)]
        else:
            words += [flag, str(value)]
    return shlex.join([*words, *last])
