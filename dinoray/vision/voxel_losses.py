"""Losses of voxels: for classes (cross-entropy, focal, Dice, Tversky, focal + Dice) and for affinities.

Each returns (sum, weight): what is minimised is the sum over all samples of a step, over all workers, divided by the sum of the
weights. So neither micro-batches nor workers change it, and voxels without ground truth count for nothing.

Dice and Tversky are of whole crops. They join such a sum as each crop's own value times its weight of voxels, that is, as a mean
over crops by how much of each is known.

Shapes: B batch, K classes, A affinities, v = Z, Y, X.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Pair = tuple[torch.Tensor, torch.Tensor]
CLASS_LOSSES = ("cross_entropy", "focal", "dice", "tversky", "focal_dice")


def class_loss(kind: str, logits: torch.Tensor, labels: torch.Tensor, known: torch.Tensor, *, weights: torch.Tensor | None = None,
               gamma: float = 2.0, alpha: float = 0.5, beta: float = 0.5) -> Pair:
    """logits [B, K, v], labels [B, v] int64, known [B, v] bool, weights [K] of the classes.

    `gamma` of the focal loss (Lin et al. 2017); `alpha`, `beta` of false positives and false negatives in Tversky's (Salehi et
    al. 2017; 0.5 and 0.5 are Dice). Raises ValueError for another kind.
    """
    if kind not in CLASS_LOSSES:
        raise ValueError(f"no loss is called {kind!r}; there are {', '.join(CLASS_LOSSES)}")
    labels = torch.where(known, labels, 0)
    log_p = F.log_softmax(logits.float(), dim=1)
    weight = known.float() if weights is None else weights.to(log_p)[labels] * known
    if kind in ("cross_entropy", "focal"):
        return _voxels(log_p, labels, weight, gamma if kind == "focal" else 0.0)
    if kind == "focal_dice":
        voxels, total = _voxels(log_p, labels, weight, gamma)
        crops, _ = _overlap(log_p, labels, known, weight, 0.5, 0.5)
        return 0.5 * voxels + 0.5 * crops, total
    return _overlap(log_p, labels, known, weight, *((0.5, 0.5) if kind == "dice" else (alpha, beta)))


def _voxels(log_p: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, gamma: float) -> Pair:
    """Cross-entropy, focused by (1 - p)^gamma."""
    log_p = log_p.gather(1, labels[:, None])[:, 0]
    loss = -log_p
    if gamma:
        # below a gamma of 1 the derivative at 0 is infinite
        loss = loss * (1 - log_p.exp()).clamp(min=1e-6) ** gamma
    return (loss * weight).sum(), weight.sum()


def _overlap(log_p: torch.Tensor, labels: torch.Tensor, known: torch.Tensor, weight: torch.Tensor, alpha: float,
             beta: float) -> Pair:
    """1 - mean over the classes of TP / (TP + alpha FP + beta FN), smoothed by 1 voxel, of each crop."""
    p = log_p.exp() * known[:, None]
    truth = F.one_hot(labels, log_p.shape[1]).movedim(-1, 1).to(p) * known[:, None]
    axes = tuple(range(2, p.ndim))
    both, predicted, true = (p * truth).sum(axes), p.sum(axes), truth.sum(axes)
    score = (both + 0.5) / (both + alpha * (predicted - both) + beta * (true - both) + 0.5)
    total = weight.flatten(1).sum(1)
    return ((1 - score.mean(1)) * total).sum(), total.sum()


def affinity_loss(logits: torch.Tensor, values: torch.Tensor, valid: torch.Tensor, *, weights: torch.Tensor | None = None,
                  positive_weight: float = 1.0, gamma: float = 0.0, smoothing: float = 0.0) -> Pair:
    """Binary cross-entropy of affinities: logits, values, valid [B, A, v]; weights [B, v] or [B, A, v] (boundaries).

    `positive_weight` of pairs that belong together; `gamma` focuses on what is wrong; `smoothing` draws targets to 0.5 by so
    much (0.04: 0.02 and 0.98).
    """
    truth = values.to(torch.float32)
    target = truth * (1 - smoothing) + smoothing / 2
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    if gamma:
        p = torch.sigmoid(logits.float())
        loss = loss * (truth - p).abs().clamp(min=1e-6) ** gamma
    weight = valid.float() * torch.where(truth > 0.5, positive_weight, 1.0)
    if weights is not None:
        weight = weight * (weights[:, None] if weights.ndim == loss.ndim - 1 else weights)
    return (loss * weight).sum(), weight.sum()


def class_weights(counts: torch.Tensor) -> torch.Tensor:
    """Weights [K] of classes from their voxel counts [K]: N / (K n), at most 1 / (classes' smallest share of 1e-4), scaled so
    that they sum to K. A class that never occurs has weight 0: nothing can be learned of it."""
    counts = counts.double()
    share = counts / counts.sum().clamp(min=1)
    inverse = torch.where(counts > 0, 1 / share.clamp(min=1e-4), 0.0)
    return (inverse * (len(counts) / inverse.sum().clamp(min=1e-12))).float()
