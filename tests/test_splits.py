"""The fixed splits: made again they are the same bytes, no field is split, and mosaics are found where there are some."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from benchmarks import dsb_splits
from benchmarks.mosaics import Picture, components, copies, is_whole, overlaps
from dinoray.io.annotations.listing import ids_of_file
from tests.io.annotations.files import listed
from tests.realdata import data_folder

FILE = Path(__file__).parent / "splits.json"
SPLITS = json.loads(FILE.read_text())
DSB = SPLITS["dsb2018"]


@pytest.mark.slow
def test_made_again_they_are_the_same_bytes() -> None:
    assert dsb_splits.text_of(dsb_splits.all_splits(data_folder("dsb2018_stage1").parent)) == FILE.read_text()


def test_every_image_is_in_one_split() -> None:
    splits = [set(DSB[name]) for name in ("train", "validation", "test", "copies_of_test")]
    assert [len(DSB[name]) for name in ("train", "validation", "copies_of_test")] == [566, 94, 4] and len(DSB["test"]) == 65
    assert sum(map(len, splits)) == len(set.union(*splits)) == 664 + 65
    assert set.union(*splits) == set(DSB["modality"]) == set(DSB["component"])


def test_no_component_is_split() -> None:
    component = DSB["component"]
    validating = {component[name] for name in DSB["validation"]}
    assert not validating & {component[name] for name in (*DSB["train"], *DSB["test"], *DSB["copies_of_test"])}
    assert len(set(component.values())) == DSB["components"]
    beside = {component[name] for name in DSB["train"]} | {component[name] for name in DSB["copies_of_test"]}
    assert set(DSB["test_beside_train"]) == {name for name in DSB["test"] if component[name] in beside}


def test_validation_is_15_percent_of_each_modality() -> None:
    total = Counter(DSB["modality"][name] for name in (*DSB["train"], *DSB["validation"]))
    validation = Counter(DSB["modality"][name] for name in DSB["validation"])
    assert set(total) == {"fluorescence", "histology", "brightfield"}
    for modality, number in total.items():
        assert abs(validation[modality] / number - 0.15) < 0.03


def test_the_trainers_read_them() -> None:
    folder = data_folder("dsb2018_stage1")
    reference = f"{FILE}#dsb2018/train"
    own = listed(folder / "stage1_train", ids=reference)
    rest = folder.parent / "dsb2018_stage1_rest"
    more = listed(rest / "images", rest / "labels", ids=reference)
    assert sorted(image.image_id for image in (*own, *more)) == ids_of_file(reference)
    cells = data_folder("usiigaci_phase_train")
    test = listed(f"{cells}/*/raw.tif", f"{cells}/*/instances_ids.png", ids=f"{FILE}#usiigaci/test")
    assert len(test) == len(SPLITS["usiigaci"]["test"]) == 7


def field(shape: tuple[int, int], seed: int) -> np.ndarray:
    """A smooth random field with some noise, 0..255."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.random(shape), 4)
    return (255 * (smooth - smooth.min()) / np.ptp(smooth) + rng.normal(0, 2, shape)).astype(np.float32)


def tiles(pixels: np.ndarray, name: str, side: int = 64) -> list[Picture]:
    return [Picture(f"{name}{y}{x}", pixels[side * y:side * (y + 1), side * x:side * (x + 1)], "fluorescence")
            for y in range(pixels.shape[0] // side) for x in range(pixels.shape[1] // side)]


def mosaics(pictures: list[Picture], **options) -> list[list[str]]:
    return [sorted(mosaic.values()) for mosaic in components(pictures, **options)[0]]


def test_tiles_find_their_field() -> None:
    pictures = [p for i, name in enumerate("ABCD") for p in tiles(field((128, 192), i), name)]
    pictures += [p for i in range(30) for p in tiles(field((64, 64), 100 + i), f"single{i:02d}")]
    order = np.random.default_rng(0).permutation(len(pictures))
    found = mosaics([pictures[i] for i in order])
    assert [group for group in found if len(group) > 1] == [[f"{name}{y}{x}" for y in (0, 1) for x in (0, 1, 2)] for name in "ABCD"]
    grids = [mosaic for mosaic in components(pictures)[0] if len(mosaic) > 1]
    assert all(is_whole(mosaic) and f"{name}{y}{x}" == mosaic[y, x]
               for mosaic, name in zip(grids, "ABCD", strict=True) for y in (0, 1) for x in (0, 1, 2))
    assert all(len(group) == 1 for group in mosaics(pictures, reverse=True))


def test_images_that_overlap() -> None:
    """Two crops that share 40 % of their area; others of the same kind, and sparse ones with one nucleus each, do not."""
    wide = field((200, 240), 3)
    a, b = Picture("a", wide[:160, :160], "fluorescence"), Picture("b", wide[40:, 75:235], "fluorescence")
    others = [Picture(f"o{i}", field((160, 160), 200 + i), "fluorescence") for i in range(20)]
    for i, (y, x) in enumerate([(30, 30), (90, 60), (100, 120)]):
        sparse = np.random.default_rng(i).normal(10, 1, (160, 160)).astype(np.float32)
        sparse[y:y + 12, x:x + 12] += 100
        others.append(Picture(f"s{i}", sparse, "fluorescence"))
    [found] = overlaps([*others, a, b])
    assert (found.a, found.b) == ("a", "b") and found.share == pytest.approx(0.4, abs=0.02)
    groups, whole = dsb_splits.fields([{(0, 0): "a", (0, 1): "c"}, {(0, 0): "b"}, {(0, 0): "d"}], [found])
    assert groups == [["a", "b", "c"], ["d"]] and whole == [False, False]


def test_empty_borders_join_nothing() -> None:
    blank = [Picture(name, np.full((64, 64), 7, np.float32), "fluorescence") for name in "ab"]
    blank[1].gray[20:40, 20:40] = 90
    assert mosaics(blank) == [["a"], ["b"]]


def test_other_sizes_and_modalities_are_not_compared() -> None:
    [a, b] = tiles(field((64, 128), 1), "A")
    assert mosaics([a, b]) == [["A00", "A01"]]
    assert mosaics([a, Picture("A01", b.gray, "histology")]) == [["A00"], ["A01"]]
    assert mosaics([a, Picture("A01", b.gray[:, :32], "fluorescence")]) == [["A00"], ["A01"]]


def test_copies_share_a_component_and_do_not_train() -> None:
    """The training image `copy` has the pixels of a test image, whose field also has the training tile A01."""
    a = tiles(field((128, 128), 1), "A")
    copy = Picture("copy", a[0].gray + np.float32(1), "fluorescence")
    train = [a[1], copy, *[p for i in range(20) for p in tiles(field((128, 128), 50 + i), f"T{i:02d}")]]
    made = dsb_splits.make(train, [a[0], a[2], a[3]])
    assert copies(overlaps([a[0], copy])) == {"copy": "A00"}
    assert made["copies_of_test"] == ["copy"] and made["test"] == ["A00", "A10", "A11"] == made["test_beside_train"]
    assert made["component"]["copy"] == made["component"]["A01"] == made["component"]["A00"]
    assert "A01" in made["train"] and len(made["validation"]) == 12
    assert made["components"] == 21 and len({made["component"][name] for name in made["validation"]}) == 3


@pytest.mark.parametrize(("pixels", "modality"), [
    (np.full((3, 8, 8), 20), "fluorescence"), (np.full((1, 8, 8), 230), "brightfield"),
    (np.stack([np.full((8, 8), v) for v in (180, 150, 210)]), "histology"),
])
def test_modality(pixels: np.ndarray, modality: str) -> None:
    assert dsb_splits.modality_of(pixels.astype(np.uint8)) == modality
