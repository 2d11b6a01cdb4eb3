"""Augmentation: image and labels stay on one another, symmetries are exact, and a sample depends on its generator only."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import ndimage

from dinoray.config.augmentation import Augmentation
from dinoray.errors import BadRequest
from dinoray.training.augmentation import MAX_ZOOM, augment, grid_crops, plain_crop
from dinoray.training.warping import Warp, instances, warp

ALL_ON = Augmentation(p_rotate=1, p_scale=1, p_foreground=1, p_tone=1, p_invert=1, p_blur=1, p_noise=1, p_colour=1,
                      p_channel_shuffle=1)
GEOMETRY = {"p_tone": 0, "p_invert": 0, "p_blur": 0, "p_noise": 0, "p_colour": 0, "p_channel_shuffle": 0}


def discs(height: int, width: int, seed: int, count: int = 12) -> np.ndarray:
    """int32 labels of discs, some over others and over the border."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.int32)
    for i in range(1, count + 1):
        y, x, radius = rng.random(3) * (height, width, min(height, width) / 5) + (0, 0, 3)
        labels[(yy - y) ** 2 + (xx - x) ** 2 < radius**2] = i
    return labels


def smooth(height: int, width: int, seed: int, channels: int = 3) -> np.ndarray:
    """float32 [C, Y, X] in [0, 1] without sharp edges."""
    rough = np.random.default_rng(seed).random((channels, height, width))
    image = ndimage.gaussian_filter(rough, (0, 3, 3))
    return ((image - image.min()) / np.ptp(image)).astype(np.float32)


# ---------------------------------------------------------------- geometry


@settings(max_examples=60, deadline=None)
@given(symmetry=st.integers(0, 7), angle=st.floats(-180, 180), scale=st.floats(0.4, 2.5), y=st.floats(-20, 90),
       x=st.floats(-20, 110), crop_px=st.integers(1, 70))
def test_image_and_labels_stay_on_one_another(symmetry, angle, scale, y, x, crop_px) -> None:
    """An image that IS the label image: where its linear value is a whole number (away from edges), it is the label's id."""
    labels = discs(75, 93, 3)
    crop, ids = warp(np.repeat(labels[None].astype(np.float32), 3, 0), labels, Warp(y, x, symmetry, angle, scale), crop_px)
    assert crop.shape == (3, crop_px, crop_px)
    assert ids.shape == (crop_px, crop_px)
    # the pixels whose neighbourhood (1 px of the image, and the blur) has one id only
    radius = 2 + math.ceil(max(0, 1 / scale - 1) * 2)
    low, high = (f(labels, size=2 * radius + 1, mode="reflect") for f in (ndimage.minimum_filter, ndimage.maximum_filter))
    _, even = warp(crop[:1] * 0, np.zeros((1, 1), int), Warp(0, 0), 1)  # no label is made where there is none
    assert even.item() == 0
    _, inside = warp(np.zeros((1, 75, 93), np.float32), (low == high).astype(np.int32), Warp(y, x, symmetry, angle, scale), crop_px)
    inside = inside.astype(bool)
    assert np.abs(crop[0][inside] - ids[inside]).max(initial=0) < 1e-4
    # and everywhere the linear value is near the nearest neighbour's on a smooth image
    ramp = np.arange(93, dtype=np.float32)[None, None].repeat(75, 1)
    linear, nearest = warp(ramp, np.arange(93)[None].repeat(75, 0), Warp(y, x, symmetry, angle, scale), crop_px)
    assert np.abs(linear[0] - nearest).max() < 0.51 + max(0, 1 / scale - 1)


@pytest.mark.parametrize("crop_px", [16, 17])
@pytest.mark.parametrize("symmetry", range(8))
def test_the_eight_symmetries_are_exact_and_agree_with_the_resampled_ones(symmetry: int, crop_px: int) -> None:
    image, labels = smooth(40, 50, 1), discs(40, 50, 1)
    where = Warp(7 + crop_px / 2, 21 + crop_px / 2, symmetry)
    crop, ids = warp(image, labels, where, crop_px)
    plain, plain_ids = image[:, 7:7 + crop_px, 21:21 + crop_px], labels[7:7 + crop_px, 21:21 + crop_px]
    turned = [(np.rot90(p, k, (1, 2)), np.rot90(i, k)) for k in range(4)
              for p, i in ((plain, plain_ids), (plain[..., ::-1], plain_ids[..., ::-1]))]
    assert sum(np.array_equal(crop, t) and np.array_equal(ids, i) for t, i in turned) == 1
    # the general path, in steps of a full turn, gives the same pixels
    again, again_ids = warp(image, labels, Warp(where.centre_y, where.centre_x, symmetry, 360.0), crop_px)
    np.testing.assert_allclose(again, crop, atol=1e-6)
    assert np.array_equal(again_ids, ids)


def test_all_eight_symmetries_differ() -> None:
    image = smooth(9, 9, 0, 1)
    crops = [warp(image, discs(9, 9, 0), Warp(4.5, 4.5, k), 9)[0].tobytes() for k in range(8)]
    assert len(set(crops)) == 8


@pytest.mark.parametrize(("angle", "turns"), [(90, -1), (180, 2), (-90, 1)])
def test_a_quarter_turn_by_resampling_is_a_quarter_turn(angle: float, turns: int) -> None:
    image, labels = smooth(31, 31, 2), discs(31, 31, 2)
    crop, ids = warp(image, labels, Warp(15.5, 15.5, 0, angle + 1e-9), 31)
    best = [k for k in range(4) if np.allclose(crop, np.rot90(image, k, (1, 2)), atol=1e-5)]
    assert len(best) == 1
    assert best[0] % 2 == turns % 2
    assert np.array_equal(ids, np.rot90(labels, best[0]))


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.8, 1.5, 3.0])
def test_scaling_keeps_coordinates(scale: float) -> None:
    """A ramp stays a ramp: the crop's pixel (i, j) shows the image at centre + (offset from the crop's centre) / scale."""
    ramp = np.stack(np.mgrid[:400, :420]).astype(np.float32) / 420
    crop, _ = warp(ramp, np.zeros((400, 420), int), Warp(200.3, 210.8, 0, 0, scale), 64)
    offsets = (np.arange(64) + 0.5 - 32) / scale - 0.5
    np.testing.assert_allclose(crop[0], np.repeat((200.3 + offsets)[:, None] / 420, 64, 1), atol=1e-4)
    np.testing.assert_allclose(crop[1], np.repeat((210.8 + offsets)[None] / 420, 64, 0), atol=1e-4)


def test_a_shrunken_crop_does_not_alias() -> None:
    """Stripes of 2 px at a quarter of the size are grey, not a new pattern."""
    stripes = np.zeros((1, 256, 256), np.float32)
    stripes[:, :, ::2] = 1
    crop, _ = warp(stripes, np.zeros((256, 256), int), Warp(128, 128, 0, 10.0, 0.25), 40)
    assert np.abs(crop - 0.5).max() < 0.05


def test_beyond_the_border_lies_the_mirror_image_of_both() -> None:
    image, labels = smooth(20, 30, 4), discs(20, 30, 4)
    wide = np.pad(image, ((0, 0), (40, 40), (40, 40)), mode="symmetric"), np.pad(labels, 40, mode="symmetric")
    for where in (Warp(1.0, 29.0), Warp(2.3, 3.7, 5, 33.0, 1.3), Warp(9.0, 9.0, 2, -70.0, 0.9)):
        crop, ids = warp(image, labels, where, 30)
        shifted = Warp(where.centre_y + 40, where.centre_x + 40, where.symmetry, where.angle_deg, where.scale)
        far, far_ids = warp(*wide, shifted, 30)
        np.testing.assert_allclose(crop, far, atol=1e-5)
        assert np.array_equal(ids, far_ids)


# ---------------------------------------------------------------- instances


def test_pieces_of_one_id_become_instances() -> None:
    ids = np.zeros((8, 12), np.int64)
    ids[1:3, 1:4] = 7  # two pieces of 7, the first continued over a corner, 9 touching it
    ids[3, 4:8] = 7
    ids[5:7, 8:11] = 7
    ids[1:3, 4:6] = 9
    out = instances(ids)
    assert out.dtype == np.int32
    assert len(np.unique(out)) == 4
    assert out[3, 4] == out[1, 1] != out[5, 8]
    assert np.array_equal(out > 0, ids > 0)


def test_a_speck_stays_with_the_largest_piece_of_its_object_and_a_lone_one_is_an_object() -> None:
    ids = np.zeros((9, 20), np.uint16)
    ids[0:4, 0:4], ids[0:2, 10:14], ids[7, 2] = 500, 500, 500
    ids[8, 19] = 3
    out = instances(ids)
    assert out[7, 2] == out[0, 0] != out[0, 10]
    assert sorted(np.unique(out)) == [0, 1, 2, 3]
    assert (out == out[8, 19]).sum() == 1


def test_seventy_thousand_and_huge_ids_do_not_overflow() -> None:
    ids = np.zeros((300, 1000), np.int64)
    ids[::2, ::2] = np.arange(1, 150 * 500 + 1).reshape(150, 500)
    out = instances(ids)
    assert out.max() == 75_000
    assert len(np.unique(out)) == 75_001
    for dtype in (np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        top = np.iinfo(dtype).max
        labels = np.zeros((32, 32), dtype)
        labels[2:9, 2:9], labels[2:9, 9:15], labels[20:30, 20:30] = top, top - 1, 1
        for config in (Augmentation.off(), ALL_ON):
            _, got = augment(smooth(32, 32, 0), labels, 32, config, np.random.default_rng(1))
            assert got.dtype == np.int32
            assert got.max() >= 3
        assert len(np.unique(plain_crop(smooth(32, 32, 0), labels, 0, 0, 32)[1])) == 4


# ---------------------------------------------------------------- samples


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(1, 90), width=st.integers(1, 90), crop_px=st.integers(1, 64),
       zoom=st.sampled_from([0.5, 1.0, 1.7]), config=st.sampled_from([Augmentation(), Augmentation.off(), ALL_ON]))
def test_a_sample_depends_on_its_generator_only(seed, height, width, crop_px, zoom, config) -> None:
    image, labels = smooth(height, width, 1), discs(height, width, 1)
    before = image.tobytes(), labels.tobytes()
    generators = [np.random.default_rng(seed) for _ in range(2)]
    (a, b), (c, d) = (augment(image, labels, crop_px, config, rng, zoom=zoom) for rng in generators)
    assert a.tobytes() == c.tobytes()
    assert b.tobytes() == d.tobytes()
    assert (image.tobytes(), labels.tobytes()) == before
    assert a.shape == (3, crop_px, crop_px)
    assert (a.dtype, b.dtype, b.shape) == (np.float32, np.int32, (crop_px, crop_px))
    assert a.flags.c_contiguous and b.flags.c_contiguous and a.flags.writeable and b.flags.writeable
    assert a.min() >= 0
    assert a.max() <= 1
    present = np.unique(b[b > 0])
    assert np.array_equal(present, np.arange(1, len(present) + 1))


def test_every_setting_draws_as_many_numbers() -> None:
    image = smooth(50, 60, 1)
    states = set()
    for config in (Augmentation(), Augmentation.off(), ALL_ON):
        for labels in (discs(50, 60, 1), np.zeros((50, 60), int)):
            rng = np.random.default_rng(5)
            augment(image, labels, 32, config, rng)
            states.add(rng.random())
    assert len(states) == 1


def test_changing_the_tone_leaves_the_geometry() -> None:
    image, labels = smooth(80, 80, 1), discs(80, 80, 1)
    for seed in range(8):
        quiet = augment(image, labels, 48, Augmentation(**GEOMETRY), np.random.default_rng(seed))
        loud = augment(image, labels, 48, Augmentation(p_tone=1, p_noise=1), np.random.default_rng(seed))
        assert np.array_equal(quiet[1], loud[1])
        assert not np.array_equal(quiet[0], loud[0])


def test_off_is_a_plain_crop_at_a_random_place() -> None:
    image, labels = smooth(40, 44, 6), discs(40, 44, 6)
    crops = {}
    for y0 in range(40 - 32 + 1):
        for x0 in range(44 - 32 + 1):
            crop, ids = plain_crop(image, labels, y0, x0, 32)
            assert np.array_equal(crop, image[:, y0:y0 + 32, x0:x0 + 32])
            crops[crop.tobytes()] = ids
    seen = set()
    for seed in range(300):
        crop, ids = augment(image, labels, 32, Augmentation.off(), np.random.default_rng(seed))
        assert np.array_equal(ids, crops[crop.tobytes()])
        seen.add(crop.tobytes())
    assert len(seen) > 0.8 * len(crops)  # 117 places, 300 draws: 92 % are expected
    whole = plain_crop(image, labels, 0, 0, 40)
    again = augment(image[..., :40], labels[:, :40], 40, Augmentation.off(), np.random.default_rng(0))
    assert np.array_equal(again[0], whole[0]) and np.array_equal(again[1], whole[1])


def test_a_small_image_lies_whole_in_the_crop() -> None:
    image, labels = smooth(10, 13, 2), np.zeros((10, 13), int)
    labels[4:6, 4:6], labels[4:6, 8:10] = 1, 2
    for config in (Augmentation.off(), Augmentation(p_scale=0, p_rotate=0, **GEOMETRY)):
        for seed in range(20):
            crop, ids = augment(image, labels, 24, config, np.random.default_rng(seed))
            assert np.isin(image[0], crop[0]).all()
            assert ids.max() >= 2  # and mirror images of the two are instances of their own


@pytest.mark.parametrize("config", [Augmentation(p_foreground=1), ALL_ON], ids=["some", "all"])
def test_a_crop_around_the_foreground_holds_some(config: Augmentation) -> None:
    """One labelled pixel in 250,000, in the corner or not: candidates miss it, the search finds it."""
    image = np.zeros((3, 500, 500), np.float32)
    for y, x in ((0, 0), (499, 499), (0, 250), (333, 77)):
        labels = np.zeros((500, 500), np.uint8)
        labels[y:y + 3, x:x + 3] = 9
        for seed in range(12):
            assert augment(image, labels, 64, config, np.random.default_rng(seed))[1].any()
    assert not augment(image, np.zeros((500, 500), int), 64, config, np.random.default_rng(0))[1].any()


def test_a_crop_around_a_corner_pixel_is_moved_inside_the_image() -> None:
    image, labels = smooth(60, 70, 1), np.zeros((60, 70), int)
    labels[58:, 67:] = 1
    crop, ids = augment(image, labels, 32, Augmentation.off().model_copy(update={"p_foreground": 1.0}), np.random.default_rng(0))
    assert np.array_equal(crop, image[:, 28:, 38:])
    assert np.array_equal(ids, labels[28:, 38:])


def test_zoom_brings_objects_to_the_models_scale() -> None:
    yy, xx = np.mgrid[:600, :600]
    labels = ((yy - 300) ** 2 + (xx - 300) ** 2 < 40**2).astype(int)
    image = np.repeat(labels[None].astype(np.float32), 3, 0)
    config = Augmentation(p_scale=0, p_foreground=1, **GEOMETRY)
    for zoom in (0.25, 0.5, 1.0):
        crop, ids = augment(image, labels, 128, config, np.random.default_rng(3), zoom=zoom)
        assert ids.max() == 1
        assert ids.sum() == pytest.approx(math.pi * (40 * zoom) ** 2, rel=0.05)
        assert crop[0].sum() == pytest.approx(math.pi * (40 * zoom) ** 2, rel=0.05)


# ---------------------------------------------------------------- tone


def only(**settings) -> Augmentation:
    return Augmentation.off().model_copy(update=settings)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    return smooth(32, 32, 8), discs(32, 32, 8)


def sample(pair, config: Augmentation, seed: int = 3) -> np.ndarray:
    return augment(*pair, 32, config, np.random.default_rng(seed))[0]


def test_inversion_and_channel_order(pair) -> None:
    np.testing.assert_allclose(sample(pair, only(p_invert=1.0)), 1 - pair[0], atol=1e-7)
    orders = {tuple(int(np.argmax([np.array_equal(c, p) for p in pair[0]])) for c in sample(pair, only(p_channel_shuffle=1.0), s))
              for s in range(60)}
    assert orders == {(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}


def test_tone_is_monotonic_and_keeps_the_range(pair) -> None:
    for seed in range(20):
        out = sample(pair, only(p_tone=1.0), seed)
        order = np.argsort(pair[0].ravel(), kind="stable")
        assert (np.diff(out.ravel()[order]) >= 0).all()
        assert not np.array_equal(out, pair[0])
    gamma = sample(pair, only(p_tone=1.0, gamma=(2.0, 2.0), contrast=(1.0, 1.0), brightness=0.0))
    np.testing.assert_allclose(gamma, pair[0] ** 2, atol=1e-6)


def test_colour_changes_colour_images_and_leaves_grey_ones_grey(pair) -> None:
    out = sample(pair, only(p_colour=1.0))
    assert all(not np.array_equal(out[k], pair[0][k]) for k in range(3))
    white_and_black = pair[0].copy()
    white_and_black[:, :8], white_and_black[:, 8:16] = 1, 0
    out = sample((white_and_black, pair[1]), only(p_colour=1.0))
    assert (out[:, :8] == 1).all() and (out[:, 8:16] == 0).all()
    grey = np.repeat(pair[0][:1], 3, 0)
    assert np.array_equal(sample((grey, pair[1]), only(p_colour=1.0, p_channel_shuffle=1.0)), grey)
    for seed in range(10):
        out = sample((grey, pair[1]), ALL_ON, seed)
        assert np.array_equal(out[0], out[1]) and np.array_equal(out[0], out[2])


def test_blur_smooths_and_noise_has_the_asked_strength(pair) -> None:
    rough = np.random.default_rng(0).random((3, 32, 32)).astype(np.float32)
    assert sample((rough, pair[1]), only(p_blur=1.0)).std() < 0.8 * rough.std()
    flat = np.full((3, 32, 32), 0.5, np.float32)
    flat[1] += 0.01  # a colour image: independent noise in each channel
    stds = [np.std(sample((flat, pair[1]), only(p_noise=1.0, noise=0.1), s) - flat) for s in range(200)]
    assert max(stds) < 0.105
    assert np.mean(stds) == pytest.approx(0.05, rel=0.15)


def test_shares_are_kept(pair) -> None:
    changed = sum(not np.array_equal(sample(pair, only(p_invert=0.1), s), pair[0]) for s in range(600))
    assert 30 <= changed <= 95


# ---------------------------------------------------------------- grids and refusals


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), crop_px=st.integers(1, 128))
def test_grid_crops_cover_every_pixel(height, width, crop_px) -> None:
    seen = np.zeros((height, width), bool)
    crops = grid_crops(height, width, crop_px)
    for y0, x0 in crops:
        assert 0 <= y0 <= max(0, height - crop_px)
        assert 0 <= x0 <= max(0, width - crop_px)
        seen[y0:y0 + crop_px, x0:x0 + crop_px] = True
    assert seen.all()
    assert len(set(crops)) == len(crops) == math.ceil(height / crop_px) * math.ceil(width / crop_px)


@pytest.mark.parametrize(("image", "labels", "crop_px", "zoom", "needle"), [
    ((3, 8, 9), ((9, 8), int), 8, 1.0, "do not fit"),
    ((8, 9), ((8, 9), int), 8, 1.0, "do not fit"),
    ((3, 0, 9), ((0, 9), int), 8, 1.0, "do not fit"),
    ((3, 8, 9), ((8, 9), float), 8, 1.0, "float64"),
    ((3, 8, 9), ((8, 9), int), 0, 1.0, "at least 1"),
    ((3, 8, 9), ((8, 9), int), 8, math.nan, "pixel sizes"),
    ((3, 8, 9), ((8, 9), int), 8, 2 * MAX_ZOOM, "pixel sizes"),
    ((3, 8, 9), ((8, 9), int), 8, 0.0, "pixel sizes"),
])
def test_what_does_not_fit_is_refused(image, labels, crop_px, zoom, needle) -> None:
    with pytest.raises(BadRequest, match=needle):
        augment(np.zeros(image, np.float32), np.zeros(*labels), crop_px, Augmentation(), np.random.default_rng(0), zoom=zoom)
    with pytest.raises(BadRequest):
        grid_crops(0, 5, 8)


@pytest.mark.parametrize("wrong", [{"p_rotate": 1.5}, {"scale": (1.2, 0.8)}, {"scale": (0, 1)}, {"rotate": 3},
                                   {"gamma": (float("nan"), 1)}])
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        Augmentation(**wrong)
