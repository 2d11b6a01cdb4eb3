"""Images that are segmented in blocks give the cells, and the figures, of the whole image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinoray import open_features, open_masks
from dinoray.runners.large_fields import middle
from tests.checkpoints import blobs, run_segment, seeing_checkpoint, use_tiny_model
from tests.runs import check_whole, data_objects


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_model(monkeypatch)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A small image, a large one, and a small one."""
    (tmp_path / "in").mkdir()
    for name, shape, count in (("a", (64, 64), 4), ("b", (600, 711), 500), ("c", (80, 64), 5)):
        image = (blobs(shape, count, len(name)) * 50_000 + 1_000).astype(np.uint16)
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", image, photometric="minisblack")
    return tmp_path / "in"


def same_cells(a: np.ndarray, b: np.ndarray) -> dict[int, int]:
    """{id in a: id in b}; fails unless the labels are equal up to the ids."""
    assert np.array_equal(a > 0, b > 0)
    pairs = np.unique(np.stack([a[a > 0], b[b > 0]], axis=1), axis=0)
    assert len(pairs) == len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1]))
    return dict(pairs.tolist())


@pytest.mark.parametrize("scaling", ["dtype", "image"])
def test_blocks_give_the_cells_of_the_whole(images: Path, tmp_path: Path, scaling: str) -> None:
    checkpoint = seeing_checkpoint(tmp_path / "ck", median_diameter_px=9.0)
    job = {"diameter_px": 9.0, "scaling": scaling}  # a factor of 1
    run_segment(images, checkpoint, tmp_path / "whole", **job)
    run_segment(images, checkpoint, tmp_path / "blocks", block_px=512, **job)
    for out in ("whole", "blocks"):
        check_whole(tmp_path / out)
    whole, parts = (open_masks(tmp_path / out) for out in ("whole", "blocks"))
    assert list(parts) == ["a.tif", "b.tif", "c.tif"] and np.array_equal(whole["a.tif"], parts["a.tif"])
    assert parts["b.tif"].max() == 500 and set(np.unique(parts["b.tif"])) == set(range(501))
    names = same_cells(whole["b.tif"], parts["b.tif"])
    rows = [{r["object_id"]: r for r in open_features(str(tmp_path / out)).table().to_pylist() if r["item_id"] == "b.tif"}
            for out in ("whole", "blocks")]
    assert len(rows[0]) == len(rows[1]) == 500
    far = 0
    for one, other in names.items():
        a, b = rows[0][one], rows[1][other]
        for name in ("area_px", "centroid_y_px", "centroid_x_px", "perimeter_px", "intensity_mean_gray", "neighbours_within"):
            assert a[name] == b[name]
        x, y = np.array(a["feature"]), np.array(b["feature"])
        far += float(np.linalg.norm(x - y) / np.linalg.norm(x)) > 0.5  # the windows lie elsewhere, and with them the context
    assert far < 25


def test_blocks_at_another_scale_keep_memory_by_the_models_resolution(images: Path, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoray.runners import large_fields

    asked: list[int] = []
    original = large_fields.segment_blocks

    def watched(*args: object, block_px: int, **kwargs: object) -> int:
        asked.append(block_px)
        return original(*args, block_px=block_px, **kwargs)

    monkeypatch.setattr(large_fields, "segment_blocks", watched)
    checkpoint = seeing_checkpoint(tmp_path / "ck", median_diameter_px=9.0)
    run_segment(images, checkpoint, tmp_path / "out", block_px=512, diameter_px=4.5)  # twice as fine at the model's scale
    assert asked == [256], "the large image only, in blocks of 512 px at the model's scale"
    assert open_masks(tmp_path / "out").images.table().to_pylist()[1]["scale"] == 2.0


def test_a_large_image_whose_scale_is_estimated(images: Path, tmp_path: Path) -> None:
    checkpoint = seeing_checkpoint(tmp_path / "ck", median_diameter_px=20.0)
    run_segment(images, checkpoint, tmp_path / "out", block_px=512)
    rows = {row["item_id"]: row for row in open_masks(tmp_path / "out").images.table().to_pylist()}
    assert rows["b.tif"]["scale_source"] == "estimated" and 1.5 < rows["b.tif"]["scale"] < 2.8
    assert rows["b.tif"]["num_cells"] == 500
    assert rows["a.tif"]["scale_source"] == "estimated" and 1.5 < rows["a.tif"]["scale"] < 2.8, "four cells are enough"


def test_same_bytes_with_any_number_of_threads(images: Path, tmp_path: Path) -> None:
    checkpoint = seeing_checkpoint(tmp_path / "ck", median_diameter_px=9.0)
    for i, (decode, compute) in enumerate([(1, 1), (3, 4)]):
        run_segment(images, checkpoint, tmp_path / f"out{i}", block_px=512, decode_threads=decode, compute_threads=compute)
    assert data_objects(tmp_path / "out0") == data_objects(tmp_path / "out1")


def test_colours_of_a_large_image_keep_their_ratio(tmp_path: Path) -> None:
    """A dim red and a bright green channel: scaled one by one, red would be as bright as green."""
    from PIL import Image

    checkpoint = seeing_checkpoint(tmp_path / "ck", scaling="image")
    cells = blobs((600, 640), 300, 3)
    rgb = np.stack([cells * 60, cells * 240, cells * 60], axis=-1).astype(np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(rgb).save(tmp_path / "in" / "a.png")
    for name, block in (("whole", 4096), ("blocks", 512)):
        run_segment(tmp_path / "in", checkpoint, tmp_path / name, block_px=block)
    whole, parts = (open_masks(tmp_path / name)["a.png"] for name in ("whole", "blocks"))
    same_cells(whole, parts)


@pytest.mark.parametrize(("shape", "box"), [((10, 20), (0, 0, 10, 20)), ((100, 20), (34, 0, 66, 20)), ((33, 33), (0, 0, 32, 32))])
def test_the_middle(shape: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    assert tuple(middle(shape, 32)) == box
