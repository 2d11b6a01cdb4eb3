"""Cell Tracking Challenge folders: frames with a segmentation, by sequence and number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinoray.errors import BadRequest, ItemError
from tests.io.annotations.files import listed, picture, squares, write


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    """Two sequences of four frames; gold truth of three frames, silver truth of one sequence."""
    for sequence in ("01", "02"):
        for frame in range(4):
            picture(tmp_path / f"DIC/{sequence}/t{frame:03d}.tif", seed=frame)
    for sequence, frame, count in (("01", 0, 1), ("01", 2, 2), ("02", 3, 3)):
        write(tmp_path / f"DIC/{sequence}_GT/SEG/man_seg{frame:03d}.tif", squares(count=count))
        write(tmp_path / f"DIC/{sequence}_GT/TRA/man_track{frame:03d}.tif", squares(count=9))
    for frame in range(4):
        write(tmp_path / f"DIC/01_ST/SEG/man_seg{frame:03d}.tif", squares(count=frame + 5))
    return tmp_path / "DIC"


def numbers(images) -> dict[str, int]:
    return {image.image_id: int(image.read()[1].max()) for image in images}


@pytest.mark.parametrize("kind", ["auto", "ctc"])
def test_frames_with_gold_truth(challenge: Path, kind: str) -> None:
    images = listed(challenge, kind=kind)
    assert numbers(images) == {"01/t000": 1, "01/t002": 2, "02/t003": 3}
    assert [image.group for image in images] == ["01", "01", "02"]
    np.testing.assert_array_equal(images[1].read()[0].pixels[0], tifffile.imread(challenge / "01/t002.tif"))


@pytest.mark.parametrize("labels", ["01_ST/SEG", "*_ST/SEG", "*_ST/SEG/*.tif"])
@pytest.mark.parametrize("kind", ["auto", "ctc"])
def test_silver_truth_by_its_path(challenge: Path, labels: str, kind: str) -> None:
    assert numbers(listed(challenge, challenge / labels, kind=kind)) == {f"01/t00{i}": i + 5 for i in range(4)}


def test_one_sequence(challenge: Path) -> None:
    assert numbers(listed(challenge / "01", challenge / "01_GT/SEG")) == {"t000": 1, "t002": 2}
    with pytest.raises(BadRequest, match="1 segmentations without their frame.*02_GT"):
        listed(challenge / "01", challenge / "*_GT/SEG")
    with pytest.raises(BadRequest, match="no 01_GT/SEG"):
        listed(challenge / "01", kind="ctc")


def test_a_frame_that_is_not_there(challenge: Path) -> None:
    (challenge / "01/t002.tif").unlink()
    with pytest.raises(BadRequest, match="1 segmentations without their frame.*man_seg002.tif"):
        listed(challenge)


def test_frames_of_four_digits(tmp_path: Path) -> None:
    picture(tmp_path / "01/t0007.tif")
    write(tmp_path / "01_GT/SEG/man_seg007.tif", squares())
    assert numbers(listed(tmp_path)) == {"01/t0007": 3}


def test_two_kinds_of_truth_for_a_frame(challenge: Path) -> None:
    with pytest.raises(BadRequest, match="two segmentations of one frame"):
        listed(challenge, f"{challenge}/01_*/SEG/*.tif")


def test_volumes_are_refused(challenge: Path) -> None:
    write(challenge / "01/t000.tif", np.zeros((3, 20, 24), np.uint8), metadata={"axes": "ZYX"}, imagej=True)
    with pytest.raises(ItemError) as caught:
        listed(challenge)[0].read()
    assert caught.value.reason == "stack"
    write(challenge / "01_GT/SEG/man_seg_000_001.tif", squares())
    with pytest.raises(BadRequest, match="one slice of a 3D frame"):
        listed(challenge)
