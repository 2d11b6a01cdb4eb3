"""pycytominer takes the export without being told a column; the code of docs/profiling.md runs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pycytominer import aggregate, feature_select, normalize
from pycytominer.cyto_utils import infer_cp_features

from dinoray.export.profiles import export_profiles
from dinoray.io.stores import LocalStore
from tests.export.conftest import write_plates
from tests.export.outputs import plate_rows, write_output
from tests.runs import command, complete

DOCS = Path(__file__).resolve().parents[2] / "docs/profiling.md"


def read(out: Path, **options: object) -> pd.DataFrame:
    return pd.read_parquet(export_profiles(str(out), **options).target)


@pytest.mark.parametrize("how", ["mean", "median"])
@pytest.mark.parametrize("objects", [0, 5])
def test_its_aggregate_equals_our_wells(tmp_path: Path, how: str, objects: int) -> None:
    write_output(LocalStore(tmp_path), plate_rows(sites=3, objects=objects, seed=3))
    below = read(tmp_path, level="object" if objects else "image", how=how)
    theirs = aggregate(below, operation=how)  # features and strata inferred
    ours = read(tmp_path, level="well", how=how)
    features = infer_cp_features(ours)
    assert len(features) == 2 * 2 * 3
    assert features == infer_cp_features(below)
    merged = ours.merge(theirs, on=["Metadata_Plate", "Metadata_Well"], suffixes=("", "_theirs"), validate="one_to_one")
    assert len(merged) == len(ours) == len(theirs) == 6
    np.testing.assert_allclose(merged[features], merged[[f"{name}_theirs" for name in features]], rtol=1e-6, atol=1e-7)


def test_a_real_run_of_two_plates(plates_out: Path) -> None:
    sites = read(plates_out, level="site")
    wells = read(plates_out, level="well")
    assert len(sites) == 21
    assert list(zip(wells["Metadata_Plate"], wells["Metadata_Well"], strict=True)) == [
        *(("P9", well) for well in ("A01", "A02", "A03", "B01", "B02")),  # B03 is quarantined
        *(("P10", well) for well in ("A01", "A02", "A03", "B01", "B02", "B03"))]
    assert wells["Metadata_Count_Quarantined"].tolist() == [0, 1, *[0] * 9]  # P9 A02
    theirs = aggregate(sites, operation="mean")
    theirs = wells[["Metadata_Plate", "Metadata_Well"]].merge(theirs)
    features = infer_cp_features(wells)
    assert len(features) == 2 * 2 * 16
    np.testing.assert_allclose(theirs[features], wells[features], rtol=1e-5, atol=1e-6)
    assert wells[features].to_numpy().std(axis=0).min() > 0
    for _, plate in sites.groupby("Metadata_Plate"):
        scaled = normalize(plate)
        assert abs(scaled[features].mean().to_numpy()).max() < 1e-5
        assert list(scaled.filter(like="Metadata_")) == list(plate.filter(like="Metadata_"))
        chosen = feature_select(scaled, operation=["correlation_threshold"])
        assert 0 < len(infer_cp_features(chosen)) < len(features)


def test_sphering_whitens_the_controls(tmp_path: Path) -> None:
    rows = plate_rows(wells=[f"{r}{c:02d}" for r in "ABCD" for c in range(1, 13)], dim=2, sites=1)
    for row in rows:  # the two numbers of cls are nearly one
        row["cls"][1] = row["cls"][0] + 0.05 * row["cls"][1]
    write_output(LocalStore(tmp_path), rows, max_items=20)
    wells = read(tmp_path, features=["cls"])
    features = infer_cp_features(wells)
    for _, plate in wells.groupby("Metadata_Plate"):
        assert np.corrcoef(plate[features].to_numpy().T)[0, 1] > 0.9
        sphered = normalize(plate, method="spherize")
        np.testing.assert_allclose(np.cov(sphered[features].to_numpy().T), np.eye(len(features)), atol=1e-3)


# ---------------------------------------------------------------- docs/profiling.md


def test_every_code_block_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{row}{column:02d}" for row in "ABCDEF" for column in range(1, 9)]
    write_output(LocalStore(tmp_path / "OUT"), plate_rows(["BR1", "BR2"], names, dim=2, sites=2, Metadata_Source="source_4"),
                 max_items=50)
    layout = pd.DataFrame([("source_4", plate, well, "JCP2022_033924" if int(well[1:]) > 4 else f"JCP2022_{i:06d}")
                           for plate in ("BR1", "BR2") for i, well in enumerate(names)],
                          columns=["Metadata_Source", "Metadata_Plate", "Metadata_Well", "Metadata_JCP2022"])
    layout.to_csv(tmp_path / "well.csv.gz", index=False)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert {language for language, _ in blocks} == {"sh", "python"}
    scope: dict = {}
    for language, code in blocks:
        if language == "sh":
            for line in code.splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "dinoray"
                complete([sys.executable, "-m", "dinoray.cli", *words[1:]])
        else:
            exec(compile(code, str(DOCS), "exec"), scope)

    features = infer_cp_features(scope["wells"])
    assert len(scope["wells"]) == 96
    controls = {name: scope[name].query(scope["controls"]) for name in ("wells", "scaled", "sphered")}
    apart = controls["wells"].groupby("Metadata_Plate")[features].mean().diff().iloc[1].abs().max()
    assert apart > 1  # the plates differ before
    for _, plate in controls["scaled"].groupby("Metadata_Plate"):
        np.testing.assert_allclose(plate[features].mean(), 0, atol=1e-6)
        np.testing.assert_allclose(plate[features].std(ddof=0), 1, atol=1e-5)
    for _, plate in controls["sphered"].groupby("Metadata_Plate"):
        np.testing.assert_allclose(np.cov(plate[features].to_numpy().T), np.eye(len(features)), atol=1e-2)
    assert 0 < len(infer_cp_features(scope["selected"])) <= len(features)
    from_sites = scope["wells"][["Metadata_Plate", "Metadata_Well"]].merge(scope["from_sites"])
    np.testing.assert_allclose(from_sites[features], scope["wells"][features], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the commands


def test_from_images_to_normalised_profiles_by_the_command(tmp_path: Path) -> None:
    images, out = write_plates(tmp_path / "images", {"P1": (1, 2), "P2": (1, 2)}, sites=1), tmp_path / "out"
    complete(command(images, out, "--no-ray"))
    dinoray = [sys.executable, "-m", "dinoray.cli"]
    printed = complete([*dinoray, "export", str(out), "--pycytominer", "--level", "well", "--feature", "cls"])
    assert printed.splitlines()[-1] == f"{out}/profiles/well_mean.parquet: 4 rows, {17 + 2 * 192} columns"
    assert "whole: 4 images" in complete([*dinoray, "verify", "--deep", str(out)])  # the export is not in its way
    wells = pd.read_parquet(out / "profiles/well_mean.parquet")
    scaled = normalize(wells)
    assert len(infer_cp_features(scaled)) == 2 * 192
    assert "Cells_dinov3_vitt16_ch1_cls_0191" in scaled
    refused = complete([*dinoray, "export", str(out), "--level", "well"], code=2)
    assert "add --pycytominer" in refused
    refused = complete([*dinoray, "export", str(out), "--to", f"{out}/features/x.csv"], code=2)
    assert "belongs to the run" in refused
