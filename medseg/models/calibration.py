"""How far a model's probabilities can be believed: measured on cases that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from medseg.plan.plan import Count, Finite, Share, Strict

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StructureCalibration(Strict):
    """One structure on the held-out cases: in how many it was found, its mean Dice there, and the
    predicted Dice below which a result is for review, as none like it was among them."""

    name: str
    number: Annotated[int, Field(ge=1)]
    cases: Annotated[int, Field(ge=0)]
    mean_dice: Share | None
    review_below: Share | None


class Calibration(Strict):
    """What ``calibration.json`` of a package holds.

    Probabilities are those of the logits divided by ``temperature``. The Dice that they lead one to
    expect, times ``slope`` plus ``offset``, is the predicted Dice. ``dice_error`` is its mean absolute
    error on the held-out cases, each predicted by what the others gave (``dice_error_before`` is that
    of the expected Dice without temperature and line, ``dice_error_of_mean`` what saying the other cases'
    mean each time would give); nine of ten errors were below ``interval``,
    which stands where there were enough of them to tell. The expected calibration errors (``ece``) and
    negative log likelihoods (``nll``, per voxel) are of ``voxels`` in and around the structures, each
    half of the cases scaled by the temperature of the other half.

    ``pooled_from`` is the number of folds of which this is a mean (`pooled`), where it was not measured
    on this very model.
    """

    format: Literal[1] = 1
    cases: Count
    voxels: Annotated[int, Field(ge=1)]
    temperature: Positive
    nll_before: NotNegative
    nll_after: NotNegative
    ece_before: Share
    ece_after: Share
    slope: NotNegative
    offset: Finite
    dice_error_before: Share | None
    dice_error: Share
    dice_error_of_mean: Share
    interval: Share | None
    structures: tuple[StructureCalibration, ...]
    pooled_from: Count | None = Field(default=None, exclude_if=lambda value: value is None)

    def predict(self, expected: float) -> float:
        """The predicted Dice, 0 to 1, of an expected one."""
        return float(np.clip(self.slope * expected + self.offset, 0.0, 1.0))

    def structure(self, number: int) -> StructureCalibration | None:
        """What is known of a structure, by its number."""
        return next((s for s in self.structures if s.number == number), None)


def pooled(folds: Sequence[Calibration]) -> Calibration | None:
    """What the calibrations of a model's folds say of the average of their networks, for which no
    unseen case is left: None for none, the calibration itself for one.

    The temperature is their geometric mean and the line of the predicted Dice has their mean slope and
    offset, each fold counting by its cases; so do errors and thresholds. ``interval`` is the widest of
    the folds', if all have one. An average of networks is less sure of itself than each of them, and a
    little better: its probabilities are then rather too low than too high, its predicted Dice too.

    Raises ValueError where the folds know other structures.
    """
    if len(folds) < 2:
        return folds[0] if folds else None
    if len({tuple((s.number, s.name) for s in fold.structures) for fold in folds}) > 1:
        raise ValueError("calibrations of other structures")
    cases, voxels = [fold.cases for fold in folds], [fold.voxels for fold in folds]
    before = [(f.dice_error_before, f.cases) for f in folds if f.dice_error_before is not None]
    intervals = [fold.interval for fold in folds if fold.interval is not None]

    def mean(name: str, weights: Sequence[int]) -> float:
        return float(np.average([getattr(fold, name) for fold in folds], weights=weights))

    return Calibration(
        cases=sum(cases),
        voxels=sum(voxels),
        temperature=float(np.exp(np.average(np.log([fold.temperature for fold in folds]), weights=cases))),
        nll_before=mean("nll_before", voxels),
        nll_after=mean("nll_after", voxels),
        ece_before=mean("ece_before", voxels),
        ece_after=mean("ece_after", voxels),
        slope=mean("slope", cases),
        offset=mean("offset", cases),
        dice_error_before=sum(v * n for v, n in before) / sum(n for _, n in before) if before else None,
        dice_error=mean("dice_error", cases),
        dice_error_of_mean=mean("dice_error_of_mean", cases),
        interval=max(intervals) if len(intervals) == len(folds) else None,
        structures=tuple(_pooled_structure(parts) for parts in zip(*(f.structures for f in folds), strict=True)),
        pooled_from=len(folds),
    )


def _pooled_structure(folds: Sequence[StructureCalibration]) -> StructureCalibration:
    def mean(name: str) -> float | None:
        known = [(getattr(fold, name), fold.cases) for fold in folds if getattr(fold, name) is not None]
        return float(sum(value * n for value, n in known) / sum(n for _, n in known)) if known else None

    return StructureCalibration(
        name=folds[0].name,
        number=folds[0].number,
        cases=sum(fold.cases for fold in folds),
        mean_dice=mean("mean_dice"),
        review_below=mean("review_below"),
    )
