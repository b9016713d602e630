"""What training minimises, by the name that the plan gives it, at every resolution that the network
answers at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medseg.plan.plan import Configuration, Plan

# The class, in targets, of voxels that count for nothing.
IGNORED = -1
# False positives and negatives in Tversky's index, and the focal loss's exponent, as their authors have
# them.
_FALSE_POSITIVE, _FALSE_NEGATIVE = 0.3, 0.7
_FOCUS = 2
# Voxels from a boundary beyond which all are as far. Squares of up to 11 fit a byte.
_REACH = 8


@dataclass(frozen=True)
class Answer:
    """What a network says, beside the truth: of each foreground class or region its ``probability``
    (B, K, ...) float32 and where it is in ``truth`` (bool, likewise); the ``log_likelihood`` of the
    truth (B, ...), or of each region's (B, K, ...); and which voxels are ``counted`` (B, ...), None
    for all. Probability and truth are 0 in the others."""

    probability: Tensor
    truth: Tensor
    log_likelihood: Tensor
    counted: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values (B, ...) or (B, K, ...) over the voxels that count; 0 where none does."""
        if self.counted is None:
            return values.mean()
        counted = self.counted if values.ndim == self.counted.ndim else self.counted.unsqueeze(1).expand_as(values)
        return (values * counted).sum() / counted.sum().clamp_min(1)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each class or region (K,): what is claimed and true, claimed, true. Over the batch as
        one, so that a class that a patch lacks does not swing them."""
        axes = [0, *range(2, self.truth.ndim)]
        return (
            (self.probability * self.truth).sum(axes),
            self.probability.sum(axes),
            self.truth.sum(axes).to(self.probability.dtype),
        )


def of_classes(logits: Tensor, target: Tensor, *, ignoring: bool = False) -> Answer:
    """Logits (B, K, ...), of which one class wins, beside ``target`` (B, ...) of classes 0 to K - 1,
    and `IGNORED` where ``ignoring``."""
    log_probability = F.log_softmax(logits.float(), dim=1)
    numbers = torch.arange(1, logits.shape[1], device=target.device).view(-1, *[1] * (target.ndim - 1))
    truth = target.unsqueeze(1) == numbers
    probability = log_probability[:, 1:].exp()
    # Gathered, not nll_loss, whose sum on a GPU is not the same every time.
    log_likelihood = log_probability.gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1)
    return _counted(Answer(probability, truth, log_likelihood), target, ignoring)


def of_regions(logits: Tensor, target: Tensor, regions: Sequence[Sequence[int]], *, ignoring: bool = False) -> Answer:
    """Logits (B, R, ...), each of a region by itself, beside ``target`` (B, ...) of classes.
    ``regions`` lists the classes of each."""
    logits = logits.float()
    nowhere = torch.zeros_like(target, dtype=torch.bool)
    truth = torch.stack([sum((target == c for c in region), nowhere) for region in regions], dim=1)
    probability, log_likelihood = logits.sigmoid(), F.logsigmoid(torch.where(truth, logits, -logits))
    return _counted(Answer(probability, truth, log_likelihood), target, ignoring)


def _counted(answer: Answer, target: Tensor, ignoring: bool) -> Answer:
    if not ignoring:
        return answer
    counted = target != IGNORED
    return Answer(answer.probability * counted.unsqueeze(1), answer.truth, answer.log_likelihood, counted)


def dice(answer: Answer) -> Tensor:
    """One minus the mean soft Dice of the classes (Milletari et al., 2016), over the batch as one
    (Isensee et al., 2021). Both sums are one larger, so that a class that is neither there nor
    claimed has Dice 1."""
    overlap, claimed, true = answer.sums()
    return 1 - ((2 * overlap + 1) / (claimed + true + 1)).mean()


def cross_entropy(answer: Answer) -> Tensor:
    """Mean cross-entropy of the voxels; of regions, the mean of their binary ones."""
    return -answer.mean(answer.log_likelihood)


def focal(answer: Answer) -> Tensor:
    """Cross-entropy that weighs what is hard (Lin et al., 2017): by (1 - p)^2, p the truth's probability."""
    return -answer.mean((1 - answer.log_likelihood.exp()) ** _FOCUS * answer.log_likelihood)


def tversky(answer: Answer) -> Tensor:
    """One minus the mean of Tversky's index, in which a voxel that is missed weighs more than one
    that is claimed in error (0.7 and 0.3; Salehi et al., 2017)."""
    overlap, claimed, true = answer.sums()
    wrong = _FALSE_POSITIVE * (claimed - overlap) + _FALSE_NEGATIVE * (true - overlap)
    return 1 - ((overlap + 1) / (overlap + wrong + 1)).mean()


def boundary(answer: Answer) -> Tensor:
    """The mean over voxels and classes of probability times signed distance to the true boundary
    (Kervadec et al., 2019), in voxels, as a share of 8, beyond which it no longer grows. A class that
    a patch lacks has no boundary and counts for nothing there."""
    return answer.mean(answer.probability * signed_distance(answer.truth))


def signed_distance(truth: Tensor) -> Tensor:
    """Distance to the nearest voxel of a structure, outside of it, and minus that to the nearest
    voxel outside, less one, within; as a share of 8 voxels and no more than that. 0 where there is no
    boundary. ``truth`` (B, K, ...) bool, float32 back."""
    outside, inside = _distance(truth), _distance(~truth)
    split = truth.flatten(2).any(-1) & ~truth.flatten(2).all(-1)
    signed = torch.where(truth, 1 - inside, outside) / _REACH
    return signed * split.view(*split.shape, *[1] * (truth.ndim - 2))


def _distance(there: Tensor) -> Tensor:
    """Voxels to the nearest that is True, at most `_REACH`: exact, axis by axis, in the lower envelope
    of parabolas (Felzenszwalb and Huttenlocher, 2012), here short enough to be tried one by one."""
    squares = torch.where(there, 0, _REACH**2).to(torch.uint8)
    for axis in range(2, there.ndim):
        before, size = squares.clone(), squares.shape[axis]
        for step in range(1, min(_REACH, size)):
            low, high = (squares.narrow(axis, start, size - step) for start in (0, step))
            torch.minimum(low, before.narrow(axis, step, size - step) + step**2, out=low)
            torch.minimum(high, before.narrow(axis, 0, size - step) + step**2, out=high)
    return squares.float().sqrt()


LOSSES: dict[str, Callable[[Answer], Tensor]] = {
    "dice-cross-entropy": lambda answer: dice(answer) + cross_entropy(answer),
    "dice": dice,
    "cross-entropy": cross_entropy,
    "dice-focal": lambda answer: dice(answer) + focal(answer),
    "tversky": tversky,
    "dice-boundary": lambda answer: dice(answer) + cross_entropy(answer) + boundary(answer),
}


def loss_of(plan: Plan, configuration: Configuration | None = None) -> Callable[[Any, Tensor], Tensor]:
    """The plan's loss: a function of what the configuration's network gives in training (where none is named,
    logits (B, outputs, ...) or a list of them from fine to coarse) and of classes (B, ...). In float32."""
    chosen, ignoring = LOSSES[plan.training.loss], plan.training.ignore_label is not None
    class_of = {number: i for i, number in enumerate(plan.label_set.numbers, start=1)}
    regions = tuple(tuple(class_of[n] for n in region.labels if n in class_of) for region in plan.regions)

    def one(logits: Tensor, target: Tensor) -> Tensor:
        if regions:
            return chosen(of_regions(logits, target, regions, ignoring=ignoring))
        return chosen(of_classes(logits, target, ignoring=ignoring))

    return by_family(configuration, one)


def by_family(
    configuration: Configuration | None, one: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Any, Tensor], Tensor]:
    """The loss ``one`` of logits and classes as a loss of what the configuration's network gives in training:
    of Mask R-CNN, beside that of its things."""
    if configuration is None or not configuration.network.value.counts:
        return lambda outputs, target: supervised(outputs, target, one)
    from medseg.train.detection import detection_loss  # MONAI's detection takes seconds to load

    def both(outputs: Any, target: Tensor) -> Tensor:
        return detection_loss(outputs, target) + one(outputs.semantic, plain(target, outputs.semantic.shape[1]))

    return both


def plain(classes: Tensor, count: int) -> Tensor:
    """Classes without the numbers of things: those of a network that counts are class + ``count`` x number."""
    return torch.where(classes > 0, classes % count, classes)


def dice_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss plus cross-entropy of logits (B, K, ...) and ``target`` (B, ...), none ignored."""
    return LOSSES["dice-cross-entropy"](of_classes(logits, target))


def supervised(
    outputs: Tensor | list[Tensor], target: Tensor, loss: Callable[[Tensor, Tensor], Tensor] = dice_cross_entropy
) -> Tensor:
    """The loss of a list of logits, finest first, each with half the weight of the one before.

    Coarser ones are held against every n-th voxel of ``target`` (B, ...).
    """
    if isinstance(outputs, Tensor):
        return loss(outputs, target)
    weights = [0.5**i for i in range(len(outputs))]
    total = torch.zeros((), device=target.device)
    for weight, logits in zip(weights, outputs, strict=True):
        steps = [n // m for n, m in zip(target.shape[1:], logits.shape[2:], strict=True)]
        coarse = target[(slice(None), *(slice(step // 2, None, step) for step in steps))]
        total = total + weight / sum(weights) * loss(logits, coarse)
    return total
