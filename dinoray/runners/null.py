"""A runner that reads nothing and writes a receipt: what planning, leases and the ledger cost by themselves."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence

from dinoray.ledger import Ledger, Receipt
from dinoray.units import Plan


class NullRunner:
    """Marks the attempt and commits an empty receipt for each unit."""

    def __init__(self, plan: Plan, ledger: Ledger):
        self.plan, self.ledger = plan, ledger
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
            yield self.ledger.commit(Receipt(
                unit=unit.id, number=number, fingerprint=self.plan.facts["fingerprint"], plate=unit.plate,
                items=len(unit.items), attempt=attempt, worker={"host": socket.gethostname(), "pid": os.getpid()}))

    def close(self) -> None:
        """Nothing to stop."""
