"""Real microscopy images (optional folder ../shared/data): the main job on what people have on their disks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinoray import open_features
from tests.realdata import data_folder
from tests.runs import check_whole, run


@pytest.fixture
def no_constant_vectors():
    """Checks that features tell images apart."""
    def check(matrix: np.ndarray) -> None:
        assert np.isfinite(matrix).all()
        assert (matrix.std(axis=0) > 0).mean() > 0.9
    return check


def test_nuclei_of_several_modalities(tmp_path: Path, no_constant_vectors) -> None:
    folder = data_folder("dsb2018_stage1")
    outcome = run(f"{folder}/stage1_test/*/images/*.png", tmp_path / "out", limit=40, unit_items=16)
    check_whole(tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.tally.items == 40
    features = open_features(str(tmp_path / "out"))
    rows = features.table(["item_id", "channel", "height", "width", "y1", "x1", "tile", "frac_saturated"]).to_pylist()
    assert {row["channel"] for row in rows} == {"rgb"}  # RGBA files, alpha dropped
    assert len({row["item_id"] for row in rows}) == 40
    assert all(row["y1"] <= row["height"] and row["x1"] <= row["width"] for row in rows)
    assert any(row["height"] % 16 for row in rows), "the set has sizes that are no multiple of a patch"
    no_constant_vectors(features.matrix("cls"))


def test_a_cell_painting_field_with_phenix_names(tmp_path: Path, no_constant_vectors) -> None:
    folder = data_folder("cellpainting_cytodataframe") / "pediatric_cancer_atlas_BR00143976_images/orig"
    run(folder, tmp_path / "out", features=("cls",))
    check_whole(tmp_path / "out")
    features = open_features(str(tmp_path / "out"))
    rows = features.table().to_pylist()
    assert len(rows) == 6 * 25  # six channels, ceil(1080 / 256)^2 tiles
    assert {row["channel"] for row in rows} == {f"ch{i}" for i in range(1, 7)}
    assert {(row["Metadata_Well"], row["Metadata_Site"]) for row in rows} == {("C03", "3")}
    assert max(row["p999"] for row in rows) > 255, "16-bit values must stay 16-bit"
    assert {row["uri"].rsplit("-", 1)[1][:3] for row in rows if row["channel"] == "ch5"} == {"ch5"}
    no_constant_vectors(features.matrix("cls"))


def test_channel_groups_and_clahe_on_cell_painting(tmp_path: Path) -> None:
    folder = data_folder("cellpainting_cytodataframe") / "pediatric_cancer_atlas_BR00143976_images/orig"
    common = {"features": ("cls",), "channels": "A=ch5,ch2,ch3;B=ch6,ch4,ch1", "size": "resize"}
    run(folder, tmp_path / "plain", **common)
    run(folder, tmp_path / "clahe", contrast="clahe", **common)
    plain, clahe = (open_features(str(tmp_path / name)) for name in ("plain", "clahe"))
    assert plain.table(["channel"])["channel"].to_pylist() == ["A", "B"]
    assert not np.allclose(plain.matrix("cls"), clahe.matrix("cls"), atol=1e-2)


def test_a_plate_with_its_own_file_names(tmp_path: Path, no_constant_vectors) -> None:
    folder = data_folder("cellpainting_cytodataframe") / "NF1_Plate_2_images"
    # the third number counts channels, so it is cut from the id together with the channel's name
    pattern = r"(?P<well>[A-P]\d+)_01_(?P<token>\d)_(?P<site>\d)_(?P<token2>(?P<channel>DAPI|GFP|RFP))_001\.tif"
    run(folder, tmp_path / "out", pattern=pattern, features=("cls",), size="resize")
    check_whole(tmp_path / "out")
    features = open_features(str(tmp_path / "out"))
    rows = features.table(["item_id", "channel", "Metadata_Well", "Metadata_Site"]).to_pylist()
    assert len(rows) == 15 and len({row["item_id"] for row in rows}) == 5
    assert {(r["Metadata_Well"], r["Metadata_Site"]) for r in rows} == \
        {("B07", "3"), ("D06", "2"), ("D07", "1"), ("F07", "2"), ("H12", "1")}
    assert [row["channel"] for row in rows[:3]] == ["DAPI", "GFP", "RFP"]
    no_constant_vectors(features.matrix("cls"))


def test_two_microscope_layouts_side_by_side(tmp_path: Path) -> None:
    folder = data_folder("scportrait_3ch")
    run([str(folder / "raw_image_tiles"), str(folder / "example_3")], tmp_path / "out", features=("cls",), size="resize")
    check_whole(tmp_path / "out")
    rows = open_features(str(tmp_path / "out")).table(["item_id", "channel", "height", "p999"]).to_pylist()
    assert {(row["item_id"].split("/")[0], row["height"]) for row in rows} == {("raw_image_tiles", 1080), ("example_3", 400)}
    assert len(rows) == 6
