"""Label images of real microscopy -> distance maps -> labels again; in one piece and block by block."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinoray.vision.instances import instances
from dinoray.vision.stitching import matches
from dinoray.vision.targets import distance_map, median_diameter
from tests.realdata import data_folder
from tests.vision.labels import same_partition
from tests.vision.test_shapes import check
from tests.vision.test_stitching import extent, stitched


def truths() -> list[np.ndarray]:
    """Nuclei of 18 images of the Data Science Bowl, some crowded, and of StarDist's 2D sample."""
    files = sorted((data_folder("dsb2018_stage1_rest") / "labels").glob("*.png"))[::30]
    stardist = tifffile.imread(data_folder("stardist_samples") / "mask2d.tif")
    return [*(np.asarray(Image.open(file)).astype(np.int32) for file in files), stardist.astype(np.int32)]


@pytest.mark.parametrize("markers", ["components", "hmaxima"])
def test_perfect_maps_give_the_nuclei_back(markers: str) -> None:
    tp = fp = fn = 0
    for truth in truths():
        found = instances(distance_map(truth), markers=markers)
        matched, true = len(matches(found, truth)), len(np.unique(truth[truth > 0]))
        tp, fp, fn = tp + matched, fp + int(found.max()) - matched, fn + true - matched
    assert tp + fn > 500
    assert tp / (tp + fp + fn) > 0.98


def test_blocks_of_a_real_map_equal_the_whole() -> None:
    truth = tifffile.imread(data_folder("stardist_samples") / "mask2d.tif").astype(np.int32)
    distance = distance_map(truth).astype(np.float16)
    whole = instances(distance)
    assert whole.max() > 100
    assert 10 < median_diameter(truth) < 60
    overlap_px = 2 * extent(whole)
    for block_px in (64, 150, 200):
        found = stitched(whole.shape, block_px, overlap_px, lambda box: instances(distance[box.y0:box.y1, box.x0:box.x1]))
        assert same_partition(found, whole)


def test_the_table_of_real_nuclei() -> None:
    image = tifffile.imread(data_folder("stardist_samples") / "img2d.tif")
    truth = tifffile.imread(data_folder("stardist_samples") / "mask2d.tif").astype(np.int32)
    check(truth[:200, :200], image[None, :200, :200])
