"""What an output of `dinoray train` says of itself, read for its report: job, progress, history, surveys, checkpoint, pictures.

Everything but the job may be missing: a training that runs, or was stopped, shows what there is.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dinoray.config import TrainDistanceMapJob
from dinoray.config.training import TRAINING_EXECUTION_FIELDS
from dinoray.errors import OutputDamaged
from dinoray.io.stores import Store
from dinoray.io.training_examples import Example, stored_examples

SETS = ("train", "validation")
_ROWS = TypeAdapter(list[dict[str, float | None]])
_SURVEY = ("image_id", "source", "height", "width", "objects", "median_diameter_px", "diameters_px", "pixel_size_um", "reason",
           "message")


class _Identity(BaseModel):
    settings: dict[str, Any]
    model: str
    weights_digest: str


class _Record(BaseModel):
    """What the report needs of `_dinoray/job.json`."""

    model_config = ConfigDict(extra="allow")
    kind: str
    command: str
    fingerprint: str
    identity: _Identity
    job: dict[str, Any]


class _Checkpoint(BaseModel):
    """What the report needs of `checkpoint/config.json`."""

    model_config = ConfigDict(extra="allow")
    peak: float
    fill: float
    weights_digest: str
    backbone: dict[str, Any]
    decoder: dict[str, Any]
    metrics: dict[str, Any]
    training: dict[str, Any]
    channels: str
    scaling: str
    scaling_percents: tuple[float, float]
    crop_px: int
    median_diameter_px: float | None
    pixel_size_um: float | None


@dataclass
class Training:
    """An output of a training."""

    store: Store
    record: _Record
    job: TrainDistanceMapJob
    progress: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float | None]] = field(default_factory=list)
    surveys: dict[str, pa.Table] = field(default_factory=dict)
    checkpoint: _Checkpoint | None = None
    examples: list[Example] = field(default_factory=list)

    def values(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one figure of the history."""
        rows = [row for row in self.history if row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]  # type: ignore[misc]

    def changed_settings(self) -> list[tuple[str, Any]]:
        """(name, value) of the settings that change what is learned and differ from their defaults, nested ones by dots."""
        settings = self.record.identity.settings
        plain = type(self.job).model_construct(train=()).model_dump(mode="json", warnings=False)
        found: list[tuple[str, Any]] = []
        for name, value in settings.items():
            default = plain.get(name)
            if isinstance(value, dict) and isinstance(default, dict):
                found += [(f"{name}.{key}", one) for key, one in value.items() if one != default.get(key)]
            elif value != default and name not in TRAINING_EXECUTION_FIELDS:
                found.append((name, value))
        return found


def is_training(store: Store) -> bool:
    """Whether this is an output of `dinoray train`; a record that cannot be read is for others to complain of."""
    try:
        return str(json.loads(store.get("_dinoray/job.json"))["kind"]).startswith("train ")
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def open_training(store: Store) -> Training:
    """Read the records. Raises OutputDamaged for one that is there and cannot be read."""
    record = _parsed(store, "_dinoray/job.json", _Record)
    try:
        job = TrainDistanceMapJob(**record.job)
    except ValidationError as error:
        raise OutputDamaged(f"the record of the job cannot be read: {error.errors()[0]['msg']}",
                            where=f"{store.url}/_dinoray/job.json", todo="restore it from a copy") from error
    surveys = {name: table for name in SETS if (table := _survey(store, name)) is not None}
    return Training(store, record, job, read_json(store, "_dinoray/progress.json") or {}, read_history(store), surveys,
                    _parsed(store, "checkpoint/config.json", _Checkpoint, missing_ok=True), stored_examples(store))


def read_json(store: Store, key: str) -> Any:
    """A record, None where it is missing. Raises OutputDamaged."""
    try:
        return json.loads(store.get(key))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(store, key, error) from error


def _parsed(store: Store, key: str, model: type[BaseModel], *, missing_ok: bool = False) -> Any:
    found = read_json(store, key)
    if found is None and missing_ok:
        return None
    try:
        return model.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(store, key, f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}") from error


def read_history(store: Store) -> list[dict[str, float | None]]:
    """The rows of history.json. Raises OutputDamaged."""
    found = read_json(store, "history.json")
    try:
        rows = _ROWS.validate_python([] if found is None else found)
        if any(row.get("step") is None for row in rows):
            raise ValueError("a row without a step")
    except ValueError as error:  # pydantic's too
        raise _damaged(store, "history.json", str(error).splitlines()[0]) from error
    return rows


def _survey(store: Store, name: str) -> pa.Table | None:
    key = f"_dinoray/survey-{name}.parquet"
    try:
        return pq.read_table(io.BytesIO(store.get(key))).select(_SURVEY)
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(store, key, error) from error


def _damaged(store: Store, key: str, why: object) -> OutputDamaged:
    return OutputDamaged(f"a record of the training cannot be read: {why}", where=f"{store.url}/{key}",
                         todo="restore it from a copy")
