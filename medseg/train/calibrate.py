"""How far a trained model can be believed, learnt from the cases that it was not trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.core.resample import resample
from medseg.core.volume import LabelMap, Volume
from medseg.evaluate.overlap import dice
from medseg.infer.predict import Predictor
from medseg.infer.stream import bring_home
from medseg.infer.trust import Outcome, Sample, calibrate, expected_dice, fit_temperature, log_likelihoods
from medseg.infer.window import sliding_window
from medseg.models.calibration import Calibration
from medseg.models.package import ModelPackage
from medseg.preprocess.regrid import preprocess

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Loader = Callable[[str], tuple[Volume, LabelMap]]

# More cases than this teach little more.
_MOST_CASES = 50
_FEWEST_CASES = 3
# The temperature is one number, and stands on so many of them.
_SAMPLED_CASES = 16
_SAMPLED_VOXELS = 8_000
# Voxels this near to a structure count, and those whose background is less sure than this.
_NEAR, _SURE = 3, 0.99


def calibration_of(
    package: ModelPackage, load: Loader, *, device: str = "auto", seconds: float = float("inf")
) -> Calibration | None:
    """Predict the package's held-out cases, and compare what the model says of itself with the truth.

    ``load`` gives a case by its id. Cases are taken evenly from the list, 50 at most, and fewer (but
    three) where ``seconds`` run out. None where there is no held-out case, and where the model finds
    nothing in any: there is then nothing to learn from.
    """
    cases = _evenly(package.held_out, _MOST_CASES)
    if not cases:
        return None
    started = time.perf_counter()
    predictor = Predictor(package, device)
    rng = np.random.default_rng(0)
    samples = []
    for case in _evenly(cases, _SAMPLED_CASES):
        volume, truth = load(case)
        samples.append(_sample(predictor, volume, truth, rng))
        if len(samples) >= _FEWEST_CASES and time.perf_counter() - started > seconds / 3:
            break
    temperature = fit_temperature(
        np.concatenate([s.logits for s in samples], axis=1), np.concatenate([s.truth for s in samples])
    )
    outcomes: list[Outcome] = []
    for case in _halving(cases):
        if len(outcomes) >= _FEWEST_CASES and time.perf_counter() - started > seconds:
            break
        outcomes.append(_outcome(predictor, *load(case), temperature))
    if not any(np.isfinite(o.expected + o.dice).any() for o in outcomes):
        return None
    return calibrate(samples, outcomes, package.plan.label_set, temperature)


def _evenly(cases: Sequence[str], most: int) -> tuple[str, ...]:
    return tuple(cases[:: -(-len(cases) // most)]) if cases else ()


def _halving(cases: Sequence[str]) -> tuple[str, ...]:
    """All cases, in an order whose beginnings are spread over the list."""
    step = 1 << max(0, (len(cases) - 1).bit_length())
    order: list[int] = []
    while step >= 1:
        order += [i for i in range(0, len(cases), step) if i not in order]
        step //= 2
    return tuple(cases[i] for i in order)


def _logits(predictor: Predictor, volume: Volume) -> tuple[Float32, Volume]:
    package = predictor.package
    prepared = preprocess(volume, package.plan, package.configuration)
    classes = len(package.plan.labels) + 1
    return (
        sliding_window(predictor.networks, prepared.values, package.configuration, classes, predictor.device),
        prepared,
    )


def _sample(predictor: Predictor, volume: Volume, truth: LabelMap, rng: np.random.Generator) -> Sample:
    logits, prepared = _logits(predictor, volume)
    numbers = np.array([0, *truth.labels.numbers])
    classes = np.searchsorted(numbers, resample(truth, onto=prepared.grid).values)
    logs = log_likelihoods(logits)
    near = ndimage.binary_dilation(classes > 0, iterations=_NEAR) | (logs[0] < np.log(_SURE))
    inside = np.flatnonzero(near)
    chosen = np.sort(rng.choice(inside, min(len(inside), _SAMPLED_VOXELS), replace=False))
    return Sample(logs.reshape(len(logs), -1)[:, chosen], classes.ravel()[chosen])


def _outcome(predictor: Predictor, volume: Volume, truth: LabelMap, temperature: float) -> Outcome:
    logits, prepared = _logits(predictor, volume)
    found, _ = bring_home(logits, prepared.grid, volume.grid)
    overlaps = [
        dice(found == i, truth.values == number) if (found == i).any() else np.nan
        for i, number in enumerate(truth.labels.numbers, start=1)
    ]
    return Outcome(_expected(logits, 1.0), _expected(logits, temperature), np.array(overlaps))


def _expected(logits: Float32, temperature: float) -> Float64:
    shares = np.exp(log_likelihoods(logits, temperature))
    winner = logits.argmax(axis=0)
    classes = range(len(logits))
    inside = [shares[k][winner == k].sum(dtype=np.float64) for k in classes]
    count = np.bincount(winner.ravel(), minlength=len(logits))
    total = shares.reshape(len(logits), -1).sum(axis=1, dtype=np.float64)
    return expected_dice(total, inside, count)[1:]
