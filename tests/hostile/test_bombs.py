"""Decompression bombs: refused with a reason, in a process that could not hold them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.hostile.bombs import BOMBS, SECONDS
from tests.runs import environment


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, float, int]]:
    """What became of every bomb in one child with a limited address space: (reason, seconds, peak bytes so far)."""
    done = subprocess.run([sys.executable, "-m", "tests.hostile.bombs"], env=environment(), capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: (reason, seconds, peak) for name, reason, seconds, peak in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_its_reason(outcomes: dict[str, tuple[str, float, int]], name: str) -> None:
    reason, seconds, _ = outcomes[name]
    assert reason in BOMBS[name][1] and seconds < SECONDS


def test_no_bomb_takes_memory(outcomes: dict[str, tuple[str, float, int]]) -> None:
    assert max(peak for _, _, peak in outcomes.values()) < 600e6
