"""Crop geometry: sub-pixel centring, torch's own antialiasing filter, mirrored borders, centroids as skimage has them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import regionprops_table

from dinoray.vision import crops
from dinoray.vision.extractor import Crop, Extractor
from tests.runs import tiny_backbone

SIDES = st.floats(1.0, 300.0)
CENTRES = st.floats(-20.0, 420.0)


def resampled(plane: np.ndarray, y: float, x: float, side: float, out_px: int) -> np.ndarray:
    """A crop of a float32 plane [Y, X] by the product of its two filters, in float64: [out_px, out_px]."""
    where = crops.place(y, x, side, out_px)
    block = crops.cut(plane, where).astype(np.float64)
    rows = crops.filter_weights(where.offset_y, side, where.size, out_px).astype(np.float64)
    columns = crops.filter_weights(where.offset_x, side, where.size, out_px).astype(np.float64)
    return rows @ block @ columns.T


def ramp(shape: tuple[int, int], axis: int) -> np.ndarray:
    """A plane whose values are the coordinates of its pixels along an axis."""
    return np.broadcast_to(np.arange(shape[axis], dtype=np.float32).reshape((-1, 1) if axis == 0 else (1, -1)), shape)


@settings(deadline=None, max_examples=60)
@given(y=st.floats(160, 240), x=st.floats(160, 240), side=st.floats(4, 300), out_px=st.sampled_from([32, 224]))
def test_a_crop_lies_where_it_should_to_a_hundredth_of_a_pixel(y: float, x: float, side: float, out_px: int) -> None:
    for axis, centre in ((0, y), (1, x)):
        found = resampled(ramp((400, 400), axis), y, x, side, out_px).mean(axis=1 - axis)
        wanted = centre - side / 2 + (np.arange(out_px) + 0.5) * side / out_px
        assert abs((found - wanted).mean()) <= 0.01  # the crop as a whole
        # every sample: exact where nothing shrinks; the triangle of a broken scale wobbles (torch's and Pillow's do too)
        assert np.abs(found - wanted).max() <= (0.01 if side <= out_px else 0.1)


@pytest.mark.parametrize(("side", "out_px"), [(64, 32), (48, 32), (40, 32), (32, 32), (16, 32), (24, 32)])
def test_the_filter_is_that_of_torch(side: int, out_px: int) -> None:
    rng = np.random.default_rng(side)
    image = rng.random((160, 160)).astype(np.float32)
    y0, x0 = 56, 49
    found = resampled(image, y0 - 0.5 + side / 2, x0 - 0.5 + side / 2, side, out_px)
    # torch cuts its filter off at the border, so it gets a margin of 8 samples that is compared with nothing
    margin = 8 * side // out_px
    part = image[y0 - margin:y0 + side + margin, x0 - margin:x0 + side + margin]
    wide = F.interpolate(torch.from_numpy(part)[None, None], size=(out_px + 16,) * 2, mode="bilinear", antialias=True)
    np.testing.assert_allclose(found, wide[0, 0, 8:-8, 8:-8].numpy(), atol=2e-6)


@settings(deadline=None, max_examples=200)
@given(y=CENTRES, x=CENTRES, side=SIDES, out_px=st.integers(1, 300))
def test_blocks_hold_all_that_the_filter_reaches(y: float, x: float, side: float, out_px: int) -> None:
    where = crops.place(y, x, side, out_px)
    assert where.size == crops.block_size(side, out_px)
    reach = max(side / out_px, 1.0)
    for first, offset, centre in ((where.first_y, where.offset_y, y), (where.first_x, where.offset_x, x)):
        assert first + offset == pytest.approx(centre + 0.5 - side / 2, abs=1e-9)
        samples = offset + (np.array([0.5, out_px - 0.5])) * side / out_px
        centres = np.arange(-2, where.size + 2) + 0.5
        within = (centres > samples[0] - reach + 1e-9) & (centres < samples[1] + reach - 1e-9)
        assert not within[[0, 1, -2, -1]].any(), "pixels outside of the block are in reach"
        weights = crops.filter_weights(offset, side, where.size, out_px)
        assert weights.dtype == np.float32 and weights.shape == (out_px, where.size)
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-5)
    y0, x0, y1, x1 = where.box
    assert y0 <= y + 0.5 - side / 2 + 1e-6 and y1 >= y + 0.5 + side / 2 - 1e-6
    assert max(y1 - y0, x1 - x0) <= math.ceil(side) + 1


@settings(deadline=None, max_examples=100)
@given(first=st.integers(-200, 200), size=st.integers(1, 120), length=st.integers(1, 40))
def test_borders_are_mirrored_as_numpy_does_it(first: int, size: int, length: int) -> None:
    wide = np.pad(np.arange(length), (400, 400), mode="symmetric")
    np.testing.assert_array_equal(crops.mirrored(first, size, length), wide[400 + first:400 + first + size])


def test_a_crop_larger_than_the_image_repeats_its_mirror_image() -> None:
    plane = np.arange(12, dtype=np.uint16).reshape(3, 4)
    where = crops.place(1.0, 1.5, 20.0, 20)
    block = crops.cut(plane, where)
    assert block.dtype == np.uint16 and block.shape == (where.size, where.size)
    wide = np.pad(plane, 40, mode="symmetric")
    y, x = where.first_y + 40, where.first_x + 40
    np.testing.assert_array_equal(block, wide[y:y + where.size, x:x + where.size])
    flat = resampled(np.full((3, 4), 7.0, np.float32), 1.0, 1.5, 20.0, 32)
    np.testing.assert_allclose(flat, 7.0, atol=1e-5)


def test_planes_are_cut_together() -> None:
    planes = np.random.default_rng(0).random((2, 30, 40)).astype(np.float32)
    for y, x in ((15.2, 20.7), (1.0, 39.0)):
        where = crops.place(y, x, 9.3, 16)
        assert crops.cut(planes, where).flags.c_contiguous
        for i in range(2):
            np.testing.assert_array_equal(crops.cut(planes, where)[i], crops.cut(planes[i], where))


@settings(deadline=None, max_examples=60)
@given(shape=st.tuples(st.integers(1, 30), st.integers(1, 30)), seed=st.integers(0, 99), top=st.integers(1, 60),
       dtype=st.sampled_from(["uint8", "uint16", "int32", "uint64"]), offset=st.sampled_from([0, 100_000]))
def test_centroids_and_areas_are_those_of_skimage(shape: tuple, seed: int, top: int, dtype: str, offset: int) -> None:
    labels = np.random.default_rng(seed).integers(0, top + 1, shape).astype(dtype)
    if offset and np.dtype(dtype).itemsize >= 4:  # sparse ids
        labels[labels > 0] += np.array(offset, dtype)
    ids, y, x, area = crops.objects_of(labels)
    expected = regionprops_table(labels.astype(np.int64), properties=("label", "centroid", "area"))
    np.testing.assert_array_equal(ids, expected["label"])
    np.testing.assert_allclose(y, expected["centroid-0"])
    np.testing.assert_allclose(x, expected["centroid-1"])
    np.testing.assert_array_equal(area, expected["area"])
    assert ids.dtype == area.dtype == np.int64


def test_no_objects() -> None:
    assert [len(part) for part in crops.objects_of(np.zeros((5, 7), np.uint16))] == [0, 0, 0, 0]


# ---------------------------------------------------------------- on the device


class Seen(torch.nn.Module):
    """A backbone that keeps the pixels it is given."""

    def __init__(self, real: torch.nn.Module):
        super().__init__()
        self.real, self.config, self.pixels, self.tokens = real, real.config, [], []

    def forward(self, x: torch.Tensor, layers=None):
        self.pixels.append(x.clone())
        self.tokens.append(self.real(x, layers=layers))
        return self.tokens[-1]


def crop(y: float, x: float, *, channels: int = 1, mode: str = "repeat", hidden: bool = False, side: float = 20.5) -> Crop:
    image = np.random.default_rng(5).integers(0, 4000, (channels, 50, 60)).astype(np.uint16)
    where = crops.place(y, x, side, 32)
    pixels = crops.cut(image, where)
    mask = (pixels[0] % 3 == 0) if hidden else None
    return Crop(pixels, np.full(channels, 200, np.float32), np.full(channels, 3500, np.float32), mode, where, mask)


@pytest.mark.parametrize(("channels", "mode"), [(1, "repeat"), (3, "three"), (2, "mean")])
@pytest.mark.parametrize("hidden", [False, True])
def test_scaled_masked_and_resampled_on_the_device(channels: int, mode: str, hidden: bool) -> None:
    seen = Seen(tiny_backbone())
    extractor = Extractor(seen, features=("cls",), layers=None, token_budget=64, resize_px=32)
    batch = [crop(20.0, 30.0, channels=channels, mode=mode, hidden=hidden),
             crop(3.3, 55.1, channels=channels, mode=mode, hidden=hidden),
             crop(25.75, 0.2, channels=channels, mode=mode, hidden=hidden)]
    vectors = extractor.extract(batch)["cls"]
    mean, std = (np.array(v)[:, None, None] for v in (seen.config.mean, seen.config.std))
    for i, c in enumerate(batch):
        scaled = np.clip((c.pixels.astype(np.float64) - 200) / 3300, 0, 1)
        if hidden:
            scaled[:, c.hidden] = 0
        if mode == "mean":
            scaled = scaled.mean(axis=0, keepdims=True)
        rows, columns = (crops.filter_weights(o, c.place.side, c.place.size, 32).astype(np.float64)
                         for o in (c.place.offset_y, c.place.offset_x))
        expected = (rows @ scaled @ columns.T - mean) / std
        np.testing.assert_allclose(seen.pixels[0][i].numpy(), expected, atol=2e-6)
        alone = extractor.extract([c])["cls"][0]
        np.testing.assert_allclose(vectors[i], alone, rtol=1e-4, atol=1e-5)
    assert not np.shares_memory(vectors, seen.tokens[0].cls.numpy()), "a row's vector must not keep all tokens alive"
    assert seen.pixels[0].shape == (4, 3, 32, 32), "short groups are padded to a power of two"
