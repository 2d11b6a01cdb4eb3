"""The factor to the model's scale: what decides, the estimate on discs of known size, and the refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from dinoray.errors import BadRequest, ItemError
from dinoray.vision.cell_scale import PART_PX, SEEN_PX, Scale, at_border, cell_scale, typical_diameter
from dinoray.vision.distance_model import SegmenterConfig
from dinoray.vision.segmenter import Segmenter
from dinoray.vision.targets import distance_map
from tests.vision.distance_models import seeing_model, small_config
from tests.vision.test_segmenter import discs


@pytest.fixture(autouse=True)
def single(one_thread: None) -> None:
    """Networks this small only wait for each other's threads."""


def config(**fields: object) -> SegmenterConfig:
    return small_config(**{"median_diameter_px": 20.0, **fields})


def picture(diameter: float, side: int = 400) -> np.ndarray:
    """Bright discs on black, [3, side, side]."""
    return np.repeat((discs((side, side), diameter / 2, math.ceil(1.6 * diameter)) > 0)[None].astype(np.float32), 3, axis=0)


class Eyes:
    """Finds bright objects of 10 to 40 px only, as a network that was trained on cells of 20 px might."""

    def __init__(self, smallest: float = 10, largest: float = 40):
        self.smallest, self.largest, self.shapes = smallest, largest, []

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.shapes.append(image.shape[1:])
        labels, _ = ndimage.label(image[0] > 0.5)
        diameters = 2 * np.sqrt(np.bincount(labels.ravel()) / np.pi)
        seen = np.where((diameters >= self.smallest) & (diameters <= self.largest), np.arange(len(diameters)), 0)[labels]
        return seen, (seen > 0).astype(np.float32)


def never(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("nothing need be segmented")


def test_what_is_known_decides_and_nothing_is_segmented() -> None:
    image, model = picture(20), config(pixel_size_um=0.5)
    assert cell_scale(image, model, never, pixel_size_um=0.25) == Scale(0.5, "pixel_size")
    assert cell_scale(image, model, never, pixel_size_um=1.0).factor == 2.0
    assert cell_scale(image, model, never, pixel_size_um=0.5001) == Scale(1.0, "pixel_size")
    assert cell_scale(image, model, never, diameter_px=40) == Scale(0.5, "diameter", 40)
    assert cell_scale(image, model, never, diameter_px=22).factor == pytest.approx(20 / 22), "what is given is taken as given"
    assert cell_scale(image, model, never, pixel_size_um=0.25, diameter_px=5).factor == 4.0, "the user knows better than a header"
    assert cell_scale(image, config(median_diameter_px=None), never) == Scale(1.0, "unknown")
    assert cell_scale(image, config(median_diameter_px=None), never, pixel_size_um=0.2) == Scale(1.0, "unknown")


@pytest.mark.parametrize("diameter", [5.5, 7, 9, 13, 18, 20, 23, 30, 41, 60, 76])
def test_the_estimate_finds_discs_of_any_size(diameter: float) -> None:
    image = picture(diameter, max(200, int(12 * diameter)))
    found = cell_scale(image, config(), Eyes())
    assert found.source == "estimated"
    labels = ndimage.label(image[0])[0]
    true = 2 * np.sqrt(np.median(np.bincount(labels.ravel())[1:][~at_border(labels)]) / np.pi)  # a disc of few pixels is not round
    assert found.diameter_px == pytest.approx(true, rel=0.06)
    wanted = 20 / true
    assert found.factor == (1.0 if 1 / 1.2 < wanted < 1.2 else pytest.approx(wanted, rel=0.06))


@pytest.mark.parametrize("diameter", [3.5, 90, 160])
def test_an_estimate_of_more_than_four_times_is_not_believed(diameter: float) -> None:
    image = picture(diameter, max(200, int(12 * diameter)))
    assert cell_scale(image, config(), Eyes(smallest=1)) == Scale(1.0, "unknown")
    assert cell_scale(image, config(), never, diameter_px=diameter).factor == 20 / diameter, "who knows can say so"


def test_the_estimate_looks_again_at_the_size_that_follows() -> None:
    """Eyes that see cells that are not of 20 px a sixth too small: at the size that follows they see right."""
    class Poor(Eyes):
        def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            labels, seen = super().__call__(image)
            depth = ndimage.distance_transform_edt(labels)
            return (labels if 8 < depth.max() < 13 else np.where(depth > depth.max() / 6, labels, 0)), seen

    eyes = Poor(largest=80)
    found = cell_scale(picture(60), config(), eyes)
    assert found.diameter_px == pytest.approx(60, rel=0.05)
    assert len(eyes.shapes) == 4, "one look for each trial, and one at the factor that follows"


def test_pieces_of_large_cells_beside_specks_are_not_taken_for_cells() -> None:
    """Three large dim cells that fall into flat pieces at 1, among specks: at the scale at which their map rises they count."""
    class Torn(Eyes):
        def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            labels, seen = super().__call__(image)
            diameters = 2 * np.sqrt(np.bincount(labels.ravel())[1:] / np.pi)
            if labels.max() and diameters.max() > 40:
                y, x = np.indices(labels.shape)
                pieces = labels * 1000 + (y // 16) * 40 + x // 16
                labels = np.unique(np.where(labels > 0, pieces, 0), return_inverse=True)[1].reshape(labels.shape)
                return labels, seen * 0.6
            return labels, seen * 0.85

    image = np.zeros((3, 400, 400), np.float32)
    y, x = np.mgrid[:400, :400]
    for cy, cx in ((100, 100), (110, 280), (290, 200)):
        image[:, (y - cy)**2 + (x - cx)**2 < 40**2] = 1
    rng = np.random.default_rng(0)
    free = np.argwhere(ndimage.binary_dilation(image[0] > 0, iterations=6) == 0)
    for sy, sx in free[rng.choice(len(free), 60, replace=False)]:
        image[:, sy:sy + 4, sx:sx + 4] = 1
    found = cell_scale(image, config(), Torn(smallest=3, largest=200))
    assert found.factor == pytest.approx(20 / 80, rel=0.1), "three cells are enough"


def test_noise_alone_has_no_scale() -> None:
    class Flat(Eyes):
        def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            labels, seen = super().__call__(image)
            return labels, seen * 0.5

    rng = np.random.default_rng(1)
    noise = (ndimage.gaussian_filter(rng.random((300, 300)), 2) > 0.52).astype(np.float32)
    assert cell_scale(np.stack([noise] * 3), config(), Flat(smallest=2, largest=100)) == Scale(1.0, "unknown")


def test_an_estimate_sees_a_centred_part_of_bounded_size() -> None:
    image = np.zeros((3, 1200, 2500), np.float32)
    eyes = Eyes()
    assert cell_scale(image, config(), eyes) == Scale(1.0, "unknown")
    assert eyes.shapes == [(1024, 1024), (600, 1024), (300, 625), (1024, 1024)], "the smallest first, the magnified one last"
    assert PART_PX == 1024
    assert SEEN_PX == 4096
    image[:, :, :700] = picture(40, 1200)[:, :, :700]  # left of the part seen at 1, in that at 0.5: seen as 20 px
    found = cell_scale(image, config(), eyes)
    assert found.source == "estimated"
    assert found.diameter_px == pytest.approx(40, rel=0.1)


def test_one_whole_cell_is_enough_and_cells_at_the_border_are_not() -> None:
    image, (y, x) = np.zeros((3, 100, 100), np.float32), np.mgrid[:100, :100]
    whole, cut = image + ((y - 50)**2 + (x - 50)**2 < 17**2), image + ((y - 50)**2 + x**2 < 17**2)
    assert cell_scale(whole, config(), Eyes()).factor == pytest.approx(20 / 34, rel=0.05)
    assert cell_scale(cut, config(), Eyes()) == Scale(1.0, "unknown")
    labels = np.zeros((7, 9), np.int32)
    labels[0, 3:5], labels[2:4, 2:5], labels[3, 8], labels[5:, 0], labels[5, 3], labels[5, 5] = 1, 2, 3, 4, 6, 7
    assert at_border(labels).tolist() == [True, False, True, True, False, False, False]
    assert at_border(np.zeros((3, 3), np.int32)).size == 0


def test_with_a_segmenter_whose_map_is_its_input() -> None:
    labels = discs((300, 260), 6, 20)
    image = np.repeat(distance_map(labels)[None], 3, axis=0)
    ours = Segmenter(seeing_model(), config(), token_budget=1000)
    found = cell_scale(image, ours.config, ours.look)
    assert found == cell_scale(image, ours.config, ours.look), "the same every time"
    assert found.source == "estimated"
    assert found.diameter_px == pytest.approx(12, rel=0.1)
    pickier = Segmenter(seeing_model(), config(), token_budget=1000, min_area_px=10_000)
    assert found == cell_scale(image, pickier.config, pickier.look), "how large wanted cells are says nothing of the scale"


@pytest.mark.parametrize("sizes", [{"pixel_size_um": 0.01}, {"pixel_size_um": 50.0}, {"diameter_px": 1.0}, {"diameter_px": 200.0}])
def test_factors_that_cannot_be_meant(sizes: dict) -> None:
    with pytest.raises(ItemError, match="1/8 to 8") as caught:
        cell_scale(picture(20), config(pixel_size_um=0.5), never, **sizes)
    assert caught.value.reason == "scale"


@pytest.mark.parametrize("sizes", [{"pixel_size_um": 0.0}, {"pixel_size_um": float("nan")}, {"diameter_px": -3.0}])
def test_sizes_that_are_none(sizes: dict) -> None:
    with pytest.raises(BadRequest, match=next(iter(sizes))):
        cell_scale(picture(20), config(), never, **sizes)


def test_a_diameter_needs_the_models() -> None:
    with pytest.raises(BadRequest, match="how large"):
        cell_scale(picture(20), config(median_diameter_px=None), never, diameter_px=20)


def test_cells_of_a_size_that_the_training_had_enough_of_are_left_as_they_are() -> None:
    eyes = Eyes()
    model = config(diameter_range_px=(12.0, 36.0))
    for diameter in (14, 20, 34):
        found = cell_scale(picture(diameter), model, eyes)
        assert found.factor == 1.0 and found.source == "estimated" and found.diameter_px == pytest.approx(diameter, rel=0.1)
    assert cell_scale(picture(39), model, eyes).factor == pytest.approx(20 / 39, rel=0.1)
    assert cell_scale(picture(34), config(), eyes).factor == pytest.approx(20 / 34, rel=0.1), "without a range, to the median"


def test_specks_do_not_count() -> None:
    image = picture(20)
    rng = np.random.default_rng(0)
    noisy = image.copy()
    free = np.argwhere(ndimage.binary_dilation(image[0] > 0, iterations=3) == 0)
    for y, x in free[rng.choice(len(free), 400, replace=False)]:
        noisy[:, y, x] = 1.0
    found = cell_scale(noisy, config(), Eyes(smallest=0.5))
    assert found.factor == 1.0 and found.diameter_px == pytest.approx(20, rel=0.1)


def test_the_typical_diameter() -> None:
    def of(*pairs: tuple[float, float]) -> float | None:
        areas, heights = np.array(pairs, float).reshape(-1, 2).T
        found = typical_diameter(areas, heights)
        return None if found is None else round(found**2 * math.pi / 4)

    assert of() is None and of((0, 1), (0, 1)) is None and of((300, 0)) is None
    assert of(*[(1, 1)] * 4, (300, 1), (310, 1)) == 300, "specks of high maps do not count"
    assert of((40, 1), (300, 1), (310, 1)) == 300
    assert of(*[(40, 0.01)] * 90, (400, 0.5), (500, 0.5), (450, 0.5)) == 450, "specks of low maps count little, however many"
    assert of((0, 1), (0, 1), (0, 1), (500, 1)) == 500, "what the border cuts does not count"
