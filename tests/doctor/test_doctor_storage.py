"""doctor --out and --source: what is said of a store's guarantees, and of the first image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dinoray.doctor.storage import check_output, check_source
from dinoray.errors import SystemicError


@dataclass(frozen=True)
class Facts:
    """The facts of a sound store, as `dinoray.io.probe` gives them."""

    atomic_put: bool = True
    put_if_absent: bool = True
    read_after_write: bool = True
    list_after_write: bool = True
    put_s: float = 0.01
    get_s: float = 0.005
    free_bytes: int | None = None
    file_system: str | None = None
    network_file_system: bool = False


def found(facts: Facts) -> list[tuple[str, str]]:
    return [(f.level, f.text) for f in check_output("s3://bucket/out", lambda url: facts)]


def test_a_sound_store() -> None:
    assert found(Facts()) == [("ok", "written, read back, listed and removed at s3://bucket/out: put 10 ms, get 5 ms")]
    assert "80.0 GB free" in found(Facts(free_bytes=80 * 10**9))[0][1]


@pytest.mark.parametrize(("change", "level", "text"), [
    ({"atomic_put": False}, "fail", "half of an object"), ({"read_after_write": False}, "fail", "read back"),
    ({"list_after_write": False}, "warn", "lags"), ({"put_if_absent": False}, "warn", "two drivers"),
    ({"network_file_system": True, "file_system": "nfs4"}, "warn", "network file system (nfs4)"),
    ({"free_bytes": 10**8}, "fail", "100.0 MB free"),
    ({"free_bytes": 5 * 10**9}, "warn", "5.0 GB free"), ({"put_s": 2.0}, "warn", "slow"), ({"get_s": 2.0}, "warn", "slow")])
def test_each_missing_guarantee_has_its_line(change: dict[str, object], level: str, text: str) -> None:
    lines = found(replace(Facts(), **change))
    assert len(lines) == 2
    assert lines[0][0] == level
    assert text in lines[0][1]


def test_a_store_that_cannot_be_written_is_a_failure() -> None:
    def denied(url: str) -> Facts:
        raise SystemicError("access denied", where=url, todo="check the credentials")

    lines = list(check_output("s3://bucket/out", denied))
    assert [(f.level, f.text, f.advice) for f in lines] == [
        ("fail", "access denied [s3://bucket/out]", "check the credentials")]


def test_a_source_is_read(pictures: Path) -> None:
    line = check_source(str(pictures))
    assert line.level == "ok"
    assert "3 channels of 64 x 64 uint8" in line.text


def test_a_source_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    assert check_source(str(tmp_path)).level == "fail"
    assert "not an image" in check_source(str(tmp_path)).text
    assert check_source(str(tmp_path / "none")).level == "fail"
