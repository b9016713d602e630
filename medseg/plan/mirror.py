"""Which axes training patches may be mirrored along: the anatomy says."""

from __future__ import annotations

import itertools
import re
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg.core.labels import LabelSet
from medseg.plan.fingerprint import Fingerprint

Axes = tuple[Literal[0, 1, 2], ...]

# "Always" is in so many of the cases.
_ALWAYS = 0.9
# Two labels lie apart where their centres' median distance is more than this share of their extents.
_APART = 0.05
# A label lies off the middle by more than this share of the field of view.
_OFF = 0.1
_SIDES = (
    r"left|right|lt|rt|l|r|lh|rh",
    r"front|back|anterior|posterior|ventral|dorsal",
    r"upper|lower|superior|inferior|cranial|caudal",
)
_WORDS = (("right", "left"), ("in front of", "behind"), ("above", "below"))


def mirrored(measured: Fingerprint, labels: LabelSet) -> tuple[Axes, str]:
    """The axes (0 x, 1 y, 2 z) to mirror, and why.

    An axis is left out where a label's name tells its ends apart, where one label lies on the same
    side of another in nine cases of ten (mirrored, each would look like the other), and where a label
    lies off the middle of the scan in nine of ten, to the same side and by a tenth of it. What few cases show
    counts as always: not to mirror costs little, to mirror amiss costs most of what can be learnt.
    """
    reasons = []
    axes: list[Literal[0, 1, 2]] = []
    for axis in (0, 1, 2):
        against = _named(labels, axis) or _pair(measured, labels, axis) or _off_middle(measured, labels, axis)
        if against:
            reasons.append(f"not {'xyz'[axis]}: {against}")
        else:
            axes.append(axis)
            reasons.append(f"{'xyz'[axis]}: no label's name, place or place beside another tells its ends apart")
    return tuple(axes), "; ".join(reasons)


def _named(labels: LabelSet, axis: int) -> str | None:
    for label in labels:
        words = re.split(r"[^a-z]+", label.name.lower())
        if any(re.fullmatch(_SIDES[axis], word) for word in words):
            return f"a label is called {label.name!r}"
    return None


def _pair(measured: Fingerprint, labels: LabelSet, axis: int) -> str | None:
    """The pair of labels that lies apart most."""
    found: list[tuple[float, str]] = []
    for one, other in itertools.combinations(labels, 2):
        places = [(c.label_places[one.number], c.label_places[other.number]) for c in measured.cases
                  if one.number in c.label_places and other.number in c.label_places]  # fmt: skip
        if not places:
            continue
        offsets = np.array([a.centre[axis] - b.centre[axis] for a, b in places])
        extents = np.array([(a.extent[axis] + b.extent[axis]) / 2 for a, b in places])
        apart = float(np.median(np.abs(offsets) / np.maximum(extents, 1e-6)))
        share, after = _same_side(offsets)
        if share >= _ALWAYS and apart > _APART:
            found.append((apart, f"{one.name} lies {_WORDS[axis][after]} {'of ' if axis == 0 else ''}{other.name} in "
                                 f"{share:.0%} of {len(places)} cases"))  # fmt: skip
    return max(found)[1] if found else None


def _off_middle(measured: Fingerprint, labels: LabelSet, axis: int) -> str | None:
    for label in labels:
        centres = [c.label_places[label.number].centre[axis] for c in measured.cases if label.number in c.label_places]
        offsets = np.array(centres) - 0.5
        if not offsets.size:
            continue
        shares = [float((offsets > _OFF).mean()), float((offsets < -_OFF).mean())]
        after = int(np.argmax(shares))
        if shares[after] >= _ALWAYS:
            where = ("to the right of", "to the left of") if axis == 0 else _WORDS[axis]
            return f"{label.name} lies {where[after]} the middle in {shares[after]:.0%} of {len(centres)} cases"
    return None


def _same_side(offsets: NDArray[np.float64]) -> tuple[float, int]:
    """The share of cases on the side where most are, and 0 where that is the far end (x, y or z larger), else 1."""
    shares = [float((offsets > 0).mean()), float((offsets < 0).mean())]
    side = int(np.argmax(shares))
    return shares[side], side
