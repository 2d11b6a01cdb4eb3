"""Labels and centroids find their images by name; what finds none is told, not guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinoray.errors import BadRequest
from dinoray.io.images import load_item
from dinoray.io.items import Item
from dinoray.io.mask_files import mask_objects
from dinoray.io.objects import image_stem, label_keys, with_centroids, with_labels
from dinoray.io.sources import list_items


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, np.zeros((4, 4), np.uint8))


def labels_of(items: list[Item]) -> dict[str, str | None]:
    """Item id -> name of its label file, or the reason why it has none."""
    return {item.item_id: Path(item.labels.uri).name if item.labels else (item.problem or "").partition(":")[0] for item in items}


def paired(images: Path | str, labels: Path | str, *, pattern: str = "auto") -> dict[str, str | None]:
    listing = with_labels(list_items([str(images)], pattern=pattern), str(labels), pattern=pattern)
    return labels_of(list(listing.items))


@pytest.mark.parametrize(("path", "stem"), [
    ("a/b.tif", "a/b"), ("a.ome.tiff", "a"), ("a.OME.TIF", "a"), ("a.PNG", "a"), ("a.b", "a.b"), ("r1.c2.jpeg", "r1.c2"),
])
def test_stems(path: str, stem: str) -> None:
    assert image_stem(path) == stem


@pytest.mark.parametrize("name", ["a_masks", "a_mask", "a_cp_masks", "a_labels", "a_label", "a-mask", "a.labels", "a_MaskNuclei",
                                  "a_seg"])
def test_label_suffixes(name: str) -> None:
    assert label_keys(f"p/{name}.png") == [(0, "p/a"), (1, f"p/{name}")]


@pytest.mark.parametrize("name", ["mask", "unmask", "a_masked", "masks2", "labels"])
def test_names_that_only_look_like_it(name: str) -> None:
    assert label_keys(f"{name}.png") == [(1, name)]


def test_by_the_path_below_the_root(tmp_path: Path) -> None:
    images, labels = tmp_path / "img", tmp_path / "lab"
    write(*(images / name for name in ("p1/a.tif", "p2/a.tif", "b.ome.tif", "c.png", "d.tif", "e_mask.tif")))
    write(*(labels / name for name in ("p1/a.png", "p2/a_cp_masks.tif", "b_masks.tif", "c.tif", "x/d.tif", "e_mask.tif")))
    assert paired(images, labels) == {"p1/a.tif": "a.png", "p2/a.tif": "a_cp_masks.tif", "b.ome.tif": "b_masks.tif",
                                      "c.png": "c.tif", "d.tif": "missing_labels", "e_mask.tif": "e_mask.tif"}


def test_labels_beside_their_images(tmp_path: Path) -> None:
    write(*(tmp_path / name for name in ("a.tif", "a_masks.tif", "b.tif", "b_masks.tif", "c.tif")))
    listing = with_labels(list_items([str(tmp_path)]), str(tmp_path))
    assert labels_of(list(listing.items)) == {"a.tif": "a_masks.tif", "b.tif": "b_masks.tif", "c.tif": "missing_labels"}
    assert listing.ignored == {"label image among the images": 2}
    limited = with_labels(list_items([str(tmp_path)]), str(tmp_path), limit=2)
    assert list(labels_of(list(limited.items))) == ["a.tif", "b.tif"]
    assert paired(tmp_path, f"{tmp_path}/*_masks.tif") == {"a.tif": "a_masks.tif", "b.tif": "b_masks.tif",
                                                           "c.tif": "missing_labels"}


def test_two_files_that_could_be_the_labels(tmp_path: Path) -> None:
    names = ("img/a.tif", "img/b.tif", "lab/a_mask.tif", "lab/a_labels.tif", "lab/b.tif", "lab/b_mask.tif")
    write(*(tmp_path / name for name in names))
    assert paired(tmp_path / "img", tmp_path / "lab") == {"a.tif": "ambiguous_labels", "b.tif": "b_mask.tif"}


def test_one_file_per_channel(tmp_path: Path) -> None:
    """The labels are named like the group, or like one of its channels (as Cellpose writes them)."""
    for site in (1, 2, 3):
        write(*(tmp_path / f"img/r01c02f0{site}p01-ch{c}sk1fk1fl1.tiff" for c in (1, 2)))
    write(*(tmp_path / f"lab/r01c02f0{name}" for name in (
        "1p01-sk1fk1fl1.tif", "2p01-ch1sk1fk1fl1_cp_masks.png", "3p01-ch1sk1fk1fl1_cp_masks.png",
        "3p01-ch2sk1fk1fl1_cp_masks.png")))
    key = "r01c02f0{}p01-sk1fk1fl1.tiff"
    assert paired(tmp_path / "img", tmp_path / "lab") == {
        key.format(1): "r01c02f01p01-sk1fk1fl1.tif", key.format(2): "r01c02f02p01-ch1sk1fk1fl1_cp_masks.png",
        key.format(3): "ambiguous_labels"}


def test_own_patterns_hold_for_the_labels_too(tmp_path: Path) -> None:
    write(*(tmp_path / f"img/A01_{c}.tif" for c in ("dna", "er")), tmp_path / "lab/A01_dna_MaskNuclei.tiff")
    pattern = r"(?P<well>[A-P]\d+)(?P<token>_(?P<channel>dna|er))\.tif"
    assert paired(tmp_path / "img", tmp_path / "lab", pattern=pattern) == {"A01.tif": "A01_dna_MaskNuclei.tiff"}


def test_a_manifest_of_labels(tmp_path: Path) -> None:
    write(tmp_path / "s1/raw.tif", tmp_path / "s2/raw.tif", tmp_path / "s1/ids.png", tmp_path / "s2/ids.png")
    manifest = tmp_path / "labels.csv"
    manifest.write_text("item_id,uri\ns1/raw.tif,s1/ids.png\ns2/raw,s2/ids.png\n")
    listing = with_labels(list_items([f"{tmp_path}/*/raw.tif"]), str(manifest))
    assert [Path(item.labels.uri).parts[-2:] for item in listing.items] == [("s1", "ids.png"), ("s2", "ids.png")]


def test_when_no_image_has_labels_the_request_is_wrong(tmp_path: Path) -> None:
    write(tmp_path / "img/a.tif", tmp_path / "lab/deep/a.tif")
    listing = with_labels(list_items([str(tmp_path / "img")]), str(tmp_path / "lab"))
    with pytest.raises(BadRequest, match="no image has a label image") as caught:
        list(listing.items)
    assert "a.tif" in str(caught.value) and "deep/a.tif" in str(caught.value)
    with pytest.raises(BadRequest, match="no such file or folder"):
        with_labels(list_items([str(tmp_path / "img")]), str(tmp_path / "none"))


def test_other_problems_of_an_image_stay(tmp_path: Path) -> None:
    write(tmp_path / "img/a.tif", tmp_path / "img/b.tif", tmp_path / "lab/a.tif")
    manifest = tmp_path / "images.csv"
    manifest.write_text("item_id,uri\na,img/a.tif\nb,\n")
    items = list(with_labels(list_items([str(manifest)]), str(tmp_path / "lab")).items)
    assert items[0].labels is not None and items[0].problem is None
    assert items[1].problem == "missing: the row names no file"


# ---------------------------------------------------------------- centroids


def objects(images: Path, table: Path, text: str) -> dict[str, list[int]]:
    table.write_text(text)
    items = with_centroids(list_items([str(images)]), str(table)).items
    return {item.item_id: item.objects.arrays()[0].tolist() for item in items}


@pytest.mark.parametrize("name", ["p/a.tif", "p/a", "./p/a.tif", "{root}/p/a.tif", "img/p/a.tif"])
def test_a_table_names_images_by_id_or_path(tmp_path: Path, name: str) -> None:
    write(tmp_path / "img/p/a.tif", tmp_path / "img/p/b.tif")
    text = f"path,x,y,object_id\n{name.format(root=tmp_path / 'img')},1,1,5\n"
    assert objects(tmp_path / "img", tmp_path / "cells.csv", text) == {"p/a.tif": [5], "p/b.tif": []}


def test_a_table_names_images_by_their_position(tmp_path: Path) -> None:
    write(*(tmp_path / f"Plate7/Images/r02c03f0{site}p01-ch1sk1fk1fl1.tiff" for site in (1, 2)))
    text = "Metadata_Plate,Metadata_Well,Metadata_Site,x,y\nPlate7,B3,1,1,1\nPlate7,B03,01,2,2\nother,B03,2,1,1\n"
    assert list(objects(tmp_path / "Plate7", tmp_path / "cells.csv", text).values()) == [[1, 2], []]


def test_a_table_of_other_images(tmp_path: Path) -> None:
    write(tmp_path / "img/a.tif")
    with pytest.raises(BadRequest, match="no image has a row") as caught:
        objects(tmp_path / "img", tmp_path / "cells.csv", "item_id,x,y\nz.tif,1,1\n")
    assert "a.tif" in str(caught.value) and "z.tif" in str(caught.value)


def test_masks_of_a_segmentation_as_ome_zarr(tmp_path: Path) -> None:
    """A manifest names groups that are marked as labels, which no image is."""
    write(tmp_path / "in/a.tif")
    labels = np.arange(16, dtype=np.int32).reshape(4, 4) * 10_000
    for key, data in mask_objects(labels, "masks/a.tif.zarr", None):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    (tmp_path / "masks.csv").write_text(f"item_id,uri\na.tif,{tmp_path}/masks/a.tif.zarr\n")
    item, = with_labels(list_items([str(tmp_path / "in")]), str(tmp_path / "masks.csv")).items
    assert np.array_equal(load_item(Item("labels", (item.labels,))).image.pixels[0], labels)
