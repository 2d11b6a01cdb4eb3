"""What a user must know of the scales of a segmentation: where they were estimated, group by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from dinoray.generations import Generation
from dinoray.wording import plural

GROUPS_SHOWN = 5
"""Plates or folders that get a line of their own; more are told of together."""


def scale_notes(parts: Sequence[Generation]) -> Iterator[str]:
    """A line for each plate (or folder) with images whose scale was estimated; nothing for other kinds of outputs."""
    if not parts or parts[0].plan.facts.get("kind") != "cell-masks":
        return
    factors: dict[str, list[float]] = {}
    for part in parts:
        done = part.ledger.done()
        for receipt in part.ledger.receipts([unit for unit in part.plan.unit_ids if unit in done]):
            for group, found in receipt.numerics.get("estimated_scales", {}).items():
                factors.setdefault(group, []).extend(found)
    todo = "give --pixel-size-um or --diameter-px to fix it"
    for group in sorted(factors)[:GROUPS_SHOWN]:
        found = factors[group]
        yield (f"scale estimated for {plural(len(found), 'image')}" + (f" of {group}" if group else "")
               + f": median factor {median(found):.2g}; {todo}")
    if len(factors) > GROUPS_SHOWN:
        rest = [value for group in sorted(factors)[GROUPS_SHOWN:] for value in factors[group]]
        yield (f"scale estimated for {plural(len(rest), 'image')} of {len(factors) - GROUPS_SHOWN} more plates or folders: median "
               f"factor {median(rest):.2g}")
