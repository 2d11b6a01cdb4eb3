"""doctor: the machine's limits and what is said of them, on file trees and numbers made for it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.doctor import machine
from dinoray.doctor.findings import Finding, lines, size, verdict
from dinoray.doctor.limits import Limits, container_limits, effective_cores
from dinoray.doctor.versions import check_versions

NONE = Limits(None, None, None)
GB = 10**9


def tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_the_tightest_group_of_version_2_counts(tmp_path: Path) -> None:
    tree(tmp_path, {"fs/a/cpu.max": "200000 100000", "fs/a/memory.max": "4000000000", "fs/a/memory.current": "1000000000",
                    "fs/a/b/cpu.max": "max 100000", "fs/a/b/memory.max": "max", "fs/a/b/memory.current": "5",
                    "fs/other/cpu.max": "1000 100000", "self": "0::/a/b"})
    assert container_limits(tmp_path / "fs", tmp_path / "self") == Limits(2.0, 4 * GB, GB)


def test_what_is_left_decides_between_memory_limits(tmp_path: Path) -> None:
    tree(tmp_path, {"fs/memory.max": "9000000000", "fs/memory.current": "8500000000", "fs/a/memory.max": "4000000000",
                    "fs/a/memory.current": "1000000000", "self": "0::/a"})
    assert container_limits(tmp_path / "fs", tmp_path / "self") == Limits(None, 9 * GB, 8_500_000_000)


def test_version_1_groups(tmp_path: Path) -> None:
    tree(tmp_path, {"fs/cpu,cpuacct/d/cpu.cfs_quota_us": "150000", "fs/cpu,cpuacct/d/cpu.cfs_period_us": "100000",
                    "fs/memory/d/memory.limit_in_bytes": "3000000000", "fs/memory/d/memory.usage_in_bytes": "7",
                    "fs/memory/memory.limit_in_bytes": str(2**63 - 4096), "fs/memory/memory.usage_in_bytes": "7",
                    "self": "4:memory:/d\n2:cpu,cpuacct:/d"})
    assert container_limits(tmp_path / "fs", tmp_path / "self") == Limits(1.5, 3 * GB, 7)


def test_no_limits_where_there_are_no_groups(tmp_path: Path) -> None:
    assert container_limits(tmp_path, tmp_path / "none") == NONE
    tree(tmp_path, {"fs/cpu.max": "max 100000", "self": "0::/"})
    assert container_limits(tmp_path / "fs", tmp_path / "self") == NONE


@given(st.integers(1, 512), st.floats(0.01, 1000))
def test_effective_cores_are_at_least_one_and_never_more_than_seen(cores: int, quota: float) -> None:
    assert 1 <= effective_cores(cores, Limits(quota, None, None)) <= cores
    assert effective_cores(cores, NONE) == cores


def test_cores_beyond_the_container_are_warned_of() -> None:
    assert machine.check_cores(8, 8, NONE).level == "ok"
    found = machine.check_cores(64, 64, Limits(4.0, None, None))
    assert found.level == "warn"
    assert "--compute-threads 4" in found.advice


@pytest.mark.parametrize(("available", "limits", "level"), [
    (64 * GB, NONE, "ok"), (3 * GB, NONE, "warn"), (GB // 2, NONE, "fail"),
    (64 * GB, Limits(None, 8 * GB, 7_500_000_000), "fail"), (64 * GB, Limits(None, 8 * GB, 5 * GB), "warn"),
    (64 * GB, Limits(None, 32 * GB, GB), "ok")])
def test_memory(available: int, limits: Limits, level: str) -> None:
    assert machine.check_memory(64 * GB, available, limits).level == level


@pytest.mark.parametrize(("free", "total", "level"), [
    (500 * GB, 1000 * GB, "ok"), (5 * GB, 20 * GB, "warn"), (40 * GB, 1000 * GB, "warn"), (GB // 2, 1000 * GB, "fail")])
def test_disk(free: int, total: int, level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("Usage", (), {"free": free, "total": total})
    asked = []
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
    found = machine.check_disk("disk", tmp_path / "not" / "yet", "do this")
    assert found.level == level
    assert asked == [tmp_path]  # the nearest folder that exists
    assert found.advice == ("" if level == "ok" else "do this")


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.check_shared_memory(tmp_path / "none").level == "warn"
    small = type("Usage", (), {"free": 64 * 2**20, "total": 64 * 2**20})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: small)
    assert "--shm-size" in machine.check_shared_memory(tmp_path).advice  # what docker gives by default
    assert machine.check_shared_memory(tmp_path, needed=2**20).level == "ok"


def test_open_files() -> None:
    endless = resource.RLIM_INFINITY
    assert machine.check_open_files(endless, endless).level == "ok"
    assert machine.check_open_files(65536, 65536).level == "ok"
    assert "ulimit -n 65536" in machine.check_open_files(1024, endless).advice
    assert "ulimit -n 2048" in machine.check_open_files(256, 2048).advice


@pytest.mark.parametrize(("capability", "flags", "level", "text"), [
    ("AVX512", {"avx512f", "avx512_bf16"}, "ok", "in hardware (avx512_bf16)"),
    ("AVX512", {"avx512_bf16", "amx_bf16"}, "ok", "amx_bf16, avx512_bf16"),
    ("AVX2", {"avx2"}, "ok", "keep --precision float32"), ("DEFAULT", {"sse4_2"}, "warn", "not in hardware")])
def test_processors(capability: str, flags: set[str], level: str, text: str) -> None:
    found = machine.check_cpu(capability, flags)
    assert found.level == level
    assert text in found.text


def test_cpu_flags_are_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\nbugs\t: x\n")
    assert machine.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "amx_bf16"}
    assert machine.cpu_flags(tmp_path / "none") == set()


def test_the_hub_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    found = machine.check_hub()
    assert "is set" in found.text
    assert "verysecret" not in found.line()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no Hugging Face token" in machine.check_hub().text


def test_this_machine_is_checked_whole() -> None:
    found = list(machine.check_machine())
    assert [f.subject for f in found] == ["cores", "memory", "temporary disk", "/dev/shm", "open files", "device", "model hub"]
    assert "CPU" in found[5].text or "CUDA" in found[5].text


def test_packages_outside_their_ranges() -> None:
    installed = {"torch": "2.12.0", "ray": "2.60.0", "zarr": "3.2.0"}

    def version(name: str) -> str:
        from importlib.metadata import PackageNotFoundError

        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    wanted = ["ray[data,train]<2.61,>=2.60", "torch<3,>=2.13", "zarr>=3.1.6", "nothing>=1", "pytest>=9; extra == 'dev'",
              "pywin32; sys_platform == 'win32'"]
    found = list(check_versions(wanted, ">=3.11", version))
    assert [(f.level, f.text.split(",")[0]) for f in found[1:]] == [
        ("warn", "torch 2.12.0"), ("fail", "nothing is not installed")]
    assert "torch 2.12.0" in found[0].text and "pyarrow missing" in found[0].text
    assert [f.level for f in check_versions([], ">=4", version)] == ["ok", "warn"]
    assert [f.level for f in check_versions([], None, version)] == ["ok"]


def test_the_installed_packages_are_those_of_the_project() -> None:
    assert [f.level for f in check_versions()] == ["ok"]


def test_lines_align_and_the_verdict_counts() -> None:
    found = [Finding("ok", "a", "fine"), Finding("warn", "long", "hm", "do it"), Finding("fail", "b", "bad", "mend it")]
    assert lines(found) == ["ok    a     fine", "warn  long  hm -> do it", "fail  b     bad -> mend it"]
    assert verdict(found) == "verdict: fail (1 ok, 1 warn, 1 fail)"
    assert verdict(found[:2]) == "verdict: ok (1 ok, 1 warn, 0 fail)"
    assert lines([]) == []


@given(st.integers(0, 10**18))
def test_sizes_are_near_what_they_say(number: int) -> None:
    text, unit = size(number).split(" ")
    said = float(text) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(said - number) <= 0.05 * max(1.0, number)


@pytest.mark.parametrize(("native", "level"), [(True, "ok"), (False, "warn")])
def test_a_gpu(native: bool, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name, answer in {"is_available": True, "device_count": 2, "mem_get_info": (20 * GB, 24 * GB),
                         "is_bf16_supported": native, "get_device_name": "NVIDIA L4"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer, **more: answer)
    found = machine.check_device()
    assert found.level == level
    assert "2 x NVIDIA L4, 20.0 GB free of 24.0 GB" in found.text
    assert ("--precision float32" in found.advice) == (not native)


def test_a_driver_that_torch_cannot_use_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    found = machine.check_device()
    assert found.level == "fail"
    assert "torch" in found.advice
