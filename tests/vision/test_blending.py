"""Windows and blending: every pixel has a weight, and an identity predictor gives the image back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest
from dinoray.vision.blending import Blend, padded_side, ramp, starts, window_side

WINDOWS = st.sampled_from([(16, 0), (16, 4), (16, 15), (32, 8), (32, 16), (48, 40), (256, 64)])


def back(image: np.ndarray, blend: Blend) -> np.ndarray:
    """The image through an identity predictor."""
    return blend.merge(window[0].copy() for window in blend.windows(image))


@settings(deadline=None, max_examples=300)
@given(side=st.integers(1, 2000), window=WINDOWS)
def test_an_axis_of_windows(side: int, window: tuple[int, int]) -> None:
    window, overlap = window
    begins = starts(side, window, overlap)
    assert begins[0] == 0
    assert begins[-1] + window == max(side, window), "the last ends at the border"
    assert begins == sorted(set(begins)), "no window twice"
    assert all(later - earlier <= window - overlap for earlier, later in zip(begins, begins[1:], strict=False))
    if side > window:
        assert len(begins) == -(-(side - overlap) // (window - overlap)), "no more windows than that overlap needs"
    assert padded_side(side, window, overlap, 16) == (side if side >= window else -(-side // 16) * 16)
    assert window_side(side, window, 16) == min(window, -(-side // 16) * 16)


@pytest.mark.parametrize(("window", "overlap"), [(32, 8), (32, 16), (48, 40), (16, 0), (16, 15)])
def test_identity_around_every_stride_boundary(window: int, overlap: int) -> None:
    rng, other = np.random.default_rng(window + overlap), window + 5
    for side in range(1, 3 * window + 3):
        for shape in ((side, other), (3, side)):
            image = rng.random((2, *shape), np.float32)
            blend = Blend(*shape, window, overlap, multiple=8)
            np.testing.assert_allclose(back(image, blend), image[0], atol=1e-6)


@settings(deadline=None, max_examples=150)
@given(height=st.integers(1, 200), width=st.integers(1, 200), window=WINDOWS, multiple=st.sampled_from([1, 4, 8, 16]),
       seed=st.integers(0, 2 ** 32 - 1))
def test_any_image(height: int, width: int, window: tuple[int, int], multiple: int, seed: int) -> None:
    image = np.random.default_rng(seed).random((1, height, width), np.float32)
    blend = Blend(height, width, *window, multiple=multiple)
    padded = blend.pad(image)
    assert padded.shape == (1, *blend.padded)
    np.testing.assert_array_equal(padded[:, :height, :width], image)
    windows = list(blend.windows(image))
    assert {w.shape for w in windows} == {(1, *blend.shape)}
    assert all(side % multiple == 0 for side in blend.shape)
    assert len(windows) == len(blend.boxes)
    for (y, x), cut in zip(blend.boxes, windows, strict=True):
        np.testing.assert_array_equal(cut, padded[:, y:y + blend.shape[0], x:x + blend.shape[1]])
    assert blend.boxes == sorted(blend.boxes)
    total = np.zeros(blend.padded)
    for y, x in blend.boxes:
        weight = blend.weight((y, x))
        assert weight.min() > 0, "no pixel without a weight"
        total[y:y + blend.shape[0], x:x + blend.shape[1]] += weight
    np.testing.assert_allclose(total, 1, atol=1e-12)
    np.testing.assert_allclose(back(image, blend), image[0], atol=1e-6)


def test_a_small_image_costs_a_small_window() -> None:
    blend = Blend(40, 100, 256, 64, multiple=16)
    assert blend.shape == blend.padded == (48, 112)
    assert blend.boxes == [(0, 0)]


def test_one_pixel_mirrors_itself_many_times() -> None:
    blend = Blend(1, 2, 16, 4, multiple=16)
    padded = blend.pad(np.array([[[3.0, 5.0]]]))
    np.testing.assert_array_equal(padded[0], np.tile([3.0, 5.0], (16, 8)))


def test_hand_value_of_a_seam() -> None:
    """Two windows of 4 px that overlap by 2: ramps at half pixels, 1/4 and 3/4 of half a cosine."""
    edge = 0.5 - 0.5 * np.cos(np.pi / 4)
    np.testing.assert_allclose(ramp(4, 2), [edge, 1 - edge, 1 - edge, edge])
    blend = Blend(1, 6, 4, 2, multiple=1)
    assert blend.boxes == [(0, 0), (0, 2)]
    zero, one = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    np.testing.assert_allclose(blend.merge([zero, one])[0], [0, 0, edge, 1 - edge, 1, 1], rtol=1e-6)


def test_a_seam_is_smooth() -> None:
    """Windows that disagree by 1 meet in a slope, not in a step."""
    blend = Blend(64, 200, 64, 32)
    merged = blend.merge(np.full(blend.shape, i % 2, np.float32) for i in range(len(blend.boxes)))
    assert np.abs(np.diff(merged, axis=1)).max() < 0.06
    assert merged.min() >= 0
    assert merged.max() <= 1


def test_windows_of_many_images_share_a_shape() -> None:
    shapes = {Blend(h, w, 64, 16).shape for h, w in [(64, 64), (65, 300), (500, 64), (1000, 1000)]}
    assert shapes == {(64, 64)}


@pytest.mark.parametrize(("call", "match"), [
    (lambda: starts(10, 4, 4), "overlap"),
    (lambda: starts(0, 4, 1), "axis of 0"),
    (lambda: Blend(10, 10, 16, -1), "overlap"),
    (lambda: Blend(10, 10, 20, 4, multiple=16), "multiple"),
    (lambda: Blend(10, 10, 16, 4).pad(np.zeros((1, 10, 11))), "size"),
    (lambda: Blend(10, 40, 16, 4).merge([np.zeros((16, 16))]), "predictions"),
    (lambda: Blend(10, 10, 16, 4).merge([np.zeros((16, 16))] * 2), "prediction 2"),
    (lambda: Blend(10, 10, 16, 4).merge([np.zeros((16, 15))]), "prediction 1"),
])
def test_refusals(call, match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        call()


@settings(deadline=None, max_examples=200)
@given(height=st.integers(1, 700), width=st.integers(1, 700), patch=st.sampled_from([4, 8, 16]),
       window=st.sampled_from([48, 64, 256]), overlap=st.integers(0, 2))
def test_aligned_windows_begin_where_those_of_the_patches_do(height: int, width: int, patch: int, window: int,
                                                              overlap: int) -> None:
    fine = Blend(height, width, window, overlap * patch, multiple=patch, aligned=True)
    assert all(side % patch == 0 for side in (*fine.padded, *fine.shape))
    coarse = fine.coarse()
    assert [(y // patch, x // patch) for y, x in fine.boxes] == coarse.boxes
    assert [(y * patch, x * patch) for y, x in coarse.boxes] == fine.boxes
    assert tuple(side * patch for side in coarse.shape) == fine.shape
    assert max(y for y, _ in fine.boxes) + fine.shape[0] == fine.padded[0]
    assert len(fine.boxes) <= len(Blend(*fine.padded, window, overlap * patch, multiple=patch).boxes), "no more windows for it"


def test_an_aligned_overlap_is_a_multiple_of_the_patch() -> None:
    with pytest.raises(BadRequest, match="overlap of 20 px"):
        Blend(100, 100, 64, 20, multiple=16, aligned=True)
