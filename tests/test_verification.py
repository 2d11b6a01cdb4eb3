"""verify: whatever is missing, foreign or changed is found and named; a whole output passes."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tifffile

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.status import status_lines
from dinoray.verification import open_run, verify_deep, verify_fast
from tests.conftest import texture
from tests.runs import ALL_FEATURES, run, use_tiny_backbone


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of three units with dense arrays and two quarantined images."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "in").mkdir()
    for i in range(7):
        tifffile.imwrite(folder / f"in/{i}.tif", texture((32, 32), i, "uint16"), photometric="minisblack")
    for name in ("8.tif", "9.tif"):
        (folder / "in" / name).write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_backbone(patch)
        run(folder / "in", folder / "out", unit_items=3, features=ALL_FEATURES, max_failed_fraction=1.0)
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def fast(out: Path, write_success: bool = False) -> dict:
    return verify_fast(open_run(str(out))[0], write_success=write_success)


def deep(out: Path) -> dict:
    return verify_deep(open_run(str(out))[0])


def first(out: Path, pattern: str) -> Path:
    return min(p for p in out.glob(pattern) if p.is_file())


def damage(check: Callable[[Path], dict], out: Path) -> str:
    with pytest.raises(OutputDamaged) as caught:
        check(out)
    assert caught.value.where == str(out)
    assert caught.value.todo
    return caught.value.what


OBJECTS = ["features/*.parquet", "dense/*.zarr/zarr.json", "dense/*.zarr/*/c/0/0/0/0", "dense/*.zarr/*/zarr.json",
           "_dinoray/quarantine/*.parquet"]


def test_a_whole_output_passes_and_its_totals_are_right(out: Path) -> None:
    for check in (fast, deep):
        totals = check(out)
        assert (totals["units"], totals["items"], totals["rows"], totals["quarantined"]) == (3, 9, 7, 2)
        data = [p for f in ("features", "dense", "_dinoray/quarantine") for p in (out / f).rglob("*") if p.is_file()]
        assert totals["bytes"] == sum(p.stat().st_size for p in data)
    assert json.loads((out / "_SUCCESS").read_text()) == totals


def test_success_is_written_only_when_asked_and_whole(out: Path) -> None:
    (out / "_SUCCESS").unlink()
    deep(out)
    fast(out, write_success=False)
    assert not (out / "_SUCCESS").exists()
    hidden = first(out, "features/*.parquet")
    hidden.rename(out / "kept")
    with pytest.raises(OutputDamaged):
        fast(out, write_success=True)
    assert not (out / "_SUCCESS").exists()
    (out / "kept").rename(hidden)
    fast(out, write_success=True)
    assert (out / "_SUCCESS").exists()


@pytest.mark.parametrize("pattern", OBJECTS)
def test_a_missing_object_is_named(out: Path, pattern: str) -> None:
    path = first(out, pattern)
    path.unlink()
    assert f"missing: {path.relative_to(out)}" in damage(fast, out)


@pytest.mark.parametrize("pattern", OBJECTS)
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_an_object_of_another_size_is_named(out: Path, pattern: str, change: Callable[[bytes], bytes]) -> None:
    path = first(out, pattern)
    before = path.read_bytes()
    path.write_bytes(change(before))
    what = damage(fast, out)
    assert f"{path.relative_to(out)}: {path.stat().st_size} bytes, the receipt says {len(before)}" in what


@pytest.mark.parametrize("pattern", OBJECTS)
def test_one_flipped_bit_is_found_by_deep(out: Path, pattern: str) -> None:
    path = first(out, pattern)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    what = damage(deep, out)
    assert str(path.relative_to(out)) in what


def test_deep_names_what_is_missing_and_what_has_changed_at_once(out: Path) -> None:
    parts = sorted((out / "features").glob("*.parquet"))
    data = bytearray(parts[1].read_bytes())
    data[len(data) // 3] ^= 1
    parts[1].write_bytes(data)
    parts[0].unlink()
    for i in range(30):
        (out / f"features/foreign-{i:02d}.parquet").write_bytes(b"x")
    what = damage(deep, out)
    assert "32 places" in what and what.count("no receipt names") == 30
    assert f"missing: features/{parts[0].name} (receipt: " in what
    assert f"features/{parts[1].name}: the content has changed (sha256 differs from the receipt) (receipt: " in what


def test_a_footer_that_cannot_be_read_is_named_by_fast(out: Path) -> None:
    path = first(out, "features/*.parquet")
    data = path.read_bytes()
    for torn in (b"\0" * len(data), data[:-8] + b"\xff" * 8, data[:-40] + b"\xff" * 32 + data[-8:]):
        path.write_bytes(torn)
        assert str(path.relative_to(out)) in damage(fast, out)


@pytest.mark.parametrize("name", ["features/foreign.parquet", "features/plate/part-x.parquet", "dense/x.zarr/zarr.json",
                                  "dense/part.txt", "_dinoray/quarantine/x.parquet", "features/.part-1.tmp"])
def test_a_foreign_object_is_named_and_the_advice_fits(out: Path, name: str) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(b"foreign")
    with pytest.raises(OutputDamaged) as caught:
        fast(out)
    assert f"no receipt names: {name}" in caught.value.what
    assert "remove" in caught.value.todo, "to delete receipts would not help"


def test_what_lies_elsewhere_is_not_looked_at(out: Path) -> None:
    before = fast(out)
    (out / "report.html").write_text("x")
    (out / "_dinoray/notes.txt").write_text("x")
    assert fast(out) == before


def test_many_problems_are_counted_and_cut(out: Path) -> None:
    for i in range(30):
        (out / f"features/foreign-{i:02d}.parquet").write_bytes(b"x")
    what = damage(fast, out)
    assert "30 places" in what
    assert "and 10 more" in what
    assert what.count("no receipt names") == 20


def test_a_missing_receipt_is_work_to_do(out: Path) -> None:
    receipt = first(out, "_dinoray/receipts/*.json")
    receipt.unlink()
    with pytest.raises(OutputDamaged, match="1 of 3 units are not done") as caught:
        fast(out)
    assert receipt.stem in caught.value.what
    assert "run the same command again" in caught.value.todo


def edit_receipt(out: Path, **changes: object) -> Path:
    path = max(out.glob("_dinoray/receipts/*.json"), key=lambda p: json.loads(p.read_text())["rows"])
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(("changes", "needle"), [
    ({"rows": 99}, "99"), ({"items": 8}, "8 inputs"), ({"quarantined": 1}, "1 quarantined"),
    ({"row_items": 1}, "1 with rows"),
])
def test_a_receipt_that_does_not_add_up(out: Path, changes: dict, needle: str) -> None:
    edit_receipt(out, **changes)
    assert needle in damage(fast, out)


def test_a_receipt_that_cannot_be_read(out: Path) -> None:
    path = first(out, "_dinoray/receipts/*.json")
    path.write_text("{")
    with pytest.raises(OutputDamaged, match="cannot be read") as caught:
        fast(out)
    assert path.name in caught.value.where


def rewrite(out: Path, change: Callable) -> Path:
    """Change the table of a unit and let its receipt, which is returned, agree with its bytes."""
    receipt = max(out.glob("_dinoray/receipts/*.json"), key=lambda p: json.loads(p.read_text())["rows"])
    values = json.loads(receipt.read_text())
    stored = next(o for o in values["objects"] if o["key"].startswith("features/"))
    sink = io.BytesIO()
    table = change(pq.read_table(out / stored["key"]))
    pq.write_table(table, sink)
    (out / stored["key"]).write_bytes(sink.getvalue())
    stored.update(bytes=len(sink.getvalue()), sha256=hashlib.sha256(sink.getvalue()).hexdigest())
    values["rows"] = table.num_rows
    receipt.write_text(json.dumps(values))
    return receipt


@pytest.mark.parametrize("change", [
    lambda t: t.slice(1),
    lambda t: t.set_column(0, "item_id", [["a stranger", *t["item_id"].to_pylist()[1:]]]),
])
def test_rows_that_are_not_the_planned_inputs_are_found_by_deep(out: Path, change: Callable) -> None:
    receipt = rewrite(out, change)
    fast(out)
    found = damage(deep, out)
    assert "do not add up" in found and "1 place:" in found
    assert f"(receipt: _dinoray/receipts/{receipt.name})" in found


def test_an_input_in_both_rows_and_quarantine_is_found_by_deep(out: Path) -> None:
    quarantine = first(out, "_dinoray/quarantine/*.parquet")
    unit = quarantine.stem
    receipt = out / f"_dinoray/receipts/{unit}.json"
    values = json.loads(receipt.read_text())
    if not any(o["key"].startswith("features/") for o in values["objects"]):
        pytest.fail("the fixture should hold a unit with rows and quarantine")
    stored = next(o for o in values["objects"] if o["key"].startswith("features/"))
    names = pq.read_table(out / stored["key"])["item_id"].to_pylist()
    sink = io.BytesIO()
    table = pq.read_table(quarantine)
    pq.write_table(table.set_column(0, "item_id", [[names[0], *table["item_id"].to_pylist()[1:]]]), sink)
    quarantine.write_bytes(sink.getvalue())
    entry = next(o for o in values["objects"] if "/quarantine/" in o["key"])
    entry.update(bytes=len(sink.getvalue()), sha256=hashlib.sha256(sink.getvalue()).hexdigest())
    receipt.write_text(json.dumps(values))
    assert "both rows and quarantine" in damage(deep, out)


# ---------------------------------------------------------------- outputs that are none, and status


def test_what_is_no_output_is_a_bad_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in ("none", ".", "file"):
        with pytest.raises(BadRequest, match="not an output of dinoray") as caught:
            open_run(str(tmp_path / path))
        assert "--out" in caught.value.todo


def test_an_unsealed_output_says_how_to_go_on(out: Path) -> None:
    (out / "_dinoray/plan/index.parquet").unlink()
    with pytest.raises(BadRequest, match="planning has not finished") as caught:
        open_run(str(out))
    assert "job.json" in caught.value.todo


def test_status_of_a_finished_and_a_partial_run(out: Path) -> None:
    lines = "\n".join(status_lines(str(out)))
    for part in ("3 of 3 done, 0 pending", "9 of 9 done, 7 rows, 2 quarantined", "2  empty", "verified: yes"):
        assert part in lines
    assert "more than once" not in lines
    (out / "_SUCCESS").unlink()
    receipt = first(out, "_dinoray/receipts/*.json")
    receipt.unlink()
    (out / f"_dinoray/attempts/{receipt.stem}-2").write_text("{}")
    lines = "\n".join(status_lines(str(out)))
    for part in ("2 of 3 done, 1 pending", "verified: not yet", "more than once: 1 (most often 2 times)"):
        assert part in lines
    for path in out.glob("_dinoray/receipts/*.json"):
        path.unlink()
    assert "0 of 3 done, 3 pending" in "\n".join(status_lines(str(out)))


def test_a_damaged_output_is_no_longer_called_verified(out: Path) -> None:
    first(out, "features/*.parquet").unlink()
    with pytest.raises(OutputDamaged):
        fast(out, write_success=True)
    assert "verified: not yet" in "\n".join(status_lines(str(out)))
