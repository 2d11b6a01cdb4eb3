"""COCO JSON: polygons as pycocotools draws them, run lengths, crowds, and files that are not what they say."""

from __future__ import annotations

import json
import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as pycoco

from dinoray.errors import BadRequest, ItemError
from dinoray.io.annotations.coco import draw
from dinoray.io.annotations.coco_json import Runs, read_coco
from dinoray.io.walk import LocalTree
from tests.io.annotations.files import listed, picture, squares, write

SHAPE = (20, 24)


def image(number: int, name: str, shape: tuple[int, int] = SHAPE) -> dict:
    return {"id": number, "file_name": name, "height": shape[0], "width": shape[1]}


def annotation(number: int, image_id: int, segmentation, **more) -> dict:
    return {"id": number, "image_id": image_id, "category_id": 1, "segmentation": segmentation, "iscrowd": 0} | more


def box(y0: float, x0: float, y1: float, x1: float) -> list[float]:
    """The polygon of a box, along the edges of its pixels."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def coco(folder: Path, images: list[dict], annotations, name: str = "train.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1}]}))
    return folder / name


def rle(mask: np.ndarray) -> dict:
    found = pycoco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def plain_rle(mask: np.ndarray) -> dict:
    flat = mask.T.ravel().astype(bool)
    counts = np.diff([0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1), flat.size]).tolist()
    counts = [0, *counts] if flat[0] else counts
    return {"size": list(mask.shape), "counts": counts}


def test_all_forms_of_outlines(tmp_path: Path) -> None:
    """A polygon, one of two parts, run lengths in both forms; a crowd; an image without objects."""
    expected = np.zeros(SHAPE, np.int32)
    expected[1:4, 1:5] = 1
    expected[6:9, 1:3] = expected[6:9, 5:7] = 2
    expected[12:15, 2:20] = 3
    expected[16:19, 0:4] = 4
    for name in ("a", "b"):
        picture(tmp_path / f"images/{name}.tif")
    path = coco(tmp_path, [image(7, "a.tif"), image(3, "b.tif")], [
        annotation(1, 7, [box(1, 1, 4, 5)]),
        annotation(2, 7, rle(np.ones(SHAPE)), iscrowd=1),
        annotation(3, 7, [box(6, 1, 9, 3), box(6, 5, 9, 7)]),
        annotation(4, 7, rle(expected == 3)),
        annotation(5, 7, plain_rle(expected == 4)),
    ])
    for images in (listed(tmp_path / "images", path), listed(tmp_path), listed(tmp_path, kind="coco")):
        assert [i.image_id.rpartition("/")[2] for i in images] == ["a", "b"]
        pixels, labels = images[0].read()
        assert labels.dtype == np.int32 and labels.flags.c_contiguous and pixels.pixels.shape == (1, *SHAPE)
        np.testing.assert_array_equal(labels, expected)
        assert not images[1].read()[1].any()
        assert [Path(file.uri).name for file in images[0].files] == ["a.tif", "train.json"]


def test_a_dict_of_annotations(tmp_path: Path) -> None:
    """As in the single-cell-type files of LIVECell."""
    picture(tmp_path / "a.tif")
    coco(tmp_path, [image(1, "a.tif")], {"11": annotation(11, 1, [box(1, 1, 4, 5)])})
    assert listed(tmp_path)[0].read_labels().sum() == 12


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(labels=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=16), elements=st.integers(0, 4)),
       form=st.sampled_from(["rle", "plain", "polygons"]))
def test_any_label_image_survives(tmp_path: Path, labels: np.ndarray, form: str) -> None:
    """Run lengths, and polygons along the edges of pixels, are exact."""
    def outline(mask: np.ndarray):
        if form != "polygons":
            return rle(mask) if form == "rle" else plain_rle(mask)
        return [box(y, x, y + 1, x + 1) for y, x in np.argwhere(mask).tolist()]

    ids = [i for i in np.unique(labels).tolist() if i]
    path = coco(tmp_path, [image(1, "a.tif", labels.shape)],
                [annotation(i, 1, outline(labels == value)) for i, value in enumerate(ids)])
    found = draw(read_coco(LocalTree().ref(str(path))).outlines.get(1, []), labels.shape, "here")
    expected = np.zeros_like(labels)
    for number, value in enumerate(ids, 1):
        expected[labels == value] = number
    np.testing.assert_array_equal(found, expected)


@given(st.lists(st.lists(st.tuples(st.floats(-5, 35), st.floats(-5, 35)), min_size=3, max_size=8), min_size=1, max_size=3))
def test_polygons_are_drawn_as_pycocotools_draws_them(parts: list[list[tuple[float, float]]]) -> None:
    flat = [[value for point in part for value in point] for part in parts]
    wanted = pycoco.decode(pycoco.merge(pycoco.frPyObjects(flat, 30, 28)))
    packed = tuple(np.array(part, np.float64).tobytes() for part in flat)
    np.testing.assert_array_equal(draw([packed], (30, 28), "here"), wanted)


def test_the_smaller_of_two_overlapping_objects_keeps_the_pixel(tmp_path: Path) -> None:
    picture(tmp_path / "a.tif")
    coco(tmp_path, [image(1, "a.tif")], [
        annotation(1, 1, [box(5, 5, 8, 8)]), annotation(2, 1, [box(0, 0, 20, 24)]),  # the large one comes last
        annotation(3, 1, [box(5, 7, 8, 10)]), annotation(4, 1, [box(5, 7, 8, 10)]),
    ])
    labels = listed(tmp_path)[0].read_labels()
    assert labels[5, 4:12].tolist() == [2, 1, 1, 1, 3, 3, 2, 2] and not (labels == 4).any()


def test_objects_without_an_area_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two points are no polygon (pycocotools would take their four numbers for a box)."""
    picture(tmp_path / "a.tif")
    coco(tmp_path, [image(1, "a.tif")], [annotation(1, 1, [[1, 1, 9, 9]]), annotation(2, 1, [[1, 1, 9, 9], box(1, 1, 4, 5)])])
    with caplog.at_level(logging.INFO):
        labels = listed(tmp_path)[0].read_labels()
    assert np.unique(labels).tolist() == [0, 2] and (labels == 2).sum() == 12
    assert "1 objects without an area" in caplog.text


@pytest.mark.parametrize("segmentation", [
    [], None, {"size": [20, 23], "counts": [480]}, {"size": [20, 24], "counts": [3]}, {"size": [20, 24], "counts": "zzz"},
    {"size": [20, 24], "counts": [-480, 960]}, [box(0, 0, 1e9, 4)], [[0, 0, float("nan"), 1, 2, 2]],
    [[0, 0, float("inf"), 1, 2, 2]],
])
def test_outlines_that_cannot_be_drawn_cost_one_image(tmp_path: Path, segmentation) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.tif")
    coco(tmp_path, [image(1, "a.tif"), image(2, "b.tif")], [annotation(1, 1, segmentation), annotation(2, 2, [box(1, 1, 4, 5)])])
    bad, good = listed(tmp_path)
    with pytest.raises(ItemError) as caught:
        bad.read()
    assert caught.value.reason == "bad_labels" and "a.tif, object 1" in caught.value.where
    assert good.read()[1].max() == 1


@pytest.mark.parametrize(("text", "what"), [
    ("", "no JSON"), ("{", "no JSON"), ("[" * 100_000, "no JSON"), ("\x00\xff", "no JSON"), ("[]", "no list `images`"),
    ('{"images": []}', "no `annotations`"), ('{"images": {}, "annotations": []}', "no list `images`"),
    ('{"images": [], "annotations": 3}', "without image_id"), ('{"images": [], "annotations": [{"id": 3}]}', "without image_id"),
    ('{"images": [{"id": 1}], "annotations": []}', "an image without id, file_name"),
    ('{"images": [3], "annotations": []}', "an image without id"),
    ('{"images": [{"id": 1, "file_name": "a.tif", "height": 0, "width": 4}], "annotations": []}', "0 x 4 pixels"),
    ('{"images": [{"id": [], "file_name": "a.tif", "height": 2, "width": 4}], "annotations": []}', "image \\[\\]"),
    ('{"images": [], "annotations": [{"image_id": 4, "segmentation": []}]}', "not among `images`: \\[4\\]"),
    ('{"images": [], "annotations": [{"image_id": [4], "segmentation": []}]}', "belongs to image \\[4\\]"),
])
def test_files_that_are_no_coco(tmp_path: Path, text: str, what: str) -> None:
    picture(tmp_path / "a.tif")
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadRequest, match=what):
        listed(tmp_path, tmp_path / "x.json")


@pytest.mark.parametrize(("segmentation", "what"), [
    ([[1, 2, 3, 4, 5]], "odd number"), ([[1, 2, "x", 4]], ""), ([1, 2, 3, 4], ""), ("x", ""), ({"counts": [4]}, "size"),
    ({"size": [2], "counts": [4]}, ""), ({"size": [2, 2], "counts": [0.5]}, ""), ({"size": [2, 2], "counts": "\u00e4"}, ""),
])
def test_segmentations_that_are_none(tmp_path: Path, segmentation, what: str) -> None:
    picture(tmp_path / "a.tif")
    coco(tmp_path, [image(4, "a.tif")], [annotation(8, 4, segmentation)])
    with pytest.raises(BadRequest, match=f"segmentation of annotation 8 is neither polygons nor run lengths.*{what}"):
        listed(tmp_path)


def test_images_that_are_there_twice_or_not_at_all(tmp_path: Path) -> None:
    for name in ("x/a.tif", "y/a.tif", "z/b.tif"):
        picture(tmp_path / "images" / name)
    images = tmp_path / "images"
    two = [image(1, "x/a.tif"), image(2, "y/a.tif"), image(3, "old/b.tif")]
    assert [i.image_id for i in listed(images, coco(tmp_path, two, []))] == ["x/a", "y/a", "z/b"]
    with pytest.raises(BadRequest, match="1 of 2 images .*ambiguous_images: 2 files"):
        listed(images, coco(tmp_path, [image(1, "a.tif"), image(2, "b.tif")], []))
    with pytest.raises(BadRequest, match="6 of 7 .*c0: missing.*and 1 more"):
        listed(images, coco(tmp_path, [image(i, f"c{i}.tif") for i in range(6)] + [image(9, "b.tif")], []))
    with pytest.raises(BadRequest, match="an image file is there twice"):
        listed(images, coco(tmp_path, [image(1, "b.tif"), image(2, "b.tif")], []))
    with pytest.raises(BadRequest, match="an image id is there twice"):
        listed(images, coco(tmp_path, [image(1, "b.tif"), image(1, "x/a.tif")], []))
    assert [i.image_id for i in listed(images, coco(tmp_path, two[:1], []))] == ["x/a"]  # the JSON decides


def test_which_json(tmp_path: Path) -> None:
    picture(tmp_path / "a.tif")
    coco(tmp_path, [image(1, "a.tif")], [], "train.json"), coco(tmp_path, [image(1, "a.tif")], [], "val.json")
    with pytest.raises(BadRequest, match="2 JSON files: train.json, val.json"):
        listed(tmp_path)
    assert len(listed(tmp_path, tmp_path / "val.json")) == 1
    with pytest.raises(BadRequest, match="no such file"):
        listed(tmp_path, tmp_path / "test.json")


def test_notes_in_json_do_not_make_a_folder_coco(tmp_path: Path) -> None:
    picture(tmp_path / "a.tif"), write(tmp_path / "a_masks.tif", squares())
    (tmp_path / "notes.json").write_text('{"microscope": "x"}')
    assert listed(tmp_path)[0].read_labels().max() == 3
    coco(tmp_path, [image(1, "a.tif")], [])
    with pytest.raises(BadRequest, match="cellpose or coco"):
        listed(tmp_path)


def test_sides_that_differ_from_the_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.tif")
    coco(tmp_path, [image(1, "a.tif", (20, 25))], [annotation(1, 1, [box(1, 1, 4, 5)])])
    [found] = listed(tmp_path)
    with pytest.raises(ItemError) as caught:
        found.read()
    assert caught.value.reason == "shape"


def test_a_changed_file_is_parsed_again(tmp_path: Path) -> None:
    picture(tmp_path / "a.tif")
    coco(tmp_path, [image(1, "a.tif")], [annotation(1, 1, [box(1, 1, 4, 5)])])
    assert listed(tmp_path)[0].read_labels().sum() == 12
    coco(tmp_path, [image(1, "a.tif")], [annotation(1, 1, [box(1, 1, 4, 5)]), annotation(2, 1, [box(8, 1, 9, 2)])])
    assert listed(tmp_path)[0].read_labels().max() == 2


def test_memory_of_many_annotations(tmp_path: Path) -> None:
    """5,000 cells of 40 points: what stays is little more than their coordinates."""
    rng = np.random.default_rng(0)
    annotations = [annotation(i, i % 50, [np.round(rng.random(80) * 500, 2).tolist()]) for i in range(5_000)]
    path = coco(tmp_path, [image(i, f"{i}.tif", (520, 704)) for i in range(50)], annotations)
    size = path.stat().st_size
    del annotations
    tracemalloc.start()
    found = read_coco(LocalTree().ref(str(path)))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    coordinates = 5_000 * 80 * 8
    assert sum(map(len, found.outlines.values())) == 5_000
    assert kept < 1.4 * coordinates and peak < kept + 2.5 * size


def test_outlines_of_nothing() -> None:
    assert not draw([], (3, 4), "here").any() and draw([], (3, 4), "here").shape == (3, 4)
    assert not draw([()], (3, 4), "here").any()
    assert (draw([Runs(b"0<", (3, 4))], (3, 4), "here") == 1).all()
