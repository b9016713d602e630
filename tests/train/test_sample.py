from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.io.store import StoredCase
from medseg.train.sample import draw_case, draw_place, holders


def case_of(labels: np.ndarray, name: str = "a") -> StoredCase:
    places = {int(n): np.flatnonzero(labels == n) for n in (1, 2, 3)}
    return StoredCase(name, np.zeros((1, *labels.shape), dtype=np.float16), labels, places)


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 5))
def test_each_round_visits_each_case_once(seed: int, cases: int, round_: int) -> None:
    drawn = [draw_case(seed, round_ * cases + i, cases) for i in range(cases)]
    assert sorted(drawn) == list(range(cases))
    assert drawn == [draw_case(seed, round_ * cases + i, cases) for i in range(cases)]


def test_rounds_and_seeds_differ_in_their_order() -> None:
    first = [draw_case(0, i, 20) for i in range(20)]
    assert first != [draw_case(0, 20 + i, 20) for i in range(20)]
    assert first != [draw_case(1, i, 20) for i in range(20)]


sides = st.integers(1, 40)
threes = st.tuples(sides, sides, sides)


@given(threes, threes, st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_patch_stays_inside_or_is_centred(
    shape: tuple[int, int, int], patch: tuple[int, int, int], seed: int, foreground: float
) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(shape) < 0.05).astype(np.uint8)
    place = draw_place(rng, [case_of(labels)], 0, patch, foreground)
    assert place.case == 0
    for centre, size, side in zip(place.centre, shape, patch, strict=True):
        start = centre - (side - 1) / 2
        assert start == int(start)
        if side >= size:
            assert abs(centre - (size - 1) / 2) <= 0.5
        else:
            assert 0 <= start <= size - side


@given(threes, st.integers(0, 2**31))
def test_a_foreground_patch_holds_foreground(shape: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.uint8)
    spot = tuple(rng.integers(0, n) for n in shape)
    labels[spot] = 2
    place = draw_place(rng, [case_of(labels)], 0, (7, 4, 3), 1.0)
    for centre, where, size, side in zip(place.centre, spot, shape, (7, 4, 3), strict=True):
        if side < size:
            assert abs(where - centre) <= side / 2
            if side / 2 < where < size - 1 - side / 2:  # nothing in the way of its being in the middle
                assert abs(where - centre) <= 0.5


def test_a_patch_is_centred_on_a_structure_as_often_as_asked_and_each_structure_as_often() -> None:
    labels = np.zeros((101, 9, 9), dtype=np.uint8)
    labels[10, 4, 4] = 1  # one voxel
    labels[88:93, 2:7, 2:7] = 2  # many
    case = case_of(labels)
    rng = np.random.default_rng(0)
    at = Counter()
    for _ in range(4000):
        x = draw_place(rng, [case], 0, (1, 1, 1), 0.6).centre
        number = int(labels[tuple(int(v) for v in x)])
        at[number] += 1
    # 30 percent each, and the few that fall on them by chance.
    by_chance = 0.4 * np.array([1, 125]) / labels.size
    assert at[1] / 4000 == pytest.approx(0.3 + by_chance[0], abs=0.03)
    assert at[2] / 4000 == pytest.approx(0.3 + by_chance[1], abs=0.03)


def test_without_foreground_places_are_anywhere() -> None:
    case = case_of(np.ones((30, 8, 8), dtype=np.uint8))
    rng = np.random.default_rng(0)
    x = [draw_place(rng, [case], 0, (8, 8, 8), 0.0).centre[0] for _ in range(1500)]
    assert min(x) == 3.5
    assert max(x) == 25.5
    assert np.mean(x) == pytest.approx(14.5, abs=0.6)
    assert len(set(x)) == 23


def test_a_case_without_structures_is_cut_anywhere() -> None:
    empty = case_of(np.zeros((20, 20, 20), dtype=np.uint8))
    place = draw_place(np.random.default_rng(0), [empty], 0, (8, 8, 8), 1.0)
    assert all(3.5 <= c <= 15.5 for c in place.centre)


def test_the_same_generator_draws_the_same_place() -> None:
    case = case_of(np.random.default_rng(0).integers(0, 4, (20, 20, 20)).astype(np.uint8))
    places = [draw_place(np.random.default_rng([3, 0, n]), [case], 0, (8, 8, 8), 0.5) for n in (7, 7, 8)]
    assert places[0] == places[1]
    assert places[0] != places[2]


def with_labels(*numbers: int) -> StoredCase:
    labels = np.zeros((12, 12, 12), dtype=np.uint8)
    for i, number in enumerate(numbers):
        labels[2 * i, 3, 4] = number
    return case_of(labels)


def test_holders_are_the_cases_that_have_a_structure() -> None:
    cases = [with_labels(1), with_labels(), with_labels(1, 3), with_labels(3)]
    assert holders(cases) == {1: (0, 2), 3: (2, 3)}
    assert holders([with_labels()]) == {}


def test_a_structure_in_one_case_of_a_hundred_is_seen() -> None:
    cases = [with_labels(1) for _ in range(100)]
    cases[71] = with_labels(1, 2)
    found = holders(cases)
    rng, seen, visits = np.random.default_rng(0), Counter(), Counter()
    for number in range(4000):
        drawn = draw_case(0, number, 100)
        place = draw_place(rng, cases, drawn, (1, 1, 1), 0.5, of_class=found, class_share=0.5)
        x, y, z = (int(c) for c in place.centre)
        seen[int(cases[place.case].labels[x, y, z])] += 1
        visits[place.case] += place.case == drawn
    # An eighth: half of the patches are of structures, half of those draw it first, one of the two.
    assert seen[2] / 4000 == pytest.approx(1 / 8, abs=0.02)
    assert (seen[1] + seen[2]) / 4000 == pytest.approx(0.5, abs=0.03)
    # And the others are still visited in turn.
    assert min(visits.values()) >= 20


def test_without_a_share_for_classes_the_case_is_the_one_given() -> None:
    cases = [with_labels(1), with_labels(2)]
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert draw_place(rng, cases, 0, (4, 4, 4), 1.0, of_class=holders(cases), class_share=0.0).case == 0
    assert draw_place(rng, [with_labels()], 0, (4, 4, 4), 1.0, of_class={}, class_share=1.0).case == 0
