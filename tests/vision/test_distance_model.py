"""The distance-map model and its checkpoint folder: a round trip of every kind, and every refusal."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

from dinoray.errors import BadRequest, WeightsError
from dinoray.io.stores import LocalStore
from dinoray.training.card import model_card
from dinoray.vision import distance_model
from dinoray.vision.canonical import weights_digest
from dinoray.vision.decoders.unet2d import tap_layers
from dinoray.vision.distance_model import (
    BackboneRecord,
    DecoderRecord,
    DistanceMapModel,
    SegmenterConfig,
    load_segmenter,
    new_model,
    read_config,
    save_checkpoint,
)
from dinoray.vision.weights import load_backbone
from tests.runs import TINY, tiny_backbone
from tests.vision.distance_models import FOUR, small_config, small_model

RECORD = DecoderRecord(taps=tap_layers(12), channels=(16, 8, 8, 4))
PIXELS = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def single(one_thread: None) -> None:
    """One thread."""


@pytest.fixture(scope="module")
def frozen() -> DistanceMapModel:
    """The smallest published shape with random weights, decoder made not trivial."""
    return _model(frozen=True)


@pytest.fixture(scope="module")
def tuned() -> DistanceMapModel:
    """The same with another backbone than the one it began with."""
    model = _model(frozen=False)
    with torch.no_grad():
        model.backbone.blocks[3].ffn.fc1.weight.mul_(1.5)
    return model


def _model(*, frozen: bool) -> DistanceMapModel:
    model = new_model(load_backbone("vitt16", weights="random:3"), RECORD, frozen=frozen)
    with torch.no_grad():
        model.decoder.head.weight.mul_(30)
    return model.eval()


def config(model: DistanceMapModel, *, included: bool, **fields: object) -> SegmenterConfig:
    shape = model.backbone.config
    record = BackboneRecord(model="vitt16", weights="random:3", digest="", included=included, mean=shape.mean, std=shape.std)
    return SegmenterConfig(**{"backbone": record, "decoder": RECORD, "median_diameter_px": 17.25, "peak": 0.5, "fill": 0.125,
                              "training": {"steps": 7}, "metrics": {"ap50": 0.5}, **fields})


def saved(tmp_path, model: DistanceMapModel, *, included: bool, **fields: object) -> tuple[str, SegmenterConfig]:
    url = str(tmp_path / "c" / "checkpoint")
    return url, save_checkpoint(LocalStore(str(tmp_path / "c")), "checkpoint", model, config(model, included=included, **fields))


def edit(url: str, **values: object) -> None:
    """Change fields of config.json."""
    path = f"{url}/config.json"
    with open(path) as file:
        before = json.load(file)
    with open(path, "w") as file:
        json.dump(before | values, file)


def retensor(url: str, change) -> None:
    """Change the tensors of model.safetensors."""
    with open(f"{url}/model.safetensors", "rb") as file:
        tensors = load(file.read())
    change(tensors)
    with open(f"{url}/model.safetensors", "wb") as file:
        file.write(save(tensors))


# ---------------------------------------------------------------- the model


def test_the_model_normalises_taps_and_decodes() -> None:
    model = small_model()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (FOUR.mean, FOUR.std))
    with torch.inference_mode():
        x = (PIXELS - mean) / std
        maps = model.backbone(x, layers=(0, 1, 2, 3)).maps
        expected = model.decoder(x, [maps[k] for k in (0, 1, 2, 3)])
        assert torch.equal(model(PIXELS), expected)
        logits, tokens = model.with_tokens(PIXELS)
        assert torch.equal(logits, expected)
        assert torch.equal(tokens, model.backbone(x).patches)
    assert expected.shape == (2, 1, 32, 48)
    assert expected.std() > 0.1


def test_the_decoder_sees_every_tap() -> None:
    model = small_model()
    with torch.inference_mode():
        before = model(PIXELS)
        for taps in [(1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 1, 3), (0, 1, 2, 2)]:
            model.taps = taps
            assert not torch.allclose(model(PIXELS), before, atol=1e-3), taps


def test_a_frozen_backbone_has_no_gradient_and_a_tuned_one_has() -> None:
    for frozen in (True, False):
        model = new_model(load_backbone("vitt16", weights="random:3"), RECORD, frozen=frozen).train()
        model(PIXELS).square().mean().backward()
        assert all((p.grad is None) == frozen for name, p in model.backbone.named_parameters() if name != "mask_token")
        assert all(p.grad is not None for p in model.decoder.parameters())


def test_the_normalisation_is_exact_in_bfloat16() -> None:
    """0.485 is not a bfloat16: a mean that was cast with the weights would shift every pixel."""
    model, seen = small_model(dtype=torch.bfloat16), []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.inference_mode():
            model(PIXELS)
    finally:
        model.backbone._forward_pre_hooks.clear()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (FOUR.mean, FOUR.std))
    assert torch.equal(seen[0], ((PIXELS - mean) / std).bfloat16())


def test_a_new_model_is_the_same_for_the_same_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (new_model(tiny_backbone(FOUR), small_config().decoder, frozen=True, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.decoder.parameters(), b.decoder.parameters(), strict=True))
    assert not torch.equal(a.decoder.first[0].weight, c.decoder.first[0].weight)


def test_taps_beyond_the_backbone_are_refused() -> None:
    with pytest.raises(BadRequest, match="layer 3 of tiny16"):
        new_model(tiny_backbone(TINY), small_config().decoder, frozen=True)


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize("included", [False, True])
def test_round_trip(tmp_path, frozen: DistanceMapModel, included: bool) -> None:
    url, written = saved(tmp_path, frozen, included=included)
    model, read = load_segmenter(url)
    assert read == written == read_config(url)
    assert read.backbone.digest == frozen.backbone.digest
    assert (read.median_diameter_px, read.peak, read.fill, read.metrics) == (17.25, 0.5, 0.125, {"ap50": 0.5})
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.decoder.first[0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(model(PIXELS), frozen(PIXELS))
    with open(f"{url}/model.safetensors", "rb") as file:
        assert any(name.startswith("backbone.") for name in load(file.read())) == included
    again = LocalStore(str(tmp_path / "again"))
    assert save_checkpoint(again, "checkpoint", model, read) == written
    for name in ("model.safetensors", "config.json", "README.md"):
        assert again.get(f"checkpoint/{name}") == LocalStore(url).get(name), f"{name}: the same bytes again"


def test_a_tuned_backbone_comes_back(tmp_path, tuned: DistanceMapModel) -> None:
    url, written = saved(tmp_path, tuned, included=True)
    assert written.backbone.digest == weights_digest(tuned.backbone) != tuned.backbone.digest
    model, _ = load_segmenter(url)
    assert model.backbone.digest == written.backbone.digest
    with torch.inference_mode():
        assert torch.equal(model(PIXELS), tuned(PIXELS))


def test_a_tuned_backbone_cannot_be_left_out(tmp_path, tuned: DistanceMapModel) -> None:
    with pytest.raises(BadRequest, match="trained"):
        saved(tmp_path, tuned, included=False)


def test_the_card_and_the_digest_of_all_weights(tmp_path, frozen: DistanceMapModel, tuned: DistanceMapModel) -> None:
    store = LocalStore(str(tmp_path))
    one = save_checkpoint(store, "a", frozen, config(frozen, included=False), card=model_card)
    other = save_checkpoint(store, "b", frozen, config(frozen, included=True))
    assert one.weights_digest == other.weights_digest, "where the backbone lies does not change the weights"
    assert b"vitt16" in store.get("b/README.md")
    before = config(tuned, included=True)
    written = save_checkpoint(store, "c", tuned, before.model_copy(update={"backbone": before.backbone.model_copy(
        update={"digest": "of the start"})}), card=model_card)
    for folder, settled in (("a", one), ("c", written)):
        last = store.get(f"{folder}/README.md").decode().splitlines()[-1]
        assert last == f"Digest of all weights: `{settled.weights_digest}`; of the backbone: `{settled.backbone.digest}`."
        assert settled.weights_digest


def test_bfloat16_is_close(tmp_path, frozen: DistanceMapModel) -> None:
    url, _ = saved(tmp_path, frozen, included=True)
    model, _ = load_segmenter(url, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        exact, rough = frozen(PIXELS), model(PIXELS)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_a_folder_without_its_config_is_no_checkpoint_while_it_is_written(tmp_path, frozen: DistanceMapModel) -> None:
    class Stops(LocalStore):
        def put(self, key: str, data: bytes | memoryview) -> None:
            if key.endswith("config.json"):
                raise OSError("the machine went away")
            super().put(key, data)

    with pytest.raises(OSError, match="went away"):
        save_checkpoint(Stops(str(tmp_path)), "checkpoint", frozen, config(frozen, included=False))
    with pytest.raises(BadRequest, match="no checkpoint"):
        load_segmenter(str(tmp_path / "checkpoint"))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("text", "says"), [
    ("{", "cannot be read"), ("[1]", "not one of a distance-map"), ('{"format": "dinoray-context/1"}', "not one of a distance-map"),
    ('{"format": "dinoray-distance-map/1"}', "backbone"), ('{"format": "dinoray-distance-map/9"}', "format")])
def test_other_files_called_config(tmp_path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadRequest, match=says):
        load_segmenter(str(tmp_path))


def test_fields_of_another_version_and_values_out_of_range(tmp_path, frozen: DistanceMapModel) -> None:
    url, _ = saved(tmp_path, frozen, included=False)
    edit(url, peak=1.5)
    with pytest.raises(BadRequest, match="peak"):
        read_config(url)
    edit(url, peak=0.5, window="hann")
    with pytest.raises(BadRequest, match="window"):
        read_config(url)


def test_a_damaged_or_missing_file_of_weights(tmp_path, frozen: DistanceMapModel) -> None:
    url, _ = saved(tmp_path, frozen, included=False)
    path = tmp_path / "c/checkpoint/model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_segmenter(url)
    path.unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        load_segmenter(url)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["decoder.first.0.weight"][0, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop("decoder.head.bias"), "head.bias"),
    (lambda t: t.update({"decoder.more": torch.zeros(1)}), "decoder.more"),
    (lambda t: t.update({"optimizer": torch.zeros(1)}), "optimizer"),
    (lambda t: t.update({"decoder.head.bias": torch.zeros(2)}), "head.bias"),
    (lambda t: t["decoder.head.bias"].add_(1e-6), "digest"),
    (_nan, "NaN"),
    (lambda t: t.pop("backbone.layer.3.mlp.up_proj.weight"), "up_proj"),
    (lambda t: t.update({"backbone.layer.12.norm1.weight": torch.zeros(192)}), "layer.12"),
    (lambda t: t.update({"backbone.norm.bias": torch.zeros(191)}), "norm.bias"),
    (lambda t: t["backbone.norm.bias"].add_(1e-3), "backbone's digest")])
def test_tensors_that_are_not_those_of_the_config(tmp_path, frozen: DistanceMapModel, change, says: str) -> None:
    url, _ = saved(tmp_path, frozen, included=True)
    retensor(url, change)
    with pytest.raises(WeightsError, match=says):
        load_segmenter(url)


def test_another_backbone_is_refused_and_weights_may_lie_elsewhere(tmp_path, frozen: DistanceMapModel) -> None:
    url, _ = saved(tmp_path, frozen, included=False)
    with pytest.raises(WeightsError, match="digest"):
        load_segmenter(url, weights="random:4")
    record = config(frozen, included=False).backbone.model_dump(mode="json")
    edit(url, backbone=record | {"digest": frozen.backbone.digest, "weights": "/nowhere/at/all"})
    model, _ = load_segmenter(url, weights="random:3")
    with torch.inference_mode():
        assert torch.equal(model(PIXELS), frozen(PIXELS))


def test_another_normalisation_than_that_of_the_training_is_refused(tmp_path, frozen: DistanceMapModel) -> None:
    url, written = saved(tmp_path, frozen, included=False)
    edit(url, backbone=written.backbone.model_dump(mode="json") | {"mean": [0.5, 0.5, 0.5]})
    with pytest.raises(WeightsError, match="normalisation"):
        load_segmenter(url)


def test_a_decoder_of_another_shape_is_refused(tmp_path, frozen: DistanceMapModel) -> None:
    url, written = saved(tmp_path, frozen, included=False)
    edit(url, decoder=written.decoder.model_dump(mode="json") | {"norm": "none"})
    with pytest.raises(WeightsError, match="decoder's tensors"):
        load_segmenter(url)


def test_the_format_is_one_constant() -> None:
    assert SegmenterConfig.model_fields["format"].default == distance_model.FORMAT
