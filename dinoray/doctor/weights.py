"""What weights hold, layer by layer, and whether a network with them computes anything.

Loading is strict about names and shapes; this looks at the values: weights that were never trained, a LayerScale
left at its initial 1e-5 (every block then adds nothing, and the network is a no-op that looks alive), NaN, zeros.
One tensor is held at a time, so the largest model needs no more memory than its largest tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from dinoray.doctor.findings import Finding
from dinoray.errors import WeightsError
from dinoray.vision.canonical import places, update_digest
from dinoray.vision.layouts import canonical_shapes
from dinoray.vision.weight_hub import resolve
from dinoray.vision.weights import OpenedWeights, open_weights

NO_OP_GAMMA = 1e-4
"""A LayerScale whose largest gamma is below adds nothing. Initial value in training: 1e-5."""
FLOAT16_MAX = 65504.0


@dataclass
class LayerFacts:
    """The values of one layer (`embeddings`, `layer 0`.., `norm`). Ranges are (min, max, mean of absolute values)."""

    name: str
    tensors: int = 0
    values: int = 0
    dtypes: set[str] = field(default_factory=set)
    weights: tuple[float, float, float] | None = None
    """Of tensors with two or more axes."""
    gamma: tuple[float, float, float] | None = None
    """Of both LayerScales."""
    norm: tuple[float, float, float] | None = None
    """Of LayerNorm weights."""
    norms_at_init: bool = True
    """All norm weights are 1 and all their biases 0."""
    no_op: list[str] = field(default_factory=list)
    """LayerScales whose gammas are all below NO_OP_GAMMA."""
    zeros: list[str] = field(default_factory=list)
    """Weight tensors that are 0 throughout."""
    broken: list[str] = field(default_factory=list)
    """Tensors with NaN or infinity, or that cannot be read."""
    _sums: dict[str, tuple[float, int]] = field(default_factory=dict, repr=False)

    def add(self, part: str, tensor: torch.Tensor) -> None:
        """Count one float32 tensor in; `part` is its name inside the layer."""
        if "norm" in part:
            self.norms_at_init &= bool((tensor == (1.0 if part.endswith("weight") else 0.0)).all())
        kind = ("gamma" if part.endswith("lambda1") else "norm" if "norm" in part and part.endswith("weight")
                else "weights" if tensor.dim() > 1 else None)
        if kind is None:
            return
        if kind == "weights" and not part.endswith("mask_token") and not tensor.any():
            self.zeros.append(part)
        if kind == "gamma" and tensor.abs().max() < NO_OP_GAMMA:
            self.no_op.append(part.removesuffix(".lambda1"))
        total, count = self._sums.get(kind, (0.0, 0))
        total, count = total + tensor.abs().sum(dtype=torch.float64).item(), count + tensor.numel()
        self._sums[kind] = total, count
        before = getattr(self, kind) or (float("inf"), float("-inf"), 0.0)
        setattr(self, kind, (min(before[0], tensor.min().item()), max(before[1], tensor.max().item()), total / count))


@dataclass
class WeightsExamination:
    """What `examine_weights` found."""

    findings: list[Finding]
    layers: list[LayerFacts] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether these weights must not be used."""
        return any(f.level == "fail" for f in self.findings)


def examine_weights(weights: str, model: str | None = None, *, accept_license: bool = False) -> WeightsExamination:
    """Examine a file, a folder, a hub id, or `random[:SEED]` (which needs `model`).

    Raises BadRequest or WeightsError when there is nothing to examine: no such file, no access, unknown model.
    """
    is_random = weights.partition(":")[0] == "random"
    # found first: what cannot be had is a bad request, what does not fit is a finding
    found = weights if is_random else resolve(model, weights, accept_license=accept_license)
    try:
        opened = open_weights(model, found)
    except WeightsError as error:
        return WeightsExamination([Finding("fail", "coverage", error.what, error.todo)])
    layers, digest = _scan(opened)
    return WeightsExamination([*_about(opened, digest, is_random), *judge(layers)], layers)


def _scan(opened: OpenedWeights) -> tuple[list[LayerFacts], str]:
    """Read every tensor once, in the order of the digest; the digest is empty when one cannot be read."""
    layers: dict[str, LayerFacts] = {}
    digest, whole = hashlib.sha256(), True
    shapes = canonical_shapes(opened.config)
    for name, *_ in places(opened.config):
        top, part = _layer_of(name)
        layer = layers.setdefault(top, LayerFacts(top))
        layer.tensors += 1
        layer.values += torch.Size(shapes[name]).numel()
        layer.dtypes.add(opened.dtypes.get(name, "float32"))
        try:
            tensor = opened.fetch(name)
        except WeightsError as error:
            layer.broken.append(error.what)
            whole = False
            continue
        update_digest(digest, name, tensor)
        layer.add(part, tensor)
    return list(layers.values()), digest.hexdigest() if whole else ""


def _layer_of(name: str) -> tuple[str, str]:
    head, _, rest = name.partition(".")
    if head == "layer":
        number, _, part = rest.partition(".")
        return f"layer {number}", part
    return head, name


def _about(opened: OpenedWeights, digest: str, is_random: bool) -> Iterator[Finding]:
    config = opened.config
    yield Finding("ok", "model", f"{config.name}: {config.depth} layers of width {config.dim}, patch {config.patch_size}, "
                  f"{config.ffn}; normalisation {opened.rule}")
    if is_random:
        yield Finding("warn", "weights", f"{opened.source}: random, for trying things out", "name trained weights for results")
    else:
        unused = f", {opened.num_training_only} for training only" if opened.num_training_only else ""
        yield Finding("ok", "coverage", f"all {len(canonical_shapes(config))} tensors of the model are filled; all "
                      f"{opened.num_tensors} of the file are known{unused} ({opened.layout} layout)")
    if digest:
        yield Finding("ok", "digest", digest)


def judge(layers: list[LayerFacts]) -> Iterator[Finding]:
    """What the values of the layers say."""
    broken = [text for layer in layers for text in layer.broken]
    if broken:
        yield Finding("fail", "values", f"{len(broken)} tensors cannot be used: {_some(broken)}", "get the file again")
    scales = 2 * sum(layer.gamma is not None for layer in layers)
    if no_op := [f"{layer.name} {part}" for layer in layers for part in layer.no_op]:
        what = "the network is a no-op" if len(no_op) == scales else "these parts of the network are no-ops"
        yield Finding("fail", "LayerScale", f"{len(no_op)} of {scales} are below {NO_OP_GAMMA:g}, as before training, so {what} "
                      f"that looks alive: {_some(no_op)}", "use a checkpoint of trained weights that holds its LayerScale")
    elif any(layer.gamma for layer in layers):
        gammas = [layer.gamma for layer in layers if layer.gamma]
        if all(g[0] == g[1] for g in gammas):
            yield Finding("warn", "LayerScale", f"every gamma is {gammas[0][0]:g}", "check that these weights were trained")
        else:
            yield Finding("ok", "LayerScale", f"gammas {min(g[0] for g in gammas):.2g} to {max(g[1] for g in gammas):.2g}")
    zeros = [f"{layer.name} {part}" for layer in layers for part in layer.zeros]
    if zeros:
        yield Finding("fail", "values", f"{len(zeros)} weight tensors are 0 throughout: {_some(zeros)}", "get the file again")
    initial = [layer.name for layer in layers if layer.norm and layer.norms_at_init]
    if initial:
        yield Finding("warn", "norms", f"{_some(initial)}: weights 1 and biases 0, as before training",
                      "check that these weights were trained")
    large = [layer.name for layer in layers if layer.weights and max(-layer.weights[0], layer.weights[1]) > FLOAT16_MAX]
    if large:
        yield Finding("warn", "values", f"beyond float16 in {_some(large)}", "check the file: published weights stay below 100")


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def table(layers: list[LayerFacts]) -> list[str]:
    """The layers as lines of text: ranges as min..max (mean of absolute values)."""
    rows = [("layer", "tensors", "values", "dtype", "weights", "LayerScale", "norm weights", "")]
    for layer in layers:
        remark = "NaN or unreadable" if layer.broken else ""
        rows.append((layer.name, str(layer.tensors), f"{layer.values:,}", ", ".join(sorted(layer.dtypes)),
                     *(_range(r) for r in (layer.weights, layer.gamma, layer.norm)), remark))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _range(values: tuple[float, float, float] | None) -> str:
    return "-" if values is None else f"{values[0]:.3g}..{values[1]:.3g} ({values[2]:.3g})"
