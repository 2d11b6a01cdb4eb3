"""The images that a training keeps for its report: which ones, which part, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoray.io.stores import open_store
from dinoray.io.training_examples import KEY, stored_examples
from dinoray.training.distance_map import Images
from dinoray.training.examples import KEPT, SIDE_PX, store_examples
from dinoray.training.image_pool import Pixels
from dinoray.vision.targets import distance_map


@dataclass
class Named:
    image_id: str


class Pool:
    """Images without files: number -> pixels. The first plane shows the cells, so that a predictor can cheat."""

    def __init__(self, labels: list[np.ndarray]):
        self.labels, self.images = labels, [Named(f"image{i}") for i in range(len(labels))]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int) -> Pixels:
        planes = np.zeros((3, *self.labels[number].shape), np.float32)
        planes[0] = distance_map(self.labels[number])
        return Pixels(planes, self.labels[number])


def discs(height: int, width: int, centres: list[tuple[int, int]], radius: int = 9) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.int32)
    for number, (cy, cx) in enumerate(centres, 1):
        labels[(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = number
    return labels


def kept(folder: Path, labels: list[np.ndarray], predict) -> list:
    store = open_store(str(folder))
    store_examples(store, Images(Pool(labels), np.ones(len(labels))), predict, peak=0.47, fill=0.09)
    return stored_examples(store)


def test_first_middle_last_and_the_worst_are_kept(tmp_path: Path) -> None:
    labels = [discs(64, 80, [(20, 20), (40, 60)]) for _ in range(20)]
    labels[7] = discs(64, 80, [(20, 20), (40, 40), (50, 70)])  # the predictor finds nothing in the right half

    def predict(planes: np.ndarray) -> np.ndarray:
        found = planes[0].copy()
        found[:, 50:] = 0
        return found

    found = kept(tmp_path / "a", labels, predict)
    assert [(one.image_id, one.why) for one in found[:4]] == [
        ("image0", "first"), ("image10", "middle"), ("image19", "last"), ("image1", "worst")]
    assert len(found) == KEPT and {one.ap50 for one in found} == {0.5}
    assert found[0].cells.max() == 1 and found[0].labels.max() == 2 and found[0].pixels.shape == (3, 64, 80)
    assert kept(tmp_path / "b", labels, predict) and \
        open_store(str(tmp_path / "a")).get(KEY) == open_store(str(tmp_path / "b")).get(KEY)


def test_the_worst_comes_before_the_better_ones_and_empty_images_are_perfect(tmp_path: Path) -> None:
    labels = [discs(48, 48, [(24, 24)]) for _ in range(9)]
    labels[3] = discs(48, 48, [(12, 12), (36, 36)])
    labels[5] = np.zeros((48, 48), np.int32)

    def predict(planes: np.ndarray) -> np.ndarray:
        return np.where(np.indices(planes[0].shape)[0] < 24, 0, planes[0]) if (planes[0] > 0)[8:16, 8:16].any() else planes[0]

    found = kept(tmp_path, labels, predict)
    assert [one.image_id for one in found if one.why == "worst"] == ["image3", "image1", "image2"]
    assert found[3].ap50 == 0.5 and all(one.ap50 == 1 for one in found if one.image_id != "image3")


def test_of_two_images_both_are_kept_and_of_a_large_one_the_part_with_cells(tmp_path: Path) -> None:
    large = discs(500, 1200, [(450, 1100), (440, 1060), (460, 1150)])
    found = kept(tmp_path, [large, np.zeros((30, 30), np.int32)], lambda planes: planes[0])
    assert [one.why for one in found] == ["all", "all"] and found[1].ap50 == 1
    part = found[0]
    assert part.labels.shape == (SIDE_PX, SIDE_PX) and part.image_shape == (500, 1200)
    y, x = part.origin
    assert np.array_equal(part.labels, large[y:y + SIDE_PX, x:x + SIDE_PX]) and len(np.unique(part.labels)) == 4
    assert part.ap50 == 1 and np.allclose(part.predicted, part.target, atol=1e-3)
