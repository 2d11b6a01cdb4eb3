"""Layouts are told from names, ids are chosen, and shares of sources are what was asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest
from dinoray.io.annotations import sample_weights
from tests.io.annotations.files import listed, picture, squares, write
from tests.io.annotations.test_dsb import dsb_image
from tests.realdata import data_folder


def test_a_folder_that_fits_no_layout_is_asked_about(tmp_path: Path) -> None:
    picture(tmp_path / "a.tif"), picture(tmp_path / "b.tif")
    with pytest.raises(BadRequest, match="no layout is recognised") as caught:
        listed(tmp_path)
    assert all(kind in str(caught.value) for kind in ("pairs", "cellpose", "dsb", "coco", "ctc"))


def test_a_folder_that_fits_two_layouts_is_asked_about(tmp_path: Path) -> None:
    dsb_image(tmp_path, "a", 2)
    picture(tmp_path / "x.tif"), write(tmp_path / "x_masks.tif", squares())
    with pytest.raises(BadRequest, match="may be dsb or cellpose"):
        listed(tmp_path)
    assert [image.image_id for image in listed(tmp_path, kind="dsb")] == ["a"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no such file or folder"):
        listed(tmp_path / "none")
    with pytest.raises(BadRequest, match="no image"):
        listed(tmp_path)


def test_ids(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"{name}.tif"), write(tmp_path / f"{name}_masks.tif", squares())
    (tmp_path / "s.json").write_text(json.dumps({"set": {"train": ["c", "a", "elsewhere"], "n": 3, "other": ["z"]}}))
    assert [image.image_id for image in listed(tmp_path, ids=["c", "a"])] == ["a", "c"]
    assert [image.image_id for image in listed(tmp_path, ids=f"{tmp_path}/s.json#set/train")] == ["a", "c"]
    with pytest.raises(BadRequest, match="1 of 2 ids are not in the source: d"):
        listed(tmp_path, ids=("a", "d"))
    for reference, what in (("s.json#set/other", "1 of 1 ids"), ("s.json#set/n", "not a list of ids"),
                            ("s.json#set", "not a list of ids"),
                            ("s.json#set/val", "known: n, other, train"), ("none.json#a", "no such file"), ("a.tif#a", "no JSON")):
        with pytest.raises(BadRequest, match=what):
            listed(tmp_path, ids=f"{tmp_path}/{reference}")


@pytest.mark.parametrize("fields", [{"weight": 0}, {"weight": -1}, {"weight": float("inf")}, {"pixel_size_um": 0}, {"ids": ()},
                                    {"ids": "s.json"}, {"kind": "voc"}, {"images": ""}, {"labels": ""}, {"more": 1},
                                    {"images": "https://me:secret@host/x"}])
def test_fields_that_are_refused(fields: dict) -> None:
    with pytest.raises(ValidationError):
        LabelledSource(**{"images": "x"} | fields)


def test_a_secret_is_not_repeated() -> None:
    with pytest.raises(ValidationError) as caught:
        LabelledSource(images="https://host/x?X-Amz-Signature=abcdef")
    assert "a secret (X-Amz-Signature)" in str(caught.value.errors()[0]["msg"])


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(1e-3, 1e3)), min_size=1, max_size=9))
def test_shares_of_sources(sources: list[tuple[int, float]]) -> None:
    counts, weights = [n for n, _ in sources], [w for _, w in sources]
    if not any(counts):
        with pytest.raises(BadRequest):
            sample_weights(counts, weights)
        return
    shares = sample_weights(counts, weights)
    assert shares.dtype == np.float64 and shares[-1] == 1.0 and (np.diff(shares, prepend=0) >= 0).all()
    wanted = np.array([w if n else 0 for n, w in sources])
    np.testing.assert_allclose(np.diff(shares, prepend=0), wanted / wanted.sum(), atol=1e-12)
    for u in (0.0, 0.25, 0.5, np.nextafter(1.0, 0.0)):
        assert counts[int(np.searchsorted(shares, u, side="right"))] > 0


def test_weights_that_are_none() -> None:
    for counts, weights in (([1], [0.0]), ([1], [float("nan")]), ([1, 2], [1.0])):
        with pytest.raises(BadRequest):
            sample_weights(counts, weights)


# ---------------------------------------------------------------- real data in other layouts


@pytest.mark.parametrize(("images", "labels", "number", "objects"), [
    ("dsb2018_stage1_rest/images", "dsb2018_stage1_rest/labels", 540, 23_671),
    ("usiigaci_phase_train/*/raw.tif", "usiigaci_phase_train/*/instances_ids.png", 7, 511),
    ("stardist_samples/img2d.tif", "stardist_samples/mask2d.tif", 1, 125),
])
def test_real_pairs(images: str, labels: str, number: int, objects: int) -> None:
    folder = data_folder(images.split("/")[0]).parent
    found = listed(folder / images, folder / labels)
    assert len(found) == number and len({image.image_id for image in found}) == number
    total = 0
    for image in found:
        pixels, truth = image.read()
        assert pixels.pixels.shape[1:] == truth.shape
        total += len(np.unique(truth[truth > 0]))
    assert total == objects
