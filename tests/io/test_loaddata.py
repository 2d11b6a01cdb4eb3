"""CellProfiler LoadData tables and what their cells may name: JUMP's columns, quirks of CSV, traps."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, ItemError, TransientError
from dinoray.io.images import load_item
from dinoray.io.items import Item
from dinoray.io.sources import list_items
from dinoray.io.table_paths import from_cell
from tests.conftest import texture

CHANNELS = ("DNA", "ER", "RNA", "AGP", "Mito")


def listed(*sources: object, **kwargs: object) -> list[Item]:
    return list(list_items([str(source) for source in sources], **kwargs).items)


def table(path: Path, rows: list[dict[str, str]], separator: str = ",") -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [separator.join(names), *(separator.join(row.get(name, "") for name in names) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def jump_row(well: str, site: int, path: str, **more: str) -> dict[str, str]:
    """A row as in JUMP's load_data_with_illum: five channels, illumination functions, metadata."""
    row = {"Metadata_Source": "source_4", "Metadata_Batch": "2021_04_26_Batch1", "Metadata_Plate": "BR00117035",
           "Metadata_Well": well, "Metadata_Site": str(site)}
    for number, channel in enumerate(CHANNELS, start=1):
        row[f"FileName_Orig{channel}"] = f"r01c{int(well[1:]):02d}f{site:02d}p01-ch{number}sk1fk1fl1.tiff"
        row[f"PathName_Orig{channel}"] = path
        row[f"FileName_Illum{channel}"] = f"BR00117035_Illum{channel}.npy"
        row[f"PathName_Illum{channel}"] = "/illum"
    return row | more


def images(folder: Path, wells: tuple[str, ...] = ("A01", "A02"), sites: tuple[int, ...] = (1, 2)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (well, site, number) in enumerate((w, s, n) for w in wells for s in sites for n in range(1, 6)):
        name = f"r01c{int(well[1:]):02d}f{site:02d}p01-ch{number}sk1fk1fl1.tiff"
        tifffile.imwrite(folder / name, texture((16, 16), seed, "uint16"))
    return folder


ID = "source_4/2021_04_26_Batch1/BR00117035/{}-{}"


@pytest.mark.parametrize("form", ["csv", "parquet", "semicolon", "tab"])
@pytest.mark.parametrize("path", ["absolute", "relative", "file url"])
def test_jump_table(tmp_path, form, path):
    folder = images(tmp_path / "images" / "BR 1")
    text = {"absolute": f"{folder}/", "relative": "images/BR 1", "file url": f"file:{folder}".replace(" ", "%20")}[path]
    rows = [jump_row(well, site, text) for well in ("A01", "A02") for site in (1, 2)]
    file = tmp_path / f"load_data.{'parquet' if form == 'parquet' else 'csv'}"
    if form == "parquet":
        frame = {name: [row[name] for row in rows] for name in rows[0]}
        frame["Metadata_Site"] = [int(n) for n in frame["Metadata_Site"]]
        pq.write_table(pa.table(frame | {"__index_level_0__": [0, 1, 2, 3]}), file)
    else:
        table(file, rows, {"csv": ",", "semicolon": ";", "tab": "\t"}[form])
    listing = list_items([str(file)])
    items = list(listing.items)
    assert [i.item_id for i in items] == [ID.format(w, s) for w in ("A01", "A02") for s in (1, 2)]
    assert all(i.channels == CHANNELS and i.problem is None for i in items)
    assert items[0].metadata == {
        "Metadata_Source": "source_4", "Metadata_Batch": "2021_04_26_Batch1", "Metadata_Plate": "BR00117035",
        "Metadata_Well": "A01", "Metadata_Site": "1"}
    assert items[0].group == "source_4/2021_04_26_Batch1/BR00117035" and items[0].plate == "BR00117035"
    assert listing.ignored == {f"illumination column of {file.name}": 5} and "illumination" in listing.describe_ignored()
    image = load_item(items[3]).image
    assert image.pixels.shape == (5, 16, 16) and image.channel_names == CHANNELS
    assert (image.pixels[4] == tifffile.imread(folder / "r01c02f02p01-ch5sk1fk1fl1.tiff")).all()


def test_urls_win_and_empty_ones_fall_back_to_the_path(tmp_path):
    folder = images(tmp_path / "i", ("A01",), (1,))
    row = jump_row("A01", 1, str(tmp_path / "elsewhere"))
    urls = {f"URL_Orig{c}": f"file://localhost{folder}/{row[f'FileName_Orig{c}']}" for c in CHANNELS}
    file = table(tmp_path / "l.csv", [row | urls, row | urls | {"Metadata_Site": "2", "URL_OrigER": ""}])
    good, fallback = listed(file)
    assert load_item(good).image.pixels.shape == (5, 16, 16)
    assert [f.version == "missing" for f in fallback.files] == [False, True, False, False, False]


def test_columns_of_image_tables_and_names_of_channels(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"1")
    file = table(tmp_path / "Image.csv", [{
        "ImageNumber": "1", "Image_FileName_OrigHoechst": "a.tif", "Image_PathName_OrigHoechst": "", "FileName_Orig": "a.tif",
        "FileName_Original": "a.tif", "Image_Metadata_Plate": "P", "Image_Metadata_well": "A01", "Metadata_Drug": "x",
        "Frame_Original": "0", "ObjectsFileName_Nuclei": "m.tif"}])
    listing = list_items([str(file)])
    (item,) = listing.items
    assert item.channels == ("Hoechst", "Orig", "Original")
    assert item.metadata == {"Metadata_Plate": "P", "Metadata_Well": "A01", "Metadata_Drug": "x"}
    assert item.item_id == "a.tif"  # without a site the path is the id
    assert listing.ignored == {"other column of Image.csv": 2}


def test_ids_are_unique_and_duplicates_are_told(tmp_path):
    images(tmp_path, ("A01",), (1,))
    rows = [jump_row("A01", 1, ""), jump_row("A01", 1, ""), jump_row("A01", 1, "", Metadata_Plane="2"),
            jump_row("A01", 1, "", Metadata_Plate="a/../b"), jump_row("A01", 1, "", Metadata_Plate="..")]
    items = listed(table(tmp_path / "l.csv", rows))
    assert [i.item_id.removeprefix("source_4/2021_04_26_Batch1/") for i in items] == [
        "BR00117035/A01-1", "BR00117035/A01-1", "BR00117035/A01-1-plane2", "a%2F..%2Fb/A01-1", "%2E%2E/A01-1"]
    assert [(i.problem or "").partition(":")[0] for i in items] == ["", "duplicate_id", "", "", ""]
    assert items[3].metadata["Metadata_Plate"] == "a/../b"  # the metadata keep what the table says


@pytest.mark.parametrize(
    "cells, word",
    [
        ({"FileName_DNA": "../../../etc/passwd"}, ".."),
        ({"FileName_DNA": "a.tif", "PathName_DNA": "../../etc"}, ".."),
        ({"FileName_DNA": "a.tif", "PathName_DNA": "/data/../etc"}, ".."),
        ({"FileName_DNA": "a.tif", "PathName_DNA": "file:/data/%2e%2e/etc"}, ".."),
        ({"FileName_DNA": "..\\..\\boot.ini"}, ".."),
        ({"FileName_DNA": "/etc/passwd"}, "PathName"),
        ({"FileName_DNA": "~root/x.tif"}, "PathName"),
        ({"FileName_DNA": "http://evil.example/x.tif"}, "PathName"),
        ({"FileName_DNA": "file:/etc/passwd"}, "PathName"),
        ({"FileName_DNA": "a.tif", "PathName_DNA": "C:\\data"}, "Windows"),
        ({"FileName_DNA": "a.tif", "PathName_DNA": "\\\\server\\share"}, "Windows"),
        ({"FileName_DNA": "a.tif", "PathName_DNA": "file://server/share"}, "another machine"),
        ({"URL_DNA": "file://server/share/a.tif"}, "another machine"),
        ({"URL_DNA": "s3://bucket/../other/a.tif"}, ".."),
        ({"URL_DNA": "zip://a.tif::http://evil.example/x.zip"}, "chained"),
        ({"URL_DNA": "simplecache::s3://b/x"}, "chained"),
        ({"URL_DNA": "s3://b/x::http://evil.example"}, "chained"),
        ({"URL_DNA": "reference://x"}, "chained"),
        ({"URL_DNA": "file:/zip::http://evil.example/x.zip"}, "within"),
        ({"URL_DNA": "ssh://host/x.tif"}, "chained"),
        ({"URL_DNA": "https://user:hunter2@example.org/a.tif"}, "password"),
        ({"FileName_DNA": "a.tif", "Frame_DNA": "3"}, "plane inside"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_traps_are_quarantined_row_by_row(tmp_path, cells, word):
    (tmp_path / "a.tif").write_bytes(b"x")
    good = {"FileName_DNA": "a.tif", "Metadata_Plate": "P", "Metadata_Well": "A01", "Metadata_Site": "1"}
    bad = {"FileName_DNA": "", **cells, "Metadata_Plate": "P", "Metadata_Well": "A01", "Metadata_Site": "2"}
    item, trapped = listed(table(tmp_path / "l.csv", [good, bad]))
    assert item.problem is None and trapped.item_id == "P/A01-2"
    assert trapped.problem.startswith(("bad_path: ", "unsupported: ")) and word in trapped.problem
    assert trapped.files[0].uri == "" and "hunter2" not in repr(trapped)
    with pytest.raises(ItemError):
        load_item(trapped)


@pytest.mark.parametrize("cell", ["zip://x::file:///etc/passwd", "file://host/x.png", "ftp://h/x.png", "C:\\x.png",
                                  "https://me:secret@h/x.png"])
def test_manifests_have_the_same_traps(tmp_path, cell):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "m.csv").write_text(f"uri\na.png\n{cell}\n")
    good, bad = listed(tmp_path / "m.csv")
    assert good.problem is None and bad.problem.startswith("bad_path") and "secret" not in repr(bad)


def test_a_relative_path_stays_in_its_bucket():
    assert from_cell("../b.png", "s3://lab/m") == "s3://lab/b.png"
    for text in ("../../other/b.png", "../../../../b.png", ".."):
        with pytest.raises(ItemError):
            from_cell(text, "s3://lab/m" if text != ".." else "s3://lab")


@pytest.mark.parametrize(
    "names, word",
    [
        (["FileName_IllumDNA", "Metadata_Plate"], "illumination"),
        (["FileName_DNA", "FileName_OrigDNA"], "one channel"),
        (["FileName_DNA", "Image_FileName_DNA"], "two columns"),
        (["FileName_DNA", "Metadata_plate", "Metadata_Plate"], "same metadata"),
        (["PathName_DNA", "Metadata_Plate"], "needs one column of files"),
    ],
)
def test_tables_that_are_refused(tmp_path, names, word):
    with pytest.raises(BadRequest) as caught:
        listed(table(tmp_path / "l.csv", [dict.fromkeys(names, "x")]))
    assert word in str(caught.value)


def test_odd_encodings_of_parquet(tmp_path):
    """Text without its annotation, dictionaries, large strings, many row groups (source_10 of JUMP and others)."""
    images(tmp_path, ("A01",), (1, 2))
    rows = [jump_row("A01", site, "") for site in (1, 2)]
    frame = {name: [row[name] for row in rows] for name in rows[0]}
    columns = {name: pa.array([v.encode() for v in values], pa.binary()) if i % 3 == 0 else
               pa.array(values, pa.large_string()) if i % 3 == 1 else pa.array(values).dictionary_encode()
               for i, (name, values) in enumerate(frame.items())}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet", row_group_size=1, compression="gzip")
    assert [i.item_id for i in listed(tmp_path / "l.parquet")] == [ID.format("A01", s) for s in (1, 2)]
    pq.write_table(pa.table(columns | {"FileName_OrigDNA": [b"\xff\xfe", b"x"]}), tmp_path / "l.parquet")
    with pytest.raises(BadRequest, match="FileName_OrigDNA"):
        listed(tmp_path / "l.parquet")


def test_a_long_table_streams(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"x")
    with (tmp_path / "l.csv").open("w") as file:
        file.write("FileName_DNA,Metadata_Plate,Metadata_Well,Metadata_Site,Metadata_Note\n")
        file.writelines(f"a.tif,P,A01,{i},{'n' * 100}\n" for i in range(8_000))
    tracemalloc.start()
    assert sum(1 for _ in list_items([str(tmp_path / "l.csv")]).items) == 8_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


NAMES = st.sampled_from(["FileName_DNA", "FileName_OrigDNA", "PathName_DNA", "URL_ER", "FileName_IllumDNA", "Frame_DNA",
                         "Metadata_Plate", "Metadata_Well", "Metadata_Site", "metadata_site", "uri", "", "x"])
CELLS = st.one_of(st.text(alphabet=st.characters(exclude_characters="\r\n\",;\t", exclude_categories=["Cs"]), max_size=12),
                  st.sampled_from(["a.tif", "..", "/", "file:/x", "s3://b/../k", "zip::http://x", "~", "%2e%2e/%00", "C:\\"]))


@given(st.lists(NAMES, min_size=1, max_size=6), st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cells_give_items_or_a_refusal(tmp_path, names, data):
    rows = data.draw(st.lists(st.lists(CELLS, min_size=len(names), max_size=len(names)), max_size=4))
    text = "\n".join(",".join(row) for row in [names, *rows])
    (tmp_path / "l.csv").write_bytes(text.encode())
    try:
        items = listed(tmp_path / "l.csv")
    except (BadRequest, TransientError) as error:  # transient: a bucket was named, and there is no network
        assert error.what
        return
    for item in items:
        assert item.item_id and not re.search(r"[\0-\x1f]", item.item_id)
        assert all(".." not in f.uri.split("/") for f in item.files if item.problem is None) or "uri" in names
