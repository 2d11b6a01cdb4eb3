"""The backbone against independent implementations, and proof that these tests would notice a mistake."""

from __future__ import annotations

import functools
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, WeightsError
from dinoray.vision import backbone as backbone_module
from dinoray.vision import rope
from dinoray.vision.canonical import build
from dinoray.vision.layouts import MASK_TOKEN, canonical_shapes
from dinoray.vision.variants import VARIANTS, BackboneConfig, variant
from dinoray.vision.weights import load_backbone

TINY = BackboneConfig("tiny", 4, 32, 2, 2, "mlp", 64)
TINY_SWIGLU = replace(TINY, name="tinyplus", ffn="swiglu")
# small ones in true size; large ones with fewer blocks; the 7B also narrower (its head dim is 128)
SHAPES = {
    name: replace(variant(name), depth=depth)
    for name, depth in {
        "vitt16": 12, "vits16": 12, "vits16plus": 12, "vitb16": 3, "vitl16": 2, "vitl16plus": 2,
        "vith16plus": 1, "vitt8": 12, "vits8": 3,
    }.items()
} | {"vit7b16": replace(variant("vit7b16"), depth=1, dim=1024, heads=8, ffn_hidden=2048)}  # fmt: skip


@functools.cache
def pair(config: BackboneConfig):
    """(transformers model, its published tensors, our backbone with them)."""
    model = oracles.hugging_face(config, seed=1)
    state = oracles.published(model)
    return model, state, ours(config, state)


def ours(config, state, dtype=torch.float32):
    return build(config, state.__getitem__, dtype, "cpu")


def pixels(batch, height, width, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def relative(a, b) -> tuple[float, float]:
    """Distance of a to b relative to b: Frobenius, and largest element."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item(), ((a - b).abs().max() / b.abs().max()).item()


def assert_same(a, b, limit=1e-4):
    assert a.shape == b.shape
    frobenius, largest = relative(a, b)
    assert frobenius < limit, f"Frobenius {frobenius:.2e}"
    assert largest < limit, f"max {largest:.2e}"


def assert_tokens(tokens, reference, config):
    """Tokens against a reference sequence [B, 1 + R + patches, D]."""
    p = config.num_prefix
    assert_same(tokens.cls, reference[:, 0])
    assert_same(tokens.registers, reference[:, 1:p])
    assert_same(tokens.patches.flatten(1, 2), reference[:, p:])


@torch.inference_mode()
def forward(model, x):
    return model(x)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 5, 5), (7, 3, 4)])
@torch.inference_mode()
def test_every_layer_equals_transformers(name, batch, rows, columns):
    config = SHAPES[name]
    model, _, backbone = pair(config)
    x = pixels(batch, rows * config.patch_size, columns * config.patch_size)
    reference = model(x, output_hidden_states=True)
    out = backbone(x, layers=range(config.depth))
    assert len(reference.hidden_states) == config.depth + 1
    for k in range(config.depth):
        assert_tokens(out.layers[k], model.norm(reference.hidden_states[k + 1]), config)
    last = backbone(x)
    assert_tokens(last, reference.last_hidden_state, config)
    assert last.patches.shape == (batch, rows, columns, config.dim)
    assert torch.equal(last.patches, out.layers[config.depth - 1].patches)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 400)])
@torch.inference_mode()
def test_usual_sizes_equal_transformers(height, width):
    model, _, backbone = pair(SHAPES["vits16"])
    x = pixels(2, height, width)
    assert_tokens(backbone(x), model(x).last_hidden_state, backbone.config)


@torch.inference_mode()
def test_batches_that_run_in_groups_equal_transformers(monkeypatch):
    monkeypatch.setattr(backbone_module, "CPU_TOKENS", 60)
    model, _, backbone = pair(TINY_SWIGLU)
    x = pixels(7, 12, 20)  # 20 tokens an image: groups of 3, 3 and 1
    mask = torch.rand(7, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    reference = model(x, bool_masked_pos=mask.flatten(1), output_hidden_states=True)
    assert_tokens(backbone(x, mask=mask), reference.last_hidden_state, backbone.config)
    assert_tokens(
        backbone(x, layers=(0,)).layers[0],
        model.norm(model(x, output_hidden_states=True).hidden_states[1]),
        backbone.config,
    )


@torch.inference_mode()
def test_7b_block_in_true_width():
    config = replace(variant("vit7b16"), depth=1)
    model = oracles.hugging_face(config, seed=3)
    x = pixels(1, 32, 48)
    reference = model(x).last_hidden_state
    state = oracles.published(model)
    del model
    assert not any(f"attention.{p}_proj.bias" in name for name in state for p in "qkv")
    assert_tokens(ours(config, state)(x), reference, config)


@torch.inference_mode()
def test_plain_torch_route_equals_transformers():
    """The route without oneDNN (other builds, other devices, training) computes the same."""
    for name in ("vits16", "vits16plus"):
        model, _, backbone = pair(SHAPES[name])
        x = pixels(2, 64, 96)
        with torch.backends.mkldnn.flags(enabled=False):
            tokens = backbone(x)
        assert_tokens(tokens, model(x).last_hidden_state, backbone.config)


def test_gradients_equal_those_of_transformers():
    config = TINY_SWIGLU
    model = oracles.hugging_face(config, 5)
    backbone = ours(config, oracles.published(model))
    model.requires_grad_(True)
    backbone.requires_grad_(True)
    x = pixels(2, 12, 20)
    mask = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    weight = torch.randn(2, 1 + 4 + 15, config.dim, generator=torch.Generator().manual_seed(1))
    (model(x, bool_masked_pos=mask.flatten(1)).last_hidden_state * weight).sum().backward()
    t = backbone(x, mask=mask)
    out = torch.cat((t.cls[:, None], t.registers, t.patches.flatten(1, 2)), 1)
    (out * weight).sum().backward()
    grads = {name: p.grad for name, p in backbone.named_parameters()}
    assert_same(grads["mask_token"], model.embeddings.mask_token.grad)
    assert_same(grads["patch_embed.weight"], model.embeddings.patch_embeddings.weight.grad)
    layer, block = model.model.layer[0], "blocks.0."
    assert_same(grads[block + "ls1"], layer.layer_scale1.lambda1.grad)
    assert_same(grads[block + "ffn.down.weight"], layer.mlp.down_proj.weight.grad)
    assert_same(grads[block + "attn.qkv"][2 * config.dim :], layer.attention.v_proj.weight.grad)
    assert_same(
        backbone_module.unpair_rows(grads[block + "attn.qkv"][: config.dim], config.heads),
        layer.attention.q_proj.weight.grad,
    )


# --- bfloat16


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [("vitt16", 224, 224), ("vits16", 224, 224), ("vits16", 96, 160), ("vits16plus", 64, 128),
     ("vitb16", 224, 224), ("vitl16plus", 64, 64), ("vit7b16", 96, 96), ("vits8", 64, 64)],
)  # fmt: skip
@torch.inference_mode()
def test_bfloat16_is_as_close_as_transformers_own(name, height, width):
    config = SHAPES[name]
    mine, theirs = [], []
    for seed in (1, 2):
        model = oracles.hugging_face(config, seed)
        backbone = ours(config, oracles.published(model), torch.bfloat16)
        x = pixels(2, height, width, seed)
        exact = model(x).last_hidden_state
        rough = model.to(torch.bfloat16)(x).last_hidden_state
        tokens = backbone(x)
        assert tokens.cls.dtype == torch.bfloat16
        mine += [
            relative(tokens.cls, exact[:, 0])[0],
            relative(tokens.patches.flatten(1, 2), exact[:, 5:])[0],
        ]
        theirs += [relative(rough[:, 0], exact[:, 0])[0], relative(rough[:, 5:], exact[:, 5:])[0]]
    assert np.mean(mine) <= 1.1 * np.mean(theirs), f"{np.mean(mine):.4f} against {np.mean(theirs):.4f}"


@torch.inference_mode()
def test_bfloat16_keeps_up_with_large_scores_and_many_tokens():
    """Sharp attention (scores up to 30), and enough tokens that attention runs in blocks of queries."""
    config = replace(variant("vits8"), depth=4)
    model = oracles.hugging_face(config, 1)
    for layer in model.model.layer:
        layer.attention.q_proj.weight.mul_(1.5)
        layer.attention.k_proj.weight.mul_(1.5)
    backbone = ours(config, oracles.published(model), torch.bfloat16)
    x = pixels(1, 240, 256)
    exact = model(x).last_hidden_state[:, 5:]
    rough = relative(model.to(torch.bfloat16)(x).last_hidden_state[:, 5:], exact)[0]
    assert relative(backbone(x).patches.flatten(1, 2), exact)[0] <= 1.1 * rough


# --- mutations: what a wrong weight or a wrong rotation does


def output(config, state, x):
    return forward(ours(config, state), x).patches


@pytest.mark.parametrize("config", [TINY, TINY_SWIGLU], ids=lambda c: c.ffn)
def test_swapping_any_two_tensors_of_a_block_breaks_parity(config):
    _, state, backbone = pair(config)
    x = pixels(2, 12, 20)
    right = forward(backbone, x).patches
    block = [name for name in state if name.startswith("layer.1.")]
    swaps = [(a, b) for a, b in itertools.combinations(block, 2) if state[a].shape == state[b].shape]
    assert len(swaps) > 40
    for a, b in swaps:
        wrong = output(config, state | {a: state[b], b: state[a]}, x)
        assert relative(wrong, right)[0] > 1e-3, f"{a} and {b} may be swapped unnoticed"


@pytest.mark.parametrize("config", [TINY, TINY_SWIGLU], ids=lambda c: c.ffn)
def test_zeroing_any_bias_breaks_parity(config):
    _, state, backbone = pair(config)
    x = pixels(2, 12, 20)
    right = forward(backbone, x).patches
    for name in [n for n in state if n.endswith("bias")]:
        wrong = output(config, state | {name: torch.zeros_like(state[name])}, x)
        assert relative(wrong, right)[0] > 1e-3, f"{name} may be zero unnoticed"


def test_changing_any_tensor_but_the_mask_token_breaks_parity():
    for config in (TINY, TINY_SWIGLU):
        _, state, backbone = pair(config)
        x = pixels(2, 12, 20)
        right = forward(backbone, x).patches
        for name in state:
            changed = relative(output(config, state | {name: state[name].flip(-1)}, x), right)[0] > 1e-3
            assert changed == (name != MASK_TOKEN), name


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 6)])
def test_exchanging_rope_axes_breaks_parity(rows, columns, monkeypatch):
    model, _, backbone = pair(SHAPES["vitt16"])
    x = pixels(1, rows * 16, columns * 16)
    right = forward(model, x).last_hidden_state[:, 5:]
    assert relative(forward(backbone, x).patches.flatten(1, 2), right)[0] < 1e-4
    published = rope.angles

    def exchanged(h, w, head_dim):
        y, x = published(h, w, head_dim).chunk(2, dim=-1)
        return torch.cat((x, y), dim=-1)

    monkeypatch.setattr(rope, "angles", exchanged)
    rope.turns.cache_clear()
    try:
        wrong = forward(backbone, x).patches.flatten(1, 2)
    finally:
        rope.turns.cache_clear()
    assert relative(wrong, right)[0] > 1e-2


# --- timm, as a second and independent oracle

TIMM = {
    "vit_small_patch16_dinov3": ({"depth": 3}, "vits16"),
    "vit_small_patch16_dinov3_qkvb": ({"depth": 3}, "vits16"),
    "vit_small_plus_patch16_dinov3_qkvb": ({"depth": 2}, "vits16plus"),
    "vit_tiny_patch16_dinov3_qkvb": ({}, "vitt16"),
    "vit_7b_patch16_dinov3": ({"depth": 1, "embed_dim": 512, "num_heads": 4}, "vit7b16"),
}


@pytest.mark.parametrize("timm_name", TIMM)
def test_a_real_timm_model_gives_the_same_output(timm_name, tmp_path):
    import timm
    from safetensors.torch import save_file

    options, name = TIMM[timm_name]
    model = timm.create_model(timm_name, pretrained=False, **options).eval()
    oracles.overwrite(model, seed=4)
    config = replace(variant(name), depth=len(model.blocks), dim=model.embed_dim)
    if name == "vit7b16":
        config = replace(config, heads=4, ffn_hidden=model.blocks[0].mlp.fc2.in_features)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone = load_backbone(config, tmp_path)
    x = pixels(2, 64, 96)
    assert_tokens(forward(backbone, x), forward(model.forward_features, x), config)


@pytest.mark.parametrize("name", ["vits16", "vits16plus"])
def test_timm_reads_our_idea_of_metas_layout_as_we_do(name):
    """timm's own converter takes Meta's .pth; it and we must agree on what the names mean."""
    import timm
    from timm.models.eva import checkpoint_filter_fn

    config = replace(SHAPES[name], depth=2)
    _, state, backbone = pair(config)
    timm_name = {
        "vits16": "vit_small_patch16_dinov3_qkvb",
        "vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    }
    model = timm.create_model(timm_name[name], pretrained=False, depth=2).eval()
    model.load_state_dict(checkpoint_filter_fn(oracles.to_meta(state), model), strict=True)
    x = pixels(1, 64, 48)
    assert_tokens(forward(backbone, x), forward(model.forward_features, x), config)


# --- the interface


@pytest.fixture(scope="module")
def tiny():
    return load_backbone(TINY, "random")


@settings(max_examples=40, deadline=None)
@given(
    patch=st.sampled_from((2, 4, 7, 8, 16)),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    batch=st.integers(1, 3),
    registers=st.integers(0, 5),
    ffn=st.sampled_from(("mlp", "swiglu")),
    layers=st.lists(st.integers(0, 2), min_size=1, max_size=4, unique=True),
)
def test_shapes_hold_for_any_grid(patch, rows, columns, batch, registers, ffn, layers):
    config = BackboneConfig("any", patch, 24, 3, 2, ffn, 40, num_registers=registers)
    backbone = load_backbone(config, "random:3")
    x = pixels(batch, rows * patch, columns * patch)
    out = forward(functools.partial(backbone, layers=layers), x)
    assert list(out.layers) == layers
    for k, tokens in out.layers.items():
        assert tokens.cls.shape == (batch, 24)
        assert tokens.registers.shape == (batch, registers, 24)
        assert tokens.patches.shape == (batch, rows, columns, 24)
        assert torch.equal(out.maps[k], tokens.patches.permute(0, 3, 1, 2))
        assert tokens.patches.isfinite().all()
    alone = forward(backbone, x[:1])
    if 2 in layers:
        assert relative(out.layers[2].cls[:1], alone.cls)[0] < 1e-4


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_sizes_that_are_no_multiple_are_refused(tiny, height, width):
    x = torch.zeros(1, 3, height, width)
    if height % 4 == 0 and width % 4 == 0:
        assert forward(tiny, x).patches.shape == (1, height // 4, width // 4, 32)
    else:
        with pytest.raises(BadRequest, match=f"{height} x {width} px is not a multiple of the patch size 4"):
            tiny(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixels": torch.zeros(1, 1, 8, 8)}, "give pixels as"),
        ({"pixels": torch.zeros(3, 8, 8)}, "give pixels as"),
        ({"pixels": torch.zeros(0, 3, 8, 8)}, "B at least 1"),
        ({"pixels": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "scale to"),
        ({"pixels": torch.zeros(1, 3, 8, 8), "layers": (0, 2)}, "from 0 to 1"),
        ({"pixels": torch.zeros(1, 3, 8, 8), "layers": (-1,)}, "from 0 to 1"),
        ({"pixels": torch.zeros(1, 3, 8, 8), "layers": ()}, "at least one layer"),
        ({"pixels": torch.zeros(1, 3, 8, 8), "mask": torch.zeros(1, 2, 3, dtype=torch.bool)}, "bool mask"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(tiny, arguments, message):
    with pytest.raises(BadRequest, match=message):
        tiny(**arguments)


def test_variants_are_those_of_the_facts():
    assert len(VARIANTS) == 16
    assert variant("vits8") == replace(variant("vits16"), name="vits8", patch_size=8)
    assert variant("vith16plus").ffn_hidden == 5120 and variant("vit7b16").head_dim == 128
    assert variant("vitb14").patch_size == 14
    for name in ("vits", "resnet50", "vitx16", "vitb16plus", ""):
        with pytest.raises(BadRequest, match="choose one of"):
            variant(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_one_module_and_repeat_their_bytes(dtype):
    backbone = load_backbone(replace(variant("vitt16"), depth=2), "random", dtype=dtype)
    inputs = [pixels(2, 16 * (2 + i % 5), 16 * (1 + i % 3), seed=i) for i in range(24)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rope.turns.cache_clear()
        expected = [forward(backbone, x) for x in inputs]
        rope.turns.cache_clear()
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                for a, b in zip(expected, pool.map(lambda x: forward(backbone, x), inputs), strict=True):
                    assert torch.equal(a.cls, b.cls) and torch.equal(a.patches, b.patches)
    finally:
        torch.set_num_threads(threads)


def test_tables_made_under_inference_mode_serve_training():
    backbone = load_backbone(TINY, "random").requires_grad_(True)
    rope.turns.cache_clear()
    forward(backbone, pixels(1, 8, 8))
    backbone(pixels(1, 8, 8)).cls.sum().backward()
    assert all(p.grad is not None for name, p in backbone.named_parameters() if name != "mask_token")


def test_random_weights_are_named_by_their_seed_and_act():
    a, b, c = (load_backbone("vitt16", f"random{s}") for s in ("", ":0", ":7"))
    assert a.digest == b.digest != c.digest
    scales = torch.cat([p for n, p in a.named_parameters() if n.endswith(("ls1", "ls2"))])
    assert 0.05 <= scales.min() < 0.06 and 0.54 < scales.max() <= 0.55
    x = pixels(2, 64, 64)
    first, last = forward(functools.partial(a, layers=(0, 11)), x).layers.values()
    assert relative(first.patches, last.patches)[0] > 0.3, "the blocks do nothing"
    for bad in ("random:", "random:x", "random:-1", "random:" + "9" * 30):
        with pytest.raises(BadRequest, match="random:SEED"):
            load_backbone("vitt16", bad)


def test_random_digest_is_pinned():
    """The seed names these weights in stored outputs: they may not change silently."""
    assert (
        load_backbone(TINY, "random").digest
        == (Path(__file__).parent / "random_digest.txt").read_text().strip()
    )


def test_facts_about_memory_layout():
    """Pairing rows is lossless; every canonical tensor has one place."""
    w = torch.arange(64.0).reshape(16, 4)
    assert torch.equal(backbone_module.unpair_rows(backbone_module.pair_rows(w, 2), 2), w)
    assert backbone_module.pair_rows(w, 2)[:2, 0].tolist() == [0.0, 16.0]
    for config in VARIANTS.values():
        names = canonical_shapes(config)
        assert (
            len(names)
            == len(set(names))
            == 7
            + config.depth
            * ({("mlp", True): 17, ("swiglu", True): 19, ("swiglu", False): 17}[config.ffn, config.qkv_bias])
        )


# --- real weights, where somebody has them

REFERENCE = Path(__file__).parents[2].parent / "shared" / "data" / "dinov3_reference"


def real_weights():
    folder = os.environ.get("DINORAY_REAL_WEIGHTS")
    if not folder:
        return []
    found = []
    for path in sorted(Path(folder).iterdir()):
        key = path.name.replace("-", "_")
        for name in HUB_NAMES:
            if f"dinov3_{name}_" in key or key == name:
                found.append((name, path))
    return found


HUB_NAMES = ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")


@pytest.mark.skipif(
    not os.environ.get("DINORAY_REAL_WEIGHTS"),
    reason="set DINORAY_REAL_WEIGHTS to a folder with real DINOv3 weights to check the published values",
)
@torch.inference_mode()
def test_real_weights_give_the_published_values():
    from PIL import Image

    expected = json.loads((REFERENCE / "expected.json").read_text())
    found = [
        (n, p) for n, p in real_weights() if f"dinov3_{n}" in expected["first5"] and "sat493m" not in p.name
    ]
    assert found, "no file or folder in DINORAY_REAL_WEIGHTS is named like a published DINOv3 ViT"
    image = np.asarray(Image.open(REFERENCE / expected["image"]).convert("RGB"))
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    x = torch.nn.functional.interpolate(
        x, size=(224, 224), mode="bilinear", antialias=True, align_corners=False
    )
    for name, path in found:
        backbone = load_backbone(name, path)
        mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.config.mean, backbone.config.std))
        tokens = backbone((x - mean) / std)
        values = expected["first5"][f"dinov3_{name}"]
        np.testing.assert_allclose(tokens.cls[0, :5], values["cls"], atol=1e-3)
        np.testing.assert_allclose(tokens.patches[0, 0, 0, :5], values["patch0"], atol=1e-3)


def test_missing_tensor_in_build_is_not_hidden():
    state = dict(pair(TINY)[1])
    del state["norm.bias"]
    with pytest.raises((KeyError, WeightsError), match="norm.bias"):
        ours(TINY, state)
