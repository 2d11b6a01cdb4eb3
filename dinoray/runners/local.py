"""`run_units` in one process, without Ray: the same runner, one lease over all that is pending."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dinoray.ledger import Receipt
from dinoray.runners.base import Runner


def run_units(make_runner: Callable[[], Runner], pending: Sequence[int], on_receipt: Callable[[Receipt], None]) -> None:
    """Run the units and report each receipt. What the runner or `on_receipt` raises ends the run."""
    if not pending:
        return
    runner = make_runner()
    try:
        for receipt in runner.lease(pending):
            on_receipt(receipt)
    finally:
        runner.close()
