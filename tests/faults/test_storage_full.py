"""A disk that is really full, an output that is really read-only: exit 1, nothing quarantined, and the same command
completes when the cause is gone. The disk is a small tmpfs in a mount namespace of its own, which ends with the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tifffile

from dinoray.errors import SystemicError
from dinoray.io.probe import probe_storage
from tests.conftest import texture
from tests.runs import check_whole, complete, count, data_objects, environment, run, use_tiny_backbone

FLAGS = ("--no-ray", "--unit-items", "2", "--features", "cls,patch_mean,patches")


@pytest.fixture(scope="module")
def images() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to other users
        os.chmod(folder, 0o755)
        pictures = Path(folder) / "in"
        pictures.mkdir()
        for i in range(8):
            tifffile.imwrite(pictures / f"{i}.tif", texture((96, 96), i, "uint16"), photometric="minisblack")
        yield pictures


def command(images: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "dinoray.cli", "extract", "images", str(images), "--out", str(out), "--model", "vitt16",
            "--weights", "random", *FLAGS]


@pytest.fixture(scope="module")
def calm(images: Path) -> Path:
    out = images.parent / "calm"
    complete(command(images, out))
    return out


def on_a_disk_of_its_own(script: str, **variables: object) -> str:
    """Run a shell script where it may mount; its output. Skips where the system lets nobody mount."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
                                                         capture_output=True, timeout=30).returncode:
        pytest.skip("mounting is not allowed here")
    env = {**environment(), **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run([*unshare, "sh", "-eu", "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def bytes_on_disk(folder: Path) -> int:
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if p.is_file())


def test_a_full_disk_stops_the_run_and_it_completes_when_there_is_space(images: Path, calm: Path, tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    said = on_a_disk_of_its_own("""
        mount -t tmpfs -o size=$SIZE tmpfs "$DISK"
        code=0; $COMMAND || code=$?
        echo "first code $code"
        test -z "$(ls "$DISK/out/_dinoray/quarantine" 2>/dev/null)"
        test -z "$(ls "$DISK/out/_dinoray/tmp")"
        test ! -e "$DISK/out/_SUCCESS"
        echo "receipts $(ls "$DISK/out/_dinoray/receipts" | wc -l)"
        mount -o remount,size=64m "$DISK"
        $COMMAND
        cp -a "$DISK/out" "$KEPT"
        """, SIZE=int(bytes_on_disk(calm) * 0.75), DISK=disk, KEPT=kept, COMMAND=" ".join(command(images, disk / "out")))
    assert "first code 1" in said and "SystemicError" in said and "Traceback" not in said, said
    assert "No space left on device" in said and "free space" in said and "run the same command again" in said
    assert int(said.split("receipts ")[1].split()[0]) in range(1, 4), "the disk was to be full in the middle of the units"
    check_whole(kept)
    assert data_objects(kept) == data_objects(calm)


def test_a_read_only_output_stops_the_run_and_it_completes_when_it_is_writable(images: Path, calm: Path, tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    said = on_a_disk_of_its_own("""
        mount -t tmpfs -o size=64m tmpfs "$DISK"
        code=0; DINORAY_FAILPOINTS=unit.data=kill@2 $COMMAND >/dev/null || code=$?
        test $code -eq 137
        mount -o remount,ro "$DISK"
        code=0; $COMMAND || code=$?
        echo "second code $code"
        mount -o remount,rw "$DISK"
        test -z "$(ls "$DISK/out/_dinoray/quarantine" 2>/dev/null)"
        $COMMAND
        cp -a "$DISK/out" "$KEPT"
        """, DISK=disk, KEPT=kept, COMMAND=" ".join(command(images, disk / "out")))
    assert "second code 1" in said and "SystemicError" in said and "Traceback" not in said, said
    assert "Read-only file system" in said and "mend the permissions" in said
    check_whole(kept)
    assert data_objects(kept) == data_objects(calm)


@pytest.fixture
def nobody() -> Iterator[None]:
    """No root's rights while the test runs (root writes everywhere)."""
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_an_output_that_one_may_not_write_is_systemic(images: Path, monkeypatch, request) -> None:
    use_tiny_backbone(monkeypatch)
    place = images.parent / "closed"
    place.mkdir(mode=0o755)
    request.getfixturevalue("nobody")
    if os.access(place, os.W_OK, effective_ids=True):
        os.chmod(place, 0o555)
    with pytest.raises(SystemicError, match="Permission denied") as caught:
        run(images, place / "out", unit_items=2)
    assert "permissions" in caught.value.todo and str(place) in caught.value.where
    with pytest.raises(SystemicError, match="Permission denied"):
        probe_storage(str(place / "out"))
    assert count(place) == 0
    if os.getuid() == 0:
        os.seteuid(0)
    os.chmod(place, 0o777)
    if os.getuid() == 0:
        os.seteuid(65534)
    assert run(images, place / "out", unit_items=2).exit_code == 0
    check_whole(place / "out")
    if os.getuid() == 0:
        os.seteuid(0)
