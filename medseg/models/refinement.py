"""What is done to a model's labels once they are decided: pieces that are no part of a structure go.

Chosen on cases that no network was trained on (`medseg.train.choose`), kept in the package as data.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from medseg.plan.plan import Strict


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


class Refinement(Strict):
    """What ``refinement.json`` of a package holds: at most one rule a structure."""

    format: Literal[1] = 1
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_each(self) -> Refinement:
        if len({rule.number for rule in self.rules}) < len(self.rules):
            raise ValueError("a structure has two rules")
        return self
