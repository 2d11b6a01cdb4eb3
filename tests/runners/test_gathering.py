"""Micro-batches: which parts share one depends on the order of the plan only, and none is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import ItemError
from dinoray.runners import gathering
from dinoray.runners.compute import ComputePool
from dinoray.runners.gathering import Gathering


@dataclass(frozen=True)
class Part:
    number: int
    key: tuple[int, ...]
    nbytes: int = 1


@pytest.fixture(scope="module")
def pools() -> Iterator[list[ComputePool]]:
    made = [ComputePool(torch.device("cpu"), threads) for threads in (1, 3)]
    yield made
    for pool in made:
        pool.close()


def gather(pool: ComputePool, keys: list[int], full: int, limit: int, sizes: list[int]) -> tuple[list[list[int]], int]:
    """The numbers of the parts of each batch in the order of results, and the most bytes that ever waited."""
    batches: list[list[int]] = []
    seconds = {"compute": 0.0, "wait_compute": 0.0}

    def take(owners: list[int], result: list[int]) -> None:
        assert list(owners) == result
        batches.append(result)

    found = Gathering(pool, lambda parts: [part.number for part in parts], full=lambda part: full, take=take, seconds=seconds)
    most = 0
    before, gathering.WAITING_BYTES = gathering.WAITING_BYTES, limit
    try:
        for number, key in enumerate(keys):
            found.add(number, Part(number, (key,), sizes[number % len(sizes)]))
            most = max(most, found.waiting_bytes)
        found.finish()
    finally:
        gathering.WAITING_BYTES = before
    assert found.waiting_bytes == 0
    return batches, most


@settings(deadline=None, max_examples=60)
@given(keys=st.lists(st.integers(0, 3), max_size=40), full=st.integers(1, 6), limit=st.sampled_from([2, 9, 10**9]),
       sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_batches_are_a_function_of_the_order(pools: list[ComputePool], keys: list[int], full: int, limit: int,
                                             sizes: list[int]) -> None:
    (batches, most), again = gather(pools[0], keys, full, limit, sizes), gather(pools[1], keys, full, limit, sizes)
    assert (batches, most) == again
    assert sorted(number for batch in batches for number in batch) == list(range(len(keys)))
    assert all(len({keys[number] for number in batch}) == 1 and batch == sorted(batch) for batch in batches)
    assert all(len(batch) <= full for batch in batches) and most <= limit


def test_an_item_error_goes_to_its_owners_and_others_end_the_run(pools: list[ComputePool]) -> None:
    taken: list[tuple[list[int], object]] = []

    def compute(parts: list[Part]) -> str:
        if parts[0].key == (1,):
            raise ItemError("device_memory", "too large")
        if parts[0].key == (2,):
            raise RuntimeError("a bug")
        return "fine"

    found = Gathering(pools[0], compute, full=lambda part: 2, take=lambda owners, result: taken.append((list(owners), result)),
                      seconds={"compute": 0.0, "wait_compute": 0.0})
    for number, key in enumerate((0, 1, 0, 1)):
        found.add(number, Part(number, (key,)))
    found.finish()
    assert taken[0] == ([0, 2], "fine") and taken[1][0] == [1, 3] and isinstance(taken[1][1], ItemError)
    found.add(4, Part(4, (2,)))
    with pytest.raises(RuntimeError, match="a bug"):
        found.finish()
