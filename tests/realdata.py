"""Where the real data sets are (`../shared/data` beside the repository; README.md there names them)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def data_folder(name: str) -> Path:
    """The folder of a data set. Skips the test when it is absent; fails it under DINORAY_REQUIRE_DATA=1."""
    folder = DATA / name
    if not folder.is_dir():
        message = f"real data set {name!r} is not at {folder}"
        if os.environ.get("DINORAY_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder
