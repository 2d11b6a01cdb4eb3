"""Storage that fails at any moment: a rerun of the same command ends with the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, DinorayError, NoProgress, OutputDamaged, SystemicError, TransientError
from dinoray.io import retries
from dinoray.io.stores import LocalStore
from dinoray.ledger import Ledger
from dinoray.verification import open_run, verify_deep, verify_fast
from tests.conftest import texture
from tests.runs import ALL_FEATURES, check_whole, data_objects, run, use_tiny_backbone

JOB = {"unit_items": 2, "features": ALL_FEATURES, "decode_threads": 2, "compute_threads": 2, "max_failed_fraction": 1.0}


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_backbone(patch)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "in"
    folder.mkdir()
    for i in range(7):
        tifffile.imwrite(folder / f"{i}.tif", texture((32, 32 + 16 * (i % 2)), i, "uint16"), photometric="minisblack")
    (folder / "bad.tif").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def clean(images: Path) -> Path:
    """An undisturbed run."""
    out = images.parent / "clean"
    run(images, out, **JOB)
    check_whole(out)
    return out


@contextmanager
def failing(at: int, fault: Callable[[str], None]) -> Iterator[list[str]]:
    """Every put counts, from 1; number `at` calls `fault(key)`. Yields the keys so far."""
    keys: list[str] = []
    lock = threading.Lock()

    def wrap(real):
        def put(self: LocalStore, key: str, data):
            with lock:
                keys.append(key)
                now = len(keys) == at
            if now:
                fault(key)
            return real(self, key, data)

        return put

    with pytest.MonkeyPatch.context() as patch:
        for name in ("put", "put_if_absent"):
            patch.setattr(LocalStore, name, wrap(getattr(LocalStore, name)))
        yield keys


def number_of_puts(images: Path, out: Path) -> int:
    with failing(0, lambda key: None) as keys:
        run(images, out, **JOB)
    shutil.rmtree(out)
    return len(keys)


def transient(key: str) -> None:
    raise TransientError("503 Slow Down", where=key)


def broken(key: str) -> None:
    raise OSError(errno.EIO, "Input/output error", key)


def killed(key: str) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def puts(images: Path) -> int:
    return number_of_puts(images, images.parent / "counted")


@settings(deadline=None, max_examples=25)
@given(data=st.data(), kind=st.sampled_from([transient, broken, killed]))
def test_a_put_that_fails_anywhere_is_mended_by_a_rerun(images: Path, clean: Path, puts: int, tmp_path_factory, data,
                                                        kind: Callable[[str], None]) -> None:
    at = data.draw(st.integers(1, puts))
    out = tmp_path_factory.mktemp("out") / "o"
    expected = {broken: OSError, killed: KeyboardInterrupt}.get(kind)
    # transient trouble ends a run only while it is planned; a unit is left and comes again in the next round
    with failing(at, kind) as keys, pytest.raises(expected) if expected else contextlib.suppress(TransientError):
        run(images, out, **JOB)
    assert len(keys) >= at
    run(images, out, **JOB)
    check_whole(out)
    assert data_objects(out) == data_objects(clean)


@settings(deadline=None, max_examples=12)
@given(data=st.data(), number=st.sampled_from([errno.ENOSPC, errno.EDQUOT, errno.EACCES]),
       call=st.sampled_from(["fsync", "open"]))
def test_no_space_anywhere_is_systemic_and_mended_by_a_rerun(images: Path, clean: Path, puts: int, tmp_path_factory,
                                                             data, number: int, call: str) -> None:
    at = data.draw(st.integers(1, puts))
    out = tmp_path_factory.mktemp("out") / "o"
    full = threading.Event()
    real = getattr(os, call)

    def maybe(*args: object, **kwargs: object):
        written = call == "fsync" or "_dinoray/tmp" in str(args[0])
        if full.is_set() and written:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, maybe)
        with failing(at, lambda key: full.set()), pytest.raises(SystemicError) as caught:
            run(images, out, **JOB)
    assert "run the same command again" in caught.value.todo
    assert str(out) in caught.value.where
    assert not [p for p in (out / "_dinoray/tmp").glob("*")] if out.exists() else True
    run(images, out, **JOB)
    check_whole(out)
    assert data_objects(out) == data_objects(clean)


@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_failing_again_and_again_still_ends(images: Path, clean: Path, tmp_path_factory, data) -> None:
    out = tmp_path_factory.mktemp("out") / "o"
    for _ in range(4):
        at = data.draw(st.integers(1, 12))
        with failing(at, transient) as keys:
            try:
                run(images, out, **JOB)
            except TransientError:
                assert len(keys) >= at
    run(images, out, **JOB)
    check_whole(out)
    assert data_objects(out) == data_objects(clean)


def interrupted(images: Path, out: Path) -> None:
    """A run that ends after its plan is sealed and before any receipt."""
    def first_receipt(key: str) -> None:
        raise KeyboardInterrupt

    real = LocalStore.put_if_absent

    def put_if_absent(self: LocalStore, key: str, data: bytes) -> bool:
        if key.startswith("_dinoray/receipts/"):
            first_receipt(key)
        return real(self, key, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "put_if_absent", put_if_absent)
        with pytest.raises(KeyboardInterrupt):
            run(images, out, **JOB)
    assert not (out / "_dinoray/receipts").exists()


def test_torn_objects_without_a_receipt_are_replaced(images: Path, clean: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(images, out)
    expected = data_objects(clean)
    for i, (key, data) in enumerate(expected.items()):
        path = out / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes([b"", data[:len(data) // 2], b"garbage" * 10, data + b"x"][i % 4])
    run(images, out, **JOB)
    check_whole(out)
    assert data_objects(out) == expected


def test_a_torn_quarantine_table_without_a_receipt_is_replaced(images: Path, clean: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(images, out)
    for table in (clean / "_dinoray/quarantine").iterdir():
        path = out / "_dinoray/quarantine" / table.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"torn")
    run(images, out, **JOB)
    check_whole(out)
    for table in (clean / "_dinoray/quarantine").iterdir():
        assert (out / "_dinoray/quarantine" / table.name).read_bytes() == table.read_bytes()


def test_finished_units_are_not_done_again_after_a_fault(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[str] = []

    def third(key: str) -> None:
        raise SystemicError("later")

    real = LocalStore.put_if_absent

    def put_if_absent(self: LocalStore, key: str, data: bytes) -> bool:
        if key.startswith("_dinoray/receipts/"):
            seen.append(key)
            if len(seen) == 3:
                third(key)
        return real(self, key, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "put_if_absent", put_if_absent)
        with pytest.raises(SystemicError):
            run(images, out, **JOB)
    store, plan, ledger = open_run(str(out))
    done, before = ledger.done(), ledger.attempts()
    assert len(done) >= 2
    outcome = run(images, out, **JOB)
    assert outcome.executed_units == len(plan) - len(done)
    assert {u for u, n in Ledger(store).attempts().items() if n > before.get(u, 0)} == set(plan.unit_ids) - done


# ---------------------------------------------------------------- things that lie in the output


@pytest.mark.parametrize("name", ["features/stranger.parquet", "dense/stranger.zarr/zarr.json"])
def test_a_foreign_object_makes_the_run_and_verify_fail_by_name(images: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    interrupted(images, out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(b"foreign")
    for call in (lambda: run(images, out, **JOB), lambda: verify_fast(open_run(str(out))[0], write_success=True)):
        with pytest.raises(OutputDamaged, match=name):
            call()
        assert not (out / "_SUCCESS").exists()
    (out / name).unlink()
    shutil.rmtree(out / "dense/stranger.zarr", ignore_errors=True)
    assert run(images, out, **JOB).executed_units == 0
    check_whole(out)


def test_verify_finds_deleted_resized_and_changed_objects_and_the_advice_works(
        images: Path, clean: Path, tmp_path: Path) -> None:
    for i, key in enumerate(data_objects(clean)):
        out = tmp_path / str(i)
        shutil.copytree(clean, out)
        path = out / key
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
        with pytest.raises(OutputDamaged) as caught:
            verify_deep(open_run(str(out))[0])
        assert key in caught.value.what
        (path.write_bytes if i % 2 else lambda _, path=path: path.unlink())(b"short")
        with pytest.raises(OutputDamaged) as caught:
            verify_fast(open_run(str(out))[0], write_success=True)
        assert key in caught.value.what
        assert "delete the receipts named" in caught.value.todo
        unit = key.split("part-")[1].split(".")[0]
        assert f"(receipt: _dinoray/receipts/{unit}.json)" in caught.value.what
        (out / f"_dinoray/receipts/{unit}.json").unlink()
        assert run(images, out, **JOB).executed_units == 1
        check_whole(out)
        assert data_objects(out) == data_objects(clean)


def test_scratch_files_of_killed_processes_are_swept(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    interrupted(images, out)
    scratch = out / "_dinoray/tmp" / f"{socket.gethostname()}-{dead.pid}-1-abcd"
    scratch.write_bytes(b"half of a shard")
    run(images, out, **JOB)
    assert not scratch.exists()
    check_whole(out)


def test_a_receipt_that_cannot_be_read_says_what_to_do_and_that_works(images: Path, clean: Path,
                                                                       tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(clean, out)
    receipt = min((out / "_dinoray/receipts").iterdir())
    receipt.write_text('{"unit": ')
    with pytest.raises(OutputDamaged, match="cannot be read") as caught:
        run(images, out, **JOB)
    assert "delete this receipt" in caught.value.todo
    Path(caught.value.where).unlink()
    assert run(images, out, **JOB).executed_units == 1
    check_whole(out)
    assert data_objects(out) == data_objects(clean)


@pytest.mark.parametrize("key", ["_dinoray/job.json", "_dinoray/plan/index.parquet", "_dinoray/plan/00000.parquet"])
@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"PAR1 garbage PAR1"])
def test_records_that_cannot_be_read_are_named_not_overwritten(images: Path, clean: Path, tmp_path: Path, key: str,
                                                               content: bytes) -> None:
    out = tmp_path / "out"
    shutil.copytree(clean, out)
    (out / key).write_bytes(content)
    (min((out / "_dinoray/receipts").iterdir())).unlink()
    with pytest.raises(DinorayError) as caught:
        run(images, out, **JOB)
    assert not isinstance(caught.value, SystemicError | TransientError)
    assert key in str(caught.value)
    assert caught.value.todo
    assert (out / key).read_bytes() == content


# ---------------------------------------------------------------- inputs that fail


@pytest.mark.parametrize(("error", "kind"), [
    (OSError(errno.EIO, "Input/output error"), NoProgress), (TimeoutError("slow"), NoProgress),
    (PermissionError(errno.EACCES, "Permission denied"), SystemicError)])
def test_storage_trouble_while_reading_quarantines_nothing(images: Path, clean: Path, tmp_path: Path, error: OSError,
                                                          kind: type[Exception]) -> None:
    from dinoray.io import reading as module

    out = tmp_path / "out"
    interrupted(images, out)
    real = module._fetch

    def fetch(uri: str) -> tuple[bytes, str | None]:
        if uri.endswith("4.tif"):
            raise error
        return real(uri)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_fetch", fetch)
        patch.setattr(retries, "sleep", lambda seconds: None)
        with pytest.raises(kind):
            run(images, out, rounds=1, **JOB)
    assert "4.tif" not in Ledger(LocalStore(out)).quarantine(list(Ledger(LocalStore(out)).receipts(
        sorted(Ledger(LocalStore(out)).done()))))["item_id"].to_pylist()
    run(images, out, **JOB)
    check_whole(out)
    assert data_objects(out) == data_objects(clean)


def test_an_input_that_changes_after_planning_is_quarantined_and_then_refused(images: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(images, copy)
    real = LocalStore.put

    def put(self: LocalStore, key: str, data) -> None:
        real(self, key, data)
        if key == "_dinoray/plan/index.parquet":
            (copy / "3.tif").write_bytes((copy / "0.tif").read_bytes())
            (copy / "5.tif").unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "put", put)
        outcome = run(copy, out, **JOB)
    assert outcome.tally.reasons == {"changed": 1, "missing": 1, "empty": 1}
    check_whole(out)
    with pytest.raises(BadRequest, match="1 removed .*; 1 changed"):
        run(copy, out, **JOB)
