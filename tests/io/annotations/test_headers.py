"""Sides by the header, and what `check_all` says before a training begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinoray.errors import BadRequest
from dinoray.io.annotations.headers import declared_sides
from dinoray.io.items import FileRef
from dinoray.io.walk import LocalTree
from tests.io.annotations.files import listed, picture, squares, write
from tests.io.annotations.test_coco import annotation, box, coco, image
from tests.io.annotations.test_dsb import dsb_image
from tests.realdata import data_folder


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sides(tmp_path: Path, name: str) -> None:
    assert declared_sides(LocalTree().ref(str(picture(tmp_path / name, (7, 11))))) == (7, 11)
    rgb = write(tmp_path / f"rgb{name}", np.zeros((5, 9, 3), np.uint8), **({"photometric": "rgb"} if name == "a.tif" else {}))
    assert declared_sides(LocalTree().ref(str(rgb))) == (5, 9)


@pytest.mark.parametrize("data", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"\x89PNG\r\n\x1a\n", b"BM123456", b"MM\0*" + bytes(30)])
def test_what_its_reader_will_tell(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tif").write_bytes(data)
    assert declared_sides(LocalTree().ref(str(tmp_path / "a.tif"))) is None
    assert declared_sides(FileRef("s3://bucket/a.tif", 10, "x")) is None


def test_sizes_are_compared_before_training(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / f"p/{name}.tif"), write(tmp_path / f"p/{name}_masks.png", squares())
    assert len(listed(tmp_path / "p", check_all=True)) == 2
    write(tmp_path / "p/b_masks.png", squares((20, 30)))
    assert len(listed(tmp_path / "p")) == 2
    with pytest.raises(BadRequest, match="1 of 2 images have labels of another size: b: 20 x 24 px, its labels 20 x 30"):
        listed(tmp_path / "p", check_all=True)
    dsb_image(tmp_path / "d", "x", 2)
    assert len(listed(tmp_path / "d", check_all=True)) == 1
    write(tmp_path / "d/x/masks/m0.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(BadRequest, match="x: 20 x 24 px, its labels 2 x 2"):
        listed(tmp_path / "d", check_all=True)
    picture(tmp_path / "c/a.tif")
    coco(tmp_path / "c", [image(1, "a.tif", (20, 25))], [annotation(1, 1, [box(1, 1, 4, 5)])])
    with pytest.raises(BadRequest, match="a: 20 x 24 px, its labels 20 x 25"):
        listed(tmp_path / "c", check_all=True)


def test_real_sizes_agree() -> None:
    folder = data_folder("dsb2018_stage1")
    assert len(listed(folder / "stage1_test", check_all=True)) == 65
