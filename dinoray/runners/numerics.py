"""What the numbers of a unit were computed with: the kind of device, and whether they may differ in low bits."""

from __future__ import annotations

from typing import Any

import torch

from dinoray.memory.meter import cpu_vendor
from dinoray.vision.kernels import onednn_ready


def device_kind(device: torch.device) -> str:
    """What must be equal for bytes to be equal: the CPU's vendor and instruction set, or the GPU's name."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    native = " bfloat16" if onednn_ready(torch.bfloat16) else ""
    return f"cpu {cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}{native}"


def used_numerics(device: torch.device, planned: dict[str, Any], *, degraded: bool) -> dict[str, Any]:
    """The `numerics` of a receipt: as the plan says, or `degraded` (split batches, another kind of device)."""
    used = device_kind(device)
    return {"device_kind": used, "precision": planned["precision"], "token_budget": planned["token_budget"],
            "degraded": degraded or planned["device_kind"] not in (used, "cuda")}
