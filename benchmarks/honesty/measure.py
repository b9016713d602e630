"""How far a trained model's word about itself can be believed: on its held-out cases, and on copies
of them that were spoilt.

    python benchmarks/honesty/measure.py TASK RUN/3d/fold0/model
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from medseg.core.volume import Volume
from medseg.dataset.task import load_case, load_task
from medseg.evaluate.overlap import dice
from medseg.infer.predict import Predictor
from medseg.models.package import load_package
from medseg.train.calibrate import calibration_of


def noise(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values + rng.normal(0, values.std() * rng.uniform(0.3, 1.2), values.shape)


def blur(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(values, (0, *[rng.uniform(1, 3)] * 3))


def half_empty(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out = values.copy()
    out[:, :, : out.shape[2] // 2] = values.min()
    return out


def main() -> None:
    task, package = load_task(Path(sys.argv[1])), load_package(Path(sys.argv[2]))
    # Learnt from every other held-out case, and tried on the rest.
    learnt_on, tried_on = package.held_out[0::2], package.held_out[1::2]
    half = calibration_of(replace(package, held_out=learnt_on), lambda case: load_case(task, task.case(case)))
    assert half is not None
    print(f"whole calibration: {package.calibration}" if package.calibration else "no calibration in the package")
    print(f"half: temperature {half.temperature:.3f}, line {half.slope:.3f} {half.offset:+.4f}, "
          f"error {half.dice_error_before} -> {half.dice_error:.4f} (of the mean {half.dice_error_of_mean:.4f}), "
          f"interval {half.interval}")  # fmt: skip
    predictor = Predictor(replace(package, calibration=half))
    spoil: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray] | None] = {
        "as they are": None,
        "noise": noise,
        "blur": blur,
        "half empty": half_empty,
    }
    for kind, change in spoil.items():
        rng = np.random.default_rng(0)
        predicted, true, flagged, cases = [], [], 0, 0
        for case in tried_on:
            volume, truth = load_case(task, task.case(case))
            if change is not None:
                volume = Volume(change(volume.values.astype(np.float32), rng), volume.grid)
            made = predictor.predict(volume, force=True)
            cases += 1
            flagged += made.review
            for organ in made.organs:
                if organ.predicted_dice is not None:
                    predicted.append(organ.predicted_dice)
                    true.append(dice(made.label_map.values == organ.number, truth.values == organ.number))
        p, t = np.array(predicted), np.array(true)
        inside = np.mean(np.abs(p - t) <= half.interval) if half.interval else np.nan
        print(f"{kind}: {cases} cases, {flagged} for review, Dice {t.mean():.3f} predicted {p.mean():.3f}, "
              f"mean absolute error {np.abs(p - t).mean():.4f}, within the interval {inside:.2f}, "
              f"correlation {np.corrcoef(p, t)[0, 1]:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
