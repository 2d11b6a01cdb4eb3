"""Numbers in messages: `1 unit`, `2 units`, `6,710,886,400 bytes (6.71 GB)`."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """A number with its noun, which takes an s unless there is one: `1 place`, `4,096 chunks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def count_bytes(number: int) -> str:
    """Bytes, from a million on also in MB, GB or TB (powers of 1000)."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if number >= unit:
            return f"{number:,} bytes ({number / unit:.3g} {name})"
    return f"{number:,} byte{'' if number == 1 else 's'}"
