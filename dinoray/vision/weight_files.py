"""Weight files on disk: find them in a folder, read them tensor by tensor, never run code from them.

Reads single and sharded safetensors, and torch pickles only through `torch.load(weights_only=True)`.
Safetensors and zip pickles are memory-mapped, so a large checkpoint is never held whole.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dinoray.errors import WeightsError

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INDEX = "model.safetensors.index.json"
_FORMATS = "give a .safetensors, .pth, .pt or .bin file, or a folder that holds one checkpoint"


@dataclass(frozen=True)
class WeightFiles:
    """A checkpoint found on this machine: its files, and where they came from (a path or a hub id)."""

    files: tuple[Path, ...]
    source: str
    hub_id: str = ""

    @property
    def folder(self) -> Path:
        return self.files[0].parent


def find(path: Path, source: str = "", hub_id: str = "") -> WeightFiles:
    """The checkpoint at `path`, a file or a folder that holds exactly one. Raises WeightsError."""
    source = source or str(path)
    if not path.is_dir():
        if path.name == INDEX:
            return WeightFiles(_shards(path), source, hub_id)
        if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
            raise WeightsError(f"cannot read a {path.suffix or 'nameless'} file", where=source, todo=_FORMATS)
        return WeightFiles((path,), source, hub_id)
    if (path / INDEX).is_file():
        return WeightFiles(_shards(path / INDEX), source, hub_id)
    if (path / "model.safetensors").is_file():
        return WeightFiles((path / "model.safetensors",), source, hub_id)
    found = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", *TORCH_SUFFIXES))
    if len(found) != 1:
        names = ", ".join(f.name for f in found) or "no weight files"
        raise WeightsError(f"the folder holds {names}", where=source, todo=_FORMATS)
    return WeightFiles((found[0],), source, hub_id)


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"unreadable index: {error}", where=str(index), todo="download it again"
        ) from error
    outside = [n for n in names if not isinstance(n, str) or Path(n).name != n]
    if outside or not names:
        raise WeightsError(
            f"the index names {outside or 'no shards'}", where=str(index), todo="download it again"
        )
    missing = [n for n in names if not (index.parent / n).is_file()]
    if missing:
        raise WeightsError(
            f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing)}",
            where=str(index.parent),
            todo="finish the download",
        )
    return tuple(index.parent / n for n in names)


class TensorReader:
    """The tensors of a checkpoint by name: `shapes`, `dtypes`, and `read(name)` as float32 on the CPU."""

    def __init__(self, found: WeightFiles):
        self.where = found.source
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._of: dict[str, object] = {}
        for file in found.files:
            if not file.is_file():
                raise WeightsError("no such file", where=str(file), todo=_FORMATS)
            opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)
            for name, shape in opened.shapes().items():
                if name in self._of:
                    raise WeightsError(f"two shards hold {name}", where=self.where, todo="download it again")
                self._of[name], self.shapes[name] = opened, shape
                self.dtypes[name] = opened.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._of[name].read(name)
        if not tensor.is_floating_point():
            raise WeightsError(f"{name} is {tensor.dtype}", where=self.where, todo="give unquantised weights")
        return tensor.to(torch.float32)


class _Safetensors:
    def __init__(self, handle):
        self.handle = handle

    def shapes(self):
        return {name: tuple(self.handle.get_slice(name).get_shape()) for name in self.handle.keys()}  # noqa: SIM118

    def dtype(self, name: str) -> str:
        return _DTYPES.get(code := str(self.handle.get_slice(name).get_dtype()), code)

    def read(self, name: str) -> torch.Tensor:
        return self.handle.get_tensor(name)


class _Pickled:
    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = state

    def shapes(self):
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def dtype(self, name: str) -> str:
        return str(self.state[name].dtype).removeprefix("torch.")

    def read(self, name: str) -> torch.Tensor:
        return self.state[name].detach()


def _open_safetensors(file: Path) -> _Safetensors:
    try:
        return _Safetensors(safe_open(file, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"not a readable safetensors file: {error}", where=str(file), todo="download it again"
        ) from error


def _open_torch(file: Path) -> _Pickled:
    try:
        # only the zip format can be mapped; older pickles are read whole
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise WeightsError(
            f"refused: the pickle holds more than tensors, or is damaged ({reason})",
            where=str(file),
            todo="loading it could run code; get the file from its publisher, as safetensors if possible",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise WeightsError(
            f"not a readable torch file: {error!r}", where=str(file), todo="download it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        inside = list(state)[:5] if isinstance(state, dict) else type(state).__name__
        raise WeightsError(
            f"expected a dictionary of tensors, found {inside}",
            where=str(file),
            todo="extract the backbone's state_dict and save that",
        )
    return _Pickled(state)
