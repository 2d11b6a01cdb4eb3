"""`retry` and `extend`: new generations that leave what was committed as it is, and count once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from dinoray.errors import BadRequest, ChangedRequest, OutputDamaged, SystemicError
from dinoray.generations import generations, quarantined_now, total_tally
from dinoray.io.stores import LocalStore
from dinoray.ledger import Ledger
from dinoray.repair import extend, retry
from dinoray.session import Outcome
from dinoray.verification import verify_deep, verify_fast
from tests.conftest import texture
from tests.runs import data_objects, run, use_tiny_backbone

JOB = {"unit_items": 3, "max_failed_fraction": 1.0}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_backbone(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven 16-bit pictures of which two cannot be read."""
    path = tmp_path / "in"
    path.mkdir()
    for n in range(7):
        tifffile.imwrite(path / f"{n}.tif", texture((48, 48), n, "uint16"), photometric="minisblack")
    (path / "2.tif").write_bytes(b"junk")
    (path / "5.tif").write_bytes((path / "5.tif").read_bytes()[:500])
    return path


def mend(folder: Path, *names: str) -> None:
    for name in names:
        tifffile.imwrite(folder / f"{name}.tif", texture((48, 48), int(name), "uint16"), photometric="minisblack")


def again(out: Path, *reasons: str, **fields: object) -> Outcome:
    return retry(str(out), reasons=reasons, say=lambda line: None, **fields)


def features(out: Path) -> dict[str, np.ndarray]:
    """item id -> cls, over all files."""
    found: dict[str, np.ndarray] = {}
    for path in out.glob("features/**/*.parquet"):
        table = pq.read_table(path).to_pydict()
        for item, cls in zip(table["item_id"], table["cls"], strict=True):
            assert item not in found
            found[item] = np.array(cls)
    return found


def test_retry_repairs_what_was_mended_and_changes_nothing_else(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(folder, out, **JOB).exit_code == 3
    before = data_objects(out)
    mend(folder, "2")
    outcome = again(out)
    assert outcome.exit_code == 3 and (outcome.tally.items, outcome.tally.quarantined) == (7, 1)
    after = data_objects(out)
    assert {key: after[key] for key in before} == before
    assert [key for key in after if key not in before and ".r1.parquet" in key]
    assert verify_deep(LocalStore(out))["rows"] == 6
    mend(folder, "5")
    assert again(out).exit_code == 0
    assert total_tally(generations(LocalStore(out))).reasons == {}
    clean = tmp_path / "clean"
    mended = run(folder, clean, **JOB)
    assert mended.exit_code == 0
    scaled_alike = features(out).keys() == features(clean).keys() == {f"{n}.tif" for n in range(7)}
    assert scaled_alike
    assert sorted(features(out)) == sorted(features(clean))


def test_a_retried_item_has_the_features_it_would_have_had(folder: Path, tmp_path: Path) -> None:
    job = {**JOB, "scaling": "dtype"}  # no sample that a broken file would have been in
    run(folder, tmp_path / "out", **job)
    mend(folder, "2", "5")
    again(tmp_path / "out")
    run(folder, tmp_path / "clean", **job)
    ours, clean = features(tmp_path / "out"), features(tmp_path / "clean")
    assert ours.keys() == clean.keys()
    for item in clean:
        np.testing.assert_array_equal(ours[item], clean[item])


def test_retry_by_reason(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, **JOB)
    mend(folder, "2", "5")
    with pytest.raises(BadRequest, match="nan") as caught:
        again(out, "nan")
    assert "not_image (1), truncated (1)" in caught.value.todo
    assert again(out, "truncated").tally.reasons == {"not_image": 1}
    assert again(out, "not_image").exit_code == 0


def test_retry_with_nothing_to_do(pictures: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", []
    run(pictures, out)
    assert retry(str(out), say=said.append).exit_code == 0
    assert any("nothing to retry" in line for line in said)
    assert len(generations(LocalStore(out))) == 1


def test_retry_of_inputs_that_are_gone(folder: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", []
    run(folder, out, **JOB)
    (folder / "2.tif").unlink()
    mend(folder, "5")
    assert retry(str(out), say=said.append).tally.reasons == {"not_image": 1}
    assert any("1 of 2 quarantined items are tried again; 1 are not listed" in line for line in said)
    (folder / "5.tif").unlink()
    assert retry(str(out), say=said.append).exit_code == 3
    assert any("none of the 1 quarantined items is listed" in line for line in said)


def test_an_interrupted_retry_is_finished_by_the_next_one_or_by_the_first_command(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for finish in (lambda out: again(out), lambda out: run(folder, out, **JOB)):
        for name, junk in (("2", b"junk"), ("5", b"junk")):
            (folder / f"{name}.tif").write_bytes(junk)
        out = tmp_path / f"out{id(finish)}"
        run(folder, out, **JOB)
        mend(folder, "2", "5")
        with monkeypatch.context() as patch:
            def fail(self: Ledger, receipt: object) -> None:
                raise SystemicError("no space")

            patch.setattr(Ledger, "commit", fail)
            with pytest.raises(SystemicError):
                again(out)
        assert not (out / "_SUCCESS").exists()
        with pytest.raises(OutputDamaged, match="not done"):
            verify_fast(LocalStore(out), write_success=False)
        assert finish(out).exit_code == 0
        assert len(generations(LocalStore(out))) == 2
        verify_deep(LocalStore(out))


def test_a_second_retry_of_the_same_item_replaces_the_first(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, **JOB)
    (folder / "2.tif").write_bytes(b"II*\0" + b"\xff" * 40)  # another trouble now
    first = again(out, "not_image").tally
    assert first.quarantined == 2 and "not_image" not in first.reasons
    table = quarantined_now(generations(LocalStore(out)))
    assert sorted(table["item_id"].to_pylist()) == ["2.tif", "5.tif"]
    mend(folder, "2", "5")
    assert again(out).exit_code == 0
    assert quarantined_now(generations(LocalStore(out))).num_rows == 0
    verify_deep(LocalStore(out))


def test_duplicate_ids_are_not_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(2):
        Image.fromarray(texture((32, 32), n)).save(folder / f"{n}.png")
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"item_id,uri\nsame,{folder}/0.png\nsame,{folder}/1.png\n")
    out, said = tmp_path / "out", []
    run(manifest, out, **JOB)
    assert retry(str(out), say=said.append).tally.quarantined
    assert any("cannot be mended by a retry" in line for line in said)


def test_extend_adds_only_what_is_new(folder: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "out", tmp_path / "more"
    run(folder, out, **JOB)
    before = data_objects(out)
    mend(folder, "8", "9")
    outcome = extend(str(out), [str(folder)], say=lambda line: None)
    assert (outcome.tally.items, outcome.executed_units) == (9, 1)
    more.mkdir()
    tifffile.imwrite(more / "x.tif", texture((48, 48), 40, "uint16"), photometric="minisblack")
    outcome = extend(str(out), [str(more)], say=lambda line: None)
    assert outcome.tally.items == 10
    after = data_objects(out)
    assert {key: after[key] for key in before} == before
    assert set(features(out)) == {f"{n}.tif" for n in (0, 1, 3, 4, 6, 8, 9)} | {str(more / "x.tif")}
    verify_deep(LocalStore(out))
    said: list[str] = []
    assert extend(str(out), [str(folder), str(more)], say=said.append).executed_units == 0
    assert any("nothing to add" in line for line in said)
    assert run(folder, out, **JOB).executed_units == 0  # the first command still stands


def test_the_scaling_of_a_known_folder_is_kept_and_a_new_one_gets_its_own(folder: Path, tmp_path: Path) -> None:
    out, root = tmp_path / "out", folder
    (root / "new").mkdir()
    run(str(root / "*.tif"), out, **JOB)
    scaling = pq.read_table(out / "_dinoray/plan/scaling.parquet").to_pylist()
    tifffile.imwrite(root / "bright.tif", np.full((48, 48), 60000, np.uint16), photometric="minisblack")
    extend(str(out), [str(root / "*.tif")], say=lambda line: None)
    later = out / "_dinoray/more/001-extend"
    assert pq.read_table(later / "plan/scaling.parquet").to_pylist() == scaling
    assert not (later / "stats").exists()
    tifffile.imwrite(root / "new/n.tif", texture((48, 48), 3, "uint16") // 2, photometric="minisblack")
    extend(str(out), [str(root / "new")], say=lambda line: None)
    rows = pq.read_table(out / "_dinoray/more/002-extend/plan/scaling.parquet").to_pylist()
    assert [r for r in rows if r["group"] != "new"] == scaling and len(rows) == len(scaling) + 1


def test_extend_refuses_inputs_that_changed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, **JOB)
    mend(folder, "0")
    os.utime(folder / "0.tif", ns=(1, 1))
    with pytest.raises(ChangedRequest, match="1 inputs have changed.*0.tif"):
        extend(str(out), [str(folder)], say=lambda line: None)
    mend(folder, "8")
    with pytest.raises(ChangedRequest):
        extend(str(out), [str(folder)], say=lambda line: None)
    assert len(generations(LocalStore(out))) == 1


def test_quarantined_items_of_an_extension_are_retried(folder: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "out", tmp_path / "more"
    mend(folder, "2", "5")
    run(folder, out, **JOB)
    more.mkdir()
    (more / "7.tif").write_bytes(b"junk")
    assert extend(str(out), [str(more)], say=lambda line: None, max_failed_fraction=1.0).tally.quarantined == 1
    mend(more, "7")
    assert again(out).exit_code == 0
    assert str(more / "7.tif") in features(out)
    verify_deep(LocalStore(out))


def test_a_retry_mends_no_scaling(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for n in range(6):
        tifffile.imwrite(folder / f"{n}.tif", texture((48, 48), n, "uint16"), photometric="minisblack")
    tifffile.imwrite(folder / "two.tif", texture((2, 48, 48), 9, "uint16"), photometric="minisblack",
                     metadata={"axes": "CYX"}, ome=False)
    bad = run(folder, out, scaling_sample=1, **JOB)
    assert bad.tally.reasons, "the sample of one image covers both kinds: choose another"
    assert set(bad.tally.reasons) == {"no_scaling"}
    assert again(out).exit_code == 0
    verify_deep(LocalStore(out))


def test_other_versions_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, **JOB)
    record = json.loads((out / "_dinoray/job.json").read_text())
    record["fingerprint"] = "0" * 16
    record["identity"]["numerics"]["libraries"]["torch"] = "1.0"
    (out / "_dinoray/job.json").write_text(json.dumps(record))
    with pytest.raises(ChangedRequest, match='numerics.libraries.torch: "1.0" -> '):
        again(out)


def test_not_an_output(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="not an output"):
        again(tmp_path)
    with pytest.raises(BadRequest, match="not an output"):
        extend(str(tmp_path), ["x"], say=print)


def test_an_extension_that_dies_while_it_is_planned_is_not_forgotten(folder: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoray.status import status_lines

    out = tmp_path / "out"
    mend(folder, "2", "5")
    run(folder, out, **JOB)
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        mend(tmp_path / name, "7")
    with monkeypatch.context() as patch:
        def die(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("dinoray.session.seal_generation", die)
        with pytest.raises(KeyboardInterrupt):
            extend(str(out), [str(tmp_path / "b")], say=lambda line: None)
    note = f"dinoray extend {out} {tmp_path / 'b'} (run it again"
    assert any(note in line for line in status_lines(str(out)))
    said: list[str] = []
    assert extend(str(out), [str(tmp_path / "c")], say=said.append).tally.items == 8
    assert any(note in line for line in said)
    assert extend(str(out), [str(tmp_path / "b")], say=lambda line: None).tally.items == 9
    assert not any("begun" in line for line in status_lines(str(out)))
    assert [part.prefix[-10:] for part in generations(LocalStore(out))[1:]] == ["001-extend", "002-extend"]
    verify_deep(LocalStore(out))


def test_a_unit_of_the_first_plan_that_is_redone_after_a_retry_is_counted_right(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, **JOB)
    mend(folder, "2", "5")
    again(out)
    for receipt in (out / "_dinoray/receipts").iterdir():
        receipt.unlink()  # as `verify` advises for a unit whose objects are damaged
    outcome = again(out)
    assert (outcome.tally.quarantined, outcome.tally.reasons) == (0, {})
    assert verify_fast(LocalStore(out), write_success=False)["quarantined"] == 0
