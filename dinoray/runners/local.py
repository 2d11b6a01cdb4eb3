"""`run_units` in one process, without Ray: the same runner, one lease over all that is pending, in rounds."""

from __future__ import annotations

from collections.abc import Callable

from dinoray.ledger import Receipt
from dinoray.runners.base import Runner, UnitLeft
from dinoray.runners.rounds import PAUSE_S, Round, run_rounds


def run_units(make_runner: Callable[[], Runner], recompute_pending: Callable[[], list[int]],
              on_receipt: Callable[[Receipt], None], *, rounds: int, where: str,
              check: Callable[[], None] = lambda: None, pause_s: float = PAUSE_S) -> None:
    """Run all pending units and report each new receipt. What the runner or `on_receipt` raises ends the run."""
    runner: Runner | None = None

    def work(pending: list[int], this: Round) -> None:
        nonlocal runner
        runner = runner or make_runner()
        for result in runner.lease(pending):
            if isinstance(result, UnitLeft):
                this.left(str(result.error))
                if this.hopeless:
                    return
            else:
                this.receipt(result)

    try:
        run_rounds(recompute_pending, on_receipt, work, rounds=rounds, where=where, check=check, pause_s=pause_s)
    finally:
        if runner is not None:
            runner.close()
