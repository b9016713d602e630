"""How far a result can be trusted: calibrated probabilities, predicted Dice, and what to look at.

Everything is computed from a few sums over the scan, never from an array of (classes x scan).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.core.labels import LabelSet
from medseg.models.calibration import Calibration, StructureCalibration
from medseg.models.experience import Experience, Mismatch, StructureExperience

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_BINS = 15
_COOLEST, _HOTTEST = 0.1, 10.0
# Slopes other than 1 by about this much are believed without being asked for proof.
_SLOPE_SPREAD = 0.5
# So many held-out results are needed for an interval, for a threshold, and for a narrow threshold.
_FOR_INTERVAL, _FOR_THRESHOLD, _FOR_NARROW = 20, 3, 10
_COVERED = 0.9
# A volume is strange where it lies outside the trained range by this factor: held-out cases of the
# same kind go beyond a range of few cases, if not far.
_VOLUME_FACTOR = 1.33
# A structure that the border cut in this share of the training cases is expected to be cut.
_OFTEN = 0.5


# Probabilities


def expected_dice(p_sum: ArrayLike, p_inside: ArrayLike, count: ArrayLike) -> Float64:
    """The Dice (classes,) to expect if each voxel's probabilities are right.

    ``p_sum``, ``p_inside`` and ``count`` (classes,) are, for each class, the sum of its probability
    over all voxels, that over the voxels which it won, and the number of these: 2 E|A & T| over
    |A| + E|T|, A being what the class won and T the truth. The expectation of the quotient is the
    quotient of the expectations up to terms of the order of 1 / count, if voxels err independently.
    NaN where a class won nothing: there is nothing to overlap.
    """
    total, inside, won = (np.asarray(v, dtype=np.float64) for v in (p_sum, p_inside, count))
    out: Float64 = np.divide(2 * inside, won + total, out=np.full(won.shape, np.nan), where=won > 0)
    return out


def log_likelihoods(logits: Float32, temperature: float = 1.0) -> Float32:
    """Logarithms of the softmax of logits (classes, n) divided by the temperature."""
    scaled = (logits - logits.max(axis=0)) / np.float32(temperature)
    out: Float32 = scaled - np.log(np.exp(scaled).sum(axis=0))
    return out


def negative_log_likelihood(logits: Float32, truth: NDArray[np.integer], temperature: float = 1.0) -> float:
    """Per voxel, of the true classes (n,) under logits (classes, n)."""
    logs = log_likelihoods(logits, temperature)
    return float(-np.take_along_axis(logs, truth[None].astype(np.intp), axis=0).mean(dtype=np.float64))


def fit_temperature(logits: Float32, truth: NDArray[np.integer]) -> float:
    """The temperature, 0.1 to 10, under which the truth is likeliest: logits (classes, n), true classes
    (n,). It changes no label (Guo et al., On Calibration of Modern Neural Networks, ICML 2017)."""
    from scipy.optimize import minimize_scalar  # a quarter of a second, and only training needs it

    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits, truth, float(np.exp(log))),
        bounds=(np.log(_COOLEST), np.log(_HOTTEST)),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return float(np.exp(found.x))


def calibration_error(logits: Float32, truth: NDArray[np.integer], temperature: float = 1.0) -> float:
    """Expected calibration error, 0 to 1: how far, in 15 bins of the winner's probability, the share of
    voxels that are right lies from the mean probability, weighted by the voxels in each."""
    confidence = np.exp(log_likelihoods(logits, temperature).max(axis=0)).astype(np.float64)
    right = logits.argmax(axis=0) == truth
    bins = np.clip((confidence * _BINS).astype(np.intp), 0, _BINS - 1)
    difference = np.bincount(bins, weights=confidence - right, minlength=_BINS)
    return float(np.abs(difference).sum() / len(truth))


# Calibration


@dataclass(frozen=True, eq=False)
class Sample:
    """Voxels in and around the structures of one held-out case: logits (classes, n), true classes (n,)."""

    logits: Float32
    truth: NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One held-out case, label by label (labels,): the expected Dice without (NaN where nobody looked)
    and with the temperature, and the Dice that it had. NaN for a label that was not found."""

    before: Float64
    expected: Float64
    dice: Float64


def calibrate(
    samples: Sequence[Sample], outcomes: Sequence[Outcome], labels: LabelSet, temperature: float
) -> Calibration:
    """What held-out cases say of a model whose ``temperature`` was fitted on all samples. Deterministic.

    Raises ValueError where no label was found in any case.
    """
    before, expected, dice = (np.array([getattr(o, f) for o in outcomes]) for f in ("before", "expected", "dice"))
    known = np.isfinite(expected) & np.isfinite(dice)
    looked = known & np.isfinite(before)
    if not known.any():
        raise ValueError("no structure was found in any held-out case")
    slope, offset = _line(expected[known], dice[known])
    predicted = np.clip(slope * expected + offset, 0, 1)
    errors = _errors_left_out(expected, dice, known)
    halves = (samples[0::2], samples[1::2]) if len(samples) > 1 else (samples, samples)
    scored = [_score(mine, _fit(others)) for mine, others in (halves, halves[::-1])]
    shares = np.array([row[0] for row in scored], dtype=np.float64)
    nll_before, nll_after, ece_before, ece_after = (
        float(np.average([row[i] for row in scored], weights=shares)) for i in range(1, 5)
    )
    return Calibration(
        cases=len(outcomes),
        voxels=sum(len(s.truth) for s in samples),
        temperature=temperature,
        nll_before=nll_before,
        nll_after=nll_after,
        ece_before=ece_before,
        ece_after=ece_after,
        slope=slope,
        offset=offset,
        dice_error_before=float(np.abs(before - dice)[looked].mean()) if looked.any() else None,
        dice_error=float(errors.mean()),
        dice_error_of_mean=_error_of_mean(dice, known),
        interval=_interval(errors),
        structures=tuple(
            _structure(label.name, label.number, predicted[known[:, i], i], dice[known[:, i], i])
            for i, label in enumerate(labels)
        ),
    )


def _fit(samples: Sequence[Sample]) -> float:
    return fit_temperature(np.concatenate([s.logits for s in samples], axis=1), _truth(samples))


def _truth(samples: Sequence[Sample]) -> NDArray[np.integer]:
    return np.concatenate([s.truth for s in samples])


def _score(samples: Sequence[Sample], temperature: float) -> tuple[int, float, float, float, float]:
    """Voxels; likelihood and calibration error, each without and with a temperature."""
    logits, truth = np.concatenate([s.logits for s in samples], axis=1), _truth(samples)
    return (
        len(truth),
        negative_log_likelihood(logits, truth),
        negative_log_likelihood(logits, truth, temperature),
        calibration_error(logits, truth),
        calibration_error(logits, truth, temperature),
    )


def _line(expected: Float64, dice: Float64) -> tuple[float, float]:
    """Slope and offset of Dice over expected Dice, by least squares with the slope held near 1 as far
    as the points do not say otherwise, and never below. Held-out cases are often all alike; noise then
    flattens the line, and a poor result would be promised their mean."""
    x, y = expected - expected.mean(), dice - dice.mean()
    noise = float(np.mean((y - x) ** 2))
    prior = noise / _SLOPE_SPREAD**2
    weight = float(x @ x) + prior
    slope = max(1.0, float(x @ y + prior) / weight) if weight > 0 else 1.0
    return slope, float(dice.mean() - slope * expected.mean())


def _errors_left_out(expected: Float64, dice: Float64, known: NDArray[np.bool_]) -> Float64:
    """Absolute errors of predicted Dice (n,), each case predicted by the line of the others."""
    errors: list[Float64] = []
    for case in range(len(dice)):
        others = known.copy()
        others[case] = False
        slope, offset = _line(expected[others], dice[others]) if others.any() else (1.0, 0.0)
        mine = known[case]
        errors.append(np.abs(np.clip(slope * expected[case, mine] + offset, 0, 1) - dice[case, mine]))
    return np.concatenate(errors)


def _error_of_mean(dice: Float64, known: NDArray[np.bool_]) -> float:
    """Mean absolute error of saying, of each case, the other cases' mean Dice for the label (or, where
    no other has it, for all labels)."""
    errors: list[float] = []
    for case, label in np.argwhere(known):
        others = known.copy()
        others[case] = False
        mine = others[:, label]
        if others.any():
            guess = dice[mine, label].mean() if mine.any() else dice[others].mean()
            errors.append(abs(float(guess - dice[case, label])))
    return float(np.mean(errors)) if errors else 0.0


def _interval(errors: Float64) -> float | None:
    """What nine of ten errors lie below, with the correction for their number that makes it hold for
    one more case (split conformal prediction, Lei et al., JASA 2018)."""
    n = len(errors)
    if n < _FOR_INTERVAL:
        return None
    return float(np.sort(errors)[min(n, int(np.ceil((n + 1) * _COVERED))) - 1])


def _structure(name: str, number: int, predicted: Float64, dice: Float64) -> StructureCalibration:
    below = None
    if len(predicted) >= _FOR_THRESHOLD:
        middle = float(np.median(predicted))
        spread = 1.4826 * float(np.median(np.abs(predicted - middle)))
        below = max(0.0, middle - max(4 * spread, 0.05 if len(predicted) >= _FOR_NARROW else 0.1))
    return StructureCalibration(
        name=name,
        number=number,
        cases=len(dice),
        mean_dice=float(dice.mean()) if len(dice) else None,
        review_below=below,
    )


# Review


@dataclass(frozen=True)
class Found:
    """What was found of one structure: its volume, whether the scan's border cuts it, in how many
    far-apart pieces it lies (0 where it is absent), and its predicted Dice, where there is one."""

    name: str
    number: int
    volume_ml: float
    cut: bool
    pieces: int
    predicted_dice: float | None


@dataclass(frozen=True)
class Flag:
    """Something to know of a result, of one structure or (None) of the scan. With ``review`` it is a
    reason for a person to look before the result is used."""

    structure: str | None
    reason: str
    review: bool = True


def review(
    found: Sequence[Found],
    mismatches: Sequence[Mismatch] = (),
    trained: Experience | None = None,
    calibration: Calibration | None = None,
) -> tuple[Flag, ...]:
    """What to look at, the scan first. A model without experience or calibration gives fewer flags."""
    flags = [Flag(None, str(m), m.severity != "note") for m in mismatches]
    for one in found:
        known = trained.structure(one.number) if trained else None
        measured = calibration.structure(one.number) if calibration else None
        flags += _cut(one, known)
        flags += _unlike(one, known, trained.cases if trained else 0)
        below = measured.review_below if measured else None
        if one.predicted_dice is not None and below is not None and one.predicted_dice < below:
            told = f"predicted Dice {one.predicted_dice:.2f}, below {below:.2f}, which held-out cases reach"
            flags.append(Flag(one.name, f"{one.name}: {told}"))
    return tuple(flags)


def _cut(one: Found, known: StructureExperience | None) -> list[Flag]:
    if not one.cut:
        return []
    often = known is not None and known.cut >= _OFTEN * max(1, known.cases)
    reason = f"{one.name} is cut off by the border of the scan: its volume is at least {_ml(one.volume_ml)} ml"
    return [Flag(one.name, reason, review=not often)]


def _unlike(one: Found, known: StructureExperience | None, cases: int) -> list[Flag]:
    """Where a structure is missing, of another size or in more pieces than in training."""
    if known is None or known.mm3 is None or known.pieces is None:
        return []
    if one.volume_ml == 0:
        if known.cases < cases:
            return []
        return [Flag(one.name, f"{one.name} was not found; all {cases} training cases had it")]
    flags = []
    low, high = known.mm3.low / 1000, known.mm3.high / 1000
    small = one.volume_ml < low / _VOLUME_FACTOR and not one.cut  # of a part of it, a small volume is no wonder
    if small or one.volume_ml > high * _VOLUME_FACTOR:
        flags.append(Flag(one.name, f"{one.name} {_ml(one.volume_ml)} ml, trained on {_ml(low)} to {_ml(high)}"))
    if one.pieces > known.pieces.high:
        most = f"{known.pieces.high:.0f}" if known.pieces.high > 1 else "one"
        flags.append(Flag(one.name, f"{one.name} lies in {one.pieces} pieces far apart, in training in {most} at most"))
    return flags


def _ml(volume: float) -> str:
    return f"{volume:.0f}" if volume >= 100 else f"{volume:.3g}"
