"""Peaks from shapes: what is alive at once counts, what was there before or is gone does not."""

from __future__ import annotations

import torch

from dinoray.vision.rope import turns
from dinoray.vision.tracing import Peak, traced

MIB = 2**20


def test_what_is_alive_at_once_counts() -> None:
    held = torch.zeros(MIB, dtype=torch.uint8)
    found = []

    def run(phase) -> None:
        one = held + 1
        two = one.float()  # 4 MiB beside 1
        del one
        found.append(phase().live)
        view = two.view(4, -1)[:2]
        del two  # its storage stays: a view holds it
        three = view.clone()
        found.append(phase().live)
        del view, three
        phase()
        found.append(phase().live)

    traced(run, [held])
    assert found == [5 * MIB, 6 * MIB, 0]
    assert not held.any(), "what is held keeps its values"


def test_gradients_and_what_the_backward_keeps_count() -> None:
    layer = torch.nn.Linear(256, 256, bias=False)
    x = torch.zeros(1024, 256)
    found = []

    def run(phase) -> None:
        y = layer(x).relu()
        found.append(phase().live)
        y.sum().backward()
        found.append(phase().live)
        layer.weight.grad = None

    traced(run, [*layer.parameters(), x])
    values = 1024 * 256 * 4
    assert found[0] == 2 * values, "the product and its positive part"
    assert found[1] >= 2 * values + 256 * 256 * 4, "the weights' gradient beside them"
    assert layer.weight.grad is None


def test_what_is_given_from_outside_counts_once() -> None:
    found = []

    def run(phase) -> None:
        given = torch.zeros(MIB, dtype=torch.uint8)
        given.add_(1)
        given.sum()
        found.append(phase().live)

    traced(run, [])
    assert MIB <= found[0] <= MIB + 64


def test_the_heap_stays_as_large_as_it_was() -> None:
    found = []

    def run(phase) -> None:
        small = torch.zeros(24 * MIB, dtype=torch.uint8)
        large = torch.zeros(40 * MIB, dtype=torch.uint8)
        del large
        found.append(phase())
        del small
        large = torch.zeros(48 * MIB, dtype=torch.uint8)
        found.append(phase())
        del large
        phase()
        found.append(phase())

    traced(run, [])
    assert found == [Peak(64 * MIB, 40 * MIB, 24 * MIB), Peak(48 * MIB, 48 * MIB, 24 * MIB), Peak(0, 0, 24 * MIB)]


def test_what_is_kept_for_later_keeps_its_values() -> None:
    """A table that the backbone makes once and keeps is no fake one afterwards."""
    turns.cache_clear()
    traced(lambda phase: turns(2, 3, 1, 8, torch.device("cpu")), [])
    again = turns(2, 3, 1, 8, torch.device("cpu"))
    assert type(again) is torch.Tensor and torch.equal(again.abs(), torch.ones(7, 4)), "angles have no length"
