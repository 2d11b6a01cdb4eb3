"""What a training can be taken up from: the newest state, and the best one, beside the output.

`OUT/_dinoray/states/<kind>-<step>.pt` is written whole first, then `<kind>.json` points at it; older ones go last. A run
killed anywhere finds a whole state. Read with torch's weights-only loader: a state runs no code.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any, Literal

import torch

from dinoray.errors import OutputDamaged
from dinoray.failpoints import reach
from dinoray.io.stores import Store

PREFIX = "_dinoray/states"
Kind = Literal["last", "best"]


def save_state(store: Store, kind: Kind, step: int, state: dict[str, Any]) -> None:
    """Store a state of tensors and plain values, then point at it."""
    sink = io.BytesIO()
    torch.save(state, sink)
    data = sink.getbuffer()
    key = f"{PREFIX}/{kind}-{step:09d}.pt"
    store.put(key, data)
    reach("train.state")
    pointer = {"step": step, "key": key, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    store.put(f"{PREFIX}/{kind}.json", json.dumps(pointer, indent=1).encode())
    for old, _ in list(store.list(PREFIX)):
        if old.startswith(f"{PREFIX}/{kind}-") and old != key:
            store.delete(old)


def load_state(store: Store, kind: Kind, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The state that `<kind>.json` points at, or None. Raises OutputDamaged when it is not what was written."""
    try:
        pointer = json.loads(store.get(f"{PREFIX}/{kind}.json"))
    except FileNotFoundError:
        return None
    where, todo = f"{store.url}/{pointer['key']}", "delete the output's _dinoray/states to begin anew, or restore it from a copy"
    try:
        data = store.get(pointer["key"])
    except FileNotFoundError as error:
        raise OutputDamaged("a saved state is missing", where=where, todo=todo) from error
    if hashlib.sha256(data).hexdigest() != pointer["sha256"]:
        raise OutputDamaged("a saved state is not what was written", where=where, todo=todo)
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
