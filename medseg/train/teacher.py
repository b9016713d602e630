"""A mean teacher (Tarvainen and Valpola, 2017): what the average of the weights says of an unlabelled patch is
what the network is to say of it with its intensities changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg.infer.engine import torch_precision
from medseg.io.store import StoredCase
from medseg.plan.plan import Plan
from medseg.train.batches import Batches
from medseg.train.loss import loss_of

# The share of a run in which the teacher, who knows little at first, comes to its full weight.
_RAMP = 0.4
# Of a run's seed, that of its unlabelled patches.
_STREAM = 3


@dataclass(frozen=True)
class Lesson:
    """Targets of a batch whose last patches are unlabelled: the ``classes`` (B, ...) of those before them;
    the unlabelled ones as they were before their intensities changed, ``plain`` (U, C, ...); and, once it
    is asked, what the teacher ``says`` of these, probabilities (U, K, ...), with its ``weight``."""

    classes: Tensor
    plain: Tensor
    says: Tensor | None = None
    weight: float = 0.0


class TaughtBatches:
    """Of each step the labelled patches, the same as without a teacher, and as many unlabelled ones behind
    them. ``make`` makes `Batches` of some cases from a seed."""

    def __init__(
        self,
        make: Callable[..., Batches],
        labelled: Sequence[StoredCase],
        unlabelled: Sequence[StoredCase],
        seed: int,
    ) -> None:
        own = int(np.random.default_rng([seed, _STREAM]).integers(2**62))
        share = len(labelled) / (len(labelled) + len(unlabelled))
        self._labelled = make(labelled, seed, room=share)
        self._unlabelled = make([case.unlabelled() for case in unlabelled], own, room=1 - share)
        self.device = self._labelled.device

    def __call__(self, step: int) -> tuple[Tensor, Lesson]:
        """Images (B + U, C, *patch) and their targets."""
        images, classes = self._labelled(step)
        plain, nothing, variations = self._unlabelled.moved(step)
        changed = self._unlabelled.changed(step, plain.clone(), nothing, variations)
        return torch.cat([images, changed]), Lesson(classes, plain)


def answered(plan: Plan, teacher: nn.Module, lesson: Lesson, progress: float) -> Lesson:
    """The lesson with what the teacher says, at a share of the run from 0 to 1."""
    weight = plan.training.consistency
    assert weight is not None  # noqa: S101 - only such plans have lessons
    device = lesson.plain.device
    precision = torch_precision(device)
    half = torch.float16 if precision == "f16" else torch.bfloat16
    with torch.no_grad(), torch.autocast(device.type, half, enabled=precision != "f32"):
        logits = teacher(lesson.plain)
    return replace(lesson, says=_probability(plan, logits), weight=weight.value * ramp(progress))


def ramp(progress: float) -> float:
    """Share of the teacher's weight: exp(-5 (1 - t)^2), as its authors have it, up to 1."""
    return math.exp(-5 * (1 - min(1.0, progress / _RAMP)) ** 2)


def beside(plan: Plan) -> Callable[[Tensor | list[Tensor], Any], Tensor]:
    """The plan's loss of the labelled patches, and of the unlabelled ones the mean squared difference of
    the network's probabilities and the teacher's, at the finest resolution."""
    loss = loss_of(plan)

    def both(outputs: Tensor | list[Tensor], lesson: Lesson) -> Tensor:
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        count = len(lesson.classes)
        assert lesson.says is not None  # noqa: S101 - it was asked
        away = _probability(plan, outputs[0][count:]) - lesson.says
        return loss([one[:count] for one in outputs], lesson.classes) + lesson.weight * away.square().mean()

    return both


def _probability(plan: Plan, logits: Tensor) -> Tensor:
    """Of each class, or of each region by itself; float32."""
    return logits.float().sigmoid() if plan.regions else logits.float().softmax(dim=1)
