"""Dice and cross-entropy, at every resolution that the network answers at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dice_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean soft Dice loss over the foreground classes, plus mean cross-entropy.

    ``logits`` (B, K, ...), ``target`` (B, ...) classes 0 to K - 1. Dice is taken over the batch as
    one, so that a class which a patch lacks does not swing it (Milletari et al., 2016; Isensee et
    al., 2021). Computed in float32.
    """
    log_probability = F.log_softmax(logits.float(), dim=1)
    cross_entropy = F.nll_loss(log_probability, target)
    axes = [0, *range(2, logits.ndim)]
    probability = log_probability.exp()
    truth = torch.zeros_like(probability).scatter_(1, target.unsqueeze(1), 1.0)
    overlap = (probability * truth).sum(axes)
    size = probability.sum(axes) + truth.sum(axes)
    dice = (2 * overlap + 1) / (size + 1)
    return 1 - dice[1:].mean() + cross_entropy


def supervised(outputs: Tensor | list[Tensor], target: Tensor) -> Tensor:
    """The loss of a list of logits, finest first, each with half the weight of the one before.

    Coarser ones are held against every n-th voxel of ``target`` (B, ...).
    """
    if isinstance(outputs, Tensor):
        return dice_cross_entropy(outputs, target)
    weights = [0.5**i for i in range(len(outputs))]
    total = torch.zeros((), device=target.device)
    for weight, logits in zip(weights, outputs, strict=True):
        steps = [n // m for n, m in zip(target.shape[1:], logits.shape[2:], strict=True)]
        coarse = target[(slice(None), *(slice(step // 2, None, step) for step in steps))]
        total = total + weight / sum(weights) * dice_cross_entropy(logits, coarse)
    return total
