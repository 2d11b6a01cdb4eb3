"""Which prediction belongs to which truth: by name, never by guess."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tifffile
from PIL import Image

from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest, ItemError
from dinoray.io.images import Limits, load_item
from dinoray.io.label_pairs import choose, list_predictions, list_truth, pair_up
from dinoray.io.mask_files import mask_objects
from dinoray.io.sources import list_items
from tests.omezarr import write_image


def write(path: Path, labels: np.ndarray | None = None) -> Path:
    """A label image of one object, or of the labels given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.pad(np.ones((2, 2), np.uint16), 2) if labels is None else labels
    if path.suffix == ".png":
        Image.fromarray(labels).save(path)
    else:
        tifffile.imwrite(path, labels)
    return path


def files(root: Path, *names: str) -> str:
    for name in names:
        write(root / name)
    return str(root)


def names(tmp_path: Path, truth: list[str], pred: list[str], **options) -> dict[str, str | None]:
    """image id -> path of its prediction."""
    found, _ = pair_up(list_predictions(files(tmp_path / "pred", *pred)), list_truth(files(tmp_path / "truth", *truth)), **options)
    return {one.image_id: one.pred and str(Path(one.pred.files[0].uri).relative_to(tmp_path / "pred")) for one in found}


@pytest.mark.parametrize(("truth", "pred", "paired"), [
    (["a.tif", "b.png"], ["b.tif", "a.png"], {"a": "a.png", "b": "b.tif"}),
    (["a_masks.tif"], ["a_cp_masks.png"], {"a": "a_cp_masks.png"}),
    (["a_label.tif"], ["a.tif"], {"a": "a.tif"}),
    (["d1/x.tif", "d2/x.tif"], ["d1/x.tif", "d2/x.tif"], {"d1/x": "d1/x.tif", "d2/x": "d2/x.tif"}),
    (["x.tif", "y.tif"], ["deep/er/x.tif", "y/images/z.tif"], {"x": "deep/er/x.tif", "y": "y/images/z.tif"}),
    (["s/x.tif"], ["x.tif"], {"s/x": "x.tif"}),
    (["x.tif"], ["x.tif", "old/x.tif"], {"x": "x.tif"}),
    (["a.b.tif"], ["a.b.png.tif"], {"a.b": "a.b.png.tif"}),  # masks of the image a.b.png
])
def test_names_that_belong_together(tmp_path: Path, truth: list[str], pred: list[str], paired: dict[str, str]) -> None:
    assert names(tmp_path, truth, pred) == paired


@pytest.mark.parametrize(("truth", "pred", "message"), [
    (["a.tif", "b.tif"], ["a.tif"], r"1 of 2 images have no prediction: b; predictions are named like 'a'"),
    ([f"{c}.tif" for c in "abcdefgh"], ["x.tif"], r"8 of 8 images have no prediction: a, b, c, d, e and 3 more"),
    (["x.tif"], ["old/x.tif", "new/x.tif"], r"1 images have several predictions: x \(new/x, old/x\)"),
    (["d1/x.tif", "d2/x.tif"], ["x.tif"], r"1 predictions fit several images: x \(d1/x, d2/x\)"),
    (["d1/x.tif"], ["d2/x.tif"], "1 of 1 images have no prediction"),
    (["a.tif", "a.png"], ["a.tif"], "two label images of one name"),
    (["a.tif"], ["a_masks.tif", "a_labels.tif"], "two label images of one name"),
])
def test_names_that_are_refused(tmp_path: Path, truth: list[str], pred: list[str], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        names(tmp_path, truth, pred)


def test_a_missing_prediction_is_empty_when_that_is_allowed(tmp_path: Path) -> None:
    assert names(tmp_path, ["a.tif", "b.tif"], ["a.tif"], allow_missing=True) == {"a": "a.tif", "b": None}
    pairs, unused = pair_up(list_predictions(files(tmp_path / "pred", "more.tif")), list_truth(str(tmp_path / "truth")),
                            allow_missing=True)
    pred, truth = pairs[1].read()
    assert unused == ["more"] and pred.shape == truth.shape and not pred.any() and truth.any()
    with pytest.raises(BadRequest, match="2 of 2 images have no prediction"):  # all of them missing is a wrong path
        names(tmp_path / "other", ["a.tif", "b.tif"], ["c.tif"], allow_missing=True)


def test_images_beside_their_labels_are_no_labels(tmp_path: Path) -> None:
    truth = list_truth(files(tmp_path / "truth", "000_img.png", "000_masks.png", "001.tif", "001_masks.png"))
    assert [one.image_id for one in truth] == ["000", "001"]
    assert [Path(one.image.files[0].uri).name for one in truth if one.image] == ["000_img.png", "001.tif"]


def test_an_output_of_segment_cells(tmp_path: Path) -> None:
    """Masks lie in `masks`, named by item id made safe for paths."""
    files(tmp_path / "out", "masks/a%20b/c%2Fd.tif", "masks/e.tif", "report.png")
    assert sorted(list_predictions(str(tmp_path / "out"))) == ["a b/c/d", "e"]
    (tmp_path / "out/_dinoray").mkdir()
    for inside in ("masks", "masks/", "masks/**/*.tif"):
        assert sorted(list_predictions(str(tmp_path / "out" / inside))) == ["a b/c/d", "e"], inside
    assert sorted(list_predictions(files(tmp_path / "plain", "a%20b.tif"))) == ["a%20b"]
    assert sorted(list_predictions(files(tmp_path / "plain/masks", "a%20b.tif"))) == ["a%20b"]


def test_ome_zarr_and_urls(tmp_path: Path) -> None:
    labels = np.zeros((1, 1, 1, 9, 12), np.int32)
    labels[..., 2:5, 3:7] = 70_000
    write_image(tmp_path / "out/masks/a.zarr", labels)
    truth = files(tmp_path / "truth", "a.tif")
    tifffile.imwrite(tmp_path / "truth/a.tif", (labels[0, 0, 0] > 0).astype(np.uint8))
    fsspec.filesystem("memory").put(str(tmp_path / "out"), "/label-pairs/out", recursive=True)
    for place in (str(tmp_path / "out"), "memory://label-pairs/out"):
        pairs, _ = pair_up(list_predictions(place), list_truth(truth))
        pred, true = pairs[0].read()
        assert pred.max() == 70_000 and np.array_equal(pred > 0, true > 0), place


def test_groups_that_are_marked_as_labels(tmp_path: Path) -> None:
    """As our own outputs are, and the labels of other programs (0.4, five axes)."""
    labels = np.zeros((9, 12), np.int32)
    labels[2:5, 3:7] = 70_000
    for key, data in mask_objects(labels, "masks/a.tif.zarr", 0.5):
        (tmp_path / "out" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / key).write_bytes(data)
    group = write_image(tmp_path / "others/a.zarr", labels[None, None, None])
    attributes = json.loads((group / ".zattrs").read_text())
    (group / ".zattrs").write_text(json.dumps({**attributes, "image-label": {"version": "0.4"}}))
    truth = files(tmp_path / "truth", "a.tif")
    tifffile.imwrite(tmp_path / "truth/a.tif", (labels > 0).astype(np.uint8))
    for place in ("out", "out/masks", "out/masks/*.zarr", "others"):
        pairs, _ = pair_up(list_predictions(str(tmp_path / place)), list_truth(truth))
        pred, _ = pairs[0].read()
        assert np.array_equal(pred, labels), place
    assert [one.image_id for one in list_truth(str(tmp_path / "out/masks"))] == ["a"]
    with pytest.raises(ItemError, match="a label image, not an image"):  # an input of images does not take it for one
        load_item(next(iter(list_items([str(tmp_path / "out/masks")]).items)), Limits())


def test_ids(tmp_path: Path) -> None:
    truth = list_truth(files(tmp_path / "truth", "a.tif", "b.tif", "c.tif"))
    assert [one.image_id for one in choose(truth, ["c", "a"])] == ["a", "c"]
    (tmp_path / "splits.json").write_text(json.dumps({"set": {"test": ["b"]}}))
    assert [one.image_id for one in choose(truth, [f"{tmp_path}/splits.json#set/test"])] == ["b"]
    with pytest.raises(BadRequest, match=r"1 of 2 ids have no true labels: x"):
        choose(truth, ["a", "x"])


@pytest.mark.parametrize(("only", "paired"), [
    (["c"], {"c": "c.tif"}), (["b/a"], {"b/a": "b/a.tif"}), (["a"], None), (["a", "c"], None)])
def test_ids_leave_the_refusal_of_what_fits_several_images(tmp_path: Path, only: list[str], paired: dict | None) -> None:
    """b/a.tif is the prediction of b/a, whether or not b/a is asked for: it must not be scored as that of a."""
    truth = list_truth(files(tmp_path / "truth", "a.tif", "b/a.tif", "c.tif", "d.tif"))
    predictions = list_predictions(files(tmp_path / "pred", "b/a.tif", "c.tif", "more.tif"))
    if paired is None:
        with pytest.raises(BadRequest, match=r"1 predictions fit several images: b/a \(a, b/a\)"):
            pair_up(predictions, truth, only=choose(truth, only))
        return
    pairs, unused = pair_up(predictions, truth, only=choose(truth, only))
    assert {one.image_id: Path(one.pred.files[0].uri).relative_to(tmp_path / "pred").as_posix() for one in pairs} == paired
    assert unused == ["more"], "the others are predictions of images that were not asked for"


def test_ids_whose_predictions_are_missing(tmp_path: Path) -> None:
    truth = list_truth(files(tmp_path / "truth", "a.tif", "b.tif", "c.tif"))
    predictions = list_predictions(files(tmp_path / "pred", "a.tif"))
    with pytest.raises(BadRequest, match="1 of 2 images have no prediction: b"):
        pair_up(predictions, truth, only=choose(truth, ["a", "b"]))
    with pytest.raises(BadRequest, match="1 of 1 images have no prediction: b"):
        pair_up(predictions, truth, only=choose(truth, ["b"]), allow_missing=True)
    assert len(pair_up(predictions, truth, only=choose(truth, ["a"]))[0]) == 1


def test_dsb_folders_are_truth_with_their_images(tmp_path: Path) -> None:
    mask = np.zeros((6, 6), np.uint8)
    for number in range(2):
        one = mask.copy()
        one[3 * number, :2] = 255
        write(tmp_path / f"dsb/7f3c/masks/{number}.png", one)
    write(tmp_path / "dsb/7f3c/images/7f3c.png", mask)
    truth = list_truth(LabelledSource(images=str(tmp_path / "dsb"), kind="dsb"))
    pairs, _ = pair_up(list_predictions(files(tmp_path / "pred", "7f3c/images/7f3c.tif")), truth)
    assert pairs[0].image is not None and pairs[0].read()[1].max() == 2


def test_sides_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "truth/a.tif")
    write(tmp_path / "pred/a.tif", np.ones((3, 6), np.uint16))
    pairs, _ = pair_up(list_predictions(str(tmp_path / "pred")), list_truth(str(tmp_path / "truth")))
    with pytest.raises(BadRequest, match="image a: the predicted labels are 3 x 6 px, the true ones 6 x 6"):
        pairs[0].read()
