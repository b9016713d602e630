"""What is said of trust, held against answers that are known: voxels drawn with the probabilities
that they are given, logits made too sure by a known factor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.core.labels import Label, LabelSet
from medseg.infer.trust import (
    Found,
    Outcome,
    Sample,
    calibrate,
    calibration_error,
    expected_dice,
    fit_temperature,
    log_likelihoods,
    negative_log_likelihood,
    review,
)
from medseg.models.calibration import Calibration
from medseg.models.experience import Experience, Mismatch, Range, StructureExperience

LABELS = LabelSet((Label("liver", 1), Label("spleen", 4)))


def drawn(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """True classes (n,) drawn with the softmax of logits (classes, n)."""
    shares = np.exp(log_likelihoods(logits)).astype(np.float64)
    return (rng.random(logits.shape[1]) > shares.cumsum(axis=0)).sum(axis=0).clip(0, len(logits) - 1)


def blob_logits(rng: np.random.Generator, n: int = 20_000, classes: int = 3, sure: float = 2.0) -> np.ndarray:
    return rng.normal(0, sure, (classes, n)).astype(np.float32)


# ---- expected Dice ------------------------------------------------------------------------------


def sums(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shares, winner = np.exp(log_likelihoods(logits)).astype(np.float64), logits.argmax(axis=0)
    inside = np.array([shares[k][winner == k].sum() for k in range(len(logits))])
    return shares.sum(axis=1), inside, np.bincount(winner, minlength=len(logits))


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 6), st.integers(2, 5))
def test_expected_dice_is_the_mean_over_truths_drawn_from_the_probabilities(
    seed: int, sure: float, classes: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = blob_logits(rng, 2_000, classes, sure)
    winner = logits.argmax(axis=0)
    truths = [drawn(logits, rng) for _ in range(40)]
    for k, expected in enumerate(expected_dice(*sums(logits))):
        dices = [2 * np.sum((winner == k) & (t == k)) / (np.sum(winner == k) + np.sum(t == k)) for t in truths]
        assert expected == pytest.approx(np.mean(dices), abs=5 * np.std(dices) / np.sqrt(len(dices)) + 2e-3)


def test_expected_dice_by_hand() -> None:
    # Won by the class: 0.8 and 0.6; elsewhere 0.6 of it in all. 2 x 1.4 / (2 + 2.0).
    assert expected_dice([2.0], [1.4], [2])[0] == pytest.approx(0.7)
    assert expected_dice([10.0], [10.0], [10])[0] == 1
    assert np.isnan(expected_dice([0.3, 5], [0, 5], [0, 5])[0])


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 3))
def test_expected_dice_is_a_dice(count: int, mean: float, missed: float) -> None:
    inside = mean * count
    value = expected_dice([inside + missed * count], [inside], [count])[0]
    assert 0 <= value <= 1
    surer = expected_dice([inside + missed * count + 1], [inside + 1], [count])[0] if inside + 1 <= count else 1
    assert surer >= value
    assert expected_dice([inside + missed * count + 1], [inside], [count])[0] <= value


# ---- temperature --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7, 4.0])
def test_a_known_miscalibration_is_undone(temperature: float) -> None:
    rng = np.random.default_rng(1)
    honest = blob_logits(rng, 60_000)
    truth = drawn(honest, rng)
    told = honest * np.float32(temperature)
    found = fit_temperature(told, truth)
    assert found == pytest.approx(temperature, rel=0.03)
    assert calibration_error(told, truth, found) < 0.01
    if temperature != 1:
        assert calibration_error(told, truth) > 0.03
        assert negative_log_likelihood(told, truth, found) < negative_log_likelihood(told, truth)


def test_logarithms_of_probabilities_are_logits_too() -> None:
    rng = np.random.default_rng(2)
    logits = blob_logits(rng, 500)
    truth = drawn(logits, rng)
    assert fit_temperature(log_likelihoods(logits), truth) == pytest.approx(fit_temperature(logits, truth), rel=1e-4)
    assert np.allclose(np.exp(log_likelihoods(logits, 1.3)).sum(axis=0), 1, atol=1e-5)


def test_calibration_error_by_hand() -> None:
    # Two voxels told 0.9, one right; two told 0.6, both right: (2 x |0.9 - 0.5| + 2 x |0.6 - 1|) / 4.
    shares = np.array([[0.9, 0.9, 0.6, 0.6], [0.1, 0.1, 0.4, 0.4]])
    truth = np.array([0, 1, 0, 0])
    assert calibration_error(np.log(shares).astype(np.float32), truth) == pytest.approx(0.4, abs=1e-6)


def test_logits_beyond_all_measure() -> None:
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], dtype=np.float32)
    assert 0.1 <= fit_temperature(logits, np.array([0, 1])) <= 10
    assert 0.1 <= fit_temperature(logits, np.array([1, 0])) <= 10
    assert calibration_error(logits, np.array([0, 1])) == 0


# ---- calibration --------------------------------------------------------------------------------


def learnt(cases: int = 24, *, factor: float = 2.0, bias: float = -0.05, seed: int = 0) -> Calibration:
    """Of a model too sure by a factor, whose Dice lies below the expected one."""
    rng = np.random.default_rng(seed)
    samples, outcomes = [], []
    for _ in range(cases):
        honest = blob_logits(rng, 2_000)
        samples.append(Sample(honest * np.float32(factor), drawn(honest, rng)))
        expected = rng.uniform(0.6, 0.95, 2)
        dice = np.clip(expected + bias + rng.normal(0, 0.01, 2), 0, 1)
        outcomes.append(Outcome(expected + 0.04, expected, dice))
    return calibrate(samples, outcomes, LABELS, factor)


def test_what_is_stored_is_what_was_made() -> None:
    found = learnt()
    assert (found.cases, found.voxels) == (24, 48_000)
    assert found.ece_after < 0.02 < found.ece_before
    assert found.nll_after < found.nll_before
    assert found.slope == pytest.approx(1, abs=0.05)
    assert found.predict(0.8) == pytest.approx(0.75, abs=0.01)
    assert found.dice_error == pytest.approx(0.008, abs=0.004)
    assert found.dice_error_before == pytest.approx(0.09, abs=0.01)
    assert 0.06 < found.dice_error_of_mean < 0.12  # of a uniform spread of 0.35, a quarter
    assert found.interval == pytest.approx(0.0165, abs=0.006)
    assert Calibration.model_validate_json(found.model_dump_json()) == found
    assert learnt() == found


def test_nine_of_ten_new_results_lie_within_the_interval() -> None:
    inside = []
    for seed in range(20):
        found = learnt(16, seed=seed)
        rng = np.random.default_rng([seed, 1])
        expected = rng.uniform(0.6, 0.95, 200)
        dice = expected - 0.05 + rng.normal(0, 0.01, 200)
        assert found.interval is not None
        inside.append(
            np.mean([abs(found.predict(e) - d) <= found.interval for e, d in zip(expected, dice, strict=True)])
        )
    assert np.mean(inside) == pytest.approx(0.9, abs=0.04)


@given(st.lists(st.floats(-0.2, 1.2), min_size=2, max_size=8), st.integers(0, 50))
def test_predicted_dice_grows_with_expected_dice(values: list[float], seed: int) -> None:
    found = learnt(5, seed=seed)
    predicted = [found.predict(v) for v in sorted(values)]
    assert predicted == sorted(predicted)
    assert all(0 <= p <= 1 for p in predicted)


def test_few_cases_promise_little() -> None:
    for cases in (1, 2, 3):
        found = learnt(cases)
        assert found.interval is None
        assert (found.structures[0].review_below is None) == (cases < 3)


def test_cases_all_alike_do_not_tilt_the_line() -> None:
    rng = np.random.default_rng(3)
    sample = learnt_sample(rng)
    outcomes = [Outcome(e, e, e + rng.normal(0, 0.02, 2)) for e in rng.normal(0.9, 0.005, (6, 2))]
    found = calibrate([sample], outcomes, LABELS, 1.0)
    assert 1 <= found.slope < 1.3
    assert abs(found.predict(0.5) - 0.5) < 0.15


def learnt_sample(rng: np.random.Generator) -> Sample:
    logits = blob_logits(rng, 500)
    return Sample(logits, drawn(logits, rng))


def test_structures_that_were_not_found_count_for_nothing() -> None:
    rng = np.random.default_rng(4)
    nan = np.nan
    rows = [(0.9, nan), (0.8, nan), (nan, nan), (0.85, nan)]
    outcomes = [Outcome(np.array(r), np.array(r), np.array(r)) for r in rows]
    found = calibrate([learnt_sample(rng)], outcomes, LABELS, 1.0)
    assert [s.cases for s in found.structures] == [3, 0]
    assert found.structures[1].mean_dice is None
    assert found.structures[1].review_below is None
    with pytest.raises(ValueError, match="no structure was found"):
        calibrate([learnt_sample(rng)], [outcomes[2]], LABELS, 1.0)


# ---- review -------------------------------------------------------------------------------------


def trained(**changes: Any) -> Experience:
    spleen = {
        "name": "spleen",
        "number": 4,
        "cases": 20,
        "cut": 0,
        "mm3": Range(low=95_000, high=640_000),
        "pieces": Range(low=1, high=1),
        **changes,
    }
    any_range = Range(low=1, high=1)
    return Experience(
        cases=20,
        spacing=(any_range,) * 3,
        extent=(any_range,) * 3,
        orientations=("RAS",),
        channels=(),
        structures=(StructureExperience(**spleen),),
    )


def spleen(**changes: Any) -> Found:
    return Found(
        **{"name": "spleen", "number": 4, "volume_ml": 200.0, "cut": False, "pieces": 1, "predicted_dice": 0.9}
        | changes
    )


def test_a_result_like_those_of_training_has_no_flag() -> None:
    assert review([spleen()], (), trained(), learnt()) == ()
    assert review([spleen(volume_ml=95)], (), trained()) == ()
    assert review([spleen(volume_ml=700)], (), trained()) == ()  # beyond, not far
    assert review([spleen()]) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"volume_ml": 2310}, "spleen 2310 ml, trained on 95 to 640"),
        ({"volume_ml": 12.34}, "spleen 12.3 ml, trained on 95 to 640"),
        ({"volume_ml": 0.0, "pieces": 0, "predicted_dice": None}, "spleen was not found; all 20 training cases had it"),
        ({"pieces": 3}, "spleen lies in 3 pieces far apart, in training in one at most"),
        ({"cut": True}, "spleen is cut off by the border of the scan: its volume is at least 200 ml"),
        ({"predicted_dice": 0.3}, "spleen: predicted Dice 0.30, below "),
    ],
)
def test_each_flag(changes: dict[str, Any], words: str) -> None:
    (flag,) = review([spleen(**changes)], (), trained(), learnt())
    assert flag.reason.startswith(words)
    assert flag.review
    assert flag.structure == "spleen"


def test_what_training_knew_is_no_reason_to_look() -> None:
    assert review([spleen(pieces=2)], (), trained(pieces=Range(low=1, high=2))) == ()
    assert review([spleen(volume_ml=0.0, pieces=0)], (), trained(cases=19)) == ()
    (cut,) = review([spleen(cut=True, volume_ml=12)], (), trained(cut=18))
    assert not cut.review
    assert "at least 12 ml" in cut.reason
    assert review([spleen(volume_ml=5)], (), trained(cases=0, mm3=None, pieces=None)) == ()


def test_mismatches_are_flags_of_the_scan() -> None:
    warning, note = Mismatch("spacing", "5 mm", "1 mm", "warning"), Mismatch("axes", "LPS", "RAS", "note")
    first, second = review([], (warning, note))
    assert (first.structure, first.reason, first.review) == (None, "spacing: 5 mm; the model was trained on 1 mm", True)
    assert not second.review
