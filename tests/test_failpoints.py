"""Failpoints: which passage acts, once among processes, and what is no failpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dinoray import failpoints
from dinoray.errors import BadRequest
from dinoray.failpoints import POINTS, parse, reach

PACKAGE = Path(failpoints.__file__).parent


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_passed", type(failpoints._passed)())
    monkeypatch.delenv("DINORAY_FAILPOINTS", raising=False)
    monkeypatch.delenv("DINORAY_FAILPOINT_DIR", raising=False)


def acts(point: str, detail: str = "") -> bool:
    try:
        reach(point, detail)
    except OSError:
        return True
    return False


def test_nothing_acts_without_the_variable() -> None:
    assert not any(acts(point) for point in POINTS)


def test_the_passage_that_is_asked_for_acts_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINORAY_FAILPOINTS", "unit.data=raise@3, item.load~bad=raise@*, plan.seal=raise")
    assert [acts("unit.data") for _ in range(5)] == [False, False, True, False, False]
    assert [acts("item.load", name) for name in ("bad.png", "good.png", "a/bad.tif", "")] == [True, False, True, False]
    assert [acts("plan.seal"), acts("plan.seal")] == [True, False]
    assert not acts("unit.begin")


def test_with_a_folder_each_entry_acts_once_among_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DINORAY_FAILPOINTS", "item.load~a=raise,item.load~b/../c=raise,unit.data=raise@*")
    monkeypatch.setenv("DINORAY_FAILPOINT_DIR", str(tmp_path))
    assert acts("item.load", "a") and acts("item.load", "b/../c")
    failpoints._passed.clear()  # another process
    assert not acts("item.load", "a") and not acts("item.load", "b/../c")
    assert acts("unit.data") and acts("unit.data"), "entries of every passage are not held back"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("text", ["unit.nowhere=kill", "unit.data", "unit.data=explode", "unit.data=kill@x", "unit.data=kill@-1"])
def test_what_is_no_failpoint_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(text)) as caught:
        parse(text)
    assert "unit.receipt" in caught.value.todo


def test_every_point_is_passed_somewhere_and_every_passed_one_is_known() -> None:
    """`unit.*`, `stats.*` and `volume.*` are named by the runner's `point`."""
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    passed = set(re.findall(r'reach\("([a-z.]+)"', source))
    for kind in ("unit", "stats", "volume"):
        passed |= {f"{kind}.{name}" for name in re.findall(r'reach\(f"\{self\.point\}\.([a-z]+)"', source)}
    assert passed == set(POINTS)
