"""The UNet decoder: sizes for every patch, independence of crop and batch, its routes, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dinoray.errors import BadRequest
from dinoray.vision.decoders.unet2d import PixelNorm, UNet2D, norm_layer, tap_layers

DIM = 12


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decoder(patch: int, *, norm: str = "layer", channels=(16, 8, 8, 4), seed: int = 0, **fields: int) -> UNet2D:
    """A decoder whose norms' biases and head are random, so that nothing is trivially 0."""
    torch.manual_seed(seed)
    unet = UNet2D(DIM, patch, channels=channels, norm=norm, **{"stem_levels": min(3, patch.bit_length() - 1), **fields})
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
                module.bias.normal_(std=0.3)
        unet.head.weight.normal_()
    return unet.eval()


def inputs(patch: int, h: int, w: int, batch: int = 1, taps: int = 4, seed: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, h * patch, w * patch, generator=generator)
    return pixels, [torch.randn(batch, DIM, h, w, generator=generator) for _ in range(taps)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("patch", "grid"), [(p, g) for p in (2, 4, 8, 16, 32) for g in [(1, 1), (1, 3), (2, 1), (3, 5)]])
def test_output_is_as_large_as_the_input(patch: int, grid: tuple[int, int], grad: bool) -> None:
    pixels, maps = inputs(patch, *grid, batch=2)
    with torch.set_grad_enabled(grad):
        out = decoder(patch)(pixels, maps)
    assert out.shape == (2, 1, grid[0] * patch, grid[1] * patch)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@pytest.mark.parametrize("fields", [{"stem_levels": 0}, {"stem_levels": 1}, {"outputs": 3}, {"num_taps": 2}, {"num_taps": 1},
                                    {"channels": (8,)}, {"norm": "none"}, {"norm": "batch"}, {"norm": "group"}])
def test_shapes_of_every_kind(fields: dict) -> None:
    pixels, maps = inputs(8, 3, 2, taps=fields.get("num_taps", 4))
    out = decoder(8, **fields)(pixels, maps)
    assert out.shape == (1, fields.get("outputs", 1), 24, 16)
    assert out.std() > 0


@pytest.mark.parametrize(("norm", "same"), [("layer", True), ("none", True), ("batch", True), ("group", False)])
def test_a_crop_gives_what_the_whole_image_gives(norm: str, same: bool) -> None:
    """With the tokens out of play (they do depend on the crop): away from the border, the logits are the image's."""
    pixels, maps = inputs(8, 24, 24)
    maps = [torch.zeros_like(m) for m in maps]
    unet = decoder(8, norm=norm)
    with torch.inference_mode():
        whole = unet(pixels, maps)[..., 40:168, 24:152]
        crop = unet(pixels[..., 40:168, 24:152], [m[..., 5:21, 3:19] for m in maps])
    margin = 2 * 8 + 8 + 2 * (4 + 2 + 1)  # two convolutions at each resolution, and the interpolation of a token
    inside = (..., slice(margin, -margin), slice(margin, -margin))
    assert whole.std() > 0.1
    assert torch.allclose(whole[inside], crop[inside], atol=1e-4) == same
    assert not torch.allclose(whole, crop, atol=1e-4), "at the border the crop cannot know"


def test_the_stem_places_a_border_of_one_pixel() -> None:
    """Tokens alone cannot tell at which pixel a line lies: without the stem the logits do not depend on pixels at all."""
    pixels, maps = inputs(16, 2, 2)
    moved = pixels.roll(1, dims=3)
    with torch.inference_mode():
        assert torch.equal(decoder(16, stem_levels=0)(pixels, maps), decoder(16, stem_levels=0)(moved, maps))
        assert not torch.allclose(decoder(16)(pixels, maps), decoder(16)(moved, maps), atol=0.1)


def test_every_map_and_every_parameter_matters() -> None:
    pixels, maps = inputs(16, 2, 3)
    unet = decoder(16)
    maps = [m.requires_grad_() for m in maps]
    pixels.requires_grad_()
    unet(pixels, maps).square().sum().backward()
    assert all(t.grad.abs().max() > 0 for t in (pixels, *maps))
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_maps_are_taken_from_shallow_to_deep() -> None:
    """The last map is the one that stage 0 starts from, and its lateral is the first."""
    pixels, maps = inputs(8, 2, 2)
    unet = decoder(8)
    with torch.no_grad():
        unet.lateral[0].weight.zero_()
    other = [*maps[:3], maps[3] + 1]
    with torch.inference_mode():
        assert torch.equal(unet(pixels, maps), unet(pixels, other))
        assert not torch.equal(unet(pixels, maps), unet(pixels, [maps[0] + 1, *maps[1:]]))


@pytest.mark.parametrize("norm", ["layer", "group", "batch"])
def test_without_a_gradient_images_are_decoded_one_by_one_with_the_same_values(norm: str) -> None:
    pixels, maps = inputs(16, 3, 2, batch=5)
    unet = decoder(16, norm=norm)
    with torch.inference_mode():
        fast = unet(pixels, maps)
        alone = torch.cat([unet(pixels[i:i + 1], [m[i:i + 1] for m in maps]) for i in range(5)])
    assert torch.equal(fast, alone), "bytes of an image do not depend on its batch"
    assert torch.allclose(fast, unet(pixels, maps), atol=1e-4), "nor do values depend on the gradient's route"


def test_a_batch_norm_that_learns_sees_the_whole_batch_also_without_a_gradient() -> None:
    pixels, maps = inputs(8, 2, 2, batch=3)
    unet = decoder(8, norm="batch").train()
    with torch.no_grad():
        unet(pixels, maps)
    assert {int(m.num_batches_tracked) for m in unet.modules() if isinstance(m, nn.BatchNorm2d)} == {1}


@pytest.mark.parametrize("grad", [False, True])
def test_under_autocast_it_runs_and_is_close(grad: bool) -> None:
    pixels, maps = inputs(8, 3, 3)
    unet = decoder(8)
    with torch.inference_mode():
        exact = unet(pixels, maps)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        rough = unet(pixels, maps)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_bfloat16_weights_give_float32_logits_that_are_close() -> None:
    pixels, maps = inputs(8, 3, 3)
    with torch.inference_mode():
        exact = decoder(8)(pixels, maps)
        rough = decoder(8).to(torch.bfloat16)(pixels.bfloat16(), [m.bfloat16() for m in maps])
    assert rough.dtype == torch.float32
    assert len(rough.unique()) > rough.numel() // 2, "not rounded to bfloat16"
    assert (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("patch", "fields"), [(8, {}), (16, {}), (4, {"stem_levels": 2}), (16, {"stem_levels": 0}),
                                               (8, {"stem_levels": 1})])
def test_the_memory_it_foretells_is_what_it_takes(patch: int, fields: dict, tmp_path: Path) -> None:
    unet = decoder(patch, channels=(64, 32, 16, 16), **fields).to(memory_format=torch.channels_last)
    pixels, maps = inputs(patch, 192 // patch, 192 // patch)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        unet(pixels, maps)
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    assert peak / 4 / 192**2 == pytest.approx(unet.pixel_values, rel=0.15)


def test_tap_layers() -> None:
    assert tap_layers(12) == (2, 5, 8, 11)
    assert tap_layers(24) == (4, 11, 17, 23)
    assert tap_layers(4) == (0, 1, 2, 3)
    assert tap_layers(32) == (7, 15, 23, 31)
    for depth in range(4, 60):
        taps = tap_layers(depth)
        assert taps[-1] == depth - 1
        assert sorted(set(taps)) == list(taps)
    with pytest.raises(BadRequest, match="3 layers"):
        tap_layers(3)


def test_the_pixel_norm_is_a_layer_norm_over_channels() -> None:
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    out = PixelNorm(5)(x)
    assert torch.allclose(out.mean(dim=1), torch.zeros(2, 3, 4), atol=1e-6)
    assert torch.allclose(out.var(dim=1, unbiased=False), torch.ones(2, 3, 4), atol=1e-3)


@pytest.mark.parametrize(("build", "says"), [
    (lambda: UNet2D(DIM, 14), "patches of 14"), (lambda: UNet2D(DIM, 1), "patches of 1"), (lambda: UNet2D(DIM, 4), "stem_levels=3"),
    (lambda: norm_layer("instance", 8), "instance"), (lambda: UNet2D(DIM, 8, norm="spectral"), "spectral")])
def test_refusals(build, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        build()
