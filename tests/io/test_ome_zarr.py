"""OME-Zarr in: single images, plates and bioformats2raw folders -> Items; their pixels, names, sizes, identity."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from dinoray.errors import BadRequest, ItemError
from dinoray.io.images import Limits, load_item
from dinoray.io.items import Item
from dinoray.io.sources import list_items
from tests.conftest import texture
from tests.omezarr import image_attributes, write_group, write_image, write_plate

VERSIONS = ("0.4", "0.5")


def listed(*sources: object, **kwargs: object) -> list[Item]:
    return list(list_items([str(source) for source in sources], **kwargs).items)


def one(source: object) -> Item:
    (item,) = listed(source)
    return item


def reason(item: Item, **kwargs: object) -> str:
    with pytest.raises(ItemError) as caught:
        load_item(item, **kwargs)
    return caught.value.reason


def pixels_of(shape: tuple[int, ...], seed: int = 0, dtype: str = "uint16") -> np.ndarray:
    return texture(shape, seed, dtype)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_image_is_one_item_with_names_and_size(tmp_path, version):
    pixels = pixels_of((1, 2, 1, 70, 50))
    write_image(tmp_path / "in" / "a.ome.zarr", pixels, version=version, names=("DNA", "ER"), pixel_um=0.65)
    item = one(tmp_path / "in")
    assert item.item_id == "a.ome.zarr" and item.problem is None and item.num_bytes > 1000
    assert one(tmp_path / "in" / "a.ome.zarr") == item  # named or found, it is the same
    loaded = load_item(item)
    np.testing.assert_array_equal(loaded.image.pixels, pixels[0, :, 0])
    assert loaded.image.pixels.dtype == np.uint16 and loaded.image.channel_names == ("DNA", "ER")
    assert loaded.image.pixel_size_um == pytest.approx(0.65) and not loaded.image.is_rgb8
    assert loaded.num_bytes == item.num_bytes and loaded.read_s > 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plate_is_one_item_per_field(tmp_path, version):
    wells = {"B/12": [pixels_of((2, 40, 40), 1)], "A/1": [pixels_of((2, 40, 40), i) for i in (2, 3)], "A/10": []}
    write_plate(tmp_path / "BR1.zarr", wells, version=version, name="free text")
    items = listed(tmp_path)
    assert [i.item_id for i in items] == ["BR1.zarr/A/1/0", "BR1.zarr/A/1/1", "BR1.zarr/B/12/0"]
    assert items[1].metadata == {"Metadata_Plate": "BR1", "Metadata_Well": "A01", "Metadata_Site": "1", "Metadata_Acquisition": "1"}
    assert all(i.plate == i.group == "BR1" and i.problem is None for i in items)
    np.testing.assert_array_equal(load_item(items[1]).image.pixels, wells["A/1"][1])
    assert [i.item_id for i in listed(tmp_path / "BR1.zarr", where={"Well": "B*"})] == ["BR1.zarr/B/12/0"]
    field = one(tmp_path / "BR1.zarr" / "A" / "1" / "1")
    assert field.files == items[1].files and field.item_id == "1"


def test_plates_of_one_folder_stay_apart_and_mix_with_files(tmp_path):
    for name in ("P1", "P2"):
        write_plate(tmp_path / f"{name}.zarr", {"A/1": [pixels_of((2, 40, 40))]}, name="the same")
    (tmp_path / "photo.png").write_bytes(b"x")
    assert [(i.item_id, i.plate) for i in listed(tmp_path)] == [
        ("photo.png", None), ("P1.zarr/A/1/0", "P1"), ("P2.zarr/A/1/0", "P2")]
    assert [i.plate for i in listed(tmp_path / "*.zarr")] == ["P1", "P2"]
    assert [i.item_id for i in listed(tmp_path / "**" / "*.png")] == ["photo.png"]
    assert [i.plate for i in listed(tmp_path, pattern=r"(?P<channel>photo)\.png")] == [tmp_path.name, "P1", "P2"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("series", [None, ["0", "1"]])
def test_bioformats2raw_layout(tmp_path, version, series):
    top = write_group(tmp_path / "x.zarr", {"bioformats2raw.layout": 3}, version)
    if series:
        write_group(top / "OME", {"series": series}, version)
    for i in range(2):
        write_image(top / str(i), pixels_of((1, 1, 1, 40, 40), i), version=version)
    items = listed(tmp_path)
    assert [i.item_id for i in items] == ["x.zarr/0", "x.zarr/1"] and {i.group for i in items} == {"x.zarr"}
    np.testing.assert_array_equal(load_item(items[1]).image.pixels[0], pixels_of((1, 1, 1, 40, 40), 1)[0, 0, 0])


V3 = [
    {"chunks": (1, 16, 16)},
    {"chunks": (1, 16, 16), "shards": (1, 64, 64)},
    {"chunks": (2, 16, 16), "shards": (2, 64, 64), "compressors": [GzipCodec()]},
    {"chunks": (1, 32, 32), "compressors": [BloscCodec(cname="lz4"), ]},
    {"chunks": (2, 70, 50), "compressors": [ZstdCodec(level=3), Crc32cCodec()]},
    {"chunks": (1, 16, 16), "compressors": None},
    {"chunks": (1, 16, 16), "compressors": None, "shards": (1, 16, 16)},
    {"chunks": (1, 33, 17), "chunk_key_encoding": {"name": "default", "separator": "."}},
    {"chunks": (1, 33, 17), "chunk_key_encoding": {"name": "v2", "separator": "."}},
    {"chunks": (1, 16, 16), "filters": [zarr.codecs.TransposeCodec(order=(2, 1, 0))]},
]


@pytest.mark.parametrize("options", V3, ids=lambda o: "-".join(sorted(o)))
@pytest.mark.parametrize("dtype", ["uint16", "float32", "uint8"])
def test_every_layout_of_v3_is_lossless(tmp_path, options, dtype):
    pixels = pixels_of((2, 70, 50), 4, dtype)
    write_image(tmp_path / "a.zarr", pixels, "cyx", version="0.5", **options)
    image = load_item(one(tmp_path)).image
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.pixels.dtype == pixels.dtype


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", ">f4", "|b1"])
@pytest.mark.parametrize("codec", [None, "blosc", "zstd", "gzip", "zlib", "lz4"])
def test_every_layout_of_v2_is_lossless(tmp_path, separator, order, dtype, codec):
    import numcodecs

    pixels = (pixels_of((1, 2, 1, 30, 20), 5) > 30000) if dtype == "|b1" else pixels_of((1, 2, 1, 30, 20), 5).astype(dtype)
    write_group(tmp_path / "a.zarr", image_attributes("tczyx"))
    array = zarr.create_array(
        str(tmp_path / "a.zarr" / "0"), shape=pixels.shape, dtype=dtype, chunks=(1, 1, 1, 16, 16), zarr_format=2, order=order,
        chunk_key_encoding={"name": "v2", "separator": separator},
        compressors=numcodecs.get_codec({"id": codec}) if codec else None)
    array[:] = pixels
    np.testing.assert_array_equal(load_item(one(tmp_path)).image.pixels, pixels[0, :, 0] * (255 if dtype == "|b1" else 1))


def test_z_and_t_follow_the_rules_of_stacks(tmp_path):
    pixels = pixels_of((1, 2, 3, 40, 40))
    write_image(tmp_path / "z.zarr", pixels)
    write_image(tmp_path / "t.zarr", pixels_of((2, 1, 1, 40, 40)))
    t, z = listed(tmp_path)
    assert reason(z) == "stack" and reason(t) == reason(t, z_projection="max") == "stack"
    np.testing.assert_array_equal(load_item(z, z_projection="max").image.pixels, pixels[0].max(1))
    np.testing.assert_array_equal(load_item(z, z_projection="middle").image.pixels, pixels[0, :, 1])
    assert reason(z, z_projection="max", limits=Limits(max_bytes=pixels.nbytes - 1)) == "too_large"


@pytest.mark.parametrize("unit, um", [("nanometer", 0.5e-3), ("micrometer", 0.5), ("millimeter", 500.0), ("", None),
                                      ("pixel", None)])
def test_pixel_size_follows_the_unit(tmp_path, unit, um):
    write_image(tmp_path / "a.zarr", pixels_of((2, 40, 40)), "cyx")
    write_group(tmp_path / "a.zarr", image_attributes("cyx", unit=unit))
    assert load_item(one(tmp_path)).image.pixel_size_um == (um if um is None else pytest.approx(um))


def test_axes_of_old_versions_and_two_axes(tmp_path):
    pixels = pixels_of((1, 2, 1, 40, 40))
    attributes = image_attributes("tczyx")
    del attributes["multiscales"][0]["axes"]
    write_group(write_image(tmp_path / "a.zarr", pixels), attributes)
    write_image(tmp_path / "b.zarr", pixels[0, 0, 0], "yx")
    a, b = listed(tmp_path)
    np.testing.assert_array_equal(load_item(a).image.pixels, pixels[0, :, 0])
    np.testing.assert_array_equal(load_item(b).image.pixels, pixels[0, 0, 0][None])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_missing_chunk_is_the_fill_value_but_an_image_without_chunks_is_missing(tmp_path, version):
    pixels = pixels_of((2, 64, 64)) // 2 + 1
    top = write_image(tmp_path / "a.zarr", pixels, "cyx", version=version, fill_value=7)
    os.unlink(top / "0" / ("0/0/0" if version == "0.4" else "c/0/0/0"))
    expected = pixels.copy()
    expected[0, :32, :32] = 7
    np.testing.assert_array_equal(load_item(one(tmp_path)).image.pixels, expected)
    for name in ("0", "1") if version == "0.4" else ("c",):
        shutil.rmtree(top / "0" / name)
    assert reason(one(tmp_path)) == "missing"


def test_chunks_of_another_separator_are_not_black(tmp_path):
    top = write_image(tmp_path / "a.zarr", pixels_of((2, 40, 40)), "cyx")
    document = json.loads((top / "0" / ".zarray").read_text())
    (top / "0" / ".zarray").write_text(json.dumps(document | {"dimension_separator": "."}))
    assert reason(one(tmp_path)) == "missing"


def test_identity_sees_chunks_and_metadata_but_reads_no_pixels(tmp_path, monkeypatch):
    top = write_image(tmp_path / "a.zarr", pixels_of((2, 64, 64)), "cyx")
    monkeypatch.setattr("dinoray.io.ome_zarr_pixels.read_file", lambda uri: pytest.fail("a pixel was read while listing"))
    first = one(tmp_path)
    assert first == one(tmp_path)
    monkeypatch.undo()
    chunk = top / "0" / "1" / "0" / "0"
    os.utime(chunk, ns=(1, 1))
    assert reason(first) == "changed" and one(tmp_path).files[0].version != first.files[0].version
    second = one(tmp_path)
    (top / ".zattrs").write_text((top / ".zattrs").read_text() + " ")
    assert reason(second) == "changed"
    third = one(tmp_path)
    os.utime(top / "1" / "0" / "0" / "0", ns=(1, 1))  # another level is not what we read
    load_item(third)
    shutil.rmtree(top)
    assert reason(third) == "missing"


@pytest.mark.parametrize("codec", [None, "blosc", "zstd", "gzip", "zlib", "lz4"])
def test_damaged_chunks_are_noticed(tmp_path, codec):
    import numcodecs

    compressors = numcodecs.get_codec({"id": codec}) if codec else None
    top = write_image(tmp_path / "a.zarr", pixels_of((2, 64, 64)), "cyx", compressors=compressors)
    chunk = top / "0" / "0" / "0" / "0"
    data = chunk.read_bytes()
    for damaged in (b"", data[:10], data[:-20], *([bytes(len(data))] if codec else [])):
        chunk.write_bytes(damaged)
        assert reason(one(tmp_path)) in ("decode", "truncated")


@pytest.mark.parametrize("options", [{}, {"shards": (1, 64, 64)}], ids=["chunks", "shards"])
def test_damaged_chunks_of_v3_are_noticed(tmp_path, options):
    top = write_image(tmp_path / "a.zarr", pixels_of((2, 64, 64)), "cyx", version="0.5", chunks=(1, 32, 32), **options)
    chunk = top / "0" / "c" / "0" / "0" / "0"
    data = chunk.read_bytes()
    for damaged in (b"", data[:10], data[:-20], bytes(len(data))):
        chunk.write_bytes(damaged)
        assert reason(one(tmp_path)) in ("decode", "truncated")


def test_fields_that_are_named_but_not_there(tmp_path):
    top = write_plate(tmp_path / "P.zarr", {"A/1": [pixels_of((2, 40, 40))] * 2, "A/2": [pixels_of((2, 40, 40))]})
    shutil.rmtree(top / "A" / "1" / "1")
    shutil.rmtree(top / "A" / "2")
    good, gone, well = listed(tmp_path)
    assert good.problem is None and gone.files[0].version == "missing" and reason(gone) == "missing"
    assert well.item_id == "P.zarr/A/2" and well.problem.startswith("missing") and well.metadata["Metadata_Well"] == "A02"


def test_what_is_no_image_is_told(tmp_path):
    zarr.create_array(str(tmp_path / "plain.zarr"), shape=(4, 4), dtype="u1")
    top = write_image(tmp_path / "a.zarr", pixels_of((2, 40, 40)), "cyx")
    write_group(top / "labels", {"labels": ["nuclei"]})
    label = write_image(top / "labels" / "nuclei", pixels_of((40, 40)), "yx")
    write_group(label, image_attributes("yx") | {"image-label": {}})
    listing = list_items([str(tmp_path)])
    assert [i.item_id for i in listing.items] == ["a.zarr"] and listing.ignored == {".zarr folder": 1}
    with pytest.raises(BadRequest):
        listed(tmp_path / "plain.zarr")
    with pytest.raises(BadRequest):
        listed(top / "labels")
    assert one(label).problem.startswith("unsupported")
    one_level = tmp_path / "b.zarr"
    write_group(one_level, image_attributes("cyx"))
    assert one(one_level).problem.startswith("missing")


def test_links_inside_are_not_followed(tmp_path):
    inner, outer = tmp_path / "in", tmp_path / "out"
    top = write_plate(inner / "P.zarr", {"A/1": [pixels_of((2, 40, 40))] * 3, "A/2": [pixels_of((2, 40, 40))]})
    write_image(outer / "secret.zarr", pixels_of((2, 40, 40)), "cyx")
    shutil.rmtree(top / "A" / "1" / "1")
    os.symlink(outer / "secret.zarr", top / "A" / "1" / "1")
    chunk = top / "A" / "1" / "2" / "0" / "0" / "0" / "0"
    os.unlink(chunk)
    os.symlink("/etc/passwd", chunk)
    shutil.rmtree(top / "A" / "2")
    os.symlink(outer, top / "A" / "2")
    items = listed(inner)
    assert [(i.problem or "").partition(":")[0] for i in items] == ["", "bad_path", "bad_path", "bad_path"]
    os.symlink(top, tmp_path / "mine.zarr")  # the folder that the user names may be a link
    assert listed(tmp_path / "mine.zarr")[0].problem is None


def test_a_link_put_in_after_the_listing(tmp_path):
    top = write_image(tmp_path / "a.zarr", pixels_of((2, 40, 40)), "cyx")
    item = one(tmp_path)
    os.unlink(top / ".zattrs")
    os.symlink("/etc/passwd", top / ".zattrs")
    assert reason(item) == "bad_path"


def test_fifos_inside_do_not_hang(tmp_path):
    top = write_image(tmp_path / "a.zarr", pixels_of((2, 40, 40)), "cyx")
    os.mkfifo(top / "0" / "0" / "0" / "pipe")
    assert one(tmp_path).problem.startswith("bad_path")
    shutil.rmtree(top / "0")
    os.unlink(top / ".zattrs")
    os.mkfifo(top / ".zattrs")
    assert one(tmp_path).problem.startswith("bad_path")


def test_manifests_name_fields(tmp_path):
    top = write_plate(tmp_path / "P.zarr", {"A/1": [pixels_of((1, 40, 40), i) for i in range(2)]}, channels=("DNA",))
    (top / "A" / "1" / "1" / ".zattrs").write_text("{")
    (tmp_path / "m.csv").write_text("uri,Plate\nP.zarr/A/1/0,P\nP.zarr/A/1/1/,P\nP.zarr/A/1/7,P\nP.zarr,P\n")
    good, bad, gone, plate = listed(tmp_path / "m.csv")
    assert good.files == listed(top)[0].files
    np.testing.assert_array_equal(load_item(good).image.pixels, pixels_of((1, 40, 40), 0))
    assert [reason(bad), reason(gone), reason(plate)] == ["decode", "missing", "not_image"]
    assert listed(tmp_path / "m.csv")[0] == good
    (tmp_path / "m.csv").write_text("uri_DNA,uri_ER\nP.zarr/A/1/0,P.zarr/A/1/0\n")
    assert load_item(one(tmp_path / "m.csv")).image.pixels.shape == (2, 40, 40)


def test_memory_file_system(tmp_path):
    import fsspec

    top: Path = write_plate(tmp_path / "P.ome.zarr", {"A/1": [pixels_of((2, 40, 40))]}, version="0.5")
    fs = fsspec.filesystem("memory")
    fs.put(str(top), "/omezarr/P.ome.zarr", recursive=True)
    (item,) = listed("memory://omezarr")
    assert item.item_id == "P.ome.zarr/A/1/0" and item.plate == "P"
    assert load_item(item).image.channel_names == ("DNA", "ER")
