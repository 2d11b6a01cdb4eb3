"""Values from a command line, a YAML file or a record -> a validated job."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dinoray.config.base import UnitJob
from dinoray.config.images import ExtractCellsJob, ExtractImagesJob
from dinoray.config.segmentation import SegmentCellsJob
from dinoray.config.volume_segmentation import SegmentVolumeJob
from dinoray.config.volumes import ExtractVolumeJob
from dinoray.errors import BadRequest

Job = TypeVar("Job", bound=BaseModel)


def recorded_model(values: dict[str, Any]) -> type[UnitJob]:
    """The kind of job whose `model_dump` these values are: only volumes have a `voxel_size`, only cells a `crop_um`, only
    segmentations a `checkpoint`, and of these only volumes `halo_voxels`."""
    if "checkpoint" in values:
        return SegmentVolumeJob if "halo_voxels" in values else SegmentCellsJob
    return ExtractVolumeJob if "voxel_size" in values else ExtractCellsJob if "crop_um" in values else ExtractImagesJob


def recorded_job(values: dict[str, Any]) -> UnitJob:
    """The job whose `model_dump` these values are (job.json, RunnerSpec)."""
    return recorded_model(values)(**values)


def _plain(error: Any, model: type[BaseModel]) -> str:
    """What pydantic found, in plain words, with the flag (without dashes: the field of a job file) that it is about."""
    plain = {"missing": "is needed and was not given", "extra_forbidden": "there is no such field"}
    text = plain.get(error["type"], str(error["msg"]).removeprefix("Value error, "))
    names = "|".join(sorted(model.model_fields, key=len, reverse=True))
    text = re.sub(rf"^({names})(?=: )|(?<![\w-])(?=\w+_)({names})(?!\w)", lambda match: _flag(match[0], model), text)
    name, *inner = [str(part) for part in error["loc"]] or [""]
    return f"{'.'.join([_flag(name, model), *inner])}: {text}" if name else text


def _flag(name: str, model: type[BaseModel]) -> str:
    """`--raw-voxel-size` of `raw_voxel_size`; other names, `sources`, and fields of jobs without flags, as they are."""
    if not issubclass(model, UnitJob):
        return name
    return "--" + name.replace("_", "-") if name in model.model_fields and name != "sources" else name


def _fields_of(model: type[BaseModel], place: tuple[Any, ...]) -> str:
    """`fields: a, b`, or `fields of augmentation: a, b` where `place` leads from the model into one that it holds."""
    for part in place:
        if part in model.model_fields:
            inner = _models_in(model.model_fields[part].annotation)
            model = inner[0] if inner else model
    name = ".".join(map(str, place))
    return f"fields{f' of {name}' if name else ''}: {', '.join(model.model_fields)}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type is made of, such as the one in `tuple[LabelledSource, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def build_job(model: type[Job], values: dict[str, Any]) -> Job:
    """Validate a job; every problem is listed with its flag or field. Raises BadRequest."""
    try:
        return model.model_validate(values)  # not model(**values): YAML keys may be no text
    except ValidationError as error:
        whole = error.errors()
        # a list of which one item is wrong is also "too short": only what began it is told
        found = [e for e in whole if not any(len(o["loc"]) > len(e["loc"]) and o["loc"][:len(e["loc"])] == e["loc"] for o in whole)]
        unknown = dict.fromkeys(e["loc"][:-1] for e in found if e["type"] in ("extra_forbidden", "invalid_key"))
        todo = "; ".join(_fields_of(model, place) for place in unknown) or getattr(
                model, "help_hint", f"`dinoray {getattr(model, 'verb', 'extract')} {getattr(model, 'command', 'images')} "
                "--help` explains each")
        raise BadRequest("the job is not valid:\n  " + "\n  ".join(_plain(e, model) for e in found), todo=todo) from error


def read_job_file(path: str | Path, overrides: list[str] | None = None,
                  model: type[BaseModel] = ExtractImagesJob) -> dict[str, Any]:
    """A job's YAML (safe loader) with `key=value` overrides, values read as YAML; `augmentation.p_rotate=0` and
    `train.0.weight=2` change what is inside a field. `model` names the fields in messages. Raises BadRequest."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, dates such as 2024-13-45
        raise BadRequest(f"cannot read the job file: {error}", where=str(path),
                         todo="give the path of a YAML file of `field: value` lines") from error
    if not isinstance(values, dict):
        raise BadRequest("a job file is a mapping of field: value", where=str(path),
                         todo=f"fields: {', '.join(model.model_fields)}")
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals:
            raise BadRequest(f"not an override: {override!r}", todo="write key=value")
        try:
            _put(values, key.strip(), yaml.safe_load(text))
        except (ValueError, yaml.YAMLError) as error:
            raise BadRequest(f"not an override: {override!r}: {error}") from error
    return values


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a field, or what `field.inner` leads to. Raises BadRequest where it leads through something else."""
    *path, last = key.split(".")
    at: Any = values
    for number, part in enumerate(path):
        at, held = _step(at, part, key), at
        if at is None:
            at = {}
            held[int(part) if isinstance(held, list) else part] = at
        if not isinstance(at, dict | list):
            raise BadRequest(f"not an override: {key!r}: {'.'.join(path[:number + 1])} holds {at!r}, nothing with fields",
                             todo="name a field of a field, such as augmentation.p_rotate=0")
    _step(at, last, key)
    at[int(last) if isinstance(at, list) else last] = value


def _step(at: dict | list, part: str, key: str) -> Any:
    """What a mapping or list holds there; None for nothing yet. Raises BadRequest outside a list."""
    if isinstance(at, dict):
        return at.get(part)
    if not (part.isascii() and part.isdigit() and int(part) < len(at)):
        raise BadRequest(f"not an override: {key!r}: no item {part!r} in a list of {len(at)}", todo="items are counted from 0")
    return at[int(part)]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the text that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
