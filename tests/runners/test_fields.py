"""The limits of an image that is segmented in blocks are those of the whole image."""

from __future__ import annotations

import numpy as np
import pytest

from dinoray.config import SegmentCellsJob
from dinoray.io.decoded import DecodedImage
from dinoray.io.images import LoadedItem
from dinoray.io.items import FileRef, Item
from dinoray.runners.fields import Field, choose
from dinoray.vision.segmentation_input import planes
from dinoray.vision.stitching import Box
from tests.conftest import texture

PERCENTS = (0.1, 99.9)


def field_of(image: DecodedImage, channel: str) -> Field:
    """The image as it comes from the decode threads, scaled by its own percentiles."""
    job = SegmentCellsJob(sources=("in",), out="out", checkpoint="c", channel=channel, scaling="image")
    item = Item("a.tif", (FileRef("a.tif", 1, "1"),), group="g")
    return choose(item, LoadedItem(image, 0.0, 0.0, 1), job, PERCENTS, None)


def sparse(dtype: str) -> np.ndarray:
    """[1, 40, 3000] of one value but for a strip of rising ones that lies between two of the sampled boxes."""
    pixels = np.full((1, 40, 3000), 7, dtype)
    pixels[0, :, 270:330] = np.arange(60) + 20
    return pixels


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64"])
def test_cells_that_escape_a_sample_still_set_the_limits(dtype: str) -> None:
    image = DecodedImage(sparse(dtype))
    found = field_of(image, "auto")
    found.fix_limits()
    seen = found.seen()
    assert len(np.unique(seen)) > 50, "not black and white"
    np.testing.assert_allclose(seen, planes(image), atol=1e-6)
    assert np.array_equal(found.seen(Box(3, 250, 17, 400)), seen[:, 3:17, 250:400])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_limits_of_8_and_16_bits_are_exact(dtype: str) -> None:
    pixels = texture((1, 300, 2600), 4, dtype)
    pixels[:, :, 2270:2300] = 0  # between two sampled boxes
    image = DecodedImage(pixels)
    found = field_of(image, "auto")
    found.fix_limits()
    assert found.seen().tobytes() == planes(image).tobytes()


@pytest.mark.parametrize(("channel", "is_rgb8"), [("rgb", False), ("rgb=A,B,C", False), ("mean", False), ("x=C,A,A", False),
                                                  ("auto", True), ("rgb", True), ("mean", True), ("rgb=A,B,C", True), ("B", True)])
def test_channels_share_limits_as_in_a_small_image(channel: str, is_rgb8: bool) -> None:
    """Three channels of very different brightness."""
    pixels = np.stack([texture((50, 60), n, "uint16") // 2**n for n in (2, 5, 8)])
    image = DecodedImage((pixels // 64).astype(np.uint8) if is_rgb8 else pixels, ("A", "B", "C"), None, is_rgb8)
    found = field_of(image, channel)
    found.fix_limits()
    assert found.seen().tobytes() == planes(image, channels=channel).tobytes()
