"""Benchmarks are run by hand and seldom: each must at least be there when it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_every_benchmark_imports_what_there_is() -> None:
    names = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")
    assert {"backbone", "pipeline", "cells_learning", "segmentation"} <= set(names)
    code = f"import sys, importlib; sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER.parent)!r}]\n" + "".join(
        f"importlib.import_module({name!r})\n" for name in names)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
