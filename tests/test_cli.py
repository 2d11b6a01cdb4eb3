"""The command line: exit codes, messages without tracebacks, and a resume command that is the same job."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tifffile
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinoray import cli
from dinoray.config import ExtractImagesJob
from dinoray.errors import BadRequest, ItemError, NoProgress, SystemicError, TooManyFailures
from dinoray.request import resume_command
from tests.conftest import texture
from tests.runs import run, use_tiny_backbone

FAST = ["--model", "vitt16", "--weights", "random", "--no-ray"]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_backbone(monkeypatch)
    monkeypatch.setattr(cli, "with_signals", lambda resume: None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i in range(4):
        tifffile.imwrite(tmp_path / f"in/{i}.tif", texture((32, 32), i, "uint16"), photometric="minisblack")
    return tmp_path / "in"


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["dinoray", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


# ---------------------------------------------------------------- exit codes


def test_complete_is_0_with_quarantine_3_and_again_the_same(monkeypatch, capsys, images: Path, tmp_path: Path) -> None:
    argv = ["extract", "images", images, "--out", tmp_path / "out", *FAST]
    code, out, err = call(monkeypatch, capsys, *argv)
    assert (code, err) == (0, "")
    assert "complete: 4 images, 4 rows" in out
    lines = out.splitlines()
    fingerprint = lines[0].split()[1]
    for part in (fingerprint, str(tmp_path / "out")):
        assert part in "\n".join(lines[-2:])
    assert any("resume with: dinoray extract images" in line for line in lines[:4])
    assert "dinoray extract images" in lines[-1]
    (images / "bad.tif").write_bytes(b"")
    code, out, err = call(monkeypatch, capsys, "extract", "images", images, "--out", tmp_path / "bad", *FAST)
    assert code == 3
    assert "1 quarantined (1 empty)" in out
    assert call(monkeypatch, capsys, "extract", "images", images, "--out", tmp_path / "bad", *FAST)[0] == 3


@pytest.mark.parametrize(("argv", "needles"), [
    (["extract", "images", "IN"], ["out"]),
    (["extract", "images", "--out", "OUT", *FAST], ["sources"]),
    (["extract", "images", "IN", "--out", "OUT", "--no-such-flag"], ["no-such-flag", "dinoray --help"]),
    (["extract", "images", "IN", "--out", "OUT", "--limit", "x"], ["limit"]),
    (["extract", "images", "IN", "--out", "OUT", "--limit", "0", *FAST], ["limit"]),
    (["extract", "images", "IN", "--out", "OUT", "--size", "huge", *FAST], ["size", "tiles"]),
    (["extract", "images", "IN", "--out", "OUT", "--where", "Plate", *FAST], ["--where", "Plate"]),
    (["extract", "images", "IN", "--out", "OUT", "--where", "Color=red", *FAST], ["Color"]),
    (["extract", "images", "IN", "--out", "OUT", "--where", "Well=A01", "--where", "Metadata_Well=A02", *FAST],
     ["two conditions on Well"]),
    (["extract", "images", "IN", "--out", "OUT", "--no-ray"], ["--model"]),
    (["extract", "images", "NONE", "--out", "OUT", *FAST], ["NONE", "no such file"]),
    (["extract", "images", "IN", "--out", "OUT", "--layers", "3", *FAST], ["layer 3", "0..2"]),
    (["extract", "images", "IN", "--out", "OUT", "--tile-px", "100", *FAST], ["tile_px", "96"]),
    (["extract", "images", "IN", "--out", "OUT", "--job", "NONE.yaml"], ["NONE.yaml"]),
    (["extract", "images", "IN", "--out", "IN", *FAST], ["not empty"]),
    (["extract", "images", "IN", "--out", "IN/0.tif", *FAST], ["0.tif"]),
    (["extract", "images", "IN", "--out", "IN/0.tif/deep", *FAST], ["0.tif"]),
    (["extract", "images", "IN", "--out", "OUT", "--pattern", "(", *FAST], ["pattern"]),
    (["status", "NONE"], ["not an output"]),
    (["verify", "NONE"], ["not an output"]),
    (["verify", "NONE", "--fast", "--deep"], ["exclude"]),
    (["report", "NONE"], ["not an output"]),
    (["nonsense"], ["nonsense"]),
])
def test_bad_requests_are_2_with_a_message_and_no_traceback(monkeypatch, capsys, images: Path, tmp_path: Path,
                                                           argv: list[str], needles: list[str]) -> None:
    words = {"IN": images, "OUT": tmp_path / "out", "NONE": tmp_path / "NONE", "NONE.yaml": tmp_path / "NONE.yaml",
             "IN/0.tif": images / "0.tif", "IN/0.tif/deep": images / "0.tif/deep"}
    code, _, err = call(monkeypatch, capsys, *[words.get(a, a) for a in argv])
    assert code == 2, err
    assert "Traceback" not in err
    for needle in needles:
        assert needle in err
    assert len(err.strip().splitlines()) >= 2, "the message says what to do"
    assert not list((tmp_path / "out").rglob("*.parquet")), "nothing was run"


@pytest.mark.parametrize(("error", "code"), [
    (BadRequest("x", todo="y"), 2), (SystemicError("x", todo="y"), 1), (TooManyFailures("x"), 1), (NoProgress("x"), 1),
    (ItemError("nan", "x"), 1),
])
def test_errors_become_their_exit_code_and_their_name(capsys, error: Exception, code: int) -> None:
    def fail() -> int:
        raise error

    assert cli.guarded(fail) == code
    err = capsys.readouterr().err
    assert err.startswith(f"{type(error).__name__}: x")
    assert "Traceback" not in err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: 1 // 0)


def test_a_changed_request_names_every_setting_that_differs(monkeypatch, capsys, images: Path, tmp_path: Path) -> None:
    argv = ["extract", "images", images, "--out", tmp_path / "out", *FAST]
    assert call(monkeypatch, capsys, *argv)[0] == 0
    code, _, err = call(monkeypatch, capsys, *argv, "--size", "native", "--layers", "1", "--unit-items", "7")
    assert code == 2
    for line in ('settings.size: "auto" -> "native"', "settings.layers: null -> [1]", "settings.unit_items: 256 -> 7"):
        assert line in err
    assert "tile_px" not in err
    assert "--out" in err
    assert call(monkeypatch, capsys, *argv, "--decode-threads", "1", "--max-failed-fraction", "0.5")[0] == 0


def test_changed_inputs_are_named(monkeypatch, capsys, images: Path, tmp_path: Path) -> None:
    argv = ["extract", "images", images, "--out", tmp_path / "out", *FAST]
    assert call(monkeypatch, capsys, *argv)[0] == 0
    (images / "new.tif").write_bytes((images / "0.tif").read_bytes())
    (images / "1.tif").unlink()
    code, _, err = call(monkeypatch, capsys, *argv)
    assert code == 2
    assert "1 added (e.g. new.tif)" in err
    assert "1 removed (e.g. 1.tif)" in err


def test_too_many_failures_stop_the_run_with_1(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(230):
        (tmp_path / f"in/{i:03d}.png").write_bytes(b"")
    argv = ["extract", "images", tmp_path / "in", "--out", tmp_path / "out", "--unit-items", "50", *FAST]
    code, _, err = call(monkeypatch, capsys, *argv)
    assert code == 1
    assert "TooManyFailures: 200 of all items so far (100.0% of 200)" in err
    assert "--max-failed-fraction" in err
    assert call(monkeypatch, capsys, *argv, "--max-failed-fraction", "1")[0] == 3


# ---------------------------------------------------------------- other commands


def test_status_and_verify_of_a_run(monkeypatch, capsys, images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out")
    code, out, _ = call(monkeypatch, capsys, "status", tmp_path / "out")
    assert code == 0
    assert "1 of 1 done" in out
    for flags in ([], ["--fast"], ["--deep"]):
        code, out, _ = call(monkeypatch, capsys, "verify", tmp_path / "out", *flags)
        assert code == 0
        assert out.startswith("whole: 4 images in 1 unit, 4 rows, 0 quarantined")
        assert ("checksums" in out) is (flags == ["--deep"])
    next((tmp_path / "out/features").glob("*")).unlink()
    code, _, err = call(monkeypatch, capsys, "verify", tmp_path / "out")
    assert code == 1
    assert "missing: features/part-" in err


@pytest.mark.parametrize("argv", [["--help"], ["extract", "images", "--help"], ["verify", "--help"]])
def test_help(monkeypatch, capsys, argv: list[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, *argv)
    assert code == 0
    assert "Usage" in out


def test_every_field_of_the_job_has_a_flag(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = call(monkeypatch, capsys, "extract", "images", "--help")[1]
    for name in set(ExtractImagesJob.model_fields) - {"sources"}:
        assert f"--{name.replace('_', '-')}" in out


# ---------------------------------------------------------------- job files and scripts


def test_a_job_file_and_flags_that_override_it(monkeypatch, capsys, images: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"sources": [str(images)], "out": str(tmp_path / "a"), "model": "vitt16",
                                    "weights": "random", "no_ray": True, "limit": 2}))
    assert "complete: 2 images" in call(monkeypatch, capsys, "extract", "images", "--job", file)[1]
    out = call(monkeypatch, capsys, "extract", "images", "--job", file, "--limit", "3", "--out", tmp_path / "b")[1]
    assert "complete: 3 images" in out
    assert (tmp_path / "b/_SUCCESS").exists()


def test_job_scripts_count_quarantine_as_success_unless_strict(capsys, images: Path, tmp_path: Path) -> None:
    def script(*argv: object) -> int:
        return cli.run_job_script(ExtractImagesJob, cli.run_extract_images, [str(a) for a in argv])

    (images / "bad.tif").write_bytes(b"")
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"sources": [str(images)], "out": str(tmp_path / "a"), "model": "vitt16",
                                    "weights": "random", "no_ray": True}))
    assert script(file) == 0
    assert script(file, "strict=true") == 3
    assert script(file, "limit=x") == 2
    assert script(file, "limit") == 2
    assert script(tmp_path / "none.yaml") == 2
    assert script() == 2
    assert script("--help") == 0
    assert "usage" in capsys.readouterr().out


# ---------------------------------------------------------------- the resume command

WORD = st.text("aé 中'\"$*=;,\\%~#&|<>-._", min_size=1, max_size=6).filter(lambda s: not s.startswith("-"))
FIELDS = {
    "model": st.sampled_from(["vits16", "vitt8"]), "weights": st.sampled_from(["random", "random:7", "/a b/c'd"]),
    "features": st.sampled_from([("cls",), ("patches", "cls"), ("cls", "patch_mean")]),
    "layers": st.sampled_from([(0,), (5, 11), None]), "channels": st.sampled_from(["mean", "x=a b,c,d;y=e,f,g"]),
    "size": st.sampled_from(["native", "resize"]), "tile_px": st.sampled_from([32, 256, 512]),
    "scaling_low_percent": st.sampled_from([0.0, 0.1, 1e-05, 12.345678901234]), "limit": st.integers(1, 9),
    "where": st.dictionaries(WORD.filter(lambda s: "=" not in s), WORD, max_size=3),
    "workers": st.sampled_from(["auto", "3", "1,8"]), "no_ray": st.booleans(), "strict": st.booleans(),
    "clahe_tile_um": st.sampled_from([None, 0.5]), "pattern": WORD, "max_failed_fraction": st.sampled_from([0.0, 1.0]),
    "accept_dinov3_license": st.booleans(), "staging": WORD, "token_budget": st.sampled_from([None, 64]),
}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.fixed_dictionaries({}, optional=FIELDS), sources=st.lists(WORD, min_size=1, max_size=3), out=WORD)
def test_the_resume_command_is_the_same_job(monkeypatch, fields: dict, sources: list[str], out: str) -> None:
    job = ExtractImagesJob(sources=tuple(sources), out=out, **fields)
    seen: list[ExtractImagesJob] = []
    monkeypatch.setattr("dinoray.extraction.extract_images", lambda job, say, leave: seen.append(job) or _Done())
    words = shlex.split(resume_command(job))
    assert words[0] == "dinoray"
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert seen == [job]


class _Done:
    exit_code = 0


def test_the_resume_command_of_words_that_look_like_flags(monkeypatch) -> None:
    job = ExtractImagesJob(sources=("-in", "--where"), out="-out", pattern="-p", where={"-k": "-v"})
    seen: list[ExtractImagesJob] = []
    monkeypatch.setattr("dinoray.extraction.extract_images", lambda job, say, leave: seen.append(job) or _Done())
    monkeypatch.setattr(sys, "argv", shlex.split(resume_command(job)))
    with pytest.raises(SystemExit):
        cli.main()
    assert seen == [job]


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_prints_the_resume_command_and_ends_at_once(number: signal.Signals) -> None:
    code = ("import time, threading\nfrom dinoray.cli import with_signals\n"
            "with_signals('dinoray extract images in --out é')\n"
            "threading.Thread(target=time.sleep, args=(60,)).start()\n"  # what a pool in flight would do
            "print('ready', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"})
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        process.send_signal(number)
        out = process.communicate(timeout=20)[0]
    finally:
        process.kill()
    assert time.monotonic() - began < 2
    assert process.returncode == 1
    assert f"stopped by {number.name}; resume with: dinoray extract images in --out é" in out
