"""dinoray.io.sources: folders, globs, files, manifests, S3 -> Items, in one order and with nothing lost."""

from __future__ import annotations

import io
import os
import random
import tempfile
import time
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, ItemError, SystemicError
from dinoray.io.images import load_item
from dinoray.io.items import FileRef
from dinoray.io.sources import list_items
from dinoray.io.walk import LocalTree
from tests.conftest import texture
from tests.omezarr import write_plate
from tests.realdata import data_folder

PHENIX = "r{row:02d}c{col:02d}f{site:02d}p01-ch{channel}sk1fk1fl1.tiff"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def plate(folder: Path, wells=((1, 1), (2, 3)), sites=(1,), channels=(1, 2, 3)) -> Path:
    return touch(
        folder, *(PHENIX.format(row=r, col=c, site=s, channel=ch) for r, c in wells for s in sites for ch in channels)
    )


def listed(*sources, **kwargs):
    return list(list_items([str(source) for source in sources], **kwargs).items)


def ids(*sources, **kwargs):
    return [item.item_id for item in listed(*sources, **kwargs)]


def refused(*sources, **kwargs) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        listed(*sources, **kwargs)
    assert caught.value.todo
    return caught.value


# ---- folders


def test_folder_lists_images_sorted_and_counts_the_rest(tmp_path):
    touch(
        tmp_path,
        "b.png",
        "a.TIF",
        "sub/z.jpeg",
        "sub/deep/y.ome.tiff",
        "notes.txt",
        "table.csv",
        "sub/more.txt",
        "README",
        ".hidden.png",
        ".git/x.png",
        "_dinoray/plan/p.png",
        "vol.zarr/0/c.png",
    )
    listing = list_items([str(tmp_path)])
    items = list(listing.items)
    assert [i.item_id for i in items] == ["a.TIF", "b.png", "sub/z.jpeg", "sub/deep/y.ome.tiff"]
    assert [i.group for i in items] == [".", ".", "sub", "sub/deep"]
    assert listing.root == str(tmp_path) and listing.num_ignored == 6
    assert listing.ignored == {".txt": 2, ".csv": 1, "no extension": 1, ".zarr folder": 1, "hidden .png": 1}
    assert "2 .txt" in listing.describe_ignored()
    info = os.stat(tmp_path / "b.png")
    assert items[1].files == (FileRef(str(tmp_path / "b.png"), 5, str(info.st_mtime_ns)),)
    assert all(i.plate is None and i.metadata == {} and i.channels == () and i.problem is None for i in items)


def test_outputs_of_dinoray_are_no_inputs(tmp_path):
    touch(tmp_path, "a.png", "out/masks/a.png", "out/_dinoray/job.json")
    assert ids(tmp_path) == ["a.png"]
    assert ids(tmp_path / "out") == ["masks/a.png"]  # named itself


def test_order_does_not_depend_on_readdir(tmp_path, monkeypatch):
    names = [f"{d}/{n}.png" for d in ("b", "a", "B", "ä", "a b") for n in ("2", "10", "Z", "é")]
    touch(tmp_path, *names)
    expected = ids(tmp_path)
    real = os.scandir

    class Shuffled:
        def __init__(self, path):
            with real(path) as entries:
                self.entries = list(entries)
            random.shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Shuffled)
    for _ in range(3):
        assert ids(tmp_path) == expected
    assert expected == sorted(expected, key=lambda name: name.split("/"))


def test_links(tmp_path):
    touch(tmp_path / "data", "a.png", "deep/b.png")
    touch(tmp_path / "elsewhere", "c.png")
    data = tmp_path / "data"
    (data / "file.png").symlink_to(tmp_path / "elsewhere" / "c.png")
    (data / "gone.png").symlink_to(tmp_path / "nothing")
    (data / "folder").symlink_to(tmp_path / "elsewhere")
    (data / "again").symlink_to(tmp_path / "elsewhere")
    (data / "deep" / "loop").symlink_to(data)
    (data / "deep" / "self").symlink_to(data / "deep")
    (tmp_path / "elsewhere" / "back").symlink_to(data)
    items = listed(data)
    assert [i.item_id for i in items] == ["a.png", "file.png", "gone.png", "again/c.png", "deep/b.png"]
    assert items[2].files[0].size == -1 and items[2].files[0].version == "missing"
    with pytest.raises(ItemError) as caught:
        load_item(items[2])
    assert caught.value.reason == "missing"
    # a source may be a link; from there the walk goes through `back` once
    assert ids(data / "folder") == ["c.png", "back/a.png", "back/file.png", "back/gone.png", "back/deep/b.png"]


def test_names_that_cannot_be_stored_are_told_not_dropped(tmp_path):
    touch(tmp_path, "ok.png", "new\nline.png")
    with open(os.fsencode(tmp_path) + b"/latin\xff.png", "wb"):
        pass
    items = {i.item_id: i for i in listed(tmp_path)}
    assert set(items) == {"ok.png", "new\\x0aline.png", "latin\\xdcff.png"}
    for name, item in items.items():
        assert (item.problem is None) == (name == "ok.png")
        repr(item).encode()  # everything can be written down
        if item.problem:
            with pytest.raises(ItemError) as caught:
                load_item(item)
            assert caught.value.reason == "bad_id"


def test_fifos_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (item,) = listed(tmp_path)
    assert item.files[0].version == "missing"


# ---- sources


def test_explicit_files_are_items_whatever_their_extension(tmp_path):
    touch(tmp_path, "a.png", "notes.txt", "other.txt")
    assert ids(tmp_path / "notes.txt") == ["notes.txt"]
    assert ids(tmp_path, tmp_path / "notes.txt") == ["a.png", "notes.txt"]
    assert ids(tmp_path / "notes.txt", tmp_path / "a.png", tmp_path / "a.png") == ["a.png", "notes.txt"]


def test_overlapping_sources_list_each_file_once(tmp_path):
    touch(tmp_path, "a/1.png", "a/b/2.png", "a/.c/3.png", "d/4.png")
    everything = ["a/1.png", "a/b/2.png", "d/4.png"]
    assert (
        sorted(ids(tmp_path, tmp_path / "a", tmp_path / "a" / "b" / "2.png", tmp_path / "**" / "*.png")) == everything
    )
    assert ids(tmp_path / "a", tmp_path / "a" / ".c") == ["1.png", "b/2.png", ".c/3.png"]
    assert ids(tmp_path / "a", tmp_path / "a" / ".c" / "3.png") == ["1.png", "b/2.png", ".c/3.png"]
    forward, backward = ids(tmp_path / "a", tmp_path / "d"), ids(tmp_path / "d", tmp_path / "a")
    assert forward == backward == everything


def test_root_comes_from_the_arguments(tmp_path):
    touch(tmp_path, "x/a/1.png", "x/b/2.png", "xy/3.png")
    assert list_items([str(tmp_path / "x" / "a"), str(tmp_path / "x" / "b")]).root == str(tmp_path / "x")
    assert list_items([str(tmp_path / "x"), str(tmp_path / "xy")]).root == str(tmp_path)
    assert list_items([str(tmp_path / "x" / "*" / "1.png")]).root == str(tmp_path / "x")
    assert list_items([str(tmp_path / "x" / "a" / "1.png")]).root == str(tmp_path / "x" / "a")
    assert ids(tmp_path / "x" / "a") == ["1.png"] and ids(tmp_path / "x" / "*" / "1.png") == ["a/1.png"]


def test_relative_paths_and_file_urls(tmp_path, monkeypatch):
    touch(tmp_path, "x/1.png")
    monkeypatch.chdir(tmp_path)
    for source in ("x", "./x/", "x/../x", f"file://{tmp_path}/x"):
        (item,) = listed(source)
        assert item.item_id == "1.png" and item.files[0].uri == str(tmp_path / "x" / "1.png")


@pytest.mark.parametrize(
    "glob, expected",
    [
        ("*.png", ["1.png"]),
        ("*/*.png", ["a/2.png", "b/3.png"]),
        ("**/*.png", ["1.png", "a/2.png", "a/c/4.png", "b/3.png"]),
        ("a/**", ["2.png", "c/4.png", "c/5.tif"]),
        ("**/c/*", ["a/c/4.png", "a/c/5.tif"]),
        ("[ab]/[0-9].png", ["a/2.png", "b/3.png"]),
        ("?", ["a/2.png", "a/c/4.png", "a/c/5.tif", "b/3.png"]),  # a glob that matches folders takes what is in them
        ("*.txt", ["n.txt"]),
        ("*", ["1.png", "a/2.png", "a/c/4.png", "a/c/5.tif", "b/3.png"]),
        ("a/c/*.tif", ["5.tif"]),
    ],
)
def test_globs(tmp_path, glob, expected):
    touch(tmp_path, "1.png", "n.txt", "a/2.png", "b/3.png", "a/c/4.png", "a/c/5.tif", ".h/6.png")
    assert ids(tmp_path / glob) == expected


def test_globs_do_not_walk_where_nothing_can_match(tmp_path, monkeypatch):
    touch(tmp_path, "BR1/Images/1.png", "BR2/Images/2.png", "other/Images/3.png", "BR1/Illum/4.png")
    seen = []
    real = LocalTree.list
    monkeypatch.setattr(LocalTree, "list", lambda self, folder: seen.append(folder) or real(self, folder))
    assert ids(tmp_path / "BR*" / "Images" / "*.png") == ["BR1/Images/1.png", "BR2/Images/2.png"]
    assert sorted(os.path.relpath(folder, tmp_path) for folder in seen) == [
        ".",
        "BR1",
        "BR1/Images",
        "BR2",
        "BR2/Images",
    ]


def test_a_name_with_brackets_is_a_name_when_it_exists(tmp_path):
    touch(tmp_path, "plate[1]/a.png")
    assert ids(tmp_path / "plate[1]") == ["a.png"] and ids(tmp_path / "plate[1]" / "a.png") == ["a.png"]


def test_refusals(tmp_path):
    touch(tmp_path, "notes.txt", "vol.zarr/.zarray", "em.n5/attributes.json")
    assert "no such file" in str(refused(tmp_path / "nothing"))
    assert "no such file" in str(refused(tmp_path / "nothing.csv"))
    assert "no such folder" in str(refused(tmp_path / "nothing" / "*.png"))
    assert "1 .txt" in str(refused(tmp_path))
    assert "without an OME-Zarr image" in str(refused(tmp_path / "vol.zarr"))
    assert "volume" in str(refused(tmp_path / "em.n5"))
    assert "s3://" in str(refused("https://127.0.0.1:9/a.zarr/0"))
    refused(tmp_path / "*.png")
    refused()
    refused("nosuch://bucket/x")
    refused(tmp_path, limit=0)
    refused(tmp_path, pattern="(?P<x>")


@pytest.fixture
def without_root():
    """A folder that everyone may enter, and no root's rights on it (root reads everything)."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        is_root = os.geteuid() == 0
        try:
            yield Path(folder), (lambda: os.seteuid(65534)) if is_root else (lambda: None)
        finally:
            if is_root:
                os.seteuid(0)


def test_a_folder_without_access_is_refused(without_root):
    folder, drop_rights = without_root
    touch(folder, "a/1.png", "b/2.png")
    (folder / "b").chmod(0)
    drop_rights()
    assert "access denied" in str(refused(folder))


# ---- grouping


def test_phenix_folder_becomes_items_of_channels(tmp_path):
    plate(tmp_path / "BR001" / "Images", channels=(1, 2, 10))
    touch(tmp_path / "BR001", "Images/Index.idx.xml")
    items = listed(tmp_path)
    assert [i.item_id for i in items] == [
        "BR001/Images/r01c01f01p01-sk1fk1fl1.tiff",
        "BR001/Images/r02c03f01p01-sk1fk1fl1.tiff",
    ]
    item = items[1]
    assert item.channels == ("ch1", "ch2", "ch10") and item.plate == item.group == "BR001"
    assert [f.uri.rpartition("-")[2][:4] for f in item.files] == ["ch1s", "ch2s", "ch10"]
    assert item.metadata == {
        "Metadata_Plate": "BR001",
        "Metadata_Well": "B03",
        "Metadata_Site": "1",
        "Metadata_Plane": "1",
        "Metadata_Time": "1",
    }
    assert item.problem is None and item.num_bytes == sum(f.size for f in item.files)


def test_files_named_by_the_shell_are_grouped_too(tmp_path):
    folder = plate(tmp_path / "P1")
    assert listed(*folder.iterdir()) == listed(folder)


def test_one_stray_name_turns_auto_off_for_its_folder_only(tmp_path):
    plate(tmp_path / "P1")
    plate(tmp_path / "P2")
    touch(tmp_path, "P1/overview.tiff")
    items = listed(tmp_path)
    assert len([i for i in items if i.group == "P1"]) == 7 and len([i for i in items if i.plate == "P2"]) == 2


def test_explicit_pattern_tells_what_does_not_match(tmp_path):
    plate(tmp_path / "P1")
    touch(tmp_path, "P1/overview.tiff")
    items = listed(tmp_path, pattern="phenix")
    assert [i.problem is None for i in items] == [False, True, True]
    assert items[0].problem.startswith("pattern_mismatch")
    with pytest.raises(ItemError) as caught:
        load_item(items[0])
    assert caught.value.reason == "pattern_mismatch"


@pytest.mark.parametrize("pattern", ["none", None])
def test_no_pattern_makes_every_file_an_item(tmp_path, pattern):
    plate(tmp_path)
    assert len(listed(tmp_path, pattern=pattern)) == 6


def test_missing_and_double_channels(tmp_path):
    plate(tmp_path, wells=((1, 1), (1, 2), (1, 3)))
    (tmp_path / PHENIX.format(row=1, col=2, site=1, channel=3)).unlink()
    (tmp_path / PHENIX.format(row=1, col=2, site=1, channel=1)).unlink()
    assert [i.problem for i in listed(tmp_path)] == [None, "channel_count: missing ch1, ch3", None]
    pattern = r"(?P<well>\w\d\d)_(?P<token>(?P<channel>\w)\d)\.png"
    touch(tmp_path / "twice", "A01_x1.png", "A01_x2.png", "A01_y1.png")
    (item,) = listed(tmp_path / "twice", pattern=pattern)
    assert item.problem == "duplicate_channel: more than one file of x"


def test_channel_sets_are_per_plate(tmp_path):
    plate(tmp_path / "P1", channels=(1, 2))
    plate(tmp_path / "P2", channels=(1, 2, 3))
    assert all(i.problem is None for i in listed(tmp_path))


@pytest.mark.parametrize(
    "folder, expected",
    [
        ("BR1__2020-11-08T18_18_23-Measurement1/Images", "BR1"),
        ("BR_1__x__2020-11-08T18_18_23-Measurement 12", "BR_1__x"),
        ("P9", "P9"),
        ("P9/TimePoint_1/ZStep_2", "P9"),
        ("P9/images", "P9"),
    ],
)
def test_plate_from_the_folder(tmp_path, folder, expected):
    plate(tmp_path / folder)
    assert {i.plate for i in listed(tmp_path)} == {expected}
    assert {i.plate for i in listed(tmp_path / folder)} == {expected}  # also from above the root


def test_imagexpress_thumbnails_are_ignored(tmp_path):
    guid = "7B1A9C3E-12AB-4CDE-8F00-0123456789A{}"
    touch(tmp_path, *(f"P1_A01_s1_w{w}{t}{guid.format(w)}.tif" for w in (1, 2) for t in ("", "_thumb")))
    listing = list_items([str(tmp_path)])
    (item,) = listing.items
    assert item.channels == ("w1", "w2") and item.plate == "P1" and listing.ignored == {"thumbnail": 2}


def test_pattern_over_folders(tmp_path):
    touch(tmp_path, *(f"P1/{c}/{w}.png" for c in ("DNA", "ER") for w in ("A01", "A02")))
    items = listed(tmp_path, pattern=r"(?P<plate>[^/]+)/(?P<token>(?P<channel>[^/]+)/)(?P<well>\w\d\d)\.png")
    assert [(i.item_id, i.channels, i.plate) for i in items] == [
        ("P1/A01.png", ("DNA", "ER"), "P1"),
        ("P1/A02.png", ("DNA", "ER"), "P1"),
    ]


def test_where_and_limit(tmp_path):
    for name in ("BR001", "BR002", "XX001"):
        plate(tmp_path / name)
    assert {i.plate for i in listed(tmp_path, where={"Plate": "BR*"})} == {"BR001", "BR002"}
    assert len(listed(tmp_path, where={"Metadata_Plate": "BR*", "Well": "A01"})) == 2
    assert ids(tmp_path, limit=3) == ids(tmp_path)[:3]
    assert [i.plate for i in listed(tmp_path, where={"Plate": "XX*"}, limit=1)] == ["XX001"]
    error = refused(tmp_path, where={"Plat": "x"})
    assert "Plat" in str(error) and "Plate, Site" in str(error)
    assert "matches" in str(refused(tmp_path, where={"Plate": "br001"}))
    touch(tmp_path / "plain", "a.png")
    assert "none" in str(refused(tmp_path / "plain", where={"Plate": "x"}))


def test_where_is_told_before_everything_is_listed(tmp_path):
    for name in ("a", "b"):
        plate(tmp_path / name)
    with pytest.raises(BadRequest):
        list_items([str(tmp_path)], where={"Nothing": "x"})


# ---- manifests


def csv(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_manifest_of_single_files(tmp_path):
    touch(tmp_path, "imgs/a.png", "imgs/b.dat")
    manifest = csv(
        tmp_path / "m.csv",
        "uri,plate,Well,Metadata_Site,note\nimgs/b.dat,007,A01,1,\n"
        f"{tmp_path}/imgs/a.png,007,A02,02,x\nimgs/none.png,008,A03,3,y\n",
    )
    items = listed(manifest)
    assert [i.item_id for i in items] == ["imgs/b.dat", "imgs/a.png", "imgs/none.png"]  # the order of the rows
    assert items[0].metadata == {
        "Metadata_Plate": "007",
        "Metadata_Well": "A01",
        "Metadata_Site": "1",
        "Metadata_note": None,
    }
    assert items[1].metadata["Metadata_Site"] == "02" and items[1].plate == items[1].group == "007"
    assert items[2].files == (FileRef(str(tmp_path / "imgs/none.png"), -1, "missing"),) and items[2].problem is None
    assert list_items([str(manifest)]).root == str(tmp_path)


def test_manifest_of_channels(tmp_path):
    touch(tmp_path, "d.tif", "e.tif", "f.tif")
    manifest = csv(
        tmp_path / "m.csv", "item_id,uri_DNA,uri_ER,Source,Batch,Plate\nx,d.tif,e.tif,s4,b1,P\ny,f.tif,,s4,,P\nz,,,,,\n"
    )
    items = listed(manifest)
    assert [i.item_id for i in items] == ["x", "y", "z"]
    assert items[0].channels == ("DNA", "ER") and len(items[0].files) == 2
    assert items[0].group == "s4/b1/P" and items[1].group == "s4/P" and items[0].plate == "P"
    assert items[1].problem == "channel_count: missing ER" and items[2].problem.startswith("missing")
    for item in items[1:]:
        with pytest.raises(ItemError):
            load_item(item)


def test_manifest_ids(tmp_path):
    touch(tmp_path, "a.png")
    rows = [
        "dup,a.png",
        "dup,a.png",
        "../../etc/passwd,a.png",
        '"new\nline",a.png',
        f"{'x' * 2000},a.png",
        ",a.png",
        "dup,a.png",
    ]
    items = listed(csv(tmp_path / "m.csv", "id,path\n" + "\n".join(rows) + "\n"))
    assert [(i.problem or "").partition(":")[0] for i in items] == [
        "",
        "duplicate_id",
        "",
        "bad_id",
        "bad_id",
        "",
        "duplicate_id",
    ]
    assert items[2].item_id == "../../etc/passwd" and items[5].item_id == "a.png"
    assert all(len(i.item_id) <= 1024 and i.item_id.isprintable() for i in items)


def test_parquet_manifest_with_numbers_nulls_and_categories(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    table = pa.table(
        {
            "uri": ["a.png", "b.png"],
            "Plate": pa.array(["P", "Q"]).dictionary_encode(),
            "Site": [1.0, None],
            "Well": pa.array(["A01", None], pa.large_string()),
            "n": pa.array([7, 8], pa.int8()),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    items = listed(tmp_path / "m.parquet")
    assert items[0].metadata == {"Metadata_Plate": "P", "Metadata_Site": "1", "Metadata_Well": "A01", "Metadata_n": "7"}
    assert items[1].metadata["Metadata_Site"] is None and items[1].metadata["Metadata_Well"] is None
    assert ids(tmp_path / "m.parquet", where={"Plate": "Q"}) == ["b.png"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a,b\n1,2\n", ["a, b", "uri"]),
        ("uri,uri_DNA\na,b\n", ["not both"]),
        ("uri,URI\na,b\n", ["one name"]),
        ("uri,plate,Metadata_Plate\na,b,c\n", ["same metadata"]),
        ("", ["cannot be read"]),
        ("uri,x\na\n", ["cannot be read"]),
        ("uri\n\xff\xfe\n", ["cannot be read"]),
        ("uri\n", ["no image"]),
    ],
)
def test_bad_csv_manifests(tmp_path, text, words):
    (tmp_path / "m.csv").write_bytes(text.encode("latin-1"))
    message = str(refused(tmp_path / "m.csv"))
    assert all(word in message for word in words), message


def test_bad_parquet_manifests(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet at all")
    (tmp_path / "empty.parquet").write_bytes(b"")
    pq.write_table(pa.table({"uri": ["a"], "v": [[1, 2]]}), tmp_path / "list.parquet")
    whole = (tmp_path / "list.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (tmp_path / "damaged.parquet").write_bytes(whole[:-60] + bytes(20) + whole[-40:])
    for name in ("text", "empty", "list", "cut", "damaged"):
        refused(tmp_path / f"{name}.parquet")


class Pickled(pa.ExtensionType):
    """Like Ray's tensor type: reading the schema runs code."""

    calls = 0

    def __init__(self):
        super().__init__(pa.string(), "ray.data.arrow_pickled_in_a_test")

    def __arrow_ext_serialize__(self):
        return b"payload"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        cls.calls += 1
        return cls()


@pytest.mark.parametrize("padding", [0, 1, 50, 500, 5000])
def test_extension_types_are_refused_without_running_their_code(tmp_path, padding):
    table = pa.table(
        {"uri": pa.ExtensionArray.from_storage(Pickled(), pa.array(["a.png"])), "x" * (padding + 1): ["y"]}
    )
    pq.write_table(table, tmp_path / "m.parquet")
    pa.register_extension_type(Pickled())
    try:
        Pickled.calls = 0
        assert "extension" in str(refused(tmp_path / "m.parquet"))
        assert Pickled.calls == 0
        pq.read_schema(tmp_path / "m.parquet")
        assert Pickled.calls > 0  # the test would notice
    finally:
        pa.unregister_extension_type("ray.data.arrow_pickled_in_a_test")


def test_manifests_and_folders_together(tmp_path):
    touch(tmp_path, "imgs/a.png", "imgs/b.png")
    manifest = csv(tmp_path / "lists" / "m.csv", f"file\n{tmp_path}/imgs/a.png\n{tmp_path}/imgs/b.png\n")
    items = listed(manifest, tmp_path / "imgs")
    assert [(i.item_id, (i.problem or "")[:12]) for i in items] == [
        ("imgs/a.png", ""),
        ("imgs/b.png", ""),
        ("imgs/a.png", "duplicate_id"),
        ("imgs/b.png", "duplicate_id"),
    ]


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_csv(tmp_path, data):
    (tmp_path / "m.csv").write_bytes(b"uri,Plate\n" + data)
    try:
        for item in list_items([str(tmp_path / "m.csv")]).items:
            repr(item).encode()
    except BadRequest:
        pass


# ---- remote


def test_memory_file_system_with_other_roots():
    fs = fsspec.filesystem("memory")
    for path in ("/lab/p/a.png", "/lab/p/q/b.png", "/lab/p/notes.txt"):
        fs.pipe_file(path, b"12345")
    items = listed("memory://lab/p")
    assert [i.item_id for i in items] == ["a.png", "q/b.png"] and items[0].files[0].size == 5
    assert items[0].files[0].version and listed("memory://lab/p") == items
    assert ids("memory://lab/**/b.png") == ["p/q/b.png"]
    refused("memory://lab/none")


@pytest.fixture(scope="module")
def s3_server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    import s3fs

    for key, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    if not fs.exists("lab"):
        fs.mkdir("lab")
    else:
        fs.rm("lab", recursive=True)
        fs.mkdir("lab")
    yield fs
    s3fs.S3FileSystem.clear_instance_cache()


def tiff_bytes(array) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array)
    return out.getvalue()


def test_s3_listing_and_reading(s3):
    array = np.arange(64, dtype=np.uint16).reshape(8, 8)
    for channel in (1, 2):
        name = PHENIX.format(row=3, col=3, site=3, channel=channel)
        s3.pipe_file(f"lab/batch/BR1/Images/{name}", tiff_bytes(array * channel))
    s3.pipe_file("lab/batch/BR1/Images/Index.idx.xml", b"<x/>")
    s3.pipe_file("lab/batch/marker/", b"")
    listing = list_items(["s3://lab/batch"])
    (item,) = listing.items
    assert item.item_id == "BR1/Images/r03c03f03p01-sk1fk1fl1.tiff" and item.plate == "BR1"
    assert listing.root == "s3://lab/batch" and listing.ignored == {".xml": 1}
    etag = s3.info("lab/batch/BR1/Images/r03c03f03p01-ch1sk1fk1fl1.tiff")["ETag"]
    assert item.files[0].uri == "s3://lab/batch/BR1/Images/r03c03f03p01-ch1sk1fk1fl1.tiff"
    assert item.files[0].version == etag.strip('"') and '"' not in item.files[0].version
    np.testing.assert_array_equal(load_item(item).image.pixels, [array, array * 2])


def test_s3_plate_of_ome_zarr_and_a_load_data_table(s3, tmp_path):
    fields = [texture((2, 40, 40), i, "uint16") for i in range(2)]
    top = write_plate(tmp_path / "BR1.zarr", {"A/1": fields, "A/10": fields[:1]}, version="0.5")
    s3.put(str(top), "lab/p/BR1.zarr", recursive=True)
    s3.pipe_file("lab/p/BR1.zarr/A/1/00/zarr.json", b"{}")  # a name that begins like a field's
    for source in ("s3://lab/p", "s3://lab/p/BR1.zarr", "s3://lab/p/BR1.zarr/", "s3://lab/*/BR*.zarr"):
        items = listed(source)
        assert [i.item_id.removeprefix("p/") for i in items] == [f"BR1.zarr/{path}" for path in ("A/1/0", "A/1/1", "A/10/0")]
    np.testing.assert_array_equal(load_item(items[1]).image.pixels, fields[1])
    s3.pipe_file("lab/p/BR1.zarr/A/1/1/0/c/0/0/0", b"other bytes")
    with pytest.raises(ItemError) as caught:
        load_item(items[1])
    assert caught.value.reason == "changed"
    data = io.BytesIO()
    tifffile.imwrite(data, fields[0][0])
    s3.pipe_file("lab/jump/images/BR1/Images/a+b c.tiff", data.getvalue())
    s3.pipe_file("lab/jump/load_data.csv", b"FileName_OrigDNA,PathName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site\n"
                 b"a+b c.tiff,s3://lab/jump/images/BR1/Images/,BR1,A01,1\na+b c.tiff,images/BR1/Images,BR1,A01,2\n")
    items = listed("s3://lab/jump/load_data.csv")
    assert [(i.item_id, i.channels, i.files[0].uri) for i in items] == [
        (f"BR1/A01-{n}", ("DNA",), "s3://lab/jump/images/BR1/Images/a+b c.tiff") for n in (1, 2)]
    np.testing.assert_array_equal(load_item(items[0]).image.pixels[0], fields[0][0])


def test_s3_sources(s3):
    for key in ("a/1.png", "a/2.png", "b/3.png", "4.png", "a/n.txt"):
        s3.pipe_file(f"lab/{key}", key.encode())
    assert ids("s3://lab") == ["4.png", "a/1.png", "a/2.png", "b/3.png"]
    assert ids("s3://lab/a/") == ["1.png", "2.png"]
    assert ids("s3://lab/*/[13].png") == ["a/1.png", "b/3.png"]
    assert ids("s3://lab/a/n.txt", "s3://lab/b/3.png") == ["a/n.txt", "b/3.png"]
    s3.mkdir("other") if not s3.exists("other") else None
    s3.pipe_file("other/5.png", b"5")
    assert ids("s3://lab/b", "s3://other") == ["s3://lab/b/3.png", "s3://other/5.png"]
    refused("s3://lab/none")
    refused("s3://nosuchbucket")
    refused("s3://lab/none/*.png")


def test_s3_object_that_goes_or_changes_is_told(s3):
    s3.pipe_file("lab/x/a.tif", tiff_bytes(np.zeros((4, 4), np.uint16)))
    (item,) = listed("s3://lab/x")
    s3.pipe_file("lab/x/a.tif", tiff_bytes(np.zeros((4, 40), np.uint16)))
    with pytest.raises(ItemError) as caught:
        load_item(item)
    assert caught.value.reason == "changed"
    s3.rm_file("lab/x/a.tif")
    with pytest.raises(ItemError) as caught:
        load_item(item)
    assert caught.value.reason == "missing"


def test_s3_manifest_with_relative_and_other_files(s3, tmp_path):
    touch(tmp_path, "local.png")
    s3.pipe_file("lab/m/imgs/a.png", b"123")
    s3.pipe_file(
        "lab/m/list.csv", f"uri\nimgs/a.png\ns3://lab/m/imgs/a.png\ns3://lab/m/none.png\n{tmp_path}/local.png\n".encode()
    )
    items = listed("s3://lab/m/list.csv")
    assert [i.item_id for i in items] == ["imgs/a.png", "imgs/a.png", "none.png", str(tmp_path / "local.png")]
    assert [i.files[0].size for i in items] == [3, 3, -1, 9]
    assert items[1].problem.startswith("duplicate_id")


@pytest.mark.parametrize("cell", ["../../etc/passwd", "a/../../b.png", "/data/../etc/passwd", "s3://lab/../k.png", ".."])
def test_a_manifest_may_not_climb(tmp_path, cell):
    (tmp_path / "list.csv").write_text(f"uri\n{cell}\n")
    (item,) = listed(tmp_path / "list.csv")
    assert item.problem.startswith("bad_path") and item.files[0].size == -1


def test_a_password_in_a_manifest_is_quarantined_without_repeating_it(tmp_path):
    (tmp_path / "list.csv").write_text("uri\ns3://key:0badc0de@lab/a.tif\n")
    (item,) = listed(tmp_path / "list.csv")
    assert item.problem.startswith("bad_path") and "0badc0de" not in repr(item)


def test_a_manifest_of_presigned_urls_is_refused_without_repeating_them(tmp_path):
    (tmp_path / "list.csv").write_text("uri\nhttps://h/a.tif?X-Amz-Signature=0badc0de\n")
    with pytest.raises(BadRequest) as caught:
        listed(tmp_path / "list.csv")
    assert "a URL in the manifest holds a" in str(caught.value) and "0badc0de" not in str(caught.value)


def test_s3_access_denied(s3, monkeypatch):
    s3.pipe_file("lab/x/a.png", b"123")
    (item,) = listed("s3://lab/x")

    async def denied(*args, **kwargs):
        raise PermissionError("Access Denied")

    import s3fs

    for name in ("_info", "_ls", "_call_s3"):
        monkeypatch.setattr(s3fs.S3FileSystem, name, denied)
    s3fs.S3FileSystem.clear_instance_cache()  # instances keep bound copies
    assert "credentials" in str(refused("s3://lab/x"))
    with pytest.raises(SystemicError) as caught:
        load_item(item)
    assert "credentials" in str(caught.value)


def test_s3_without_credentials_is_read_anonymously_and_says_so(s3, monkeypatch, tmp_path, caplog):
    import s3fs

    s3.pipe_file("lab/x/a.tif", tiff_bytes(np.zeros((4, 4), np.uint16)), ACL="public-read")
    for key in [key for key in os.environ if key.startswith("AWS_") and key != "AWS_ENDPOINT_URL"]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    (item,) = listed("s3://lab/x")
    assert load_item(item).image.pixels.shape == (1, 4, 4)
    assert sum("anonymously" in record.message for record in caplog.records) <= 1


# ---- size


def test_ten_thousand_files_take_less_than_seconds_and_one_folder_of_memory(tmp_path, monkeypatch):
    """10 plates of 1,000 files: a tenth of what the name says (10^5 take 5 s on one busy core)."""
    for p in range(10):
        folder = tmp_path / f"P{p:03d}"
        folder.mkdir()
        for i in range(1000):
            name = PHENIX.format(row=1 + i // 100, col=1 + i // 5 % 20, site=1 + i // 100, channel=1 + i % 5)
            os.close(os.open(folder / name, os.O_CREAT))
    began = time.perf_counter()
    count = sum(len(item.files) for item in list_items([str(tmp_path)]).items)
    seconds = time.perf_counter() - began
    assert count == 10_000 and seconds < 5
    tracemalloc.start()
    for _ in list_items([str(tmp_path)]).items:
        pass
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


# ---- real data


def test_real_phenix_field_loads(tmp_path):
    folder = data_folder("cellpainting_cytodataframe") / "pediatric_cancer_atlas_BR00143976_images"
    items = listed(folder)
    assert [i.item_id for i in items] == [
        "orig/r03c03f03p01-sk1fk1fl1.tiff",
        "outlines/CellsOutlines_BR00143976_C03_3.tiff",
        "outlines/NucleiOutlines_BR00143976_C03_3.tiff",
    ]
    assert items[0].metadata["Metadata_Well"] == "C03" and items[0].metadata["Metadata_Site"] == "3"
    loaded = load_item(items[0], num_channels=6)
    assert loaded.image.pixels.shape == (6, 1080, 1080) and loaded.image.pixels.dtype == np.uint16
    assert loaded.image.channel_names == tuple(f"ch{i}" for i in range(1, 7))
    for channel, file in enumerate(items[0].files):
        np.testing.assert_array_equal(loaded.image.pixels[channel], tifffile.imread(file.uri))


def test_real_plate_with_a_pattern_of_ones_own():
    folder = data_folder("cellpainting_cytodataframe") / "NF1_Plate_2_images"
    pattern = r"(?P<Well>[A-H]\d+)_01_(?P<token>\d_)(?P<site>\d)_(?P<token2>(?P<channel>[A-Z]+)_)001\.tif"
    items = listed(folder, pattern=pattern)
    assert [(i.metadata["Metadata_Well"], i.metadata["Metadata_Site"]) for i in items] == [
        ("B07", "3"),
        ("D06", "2"),
        ("D07", "1"),
        ("F07", "2"),
        ("H12", "1"),
    ]
    assert {i.channels for i in items} == {("DAPI", "GFP", "RFP")} and {i.plate for i in items} == {
        "NF1_Plate_2_images"
    }
    assert all(load_item(i).image.pixels.shape == (3, 904, 1224) for i in items)


def test_real_stitching_tiles_with_a_pattern_of_ones_own():
    folder = data_folder("scportrait_3ch") / "raw_image_tiles"
    pattern = (
        r"Timepoint(?P<time>\d+)_Row(?P<row>\d+)_Well(?P<col>\d+)_(?P<token>(?P<channel>[^_]+)_)"
        r"zstack(?P<plane>\d+)_r(?P<tile_row>\d+)_c(?P<tile_col>\d+)\.tif"
    )
    (item,) = listed(folder, pattern=pattern)
    assert item.channels == ("Alexa488", "DAPI", "mCherry") and item.metadata["Metadata_Well"] == "B04"
    assert item.metadata["Metadata_tile_row"] == "2" and load_item(item).image.pixels.shape == (3, 1080, 1080)


def test_real_nuclei_listing_counts():
    folder = data_folder("dsb2018_stage1")
    listing = list_items([str(folder / "*" / "*" / "images" / "*.png")])
    items = list(listing.items)
    assert len(items) == 124 + 65 and [i.item_id for i in items] == sorted(i.item_id for i in items)
    assert all(i.item_id.startswith(("stage1_train/", "stage1_test/")) for i in items)
