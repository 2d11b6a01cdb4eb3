"""Images in blocks: the whole image's cells, ids without gaps, and memory that does not grow with the image."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from dinoray.errors import BadRequest
from dinoray.vision.cell_blocks import overlap_for, sample_pixels, segment_blocks
from dinoray.vision.instances import instances
from dinoray.vision.segmenter import Segmenter
from dinoray.vision.stitching import Box
from dinoray.vision.targets import distance_map
from tests.vision.distance_models import seeing_model, small_config


@pytest.fixture(autouse=True)
def single(one_thread: None) -> None:
    """One thread."""


def blobs(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Label image of smooth blobs of some 8 to 20 px, several of them touching."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 3)
    smooth = (noise - noise.mean()) / noise.std()
    return instances(np.clip(smooth / 3, 0, 1).astype(np.float32), peak=0.35, fill=0.1)


class Canvas:
    """Reads boxes of an image [C, Y, X] and takes labels, both with a record of what was asked."""

    def __init__(self, pixels: np.ndarray):
        self.pixels, self.labels = pixels, np.full(pixels.shape[1:], -1, np.int32)
        self.read_boxes: list[Box] = []
        self.written: list[Box] = []

    def read(self, box: Box) -> np.ndarray:
        self.read_boxes.append(box)
        return self.pixels[:, box.y0:box.y1, box.x0:box.x1]

    def write(self, box: Box, labels: np.ndarray) -> None:
        assert labels.dtype == np.int32
        assert (self.labels[box.y0:box.y1, box.x0:box.x1] == -1).all(), "every pixel once"
        self.labels[box.y0:box.y1, box.x0:box.x1] = labels
        self.written.append(box)


def same_objects(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to the ids' names."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return (a > 0).tolist() == (b > 0).tolist() and len(set(pairs[0])) == len(set(pairs[1])) == pairs.shape[1]


@pytest.mark.parametrize(("shape", "block_px", "overlap_px"), [((200, 260), 96, 80), ((200, 260), 64, 64), ((130, 90), 500, 64),
                                                               ((97, 300), 48, 96)])
def test_blocks_give_the_cells_of_the_whole_image(shape: tuple[int, int], block_px: int, overlap_px: int, tmp_path: Path) -> None:
    truth = blobs(shape)
    map_ = distance_map(truth)[None]
    whole = instances(map_[0])
    canvas = Canvas(map_)
    count = segment_blocks(canvas.read, *shape, lambda pixels: instances(pixels[0]), block_px=block_px, overlap_px=overlap_px,
                           write=canvas.write, scratch=tmp_path)
    assert same_objects(canvas.labels, whole)
    assert count == whole.max() > 10
    assert np.array_equal(np.unique(canvas.labels), np.arange(count + 1))
    assert canvas.written == sorted(canvas.written), "row by row"
    assert max(max(box.shape) for box in canvas.read_boxes) <= block_px + overlap_px
    assert list(tmp_path.iterdir()) == [], "nothing stays behind"


def test_with_a_segmenter_that_does_not_see_the_blocks_border() -> None:
    """Windows lie elsewhere in every block; a map that is its input does not care, and the cells are the image's."""
    truth = blobs((190, 230), seed=3)
    image = np.repeat(distance_map(truth)[None], 3, axis=0)
    ours = Segmenter(seeing_model(), small_config(), token_budget=1000)
    canvas = Canvas(image)
    count = segment_blocks(canvas.read, 190, 230, ours.segment, block_px=100, overlap_px=overlap_for(12), write=canvas.write)
    assert count == ours.segment(image).max()
    assert same_objects(canvas.labels, ours.segment(image))


def test_without_an_overlap_cells_are_cut_at_seams() -> None:
    """Why blocks overlap."""
    truth = np.zeros((40, 40), np.int32)
    truth[10:30, 10:30] = 5
    for overlap, cells in ((0, 4), (80, 1)):
        canvas = Canvas(truth[None])
        assert segment_blocks(canvas.read, 40, 40, lambda pixels: pixels[0], block_px=20, overlap_px=overlap,
                              write=canvas.write) == cells


def test_an_image_without_cells_and_one_of_a_pixel() -> None:
    canvas = Canvas(np.zeros((1, 50, 70), np.float32))
    assert segment_blocks(canvas.read, 50, 70, lambda p: instances(p[0]), block_px=32, overlap_px=8, write=canvas.write) == 0
    assert (canvas.labels == 0).all()
    canvas = Canvas(np.ones((1, 1, 1), np.float32))
    assert segment_blocks(canvas.read, 1, 1, lambda p: instances(p[0]), block_px=32, overlap_px=8, write=canvas.write) == 1


def test_an_error_in_a_block_leaves_nothing_behind(tmp_path: Path) -> None:
    canvas, calls = Canvas(np.zeros((1, 50, 70), np.float32)), []

    def breaks(pixels: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("device lost")
        return np.zeros(pixels.shape[1:], np.int32)

    with pytest.raises(RuntimeError, match="device lost"):
        segment_blocks(canvas.read, 50, 70, breaks, block_px=32, overlap_px=8, write=canvas.write, scratch=tmp_path)
    assert canvas.written == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadRequest, match="outer"):
        segment_blocks(canvas.read, 50, 70, lambda p: np.zeros((3, 3), np.int32), block_px=32, overlap_px=8, write=canvas.write)


def test_a_sample_of_the_pixels() -> None:
    small = np.arange(2 * 300 * 500, dtype=np.uint16).reshape(2, 300, 500)
    assert np.array_equal(sample_pixels(Canvas(small).read, 300, 500), small.reshape(2, -1))
    asked = []

    def read(box: Box) -> np.ndarray:
        asked.append(box)
        y, x = np.mgrid[box.y0:box.y1, box.x0:box.x1]
        return np.stack([y, x]).astype(np.float32)

    found = sample_pixels(read, 100_000, 30_000)
    assert found.shape == (2, 64 * 256 * 256)
    assert (found.min(), found[0].max(), found[1].max()) == (0, 99_999, 29_999)
    assert np.percentile(found[0], 50) == pytest.approx(50_000, rel=0.02)
    assert len(set(asked)) == 64


def test_overlaps_follow_the_cells() -> None:
    assert overlap_for(None) == 512
    assert overlap_for(100) == 600
    assert overlap_for(3) == 128
    assert overlap_for(30.1) % 2 == 0


MEASURE = textwrap.dedent("""
    import json, resource, sys
    import numpy as np
    from dinoray.vision.cell_blocks import segment_blocks
    from dinoray.vision.instances import instances
    side, block = int(sys.argv[1]), int(sys.argv[2])
    y, x = np.mgrid[:16, :16] - 7.5
    disc = np.clip(1 - np.hypot(y, x) / 6, 0, 1).astype(np.float32)
    def read(box):
        rows, columns = np.arange(box.y0, box.y1) % 16, np.arange(box.x0, box.x1) % 16
        return disc[rows[:, None], columns[None, :]][None]
    segment = lambda pixels: instances(pixels[0])
    segment_blocks(read, block, block, segment, block_px=block, overlap_px=64, write=lambda box, labels: None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = segment_blocks(read, side, side, segment, block_px=block, overlap_px=64, write=lambda box, labels: None)
    print(json.dumps({"cells": count, "grown": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024}))
""")


def test_memory_grows_with_the_block_and_not_with_the_image() -> None:
    """An image of 3,072 px takes little more than a block of 512 px of it: less than its labels or its map alone would."""
    done = subprocess.run([sys.executable, "-c", MEASURE, "3072", "512"], capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["cells"] == (3072 // 16) ** 2
    assert found["grown"] < 3072 * 3072 * 4 / 2, "an int32 copy of the image would show"
