"""Retries do not wait in these tests; how long they would is tested by itself."""

from __future__ import annotations

import pytest

from dinoray.io import retries


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for, in seconds."""
    asked: list[float] = []

    async def sleep_async(seconds: float) -> None:
        asked.append(seconds)

    monkeypatch.setattr(retries, "sleep", asked.append)
    monkeypatch.setattr(retries, "sleep_async", sleep_async)
    return asked
