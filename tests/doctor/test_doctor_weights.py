"""doctor weights: sound, damaged and untrained weights, in files made here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dinoray
from dinoray.doctor.weights import examine_weights, table
from dinoray.errors import BadRequest, WeightsError
from tests.vision.oracles import to_meta, to_timm

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    dinoray.save_backbone(dinoray.load_backbone("vitt16", weights="random:5"), folder)
    return folder


def changed(sound: Path, tmp_path: Path, change: Callable[[Tensors], None]) -> str:
    tensors = load_file(sound / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    return str(tmp_path)


def levels(found) -> dict[str, str]:
    return {f.subject: f.level for f in found.findings}


def test_sound_weights(sound: Path) -> None:
    found = examine_weights(str(sound))
    assert levels(found) == {"model": "ok", "coverage": "ok", "digest": "ok", "LayerScale": "ok"}
    backbone = dinoray.load_backbone(weights=str(sound))
    text = {f.subject: f.text for f in found.findings}
    assert text["digest"] == backbone.digest
    tensors = load_file(sound / "model.safetensors")
    assert f"all {len(tensors)} of the file" in text["coverage"]
    assert "huggingface layout" in text["coverage"]
    assert [layer.name for layer in found.layers] == ["embeddings", *(f"layer {i}" for i in range(12)), "norm"]
    assert sum(layer.tensors for layer in found.layers) == len(tensors)
    assert sum(layer.values for layer in found.layers) == sum(t.numel() for t in tensors.values())


def test_the_ranges_are_those_of_the_file(sound: Path) -> None:
    tensors = load_file(sound / "model.safetensors")
    layer = examine_weights(str(sound)).layers[4]
    of = {name.removeprefix("layer.3."): t.double() for name, t in tensors.items() if name.startswith("layer.3.")}
    for found, kind in ((layer.weights, [t for t in of.values() if t.dim() > 1]),
                        (layer.gamma, [t for name, t in of.items() if name.endswith("lambda1")]),
                        (layer.norm, [of["norm1.weight"], of["norm2.weight"]])):
        values = torch.cat([t.flatten() for t in kind])
        assert found == pytest.approx((values.min().item(), values.max().item(), values.abs().mean().item()))
    assert layer.dtypes == {"float32"}


def test_the_table_has_a_line_for_each_layer(sound: Path, tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("layer.2.")]:
            tensors[name] = tensors[name].to(torch.bfloat16)

    found = table(examine_weights(changed(sound, tmp_path, halve)).layers)
    assert len(found) == 15
    assert found[0].split()[:4] == ["layer", "tensors", "values", "dtype"]
    assert re.match(r"layer 2 +17 +445,056 +bfloat16 ", found[4])
    assert re.match(r"layer 3 +17 +445,056 +float32 ", found[5])


@pytest.mark.parametrize(("layout", "convert", "unused"), [("meta", to_meta, " for training only"), ("timm", to_timm, "")])
def test_other_layouts_are_examined_alike(sound: Path, tmp_path: Path, layout: str, convert: Callable[[Tensors], Tensors],
                                          unused: str) -> None:
    tensors = convert(load_file(sound / "model.safetensors"))
    if layout == "meta":
        tensors["local_cls_norm.weight"] = torch.ones(192)
    torch.save(tensors, tmp_path / "weights.pth")
    found, before = examine_weights(str(tmp_path / "weights.pth")), examine_weights(str(sound))
    assert levels(found) == levels(before)
    text = {f.subject: f.text for f in found.findings}
    assert f"({layout} layout)" in text["coverage"] and unused in text["coverage"]
    assert text["digest"] == {f.subject: f.text for f in before.findings}["digest"]
    assert [(layer.weights, layer.gamma, layer.norm) for layer in found.layers[1:]] == [
        (layer.weights, layer.gamma, layer.norm) for layer in before.layers[1:]]


@pytest.mark.parametrize(("parts", "text"), [
    (("layer_scale1", "layer_scale2"), "24 of 24 are below 0.0001, as before training, so the network is a no-op"),
    (("layer_scale2",), "12 of 24 are below 0.0001, as before training, so these parts")])
def test_layer_scale_as_before_training_is_a_failure(sound: Path, tmp_path: Path, parts: tuple[str, ...], text: str) -> None:
    def reset(tensors: Tensors) -> None:
        for name in tensors:
            if any(part in name for part in parts):
                tensors[name].fill_(1e-5)

    found = examine_weights(changed(sound, tmp_path, reset))
    assert found.failed
    assert levels(found)["LayerScale"] == "fail"
    assert any(text in f.text for f in found.findings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_a_failure_and_is_found(sound: Path, tmp_path: Path, value: float) -> None:
    found = examine_weights(changed(sound, tmp_path, lambda t: t["layer.7.mlp.up_proj.weight"][3, 5:6].fill_(value)))
    assert found.failed
    assert "digest" not in levels(found)
    assert any("layer.7.mlp.up_proj.weight" in f.text for f in found.findings if f.level == "fail")
    assert [layer.name for layer in found.layers if layer.broken] == ["layer 7"]
    assert "NaN" in table(found.layers)[9]


def test_a_tensor_of_zeros_is_a_failure(sound: Path, tmp_path: Path) -> None:
    found = examine_weights(changed(sound, tmp_path, lambda t: t["layer.0.attention.o_proj.weight"].zero_()))
    assert found.failed
    assert any("layer 0 attention.o_proj.weight" in f.text for f in found.findings)


@pytest.mark.parametrize(("name", "word"), [("layer.4.norm1.bias", "missing"), ("something.new", "unused")])
def test_coverage(sound: Path, tmp_path: Path, name: str, word: str) -> None:
    def change(tensors: Tensors) -> None:
        if word == "missing":
            del tensors[name]
        else:
            tensors[name] = torch.zeros(3)

    found = examine_weights(changed(sound, tmp_path, change))
    assert found.failed
    assert levels(found) == {"coverage": "fail"}
    assert f"{word}: {name}" in found.findings[0].text


def test_untrained_norms_and_layer_scale_are_warned_of(sound: Path, tmp_path: Path) -> None:
    def fresh(tensors: Tensors) -> None:  # what a newly made `transformers` model holds
        for name, tensor in tensors.items():
            if "norm" in name:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            if "lambda1" in name:
                tensor.fill_(1.0)

    found = examine_weights(changed(sound, tmp_path, fresh))
    assert not found.failed
    assert levels(found) == {"model": "ok", "coverage": "ok", "digest": "ok", "LayerScale": "warn", "norms": "warn"}


def test_random_weights_are_no_failure_but_told() -> None:
    found = examine_weights("random:3", "vitt16")
    assert levels(found) == {"model": "ok", "weights": "warn", "digest": "ok", "LayerScale": "ok"}
    assert {f.subject: f.text for f in found.findings}["digest"] == dinoray.load_backbone("vitt16", weights="random:3").digest


def test_what_cannot_be_examined_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no model"):
        examine_weights("random")
    with pytest.raises(WeightsError, match="no such file"):
        examine_weights(str(tmp_path / "none.safetensors"))


def test_a_file_that_is_no_checkpoint_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 100)
    found = examine_weights(str(tmp_path))
    assert levels(found) == {"coverage": "fail"}
