"""Intensities: the channel policies of the contract, 16 bits that stay distinct, CLAHE whose blocks equal the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, ItemError
from dinoray.vision.intensity import (
    ChannelRow,
    channel_names,
    channel_rows,
    clahe,
    clahe_tile,
    default_names,
    full_range,
    limits,
    scale,
    scaling_key,
)
from tests.conftest import texture

# ---------------------------------------------------------------- channel policies

FIVE = ("DNA", "ER", "RNA", "AGP", "Mito")


@pytest.mark.parametrize(("policy", "names", "rgb8", "expected"), [
    ("auto", ("gray",), False, [ChannelRow("gray", (0,), "repeat")]),
    ("auto", ("R", "G", "B"), True, [ChannelRow("rgb", (0, 1, 2), "three", full_range=True)]),
    ("auto", ("a", "b", "c"), False, [ChannelRow(n, (i,), "repeat") for i, n in enumerate("abc")]),
    ("auto", FIVE, False, [ChannelRow(n, (i,), "repeat") for i, n in enumerate(FIVE)]),
    ("each", ("R", "G", "B"), True, [ChannelRow(n, (i,), "repeat", full_range=True) for i, n in enumerate("RGB")]),
    ("mean", FIVE, False, [ChannelRow("mean", (0, 1, 2, 3, 4), "mean")]),
    ("mean", ("gray",), False, [ChannelRow("mean", (0,), "repeat")]),
    ("mean", ("R", "G", "B"), True, [ChannelRow("mean", (0, 1, 2), "mean", full_range=True)]),
    ("rgb", ("a", "b", "c"), False, [ChannelRow("rgb", (0, 1, 2), "three")]),
    ("x=Mito,DNA,DNA;y=ER,RNA,AGP", FIVE, False, [ChannelRow("x", (4, 0, 0), "three"),
                                                  ChannelRow("y", (1, 2, 3), "three")]),
    ("x=G,G,B", ("R", "G", "B"), True, [ChannelRow("x", (1, 1, 2), "three", full_range=True)]),
])
def test_channel_policies(policy: str, names: tuple, rgb8: bool, expected: list) -> None:
    assert channel_rows(policy, names, rgb8) == expected


@pytest.mark.parametrize(("policy", "names", "needles"), [
    ("rgb", ("gray",), ["1 channels", "gray", "rgb"]),
    ("rgb", FIVE, ["5 channels", "Mito"]),
    ("x=DNA,ER,GFP", FIVE, ["GFP", "DNA, ER, RNA, AGP, Mito"]),
    ("x=R,G,B", ("gray",), ["R, G, B", "gray"]),
])
def test_a_wrong_channel_count_says_what_there_is(policy: str, names: tuple, needles: list[str]) -> None:
    with pytest.raises(ItemError) as caught:
        channel_rows(policy, names, False)
    assert caught.value.reason == "channel_count"
    for needle in needles:
        assert needle in caught.value.what


def test_default_names() -> None:
    assert default_names(1, False) == ("gray",)
    assert default_names(3, True) == ("R", "G", "B")
    assert default_names(3, False) == ("0", "1", "2")


def test_names_of_channels_are_each_there_once() -> None:
    assert channel_names(None, 2, False) == ("0", "1")
    assert channel_names(None, 3, True) == ("R", "G", "B")
    assert channel_names(("a", "b"), 2, False) == ("a", "b")
    assert channel_names(("a", "b", "a", "a"), 4, False) == ("a", "b", "a_2", "a_3")
    assert len(set(channel_names(("a", "a", "a_2", "a_2"), 4, False))) == 4


# ---------------------------------------------------------------- scaling


@pytest.mark.parametrize(("dtype", "expected"), [
    ("uint8", (0, 255)), ("uint16", (0, 65535)), ("int8", (0, 127)), ("int16", (0, 32767)),
    ("uint32", (0, 2**32 - 1)), ("float16", (0, 1)), ("float32", (0, 1)), ("float64", (0, 1)),
])
def test_full_range(dtype: str, expected: tuple) -> None:
    assert full_range(np.dtype(dtype)) == expected


GRAY = ChannelRow("gray", (0,), "repeat")


def test_sixteen_bits_stay_sixteen_bits() -> None:
    """Values above 255 that an 8-bit detour would merge or wrap keep their order and distinctness."""
    plane = np.arange(30_000, 34_096, dtype=np.uint16).reshape(64, 64)
    low, high = limits(plane[None], ("gray",), GRAY, rule="image", group="", table=None, percents=(0, 100))
    scaled = scale(plane, low[0], high[0])
    assert len(np.unique(scaled)) == 4096
    assert (np.diff(scaled.ravel()) > 0).all()
    assert (scaled.min(), scaled.max()) == (0, 1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
def test_limits_of_an_image_are_its_percentiles(dtype: str) -> None:
    pixels = texture((2, 70, 71), 5, dtype if dtype != "int32" else "uint16").astype(dtype)
    row = ChannelRow("x", (1, 0, 1), "three")
    low, high = limits(pixels, ("a", "b"), row, rule="image", group="", table=None, percents=(0.1, 99.9))
    for k, i in enumerate((1, 0, 1)):
        expected = np.percentile(pixels[i].astype(np.float64), (0.1, 99.9))
        assert (low[k], high[k]) == pytest.approx(tuple(expected), rel=1e-6)
        scaled = scale(pixels[i], low[k], high[k])
        assert scaled.dtype == np.float32
        assert scaled.min() == 0
        assert scaled.max() == 1


def test_limits_of_a_plate_come_from_the_table_by_group_and_channel() -> None:
    pixels = np.zeros((2, 4, 4), np.uint16)
    table = {"p": {"a": (10.0, 20.0), "b": (5.0, 6.0)}, "q": {"a": (0.0, 1.0)}}
    low, high = limits(pixels, ("a", "b"), ChannelRow("x", (1, 0), "three"), rule="plate", group="p", table=table,
                       percents=(0, 100))
    assert (low.tolist(), high.tolist()) == ([5, 10], [6, 20])
    for group, row in (("q", ChannelRow("b", (1,), "repeat")), ("none", GRAY)):
        with pytest.raises(ItemError) as caught:
            limits(pixels, ("a", "b"), row, rule="plate", group=group, table=table, percents=(0, 100))
        assert caught.value.reason == "no_scaling"
        assert repr(group) in caught.value.what
        assert "scaling_sample" in caught.value.todo


def test_8_bit_rgb_is_divided_by_255_whatever_the_rule() -> None:
    pixels = texture((3, 8, 8), 1)
    row = channel_rows("rgb", ("R", "G", "B"), True)[0]
    for rule in ("plate", "image", "dtype"):
        low, high = limits(pixels, ("R", "G", "B"), row, rule=rule, group="g", table=None, percents=(1, 99))
        assert (low.tolist(), high.tolist()) == ([0] * 3, [255] * 3)


@pytest.mark.parametrize("value", [0.0, 7.0, -3.5, 65535.0, 1e6, 2.0**24, 2.0**30, -(2.0**30), 1e20])
def test_high_is_above_low_even_where_both_percentiles_are_one_value(value: float) -> None:
    for dtype in (np.float32, np.float64):
        table = {"g": {scaling_key("gray", np.dtype(dtype)): (value, value)}}
        pixels = np.full((1, 4, 4), value, dtype)
        low, high = limits(pixels, ("gray",), GRAY, rule="plate", group="g", table=table, percents=(0, 100))
        assert high[0] > low[0]
        assert np.isfinite(scale(pixels[0], low[0], high[0])).all()


@pytest.mark.parametrize(("low", "high"), [(1e6, 1e6 + 1e-3), (2.0**30, 2.0**30 + 1)])
def test_percentiles_closer_than_float32_can_tell(low: float, high: float) -> None:
    pixels = np.full((1, 4, 4), low, np.float32)
    table = {"g": {"gray [float32]": (low, high)}}
    got = limits(pixels, ("gray",), GRAY, rule="plate", group="g", table=table, percents=(0, 100))
    assert got[1][0] > got[0][0]


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(0, 65535), min_size=2, max_size=50), low=st.integers(0, 65000),
       span=st.integers(1, 65535))
def test_scaling_is_linear_clipped_and_keeps_order(values: list[int], low: int, span: int) -> None:
    plane = np.array([values], dtype=np.uint16)
    scaled = scale(plane, np.float32(low), np.float32(low + span))
    expected = np.clip((plane.astype(np.float64) - low) / span, 0, 1)
    assert np.allclose(scaled, expected, atol=1e-6)
    assert (np.diff(scaled[0][np.argsort(plane[0], kind="stable")]) >= 0).all()


@pytest.mark.parametrize(("dtype", "offset"), [("int32", 2**30), ("uint32", 2**32 - 5000), ("int64", -(2**40)),
                                               ("uint64", 2**52), ("float64", 1e12), ("uint16", 60_000),
                                               ("int16", -30_000), ("float16", 512)])
def test_a_small_range_on_a_large_offset_keeps_its_levels(dtype: str, offset: float) -> None:
    """float32 alone merges 2**30 and 2**30 + 50: wide dtypes are scaled in float64."""
    plane = (np.array(offset, dtype) + np.arange(256).astype(dtype)).reshape(16, 16)
    low, high = limits(plane[None], ("gray",), GRAY, rule="image", group="", table=None, percents=(0, 100))
    scaled = scale(plane, low[0], high[0])
    assert scaled.dtype == np.float32
    assert np.allclose(scaled.ravel(), np.arange(256) / 255, atol=1e-6)


# ---------------------------------------------------------------- CLAHE


def whole(height: int, width: int, seed: int) -> np.ndarray:
    return texture((height, width), seed, "uint16").astype(np.float32) / 65535


@settings(deadline=None, max_examples=30)
@given(tile=st.sampled_from([8, 13, 16, 31]), seed=st.integers(0, 5), data=st.data())
def test_a_block_with_a_margin_of_two_tiles_equals_the_same_part_of_the_whole(tile: int, seed: int, data) -> None:
    height, width = data.draw(st.integers(5 * tile, 9 * tile)), data.draw(st.integers(5 * tile, 9 * tile))
    image = whole(height, width, seed)
    expected = clahe(image, tile=tile, clip=2.0)
    y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    y1, x1 = data.draw(st.integers(y0 + 1, height)), data.draw(st.integers(x0 + 1, width))
    top, left = max(0, y0 - 2 * tile), max(0, x0 - 2 * tile)
    bottom, right = min(height, y1 + 2 * tile), min(width, x1 + 2 * tile)
    block = clahe(image[top:bottom, left:right], tile=tile, clip=2.0, origin=(top, left))
    assert np.array_equal(block[y0 - top:y1 - top, x0 - left:x1 - left], expected[y0:y1, x0:x1])


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 70), width=st.integers(1, 70), tile=st.sampled_from([2, 7, 8, 64]),
       clip=st.sampled_from([1.01, 2.0, 1e9]), origin=st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)))
def test_clahe_stays_in_range(height: int, width: int, tile: int, clip: float, origin: tuple[int, int]) -> None:
    image = np.random.default_rng(height * 71 + width).random((height, width), dtype=np.float32)
    image.flat[0], image.flat[-1] = 0, 1
    out = clahe(image, tile=tile, clip=clip, origin=origin)
    assert out.shape == image.shape
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert out.min() >= 0
    assert out.max() <= 1


def test_clahe_raises_local_contrast_and_is_not_constant() -> None:
    dim = np.concatenate([whole(64, 64, 1) * 0.1 + 0.2, whole(64, 64, 2) * 0.1 + 0.7], axis=1)
    out = clahe(dim, tile=32, clip=4.0)
    for half in (np.s_[:, :64], np.s_[:, 64:]):
        assert out[half].std() > 2 * dim[half].std()
    assert len(np.unique(out)) > 100


def test_a_high_clip_equalises_one_tile_and_a_low_one_changes_little() -> None:
    image = whole(64, 64, 3) ** 3  # a dark picture
    equalised = clahe(image, tile=64, clip=1e9)
    ranks = np.searchsorted(np.sort(np.floor(image * 256).ravel()), np.floor(image * 256), side="right") / image.size
    assert np.allclose(equalised, ranks, atol=1e-6)
    gentle = clahe(image, tile=64, clip=1.0001)
    assert np.abs(gentle - image).mean() < 0.3 * np.abs(equalised - image).mean()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), clip=st.sampled_from([1.5, 2.0, 8.0]))
def test_within_one_tile_clahe_keeps_the_order_of_levels(seed: int, clip: float) -> None:
    image = np.random.default_rng(seed).random((32, 32), dtype=np.float32) ** 2
    out = clahe(image, tile=32, clip=clip)
    order = np.argsort(image.ravel())
    assert (np.diff(out.ravel()[order]) >= -1e-6).all()
    assert out.max() > 0.97, "what the clip cuts off is spread over all levels, not lost"
    assert out.min() < 0.1


@pytest.mark.parametrize(("tile", "clip"), [(1, 2.0), (0, 2.0), (8, 1.0), (8, 0.5)])
def test_clahe_settings_that_make_no_sense(tile: int, clip: float) -> None:
    with pytest.raises(BadRequest):
        clahe(np.zeros((8, 8), np.float32), tile=tile, clip=clip)


def test_the_side_of_a_clahe_tile() -> None:
    assert clahe_tile(64, None, 0.5) == 64
    assert clahe_tile(64, 40.0, 0.65) == round(40 / 0.65)
    assert clahe_tile(64, 0.1, 1.0) == 8
    with pytest.raises(ItemError) as caught:
        clahe_tile(64, 40.0, None)
    assert caught.value.reason == "pixel_size"
    assert "--pixel-size-um" in caught.value.todo
