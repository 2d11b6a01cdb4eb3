"""Numbers in messages."""

from __future__ import annotations

from dinoray.wording import count_bytes, device_words, plural


def test_one_takes_no_s() -> None:
    assert [plural(n, "unit") for n in (0, 1, 2, 4096)] == ["0 units", "1 unit", "2 units", "4,096 units"]


def test_bytes_are_said_in_units_too() -> None:
    assert [count_bytes(n) for n in (1, 999, 6_700_000_000, 2 * 10**12, 1_500_000)] == [
        "1 byte", "999 bytes", "6,700,000,000 bytes (6.7 GB)", "2,000,000,000,000 bytes (2 TB)", "1,500,000 bytes (1.5 MB)"]


def test_what_a_processor_can_is_not_what_was_computed_in() -> None:
    assert device_words("cpu AuthenticAMD AVX512 bfloat16") == "cpu AuthenticAMD AVX512 (has bfloat16 instructions)"
    assert [device_words(kind) for kind in ("cuda NVIDIA H100", "cpu x AVX2")] == ["cuda NVIDIA H100", "cpu x AVX2"]
