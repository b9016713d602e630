"""How good a model is on cases that it was not trained on, as data: what its card is drawn from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medseg.models.refinement import Crf, Rule
from medseg.plan.plan import Count, Finite, Share, Strict

Number = Annotated[int, Field(ge=0)]


class Figure(Strict):
    """A mean, and the ends of its bootstrap interval over subjects; None where
    these are too few."""

    mean: Finite
    low: Finite | None = None
    high: Finite | None = None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})")


class StructureScore(Strict):
    """One structure out of fold: the cases that count (those empty in both label maps do not), how many
    of them missed it or invented it, Dice with and ``before`` post-processing, and the mean HD95 in mm
    (of a structure missed or invented, the image's diagonal). None where nothing counts."""

    name: str
    number: Annotated[int, Field(ge=1)]
    cases: Number
    missed: Number
    invented: Number
    dice: Figure | None
    before: Figure | None
    hd95_mm: Finite | None


class Compared(Strict):
    """One configuration on the cases that all have in common: mean Dice over the labels before any
    post-processing, and by how much the chosen one is better, case by case (None for itself)."""

    configuration: str
    folds: tuple[Number, ...]
    cases: Count
    dice: Figure
    behind: Figure | None


class Tried(Strict):
    """A rule of post-processing, or a field over all borders after the rules that were kept, tried out of
    fold. ``gain`` is the mean change of Dice over all cases,
    with an interval widened for the number of rules tried (a structure rightly not found has Dice 1
    here); ``better`` and ``worse`` are numbers of cases."""

    rule: Rule | Crf
    gain: Figure
    better: Number
    worse: Number
    kept: bool


class CaseScore(Strict):
    """A case and its mean Dice over the labels."""

    case: str
    dice: Share


class Evaluation(Strict):
    """What ``evaluation.json`` of a package holds. Each case was predicted by the fold's network that
    was not trained on it; ``dice`` is the mean over the labels, with the post-processing that was kept.
    ``leaks`` is the number of subjects with other cases among those that a network was trained on."""

    format: Literal[1] = 1
    task: str
    description: str
    licence: str
    cases: Count
    subjects: Count
    folds: tuple[Number, ...]
    of_folds: Count
    leaks: Number
    dice: Figure
    before: Figure
    structures: tuple[StructureScore, ...]
    worst: tuple[CaseScore, ...]
    compared: tuple[Compared, ...]
    tried: tuple[Tried, ...]
    resamples: Count
    seed: Number

    @property
    def with_crf(self) -> bool:
        """Whether moving borders to edges was tried."""
        return any(isinstance(one.rule, Crf) for one in self.tried)
