"""DSB 2018 folders: one mask per object, numbered by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoray.errors import BadRequest, ItemError
from tests.io.annotations.files import listed, picture, squares, write
from tests.realdata import data_folder


def dsb_image(root: Path, name: str, count: int) -> np.ndarray:
    """An image with `count` masks, whose names sort in another order than they were made; the labels expected."""
    picture(root / f"{name}/images/{name}.png")
    labels, expected = squares(count=count), np.zeros((20, 24), np.int32)
    for i in range(1, count + 1):
        write(root / f"{name}/masks/m{count - i}.png", np.uint8(255) * (labels == i))
        expected[labels == i] = count - i + 1
    return expected


@pytest.mark.parametrize("kind", ["auto", "dsb"])
def test_masks_become_one_label_image(tmp_path: Path, kind: str) -> None:
    expected = [dsb_image(tmp_path, name, count) for name, count in (("a1", 3), ("b2", 1), ("c3", 9))]
    images = listed(tmp_path, kind=kind)
    assert [image.image_id for image in images] == ["a1", "b2", "c3"]
    for image, labels in zip(images, expected, strict=True):
        found = image.read()[1]
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, labels)
        assert len(image.files) == 1 + labels.max() and "/images/" in image.files[0].uri
    again = listed(tmp_path.parent / tmp_path.name, kind=kind)  # above its root: the same ids
    assert [image.image_id for image in again] == ["a1", "b2", "c3"]


def test_overlapping_masks_leave_the_pixel_to_the_lower_number(tmp_path: Path) -> None:
    picture(tmp_path / "a/images/a.png", (4, 6))
    for number, columns in ((1, slice(0, 4)), (2, slice(2, 6))):
        mask = np.zeros((4, 6), np.uint8)
        mask[:, columns] = 255
        write(tmp_path / f"a/masks/{number}.png", mask)
    [image] = listed(tmp_path)
    np.testing.assert_array_equal(image.read_labels()[0], [1, 1, 1, 1, 2, 2])


def test_an_image_without_objects_has_an_empty_mask(tmp_path: Path) -> None:
    picture(tmp_path / "a/images/a.png")
    write(tmp_path / "a/masks/none.png", np.zeros((20, 24), np.uint8))
    [image] = listed(tmp_path)
    assert not image.read()[1].any()


def test_masks_of_one_bit(tmp_path: Path) -> None:
    picture(tmp_path / "a/images/a.png")
    (tmp_path / "a/masks").mkdir()
    Image.fromarray(squares(count=1) > 0).save(tmp_path / "a/masks/1.png")
    [image] = listed(tmp_path)
    np.testing.assert_array_equal(image.read_labels(), squares(count=1))


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    for name in "abcdefg":
        dsb_image(tmp_path, name, 1)
    for name in "bcd":
        (tmp_path / f"{name}/masks/m0.png").unlink()
    picture(tmp_path / "e/images/second.png")
    with pytest.raises(BadRequest) as caught:
        listed(tmp_path, kind="dsb")
    text = str(caught.value)
    assert "4 of 7" in text and "b: missing_labels" in text and "e: ambiguous_labels: 2 files in images/" in text
    write(tmp_path / "a/masks/other.png", squares().astype(np.uint8))
    write(tmp_path / "f/masks/other.png", np.zeros((20, 25), np.uint8))
    write(tmp_path / "g/masks/m0.png", np.zeros((21, 24), np.uint8))
    for image, reason in zip(listed(tmp_path, ids=("a", "f", "g")), ("bad_labels", "shape", "shape"), strict=True):
        with pytest.raises(ItemError) as error:
            image.read()
        assert error.value.reason == reason
    with pytest.raises(BadRequest, match="no <id>/images"):
        listed(tmp_path / "a/masks", kind="dsb")
    with pytest.raises(BadRequest, match="leave labels out"):
        listed(tmp_path, tmp_path, kind="dsb")


@pytest.mark.parametrize(("split", "images", "objects"), [("stage1_train", 124, 5315), ("stage1_test", 65, 4152)])
def test_all_of_stage1(split: str, images: int, objects: int) -> None:
    found = listed(data_folder("dsb2018_stage1") / split)
    assert len(found) == images
    assert sum(len(image.files) - 1 for image in found) == objects
    total = 0
    for image in found:
        pixels, labels = image.read()
        total += len(np.unique(labels[labels > 0]))
        assert pixels.pixels.shape[1:] == labels.shape and pixels.is_rgb8
    assert total == objects
