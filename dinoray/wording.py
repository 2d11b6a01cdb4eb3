"""Numbers in messages: `1 unit`, `2 units`, `6,710,886,400 bytes (6.71 GB)`."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """A number with its noun, which takes an s unless there is one: `1 place`, `4,096 chunks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def device_words(kind: str) -> str:
    """The device kind of a receipt. Its last word names an instruction of the processor, not what was computed in:
    `cpu AuthenticAMD AVX512 bfloat16` -> `cpu AuthenticAMD AVX512 (has bfloat16 instructions)`."""
    bare = kind.removesuffix(" bfloat16")
    return kind if bare == kind else f"{bare} (has bfloat16 instructions)"


def count_bytes(number: int) -> str:
    """Bytes, from a million on also in MB, GB or TB (powers of 1000)."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if number >= unit:
            return f"{number:,} bytes ({number / unit:.3g} {name})"
    return f"{number:,} byte{'' if number == 1 else 's'}"
