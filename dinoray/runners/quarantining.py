"""The bad items of a unit: into its quarantine table and its receipt."""

from __future__ import annotations

from collections.abc import Mapping

from dinoray.errors import ItemError
from dinoray.ledger import Ledger, Receipt
from dinoray.units import Unit


def quarantine(ledger: Ledger, unit: Unit, bad: Mapping[int, ItemError], receipt: Receipt) -> None:
    """Store the table of the items at these positions, and tell the receipt; nothing is stored where none is bad."""
    receipt.quarantined = len(bad)
    table = []
    for position in sorted(bad):
        item, error = unit.items[position], bad[position]
        receipt.reasons[error.reason] = receipt.reasons.get(error.reason, 0) + 1
        table.append({"item_id": item.item_id, "uri": item.files[0].uri if item.files else "",
                      "reason": error.reason, "message": str(error)})
    if table:
        receipt.objects.append(ledger.put_quarantine(unit.id, table))
