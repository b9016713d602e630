"""How far a model's probabilities can be believed: measured on cases that it was not trained on."""

from __future__ import annotations

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
    """

    format: Literal[1] = 1
    cases: Count
    voxels: Count
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

    def predict(self, expected: float) -> float:
        """The predicted Dice, 0 to 1, of an expected one."""
        return float(np.clip(self.slope * expected + self.offset, 0.0, 1.0))

    def structure(self, number: int) -> StructureCalibration | None:
        """What is known of a structure, by its number."""
        return next((s for s in self.structures if s.number == number), None)
