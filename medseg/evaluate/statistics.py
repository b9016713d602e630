"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from medseg.dataset.split import FEW_SUBJECTS
from medseg.models.evaluation import Figure

Float64 = NDArray[np.float64]

RESAMPLES = 4000


def mean_over_labels(values: Float64) -> float:
    """The mean of each label's mean over its cases; ``values`` (cases, labels), NaN where a label counts
    for nothing. NaN where nothing counts."""
    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    means = np.where(known, values, 0).sum(axis=0)[counts > 0] / counts[counts > 0]
    return float(means.mean()) if len(means) else float("nan")


def bootstrap(
    values: Float64, subjects: Sequence[str], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Figure | None:
    """`mean_over_labels` of ``values`` (cases, labels), and its percentile interval over draws of whole
    subjects with replacement: the cases of one subject are alike, and tell less than as many subjects.

    ``subjects`` (cases,) says whose each case is. None where nothing counts, and no interval where
    the subjects are fewer than five: means of draws from n values reach from the least to the greatest
    at most, which lie on both sides of the truth in 1 - 2^(1 - n) of all samples from a symmetric
    distribution (87.5 % for four, half for two), however far out the percentiles are.
    Percentiles of few subjects lie too close together; they are taken further out, as Student's t is
    wider than the normal (Hesterberg, "What teachers should know about the bootstrap", Am. Stat. 2015,
    "expanded percentile interval"). Deterministic.
    """
    mean = mean_over_labels(values)
    if np.isnan(mean):
        return None
    counted = ~np.isnan(values).all(axis=1)
    names, owner = np.unique(np.asarray(subjects)[counted], return_inverse=True)
    if len(names) < FEW_SUBJECTS:
        return Figure(mean=mean)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    weights = draws[:, owner].astype(np.float64)
    known = ~np.isnan(values[counted])
    counts = weights @ known
    sums = weights @ np.where(known, values[counted], 0)
    # A label that no drawn case has counts for nothing in that draw.
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    drawn = means.sum(axis=1) / (counts > 0).sum(axis=1)
    tail = ndtr(-np.sqrt(len(names) / (len(names) - 1)) * stdtrit(len(names) - 1, (1 + level) / 2))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Figure(mean=mean, low=float(low), high=float(high))
