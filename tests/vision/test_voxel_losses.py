"""Losses of voxels: hand-worked values, sums that do not depend on how samples are grouped, masks, weights, gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dinoray.vision.voxel_losses import CLASS_LOSSES, affinity_loss, class_loss, class_weights


def batch(b: int = 4, k: int = 3):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(b, k, 3, 4, 5, generator=generator, dtype=torch.float32, requires_grad=True)
    labels = torch.randint(0, k, (b, 3, 4, 5), generator=generator)
    known = torch.rand(b, 3, 4, 5, generator=generator) > 0.3
    return logits, labels, known


@pytest.mark.parametrize("kind", CLASS_LOSSES)
def test_the_sum_is_the_same_however_samples_are_grouped(kind: str) -> None:
    logits, labels, known = batch()
    weights = torch.tensor([0.5, 1.0, 1.5])
    whole = class_loss(kind, logits, labels, known, weights=weights)
    parts = [class_loss(kind, logits[i:j], labels[i:j], known[i:j], weights=weights) for i, j in ((0, 1), (1, 4))]
    assert float(whole[0]) == pytest.approx(sum(float(p[0]) for p in parts), rel=1e-5)
    assert float(whole[1]) == pytest.approx(sum(float(p[1]) for p in parts), rel=1e-6)


@pytest.mark.parametrize("kind", CLASS_LOSSES)
def test_what_is_not_known_changes_nothing(kind: str) -> None:
    logits, labels, known = batch()
    other = torch.where(known, labels, 2 - labels)
    moved = torch.where(known[:, None], logits, logits + 3)
    assert float(class_loss(kind, logits, labels, known)[0]) == pytest.approx(float(class_loss(kind, moved, other, known)[0]),
                                                                              rel=1e-5)
    grad, = torch.autograd.grad(class_loss(kind, logits, labels, known)[0], logits)
    assert grad.isfinite().all() and not grad[(~known)[:, None].expand_as(grad)].any()
    loss, weight = class_loss(kind, logits, labels, torch.zeros_like(known))
    assert float(weight.detach()) == 0 and float(loss.detach()) == 0


def test_cross_entropy_and_focal_equal_torchs() -> None:
    logits, labels, known = batch()
    weights = torch.tensor([0.2, 1.0, 3.0])
    loss, count = class_loss("cross_entropy", logits, labels, torch.ones_like(known), weights=weights)
    assert float(loss / count) == pytest.approx(float(F.cross_entropy(logits, labels, weight=weights)), rel=1e-5)
    p = torch.softmax(logits, 1).gather(1, labels[:, None])[:, 0]
    loss, count = class_loss("focal", logits, labels, known, gamma=2.0)
    assert float(loss / count) == pytest.approx(float((-(1 - p[known]) ** 2 * p[known].log()).mean()), rel=1e-4)


def test_dice_by_hand() -> None:
    """Two classes, four voxels, certain predictions: class 0 has 1 of 2 (and one false), class 1 the same."""
    labels = torch.tensor([[[[0, 0, 1, 1]]]])
    logits = torch.full((1, 2, 1, 1, 4), -30.0)
    for i, k in enumerate([0, 1, 1, 0]):
        logits[0, k, 0, 0, i] = 30.0
    known = torch.ones_like(labels, dtype=torch.bool)
    loss, weight = class_loss("dice", logits, labels, known)
    assert float(weight) == 4 and float(loss / weight) == pytest.approx(1 - (1 + 0.5) / (1 + 0.5 + 0.5 + 0.5))
    loss, weight = class_loss("tversky", logits, labels, known, alpha=0.2, beta=0.9)
    assert float(loss / weight) == pytest.approx(1 - 1.5 / (1 + 0.2 + 0.9 + 0.5))
    perfect, _ = class_loss("dice", torch.where(F.one_hot(labels, 2).movedim(-1, 1) > 0, 30.0, -30.0), labels, known)
    assert float(perfect) == pytest.approx(0, abs=1e-6)


def test_affinities_weights_smoothing_and_focus() -> None:
    logits = torch.zeros(1, 3, 2, 2, 2, requires_grad=True)
    values = torch.zeros(1, 3, 2, 2, 2, dtype=torch.uint8)
    values[:, 0] = 1
    valid = torch.ones_like(values, dtype=torch.bool)
    valid[:, 2] = False
    loss, weight = affinity_loss(logits, values, valid, positive_weight=3.0)
    assert float(weight) == 8 * 3 + 8 and float(loss / weight) == pytest.approx(math.log(2))
    voxel = torch.ones(1, 2, 2, 2)
    voxel[0, 0] = 5
    assert float(affinity_loss(logits, values, valid, weights=voxel)[1]) == 2 * (4 * 5 + 4)
    sure = torch.where(values > 0, 12.0, -12.0)
    assert float(affinity_loss(sure, values, valid)[0]) < 1e-3 < float(affinity_loss(sure, values, valid, smoothing=0.04)[0])
    focused, plain = (affinity_loss(torch.full_like(sure, 2.0), values, valid, gamma=g)[0] for g in (2.0, 0.0))
    assert float(focused) < float(plain)


def test_weights_of_classes() -> None:
    assert class_weights(torch.tensor([10, 10, 10])).tolist() == pytest.approx([1, 1, 1])
    weights = class_weights(torch.tensor([90, 10, 0]))
    assert weights[2] == 0 and float(weights.sum()) == pytest.approx(3) and weights[1] / weights[0] == pytest.approx(9)


def test_unknown_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="no loss is called"):
        class_loss("x", *batch())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_what_is_certain_and_right_has_a_gradient(gamma: float) -> None:
    """At a gap of 40 between logits the probability is 1 in float32; a root of what is left has no derivative there."""
    logits = torch.tensor([[40.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 1, 2).requires_grad_()
    labels = torch.tensor([0, 1]).view(1, 1, 1, 2)
    loss, weight = class_loss("focal", logits, labels, torch.ones(1, 1, 1, 2, dtype=torch.bool), gamma=gamma)
    (loss / weight).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().max() > 0
    sure = torch.tensor([40.0, -1.0]).view(1, 1, 1, 1, 2).requires_grad_()
    loss, weight = affinity_loss(sure, torch.ones(1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 2, dtype=torch.bool), gamma=gamma)
    (loss / weight).backward()
    assert torch.isfinite(sure.grad).all() and sure.grad.abs().max() > 0
