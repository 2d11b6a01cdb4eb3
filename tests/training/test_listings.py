"""What is said of images that are not those that a training was begun on."""

from __future__ import annotations

import os
from pathlib import Path

from dinoray.config.labelled import LabelledSource
from dinoray.io.annotations import list_labelled
from dinoray.io.stores import LocalStore
from dinoray.training.listings import keep_listing, listing_changes, listing_of, stored_listing
from tests.training.toys import make_discs


def images(folder: Path) -> list:
    return list_labelled(LabelledSource(images=str(folder), kind="cellpose"))


def test_added_removed_moved_and_touched_images_are_named(tmp_path: Path) -> None:
    folder, store = make_discs(tmp_path / "in", images=9), LocalStore(str(tmp_path / "out"))
    assert stored_listing(store, "train") is None
    keep_listing(store, "train", images(folder)[2:])
    keep_listing(store, "train", images(folder))  # the first one stays
    kept = stored_listing(store, "train")
    assert kept is not None and kept.num_rows == 7
    assert listing_changes(kept, listing_of(images(folder)[2:])) == ""
    assert listing_changes(kept, listing_of(images(folder))) == "2 added (00_img, 01_img)"
    assert listing_changes(kept, listing_of([])) == "7 removed (02_img, 03_img, 04_img, 05_img, 06_img, ...)"
    os.utime(folder / "03_masks.png", ns=(1, 1))
    found = listing_changes(kept, listing_of(images(folder)[2:]))
    assert found == "1 changed (03_img: as large, but written anew (time or ETag))", "labels count too"
    moved = images(folder.rename(tmp_path / "moved"))[2:3]
    assert f"(02_img: {folder}/02_img.png -> {tmp_path}/moved/02_img.png)" in listing_changes(kept.slice(0, 1), listing_of(moved))
    (tmp_path / "moved/02_img.png").write_bytes(b"1")
    assert listing_changes(kept.slice(0, 1), listing_of(images(tmp_path / "moved")[2:3])).endswith(" bytes)")
