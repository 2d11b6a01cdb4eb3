"""Where an export may go, and that it appears whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinoray.errors import BadRequest, SystemicError
from dinoray.export import target
from dinoray.export.target import open_target, resolve_target

SCHEMA = pa.schema([("text", pa.string()), ("number", pa.float32())])
TABLE = pa.table({"text": ["a", "b"], "number": [1.0, 2.0]}, schema=SCHEMA)


def test_the_name_tells_the_format(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert resolve_target(out, None, None, "well_mean") == (f"{out}/profiles/well_mean.parquet", "parquet")
    assert resolve_target(out + "/", None, "csv.gz", "features") == (f"{out}/profiles/features.csv.gz", "csv.gz")
    assert resolve_target(out, "x.csv.gz", None, "s") == ("x.csv.gz", "csv.gz")
    assert resolve_target(out, "x.csv", None, "s") == ("x.csv", "csv")
    assert resolve_target(out, "x.dat", "parquet", "s") == ("x.dat", "parquet")
    assert resolve_target(out, f"{out}/report/x.csv", None, "s")[1] == "csv"
    for to, fmt in (("x.dat", None), ("x.csv", "parquet"), ("x.csv.gz", "csv"), ("x", "xlsx")):
        with pytest.raises(BadRequest):
            resolve_target(out, to, fmt, "s")


@pytest.mark.parametrize("inside", ["features/x.csv", "features/P1/x.csv", "dense/x.csv", "_dinoray/x.csv",
                                    "profiles/../features/x.csv", "link/x.csv"])
def test_nothing_is_written_among_the_files_of_the_run(tmp_path: Path, inside: str) -> None:
    (tmp_path / "out/features").mkdir(parents=True)
    (tmp_path / "out/link").symlink_to("features")
    for out, to in ((str(tmp_path / "out"), f"{tmp_path}/out/{inside}"), ("memory://b/out", f"memory://b/out/{inside}")):
        if inside.startswith("link") and out.startswith("memory"):
            continue
        with pytest.raises(BadRequest, match="belongs to the run"):
            resolve_target(out, to, None, "s")
    with pytest.raises(BadRequest, match="a folder"):
        resolve_target(str(tmp_path / "out"), str(tmp_path), "csv", "s")


@pytest.mark.parametrize("fmt", ["parquet", "csv", "csv.gz"])
def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path: Path, fmt: str) -> None:
    path = tmp_path / f"x.{fmt}"
    with open_target(str(path), fmt, SCHEMA) as writer:
        writer.write(TABLE)
    before = path.read_bytes()
    with pytest.raises(KeyError), open_target(str(path), fmt, SCHEMA) as writer:
        writer.write(TABLE)
        raise KeyError("stopped")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target.os, "fsync", full)
    path = str(tmp_path / "x.csv")
    with pytest.raises(SystemicError, match="No space left") as caught, open_target(path, "csv", SCHEMA) as writer:
        writer.write(TABLE)
    assert "--to" in caught.value.todo
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemicError), open_target("/proc/none/x.csv", "csv", SCHEMA):
        pass


def test_small_tables_are_gathered_to_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "ROW_GROUP_BYTES", TABLE.nbytes * 3)
    with open_target(str(tmp_path / "x.parquet"), "parquet", SCHEMA) as writer:
        for _ in range(7):
            writer.write(TABLE)
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [6, 6, 2]
    assert writer.rows == file.metadata.num_rows == 14
