"""Whether probabilities mean what they say: of the voxels given 80 %, are 80 in 100 right?

Each label is looked at by itself, in the voxels that are given it with a probability of at least `LEAST`: the many
others would drown what there is to see. (To add those that have the label all the same would make the least bin look
wrong by its choice.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.volume import LabelMap, Volume
from medseg.evaluate.score import require_grid

Float64 = NDArray[np.float64]

BINS = 15
LEAST = 0.01
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Reliability:
    """One label over some cases: in each of 15 equal bins of its probability the number of ``voxels``, their mean
    ``probability`` and the share of them that are ``right``, i.e. have the label in the reference; None where there is
    no voxel."""

    label: int
    name: str
    voxels: tuple[int, ...]
    probability: tuple[float | None, ...]
    right: tuple[float | None, ...]

    @property
    def ece(self) -> float | None:
        """Expected calibration error, 0 to 1: how far both lie apart, in the mean over the voxels (Naeini et al.,
        AAAI 2015). None where there is no voxel."""
        pairs = zip(self.voxels, self.probability, self.right, strict=True)
        apart = sum(n * abs(p - r) for n, p, r in pairs if p is not None and r is not None)
        return apart / sum(self.voxels) if sum(self.voxels) else None


def sums(probabilities: Volume, reference: LabelMap, *, case: str, ignored: int | None = None) -> dict[int, Float64]:
    """Of each label of a case (3, 15): voxels, the sum of their probabilities and those that are right, bin by bin.
    They may be added over cases. ``probabilities`` (1 + labels, X, Y, Z) begin with the background's; voxels of the
    label ``ignored`` do not count.

    Raises InputError for another grid and another number of classes.
    """
    require_grid(probabilities.grid, reference.grid, case)
    labels = [label for label in reference.labels if label.number != ignored]
    if len(probabilities.values) != len(labels) + 1:
        fault = f"there are probabilities of {len(probabilities.values)} classes, and {len(labels)} labels"
        raise InputError(fault, "Predict again with --save-probabilities", case=case)
    counts = None if ignored is None else reference.values != ignored
    found = {}
    for label, shares in zip(labels, probabilities.values[1:], strict=True):
        truth = reference.values == label.number
        there = shares >= LEAST
        if counts is not None:
            there &= counts
        p, right = shares[there].astype(np.float64), truth[there]
        bins = np.clip((p * BINS).astype(np.intp), 0, BINS - 1)
        found[label.number] = np.stack([np.bincount(bins, weights, BINS) for weights in (None, p, right)]).astype(float)
    return found


def reliability(cases: Iterable[Mapping[int, Float64]], names: Mapping[int, str]) -> list[Reliability]:
    """Each label over all cases, in order of their numbers."""
    total: dict[int, Float64] = {}
    for case in cases:
        for label, one in case.items():
            total[label] = total.get(label, 0) + one
    found = []
    for label in sorted(total):
        voxels, *shares = total[label]
        probability, right = (
            tuple(None if not n else float(s / n) for s, n in zip(share, voxels, strict=True)) for share in shares
        )
        found.append(Reliability(label, names[label], tuple(int(n) for n in voxels), probability, right))
    return found


def to_json(found: Iterable[Reliability], predicted: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """As a document that JSON can hold, with the Dice that the model had ``predicted`` of each label of each case."""
    return {
        "format": FORMAT_VERSION,
        "least": LEAST,
        "labels": [asdict(one) | {"ece": one.ece} for one in found],
        "predicted_dice": {case: {str(n): dice for n, dice in one.items()} for case, one in predicted.items() if one},
    }


def from_json(document: Any) -> tuple[list[Reliability], dict[tuple[str, int], float]]:
    """What `to_json` wrote: each label, and the predicted Dice by case and label. InputError for anything else."""
    try:
        if document["format"] != FORMAT_VERSION:
            raise ValueError(f"format {document['format']!r}")
        found = [
            Reliability(
                int(one["label"]),
                str(one["name"]),
                tuple(int(n) for n in one["voxels"]),
                tuple(None if p is None else float(p) for p in one["probability"]),
                tuple(None if r is None else float(r) for r in one["right"]),
            )
            for one in document["labels"]
        ]
        cases = document["predicted_dice"].items()
        return found, {(str(case), int(n)): float(dice) for case, one in cases for n, dice in one.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the calibration is not sound ({error!r})", "Score the cases again") from None
