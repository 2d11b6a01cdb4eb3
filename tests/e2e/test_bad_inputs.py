"""Bad files never stop a run and are never dropped silently; changed requests are refused, naming what differs."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from dinoray import open_features
from dinoray.errors import BadRequest, ChangedRequest, TooManyFailures
from dinoray.verification import open_run
from tests.conftest import texture
from tests.runs import check_whole, command, complete, data_objects, environment, run


def png_that_declares(width: int, height: int) -> bytes:
    """A tiny PNG whose header claims a huge picture."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.fixture
def bad(pictures: Path) -> dict[str, str]:
    """Bad files among the good ones; returns item id -> expected reason."""
    good = (pictures / "a/rgb0.png").read_bytes()
    (pictures / "zero.png").write_bytes(b"")
    (pictures / "cut.png").write_bytes(good[: len(good) // 2])
    (pictures / "cut.tif").write_bytes((pictures / "b/gray0.tif").read_bytes()[:-900])
    (pictures / "words.png").write_text("this is no picture")
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(pictures / "flat.png")
    Image.fromarray(np.full((1, 1), 7, np.uint8)).save(pictures / "dot.png")
    holes = texture((64, 64), 5, "float32")
    holes[3, 4] = np.nan
    tifffile.imwrite(pictures / "nan.tif", holes)
    (pictures / "bomb.png").write_bytes(png_that_declares(60_000, 60_000))
    tifffile.imwrite(pictures / "stack.tif", texture((5, 64, 64), 5), imagej=True, metadata={"axes": "ZYX"})
    return {"zero.png": "empty", "cut.png": "truncated", "cut.tif": "truncated", "words.png": "not_image",
            "flat.png": "constant", "dot.png": "too_small", "nan.tif": "nan", "bomb.png": "too_large",
            "stack.tif": "stack"}


def quarantined(out: Path) -> dict[str, str]:
    store, plan, ledger = open_run(str(out))
    table = ledger.quarantine(list(ledger.receipts(plan.unit_ids)))
    assert all(table["message"].to_pylist())
    return dict(zip(table["item_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def test_every_kind_of_bad_file_is_quarantined_with_its_reason(pictures: Path, bad: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = complete(command(pictures, out, "--no-ray", "--unit-items", "4"), code=3)
    assert f"{len(bad)} quarantined" in printed
    assert quarantined(out) == bad
    check_whole(out)
    assert len(set(open_features(str(out)).table(["item_id"])["item_id"].to_pylist())) == 10
    assert complete([sys.executable, "-m", "dinoray.cli", "status", str(out)]).count("truncated") == 1


def test_the_rest_of_a_unit_is_the_same_as_without_the_bad_file(pictures: Path, tmp_path: Path) -> None:
    job = {"scaling": "image", "token_budget": 64}
    run(pictures, tmp_path / "clean", **job)
    (pictures / "a/0.png").write_text("not a picture")
    run(pictures, tmp_path / "out", **job)
    a, b = (open_features(str(tmp_path / name)).table(["item_id", "channel", "cls"]) for name in ("clean", "out"))
    assert a.num_rows == b.num_rows and a["item_id"] == b["item_id"]
    left, right = (np.stack(t["cls"].to_numpy()) for t in (a, b))
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def test_wrong_channel_count(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "out", channels="rgb")
    assert quarantined(tmp_path / "out") == {f"b/gray{i}.tif": "channel_count" for i in range(3)} | \
        {f"b/multi{i}.tif": "channel_count" for i in range(2)}
    run(pictures, tmp_path / "groups", channels="A=0,1,2;B=1,2,3")
    rows = open_features(str(tmp_path / "groups")).table(["item_id", "channel"]).to_pylist()
    assert {(r["item_id"], r["channel"]) for r in rows} == {(f"b/multi{i}.tif", g) for i in range(2) for g in "AB"}


def test_two_inputs_with_one_id_are_both_quarantined(pictures: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("item_id,uri,Plate\n" + "".join(f"{name},{pictures}/a/rgb{i}.png,P1\n"
                        for i, name in enumerate(["one", "two", "one", "three"])))
    out = tmp_path / "out"
    outcome = run(manifest, out)
    assert outcome.exit_code == 3
    store, plan, ledger = open_run(str(out))
    table = ledger.quarantine(list(ledger.receipts(plan.unit_ids)))
    assert table["item_id"].to_pylist() == ["one", "one"]
    assert set(table["reason"].to_pylist()) == {"duplicate_id"}
    assert ["rgb2.png has" in table["message"][0].as_py(), "rgb0.png has" in table["message"][1].as_py()] == [True, True]
    check_whole(out)
    rows = open_features(str(out)).table(["item_id", "Metadata_Plate"]).to_pylist()
    assert [(r["item_id"], r["Metadata_Plate"]) for r in rows] == [("two", "P1"), ("three", "P1")]
    assert [key.split("/")[1] for key in data_objects(out)] == ["P1"]


def test_missing_file_and_one_bad_channel(tmp_path: Path) -> None:
    folder = tmp_path / "plate" / "Images"
    folder.mkdir(parents=True)
    for field in (1, 2, 3):
        for channel in (1, 2):
            tifffile.imwrite(folder / f"r01c02f{field:02d}p01-ch{channel}sk1fk1fl1.tiff", texture((64, 64), field, "uint16"))
    broken = folder / "r01c02f02p01-ch2sk1fk1fl1.tiff"
    broken.write_bytes(broken.read_bytes()[:2000])
    out = tmp_path / "out"
    run(folder, out)
    assert quarantined(out) == {"r01c02f02p01-sk1fk1fl1.tiff": "truncated"}
    check_whole(out)
    rows = open_features(str(out)).table(["item_id", "channel", "Metadata_Well", "Metadata_Site", "Metadata_Plate"]).to_pylist()
    assert len(rows) == 4
    assert {r["Metadata_Well"] for r in rows} == {"A02"} and {r["Metadata_Plate"] for r in rows} == {"plate"}
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"item_id,uri\ngone,{tmp_path}/nothing.png\nhere,{folder}/r01c02f01p01-ch1sk1fk1fl1.tiff\n")
    run(manifest, tmp_path / "out2")
    assert quarantined(tmp_path / "out2") == {"gone": "missing"}


def test_everything_bad_completes_with_zero_rows(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"nothing")
    outcome = run(folder, tmp_path / "out")
    assert (outcome.exit_code, outcome.tally.rows, outcome.tally.quarantined) == (3, 0, 3)
    check_whole(tmp_path / "out")


def test_too_many_failures_stop_the_run_and_a_higher_limit_resumes_it(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    picture = texture((32, 32), 0)
    for i in range(450):
        if i % 5 == 0:
            (folder / f"{i:03d}.png").write_bytes(b"bad")
        else:
            Image.fromarray(np.roll(picture, i, axis=1)).save(folder / f"{i:03d}.png")
    job = {"unit_items": 50}
    with pytest.raises(TooManyFailures, match="20.0% of 200"):
        run(folder, tmp_path / "out", **job)
    assert 4 <= len(open_run(str(tmp_path / "out"))[2].done()) < 9
    outcome = run(folder, tmp_path / "out", max_failed_fraction=0.5, **job)
    assert outcome.tally.quarantined == 90
    check_whole(tmp_path / "out")


# ---------------------------------------------------------------- changed requests


def test_changed_inputs_are_refused_naming_them(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(pictures, out)
    before = data_objects(out)
    shutil.copy(pictures / "a/rgb0.png", pictures / "a/new.png")
    with pytest.raises(ChangedRequest, match=r"1 added \(e\.g\. a/new\.png\)"):
        run(pictures, out)
    (pictures / "a/new.png").unlink()
    Image.fromarray(texture((64, 64), 77)).save(pictures / "a/rgb1.png")
    with pytest.raises(ChangedRequest, match=r"1 changed \(e\.g\. a/rgb1\.png\)"):
        run(pictures, out)
    (pictures / "a/rgb1.png").unlink()
    with pytest.raises(ChangedRequest, match=r"1 removed \(e\.g\. a/rgb1\.png\)"):
        run(pictures, out)
    assert data_objects(out) == before


@pytest.mark.parametrize(("field", "value"), [
    ("precision", "bfloat16"), ("channels", "mean"), ("weights", "random:1"), ("features", ("cls",)), ("layers", (3,)),
    ("unit_items", 3), ("size", "native"), ("scaling", "image"), ("token_budget", 128), ("limit", 4), ("model", "vitt8"),
])
def test_changed_settings_are_refused_naming_them(pictures: Path, tmp_path: Path, field: str, value: object) -> None:
    out = tmp_path / "out"
    run(pictures, out)
    with pytest.raises(ChangedRequest) as refusal:
        run(pictures, out, **{field: value})
    assert {"weights": "weights_digest"}.get(field, field) in str(refusal.value)
    assert "->" in str(refusal.value)


def test_settings_that_do_not_change_results_are_accepted(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "out")
    again = run(pictures, tmp_path / "out", workers="7", decode_threads=3, compute_threads=1, max_failed_fraction=0.9)
    assert again.executed_units == 0


def test_bad_requests_run_nothing(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for flags in (["--layers", "12"], ["--channels", "nonsense"], ["--token-budget", "-4"], ["--tile-px", "100"],
                  ["--workers", "2,1"], ["--model", "vits17q"], ["--weights", str(tmp_path / "none.safetensors")]):
        printed = complete(command(pictures, out, "--no-ray", *flags), code=2)
        assert "Traceback" not in printed
        assert not out.exists(), flags
    assert complete(command(tmp_path / "nowhere", out, "--no-ray"), code=2)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("mine")
    with pytest.raises(BadRequest, match=r"thesis\.tex"):
        run(pictures, occupied)


def test_sigterm_leaves_within_two_seconds_with_the_resume_command(pictures: Path, tmp_path: Path) -> None:
    import signal
    import time

    for i in range(60):
        Image.fromarray(texture((256, 256), i)).save(pictures / f"more{i}.png")
    out = tmp_path / "out"
    process = subprocess.Popen(command(pictures, out, "--no-ray", "--unit-items", "1"), env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "_dinoray/receipts").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=20)[0]
    assert time.monotonic() - began < 2
    assert process.returncode == 1
    assert f"resume with: dinoray extract images {pictures} --out {out}" in printed.splitlines()[-1]
    complete(command(pictures, out, "--no-ray", "--unit-items", "1"))
    check_whole(out)


def test_file_metadata_tells_what_the_features_are(pictures: Path, tmp_path: Path) -> None:
    import json

    run(pictures, tmp_path / "out", layers=(5, 11))
    part = next((tmp_path / "out/features").glob("*.parquet"))
    facts = json.loads(pq.read_schema(part).metadata[b"dinoray"])
    assert facts["model"] == "vitt16" and facts["layers"] == [5, 11] and len(facts["weights_digest"]) == 64
    assert facts["normalisation"]["mean"] == [0.485, 0.456, 0.406]
    assert facts["preprocessing"]["scaling"] == "plate"
    assert "out" not in json.dumps(facts) or str(tmp_path) not in json.dumps(facts)


def test_8_and_16_bit_images_of_one_folder_are_scaled_apart(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(texture((64, 64), i)).save(folder / f"eight{i}.png")
        tifffile.imwrite(folder / f"sixteen{i}.tif", texture((64, 64), i, "uint16"), photometric="minisblack")
    run(folder, tmp_path / "out")
    features = open_features(str(tmp_path / "out"))
    cls = features.matrix("cls")
    cls = cls / np.linalg.norm(cls, axis=1, keepdims=True)
    names = features.table(["item_id"])["item_id"].to_pylist()
    eight = cls[[name.startswith("eight") for name in names]]
    assert (eight @ eight.T)[~np.eye(4, dtype=bool)].max() < 0.9999, "four different pictures must not look the same"
    scaling = pq.read_table(tmp_path / "out/_dinoray/plan/scaling.parquet").to_pylist()
    assert {row["channel"] for row in scaling} == {"gray", "gray [uint8]"}


def test_records_that_contradict_each_other_are_told(pictures: Path, tmp_path: Path) -> None:
    from dinoray.errors import OutputDamaged
    from dinoray.status import status_lines
    from dinoray.verification import verify_deep

    out = tmp_path / "out"
    run(pictures, out)
    receipt = next((out / "_dinoray/receipts").iterdir())
    kept = receipt.read_bytes()
    receipt.unlink()
    assert "verified: not yet" in list(status_lines(str(out)))
    receipt.write_bytes(kept)
    part = next((out / "features").glob("*.parquet"))
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(OutputDamaged, match=part.name):
        verify_deep(open_run(str(out))[0])
    assert not (out / "_SUCCESS").exists()
    (out / "_dinoray/plan/index.parquet").unlink()
    with pytest.raises(OutputDamaged, match="index is gone"):
        run(pictures, out, precision="bfloat16")
