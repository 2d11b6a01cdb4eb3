"""What a training is asked for: the job with every `auto` and path settled, its identity, and whose the output is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dinoray.config import TrainingJob, canonical_json
from dinoray.errors import BadRequest, ChangedRequest, OutputDamaged
from dinoray.io.stores import Store, is_local, local_path
from dinoray.request import KEY, differences
from dinoray.training.kinds import Listed
from dinoray.training.listings import listing_changes, listing_of, stored_listing
from dinoray.training.states import POINTER
from dinoray.vision.backbone import Backbone

Job = TypeVar("Job", bound=TrainingJob)
FORMAT = 1
"""Version of the rules of a training; a new one cannot resume an old output."""
_BEFORE_A_STATE = ("_dinoray/inputs-", "_dinoray/survey-", "_dinoray/progress.json", "_dinoray/failure.json",
                   "_dinoray/states/", "tensorboard/", "history.json")
"""What a training writes before its first state."""
_OTHERS = ("_dinoray/tmp/", "_dinoray/driver.json", "_dinoray/stop.json")
"""What may lie in a folder that is otherwise empty."""


def recorded_device(store: Store) -> str | None:
    """The device that the output's training was begun on: `auto` is decided once."""
    try:
        return json.loads(store.get(KEY))["job"]["device"] if store.exists(POINTER) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None  # `check_training` says what is wrong with it


def settled(job: Job, *, has_cuda: bool, recorded: str | None = None) -> Job:
    """The job with every `auto` decided (`recorded`: the device decided on before) and local paths absolute. Raises BadRequest for
    what cannot be trained."""
    weights = f"{job.weights}:0" if job.weights == "random" else job.weights
    device = job.device if job.device != "auto" else recorded or ("cuda" if has_cuda else "cpu")
    if device == "cuda" and not has_cuda and job.no_ray:
        raise BadRequest("there is no CUDA device here" + (", and the training was begun on one" if recorded else ""),
                         where="device", todo="go on where there is one" if recorded else "use device=cpu")
    precision = job.precision if job.precision != "auto" else ("bfloat16" if device == "cuda" else "float32")
    return absolute_paths(job.model_copy(update={"weights": weights, "device": device, "precision": precision}))


def absolute_paths(job: Job) -> Job:
    """The job with absolute local paths, so that workers and a resumed run mean the same files."""
    def absolute(url: str) -> str:
        file, mark, key = url.partition("#")
        return f"{local_path(file)}{mark}{key}" if is_local(url) else url

    out = str(local_path(job.out)) if is_local(job.out) else job.out.rstrip("/")
    weights = job.weights
    if weights and is_local(weights) and Path(weights).expanduser().exists():
        weights = str(local_path(weights))
    staging = str(local_path(job.staging)) if job.staging and is_local(job.staging) else job.staging
    return job.model_copy(update={"out": out, "weights": weights, "staging": staging}).with_paths(absolute)


def identity_of(job: TrainingJob, backbone: Backbone | None, inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that changes what is learned: settings, weights by digest, inputs by the digests of their listings."""
    settings = {k: v for k, v in job.result_settings().items() if k not in ("model", *job.source_fields)}
    sources = [source.model_dump(mode="json", exclude=set(source.path_fields))
               for name in job.source_fields for source in getattr(job, name)]
    return {"format": FORMAT, "kind": job.kind, "settings": settings, "sources": sources,
            "model": None if backbone is None else backbone.config.name,
            "weights_digest": None if backbone is None else backbone.digest, "inputs": dict(inputs)}


def recorded_identity(store: Store, identity: dict[str, Any], sets: Mapping[str, Sequence[Listed]]) -> dict[str, Any] | None:
    """The identity that the output was begun with, where nothing differs from `identity` but the places and versions of
    files, the images and their sizes being the same; else None."""
    try:
        then = json.loads(store.get(KEY))["identity"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None  # `check_training` says what is wrong with it
    now = json.loads(canonical_json(identity))
    if then == now or then | {"inputs": None} != now | {"inputs": None}:
        return None
    for name, images in sets.items():
        kept, same = stored_listing(store, name), ["source", "image_id", "sizes"]
        if kept is None or not kept.select(same).equals(listing_of(images).select(same)):
            return None
    return then


def check_training(store: Store, fingerprint: str, identity: dict[str, Any],
                   sets: Mapping[str, Sequence[Listed]]) -> bool:
    """Whether the output is this training's already. `sets`: the images behind `identity["inputs"]`, to name those that
    differ. Another training's that ended before its first state (refused images, say) can be replaced: then it is not.

    Raises BadRequest, ChangedRequest when it is something else's, OutputDamaged when its record cannot be read."""
    try:
        record = json.loads(store.get(KEY))
        before, then = record["fingerprint"], record.get("identity", {})
    except FileNotFoundError:
        stray = next((key for key, _ in store.list() if not key.startswith(_OTHERS)), None)
        if stray is not None:
            raise BadRequest(f"the output folder is not empty and not dinoray's (it holds {stray})", where=store.url,
                             todo="choose a new or empty folder for out") from None
        return False
    except NotADirectoryError as error:
        raise BadRequest("the output folder is a file, or lies below one", where=store.url,
                         todo="choose a new or empty folder for out") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OutputDamaged(f"the record of the job cannot be read: {error!r}", where=f"{store.url}/{KEY}",
                            todo="restore it from a copy, or use another out") from error
    is_training = str(record.get("kind", "")).startswith("train ")
    if before != fingerprint and (store.exists(POINTER) or not is_training):
        changes = [_with_names(store, line, sets) for line in differences(then, json.loads(canonical_json(identity)))]
        raise ChangedRequest("this output was made with other settings or data:\n  " + "\n  ".join(changes[:20]), where=store.url,
                             todo="use another out, or the same settings to resume")
    return before == fingerprint


def forget(store: Store) -> bool:
    """Drop what a training left that ended before its first state; whether there was any. Nothing that was learned is lost."""
    left = [key for key, _ in store.list() if key.startswith(_BEFORE_A_STATE)]
    for key in left:
        store.delete(key)
    return bool(left)


def _with_names(store: Store, line: str, sets: Mapping[str, Sequence[Listed]]) -> str:
    """A line of `differences`; where it is about images and theirs were kept, with their names in place of digests."""
    for name, images in sets.items():
        if line.startswith(f"inputs.{name}: ") and (kept := stored_listing(store, name)) is not None:
            changes = listing_changes(kept, listing_of(images))
            return f"inputs.{name}: {changes}" if changes else line
    return line
