"""A runner that reads nothing and writes a receipt: what planning, leases and the ledger cost by themselves.

With `sleep_s` it stands for work of known length, which is what the soak (benchmarks/soak.py) needs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence

from dinoray.ledger import Ledger, Receipt
from dinoray.units import Plan


class NullRunner:
    """Marks the attempt, sleeps `sleep_s` seconds, and commits an empty receipt for each unit."""

    def __init__(self, plan: Plan, ledger: Ledger, *, sleep_s: float = 0.0):
        self.plan, self.ledger, self.sleep_s = plan, ledger, sleep_s
        self.beats = 0

    def lease(self, numbers: Sequence[int]) -> Iterator[Receipt]:
        """Receipts of the units, in order."""
        for number in numbers:
            unit = self.plan.unit(number)
            existing = self.ledger.receipt(unit.id)
            if existing is not None:
                yield existing
                continue
            self.beats += 1
            attempt = self.ledger.begin(unit.id)
            if self.sleep_s:
                time.sleep(self.sleep_s)
            yield self.ledger.commit(Receipt(
                unit=unit.id, number=number, fingerprint=self.plan.facts["fingerprint"], plate=unit.plate,
                items=len(unit.items), attempt=attempt, worker={"host": socket.gethostname(), "pid": os.getpid()}))

    def close(self) -> None:
        """Nothing to stop."""
