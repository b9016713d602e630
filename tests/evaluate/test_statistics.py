from __future__ import annotations

import numpy as np
import pytest

from medseg.evaluate.statistics import bootstrap, mean_over_labels


def test_every_label_counts_the_same_by_hand() -> None:
    """Label 1 in both cases: 0.5. Label 2 in one: 0.8. Label 3 in none."""
    values = np.array([[0.4, 0.8, np.nan], [0.6, np.nan, np.nan]])
    assert mean_over_labels(values) == pytest.approx(0.65)
    assert np.isnan(mean_over_labels(values[:, 2:]))


def test_the_interval_is_that_of_a_mean_of_many() -> None:
    """Of 400 normal values with deviation 0.1 the mean is known to 1.96 x 0.1 / 20."""
    values = np.random.default_rng(0).normal(0.8, 0.1, (400, 1))
    found = bootstrap(values, [str(n) for n in range(400)])
    assert found is not None
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(found.mean - half, abs=0.001)
    assert found.high == pytest.approx(found.mean + half, abs=0.001)
    assert found == bootstrap(values, [str(n) for n in range(400)])


def test_two_cases_of_a_subject_tell_no_more_than_one() -> None:
    values = np.random.default_rng(1).normal(0.8, 0.1, (50, 1))
    subjects = [str(n) for n in range(50)]
    once, twice = (
        bootstrap(values, subjects),
        bootstrap(np.repeat(values, 2, axis=0), [s for s in subjects for _ in "ab"]),
    )
    assert once is not None
    assert twice is not None
    assert twice.mean == pytest.approx(once.mean)
    assert (twice.low, twice.high) == (pytest.approx(once.low), pytest.approx(once.high))


def test_one_subject_has_no_interval_and_nothing_no_mean() -> None:
    one = bootstrap(np.array([[0.5], [0.7]]), ["a", "a"])
    assert one is not None
    assert (one.mean, one.low, one.high) == (pytest.approx(0.6), None, None)
    assert bootstrap(np.full((2, 1), np.nan), ["a", "b"]) is None


def test_fewer_than_five_subjects_have_no_interval() -> None:
    values = np.linspace(0.5, 0.9, 5)[:, None]
    four, five = (bootstrap(values[:n], [str(i) for i in range(n)]) for n in (4, 5))
    assert four is not None
    assert five is not None
    assert (four.low, four.high) == (None, None)
    assert five.low is not None


def test_a_label_that_few_cases_have_does_not_break_a_draw_without_them() -> None:
    values = np.array([[0.5, np.nan]] * 9 + [[0.5, 0.9]])
    found = bootstrap(values, [str(n) for n in range(10)])
    assert found is not None
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.7)


def test_with_few_subjects_too_the_interval_holds_the_truth_nearly_as_often_as_it_says() -> None:
    """Over 4000 draws of eight normal values, 94 of 100; plain percentiles would in 89."""
    rng, subjects = np.random.default_rng(0), [str(n) for n in range(8)]
    drawn = [bootstrap(rng.normal(0, 1, (8, 1)), subjects, resamples=1000) for _ in range(400)]
    held = [
        one is not None and one.low is not None and one.high is not None and one.low <= 0 <= one.high for one in drawn
    ]
    assert 0.915 <= np.mean(held) <= 0.965
