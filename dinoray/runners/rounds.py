"""Rounds over the pending units: pending = plan - receipts, work, recompute; the rule by which a run gives up.

A unit that met transient trouble is left (no receipt) and comes again in the next round, after a pause that
grows while nothing works.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from dinoray.errors import NoProgress, TransientError
from dinoray.ledger import Receipt
from dinoray.wording import plural

logger = logging.getLogger(__name__)

LEFT_IN_A_ROW = 8
"""So many units left one after the other, without a receipt between them, end a round: the storage is down."""
PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0


class Round:
    """What one round came to; `receipt` and `left` are told what happens."""

    def __init__(self, seen: set[str], on_receipt: Callable[[Receipt], None], *, workers: int = 1):
        self._seen, self._on_receipt, self._most = seen, on_receipt, LEFT_IN_A_ROW * workers
        self.trouble = ""
        self._in_a_row = 0

    def receipt(self, receipt: Receipt) -> None:
        """A receipt has come; each counts once."""
        self._in_a_row = 0
        if receipt.unit not in self._seen:
            self._seen.add(receipt.unit)
            self._on_receipt(receipt)

    def left(self, text: str) -> None:
        """A unit was left for the next round."""
        self.trouble = text
        self._in_a_row += 1
        logger.warning("a unit was left for the next round: %s", text)

    @property
    def hopeless(self) -> bool:
        """Whether to end this round early."""
        return self._in_a_row >= self._most


def run_rounds(recompute_pending: Callable[[], list[int]], on_receipt: Callable[[Receipt], None],
               work: Callable[[list[int], Round], None], *, rounds: int, where: str, workers: int = 1,
               check: Callable[[], None] = lambda: None, pause_s: float = PAUSE_S) -> None:
    """Work until nothing is pending; `on_receipt` sees each new receipt once.

    `check` is called between rounds and may raise. Raises NoProgress after `rounds` rounds without a new receipt
    (with the last trouble), and what `work` and `on_receipt` raise.
    """
    idle, seen, trouble = 0, set(), ""
    while True:
        check()
        pending = recompute_pending()
        if not pending:
            return
        if idle >= rounds:
            raise NoProgress(f"{plural(len(pending), 'unit')} {'is' if len(pending) == 1 else 'are'} left after "
                             f"{plural(rounds, 'round')} without progress; last: {trouble}",
                             where=where, todo="mend the cause, then run the same command again: it resumes")
        if idle:
            time.sleep(min(LONGEST_PAUSE_S, pause_s * 2 ** (idle - 1)))
        before = len(seen)
        this = Round(seen, on_receipt, workers=workers)
        try:
            work(pending, this)
        except TransientError as error:  # outside a unit: the plan or the ledger could not be read
            this.left(str(error))
        trouble = this.trouble or "no error was reported"
        idle = 0 if len(seen) > before else idle + 1
