"""The page of real runs over plates: Phenix file names, and the Cell Painting fields of the real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from dinoray.report.gallery import build_gallery
from dinoray.report.html import write_report
from dinoray.report.plates import read_plates
from dinoray.report.run import open_for_report
from dinoray.report.sample import read_sample
from tests.conftest import texture
from tests.realdata import data_folder
from tests.report.test_run import Page
from tests.runs import run

HOSTILE = "\"><img src=x onerror=alert('p')>"


def test_phenix_plates_from_files_to_page(tmp_path: Path) -> None:
    for seed, plate in enumerate(("BR1", HOSTILE.replace("/", ""))):
        for row in range(1, 5):
            for column in range(1, 7):
                for channel in (1, 2):
                    path = tmp_path / "in" / plate / f"r{row:02d}c{column:02d}f01p01-ch{channel}sk1fk1fl1.tiff"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pixels = texture((32, 32), 1000 * seed + 10 * row + column + 100 * channel, "uint16")
                    pixels[: 2 * row, :column] = 65535  # saturated more with row and column
                    tifffile.imwrite(path, pixels)
    (tmp_path / "in" / "BR1" / "r02c03f01p01-ch2sk1fk1fl1.tiff").write_bytes(b"II*\x00")
    run(tmp_path / "in", tmp_path / "out", pattern="phenix", unit_items=10, features=("cls", "patches"))
    opened = open_for_report(str(tmp_path / "out"))
    plates = read_plates(opened)
    assert [plate.name for plate in plates.drawn] == ["BR1", HOSTILE] and plates.channels == ["ch1", "ch2"]
    lost = plates.drawn[0].wells[1, 2]
    assert (lost.rows, lost.planned, lost.quarantined) == (0, 1, 1)
    well = plates.drawn[1].wells[3, 5]
    pixels = tifffile.imread(tmp_path / "in" / HOSTILE / "r04c06f01p01-ch2sk1fk1fl1.tiff")
    assert np.isclose(well.mean("ch2", "frac_saturated"), (pixels == 65535).mean(), rtol=1e-5)
    assert np.isclose(well.mean("ch2", "p50"), np.percentile(pixels, 50), rtol=1e-3)
    page = Page(Path(write_report(str(tmp_path / "out"))).read_text())
    assert page.open == [] and "B03: no rows, 1 of 1 quarantined" in page.text
    for wanted in ("All 2 plates. Drawn as 24 wells", "where chance is 0.50", "where chance is 0.25", "row of the plate",
                   "By plate", "dinoray retry", "One PCA for each channel"):
        assert wanted in page.text, wanted
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert all(value.startswith(("#", "data:image/")) for name, value in page.attributes if name in ("href", "src"))


def test_maps_of_a_real_cell_painting_field(tmp_path: Path) -> None:
    source = data_folder("cellpainting_cytodataframe") / "pediatric_cancer_atlas_BR00143976_images" / "orig"
    run(source, tmp_path / "out", features=("cls", "patches"), size="resize")
    opened = open_for_report(str(tmp_path / "out"))
    gallery = build_gallery(opened, read_sample(opened))
    channels = [f"ch{i}" for i in range(1, 7)]
    assert list(gallery.bases) == channels == [row.channel for row in gallery.cards[0].rows]
    assert all(row.map and row.image and not row.note for row in gallery.cards[0].rows)
    assert len({row.map for row in gallery.cards[0].rows}) == 6
    for basis in gallery.bases.values():
        assert basis.num_grids == 1 and basis.num_tokens == 196 and 0 < basis.explained[0] <= 1
    assert read_plates(opened).drawn[0].wells.keys() == {(2, 2)}, "C03"
