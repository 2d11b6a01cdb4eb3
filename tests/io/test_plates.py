"""dinoray.io.plates: real file names of the microscopes, and regexes of users."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.errors import BadRequest
from dinoray.io.plate_folders import plate_folder
from dinoray.io.plates import MAX_NAME, SHIPPED, detect, format_well, get_pattern, parse, row_letters
from dinoray.io.sources import list_items
from tests.realdata import data_folder

GUID = "7B1A9C3E-12AB-4CDE-8F00-0123456789AB"


@pytest.mark.parametrize(
    "pattern, name, key, channel, metadata",
    [
        (
            "phenix",
            "r03c03f03p01-ch5sk1fk1fl1.tiff",
            "r03c03f03p01-sk1fk1fl1.tiff",
            "ch5",
            {"Well": "C03", "Site": "3", "Plane": "1", "Time": "1"},
        ),
        (
            "phenix",
            "r01c01f01p01-ch1sk1.tiff",
            "r01c01f01p01-sk1.tiff",
            "ch1",
            {"Well": "A01", "Site": "1", "Plane": "1", "Time": "1"},
        ),
        (
            "phenix",
            "r16c24f09p03-ch12sk10fk1fl1.tiff",
            "r16c24f09p03-sk10fk1fl1.tiff",
            "ch12",
            {"Well": "P24", "Site": "9", "Plane": "3", "Time": "10"},
        ),
        (
            "phenix",
            "r32c48f100p01-ch1sk1fk1fl1.TIF",
            "r32c48f100p01-sk1fk1fl1.TIF",
            "ch1",
            {"Well": "AF48", "Site": "100", "Plane": "1", "Time": "1"},
        ),
        (
            "phenix",
            "r02c07f02p05-ch3t01.tiff",
            "r02c07f02p05-t01.tiff",
            "ch3",
            {"Well": "B07", "Site": "2", "Plane": "5", "Timepoint": "1"},
        ),
        ("phenix", "r02c07f02p05-ch3.tiff", "r02c07f02p05-.tiff", "ch3", {"Well": "B07", "Site": "2", "Plane": "5"}),
        (
            "imagexpress",
            f"BR0001_A01_s1_w2{GUID}.tif",
            "BR0001_A01_s1.tif",
            "w2",
            {"Plate": "BR0001", "Well": "A01", "Site": "1"},
        ),
        (
            "imagexpress",
            "P_12_H12_s4_w1_z3.tif",
            "P_12_H12_s4_z3.tif",
            "w1",
            {"Plate": "P_12", "Well": "H12", "Site": "4", "Plane": "3"},
        ),
        ("imagexpress", "A01_s1_w1.tif", "A01_s1.tif", "w1", {"Well": "A01", "Site": "1"}),
        ("imagexpress", f"exp_B02_w3{GUID}.TIF", "exp_B02.TIF", "w3", {"Plate": "exp", "Well": "B02"}),
        (
            "yokogawa",
            "AS_09125_A01_T0001F003L01A02Z01C02.tif",
            "AS_09125_A01_T0001F003L01Z01.tif",
            "C02",
            {"Plate": "AS_09125", "Well": "A01", "Time": "1", "Site": "3", "Plane": "1"},
        ),
        (
            "yokogawa",
            "1086292389_P24_T0012F016L01A01Z10C01.png",
            "1086292389_P24_T0012F016L01Z10.png",
            "C01",
            {"Plate": "1086292389", "Well": "P24", "Time": "12", "Site": "16", "Plane": "10"},
        ),
    ],
)
def test_shipped_patterns(pattern, name, key, channel, metadata):
    found = parse(SHIPPED[pattern], f"folder/of/{name}")
    assert found.key_without_channel == f"folder/of/{key}" and found.channel == channel
    assert found.metadata == {f"Metadata_{k}": v for k, v in metadata.items()}
    for other in SHIPPED:
        assert other == pattern or parse(SHIPPED[other], name) is None


@pytest.mark.parametrize(
    "name",
    [
        "r03c03f03p01-ch5sk1fk1fl1.tiff.bak",
        "r3c3f3p1-ch5.tiff",
        "xr03c03f03p01-ch5sk1.tiff",
        "",
        "image.tif",
        "r03c03f03p01-ch5sk1fk1fl1.tiff\n",
        "A01.tif",
        "Index.idx.xml",
        "r٠٣c03f03p01-ch5.tiff",
    ],
)
def test_names_that_match_no_shipped_pattern(name):
    assert all(parse(pattern, name) is None for pattern in SHIPPED.values())


def test_all_channels_of_an_image_get_one_key_and_other_planes_another():
    keys = {parse(SHIPPED["phenix"], f"r03c03f03p01-ch{c}sk1fk1fl1.tiff").key_without_channel for c in range(1, 12)}
    assert len(keys) == 1
    assert parse(SHIPPED["phenix"], "r03c03f03p02-ch1sk1fk1fl1.tiff").key_without_channel not in keys
    assert parse(SHIPPED["phenix"], "r03c03f03p01-ch1sk2fk1fl1.tiff").key_without_channel not in keys


def test_detect_needs_all_names():
    phenix = [f"r01c01f01p01-ch{c}sk1fk1fl1.tiff" for c in (1, 2)]
    assert detect(phenix).name == "phenix"
    assert detect([*phenix, "overview.tiff"]) is None
    assert detect([]) is None
    imagexpress = [f"P_A01_s1_w1{GUID}.tif", f"P_A01_s1_w1_thumb{GUID}.tif"]
    assert detect(imagexpress).name == "imagexpress"
    assert detect(imagexpress[1:]) is None


def test_user_regex_cuts_the_channel_or_the_tokens():
    pattern = get_pattern(r"(?P<Well>[A-H]\d+)_(?P<Metadata>x)?(?P<site>\d+)_(?P<channel>[A-Z]+)\.tif")
    found = parse(pattern, "a/d6_1_DAPI.tif")
    assert found is None
    found = parse(pattern, "a/D6_01_DAPI.tif")
    assert found.key_without_channel == "a/D6_01_.tif" and found.channel == "DAPI"
    assert found.metadata == {"Metadata_Well": "D06", "Metadata_Site": "1"}
    pattern = get_pattern(r"(?P<well>.{3})(?P<token>_(?P<channel>\d)of3)\.tif")
    assert parse(pattern, "B02_2of3.tif").key_without_channel == "B02.tif"


def test_user_regex_with_a_slash_sees_the_path_below_the_root():
    pattern = get_pattern(r"(?P<plate>[^/]+)/(?P<channel>[^/]+)/(?P<well>\w\d\d)\.png")
    found = parse(pattern, "P7/DNA/B02.png")
    assert found.key_without_channel == "P7//B02.png" and found.metadata["Metadata_Plate"] == "P7"
    assert parse(pattern, "B02.png") is None and parse(pattern, "x/P7/DNA/B02.png") is None


@pytest.mark.parametrize(
    "text",
    [
        "(?P<channel>",
        "(?P<chan>x)",
        "nonsense",
        "",
        "(?P<channel>a+)+b",
        r"(?P<channel>\d)((a*)*)c",
        r"(?P<channel>(x|(y+))*)z",
        "(" * 2000,
    ],
)
def test_bad_regexes_are_refused(text):
    with pytest.raises(BadRequest) as caught:
        get_pattern(text)
    assert caught.value.todo


def test_innocent_regexes_are_not_refused():
    for text in (
        r"(?P<channel>\d+)_.*\.tif",
        r"(?:a\d{1,3})+(?P<channel>x)",
        r"(?P<channel>(?:ab)?c+)",
        r"(?P<channel>[a-z]+)(-\w)*",
    ):
        get_pattern(text)
    assert get_pattern("Phenix") is SHIPPED["phenix"]


def test_long_names_do_not_match():
    pattern = get_pattern(r".*(?P<channel>ch\d).*")
    assert parse(pattern, "ch1" + "x" * (MAX_NAME - 3)) and parse(pattern, "ch1" + "x" * (MAX_NAME - 2)) is None


@given(st.text(max_size=80) | st.from_regex(re.compile(r"r\d{2}c\d{2}f\d{2}p\d{2}-ch.{0,20}"), fullmatch=True))
def test_shipped_patterns_take_any_name(name):
    for pattern in SHIPPED.values():
        found = parse(pattern, name)
        if found is not None:
            assert found.channel and found.channel in name and found.key_without_channel != name
            assert all(isinstance(value, str) for value in found.metadata.values())


@pytest.mark.parametrize("pattern", SHIPPED)
def test_shipped_patterns_are_fast_on_hostile_names(pattern):
    began = time.perf_counter()
    for evil in (
        "A01_" * 128,
        "_" * 512,
        "r01c01" * 85,
        "A01_s1_w1" * 56,
        "9" * 512,
        "A" * 511 + "\n",
        "A01_T0001" * 56,
    ):
        parse(SHIPPED[pattern], evil[:MAX_NAME])
    assert time.perf_counter() - began < 0.5


@given(st.integers(1, 18278))
def test_row_letters_count_like_a_spreadsheet(row):
    number = 0
    for letter in row_letters(row):
        number = number * 26 + ord(letter) - 64
    assert number == row


@pytest.mark.parametrize(
    "text, well",
    [
        ("a1", "A01"),
        ("C03", "C03"),
        ("af48", "AF48"),
        ("B-02", "B02"),
        ("H012", "H12"),
        ("control", "control"),
        ("", ""),
    ],
)
def test_format_well(text, well):
    assert format_well(text) == well


def test_phenix_names_of_real_data():
    folder = data_folder("cellpainting_cytodataframe") / "pediatric_cancer_atlas_BR00143976_images" / "orig"
    names = sorted(path.name for path in folder.iterdir())
    assert detect(names).name == "phenix"
    found = [parse(SHIPPED["phenix"], name) for name in names]
    assert {f.key_without_channel for f in found} == {"r03c03f03p01-sk1fk1fl1.tiff"}
    assert [f.channel for f in found] == [f"ch{i}" for i in range(1, 7)]


# ---- folders of plates


@pytest.mark.parametrize(
    "folder, well, path, plate, metadata",
    [
        ("/d/BR1__2020-11-08T18_18_23-Measurement1/Images", "C03", "/d/BR1__2020-11-08T18_18_23-Measurement1", "BR1",
         {"PlateFolder": "BR1__2020-11-08T18_18_23-Measurement1"}),
        ("/d/A_x__2021-05-02T16_02_51-Measurement 12", "C03", "/d/A_x__2021-05-02T16_02_51-Measurement 12", "A_x",
         {"PlateFolder": "A_x__2021-05-02T16_02_51-Measurement 12"}),
        ("/d/P9/TimePoint_1/ZStep_02", None, "/d/P9", "P9", {"Time": "1", "Plane": "2"}),
        ("/d/P9/timepoint_10", None, "/d/P9", "P9", {"Time": "10"}),
        ("/d/P9/A01", "A01", "/d/P9", "P9", {}),
        ("/d/P12", "A01", "/d/P12", "P12", {}),  # a plate may be called like a well
        ("s3://b/x/P9/Images", None, "s3://b/x/P9", "P9", {}),
        ("s3://b", None, "s3://b", "b", {}),
        ("/", None, "", "", {}),
        ("/Images", None, "", "", {}),
    ],
)
def test_plate_folder(folder, well, path, plate, metadata):
    found = plate_folder(folder, well)
    assert (found.path, found.plate) == (path, plate)
    assert found.metadata == {f"Metadata_{k}": v for k, v in metadata.items()}


def items_of(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    listing = list_items([str(root)])
    return list(listing.items), listing


def test_harmony_export(tmp_path):
    """Two measurements of one plate, and a plate of the same name elsewhere: three scalings, nothing mixed."""
    first, second = (f"BR00117035__2021-05-02T16_02_51-Measurement {n}" for n in (1, 2))
    names = [f"{top}/Images/r01c{c:02d}f01p01-ch{ch}sk1fk1fl1.tiff" for top in (first, second, f"old/{first}")
             for c in (1, 2) for ch in (1, 2)]
    items, listing = items_of(tmp_path, [*names, f"{first}/Images/Index.xml", f"{first}/Images/Index.ref.txt"])
    assert len(items) == 6 and {i.plate for i in items} == {"BR00117035"} and all(i.problem is None for i in items)
    assert {i.group for i in items} == {first, second, f"old/{first}"}
    assert all(i.metadata["Metadata_PlateFolder"] in i.item_id and i.metadata["Metadata_Well"] in ("A01", "A02") for i in items)
    assert listing.ignored == {".xml": 1, ".txt": 1}


def test_imagexpress_export(tmp_path):
    """MetaXpress: experiment/date/plate number/TimePoint_1/ZStep_1, with and without a plate in the name."""
    names = [f"exp/2021-05-02/{number}/TimePoint_1/ZStep_{z}/{prefix}B02_s{s}_w{w}{GUID}.TIF" for number, prefix in
             ((411, ""), (412, ""), (413, "BR1_"), (414, "BR1_")) for z in (1, 2) for s in (1, 2) for w in (1, 2)]
    items, listing = items_of(tmp_path, [*names, f"exp/2021-05-02/411/TimePoint_1/ZStep_1/B02_s1_w1_thumb{GUID}.TIF"])
    assert len(items) == 16 and listing.ignored == {"thumbnail": 1}
    assert {(i.plate, i.group) for i in items} == {
        ("411", "exp/2021-05-02/411"), ("412", "exp/2021-05-02/412"), ("BR1", "exp/2021-05-02/413/BR1"),
        ("BR1", "exp/2021-05-02/414/BR1")}
    assert {(i.metadata["Metadata_Plane"], i.metadata["Metadata_Time"]) for i in items} == {("1", "1"), ("2", "1")}
    assert all(i.channels == ("w1", "w2") and i.problem is None for i in items)


def test_cellvoyager_export(tmp_path):
    """CV8000: correction images of the camera lie beside, and unnamed plates are called after their kind."""
    files = [f"{{}}_{well}_T0001F{f:03d}L01A{c:02d}Z01C{c:02d}.tif" for well in ("A01", "P24") for f in (1, 2) for c in (1, 2)]
    names = [f"{folder}/{name.format(prefix)}" for folder, prefix in (
        ("20210502T1/APTJUM105", "APTJUM105"), ("m1", "AssayPlate_Greiner_#655090"), ("m2", "AssayPlate_Greiner_#655090"))
        for name in files]
    extra = [f"{folder}/{name}" for folder in ("m1", "m2") for name in
             ("DC_sCMOS #1_CAM1.tif", "SC_BP445-45_40x_M10_CH01.tif", "MeasurementData.mlf")]
    items, listing = items_of(tmp_path, names + extra)
    assert {(i.plate, i.group) for i in items} == {("APTJUM105", "20210502T1/APTJUM105"), ("m1", "m1"), ("m2", "m2")}
    assert len(items) == 12 and all(i.channels == ("C01", "C02") and i.problem is None for i in items)
    assert items[-1].metadata == {"Metadata_Plate": "m2", "Metadata_PlateType": "AssayPlate_Greiner_#655090",
                                  "Metadata_Well": "P24", "Metadata_Time": "1", "Metadata_Site": "2", "Metadata_Plane": "1"}
    assert listing.ignored == {"camera correction image": 4, ".mlf": 2}


def test_a_plate_in_one_folder_per_well_is_one_plate(tmp_path):
    names = [f"P7/{well}/P7_{well}_T0001F001L01A01Z01C01.tif" for well in ("A01", "A02", "H12")]
    items, _ = items_of(tmp_path, names)
    assert {(i.plate, i.group) for i in items} == {("P7", "P7")} and len(items) == 3
