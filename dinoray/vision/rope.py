"""Rotary position tables of DINOv3: axial, over patch centres, always in float32.

Row i of h sits at 2 * (i + 0.5) / h - 1 and column j of w at 2 * (j + 0.5) / w - 1, so each axis is
normalised by its own size and a table depends on the grid only. angles = 2 pi * coordinate / period with
periods 100 ** (2k / (d/2)), k < d/4, ordered [y over k, x over k]. The reference repeats that vector twice
to length d and rotates halves: channels c and c + d/2 turn together by one angle, like a complex number.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.utils._python_dispatch import _disable_current_modes

from dinoray.vision.variants import ROPE_BASE


def periods(head_dim: int) -> torch.Tensor:
    """Periods of the head_dim/4 frequencies of one axis: float32 [head_dim/4]."""
    k = torch.arange(head_dim // 4, dtype=torch.float64)
    return (ROPE_BASE ** (2 * k / (head_dim // 2))).to(torch.float32)


def angles(h: int, w: int, head_dim: int) -> torch.Tensor:
    """Angles of a grid's patches in row-major order: float32 [h*w, head_dim/2], y's half before x's."""
    y = 2 * (torch.arange(h, dtype=torch.float32) + 0.5) / h - 1
    x = 2 * (torch.arange(w, dtype=torch.float32) + 0.5) / w - 1
    frequency = 2 * math.pi / periods(head_dim)
    rows = (y[:, None] * frequency)[:, None, :].expand(h, w, -1)
    columns = (x[:, None] * frequency)[None, :, :].expand(h, w, -1)
    return torch.cat((rows, columns), dim=-1).reshape(h * w, head_dim // 2)


# 16 grids: jobs see few shapes, and the largest (2048 px at patch 8, 64 channels a head) takes 16 MB.
# lru_cache is safe under threads: at worst two threads compute the same table once each.
@functools.lru_cache(maxsize=16)
def turns(h: int, w: int, num_prefix: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """exp(i angle) of each token: complex64 [num_prefix + h*w, head_dim/2] on `device`; do not write to it.

    The prefix (CLS and registers) is not rotated: its turns are exactly 1.
    """
    # A table made under inference_mode could not be used by a later training step: leave that mode here.
    # Computed on the CPU so that every device sees the same bits. A table made of fake tensors (see
    # dinoray.vision.tracing) would be kept without its values: modes are left too.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        angle = torch.cat((torch.zeros(num_prefix, head_dim // 2), angles(h, w, head_dim)))
        return torch.complex(angle.cos(), angle.sin()).to(device)
