"""Intensities to numbers near zero, by the rule that the plan names for each channel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.volume import Volume
from medseg.plan.plan import Normalisation

Float32 = NDArray[np.float32]

# With a half percent clipped at either end, no value lies farther from the mean than 1/sqrt(0.005) = 14.
_FARTHEST = 20.0


def normalise(volume: Volume, rules: tuple[Normalisation, ...]) -> Volume:
    """Float32 values, one rule per channel. Raises InputError where their numbers differ."""
    if volume.channels != len(rules):
        raise InputError(
            f"the scan has {volume.channels} channels, the model takes {len(rules)} "
            f"({', '.join(rule.channel for rule in rules)})",
            "Give the channels that the model was trained on, in that order",
        )
    out = np.empty(volume.values.shape, dtype=np.float32)
    for target, values, rule in zip(out, volume.values, rules, strict=True):
        target[...] = _ct(values, rule) if rule.kind == "ct" else _zscore(values)
    return Volume(out, volume.grid)


def _ct(values: NDArray[Any], rule: Normalisation) -> Float32:
    mean, std = np.float32(rule.mean or 0.0), np.float32(rule.std or 1.0)
    scaled: Float32 = (np.clip(values, rule.low, rule.high).astype(np.float32) - mean) / std
    return scaled


def _zscore(values: NDArray[Any]) -> Float32:
    """Mean 0 and standard deviation 1 over the voxels that are not zero.

    Values beyond their 0.5 and 99.5 percentiles are clipped first: in Task04 single voxels reach a
    hundred times the rest. A constant channel becomes zero. Zeros far below everything else end 20
    standard deviations below the mean, where no clipped value lies, so that half precision holds them.
    """
    values = values.astype(np.float32)
    inside = values[values != 0]
    if not inside.size:
        return values
    low, high = np.percentile(inside, (0.5, 99.5))
    inside = np.clip(inside, low, high)
    std = max(float(inside.std()), 1e-6 * max(1.0, abs(float(high))))
    mean = inside.mean(dtype=np.float64)
    least = max(float(min(low, 0.0)), float(mean) - _FARTHEST * std)
    scaled: Float32 = (np.clip(values, least, high) - mean).astype(np.float32) / std
    return scaled
