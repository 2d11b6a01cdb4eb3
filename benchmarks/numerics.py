"""How far values move when the same image is computed at another batch size: what `numerics: degraded` means.

    python benchmarks/numerics.py [--model vits16] [--device cpu]
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import hardware, table

import dinoray


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius distance of a from b over the norm of b."""
    return float((a.float() - b.float()).norm() / b.float().norm())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vits16")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    print(hardware())
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3, 224, 224)).astype(np.float32)).to(given.device)
    rows = []
    torch.set_num_threads(1)
    for precision in ("float32", "bfloat16"):
        backbone = dinoray.load_backbone(given.model, weights="random", dtype=getattr(torch, precision), device=given.device)
        with torch.inference_mode():
            whole = backbone(pixels)
            for size in (1, 2, 4):
                parts = [backbone(pixels[i:i + size]) for i in range(0, 8, size)]
                cls, patches = (torch.cat([getattr(p, name) for p in parts]) for name in ("cls", "patches"))
                rows.append([precision, f"{size} instead of 8", f"{relative(cls, whole.cls):.1e}",
                             f"{relative(patches, whole.patches):.1e}"])
    print(table(["precision", "batch size", "cls moves by (relative)", "patches move by"], rows))
