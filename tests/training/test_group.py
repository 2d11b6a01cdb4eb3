"""Real process groups (gloo, 127.0.0.1): two workers compute what one computes, and memory running out on one hangs none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training import group
from tests.training.toys import last_state, timeless

CASES = [(8, 2), (8, 3), (7, 2), (5, 4), (9, 1), (3, 4), (1, 1)]
"""(batch, micro-batch): shared evenly, unevenly, more workers than micro-batches, a worker without samples."""


@pytest.mark.parametrize("world", [2, 3])
def test_the_reduced_gradient_is_that_of_one_worker_on_the_whole_batch(world: int, tmp_path: Path) -> None:
    whole = group.alone(group.gradients, [(batch, batch) for batch, _ in CASES], torch.float64)
    parts = group.in_group(world, group.gradients, tmp_path, CASES, torch.float64)
    shares = []
    for number, (batch, micro) in enumerate(CASES):
        loss, norm, gradient, count = whole[number]
        assert count == batch and norm > 0
        for rank in range(world):
            found = parts[rank][number]
            assert abs(found[0] - loss) <= 1e-10 * abs(loss), (batch, micro, rank)
            assert torch.allclose(found[2], gradient, rtol=1e-10, atol=1e-10), (batch, micro, rank)
            assert torch.equal(found[2], parts[0][number][2]), "every worker has the same gradient, to the bit"
        shares.append([parts[rank][number][3] for rank in range(world)])
        assert sum(shares[-1]) == batch
    assert any(len(set(share)) > 1 for share in shares), "unequal shares are among the cases"
    assert any(0 in share for share in shares), "a worker without samples is among the cases"


def test_ten_steps_of_two_workers_are_those_of_one_and_a_training_goes_on_with_another_number(tmp_path: Path) -> None:
    one = group.alone(group.ten_steps, str(tmp_path / "one"), {}, None, torch.float32)
    two = group.in_group(2, group.ten_steps, tmp_path / "g", str(tmp_path / "two"), {}, None, torch.float32)
    assert (one["step"], one["ended"]) == (two[0]["step"], two[0]["ended"]) == (10, "steps")
    assert timeless(two[0]["history"]) == timeless(two[1]["history"]), "all workers say the same"
    assert len(one["history"]) == len(two[0]["history"]) > 10
    for a, b in zip(one["history"], two[0]["history"], strict=True):
        for name in a.keys() & {"loss", "val_loss"}:
            assert abs(a[name] - b[name]) <= 1e-4 * abs(a[name]), (a, b)
    for first, then in ((2, 1), (1, 2)):
        out = str(tmp_path / f"{first}to{then}")
        begun = group.in_group(2, group.ten_steps, tmp_path / f"h{first}", out, {}, 2, torch.float32) if first == 2 else \
            [group.alone(group.ten_steps, out, {}, 2, torch.float32)]  # killed at step 6; the last state is of step 4
        assert all("history" not in part for part in begun)
        rest = group.in_group(2, group.ten_steps, tmp_path / f"i{first}", out, {}, None, torch.float32) if then == 2 else \
            [group.alone(group.ten_steps, out, {}, None, torch.float32)]
        assert rest[0]["step"] == 10
        trained_on = sorted(i for part in rest for i in part["seen"] if i < 10**6)
        assert trained_on == list(range(4 * 6, 10 * 6)), "steps 4 to 9, each of their samples once"
        for a, b in zip(one["history"], rest[0]["history"], strict=True):
            assert a["step"] == b["step"]
            for name in a.keys() & {"loss", "val_loss"}:
                assert abs(a[name] - b[name]) <= 1e-3 * abs(a[name]), (a, b)


def test_batch_statistics_are_shared_before_they_are_validated_or_written(tmp_path: Path) -> None:
    found = group.in_group(2, group.batch_statistics, tmp_path / "g", str(tmp_path / "out"))
    for one, other in zip(*(part["buffers"] for part in found), strict=True):
        assert torch.equal(one, other) and bool(one.isfinite().all())
    assert not torch.equal(found[0]["own"], found[1]["own"]), "what each worker saw by itself differs"
    saved = last_state(tmp_path / "out")["model"]
    assert torch.equal(saved["1.running_mean"], found[0]["buffers"][0])


def test_out_of_memory_on_one_worker_halves_on_all_and_changes_nothing(tmp_path: Path) -> None:
    fields = {"batch_size": 8, "micro_batch": 4, "steps": 6}
    small = group.alone(group.ten_steps, str(tmp_path / "small"), {**fields, "micro_batch": 2}, None, torch.float64)
    found = group.in_group(2, group.out_of_memory, tmp_path / "g", str(tmp_path / "oom"), fields, 1, 2, 2)
    assert found[0]["failures"] == [] and found[1]["failures"] == [4], "it ran out once, and the size was kept"
    assert torch.equal(found[0]["weights"], found[1]["weights"])
    assert found[0]["micro_batch"] == found[1]["micro_batch"] == 2
    for a, b in zip(timeless(small["history"]), timeless(found[0]["history"]), strict=True):
        assert a == pytest.approx(b, rel=1e-10)
    again = group.in_group(2, group.out_of_memory, tmp_path / "h", str(tmp_path / "none"), fields, 1, 2, 0)
    for part in again:
        assert part["error"].startswith("SystemicError: a single sample does not fit the device's memory"), part
    assert again[1]["failures"] == [4, 2, 1]
