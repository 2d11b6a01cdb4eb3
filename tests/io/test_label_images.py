"""Masks as files: every id survives, the same labels give the same bytes, and other tools read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ome_zarr_models.v05.image_label import ImageLabel

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.io.mask_files import encode_tiff, mask_key, mask_objects, read_mask
from dinoray.io.object_names import item_path, plate_folder
from dinoray.io.stores import open_store
from tests.runs import DictStore


def put(labels: np.ndarray, kind: str, pixel_size_um: float | None = None) -> tuple[DictStore, str]:
    store, key = DictStore(), mask_key("a/b", kind)
    for name, data in mask_objects(labels, key, pixel_size_um):
        store.put(name, data)
    return store, key


@settings(deadline=None, max_examples=40)
@given(labels=hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 2**31 - 1)),
       kind=st.sampled_from(["tiff", "zarr"]))
def test_what_is_written_is_read_back(labels: np.ndarray, kind: str) -> None:
    store, key = put(labels, kind)
    found = read_mask(store, key)
    assert found.dtype == np.int32 and np.array_equal(found, labels)
    assert put(labels, kind)[0].objects == store.objects, "the same labels, the same bytes"


@pytest.mark.parametrize("shape", [(1, 1), (255, 257), (513, 300), (1100, 4200)])
@pytest.mark.parametrize("kind", ["tiff", "zarr"])
def test_sizes_around_tiles_chunks_and_shards(shape: tuple[int, int], kind: str) -> None:
    labels = (np.arange(shape[0] * shape[1]).reshape(shape) // 7).astype(np.int32)
    store, key = put(labels, kind)
    assert np.array_equal(read_mask(store, key), labels)
    empty, _ = put(np.zeros(shape, np.int32), kind)
    assert set(empty.objects) == set(store.objects), "an image without cells has the same objects"


@pytest.mark.parametrize("pixel_size_um", [None, 0.65])
def test_a_zarr_mask_is_an_ome_zarr_label_image(tmp_path: Path, pixel_size_um: float | None) -> None:
    labels = np.zeros((600, 70), np.int32)
    labels[5:9, 3:50] = 70_000
    for name, data in mask_objects(labels, mask_key("x", "zarr"), pixel_size_um):
        open_store(str(tmp_path)).put(name, data)
    group = zarr.open_group(str(tmp_path / "masks/x.zarr"), mode="r")
    model = ImageLabel.from_zarr(group)  # validates
    assert model.attributes.ome.image_label is not None
    (scales,) = model.attributes.ome.multiscales
    assert [(axis.name, axis.type) for axis in scales.axes] == [("y", "space"), ("x", "space")]
    assert {axis.unit for axis in scales.axes} == {None if pixel_size_um is None else "micrometer"}
    assert scales.datasets[0].coordinateTransformations[0].scale == [pixel_size_um or 1.0] * 2
    assert np.array_equal(group["0"][:], labels)


def test_a_tiff_mask_says_nothing_of_when_and_by_what_it_was_written() -> None:
    data = encode_tiff(np.eye(300, dtype=np.int32), 0.5)
    with tifffile.TiffFile(__import__("io").BytesIO(data)) as tiff:
        (page,) = tiff.pages
        assert page.dtype == np.int32 and page.is_tiled and page.compression.name == "ADOBE_DEFLATE"
        assert not {"DateTime", "Software", "ImageDescription"} & {tag.name for tag in page.tags}
        assert page.tags["XResolution"].value == (20_000, 1)  # px per cm
    assert len(data) < 10_000


def test_damage_and_absence_are_told(tmp_path: Path) -> None:
    for kind in ("tiff", "zarr"):
        store, key = put(np.ones((64, 64), np.int32), kind)
        for name in sorted(store.objects.keys() - {f"{key}/zarr.json"}):  # which is for other readers
            torn = DictStore({**store.objects, name: store.objects[name][:20]})
            with pytest.raises(OutputDamaged, match="cannot be read"):
                read_mask(torn, key)
        with pytest.raises(OutputDamaged):
            read_mask(DictStore(), key)
    with pytest.raises(BadRequest, match="int32"):
        list(mask_objects(np.zeros((4, 4), np.uint8), "masks/a.tif", None))


PARTS = st.text(st.sampled_from("ab.%_ /é" + ".tif.zarr"), min_size=0, max_size=12)


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(PARTS, min_size=2, max_size=6, unique=True))
def test_no_two_items_share_a_file_nor_a_folder_with_a_file(ids: list[str]) -> None:
    for suffix in (".tif", ".zarr"):
        keys = [item_path(item_id) + suffix for item_id in ids]
        assert len(set(keys)) == len(ids)
        for key in keys:
            parts = key.split("/")
            assert all(part and part not in (".", "..") and part[0] not in "._" for part in parts)
            assert not any(other.startswith(key + "/") for other in keys), "the mask of one id is another's folder"


def test_names_of_items_and_plates() -> None:
    assert item_path("a/b.tif") == "a/b.tif" and plate_folder(None) == ""
    assert item_path("../x") == "%2E./x" and item_path("s3://b/x y.tif") == "s3%3A/%/b/x%20y.tif"
    assert item_path("a.tif/b") == "a%2Etif/b" and item_path("Plate.ZARR/0") == "Plate%2EZARR/0"
    assert len(item_path("é" * 300)) <= 200 and item_path("é" * 300) != item_path("é" * 301)
