"""What a step of the context-fusion training takes in memory, from its shapes alone: printed before the first step.

Two phases, each with its own peak: the extraction (slices of the crops through the frozen backbone) and the UNet's forward and
backward. Counted are the tensors that are alive at once; what a library allocates besides is in WORKSPACE, measured once
(benchmarks/volumes_memory.py) and checked on settings that it was not measured with.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from dinoray.memory.budget import VALUES_PER_TOKEN

WORKSPACE = 160 * 2**20
"""Bytes of libraries at their first convolution and first forward: code, thread stacks, scratch of convolutions."""
OPTIMIZER_COPIES = 4
"""float32 copies of each parameter that learns: itself, its gradient, two moments."""


@dataclass(frozen=True)
class CropShapes:
    """What a sample of a training looks like. `crop` in label voxels, `factor` raw voxels in each, `planes` of the tokens."""

    crop: tuple[int, int, int]
    factor: tuple[int, int, int]
    planes: int
    patch: int
    dim: int
    """Width of the backbone."""

    @property
    def raw_voxels(self) -> int:
        """Of a crop (and of its context, in pixels)."""
        return prod(n * f for n, f in zip(self.crop, self.factor, strict=True))

    def tokens(self, plane: int) -> int:
        """Of a plane of a crop: its slices times their patches."""
        sides = [n * f for n, f in zip(self.crop, self.factor, strict=True)]
        return self.crop[plane] * prod(ceil(side / self.patch) for axis, side in enumerate(sides) if axis != plane)

    def slice_tokens(self, plane: int) -> int:
        """Of one slice of a plane."""
        return self.tokens(plane) // self.crop[plane]


def extraction_bytes(shapes: CropShapes, *, volumes: int, slice_batch: int, itemsize: int, crops: int = 1) -> int:
    """Peak of the extraction beside the model: raw voxels, one plane's slices, tokens so far, the forward of `slice_batch` slices.

    `crops`: 2 with a context (whose tokens join those of the crop). `itemsize`: bytes of a value in the backbone.
    """
    raw = volumes * shapes.raw_voxels * 4 * crops
    kept = volumes * shapes.dim * itemsize * sum(shapes.tokens(p) for p in range(shapes.planes)) * crops
    most = 0
    for plane in range(shapes.planes):
        pixels = volumes * shapes.tokens(plane) * shapes.patch**2
        batch = min(slice_batch, volumes * shapes.crop[plane])
        tokens = batch * shapes.slice_tokens(plane)
        forward = tokens * (shapes.dim * VALUES_PER_TOKEN * itemsize + 3 * shapes.patch**2 * (4 + itemsize))
        most = max(most, 2 * pixels * 4 + forward)
    return raw + kept + most


def unet_bytes(shapes: CropShapes, *, volumes: int, base: int, levels: int, parameters: int, in_values: int, itemsize: int,
               checkpointing: bool, token_grids: int = 1) -> int:
    """Peak of a step beside the backbone: parameters with gradients and moments, what the backward needs, and what else is alive.

    `in_values`: values per label voxel of the inputs on the label grid; `itemsize`: of activations (2 under autocast);
    `token_grids`: projected tokens on the label grid that are kept (own tokens, and each level of the gate).
    """
    multiple = 2**levels
    voxels = volumes * prod(ceil(n / multiple) * multiple for n in shapes.crop)
    saved = in_values + token_grids * base  # of the finest grid, per voxel of it
    largest = 0.0
    for level in range(levels):
        width, share = base * 2**level, 1 / 8**level
        # encoder block and decoder block: of each convolution its output and its norm's; what the decoder joins
        block = 2 * 2 * width
        joined = 3 * width
        kept = (width + joined) if checkpointing else 2 * block + joined
        saved += kept * share
        largest = max(largest, (joined + block) * share)
    bottom = base * 2**levels
    saved += (bottom if checkpointing else 4 * bottom) / 8**levels
    return ceil(OPTIMIZER_COPIES * 4 * parameters + voxels * itemsize * (saved + 2 * largest))
