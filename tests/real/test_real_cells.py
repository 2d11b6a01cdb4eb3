"""Cells of real microscopy images (optional folder ../shared/data): masks as people have them, one row per cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from skimage.filters import gaussian, threshold_otsu
from skimage.io import imread
from skimage.measure import label, regionprops_table

from dinoray import open_features
from dinoray.errors import BadRequest
from tests.realdata import data_folder
from tests.runners.test_image_features import reasons_of
from tests.runs import check_whole, run_cells

NF1 = r"(?P<well>[A-P]\d+)_01_(?P<token>\d)_(?P<site>\d)_(?P<token2>(?P<channel>DAPI|GFP|RFP))_001\.tif"


def test_every_nucleus_of_the_label_images_is_a_row(tmp_path: Path) -> None:
    folder = data_folder("dsb2018_stage1_rest")
    out = tmp_path / "out"
    outcome = run_cells(folder / "images", out, labels=str(folder / "labels"), limit=12, pixel_size_um=0.5, crop_um=20.0,
                        features=("cls",), channels="mean", scaling="image")
    check_whole(out)
    assert outcome.exit_code == 0
    rows = open_features(str(out)).table(["item_id", "object_id", "area_px", "centroid_y_px", "centroid_x_px"]).to_pylist()
    ids = {row["item_id"] for row in rows}
    assert len(ids) == 12 and len(rows) > 100
    for item_id in ids:
        table = regionprops_table(imread(folder / "labels" / item_id), properties=("label", "area", "centroid"))
        mine = [row for row in rows if row["item_id"] == item_id]
        assert [row["object_id"] for row in mine] == table["label"].tolist()
        assert [row["area_px"] for row in mine] == table["area"].tolist()
        np.testing.assert_allclose([row["centroid_x_px"] for row in mine], table["centroid-1"])
    vectors = open_features(str(out)).matrix("cls")
    assert np.isfinite(vectors).all() and (vectors.std(axis=0) > 0).mean() > 0.9


def test_a_plate_whose_masks_are_binary(tmp_path: Path) -> None:
    """CellProfiler wrote 0/255 masks: refused per image, until each nucleus has its number."""
    folder = data_folder("cellpainting_cytodataframe")
    job = {"pattern": NF1, "pixel_size_um": 0.5, "crop_um": 30.0, "features": ("cls",), "max_failed_fraction": 1}
    masks = folder / "NF1_Plate_2_masks"
    run_cells(folder / "NF1_Plate_2_images", tmp_path / "binary", labels=f"{masks}/*_MaskNuclei.tiff", **job)
    assert set(reasons_of(tmp_path / "binary").values()) == {"bad_labels"}
    (tmp_path / "lab").mkdir()
    counts = {}
    for mask in masks.glob("*_MaskNuclei.tiff"):
        labelled, counts[mask.name.split("_")[0]] = label(tifffile.imread(mask), return_num=True)
        tifffile.imwrite(tmp_path / "lab" / mask.name, labelled.astype(np.uint16))
    outcome = run_cells(folder / "NF1_Plate_2_images", tmp_path / "out", labels=str(tmp_path / "lab"), **job)
    check_whole(tmp_path / "out")
    assert outcome.exit_code == 0 and outcome.tally.rows == 3 * sum(counts.values())
    rows = open_features(str(tmp_path / "out")).table(["Metadata_Well", "channel", "object_id"]).to_pylist()
    assert len({(row["Metadata_Well"], row["object_id"]) for row in rows}) == sum(counts.values())
    assert {row["channel"] for row in rows} == {"DAPI", "GFP", "RFP"}


def test_a_cell_painting_field_with_a_table_of_nuclei(tmp_path: Path) -> None:
    """Phenix names, six channels, centroids by plate, well and site as a CellProfiler table has them."""
    folder = data_folder("cellpainting_cytodataframe") / "pediatric_cancer_atlas_BR00143976_images/orig"
    with pytest.raises(BadRequest, match="pixel size"):
        run_cells(folder, tmp_path / "out", centroids=str(table(folder, tmp_path / "nuclei.csv")), pixel_size_um=None)
    outcome = run_cells(folder, tmp_path / "out", centroids=str(tmp_path / "nuclei.csv"), pixel_size_um=0.598, crop_um=60.0,
                        features=("cls",))
    check_whole(tmp_path / "out")
    rows = open_features(str(tmp_path / "out")).table(["channel", "object_id", "p999", "Metadata_Well", "x0", "x1"]).to_pylist()
    assert outcome.tally.rows == len(rows) == 6 * len((tmp_path / "nuclei.csv").read_text().splitlines()[1:])
    assert [row["channel"] for row in rows[:6]] == [f"ch{i}" for i in range(1, 7)]
    assert {row["Metadata_Well"] for row in rows} == {"C03"}
    assert {row["x1"] - row["x0"] for row in rows} <= {101, 102}  # 60 µm are 100.3 px
    assert max(row["p999"] for row in rows) > 255, "16-bit values stay 16-bit"


def table(folder: Path, path: Path) -> Path:
    """Nuclei of the DNA channel, found by a threshold, as CellProfiler's table would list them."""
    dna = gaussian(tifffile.imread(folder / "r03c03f03p01-ch5sk1fk1fl1.tiff").astype(np.float32), 3)
    nuclei = label(dna > threshold_otsu(dna))
    found = regionprops_table(nuclei, properties=("centroid", "area"))
    lines = ["Metadata_Plate,Metadata_Well,Metadata_Site,ObjectNumber,Nuclei_Location_Center_X,Nuclei_Location_Center_Y"]
    for n, (y, x, area) in enumerate(zip(found["centroid-0"], found["centroid-1"], found["area"], strict=True)):
        if area > 300:
            lines.append(f"{folder.name},C03,3,{n + 1},{x},{y}")
    assert len(lines) > 10
    path.write_text("\n".join(lines) + "\n")
    return path
