"""Independent references for the backbone: transformers and timm models, and their weights' layouts.

Only tests and benchmarks use this; dinoray itself imports neither library.
"""

from __future__ import annotations

import torch

_library = None


def allow_broken_torchvision() -> None:
    """Let torchvision be imported where its compiled part does not match torch.

    PyPI's torchvision is built for CUDA and its operators do not load beside a CPU-only torch; the import
    then fails on registering fake kernels for operators that do not exist. transformers and timm import
    torchvision for things that the ViT oracles never use, so declaring the two operators is enough.
    """
    global _library
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "does not exist" not in str(error) or _library is not None:
            raise
        _library = torch.library.Library("torchvision", "DEF")
        _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import sys

        for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
            del sys.modules[name]  # what the failed import left half-built
        import torchvision  # noqa: F401


allow_broken_torchvision()


def hugging_face(config, seed: int = 0):
    """transformers' DINOv3ViTModel for a BackboneConfig, every tensor overwritten with distinct values."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    from dinoray.vision.weight_export import hugging_face_config

    fields = hugging_face_config(config)
    del fields["architectures"], fields["model_type"]
    with torch.device("meta"):
        empty = DINOv3ViTModel(DINOv3ViTConfig(**fields, attn_implementation="sdpa"))
    model = empty.to_empty(device="cpu").eval().requires_grad_(False)
    # a buffer outside the state_dict, lost on the meta device
    model.rope_embeddings.inv_freq = 1 / 100 ** torch.arange(0, 1, 4 / config.head_dim)
    return overwrite(model, seed)


def overwrite(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Distinct random values in every parameter.

    Fresh models have LayerScale, norms and biases at values that hide mistakes. LayerScale 0.05..0.55, norm
    weights 1 +- 0.3, biases and tokens +- 0.3, matrices of deviation 1.5 / sqrt(fan in).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("lambda1", "gamma_1", "gamma_2")):
                p.uniform_(0.05, 0.55, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                p.uniform_(0.7, 1.3, generator=generator)
            elif p.ndim == 1 or "token" in name:
                p.uniform_(-0.3, 0.3, generator=generator)
            else:
                p.normal_(0, 1.5 * p[0].numel() ** -0.5, generator=generator)
    return model


def published(model) -> dict[str, torch.Tensor]:
    """A transformers model's tensors by the names of the published files: `layer.i`, not `model.layer.i`."""
    return {name.removeprefix("model."): t.detach().clone() for name, t in model.state_dict().items()}


def to_meta(state: dict[str, torch.Tensor], head_dim: int = 64) -> dict[str, torch.Tensor]:
    """Hugging Face tensors in the layout of Meta's .pth files, with buffers and training-only tensors."""
    top = {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "storage_tokens",
        "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    out = {theirs: state[ours] for ours, theirs in top.items()}
    out["mask_token"] = state["embeddings.mask_token"][0]
    out["rope_embed.periods"] = (100 ** (torch.arange(head_dim // 4) / (head_dim / 4))).to(torch.bfloat16)
    out["local_cls_norm.weight"], out["local_cls_norm.bias"] = out["norm.weight"] * 2, out["norm.bias"] * 2
    for i in range(_depth(state)):
        ours, theirs = f"layer.{i}.", f"blocks.{i}."
        part = {k.removeprefix(ours): v for k, v in state.items() if k.startswith(ours)}
        out[theirs + "attn.qkv.weight"] = _cat(part, "weight")
        if "attention.q_proj.bias" in part:
            q, v = part["attention.q_proj.bias"], part["attention.v_proj.bias"]
            # what k's third of a file holds does not matter: it is masked
            out[theirs + "attn.qkv.bias"] = torch.cat((q, torch.full_like(q, 0.7), v))
            mask = torch.cat((torch.ones_like(q), torch.zeros_like(q), torch.ones_like(q)))
            out[theirs + "attn.qkv.bias_mask"] = mask
        names = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}
        if "mlp.gate_proj.weight" not in part:
            names = {"up_proj": "fc1", "down_proj": "fc2"}
        for leaf in ("weight", "bias"):
            out[f"{theirs}attn.proj.{leaf}"] = part[f"attention.o_proj.{leaf}"]
            for norm in ("norm1", "norm2"):
                out[f"{theirs}{norm}.{leaf}"] = part[f"{norm}.{leaf}"]
            for a, b in names.items():
                out[f"{theirs}mlp.{b}.{leaf}"] = part[f"mlp.{a}.{leaf}"]
        out[theirs + "ls1.gamma"] = part["layer_scale1.lambda1"]
        out[theirs + "ls2.gamma"] = part["layer_scale2.lambda1"]
    return out


def to_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face tensors in timm's layout (a `_qkvb` model where the state has q and v biases)."""
    swiglu = "layer.0.mlp.gate_proj.weight" in state
    out = {}
    for name, tensor in to_meta(state).items():
        if name.startswith(("mask_token", "rope_embed", "local_cls_norm")) or name.endswith("bias_mask"):
            continue
        name = name.replace("storage_tokens", "reg_token")
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if swiglu:
            name = (
                name.replace("mlp.w1", "mlp.fc1_g")
                .replace("mlp.w2", "mlp.fc1_x")
                .replace("mlp.w3", "mlp.fc2")
            )
        if name.endswith("qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            out[stem + "q_bias"], _, out[stem + "v_bias"] = tensor.chunk(3)
        else:
            out[name] = tensor
    return {name: tensor.clone() for name, tensor in out.items()}


def _cat(part, leaf):
    return torch.cat([part[f"attention.{p}_proj.{leaf}"] for p in "qkv"])


def _depth(state) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layer."))
