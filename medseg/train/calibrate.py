"""How far a trained model can be believed, learnt from the cases that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.core.volume import LabelMap, Volume
from medseg.evaluate.overlap import dice
from medseg.evaluate.score import ignoring
from medseg.infer.engine import pick_device
from medseg.infer.predict import Predictor, Segmentation, segment
from medseg.infer.stream import Keep, Tally
from medseg.infer.trust import Outcome, Sample, calibrate, expected_dice, fit_temperature
from medseg.infer.window import Box
from medseg.models.calibration import Calibration
from medseg.models.package import ModelPackage
from medseg.plan.watch import SAMPLED

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Loader = Callable[[str], tuple[Volume, LabelMap]]

# More cases than this teach little more.
_MOST_CASES = 50
_SAMPLED_VOXELS = 8_000
# Logarithms are taken of probabilities no smaller.
_LEAST = 1e-30
# Voxels this near to a structure count, and those whose background is less sure than this.
_NEAR, _SURE = 3, 0.99


def calibration_of(
    package: ModelPackage,
    load: Loader,
    *,
    device: str = "auto",
    most: int = _MOST_CASES,
) -> Calibration | None:
    """Predict the package's held-out cases, and compare what the model says of itself with the truth.

    ``load`` gives a case by its id. Cases are taken evenly from the list, as many as ``most``, however long that
    takes: of a clock the numbers would depend. The temperature, one number, stands on voxels of 16 of them; so these
    are predicted twice. None where there is no held-out case, or none is wanted, and where the model finds nothing in
    any: there is then nothing to learn from.
    """
    cases = evenly(package.held_out, most)
    if not cases:
        return None
    predictor = Predictor(package, f"torch-{pick_device(device).type}")
    samples: list[Sample] = []
    before: dict[str, Float64] = {}
    for case in evenly(cases, SAMPLED):
        sample, before[case] = _sample(predictor, *load(case))
        samples.append(sample)
    if not any(len(s.truth) for s in samples):
        return None
    temperature = fit_temperature(
        np.concatenate([s.logits for s in samples], axis=1), np.concatenate([s.truth for s in samples])
    )
    unknown = np.full(len(package.plan.labels), np.nan)
    outcomes = [_outcome(predictor, *load(case), temperature, before.get(case, unknown)) for case in cases]
    if not any(np.isfinite(o.expected + o.dice).any() for o in outcomes):
        return None
    return calibrate(samples, outcomes, package.plan.label_set, temperature)


def evenly(cases: Sequence[str], most: int) -> tuple[str, ...]:
    """Some of the cases, as many as ``most`` at the most, spread over the list."""
    return tuple(cases[:: -(-len(cases) // most)]) if cases and most else ()


def _sample(predictor: Predictor, volume: Volume, truth: LabelMap) -> tuple[Sample, Float64]:
    """Voxels of a case, and the expected Dice (labels,) as the model tells it by itself."""
    plan = predictor.package.plan
    numbers = np.array([0, *plan.label_set.numbers])
    # What the plan does not know is background to it, and what it ignores is nothing at all.
    known = np.where(np.isin(truth.values, numbers), truth.values, 0)
    counts = truth.values != (plan.training.ignore_label or -1)
    near = ndimage.binary_dilation(known > 0, iterations=_NEAR)
    share = min(1.0, _SAMPLED_VOXELS / max(1, int(np.count_nonzero(near))))
    parts: dict[tuple[int, ...], Sample] = {}

    def keep(box: Box, shares: Float32) -> None:
        wanted = np.flatnonzero(counts[box] & (near[box] | (shares[0] < _SURE)))
        place = tuple(side.start for side in box)
        # Boxes come in any order; each has random numbers of its own.
        chosen = wanted[np.random.default_rng(place).random(len(wanted)) < share]
        logits = np.log(np.maximum(shares.reshape(len(shares), -1)[:, chosen], _LEAST))
        parts[place] = Sample(logits, np.searchsorted(numbers, known[box].ravel()[chosen]))

    tally = _segment(predictor, volume, keep=keep).tally
    ordered = [parts[place] for place in sorted(parts)]
    sample = Sample(np.concatenate([p.logits for p in ordered], axis=1), np.concatenate([p.truth for p in ordered]))
    return sample, _expected(tally)


def _outcome(predictor: Predictor, volume: Volume, truth: LabelMap, temperature: float, before: Float64) -> Outcome:
    made = _segment(predictor, volume, temperature=temperature)
    plan = predictor.package.plan
    scored, truth = ignoring(made.label_map, truth, plan.training.ignore_label)
    found = scored.values
    overlaps = [
        dice(found == number, truth.values == number) if (found == number).any() else np.nan
        for number in plan.label_set.numbers
    ]
    return Outcome(before, _expected(made.tally), np.array(overlaps))


def _segment(
    predictor: Predictor, volume: Volume, *, temperature: float = 1.0, keep: Keep | None = None
) -> Segmentation:
    package = predictor.package
    return segment(
        predictor.engine,
        volume,
        package.plan,
        package.configuration_name,
        previous=predictor.before(volume),
        threads=predictor.threads,
        temperature=temperature,
        keep=keep,
    )


def _expected(tally: Tally) -> Float64:
    return expected_dice(tally.probability, tally.inside, tally.won)[1:]
