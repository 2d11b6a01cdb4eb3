"""A LoadData table and an OME-Zarr plate of the same images give the same features, through run, resume and report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinoray import open_features
from dinoray.errors import ChangedRequest
from dinoray.report.html import write_report
from tests.conftest import texture
from tests.omezarr import write_plate
from tests.runs import check_whole, run, use_tiny_backbone

CHANNELS = ("DNA", "ER")


def features(out: Path) -> dict[tuple[str, str, str], np.ndarray]:
    """(well, field, channel) -> vector."""
    table = open_features(str(out)).table(["Metadata_Well", "Metadata_Site", "channel", "cls"])
    keys = zip(*(table[name].to_pylist() for name in ("Metadata_Well", "Metadata_Site", "channel")), strict=True)
    return dict(zip(keys, np.array(table["cls"].to_pylist()), strict=True))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_table_and_a_plate_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    use_tiny_backbone(monkeypatch)
    wells = {well: [texture((2, 48, 64), 10 * w + f, "uint16") for f in range(2)] for w, well in enumerate(("A/1", "B/2"))}
    plate = write_plate(tmp_path / "in" / "BR1.ome.zarr", wells, version=version, channels=CHANNELS)
    lines = ["FileName_OrigDNA,FileName_OrigER,Metadata_Plate,Metadata_Well,Metadata_Site"]
    for well, fields in wells.items():
        for f, pixels in enumerate(fields):
            names = [f"{well.replace('/', '')}_{f}_{channel}.tif" for channel in CHANNELS]
            for name, plane in zip(names, pixels, strict=True):
                tifffile.imwrite(tmp_path / name, plane)
            lines.append(f"{names[0]},{names[1]},BR1,{well[0]}0{well[2]},{f}")
    (tmp_path / "load_data.csv").write_text("\n".join(lines) + "\n")
    a = run(tmp_path / "load_data.csv", tmp_path / "a")
    b = run(tmp_path / "in", tmp_path / "b")
    assert (a.exit_code, b.exit_code, a.tally.rows, b.tally.rows) == (0, 0, 8, 8)
    for out in (tmp_path / "a", tmp_path / "b"):
        check_whole(out)
    table, zarr = features(tmp_path / "a"), features(tmp_path / "b")
    assert table.keys() == zarr.keys() and ("A01", "1", "ER") in zarr
    for key, vector in table.items():
        np.testing.assert_array_equal(vector, zarr[key])  # one scaling per plate: the pixels and the groups are the same
    page = Path(write_report(str(tmp_path / "b"), None)).read_text()
    assert "BR1.ome.zarr/A/1/0" in page and page.count("data:image/") > 4
    assert run(tmp_path / "in", tmp_path / "b").executed_units == 0
    chunk = next(path for path in sorted((plate / "A" / "1" / "0" / "0").rglob("0")) if path.is_file())
    chunk.write_bytes(chunk.read_bytes())
    with pytest.raises(ChangedRequest, match="A/1/0"):
        run(tmp_path / "in", tmp_path / "b")
