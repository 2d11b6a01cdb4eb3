"""Token budgets: a property of model, precision and device, never of the machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.memory.budget import decoded_tokens, default_token_budget, micro_batch, padded_batch
from dinoray.memory.meter import available_cores, rss_peak, tree_uss, uss
from dinoray.vision.variants import VARIANTS


@settings(deadline=None, max_examples=200)
@given(count=st.integers(1, 5000), largest=st.integers(1, 5000))
def test_the_ladder_of_batch_sizes(count: int, largest: int) -> None:
    if count > largest:
        return
    size = padded_batch(count, largest)
    assert count <= size <= largest
    assert size == largest or size & (size - 1) == 0
    assert size < 2 * count, "padding costs less than the batch itself"
    assert padded_batch(size, largest) == size


@settings(deadline=None, max_examples=200)
@given(budget=st.integers(1, 10**6), tokens=st.integers(1, 10**6))
def test_a_micro_batch_keeps_the_budget_or_is_one(budget: int, tokens: int) -> None:
    count = micro_batch(budget, tokens)
    assert count >= 1
    assert count == 1 or count * tokens <= budget
    assert (count + 1) * tokens > budget


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_has_a_budget_of_its_own(variant: str) -> None:
    low, high = (default_token_budget(variant, "cuda", p) for p in ("float32", "bfloat16"))
    assert high == 2 * low > 0
    assert high != default_token_budget("unknown", "cuda", "bfloat16"), "not the fallback"
    assert default_token_budget(variant, "cpu", "float32") == default_token_budget(variant, "cpu", "bfloat16")


def test_larger_models_get_fewer_tokens() -> None:
    budgets = [default_token_budget(f"{name}16", "cuda", "bfloat16") for name in
               ("vitt", "vits", "vitb", "vitl", "vith", "vit7b")]
    assert budgets == sorted(set(budgets), reverse=True)


def test_meters_see_what_is_allocated() -> None:
    # in a process of its own: the peak of this one may be far above already
    code = ("from dinoray.memory.meter import rss_peak, uss\n"
            "before, peak = uss(), rss_peak()\n"
            "block = b'1' * 80_000_000\n"
            "assert 70e6 < uss() - before < 120e6, uss() - before\n"
            "assert 60e6 < rss_peak() - peak < 160e6, rss_peak() - peak\n")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert uss() == pytest.approx(uss(os.getpid()), rel=0.05)
    assert rss_peak() > 2**20
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_a_tree_of_processes_counts_its_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "b = b'1' * 60_000_000; print(1, flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert tree_uss() > uss() + 50e6
    finally:
        child.communicate(b"\n", timeout=20)


def test_a_window_with_a_decoder_costs_what_the_larger_of_the_two_needs() -> None:
    small = decoded_tokens(tokens=261, dim=384, taps=4, pixels=256 * 256, pixel_values=1)
    assert small == 261, "a decoder that needs less than the backbone did costs nothing"
    large = decoded_tokens(tokens=261, dim=384, taps=4, pixels=256 * 256, pixel_values=136)
    assert (large - 1) * 16 * 384 < 4 * 261 * 384 + 136 * 256 * 256 <= large * 16 * 384
