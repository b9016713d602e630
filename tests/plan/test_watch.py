from __future__ import annotations

from dataclasses import replace

import pytest

from medseg.plan.plan import Watching
from medseg.plan.watch import Pace, due, validations


def pace(validation: float, whole: float | None = None, held_out: int = 20, step: float = 0.1) -> Pace:
    whole = validation if whole is None else whole
    return Pace(start=0, step=step, validation=validation, whole=whole, tile=0, held_out=held_out, every=50)


@pytest.mark.parametrize("steps", [1, 49, 50, 51, 499, 500, 550, 950, 999, 1000, 25_000])
@pytest.mark.parametrize("times", [0, 1, 3, 10])
def test_a_run_validates_as_often_as_is_reckoned_and_last_at_its_end(steps: int, times: int) -> None:
    ends = [*range(50, steps, 50), steps]
    at = [step for step in ends if due(step, steps, 50, times)]
    assert len(at) == validations(steps, 50, times) == min(times, len(ends))
    assert not times or at[-1] == steps


@pytest.mark.parametrize(
    ("seconds", "times", "cases"),
    [(0.1, 10, 8), (2.5, 10, 8), (3.2, 7, 8), (20.0, 1, 8), (30.0, 1, 6), (150.0, 1, 1), (201.0, 0, 0)],
)
def test_fewer_times_come_before_fewer_cases_and_none_at_all(seconds: float, times: int, cases: int) -> None:
    """Of 1000 s validation may take 200."""
    found = pace(seconds).watching(1000)
    assert (found.value.times, found.value.cases) == (times, cases)
    assert ("shows its loss only" in found.reason) == (times == 0)


@pytest.mark.parametrize(("seconds", "cases"), [(0.1, 20), (3.0, 17), (10.0, 5), (25.0, 2), (50.0, 2), (51.0, 0)])
def test_calibration_predicts_no_more_cases_than_a_budget_bears(seconds: float, cases: int) -> None:
    """Each is predicted twice, but beyond the sixteenth once: of 1000 s that may take 100, or 200 for two."""
    found = pace(0.001, seconds).watching(1000)
    assert found.value.calibrated == cases
    assert ("too long for calibration" in found.reason) == (cases == 0)
    assert pace(0.001, 100, held_out=1).watching(1000).value.calibrated == 1


@pytest.mark.parametrize("seconds", [0.001, 1.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("step", [0.01, 1.0, 20.0])
def test_a_budget_is_held_and_hours_are_no_less(seconds: float, step: float) -> None:
    one = pace(seconds, 4 * seconds, step=step)
    watching = one.watching(1000).value
    steps = one.steps(1000, watching)
    assert 550 - step <= steps * step
    assert steps * step + one.aside(steps, watching) <= 1000


@pytest.mark.parametrize(("seconds", "cases"), [(0.1, 50), (0.9, 17), (2.0, 7), (100.0, 3)])
def test_without_a_budget_calibration_may_take_half_a_minute_and_three_cases(seconds: float, cases: int) -> None:
    found = pace(0, seconds).usual(100).value
    assert found == Watching(calibrated=cases)
    there = min(cases, 20)
    assert pace(0, seconds).aside(100, found) == pytest.approx(seconds * (min(there, 16) + there) + 0.3)
    assert pace(0, 100, held_out=2).usual(100).value.calibrated == 2
    assert pace(0, 2).usual(10_000).value.calibrated == 50  # a tenth of a longer training: all that there are


@pytest.mark.parametrize(("tile", "tiles"), [(0.0, 6), (0.1, 6), (2.0, 3), (6.0, 1), (600.0, 1)])
def test_engines_are_compared_on_as_many_tiles_as_a_run_bears(tile: float, tiles: int) -> None:
    """Three engines, of 1000 s 20; one tile whatever it takes."""
    one = replace(pace(0.001), tile=tile)
    assert one.watching(1000).value.compared == tiles
    assert one.usual(10_000).value.compared == tiles
    assert one.aside(0, Watching(times=0, calibrated=0, compared=tiles)) == pytest.approx(3 * tiles * tile)
