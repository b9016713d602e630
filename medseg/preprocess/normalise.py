"""Intensities to numbers near zero, by the rule that the plan names for each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.volume import Volume
from medseg.plan.plan import Normalisation

Float32 = NDArray[np.float32]

# With a half percent clipped at either end, no value lies farther from the mean than 1/sqrt(0.005) = 14.
_FARTHEST = 20.0
_LEAST_STD = 1e-8
_WHITE = 255.0


@dataclass(frozen=True)
class Scaling:
    """Clip to [low, high], subtract ``mean``, divide by ``std``; one that leaves a channel as it is
    has infinite bounds, mean 0 and std 1."""

    low: float
    high: float
    mean: float
    std: float

    def __call__(self, values: NDArray[Any]) -> Float32:
        """Float32 values of any shape; an array that is float32 already is changed in place."""
        made: Float32 = values if values.dtype == np.float32 else values.astype(np.float32)
        if self == AS_IT_IS:
            return made
        np.clip(made, np.float32(self.low), np.float32(self.high), out=made)
        made -= np.float32(self.mean)
        made /= np.float32(self.std)
        return made


AS_IT_IS = Scaling(-np.inf, np.inf, 0.0, 1.0)


def normalise(volume: Volume, rules: tuple[Normalisation, ...]) -> Volume:
    """Float32 values, one rule per channel. Raises InputError where their numbers differ."""
    scales = scalings(volume, rules)
    values = np.stack([scale(one.astype(np.float32)) for scale, one in zip(scales, volume.values, strict=True)])
    masked = [i for i, rule in enumerate(rules) if rule.kind == "zscore-mask"]
    if masked:
        outside = ~filled(volume)
        for i in masked:
            values[i][outside] = 0  # as it was before
    return Volume(values, volume.grid)


def scalings(volume: Volume, rules: tuple[Normalisation, ...]) -> tuple[Scaling, ...]:
    """What the rules come to for a scan, channel by channel. Raises InputError where their numbers
    differ."""
    if volume.channels != len(rules):
        raise InputError(
            f"the scan has {volume.channels} channels, the model takes {len(rules)} "
            f"({', '.join(rule.channel for rule in rules)})",
            "Give the channels that the model was trained on, in that order",
        )
    mask = filled(volume) if any(rule.kind == "zscore-mask" for rule in rules) else None
    return tuple(_scaling(values, rule, mask) for values, rule in zip(volume.values, rules, strict=True))


def _scaling(values: NDArray[Any], rule: Normalisation, mask: NDArray[np.bool_] | None) -> Scaling:
    if rule.kind == "ct":
        return _ct(rule)
    if rule.kind == "zscore":
        return _zscore(values)
    offset, factor = 0.0, 1.0
    if rule.kind in ("zscore-whole", "zscore-mask"):
        inside = values[mask] if rule.kind == "zscore-mask" else values
        if inside.size:
            offset, factor = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
    elif rule.kind == "unit":
        offset = float(values.min())
        factor = float(values.max()) - offset
    elif rule.kind == "rgb":
        factor = _WHITE
        if values.min() < 0 or values.max() > _WHITE:
            raise InputError(f"{rule.channel} holds values outside 0 to 255", "Give the colours as trained on")
    return Scaling(-np.inf, np.inf, offset, max(factor, _LEAST_STD))


def filled(volume: Volume) -> NDArray[np.bool_]:
    """The voxels (X, Y, Z) that are not zero in some channel, or are enclosed by such."""
    from scipy.ndimage import binary_fill_holes

    mask: NDArray[np.bool_] = binary_fill_holes((volume.values != 0).any(axis=0))
    return mask


def _ct(rule: Normalisation) -> Scaling:
    if rule.low is None or rule.high is None:
        raise ValueError("a rule for CT without its numbers")  # Normalisation sees to it
    return Scaling(rule.low, rule.high, rule.mean or 0.0, rule.std or 1.0)


def _zscore(values: NDArray[Any]) -> Scaling:
    """Mean 0 and standard deviation 1 over the voxels that are not zero.

    Values beyond their 0.5 and 99.5 percentiles are clipped first: in Task04 single voxels reach a
    hundred times the rest. A constant channel becomes zero. Zeros far below everything else end 20
    standard deviations below the mean, where no clipped value lies, so that half precision holds them.
    """
    inside = values[values != 0].astype(np.float32)
    if not inside.size:
        return AS_IT_IS
    low, high = np.percentile(inside, (0.5, 99.5))
    inside = np.clip(inside, low, high)
    std = max(float(inside.std()), 1e-6 * max(1.0, abs(float(high))))
    mean = float(inside.mean(dtype=np.float64))
    least = max(float(min(low, 0.0)), mean - _FARTHEST * std)
    return Scaling(least, float(high), mean, std)
