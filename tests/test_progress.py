"""Progress: pace from this run's receipts alone, a line now and then where there is no terminal."""

from __future__ import annotations

import io

import pytest

from dinoray import progress
from dinoray.ledger import Tally
from dinoray.progress import Progress, duration


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (59.99, "59 s"), (60, "1 min 00 s"), (125, "2 min 05 s"), (3599.9, "59 min 59 s"),
    (3600, "1 h 00 min"), (3660, "1 h 01 min"), (90_000, "25 h 00 min"), (float("inf"), "?"),
])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_items_of_earlier_runs_do_not_count_for_the_pace(clock: list[float]) -> None:
    lines: list[str] = []
    tally = Tally(items=500)
    with Progress(lines.append) as shown:
        shown.begin("images", total=1000, tally=tally)
        clock[0] += 10
        tally.items = 600
        assert shown.pace(tally, clock[0]) == "10.0 items/s, 40 s left"
        tally.quarantined = 3
        assert shown.pace(tally, clock[0]).endswith("left, 3 quarantined")


def test_without_a_receipt_the_rest_is_unknown(clock: list[float]) -> None:
    with Progress(lambda line: None) as shown:
        shown.begin("images", total=10, tally=Tally())
        assert shown.pace(Tally(), clock[0]) == "0.0 items/s, ? left"
        assert shown.pace(Tally(items=1), clock[0])  # no time has passed: no division by zero


def test_a_line_every_so_often_and_each_phase_anew(clock: list[float]) -> None:
    lines: list[str] = []
    with Progress(lines.append, line_every_s=30) as shown:
        shown.begin("statistics", total=4, tally=Tally())
        for second in range(100):
            clock[0] += 1
            shown.advance(Tally(items=1))
            assert len(lines) == (second + 1) // 30
        shown.begin("images", total=8, tally=Tally())
        clock[0] += 29
        shown.advance(Tally(items=2))
        assert len(lines) == 3
        clock[0] += 1
        shown.advance(Tally(items=3))
    assert lines[0].startswith("statistics: 1/4")
    assert lines[-1].startswith("images: 3/8  0.1 items/s, 50 s left")


def test_on_a_terminal_a_live_bar_takes_the_place_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, lines = Terminal(), []
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(lines.append, line_every_s=0) as shown:
        shown.begin("statistics", total=2, tally=Tally())
        shown.advance(Tally(items=2))
        shown.begin("images", total=4, tally=Tally(items=1))
        shown.advance(Tally(items=2, quarantined=1))
        shown._live.refresh()
    assert lines == []
    assert "images" in terminal.getvalue()
    assert "2/4" in terminal.getvalue()


def test_the_bar_stops_when_the_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    seen = []
    with pytest.raises(RuntimeError, match="boom"), Progress(print) as shown:
        shown.begin("images", total=2, tally=Tally())
        seen.append(shown._live)
        raise RuntimeError("boom")
    assert seen[0] is not None
    assert not seen[0].live.is_started


def test_the_bar_is_gone_between_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    with Progress(print) as shown:
        assert shown._live is None
        shown.begin("statistics", total=2, tally=Tally())
        first = shown._live
        shown.end()
        assert first is not None
        assert not first.live.is_started
        shown.begin("images", total=2, tally=Tally())
        shown.begin("images again", total=2, tally=Tally())
        shown.end()
        shown.end()
