"""Instance metrics against two independent packages on real label images.

* `py-ctcmetrics` (SEG, DET). It follows the definitions of the Cell Tracking Challenge: more than half of the true object,
  k - 1 splits for an object on k true ones, weights 5, 10, 1. Two limits of its reader, so the files here keep to them:
  it adds an offset to the labels in the file's own dtype (8 and 16 bits wrap around), and it takes the lowest value of each
  file for background. Without true objects it divides by zero; our rule for that is in test_instance_metrics.
* `cellseg-metrics` (SQ, DQ = F1, PQ). It asks for IoU > threshold and adds 1e-8 px to each union; ours is >=, without. Real
  objects do lie exactly on a threshold, so it is given thresholds lower by 1e-7, less than what two
  fractions of objects below 100,000 px can differ by. Its `average_precision` is TP / (TP + FP), our precision.
"""

from __future__ import annotations

from pathlib import Path

import cellseg_metrics
import numpy as np
import pytest
import tifffile
from ctc_metrics.metrics.technical.det import det
from ctc_metrics.metrics.technical.seg import seg
from ctc_metrics.utils.representations import count_acyclic_graph_correction_operations
from ctc_metrics.utils.representations import match as ctc_match
from PIL import Image
from scipy import ndimage
from skimage import feature, filters, measure, segmentation

from dinoray.vision.instance_metrics import THRESHOLDS, ImageScore, score_image
from dinoray.vision.score_summary import Counts, evaluate
from tests.realdata import data_folder

AT = (0.25, 0.5, 0.75)


def dsb(image: Path) -> tuple[np.ndarray, np.ndarray]:
    """(gray, labels) of an image of DSB 2018."""
    gray = np.asarray(Image.open(image).convert("L"))
    labels = np.zeros(gray.shape, np.int32)
    for number, mask in enumerate(sorted((image.parents[1] / "masks").glob("*.png")), 1):
        labels[(np.asarray(Image.open(mask)) > 0) & (labels == 0)] = number
    return gray, labels


def otsu_watershed(gray: np.ndarray) -> np.ndarray:
    """Labels by Otsu's threshold and watershed of the distance: merges, splits, misses and invents objects."""
    smooth = ndimage.gaussian_filter(gray.astype(float), 1)
    mask = smooth > filters.threshold_otsu(smooth)
    if mask.mean() > 0.5:
        mask = ~mask
    distance = ndimage.distance_transform_edt(mask)
    peaks = np.zeros(mask.shape, bool)
    peaks[tuple(feature.peak_local_max(distance, min_distance=4, labels=measure.label(mask)).T)] = True
    return segmentation.watershed(-distance, measure.label(peaks), mask=mask).astype(np.int32)


def perturbed(labels: np.ndarray, seed: int) -> np.ndarray:
    """The truth with a tenth of its objects removed, a tenth merged with the next, all shifted by a pixel or two."""
    rng = np.random.default_rng(seed)
    ids = np.unique(labels[labels > 0])
    names = np.arange(labels.max() + 1)
    names[rng.choice(ids, len(ids) // 10, replace=False)] = 0
    for one in rng.choice(ids[:-1], len(ids) // 10, replace=False):
        names[one] = names[one + 1] if one + 1 <= labels.max() else names[one]
    return np.roll(names[labels], rng.integers(0, 3, 2), (0, 1)).astype(np.int32)


def real_pairs(data: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(pred, truth) of real images: Otsu + watershed of each, and its own truth disturbed."""
    if data == "dsb2018":
        images = [dsb(path) for path in sorted((data_folder("dsb2018_stage1") / "stage1_test").glob("*/images/*.png"))[::7]]
    elif data == "usiigaci":
        sets = sorted(data_folder("usiigaci_phase_train").glob("set*"))[:1]
        halved = slice(None, None, 2)
        images = [(tifffile.imread(one / "raw.tif")[halved, halved],
                   np.asarray(Image.open(one / "instances_ids.png"))[halved, halved]) for one in sets]
    else:
        folder = data_folder("stardist_samples")
        images = [(tifffile.imread(folder / "img2d.tif"), tifffile.imread(folder / "mask2d.tif"))]
    pairs = []
    for number, (gray, truth) in enumerate(images):
        truth = truth.astype(np.int32)
        pairs += [(otsu_watershed(gray), truth), (perturbed(truth, number), truth)]
    return pairs


@pytest.mark.parametrize("data", ["dsb2018", "usiigaci", "stardist"])
def test_scores_equal_those_of_other_packages(data: str, tmp_path: Path) -> None:
    pairs = real_pairs(data)
    scores = [score_image(pred, truth, thresholds=AT) for pred, truth in pairs]
    counts = Counts.of(scores)
    assert counts.named("splits").any() and counts.named("missed").any() and counts.named("spurious").any()
    _compare_detection(pairs, scores, tmp_path)
    for i, (pred, truth) in enumerate(pairs):
        for threshold in AT:
            theirs = cellseg_metrics.panoptic_quality(truth, pred, thresh=threshold - 1e-7)
            ours = {name: evaluate(counts, f"{name}@{threshold}")[i] for name in ("F1", "SQ", "PQ", "AP")}
            assert ours["F1"] == pytest.approx(theirs["dq"], abs=1e-6)
            assert np.nan_to_num(ours["SQ"]) == pytest.approx(theirs["sq"], abs=1e-6)
            assert ours["PQ"] == pytest.approx(theirs["pq"], abs=1e-6)
            assert ours["AP"] == pytest.approx(theirs["dq"] / (2 - theirs["dq"]), abs=1e-6)  # F1 = 2 AP / (1 + AP)
        precision = cellseg_metrics.average_precision(truth, pred, thresh=0.5 - 1e-7)
        assert evaluate(counts, "precision@0.5")[i] == pytest.approx(precision, abs=1e-6)


def _compare_detection(pairs: list[tuple[np.ndarray, np.ndarray]], scores: list[ImageScore], folder: Path) -> None:
    """SEG and DET of each image, and pooled over all of them as a sequence of frames."""
    frames = []
    for i, (pred, truth) in enumerate(pairs):
        assert truth.min() == 0 == pred.min() and truth.dtype == pred.dtype == np.int32
        tifffile.imwrite(folder / f"truth{i}.tif", truth)
        tifffile.imwrite(folder / f"pred{i}.tif", pred)
        frames.append(ctc_match(str(folder / f"truth{i}.tif"), str(folder / f"pred{i}.tif")))
    for chosen in [*([i] for i in range(len(pairs))), list(range(len(pairs)))]:
        parts = zip(*(frames[i] for i in chosen), strict=True)
        labels_ref, labels_comp, mapped_ref, mapped_comp, iou = map(list, parts)
        operations = count_acyclic_graph_correction_operations(None, None, labels_ref, labels_comp, mapped_ref, mapped_comp)
        total = Counts.of([scores[i] for i in chosen]).total()
        assert (total.named("splits"), total.named("missed"), total.named("spurious")) == (
            operations["NS"], operations["FN"], operations["FP"])
        assert float(evaluate(total, "DET")) == pytest.approx(det(**operations), abs=1e-12)
        assert float(evaluate(total, "SEG")) == pytest.approx(seg(labels_ref, iou), abs=1e-12)


def test_the_default_thresholds_are_those_of_the_literature() -> None:
    assert np.allclose(THRESHOLDS, np.arange(10) * 0.05 + 0.5)
