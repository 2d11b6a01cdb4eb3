"""What a user must know of the scales of a segmentation: where they were estimated, group by group, or could not be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from dinoray.generations import Generation
from dinoray.wording import plural

GROUPS_SHOWN = 5
"""Plates or folders that get a line of their own; more are told of together."""


def scale_notes(parts: Sequence[Generation]) -> Iterator[str]:
    """A line for each plate (or folder) with images whose scale was estimated, and one for those that gave no estimate
    to believe; nothing for other kinds of outputs."""
    if not parts or parts[0].plan.facts.get("kind") != "cell-masks":
        return
    trained = parts[0].plan.facts["described"]["checkpoint"]
    todo = f"give {'--pixel-size-um or ' if trained['pixel_size_um'] is not None else ''}--diameter-px to fix it"
    factors: dict[str, list[float]] = {}
    unknown = 0
    for part in parts:
        done = part.ledger.done()
        for receipt in part.ledger.receipts([unit for unit in part.plan.unit_ids if unit in done]):
            for group, found in receipt.numerics.get("estimated_scales", {}).items():
                unknown += found.count(None)
                if known := [factor for factor in found if factor is not None]:
                    factors.setdefault(group, []).extend(known)
    for group in sorted(factors)[:GROUPS_SHOWN]:
        yield _line(factors[group], "" if group in ("", ".") else f" of {group}", todo)
    if len(factors) > GROUPS_SHOWN:
        rest = [factor for group in sorted(factors)[GROUPS_SHOWN:] for factor in factors[group]]
        yield _line(rest, f" of {len(factors) - GROUPS_SHOWN} more plates or folders", todo)
    if unknown:
        yield (f"scale unknown for {plural(unknown, 'image')} (no whole cell tells it, or cells more than 4 times smaller or "
               f"larger than the model's): taken as they are, scale_source says which; {todo}")


def _line(factors: list[float], of: str, todo: str) -> str:
    return f"scale estimated for {plural(len(factors), 'image')}{of}: median factor {median(factors):.2g}; {todo}"
