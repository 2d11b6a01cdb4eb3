"""The page of a run over a volume: what it says of whole, quarantined and unfinished outputs, and when the volume is gone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.io.volume_features import VolumeFeatures
from dinoray.io.volume_grid import VolumeGrid
from dinoray.ledger import Receipt, StoredObject
from dinoray.report.html import write_report
from dinoray.report.run import open_for_report
from dinoray.report.stages import COMPUTE, WRITE, StageTotals, verdict
from dinoray.report.volume_page import lost_slabs
from dinoray.report.volume_totals import windows_of
from dinoray.slabs import Slab
from dinoray.verification import open_run
from tests.report.test_run import Page
from tests.report.volumes import extract, noise, write_volume

SHAPE = (40, 72, 88)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(raw volume, output) of a run that lost nothing."""
    folder = tmp_path_factory.mktemp("whole")
    raw = write_volume(folder / "<b>raw.zarr", noise(SHAPE))
    return raw, extract(raw, folder / "out", voxel_size="40")


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An output of a volume with NaN in one corner and background, fused."""
    folder = tmp_path_factory.mktemp("troubled")
    values = noise((90, 72, 88)).astype(np.float32)
    values[:, :, 50:] = 0
    values[2, 4, 4] = np.nan
    return extract(write_volume(folder / "raw.zarr", values), folder / "out", voxel_size="40", output="fused", foreground="100")


def page_of(out: str, to: Path) -> tuple[Page, str]:
    """The page, parsed, and its source."""
    write_report(out, str(to / "page.html"))
    source = (to / "page.html").read_text()
    return Page(source), source


def test_the_page_of_a_whole_run(whole: tuple[Path, str], tmp_path: Path) -> None:
    out = whole[1]
    page, source = page_of(out, tmp_path)
    assert not page.open and "script" not in page.tags and "✓ verified" in page.text
    assert all(not v.startswith(("http", "//")) for k, v in page.attributes if k in ("href", "src"))
    assert "<b>raw" not in source and "&lt;b&gt;raw.zarr" in source
    assert [source.count(f'id="{v}-{p}"') for v in ("xy", "xz", "yz") for p in ("raw", "fused", "tokens")] == [1] * 9
    assert source.count('class="panel"') == 12
    for text in ("random weights: texture only", "Nothing was quarantined", "12 x 8 x 10 nm", "Through the middle",
                 "480 × 576 × 880 nm",
                 "fused features are made of them when they are read"):
        assert text in page.text, text
    grid = open_for_report(out).volume.grid  # type: ignore[union-attr]
    for spec in grid.arrays(fused=False):
        assert f"dense/{spec.name}.zarr {' × '.join(map(str, spec.shape))} {', '.join(f'{p:.10g}' for p in spec.pitch_nm)} " \
               f"{', '.join(f'{t:.10g}' for t in spec.translation_nm)}" in page.text
        size = np.prod(spec.shape)
        assert f"{spec.name} {grid.dim} × {' × '.join(map(str, spec.shape))} float16 " \
               f"{' × '.join(f'{p:g}' for p in spec.pitch_nm)} {size:,} {size:,} 0 0 0 " in page.text
    # places on the axes are the raw image's: z = -6 .. of the corner 594, and the middle plane
    assert "xy at z = " in page.text and f"xy at z = {594 + 6 * 40 + 20} nm" in page.text
    assert "unfinished" not in page.text and "Raw voxels are not shown" not in page.text


def test_the_code_on_the_page_reads_the_features(whole: tuple[Path, str], tmp_path: Path) -> None:
    page, source = page_of(whole[1], tmp_path)
    code = re.search(r"<pre>(import dinoray.*?)</pre>", source, re.DOTALL).group(1).replace("&#39;", "'").replace("&#34;", '"')  # type: ignore[union-attr]
    found: dict[str, object] = {}
    exec(code, found)
    assert found["box"].shape == (192, 4, 4, 4) and np.isfinite(found["box"]).all()  # type: ignore[attr-defined]
    assert found["tokens"].shape[:2] == (192, 1)  # type: ignore[attr-defined]


def test_the_same_output_gives_the_same_page(whole: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert page_of(whole[1], tmp_path / "a")[1] == page_of(whole[1], tmp_path / "b")[1]


def test_forecast_and_measured_agree_when_nothing_is_lost(whole: tuple[Path, str]) -> None:
    run = open_for_report(whole[1])
    volume, forecast = run.volume, run.plan.facts["forecast"]
    assert volume is not None
    assert sum(totals.windows for totals in volume.arrays.values()) == forecast["windows"]
    assert {name: totals.computed for name, totals in volume.arrays.items()} == {
        spec.name: int(np.prod(spec.shape)) for spec in volume.grid.arrays(fused=False)}
    stored = {str(p.relative_to(whole[1])): p.stat().st_size for p in Path(whole[1]).glob("dense/*/0/c/**/*") if p.is_file()}
    assert sum(totals.num_bytes for totals in volume.arrays.values()) == sum(stored.values())
    assert sum(totals.shards for totals in volume.arrays.values()) == len(stored)
    assert volume.measured_bytes > 0 and volume.predicted_bytes > 0


def test_quarantined_and_skipped_slabs_are_counted_and_placed(troubled: str, tmp_path: Path) -> None:
    run = open_for_report(troubled)
    grid = run.volume.grid  # type: ignore[union-attr]
    page, source = page_of(troubled, tmp_path)
    reasons = {reason.name: reason for reason in lost_slabs(run, grid)}
    assert reasons.keys() == {"nan", "missing_tokens"}
    identity, place, message = reasons["nan"].slabs[0]
    assert identity.startswith("xy/0-") and place.startswith("z 594 to ") and "NaN" in message
    assert identity in page.text and place in page.text and f"dinoray retry {troubled} --reason nan" in page.text
    totals = run.volume.arrays  # type: ignore[union-attr]
    lost = sum(np.prod(Slab.read(row["item_id"]).shape) for row in run.quarantined.to_pylist())
    covered = sum(np.prod(spec.shape) for spec in grid.arrays(fused=True))
    skipped = covered - lost - sum(t.computed for t in totals.values())
    assert skipped > 0 and sum(t.covered for t in totals.values()) == covered
    for name, total in totals.items():  # of quarantined slabs what could be read is stored, and not counted as computed
        bad = [Slab.read(row["item_id"]) for row in run.quarantined.to_pylist() if row["item_id"].startswith(name)]
        values = np.isfinite(_whole(troubled, name)[0])
        partly = sum(int(values[tuple(slice(a, b) for a, b in zip(slab.start, slab.stop, strict=True))].sum()) for slab in bad)
        assert total.computed == values.sum() - partly and (partly > 0 or not bad)
    assert "dinoray.open_features" in source and "dense/fused.zarr" in page.text


def _whole(out: str, name: str) -> np.ndarray:
    return VolumeFeatures(out).tokens(name)[...]


def test_an_unfinished_run_shows_what_is_there(whole: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    (out / "_SUCCESS").unlink()
    receipts = {}
    for path in (out / "_dinoray" / "receipts").iterdir():
        receipts[json.loads(path.read_text())["objects"][0]["key"].split("/")[1]] = path
    assert receipts.keys() == {"xy.zarr", "xz.zarr", "yz.zarr"}
    receipts["yz.zarr"].unlink()
    shutil.rmtree(out / "dense" / "yz.zarr" / "0" / "c")
    page, source = page_of(str(out), tmp_path)
    assert "2 of 3 units are done" in page.text and "so far" in page.text and "resumes the run" in page.text
    assert "0.0 % of these target voxels have fused features" in page.text and 'id="xy-tokens"' in source
    for path in receipts.values():
        path.unlink(missing_ok=True)
    page, _ = page_of(str(out), tmp_path)
    assert "No token has been computed yet" in page.text and "No unit is done yet" in page.text


def test_without_the_raw_volume_features_stand_alone(tmp_path: Path) -> None:
    raw = write_volume(tmp_path / "raw.zarr", noise((20, 40, 40)))
    out = extract(raw, tmp_path / "out", planes="xy")
    shutil.rmtree(raw)
    page, source = page_of(out, tmp_path)
    assert "Raw voxels are not shown: no such file or folder" in page.text and 'id="xy-raw"' not in source
    assert source.count('class="panel"') == 4 and "tokens of xy alone" in page.text and "tokens of xz" not in page.text
    write_volume(raw, noise((20, 40, 40), seed=1))
    assert "has changed since" in page_of(out, tmp_path)[0].text


def test_records_that_lack_what_the_page_needs(whole: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    job = out / "_dinoray" / "job.json"
    values = json.loads(job.read_text())
    del values["identity"]["settings"]["slice_sampling"]
    job.write_text(json.dumps(values))
    with pytest.raises(OutputDamaged, match="slice_sampling"):
        write_report(str(out))
    with pytest.raises(BadRequest, match="among the data or records"):
        write_report(whole[1], f"{whole[1]}/dense/page.html")


def test_windows_of_slabs_add_up_to_the_forecast() -> None:
    grid = VolumeGrid((100, 300, 200), (8.0,) * 3, (0.0,) * 3, (32.0,) * 3, 16, ("xy", "xz"), 64, 16, 2, 8, "float16")
    assert windows_of(grid, Slab("fused", (0, 0, 0), (8, 8, 8))) == 0
    plane = grid.plane("xy")
    whole = Slab("xy", (0, 0, 0), plane.shape)
    assert windows_of(grid, whole) == plane.shape[0] * plane.lattice(1).count * plane.lattice(2).count


def test_the_advice_is_for_volumes(whole: tuple[Path, str]) -> None:
    job = open_for_report(whole[1]).job["job"]

    def told(**seconds: float) -> tuple[str | None, str]:
        totals = StageTotals()
        receipt = Receipt("u", 0, "f", items=4, seconds={"wall": 100.0, **seconds}, worker={"host": "h", "pid": 1},
                          objects=[StoredObject("dense/xy.zarr/0/c/0/0/0/0", 10**6, "")])
        totals.add(receipt)
        found = verdict(totals, job, device="cpu")
        return found.limit, found.sentence + found.change

    limit, text = told(wait_decode=90.0, decode=1.0, read=95.0)
    assert "for slabs to be read" in text and "images" not in text
    limit, text = told(wait_write=90.0, write=5.0)
    assert limit == WRITE and "patches" not in text and "--voxel-size" in text
    limit, text = told()
    assert "patches" not in text
    assert told(wait_compute=99.0)[0] == COMPUTE
    assert open_run(whole[1])[1].facts["kind"] == "volume"
