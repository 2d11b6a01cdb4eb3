"""`dinoray doctor` as a command: exit codes, and that secrets stay out of what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinoray.cli import main


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["dinoray", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_machine_and_a_source(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pictures: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    assert call(monkeypatch, "doctor", "--source", str(pictures)) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("verdict: ok")
    assert "ok    source" in printed
    assert "verysecret" not in printed


def test_a_failure_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call(monkeypatch, "doctor", "--source", str(tmp_path)) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("verdict: fail")


def test_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call(monkeypatch, "doctor", "weights", "random", "--model", "vitt16") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("layer ")
    assert printed[-1] == "verdict: ok (3 ok, 1 warn, 0 fail)"
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert call(monkeypatch, "doctor", "weights", str(tmp_path)) == 1
    assert call(monkeypatch, "doctor", "weights", str(tmp_path / "none")) == 2
    assert call(monkeypatch, "doctor", "cluster", "--address", "nonsense") == 2
