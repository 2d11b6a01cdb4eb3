"""The 3D UNet: shapes, independence of batch and crop, receptive radius, blocks against the whole, what checkpointing saves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinoray.errors import BadRequest
from dinoray.vision.decoders.unet3d import NORMS, UNet3D


def small(levels: int = 2, **options) -> UNet3D:
    torch.manual_seed(0)
    model = UNet3D(2, 3, base=4, levels=levels, **options)
    torch.nn.init.normal_(model.head.weight, std=0.5)  # what the head hides, no test would see
    return model.eval()


@pytest.mark.parametrize("shape", [(8, 8, 8), (5, 9, 14), (1, 1, 1), (16, 4, 7)])
@pytest.mark.parametrize("options", [{}, {"upsampling": "learned"}, {"norm": "group"}, {"norm": "none"}])
def test_any_size_comes_back(shape, options) -> None:
    with torch.inference_mode():
        out = small(**options)(torch.randn(2, 2, *shape))
    assert out.shape == (2, 3, *shape) and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize(("base", "millions"), [(32, 23.6), (64, 94.3)])
def test_sizes_are_the_originals(base: int, millions: float) -> None:
    """23.6 M and 94.3 M parameters for b = 32 and 64 on 384 channels (the original has BatchNorm and biases)."""
    count = sum(p.numel() for p in UNet3D(384, 2, base=base).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("upsampling", ["trilinear", "learned"])
@pytest.mark.parametrize("levels", [1, 2])
def test_the_receptive_radius_is_exact(levels: int, upsampling: str) -> None:
    """Gradients reach as far as the radius says from some place of a pooling cell, and nowhere farther."""
    model = small(levels, upsampling=upsampling)
    for module in model.modules():  # nothing must be cut off by a ReLU or hidden by a maximum
        if isinstance(module, torch.nn.ReLU):
            module.forward = lambda x: x  # type: ignore[method-assign]
    radius, side = model.receptive_radius, 0
    side = -(-(2 * radius + 6) // model.multiple) * model.multiple
    reached = 0
    for trial in range(3):
        x = torch.randn(1, 2, 1 + 0 * side, 1, side, requires_grad=True, generator=torch.Generator().manual_seed(trial))
        out = model(x)
        for offset in range(model.multiple):
            at = side // 2 // model.multiple * model.multiple + offset
            grad, = torch.autograd.grad(out[0, :, 0, 0, at].sum(), x, retain_graph=True)
            places = torch.nonzero(grad.abs().sum((0, 1, 2, 3))).ravel()
            distance = int((places - at).abs().max())
            assert distance <= radius
            reached = max(reached, distance)
    assert reached >= radius - model.multiple, "max-pooling passes one of its voxels on; the bound is tight but for that"


@pytest.mark.parametrize("upsampling", ["trilinear", "learned"])
def test_blocks_with_a_halo_of_the_radius_equal_the_whole(upsampling: str) -> None:
    model = small(upsampling=upsampling)
    radius, multiple = model.receptive_radius, model.multiple
    halo = -(-radius // multiple) * multiple
    volume = torch.randn(1, 2, 20, 72, 90)
    with torch.inference_mode():
        whole = model(volume)
        blocks = torch.empty_like(whole)
        for y in range(0, 72, 40):
            for x in range(0, 90, 28):
                y0, y1, x0, x1 = max(0, y - halo), min(72, y + 40 + halo), max(0, x - halo), min(90, x + 28 + halo)
                part = model(volume[..., y0:y1, x0:x1])
                ye, xe = min(72, y + 40), min(90, x + 28)
                blocks[..., y:ye, x:xe] = part[..., y - y0:ye - y0, x - x0:xe - x0]
        assert float((blocks - whole).abs().max()) <= 1e-4
        short = model(volume[..., :40 + 4])[..., :40]
    assert float((short - whole[..., :40]).abs().max()) > 1e-3, "a halo of 4 voxels is not enough, so the test can fail"


@pytest.mark.parametrize("norm", list(NORMS))
def test_which_norms_keep_samples_and_crops_apart(norm: str) -> None:
    model = small(norm=norm).train(norm == "batch")
    x = torch.randn(2, 2, 8, 8, 8)
    with torch.no_grad():
        alone, together = model(x[:1]), model(x)[:1]
    assert torch.allclose(alone, together, atol=1e-5) == (norm != "batch")
    assert bool(NORMS[norm]) == (norm in ("batch", "group", "instance"))


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        model = small(checkpointing=checkpointing, dropout=0.3).train()
        torch.manual_seed(5)
        model(torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_unknown_choices_are_refused() -> None:
    for wrong in ({"norm": "x"}, {"upsampling": "x"}, {"levels": 0}, {"base": 0}):
        with pytest.raises(BadRequest):
            UNet3D(1, 1, **({"base": 4} | wrong))


def test_logits_are_float32_under_autocast() -> None:
    model, x = small(), torch.randn(1, 2, 8, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = model(x)
    assert out.dtype == torch.float32
    assert len(np.unique(out.numpy())) > 500, "no staircase"
