"""Weights: three layouts and several containers, strictly; where they come from; what goes out."""

from __future__ import annotations

import json
import pickle
import traceback
from dataclasses import replace
from pathlib import Path

import oracles
import pytest
import torch
from safetensors.torch import save_file

from dinoray.errors import BadRequest, WeightsError
from dinoray.vision import weight_hub
from dinoray.vision.layouts import MASK_TOKEN, masked_bias
from dinoray.vision.variants import LVD_MEAN, LVD_STD, SAT_MEAN, SAT_STD, BackboneConfig, variant
from dinoray.vision.weights import (
    load_backbone,
    load_normalisation,
    resolve,
    save_backbone,
    weights_digest,
)

# head dim 64 as in the published models, so that vits' own width tells the variant
SMALL = replace(variant("vits16"), depth=2)
SMALL_SWIGLU = replace(variant("vits16plus"), depth=2)
TINY = BackboneConfig("tiny", 4, 32, 2, 2, "mlp", 64)
TINY_7B = replace(TINY, name="tiny7b", ffn="swiglu", qkv_bias=False)
LAYOUTS = ("huggingface", "meta", "timm")


def state_of(config, seed=1):
    return oracles.published(oracles.hugging_face(config, seed))


def in_layout(layout, state, head_dim=64):
    if layout == "huggingface":
        return dict(state)
    return oracles.to_meta(state, head_dim) if layout == "meta" else oracles.to_timm(state)


def write(tensors, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, file)
    else:
        torch.save(tensors, file)
    return file


@torch.inference_mode()
def tokens_of(backbone):
    p = backbone.config.patch_size
    x = torch.randn(2, 3, 3 * p, 4 * p, generator=torch.Generator().manual_seed(0))
    return backbone(x).patches


# --- layouts


@pytest.mark.parametrize("config", [SMALL, SMALL_SWIGLU, TINY_7B], ids=lambda c: c.name)
def test_three_layouts_one_output_one_digest(config, tmp_path):
    state = state_of(config)
    loaded = []
    for layout in LAYOUTS:
        suffix = ".pth" if layout == "meta" else ".safetensors"
        loaded.append(
            load_backbone(
                config, write(in_layout(layout, state, config.head_dim), tmp_path / f"{layout}{suffix}")
            )
        )
    assert len({b.digest for b in loaded}) == 1
    for other in loaded[1:]:
        assert torch.equal(tokens_of(other), tokens_of(loaded[0]))
    in_memory = {f"model.{k}" if k.startswith("layer.") else k: v for k, v in state.items()}
    assert load_backbone(config, write(in_memory, tmp_path / "memory.pt")).digest == loaded[0].digest


def test_digest_names_values_not_containers(tmp_path):
    state = state_of(TINY)
    digest = load_backbone(TINY, write(state, tmp_path / "a.safetensors")).digest
    assert load_backbone(TINY, write(state, tmp_path / "a.pth")).digest == digest
    old = tmp_path / "old.pth"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    assert load_backbone(TINY, old).digest == digest
    assert load_backbone(TINY, tmp_path / "a.pth", dtype=torch.bfloat16).digest == digest
    masked = state | {MASK_TOKEN: torch.ones(1, 1, 32)}
    assert load_backbone(TINY, write(masked, tmp_path / "b.pth")).digest == digest
    nudged = state | {"norm.bias": state["norm.bias"] + 1e-6}
    assert load_backbone(TINY, write(nudged, tmp_path / "c.pth")).digest != digest
    with pytest.raises(WeightsError, match="planned with"):
        load_backbone(TINY, tmp_path / "c.pth", expect_digest=digest)
    backbone = load_backbone(TINY, tmp_path / "a.pth", expect_digest=digest)
    assert weights_digest(backbone) == digest
    # stored in half precision, the values are others, but exactly the ones that the file holds
    half = {k: v.to(torch.bfloat16) for k, v in state.items()}
    rounded = {k: v.float() for k, v in half.items()}
    a = load_backbone(TINY, write(half, tmp_path / "h.safetensors"))
    assert a.digest == load_backbone(TINY, write(rounded, tmp_path / "r.pth")).digest != digest


@pytest.mark.parametrize("config", [TINY, TINY_7B], ids=lambda c: c.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_one_tensor_missing_fails_by_its_name(config, layout, tmp_path):
    tensors = in_layout(layout, state_of(config), config.head_dim)
    optional = {
        MASK_TOKEN,
        "mask_token",
        "rope_embed.periods",
        "local_cls_norm.weight",
        "local_cls_norm.bias",
    }
    file = tmp_path / "w.pth"
    for name in tensors:
        rest = {k: v for k, v in tensors.items() if k != name}
        write(rest, file)
        if name in optional or name.endswith("bias_mask"):
            load_backbone(config, file)
            continue
        with pytest.raises(WeightsError) as caught:
            load_backbone(config, file)
        assert f"missing: {name}" in str(caught.value), name


def test_unused_tensors_fail_by_their_names(tmp_path):
    state = state_of(TINY)
    for extra in (
        "head.weight",
        "layer.0.attention.k_proj.bias",
        "local_cls_norm.weight",
        "layer.0.attention.bias_mask",
    ):
        file = write(state | {extra: torch.zeros(32)}, tmp_path / "w.pth")
        if extra == "local_cls_norm.weight":
            load_backbone(TINY, file)  # one of the training-only names
            continue
        with pytest.raises(WeightsError, match=f"unused: {extra}"):
            load_backbone(TINY, file)


def test_bias_masks(tmp_path):
    state = state_of(TINY)
    meta = oracles.to_meta(state, TINY.head_dim)
    digest = load_backbone(TINY, write(meta, tmp_path / "w.pth")).digest
    fresh = {k: torch.full_like(v, torch.nan) if k.endswith("bias_mask") else v for k, v in meta.items()}
    assert load_backbone(TINY, write(fresh, tmp_path / "nan.pth")).digest == digest
    without = {k: v for k, v in meta.items() if not k.endswith("bias_mask")}
    assert load_backbone(TINY, write(without, tmp_path / "none.pth")).digest == digest
    alive = {k: torch.ones_like(v) if k.endswith("bias_mask") else v for k, v in meta.items()}
    with pytest.raises(WeightsError, match="blocks.0.attn.qkv.bias.* bias on k"):
        load_backbone(TINY, write(alive, tmp_path / "alive.pth"))
    nan_k = torch.tensor([1.0, torch.nan, 3.0])
    assert masked_bias(nan_k, None).tolist() == [1, 0, 3]


def test_timm_without_biases_has_zero_biases(tmp_path):
    state = state_of(TINY)
    plain = {k: v for k, v in oracles.to_timm(state).items() if not k.endswith(("q_bias", "v_bias"))}
    zeroed = {
        k: torch.zeros_like(v) if k.endswith(("q_proj.bias", "v_proj.bias")) else v for k, v in state.items()
    }
    a = load_backbone(TINY, write(plain, tmp_path / "timm.pth"))
    b = load_backbone(TINY, write(zeroed, tmp_path / "hf.pth"))
    assert a.digest == b.digest
    assert torch.equal(tokens_of(a), tokens_of(b))


def test_rope_periods_are_checked_to_one_percent(tmp_path):
    meta = oracles.to_meta(state_of(TINY), TINY.head_dim)
    periods = meta["rope_embed.periods"].float()
    load_backbone(TINY, write(meta | {"rope_embed.periods": periods * 1.005}, tmp_path / "ok.pth"))
    for wrong in (periods * 1.02, periods[:-1], periods * torch.nan):
        with pytest.raises(WeightsError, match="rope_embed.periods"):
            load_backbone(TINY, write(meta | {"rope_embed.periods": wrong}, tmp_path / "bad.pth"))


# --- which model is it


def test_the_wrong_variant_is_named(tmp_path):
    file = write(state_of(SMALL), tmp_path / "w.safetensors")
    with pytest.raises(
        WeightsError, match="look like vits16-depth2, not vitb16: dim is 384 where vitb16 has 768"
    ):
        load_backbone("vitb16", file)
    with pytest.raises(WeightsError, match="not vits8: patch_size is 16 where vits8 has 8"):
        load_backbone(replace(variant("vits8"), depth=2), file)
    with pytest.raises(WeightsError, match="ffn is mlp where vits16plus has swiglu"):
        load_backbone(replace(variant("vits16plus"), depth=2), file)
    with pytest.raises(WeightsError, match="depth is 2 where vits16 has 12"):
        load_backbone("vits16", file)
    with pytest.raises(WeightsError, match="qkv_bias is True"):
        load_backbone(replace(SMALL, qkv_bias=False), file)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [SMALL, SMALL_SWIGLU], ids=lambda c: c.name)
def test_the_model_is_told_from_the_weights(config, layout, tmp_path):
    file = write(in_layout(layout, state_of(config)), tmp_path / "w.pth")
    found = load_backbone(weights=file)
    assert found.config == replace(config, name=f"{config.name}-depth2")
    assert found.digest == load_backbone(config, file).digest


def test_what_cannot_be_told_is_asked_for(tmp_path):
    with pytest.raises(WeightsError, match="name it with --model"):
        load_backbone(weights=write(state_of(TINY), tmp_path / "w.pth"))
    with pytest.raises(
        WeightsError, match="not a DINOv3 ViT checkpoint: its 1 tensors start with stages.0.weight"
    ):
        load_backbone(TINY, write({"stages.0.weight": torch.zeros(2)}, tmp_path / "convnext.pth"))
    with pytest.raises(WeightsError, match="neither"):
        load_backbone()
    with pytest.raises(BadRequest, match="give model"):
        load_backbone(weights="random")
    with pytest.raises(BadRequest, match="torch.bfloat16"):
        load_backbone(TINY, "random", dtype=torch.float16)


# --- damaged or hostile files


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_are_refused_by_name(bad, tmp_path):
    for layout, name in (("huggingface", "layer.1.mlp.up_proj.bias"), ("meta", "blocks.1.attn.qkv.weight")):
        tensors = in_layout(layout, state_of(TINY), TINY.head_dim)
        tensors[name] = tensors[name].clone()
        tensors[name].flatten()[-1] = bad
        with pytest.raises(WeightsError, match=f"{name} holds NaN or infinity"):
            load_backbone(TINY, write(tensors, tmp_path / "w.pth"))


class Payload:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return Path.touch, (self.flag,)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    flag = tmp_path / "executed"
    state = state_of(TINY)
    zipped, plain = tmp_path / "evil.pth", tmp_path / "plain.pth"
    torch.save(state | {"x": Payload(flag)}, zipped)
    plain.write_bytes(pickle.dumps(Payload(flag)))
    for file in (zipped, plain):
        with pytest.raises(WeightsError, match="refused: the pickle holds more than tensors"):
            load_backbone(TINY, file)
    assert not flag.exists()
    pickle.loads(plain.read_bytes())
    assert flag.exists(), "the payload was harmless: this test proves nothing"


def test_damaged_files_are_refused(tmp_path):
    for name in ("w.safetensors", "w.pth"):
        file = write(state_of(TINY), tmp_path / name)
        file.write_bytes(file.read_bytes()[:-2000])
        with pytest.raises(WeightsError):
            load_backbone(TINY, file)
        file.write_bytes(b"")
        with pytest.raises(WeightsError):
            load_backbone(TINY, file)
    with pytest.raises(WeightsError, match="dictionary of tensors, found \\['model', 'epoch'\\]"):
        load_backbone(TINY, write({"model": {}, "epoch": 3}, tmp_path / "train.pth"))
    with pytest.raises(WeightsError, match="dictionary of tensors, found list"):
        load_backbone(TINY, write([torch.zeros(1)], tmp_path / "list.pth"))
    with pytest.raises(WeightsError, match="norm.bias is torch.int8"):
        quantised = state_of(TINY) | {"norm.bias": torch.zeros(32, dtype=torch.int8)}
        load_backbone(TINY, write(quantised, tmp_path / "int8.pth"))


# --- folders


def shard(state, folder, drop=None):
    folder.mkdir()
    names = sorted(state)
    parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, members in parts.items():
        save_file({n: state[n] for n in members}, folder / file)
    index = {"metadata": {}, "weight_map": {n: f for f, members in parts.items() for n in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if drop:
        (folder / drop).unlink()
    return folder


def test_shards(tmp_path):
    state = state_of(TINY)
    whole = load_backbone(TINY, write(state, tmp_path / "w.safetensors"))
    sharded = load_backbone(TINY, shard(state, tmp_path / "sharded"))
    assert sharded.digest == whole.digest
    third = "model-00003-of-00003.safetensors"
    with pytest.raises(WeightsError, match=f"1 of 3 shards are missing: {third}"):
        load_backbone(TINY, shard(state, tmp_path / "part", drop=third))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.safetensors.index.json").write_text('{"weight_map": {"norm.bias": "../w.safetensors"}}')
    with pytest.raises(WeightsError, match="the index names"):
        load_backbone(TINY, outside)


def test_folders_hold_one_checkpoint(tmp_path):
    with pytest.raises(WeightsError, match="no weight files"):
        resolve(None, tmp_path)
    write(state_of(TINY), tmp_path / "a.pth")
    assert resolve(None, tmp_path).files == (tmp_path / "a.pth",)
    write(state_of(TINY), tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="a.pth, b.pth"):
        resolve(None, tmp_path)
    with pytest.raises(WeightsError, match="cannot read a .onnx file"):
        (tmp_path / "m.onnx").touch()
        resolve(None, tmp_path / "m.onnx")
    for absent in (tmp_path / "none.pth", "weights/none.pth", "nothing"):
        with pytest.raises(WeightsError, match="no such file or folder"):
            resolve(None, absent)


# --- normalisation


def test_normalisation_rules(tmp_path):
    def rule(file, processor=None, hub_id=""):
        file = tmp_path / file
        file.parent.mkdir(exist_ok=True)
        file.touch()
        if processor is not None:
            (file.parent / "preprocessor_config.json").write_text(processor)
        found = resolve(None, file)
        return load_normalisation(replace(found, hub_id=hub_id))

    assert rule("a/w.pth") == (LVD_MEAN, LVD_STD, "default (lvd1689m): nothing said otherwise")
    name = "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
    assert rule(f"b/{name}") == (SAT_MEAN, SAT_STD, f"file name {name} (sat493m)")
    hub = "facebook/dinov3-vitl16-pretrain-sat493m"
    assert rule("c/w.pth", hub_id=hub) == (SAT_MEAN, SAT_STD, f"hub id {hub} (sat493m)")
    assert rule("dinov3-vitl16-pretrain-sat493m/w.pth")[0] == SAT_MEAN
    own = '{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}'
    assert rule(f"d/{name}", own) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0), "preprocessor_config.json")
    for broken in ("{}", "[", '{"image_mean": [1, 2], "image_std": [1, 2]}',
                   '{"image_mean": [0, 0, 0], "image_std": [0, 1, 1]}'):  # fmt: skip
        with pytest.raises(WeightsError, match="three numbers each"):
            rule("e/w.pth", broken)


def test_normalisation_reaches_the_config(tmp_path):
    file = write(state_of(TINY), tmp_path / "x_sat493m.pth")
    backbone = load_backbone(TINY, file)
    assert (backbone.config.mean, backbone.config.std) == (SAT_MEAN, SAT_STD)
    assert "sat493m" in backbone.normalisation_rule and backbone.source == str(file)


# --- saving


@pytest.mark.parametrize("config", [SMALL, SMALL_SWIGLU, TINY_7B], ids=lambda c: c.name)
def test_transformers_loads_what_we_save(config, tmp_path):
    from transformers import AutoImageProcessor, DINOv3ViTModel

    original = write(state_of(config), tmp_path / "x_sat493m.safetensors")
    backbone = load_backbone(config, original)
    assert save_backbone(backbone, tmp_path / "out") == backbone.digest
    model, info = DINOv3ViTModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    model.eval()
    p = config.patch_size
    x = torch.randn(2, 3, 3 * p, 4 * p)
    with torch.inference_mode():
        theirs = model(x).last_hidden_state[:, 5:]
        mine = backbone(x).patches.flatten(1, 2)
    assert (theirs - mine).norm() / mine.norm() < 1e-5
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert tuple(processor.image_mean) == SAT_MEAN and tuple(processor.image_std) == SAT_STD
    again = load_backbone(config, tmp_path / "out")
    assert again.digest == backbone.digest and again.config.mean == SAT_MEAN
    assert again.normalisation_rule == "preprocessor_config.json"


def test_what_transformers_saves_we_load(tmp_path):
    model = oracles.hugging_face(SMALL, 1)
    model.save_pretrained(tmp_path, max_shard_size="5MB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    backbone = load_backbone(weights=tmp_path)
    x = torch.randn(1, 3, 48, 32)
    with torch.inference_mode():
        theirs, mine = model(x).last_hidden_state[:, 0], backbone(x).cls
    assert (theirs - mine).norm() / mine.norm() < 1e-5


def test_config_json_must_agree(tmp_path):
    save_backbone(load_backbone(TINY, "random"), tmp_path)
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps(good | {"rope_theta": 10000.0, "num_attention_heads": 4}))
    with pytest.raises(WeightsError) as caught:
        load_backbone(TINY, tmp_path)
    assert "rope_theta is 10000.0" in str(caught.value) and "num_attention_heads is 4" in str(caught.value)
    file.write_text("{")
    with pytest.raises(WeightsError, match="unreadable"):
        load_backbone(TINY, tmp_path)


def test_saving_bfloat16_keeps_its_values(tmp_path):
    backbone = load_backbone(TINY, "random", dtype=torch.bfloat16)
    digest = save_backbone(backbone, tmp_path)
    again = load_backbone(TINY, tmp_path, dtype=torch.bfloat16)
    assert again.digest == digest != backbone.digest
    assert torch.equal(tokens_of(again), tokens_of(backbone))


# --- the hub

SECRET = "hf_" + "NotARealTokenItIsOnlyLookedForInMessages"


class Hub:
    """Stands in for huggingface_hub.snapshot_download."""

    def __init__(self, cached=None, remote=None):
        self.cached, self.remote, self.asked = cached or {}, remote or {}, []

    def __call__(self, repo_id, *, allow_patterns, local_files_only=False):
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.asked.append((repo_id, local_files_only))
        if repo_id in self.cached:
            return str(self.cached[repo_id])
        answer = LocalEntryNotFoundError("not cached") if local_files_only else self.remote[repo_id]
        if isinstance(answer, Exception):
            try:
                raise RuntimeError(f"sent Authorization: Bearer {SECRET}")
            except RuntimeError as cause:
                raise answer from cause
        return str(answer)


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    token = {"value": None}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token["value"])
    stand_in.token = token
    return stand_in


def response(status):
    import importlib

    from huggingface_hub import errors

    # huggingface_hub's own HTTP library, whichever this version uses
    base = errors.HfHubHTTPError.__mro__[1]
    http = importlib.import_module(base.__module__.split(".")[0])
    return http.Response(status, request=http.Request("GET", "https://huggingface.co/api/x"))


def failure(kind, status=None):
    from huggingface_hub import errors

    text = f"{kind} for url, token {SECRET}"
    if status is None:
        return getattr(errors, kind)(text)
    return getattr(errors, kind)(text, response=response(status))


def test_official_weights_prefer_the_cached_original(hub, tmp_path):
    write(state_of(TINY), tmp_path / "model.safetensors")
    hub.cached["facebook/dinov3-vits16-pretrain-lvd1689m"] = tmp_path
    found = resolve("vits16", None)
    assert found.hub_id == found.source == "facebook/dinov3-vits16-pretrain-lvd1689m"
    assert all(offline for _, offline in hub.asked)


def test_without_cache_token_or_licence_the_refusal_says_what_to_do(hub):
    with pytest.raises(WeightsError) as caught:
        load_backbone("vits16")
    message = str(caught.value)
    page = "https://huggingface.co/facebook/dinov3-vits16-pretrain-lvd1689m"
    for part in (page, "HF_TOKEN", "--weights FILE", "--accept-dinov3-license", "accept_dinov3_license", "give weights"):
        assert part in message
    assert all(offline for _, offline in hub.asked), "the hub was asked without a token or a licence"


def test_the_mirror_needs_the_licence(hub, tmp_path):
    mirror = "timm/vit_small_patch16_dinov3_qkvb.lvd1689m"
    write(oracles.to_timm(state_of(SMALL)), tmp_path / "model.safetensors")
    hub.cached[mirror] = tmp_path
    with pytest.raises(WeightsError, match="--accept-dinov3-license"):
        resolve("vits16", None)
    assert resolve("vits16", None, accept_license=True).hub_id == mirror
    hub.cached.clear()
    hub.remote[mirror] = tmp_path
    assert load_backbone(SMALL, None, accept_license=True).source == mirror


def test_with_a_token_the_original_is_downloaded(hub, tmp_path):
    hub.token["value"] = SECRET
    hub.remote["facebook/dinov3-vitl16-pretrain-lvd1689m"] = tmp_path
    write(state_of(TINY), tmp_path / "model.safetensors")
    assert resolve("vitl16", None).hub_id == "facebook/dinov3-vitl16-pretrain-lvd1689m"


def test_an_interrupted_download_does_not_count_as_cached(hub, tmp_path):
    shard(state_of(TINY), tmp_path / "part", drop="model-00002-of-00003.safetensors")
    hub.cached["facebook/dinov3-vits16-pretrain-lvd1689m"] = tmp_path / "part"
    with pytest.raises(WeightsError, match="not on this machine"):
        resolve("vits16", None)


@pytest.mark.parametrize("name", ["vitt16", "vitl16plus", "vits8"])
def test_models_without_published_weights(hub, name):
    with pytest.raises(WeightsError, match=f"nobody publishes DINOv3 weights for {name}"):
        load_backbone(name)
    assert not hub.asked


FAILURES = [
    (("GatedRepoError", 401), False, "is gated and no access token is set"),
    (("GatedRepoError", 403), True, "is gated and the account of your token has not been given access"),
    (("HfHubHTTPError", 403), True, "is gated and the account of your token has not been given access"),
    (("HfHubHTTPError", 401), True, "does not accept your access token"),
    (("RepositoryNotFoundError", 404), True, "the hub has no model"),
    (("RemoteEntryNotFoundError", 404), True, "the hub has no model"),
    (("LocalEntryNotFoundError", None), True, "the hub could not be reached"),
    (("HfHubHTTPError", 503), True, "could not be reached \\(it answered 503\\)"),
    (("OfflineModeIsEnabled", None), True, "HF_HUB_OFFLINE is set"),
    (ConnectionError(f"refused {SECRET}"), True, "the hub could not be reached"),
    (ValueError(f"odd {SECRET}"), True, "the download failed: ValueError: odd \\*\\*\\*"),
]


@pytest.mark.parametrize(("error", "token", "message"), FAILURES, ids=lambda v: str(v)[:40])
def test_hub_failures_are_told_apart_and_never_show_the_token(hub, monkeypatch, error, token, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", SECRET)
        hub.token["value"] = SECRET
    hub_id = "facebook/dinov3-vits16-pretrain-lvd1689m"
    hub.remote[hub_id] = failure(*error) if isinstance(error, tuple) else error
    with pytest.raises(WeightsError, match=message) as caught:
        load_backbone("vits16", hub_id)
    raised = caught.value
    assert (
        f"https://huggingface.co/{hub_id}" in str(raised)
        and "--weights FILE" in str(raised)
        or "spelling" in str(raised)
    )
    shown = "".join(traceback.format_exception(raised)) + repr(raised) + str(raised.args) + repr(vars(raised))
    chain = raised
    while chain is not None:
        shown += str(chain) + repr(chain)
        chain = chain.__cause__ or chain.__context__
    assert SECRET not in shown


def test_tokens_of_any_shape_are_redacted(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain-secret-of-a-mirror")
    assert weight_hub.redact("a plain-secret-of-a-mirror b") == "a *** b"
    assert weight_hub.redact("x hf_abcdefghij y") == "x *** y"


def test_the_real_client_offline_is_a_clear_refusal(monkeypatch, tmp_path):
    """No stand-in: huggingface_hub itself, told that there is no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(WeightsError, match=r"give weights \(--weights FILE") as caught:
        load_backbone("vits16", "facebook/dinov3-vits16-pretrain-lvd1689m")
    assert SECRET not in str(caught.value)


def test_damaged_torch_files_are_refused_as_such(tmp_path):
    for i, data in enumerate((b"junk", b"\x80\x02junk", b"PK\x03\x04 no zip", bytes(range(256)))):
        file = tmp_path / f"{i}.pth"
        file.write_bytes(data)
        with pytest.raises(WeightsError):
            load_backbone("vitt16", file)


def test_the_accepted_licence_leads_to_the_mirror_also_with_a_token(hub):
    hub.token["value"] = SECRET
    with pytest.raises(WeightsError):
        resolve("vits16", None, accept_license=True)
    assert [name for name, offline in hub.asked if not offline] == ["timm/vit_small_patch16_dinov3_qkvb.lvd1689m"]
