"""The extractor: padding, modes and resizing against plain torch, and the back-off after an out-of-memory error."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinoray.errors import ItemError
from dinoray.vision.extractor import Crop, Extractor, column_names
from tests.conftest import texture
from tests.runs import TINY, tiny_backbone


def crop(seed: int, *, channels: int = 1, shape: tuple[int, int] = (32, 48), dtype: str = "uint16",
         mode: str = "repeat", low: float = 100.0, high: float = 60_000.0) -> Crop:
    pixels = texture((channels, *shape), seed, dtype)
    return Crop(pixels, np.full(channels, low, np.float32) + np.arange(channels, dtype=np.float32),
                np.full(channels, high, np.float32), mode)


def extractor(backbone: nn.Module | None = None, *, features=("cls", "patch_mean", "patches"), layers=None,
              token_budget: int = 88, resize_px: int | None = None) -> Extractor:
    return Extractor(backbone or tiny_backbone(), features=features, layers=layers, token_budget=token_budget,
                     resize_px=resize_px)


def reference(c: Crop, layers=None, resize_px: int | None = None) -> dict[str, np.ndarray]:
    """The same by hand: one crop, float64 scaling, no padding."""
    x = torch.from_numpy(c.pixels.astype(np.float64))[None]
    low, high = (torch.from_numpy(v.astype(np.float64))[None, :, None, None] for v in (c.low, c.high))
    x = ((x - low) / (high - low)).clamp(0, 1)
    if c.mode == "mean":
        x = x.mean(dim=1, keepdim=True)
    if c.mode != "three":
        x = x.repeat(1, 3, 1, 1)
    if resize_px:
        x = F.interpolate(x.float(), size=(resize_px, resize_px), mode="bilinear", antialias=True).double()
    mean, std = (torch.tensor(v, dtype=torch.float64)[None, :, None, None] for v in (TINY.mean, TINY.std))
    x = ((x - mean) / std).float()
    with torch.inference_mode():
        out = tiny_backbone()(x, layers=layers)
    found = {}
    for layer, tokens in ({None: out} if layers is None else out.layers).items():
        suffix = "" if layer is None else f"_l{layer:02d}"
        found[f"cls{suffix}"] = tokens.cls[0].numpy()
        found[f"patch_mean{suffix}"] = tokens.patches[0].mean(dim=(0, 1)).numpy()
        found[f"patches{suffix}"] = tokens.patches[0].numpy()
    return found


def check(found: dict[str, np.ndarray], crops: list[Crop], **kwargs: object) -> None:
    for i, c in enumerate(crops):
        expected = reference(c, **kwargs)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name].dtype == np.float32
            assert len(found[name]) == len(crops)
            assert np.allclose(found[name][i], value, atol=2e-5), name


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_a_batch_of_any_size_gives_the_values_of_each_crop_alone(count: int) -> None:
    crops = [crop(i) for i in range(count)]
    check(extractor(token_budget=11 * 8).extract(crops), crops)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(("mode", "channels"), [("repeat", 1), ("mean", 4), ("three", 3)])
def test_modes_and_dtypes(dtype: str, mode: str, channels: int) -> None:
    low, high = {"uint8": (3, 250), "uint16": (300, 60_000), "float32": (0.05, 0.9)}[dtype]
    crops = [crop(i, channels=channels, dtype=dtype, mode=mode, low=low, high=high) for i in range(3)]
    if dtype == "float32":
        crops = [Crop(c.pixels, np.full(channels, low, np.float32), c.high, mode) for c in crops]
    check(extractor().extract(crops), crops)


def test_channels_of_three_are_not_mixed_up() -> None:
    first = crop(1, channels=3, mode="three")
    swapped = Crop(first.pixels[::-1].copy(), first.low[::-1].copy(), first.high, "three")
    out = extractor().extract([first, swapped])["cls"]
    assert not np.allclose(out[0], out[1], atol=1e-3)


def test_layers() -> None:
    crops = [crop(i) for i in range(2)]
    found = extractor(layers=(2, 0)).extract(crops)
    check(found, crops, layers=(2, 0))
    last = extractor().extract(crops)["cls"]
    assert np.allclose(found["cls_l02"], last, atol=1e-6)
    assert not np.allclose(found["cls_l00"], last, atol=1e-3)


@pytest.mark.parametrize("shape", [(20, 31), (48, 48), (100, 37), (8, 8)])
def test_resize_is_bilinear_with_antialias_after_scaling(shape: tuple[int, int]) -> None:
    crops = [crop(i, shape=shape, channels=3, mode="three") for i in range(2)]
    found = extractor(resize_px=48).extract(crops)
    assert found["patches"].shape == (2, 3, 3, TINY.dim)
    check(found, crops, resize_px=48)


def test_resize_reproduces_the_reference_processor() -> None:
    from PIL import Image

    rgb = texture((3, 90, 122), 4)
    size = 48
    planes = [np.asarray(Image.fromarray(p.astype(np.float32)).resize((size, size), Image.BILINEAR)) for p in rgb]
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.inner = TINY, tiny_backbone()

        def forward(self, x: torch.Tensor, layers=None):
            seen.append(x)
            return self.inner(x, layers=layers)

    full = np.full(3, 255, np.float32)
    extractor(Spy(), resize_px=size).extract([Crop(rgb, np.zeros(3, np.float32), full, "three")])
    expected = (np.stack(planes) / 255 - np.array(TINY.mean)[:, None, None]) / np.array(TINY.std)[:, None, None]
    assert np.abs(seen[0][0].numpy() - expected).max() < 1e-4


def test_names_of_columns() -> None:
    assert column_names(("cls", "patches"), None) == [("cls", "cls", None), ("patches", "patches", None)]
    assert column_names(("cls", "patch_mean"), (5, 11)) == [
        ("cls_l05", "cls", 5), ("patch_mean_l05", "patch_mean", 5), ("cls_l11", "cls", 11),
        ("patch_mean_l11", "patch_mean", 11)]


def test_crops_share_a_batch_only_when_they_can() -> None:
    base = crop(1)
    assert base.key == crop(2).key
    for other in (crop(1, dtype="uint8"), crop(1, shape=(48, 32)), crop(1, mode="mean"), crop(1, channels=2)):
        assert other.key != base.key


# ---------------------------------------------------------------- out of memory


class Small(nn.Module):
    """A device that holds `largest` images at a time."""

    def __init__(self, largest: int):
        super().__init__()
        self.config, self.inner, self.largest = TINY, tiny_backbone(), largest
        self.sizes: list[int] = []
        self.failed_inputs: list[int] = []

    def forward(self, x: torch.Tensor, layers=None):
        self.sizes.append(len(x))
        if len(x) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return self.inner(x, layers=layers)


@pytest.mark.timeout(60)  # a back-off that does not shrink would go on for ever
@pytest.mark.parametrize("largest", [1, 2, 3, 4, 7])
def test_after_out_of_memory_the_values_are_the_same(largest: int) -> None:
    crops = [crop(i) for i in range(8)]
    small = Small(largest)
    ex = extractor(small, token_budget=11 * 8)
    assert ex.micro_batch(32, 48) == 8
    check(ex.extract(crops), crops)
    fits = [size for size in (8, 4, 2, 1) if size <= largest][0]
    assert ex.oom_events == [8, 4, 2, 1].index(fits) > 0
    assert ex.split_batches == 1
    small.sizes.clear()
    check(ex.extract(crops), crops)
    assert max(small.sizes) == fits, "the safe size is kept"
    assert ex.oom_events == [8, 4, 2, 1].index(fits)
    assert ex.split_batches == 2, "the second batch was not computed as planned either"


def test_a_shape_that_fits_keeps_its_batch() -> None:
    small = Small(4)
    ex = extractor(small, token_budget=11 * 8)
    ex.extract([crop(i) for i in range(8)])
    other = [crop(i, shape=(32, 64)) for i in range(4)]
    small.sizes.clear()
    check(ex.extract(other), other)
    assert small.sizes == [4]
    assert (ex.oom_events, ex.split_batches) == (1, 1)


def test_one_crop_too_large_is_an_item_error() -> None:
    small = Small(0)
    ex = extractor(small, token_budget=11 * 4)
    with pytest.raises(ItemError) as caught:
        ex.extract([crop(i) for i in range(4)])
    assert caught.value.reason == "device_memory"
    assert "(32, 48)" in caught.value.what
    assert "tiles" in caught.value.todo
    assert small.sizes == [4, 2, 1]
    assert ex.oom_events == 3


def test_other_errors_are_not_swallowed() -> None:
    class Broken(Small):
        def forward(self, x: torch.Tensor, layers=None):
            raise RuntimeError("device lost")

    ex = extractor(Broken(1))
    with pytest.raises(RuntimeError, match="device lost"):
        ex.extract([crop(0)])
    assert ex.oom_events == 0


def test_a_thread_that_fails_late_does_not_raise_the_safe_size() -> None:
    ex = extractor(Small(1))
    ex._back_off(("k",), 4, crop(0))
    ex._back_off(("k",), 8, crop(0))
    assert ex._safe["k",] == 2


def test_many_threads_give_what_one_gives() -> None:
    crops = [[crop(10 * t + i) for i in range(3)] for t in range(6)]
    ex = extractor()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [ex.extract(c) for c in crops]
        barrier = threading.Barrier(3)

        def work(c: list[Crop]) -> dict[str, np.ndarray]:
            barrier.wait(timeout=20)
            return ex.extract(c)

        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(work, crops))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert all(np.array_equal(one[k], other[k]) for k in one)
