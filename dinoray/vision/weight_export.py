"""Write a backbone's weights so that others read them: the layout of the Hugging Face checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file

from dinoray.vision.backbone import Backbone
from dinoray.vision.canonical import published_tensors, weights_digest
from dinoray.vision.variants import LAYER_NORM_EPS, ROPE_BASE, BackboneConfig


def save_backbone(backbone: Backbone, folder: str | os.PathLike) -> str:
    """Write model.safetensors, config.json and preprocessor_config.json that `transformers` loads as well.

    Keeps the backbone's dtype. Returns the digest of what was written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in published_tensors(backbone)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = backbone.config
    written = hugging_face_config(config) | {"dtype": str(backbone.cls_token.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    processor = {
        "image_processor_type": "DINOv3ViTImageProcessor",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return weights_digest(backbone)


def hugging_face_config(config: BackboneConfig) -> dict[str, object]:
    """config.json of `transformers.DINOv3ViTModel` for this model."""
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "image_size": 224,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "hidden_act": "silu" if config.ffn == "swiglu" else "gelu",
        "use_gated_mlp": config.ffn == "swiglu",
        "num_register_tokens": config.num_registers,
        "query_bias": config.qkv_bias,
        "key_bias": False,
        "value_bias": config.qkv_bias,
        "proj_bias": True,
        "mlp_bias": True,
        "layer_norm_eps": LAYER_NORM_EPS,
        "rope_theta": ROPE_BASE,
        "layerscale_value": 1.0,
        "pos_embed_rescale": 2.0,
    }
