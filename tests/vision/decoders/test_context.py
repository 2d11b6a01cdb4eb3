"""Context: the gate lands on the crop's grid, attention finds what lies outside by where it lies, each part can be switched off."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinoray.errors import BadRequest
from dinoray.vision.crop_features import context_target, token_grid
from dinoray.vision.decoders.context import ContextAttention, PlaneTokens, offsets_to
from dinoray.vision.decoders.context_fusion import CELLS, CROP, FUSIONS, ContextFusionUNet, FusionInput, skip_grid
from dinoray.vision.fusion_input import FusionShape, cell_voxels, context_matrices, context_places, crop_matrices, plane_tokens
from dinoray.vision.voxel_grids import VoxelGrid

N, PATCH, DIM = 16, 8, 6
CROP_GRID = VoxelGrid((N,) * 3, (-(N - 1) / 2 * 8.0,) * 3, (8.0,) * 3)


def context_raw(shift: float = 0.0) -> VoxelGrid:
    """Four times as wide as the crop, in pixels of 32 nm, its middle `shift` nm beside the crop's."""
    return VoxelGrid((N,) * 3, (-(N - 1) / 2 * 32.0 + shift,) * 3, (32.0,) * 3)


def token_planes(raw: VoxelGrid, target: VoxelGrid) -> dict[str, VoxelGrid]:
    return {plane: token_grid(raw, target, plane, PATCH) for plane in ("xy", "xz", "yz")}


def given(batch: int = 2, *, fusion: str = "full", seed: int = 0, shift: float = 0.0,
          raw: bool = True, own: bool = True) -> FusionInput:
    generator = torch.Generator().manual_seed(seed)
    found, shape = FusionInput(), FusionShape(fusion, 2, 4, own)
    if raw:
        found.raw = torch.randn(batch, 1, N, N, N, generator=generator)
    if own:
        grids = token_planes(CROP_GRID, CROP_GRID)
        found.tokens = plane_tokens({p: torch.randn(batch, DIM, *g.shape, generator=generator) for p, g in grids.items()},
                                    [{p: crop_matrices(g, CROP_GRID) for p, g in grids.items()}] * batch)
    if fusion != "none":
        outside = context_raw(shift)
        target = context_target(CROP_GRID, outside)
        grids = token_planes(outside, target)
        found.context = plane_tokens({p: torch.randn(batch, DIM, *g.shape, generator=generator) for p, g in grids.items()},
                                     [{p: context_matrices(g, CROP_GRID, target, shape) for p, g in grids.items()}] * batch)
        context_places([CROP_GRID] * batch, [target] * batch, [(np.ones(N, bool),) * 3] * batch, 4, found)
    return found


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(("raw", "own"), [(True, True), (True, False), (False, True)])
def test_every_part_can_be_switched_off(fusion: str, raw: bool, own: bool) -> None:
    model = ContextFusionUNet(3, raw_channels=int(raw), token_dim=DIM, own_tokens=own, fusion=fusion, base=4, levels=2)
    out = model(given(fusion=fusion, raw=raw, own=own))
    assert out.shape == (2, 3, N, N, N)
    out.square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused, "every weight has a part in the result"


@pytest.mark.parametrize("fusion", ["gate", "full", "attention", "index_gate"])
def test_the_context_matters(fusion: str) -> None:
    torch.manual_seed(0)
    model = ContextFusionUNet(2, raw_channels=1, token_dim=DIM, own_tokens=False, fusion=fusion, base=4, levels=2).eval()
    torch.nn.init.normal_(model.unet.head.weight)
    a, b = given(fusion=fusion, own=False), given(fusion=fusion, own=False, seed=1)
    b.raw = a.raw
    with torch.no_grad():
        assert float((model(a) - model(b)).abs().max()) > 1e-4


@pytest.mark.parametrize("shift", [0.0, 13.0, -16.0])
def test_the_context_lands_on_the_crop(shift: float) -> None:
    """Coordinates as tokens: what reaches each level of the skips is where its voxels are, to half a context voxel (16 nm)."""
    outside = context_raw(shift)
    target = context_target(CROP_GRID, outside)
    for axis in range(3):
        tokens, each = {}, {}
        for plane, grid in token_planes(outside, target).items():
            values = np.meshgrid(*(grid.centres(a) for a in range(3)), indexing="ij")[axis]
            tokens[plane] = torch.from_numpy(values)[None, None]
            each[plane] = context_matrices(grid, CROP_GRID, target, FusionShape("full", 2, 4, True))
        planes = plane_tokens(tokens, [each])
        for level in range(2):
            want = CROP_GRID.pooled((2**level,) * 3)
            found = planes.on(skip_grid(level), tokens)[0, 0].numpy()
            wanted = np.meshgrid(*(want.centres(a) for a in range(3)), indexing="ij")[axis]
            assert np.abs(found - wanted).max() <= 16
            assert np.abs(found - wanted).max() < 0.01, "in fact exactly: the crop lies inside the centres of the tokens"
        cells = planes.on(CELLS, tokens)[0, 0].numpy()
        where = target.pooled(cell_voxels(target, 4))
        inner = (slice(1, -1),) * 3  # beyond the outermost tokens' centres the outermost value repeats
        assert np.abs(cells - np.meshgrid(*(where.centres(a) for a in range(3)), indexing="ij")[axis])[inner].max() <= 16
        misaligned = plane_tokens(tokens, [{p: context_matrices(g, CROP_GRID, target, FusionShape("index_gate", 2, 4, True))
                                            for p, g in token_planes(outside, target).items()}])
        wrong = misaligned.on(skip_grid(0), tokens)[0, 0].numpy()
        assert np.abs(wrong - np.meshgrid(*(CROP_GRID.centres(a) for a in range(3)), indexing="ij")[axis]).max() > 100


def test_attention_learns_where_to_look() -> None:
    """Each bottom voxel must tell the value of the cell at a fixed offset from it, many voxels outside of the crop."""
    torch.manual_seed(0)
    model = ContextAttention(8, 4, heads=2)
    head = torch.nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    at = torch.arange(6, dtype=torch.float64) * 40 - 100
    queries, cells = tuple(at[None, 2:4] for _ in range(3)), tuple(at[None] for _ in range(3))
    offsets = offsets_to(queries, cells, torch.full((3,), 120.0, dtype=torch.float64)).expand(16, -1, -1, -1)
    valid = torch.ones(16, 216, dtype=torch.bool)
    for _ in range(300):
        context = torch.randn(16, 4, 6, 6, 6)
        context[:, 0] = 3 * torch.sign(context[:, 0])  # plain to see: a norm over the channels comes first
        truth = torch.sign(context[:, 0, 4:6, 2:4, 0:2])  # two cells up along z, two back along x
        found = model(torch.zeros(16, 8, 2, 2, 2), context, valid, offsets)
        loss = torch.nn.functional.soft_margin_loss(head(found.movedim(1, -1))[..., 0], truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((torch.sign(head(found.movedim(1, -1))[..., 0]) == truth).float().mean()) > 0.95


def test_cells_outside_of_the_volume_are_not_looked_at() -> None:
    torch.manual_seed(0)
    model = ContextAttention(8, 4)
    x, context = torch.randn(1, 8, 2, 2, 2), torch.randn(1, 4, 3, 3, 3)
    valid = torch.zeros(1, 27, dtype=torch.bool)
    valid[0, :9] = True
    offsets = torch.randn(1, 8, 27, 3)
    other = context.clone()
    other[:, :, 1:] = 99
    with torch.no_grad():
        torch.testing.assert_close(model(x, context, valid, offsets), model(x, other, valid, offsets))
        nowhere = model(x, context, torch.zeros_like(valid), offsets)
    assert nowhere.isfinite().all()


def test_cells_that_hold_none_of_the_volume_are_marked() -> None:
    target = context_target(CROP_GRID, context_raw())
    found = FusionInput()
    inside = (np.arange(N) >= 9, np.ones(N, bool), np.ones(N, bool))
    context_places([CROP_GRID], [target], [inside], 4, found)
    assert found.context_valid.reshape(4, 4, 4)[:, 0, 0].tolist() == [False, False, True, True]
    assert found.context_valid.reshape(4, 4, 4)[3].all()


def test_nothing_to_look_at_is_refused() -> None:
    for wrong in ({"raw_channels": 0, "own_tokens": False}, {"token_dim": None}, {"fusion": "x"}):
        with pytest.raises(BadRequest):
            ContextFusionUNet(2, **({"raw_channels": 1, "token_dim": DIM} | wrong))
    model = ContextFusionUNet(2, raw_channels=1, token_dim=DIM, base=4, levels=2)
    with pytest.raises(ValueError, match="`context`"):
        model(FusionInput(raw=torch.zeros(1, 1, N, N, N), tokens=given().tokens))
    assert isinstance(given().tokens, PlaneTokens) and CROP in given().tokens.matrices
