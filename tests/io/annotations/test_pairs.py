"""Label images find their images by name; what is none, or not theirs, is refused with its reason."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinoray.errors import BadRequest, ItemError
from dinoray.io.annotations import digest
from tests.io.annotations.files import listed, picture, squares, write


def ids(images) -> list[str]:
    return [image.image_id for image in images]


@pytest.fixture
def one(tmp_path: Path):
    """Reads the labels that are written beside one image: `one(pixels, "tif")`."""
    def read(labels: np.ndarray, extension: str = "tif", **options) -> np.ndarray:
        picture(tmp_path / "img/a.tif", labels.shape[-2:] if labels.ndim == 2 else labels.shape[:2])
        shutil.rmtree(tmp_path / "lab", ignore_errors=True)
        write(tmp_path / f"lab/a.{extension}", labels, **options)
        [image] = listed(tmp_path / "img", tmp_path / "lab")
        found = image.read()[1]
        assert found.dtype == np.int32 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, image.read_labels())
        return found
    return read


def reason(call, *args, **options) -> str:
    with pytest.raises(ItemError) as caught:
        call(*args, **options)
    assert caught.value.where and str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("suffix", ["", "_mask", "_masks", "_label", "_labels", "_cp_masks", "_seg"])
def test_two_folders(tmp_path: Path, suffix: str) -> None:
    for i, name in enumerate(("p1/a", "p2/a", "b")):
        picture(tmp_path / f"img/{name}.tif", seed=i)
        write(tmp_path / f"lab/{name}{suffix}.png", squares(count=i + 1))
    images = listed(tmp_path / "img", tmp_path / "lab")
    assert ids(images) == ["b", "p1/a", "p2/a"] and [image.read_labels().max() for image in images] == [3, 1, 2]
    assert [image.group for image in images] == [".", "p1", "p2"]
    pixels, labels = images[0].read()
    np.testing.assert_array_equal(pixels.pixels[0], tifffile.imread(tmp_path / "img/b.tif"))
    assert pixels.pixels.dtype == np.uint16
    np.testing.assert_array_equal(labels, squares())
    assert [Path(file.uri).name for file in images[0].files] == ["b.tif", f"b{suffix}.png"]


def test_folders_that_each_hold_one_image_of_the_same_name(tmp_path: Path) -> None:
    for i in (1, 2):
        picture(tmp_path / f"set{i}/raw.tif")
        picture(tmp_path / f"set{i}/phase.png")
        write(tmp_path / f"set{i}/instances_ids.png", squares(count=i))
    picture(tmp_path / "deep/img/raw.tif")
    write(tmp_path / "deep/lab/ids.tif", squares(count=4))
    images = listed(f"{tmp_path}/set*/raw.tif", f"{tmp_path}/*/instances_ids.png", kind="pairs")
    assert ids(images) == ["set1", "set2"] and [image.read_labels().max() for image in images] == [1, 2]
    [image] = listed(f"{tmp_path}/*/img/raw.tif", f"{tmp_path}/*/lab/ids.tif")
    assert image.image_id == "deep" and image.read_labels().max() == 4
    [image] = listed(tmp_path / "deep/img/raw.tif", tmp_path / "deep/lab/ids.tif")
    assert image.image_id == "raw" and image.read_labels().max() == 4
    (tmp_path / "set2/instances_ids.png").unlink()
    with pytest.raises(BadRequest, match="set2.*no instances_ids.png"):
        listed(f"{tmp_path}/*/raw.tif", f"{tmp_path}/*/instances_ids.png")


@pytest.mark.parametrize(("image", "labels"), [
    ("000_img.png", "000_masks.png"), ("x.tif", "x_cp_masks.png"), ("x.tif", "x_masks.tif"),
])
@pytest.mark.parametrize("kind", ["auto", "cellpose"])
def test_cellpose_folders(tmp_path: Path, image: str, labels: str, kind: str) -> None:
    picture(tmp_path / image)
    write(tmp_path / labels, squares())
    [found] = listed(tmp_path, kind=kind)
    assert found.image_id == Path(image).stem and found.read()[1].max() == 3
    assert [Path(file.uri).name for file in found.files] == [image, labels]


def test_cellpose_names_do_not_mix(tmp_path: Path) -> None:
    for i in range(12):
        picture(tmp_path / f"{i:03d}_img.png", seed=i)
        write(tmp_path / f"{i:03d}_masks.png", squares(count=i + 1))
    images = listed(tmp_path)
    assert [image.read_labels().max() for image in images] == list(range(1, 13))


def test_missing_pairs_are_named(tmp_path: Path) -> None:
    for name in "abcdefgh":
        picture(tmp_path / f"img/{name}.tif")
    write(tmp_path / "lab/h.tif", squares())
    with pytest.raises(BadRequest) as caught:
        listed(tmp_path / "img", tmp_path / "lab")
    text = str(caught.value)
    assert "7 of 8" in text and "and 2 more" in text and "f:" not in text
    assert all(f"{name}: missing_labels" in text for name in "abcde")
    assert ids(listed(tmp_path / "img", tmp_path / "lab", ids=("h",))) == ["h"]  # the others are not asked for
    with pytest.raises(BadRequest, match="no image has a label image"):
        listed(tmp_path / "img", tmp_path / "img/a.tif")


def test_two_images_of_one_id(tmp_path: Path) -> None:
    picture(tmp_path / "img/a.tif"), picture(tmp_path / "img/a.png")
    write(tmp_path / "lab/a.tif", squares())
    with pytest.raises(BadRequest, match="extension only.*: a"):
        listed(tmp_path / "img", tmp_path / "lab")


def test_two_label_images_of_one_image(tmp_path: Path) -> None:
    picture(tmp_path / "img/a.tif"), picture(tmp_path / "img/b.tif")
    for name in ("a_masks", "a_labels", "b"):
        write(tmp_path / f"lab/{name}.tif", squares())
    with pytest.raises(BadRequest, match="ambiguous_labels"):
        listed(tmp_path / "img", tmp_path / "lab")


# ---------------------------------------------------------------- what label images hold


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "uint32", "int64", "uint64", "float32", "float64"])
def test_every_dtype_of_whole_numbers(one, dtype: str) -> None:
    labels = squares() * 7
    np.testing.assert_array_equal(one(labels.astype(dtype)), labels)


def test_empty_giant_and_single_pixel_objects(one) -> None:
    assert not one(np.zeros((9, 9), np.uint8)).any()
    assert (one(np.full((300, 300), 1, np.uint8)) == 1).all()
    points = np.zeros((9, 9), np.uint16)
    points[::2, ::2] = np.arange(1, 26).reshape(5, 5)
    np.testing.assert_array_equal(one(points), points)


def test_70_000_objects(one) -> None:
    labels = np.arange(1, 70_001, dtype=np.uint32).reshape(250, 280)
    np.testing.assert_array_equal(one(labels), labels)
    np.testing.assert_array_equal(one(labels.astype(np.float64)), labels)


def test_ids_beyond_int32_are_numbered_anew(one) -> None:
    small = squares().astype(np.int64)
    np.testing.assert_array_equal(one(small * 2**40), small)
    np.testing.assert_array_equal(one(np.where(small > 0, small, 4) + 2**40), np.where(small > 0, small, 4))  # no background


def test_three_equal_channels_are_one(one) -> None:
    labels = squares().astype(np.uint8)
    np.testing.assert_array_equal(one(np.dstack([labels] * 3), "png"), labels)
    np.testing.assert_array_equal(one(np.dstack([labels] * 3), photometric="rgb"), labels)
    colours = np.dstack([labels * 80, labels * 20, labels])
    assert reason(one, colours, "png") == "bad_labels"


@pytest.mark.parametrize("labels", [
    squares() + 0.5, squares() / 3.0, np.where(squares() == 1, np.nan, squares()), np.where(squares() == 1, np.inf, squares()),
    squares() * float(2**31), -squares().astype(np.float32), -squares().astype(np.int16),
    squares().astype(np.uint64) + np.uint64(2**63),
])
def test_values_that_are_no_ids(one, labels: np.ndarray) -> None:
    assert reason(one, labels) == "bad_labels"


def test_binary_masks_are_not_one_object(one) -> None:
    assert reason(one, (squares(count=9) > 0) * np.uint8(255)) == "bad_labels"
    assert reason(one, (squares(count=9) > 0) * np.float32(1)) == "bad_labels"
    assert one((squares(count=3) > 0) * np.uint8(255)).max() == 255  # one object in three pieces may be meant


def test_damaged_files(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"img/{name}.tif"), write(tmp_path / f"lab/{name}.tif", squares())
    (tmp_path / "lab/a.tif").write_bytes(b"")
    (tmp_path / "img/b.tif").write_bytes(b"II*\0junk")
    write(tmp_path / "lab/c.tif", squares((20, 23)))
    images = listed(tmp_path / "img", tmp_path / "lab")
    assert [reason(image.read) for image in images][::2] == ["empty", "shape"]
    assert reason(images[1].read) in ("decode", "truncated")
    assert images[2].read_labels().shape == (20, 23)  # alone, they cannot know
    (tmp_path / "lab/c.tif").unlink()
    assert reason(images[2].read) == "missing"
    write(tmp_path / "lab/c.tif", np.zeros((20, 99), np.uint8))
    assert reason(images[2].read) == "changed"


# ---------------------------------------------------------------- channels, sizes, identity


def test_one_channel_by_number_and_name(tmp_path: Path) -> None:
    planes = np.stack([squares() * 10, squares() * 20, squares() * 30])
    tifffile.imwrite(tmp_path / "a.ome.tif", planes, ome=True, photometric="minisblack",
                     metadata={"axes": "CYX", "Channel": {"Name": ["DNA", "ER", "1"]}, "PhysicalSizeX": 0.5,
                               "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"})
    write(tmp_path / "a_masks.tif", squares())
    for channel, factor in (("ER", 20), (0, 10), ("2", 30), ("1", 30)):  # a name goes before a number
        [image] = listed(tmp_path, channel=channel)
        pixels, _ = image.read()
        np.testing.assert_array_equal(pixels.pixels, planes[factor // 10 - 1][None])
        assert pixels.pixel_size_um == pytest.approx(0.5) and image.pixel_size_um is None
    [image] = listed(tmp_path, pixel_size_um=2.0)
    assert image.pixel_size_um == 2.0 and image.read()[0].pixel_size_um == 2.0 and len(image.read()[0].pixels) == 3
    [image] = listed(tmp_path, channel="Mito")
    assert reason(image.read) == "channel_count"
    [image] = listed(tmp_path, channel="3")
    assert reason(image.read) == "channel_count"


def test_one_file_per_channel(tmp_path: Path) -> None:
    for channel in (1, 2):
        picture(tmp_path / f"img/r01c01f01p01-ch{channel}sk1fk1fl1.tiff", seed=channel)
    write(tmp_path / "lab/r01c01f01p01-ch1sk1fk1fl1.tif", squares())
    [image] = listed(tmp_path / "img", tmp_path / "lab", kind="pairs")
    pixels, labels = image.read()
    assert pixels.pixels.shape == (2, 20, 24) and labels.max() == 3 and len(image.files) == 3


def test_digest_and_pickle(tmp_path: Path) -> None:
    picture(tmp_path / "a.tif"), write(tmp_path / "a_masks.tif", squares())
    first = listed(tmp_path)
    assert digest(first) == digest(listed(tmp_path)) == digest(pickle.loads(pickle.dumps(first)))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(first))[0].read_labels(), squares())
    write(tmp_path / "a_masks.tif", squares(count=4))
    assert digest(listed(tmp_path)) != digest(first) and digest(first[:0]) != digest(first)


def test_memory_urls() -> None:
    import io

    import fsspec

    for path, pixels in (("img/a.png", squares()), ("lab/a.png", squares())):
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        fsspec.filesystem("memory").pipe(f"/annotations/{path}", buffer.getvalue())
    [image] = listed("memory://annotations/img", "memory://annotations/lab")
    assert image.image_id == "a" and image.read()[1].max() == 3
