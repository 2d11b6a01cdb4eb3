"""The segmenter: windows and blending, batches against single windows, the back-off, cells and their features."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, ItemError
from dinoray.memory.budget import decoded_tokens
from dinoray.vision.cell_tokens import mean_tokens, overlaps
from dinoray.vision.resampling2d import resample, resample_labels, scaled_shape
from dinoray.vision.segmenter import Segmenter
from dinoray.vision.targets import distance_map
from tests.vision.distance_models import FOUR, seeing_model, small_config, small_model


@pytest.fixture(autouse=True)
def single(one_thread: None) -> None:
    """Networks this small only wait for each other's threads; and one thread per forward is what runners use."""


def segmenter(model=None, *, token_budget: int = 1000, config: dict | None = None, **fields: object) -> Segmenter:
    return Segmenter(model or small_model(), small_config(**(config or {})), token_budget=token_budget, **fields)


def images(count: int, shape: tuple[int, int] = (48, 64), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random((3, *shape), np.float32) for _ in range(count)]


def discs(shape: tuple[int, int], radius: float, pitch: int) -> np.ndarray:
    """Label image of discs on a grid, none at the border."""
    labels, half, number = np.zeros(shape, np.int32), pitch // 2, 0
    y, x = np.mgrid[:2 * half, :2 * half] + 0.5 - half
    disc = y**2 + x**2 < radius**2
    for cy in range(half, shape[0] - half + 1, pitch):
        for cx in range(half, shape[1] - half + 1, pitch):
            number += 1
            labels[cy - half:cy + half, cx - half:cx + half][disc] = number
    return labels


# ---------------------------------------------------------------- windows


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 210), width=st.integers(1, 210), overlap=st.sampled_from([None, 0, 5, 16, 40]),
       patch=st.sampled_from([8, 16]))
def test_windows_of_any_image_give_it_back_and_so_do_their_tokens(height: int, width: int, overlap: int | None, patch: int) -> None:
    ours = of_patch(patch, overlap)
    image = np.random.default_rng(height * 1000 + width).random((3, height, width), np.float32)
    plan = ours.plan_image(image)
    assert plan.key == tuple(min(64, -(-side // patch) * patch) for side in (height, width))
    assert all(window.shape == (3, *plan.key) for window in plan.windows)
    assert all(start % patch == 0 for box in plan.blend.boxes for start in box)
    merged = plan.merge([window[1] for window in plan.windows])
    np.testing.assert_allclose(merged, image[1], atol=1e-6)
    # tokens that say where they lie come back in their places
    grid = (-(-height // patch), -(-width // patch))
    place = np.stack(np.mgrid[:grid[0], :grid[1]]).astype(np.float32)
    tokens = [np.moveaxis(place[:, y // patch:(y + plan.key[0]) // patch, x // patch:(x + plan.key[1]) // patch], 0, -1)
              for y, x in plan.blend.boxes]
    np.testing.assert_allclose(plan.merge_tokens(tokens), place, atol=1e-4)


@lru_cache
def of_patch(patch: int, overlap: int | None) -> Segmenter:
    shape = replace(FOUR, name=f"tiny{patch}x4", patch_size=patch)
    return Segmenter(small_model(shape), small_config(shape), token_budget=1000, overlap_px=overlap)


def test_the_map_of_an_image_is_what_a_perfect_network_gives() -> None:
    image = np.repeat(distance_map(discs((150, 170), 9, 24))[None], 3, axis=0)
    np.testing.assert_allclose(segmenter(seeing_model()).distance(image), image[0], atol=2e-6)


@pytest.mark.parametrize(("fields", "says"), [
    ({"peak": 0.1, "fill": 0.2}, "peak"), ({"markers": "centroids"}, "markers"), ({"overlap_px": 64}, "overlap"),
    ({"overlap_px": -16}, "overlap"), ({"config": {"crop_px": 60}}, "60 px")])
def test_refusals_before_the_first_image(fields: dict, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        segmenter(**fields)


def test_defaults_come_from_the_checkpoint() -> None:
    ours = segmenter(config={"peak": 0.6, "fill": 0.2})
    assert (ours.peak, ours.fill, ours.overlap_px) == (0.6, 0.2, 16)
    assert segmenter(config={"crop_px": 96}, peak=0.3, fill=0.0).fill == 0.0
    assert segmenter(config={"crop_px": 96}).overlap_px == 16, "a quarter is 24: rounded down to the patch"
    marked = {"markers": "hmaxima", "marker_height": 0.1}
    assert (segmenter(config=marked).markers, segmenter(config=marked).marker_height) == ("hmaxima", 0.1)
    assert segmenter(config=marked, markers="components").markers == "components"


def test_markers_of_the_checkpoint_part_cells_that_connected_parts_join() -> None:
    """Two cells whose saddle is above `peak` and 0.15 below their tops."""
    x = np.arange(80, dtype=np.float32)
    ridge = 0.85 - 0.15 * np.clip(1 - np.abs(x - 40) / 12, 0, 1)
    across = np.clip(1 - np.abs(np.arange(40, dtype=np.float32) - 20) / 15, 0, 1)
    distance = across[:, None] * ridge
    counts = [int(segmenter(config={"markers": kind, "marker_height": height}).cells(distance, distance.shape).max())
              for kind, height in (("components", 0.25), ("hmaxima", 0.1), ("hmaxima", 0.25))]
    assert counts == [1, 2, 1]
    assert segmenter(markers="hmaxima", marker_height=0.1).cells(distance, distance.shape).max() == 2


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_batch_gives_what_each_window_gives_by_hand(count: int, tokens: bool) -> None:
    windows, model = images(count), small_model()
    maps, grids = segmenter(model).predict(windows, tokens)
    assert maps.dtype == np.float32
    assert maps.shape == (count, 48, 64)
    assert maps.std() > 0.01
    for i, window in enumerate(windows):
        with torch.inference_mode():
            expected = torch.sigmoid(model(torch.from_numpy(window)[None]))[0, 0].numpy()
            np.testing.assert_allclose(maps[i], expected, atol=2e-5)
            if tokens:
                mean, std = (torch.tensor(v).view(3, 1, 1) for v in (FOUR.mean, FOUR.std))
                last = model.backbone(((torch.from_numpy(window) - mean) / std)[None]).patches[0].numpy()
                np.testing.assert_allclose(grids[i], last, atol=2e-5)
    assert (grids is not None) == tokens
    if tokens:
        assert grids.dtype == np.float32
        assert grids.shape == (count, 3, 4, 16)


def test_tokens_are_of_the_last_layer_also_where_the_decoder_does_not_tap_it() -> None:
    model = small_model()
    window = torch.from_numpy(images(1)[0])[None]
    with torch.inference_mode():
        last = model.with_tokens(window)[1]
        model.taps = (0, 1, 1, 2)
        logits, tokens = model.with_tokens(window)
        assert torch.equal(tokens, last)
        assert torch.equal(logits, model(window))


def test_bfloat16_is_close_and_its_maps_are_float32() -> None:
    windows = images(3)
    maps, grids = segmenter(small_model(dtype=torch.bfloat16)).predict(windows, True)
    exact, exact_grids = segmenter().predict(windows, True)
    assert maps.dtype == grids.dtype == np.float32
    assert len(np.unique(maps)) > 2000, "the sigmoid is not rounded to bfloat16's steps"
    assert np.abs(maps - exact).mean() < 0.02
    assert np.linalg.norm(grids - exact_grids) < 0.02 * np.linalg.norm(exact_grids)


def test_a_window_has_the_same_bytes_whatever_stands_beside_it() -> None:
    a, b, c, d, e = images(5)
    ours = segmenter(token_budget=17 * 4)
    first = ours.predict([a, b, c], True)
    other = ours.predict([a, d, e], True)
    fours = ours.predict([a, b, c, c], True)
    for mine, theirs, padded in zip(first, other, fours, strict=True):
        assert np.array_equal(mine[0], theirs[0])
        assert np.array_equal(mine, padded[:3]), "three are padded to four with the last"


def test_threads_share_it() -> None:
    batches = [images(3, seed=t) for t in range(6)]
    ours = segmenter()
    alone = [ours.predict(batch, True) for batch in batches]
    barrier = threading.Barrier(3)

    def work(batch: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        barrier.wait(timeout=20)
        return ours.predict(batch, True)

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(work, batches))
    for one, other in zip(alone, together, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def test_micro_batch_is_a_function_of_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = segmenter(token_budget=100)
    assert ours.micro_batch(64, 64) == 100 // 21
    assert ours.micro_batch(16, 16) == 100 // 6
    assert segmenter(token_budget=1).micro_batch(64, 64) == 1
    ours = segmenter(token_budget=10_000)
    ours.device = torch.device("cuda")
    values = ours.model.decoder.pixel_values
    assert ours.micro_batch(64, 64) == 10_000 // decoded_tokens(tokens=21, dim=16, taps=4, pixels=4096, pixel_values=values)
    assert ours.micro_batch(64, 64) < 10_000 // 21, "on a GPU the decoder needs most"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("largest", [1, 3])
def test_after_out_of_memory_the_values_are_the_same(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    windows = images(8)
    expected = segmenter().predict(windows, True)
    ours = segmenter()
    real, sizes = ours.model.forward, []

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(pixels))
        if len(pixels) > largest:
            raise torch.OutOfMemoryError("simulated")
        return real(pixels)

    monkeypatch.setattr(ours.model, "forward", forward)
    maps, _ = ours.predict(windows)
    np.testing.assert_allclose(maps, expected[0], atol=2e-5)
    assert sizes[:3] == [8, 4, 2]
    assert (ours.oom_events, ours.split_batches) == (3 if largest == 1 else 2, 1)
    sizes.clear()
    ours.predict(windows)
    assert max(sizes) <= largest, "the safe size is kept"


def test_one_window_too_large_is_an_item_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = segmenter()

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(ours.model, "forward", forward)
    with pytest.raises(ItemError, match="48, 64") as caught:
        ours.predict(images(2))
    assert caught.value.reason == "device_memory"


# ---------------------------------------------------------------- cells


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0, 1.37])
def test_cells_come_back_at_the_input_resolution(scale: float) -> None:
    """An image whose pixels are a perfect map, seen by the network at another resolution, gives its discs back."""
    truth = discs((160, 200), 14, 36)
    image = np.repeat(distance_map(truth)[None], 3, axis=0)
    ours = segmenter(seeing_model(), fill=0.05)
    labels = ours.cells(ours.distance(resample(image, scale)), truth.shape)
    assert labels.dtype == np.int32
    assert labels.shape == truth.shape
    assert labels.max() == truth.max() == 20
    for i in range(1, 21):
        mine = labels == labels[truth == i][np.argmax(distance_map(truth)[truth == i])]
        assert (mine & (truth == i)).sum() / (mine | (truth == i)).sum() > 0.8


def test_small_cells_are_dropped_at_the_input_resolution() -> None:
    truth = discs((64, 64), 5, 20)
    truth[40:, :] = 0
    truth[50:62, 20:40] = 9
    map_ = distance_map(truth)
    assert segmenter(min_area_px=100).cells(map_, truth.shape).max() == 1
    assert segmenter().cells(map_, truth.shape).max() == len(np.unique(truth)) - 1


def test_the_smallest_area_counts_pixels_of_the_image_and_not_of_the_models_scale() -> None:
    image = np.repeat(distance_map(discs((64, 64), 5, 20))[None], 3, axis=0)
    ours = segmenter(seeing_model(), min_area_px=1000)
    assert ours.segment(image).max() == 9
    assert ours.cells(ours.distance(image), (64, 64)).max() == 0


def test_a_map_that_is_not_finite_is_the_images_fault() -> None:
    map_ = np.full((8, 8), np.nan, np.float32)
    with pytest.raises(ItemError) as caught:
        segmenter().cells(map_, (8, 8))
    assert caught.value.reason == "nonfinite"


# ---------------------------------------------------------------- features of cells


@pytest.mark.parametrize(("scale", "shape"), [(1.0, (41, 70)), (0.5, (60, 80)), (2.0, (30, 37)), (0.3, (100, 90)), (1.37, (50, 61)),
                                              (8.0, (5, 9)), (1 / 8, (200, 130))])
def test_mean_tokens_against_supersampling(scale: float, shape: tuple[int, int]) -> None:
    """Each pixel cut into 20 x 20 points, every point given the token in which it lies."""
    patch, fine = 8, 20
    labels = resample_labels(np.arange(1, 13, dtype=np.int32).reshape(3, 4) * 7 - 6, shape)
    labels[shape[0] // 2, shape[1] // 2] = 500  # one pixel
    labels[:1, :2] = 0
    seen = scaled_shape(shape, scale)
    grid = tuple(-(-side // patch) for side in seen)
    tokens = np.random.default_rng(0).random((5, *grid), np.float32)
    rows, columns = (np.minimum(((np.arange(n * fine) + 0.5) / fine * (m / n) // patch).astype(int), g - 1)
                     for n, m, g in zip(shape, seen, grid, strict=True))
    points = np.repeat(np.repeat(labels, fine, 0), fine, 1)
    at = tokens.astype(np.float64)[:, rows[:, None], columns[None, :]]
    ids = np.unique(labels)[1:]
    expected = np.stack([at[:, points == i].mean(axis=1) for i in ids])
    found = mean_tokens(tokens, labels, patch, scale, ids)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.01 if scale not in (1.0, 0.5, 2.0) else 1e-5)
    np.testing.assert_array_equal(mean_tokens(tokens, labels, patch, scale, ids[::-1])[::-1], found)


def test_constant_tokens_and_a_cell_within_one_token() -> None:
    labels = discs((100, 90), 6, 20)
    ids = np.unique(labels)[1:]
    np.testing.assert_allclose(mean_tokens(np.full((3, 7, 6), 2.5, np.float32), labels, 16, 1.0, ids), 2.5, rtol=1e-6)
    tokens = np.arange(42, dtype=np.float32).reshape(1, 7, 6)
    labels = np.zeros((100, 90), np.int32)
    labels[33:36, 65:70] = 2**31 - 1
    assert mean_tokens(tokens, labels, 16, 1.0, np.array([2**31 - 1]))[0, 0] == 2 * 6 + 4


def test_bands_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, tokens = discs((90, 80), 7, 20), np.random.default_rng(1).random((4, 6, 5), np.float32)
    ids = np.unique(labels)[1:]
    whole = mean_tokens(tokens, labels, 16, 1.0, ids)
    monkeypatch.setattr("dinoray.vision.cell_tokens.PIXELS_AT_ONCE", 300)
    np.testing.assert_allclose(mean_tokens(tokens, labels, 16, 1.0, ids), whole, rtol=1e-6)


def test_seventy_thousand_cells() -> None:
    side = 265
    labels = np.kron(np.arange(1, side * side + 1, dtype=np.int32).reshape(side, side), np.ones((4, 4), np.int32))
    tokens = np.random.default_rng(2).random((8, 67, 67), np.float32)
    found = mean_tokens(tokens, labels, 16, 1.0, np.arange(1, side * side + 1))
    expected = np.repeat(np.repeat(tokens, 4, 1), 4, 2)[:, :side, :side].reshape(8, -1).T
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_shares_of_a_pixel_add_up_to_one() -> None:
    for pixels, resampled, patch in [(50, 50, 8), (33, 71, 4), (7, 56, 4), (100, 13, 16), (1, 1, 16)]:
        pairs = overlaps(pixels, resampled, -(-resampled // patch), patch)
        np.testing.assert_allclose(sum(share for _, share in pairs), 1, rtol=1e-5)
    assert len(overlaps(48, 48, 6, 8)) == 1, "no pixel lies on two tokens"


def test_features_of_ids_that_are_not_there_and_other_grids_are_refused() -> None:
    labels = discs((32, 32), 5, 16)
    with pytest.raises(BadRequest, match="1 of 2 ids"):
        mean_tokens(np.zeros((3, 2, 2), np.float32), labels, 16, 1.0, np.array([1, 99]))
    with pytest.raises(BadRequest, match="2 x 2 tokens"):
        mean_tokens(np.zeros((3, 2, 2), np.float32), labels, 8, 1.0, np.array([1]))
    assert mean_tokens(np.zeros((3, 2, 2), np.float32), labels, 16, 1.0, np.array([], int)).shape == (0, 3)
