"""What is done to a model's labels once they are decided: pieces that are no part of a structure go, and
borders may be moved to the scan's edges.

Chosen on cases that no network was trained on (`medseg.train.choose`), kept in the package as data.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from medseg.plan.plan import Strict

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Rule(Strict):
    """Which pieces of one structure stay: the ``largest`` alone (the first of equals), or all of at least
    ``smallest_mm3``. A piece is what touches by faces, edges or corners."""

    name: str
    number: Annotated[int, Field(ge=1)]
    largest: bool = False
    smallest_mm3: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _one_thing(self) -> Rule:
        if self.largest == (self.smallest_mm3 > 0):
            raise ValueError("a rule keeps the largest piece, or all pieces of at least smallest_mm3")
        return self

    def kept(self, sizes: NDArray[np.int64], voxel_mm3: float) -> NDArray[np.bool_]:
        """Whether each piece of the structure stays (n,), by their sizes (n,) in voxels of ``voxel_mm3``."""
        if not self.largest:
            return np.asarray(sizes * voxel_mm3 >= self.smallest_mm3, dtype=np.bool_)
        stays = np.zeros(len(sizes), dtype=np.bool_)
        if len(sizes):
            stays[np.argmax(sizes)] = True
        return stays

    def __str__(self) -> str:
        return "its largest piece alone" if self.largest else f"no piece below {self.smallest_mm3:g} mm3"


class Crf(Strict):
    """A conditional random field that moves borders to the scan's edges (`medseg.infer.crf`): only within
    ``band_mm`` of where they were, to move one by ``border_mm`` costing 1. Against that stand two kernels, each
    adding its weight times the share of like voxels near: ``appearance`` (Gaussian of ``appearance_mm`` and, in the
    plan's normalised intensities, ``contrast``) and ``smoothness`` (of ``smoothness_mm``)."""

    band_mm: Positive = 4.0
    border_mm: Positive = 1.0
    appearance: Weight = 2.0
    appearance_mm: Positive = 6.0
    contrast: Positive = 0.5
    smoothness: Weight = 2.0
    smoothness_mm: Positive = 1.5
    iterations: Annotated[int, Field(ge=1, le=100)] = 5

    @property
    def name(self) -> str:
        """Which structures: as a rule's."""
        return "all"

    @property
    def number(self) -> int:
        """Of no structure alone."""
        return 0

    def __str__(self) -> str:
        return f"borders moved to edges within {self.band_mm:g} mm (CRF, appearance {self.appearance:g})"


class Refinement(Strict):
    """What ``refinement.json`` of a package holds: at most one rule a structure; and after these a ``crf``, or
    none, of which the file then says nothing."""

    format: Literal[1] = 1
    rules: tuple[Rule, ...] = ()
    # A model's digest is made of this, also that of a model from before there was a field.
    crf: Crf | None = Field(default=None, exclude_if=lambda crf: crf is None)

    @model_validator(mode="after")
    def _one_each(self) -> Refinement:
        if len({rule.number for rule in self.rules}) < len(self.rules):
            raise ValueError("a structure has two rules")
        if not self.rules and self.crf is None:
            raise ValueError("nothing is refined")
        return self

    @property
    def steps(self) -> tuple[Rule | Crf, ...]:
        """All that is done, in its order."""
        return self.rules if self.crf is None else (*self.rules, self.crf)
