"""How sure a mean is, and how far volumes agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from medseg.dataset.split import FEW_SUBJECTS
from medseg.evaluate.score import CaseMetrics
from medseg.models.evaluation import Figure

Float64 = NDArray[np.float64]

RESAMPLES = 4000
# What of a run is given with an interval.
INTERVALS = ("dice", "nsd", "hd95_mm")


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
    drawn = drawn_means(values[counted], draws(len(names), resamples, seed)[:, owner])
    tail = ndtr(-np.sqrt(len(names) / (len(names) - 1)) * stdtrit(len(names) - 1, (1 + level) / 2))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Figure(mean=mean, low=float(low), high=float(high))


@lru_cache(maxsize=4)
def draws(subjects: int, resamples: int = RESAMPLES, seed: int = 0) -> Float64:
    """How often each of so many subjects is drawn (draws, subjects), with replacement. Not to be written to."""
    drawn = np.random.default_rng(seed).multinomial(subjects, np.full(subjects, 1 / subjects), size=resamples)
    return drawn.astype(np.float64)


@dataclass(frozen=True)
class Agreement:
    """How far measured volumes lie from the true ones, in their unit: of ``cases`` the mean difference (``bias``,
    measured less true), and the limits between which 95 % of the differences lie if they are normal (Bland & Altman,
    Lancet 1986). ``correlation`` is Lin's concordance (Biometrics 1989), 1 where all are equal, None where all are one
    and the same volume."""

    cases: int
    bias: float
    low: float
    high: float
    correlation: float | None


def agreement(true: Float64, measured: Float64) -> Agreement | None:
    """Of volumes (cases,) in any unit; None for fewer than two cases."""
    if len(true) < 2:
        return None
    steps = measured - true
    bias, spread = float(steps.mean()), float(steps.std(ddof=1))
    apart = true.var() + measured.var() + bias**2
    both = float(2 * ((true - true.mean()) * (measured - measured.mean())).mean() / apart) if apart else None
    return Agreement(len(true), bias, bias - 1.96 * spread, bias + 1.96 * spread, both)


def drawn_means(values: Float64, weights: Float64) -> Float64:
    """`mean_over_labels` (draws,) of ``values`` (cases, labels) in draws whose cases have ``weights`` (draws, cases).
    A label that no drawn case has counts for nothing in that draw."""
    known = ~np.isnan(values)
    counts, sums = weights @ known, weights @ np.where(known, values, 0)
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    there = (counts > 0).sum(axis=1)
    out: Float64 = np.divide(means.sum(axis=1), there, out=np.full(len(weights), np.nan), where=there > 0)
    return out


def intervals(rows: Sequence[CaseMetrics], fields: Sequence[str] = INTERVALS) -> dict[tuple[int | None, str], Figure]:
    """The mean of each of the ``fields`` of each label, and over the labels (None), with its interval over subjects:
    keys (label, field). What stands on nothing is not in it."""
    labels = sorted({row.label for row in rows})
    found = {}
    for field in fields:
        values, subjects = table(rows, field, labels)
        for label, columns in ((None, values), *((n, values[:, [i]]) for i, n in enumerate(labels))):
            figure = bootstrap(columns, subjects)
            if figure:
                found[label, field] = figure
    return found


def table(rows: Sequence[CaseMetrics], field: str, labels: Sequence[int]) -> tuple[Float64, list[str]]:
    """A ``field`` of many rows as (cases, labels), NaN where it is None or there is no row, and whose each case is;
    cases in the order in which they come."""
    place = {case: i for i, case in enumerate(dict.fromkeys(row.case for row in rows))}
    column = {label: i for i, label in enumerate(labels)}
    values, subjects = np.full((len(place), len(labels)), np.nan), [""] * len(place)
    for row in rows:
        subjects[place[row.case]] = row.subject
        if row.label in column:
            values[place[row.case], column[row.label]] = np.nan if (v := getattr(row, field)) is None else v
    return values, subjects
