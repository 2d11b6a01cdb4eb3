"""The soak (benchmarks/soak.py) in small: the same program, a few kills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import environment

SOAK = Path(__file__).parents[2] / "benchmarks/soak.py"


@pytest.mark.slow
@pytest.mark.ray
def test_a_small_soak_loses_nothing_and_says_so_in_a_table() -> None:
    env = {**environment(), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, str(SOAK), "--units", "160", "--sleep", "0.1", "--kill-every", "2", "--workers", "2"],
                          env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", done.stdout, re.MULTILINE))
    assert cells["units planned; with a receipt; reported to the driver"] == "160; 160; 160"
    assert cells["units lost"] == cells["units reported twice"] == "0"
    kills, processes = map(int, cells["kills; processes that wrote receipts"].split(";"))
    assert kills >= 1 and processes > 2, "actors were killed, and others took their place"
    starts, again = map(int, cells["starts; of them repeated (at most one for each kill)"].split(";"))
    assert starts == 160 + again and again <= kills
    assert "verdict: nothing lost, nothing twice" in done.stdout
