"""Two runs and more, side by side: answers known beforehand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from medseg.core.errors import InputError
from medseg.evaluate.compare import changed, compare, paired, rank
from medseg.evaluate.score import DISTANCES, OVERLAPS, CaseMetrics

NAMES = {1: "liver", 2: "spleen"}


def row(case, label, dice, subject=None, status="ok", volume=1000.0):
    values = dict.fromkeys(OVERLAPS, dice) | dict.fromkeys(DISTANCES, None if dice is None else 10 * (1 - dice))
    return CaseMetrics(
        case=case,
        subject=subject or case,
        label=label,
        name=NAMES[label],
        status=status,
        cut="",
        **values,
        tolerance_mm=2.0,
        reference_mm3=volume,
        predicted_mm3=volume,
        volume_error_mm3=0.0,
        volume_error_percent=0.0 if volume else None,
    )


def run(*dices, label=1):
    """A case for each number."""
    return [row(f"case{n:03}", label, dice) for n, dice in enumerate(dices)]


RNG = np.random.default_rng(0)
BASE = RNG.uniform(0.5, 0.8, 30)


def test_better_in_every_case_is_as_sure_as_it_gets():
    overall, liver = compare(run(*BASE), run(*(BASE + 0.1 + RNG.uniform(0, 0.01, 30))))
    assert (liver.subjects, liver.better, liver.worse, liver.same) == (30, 30, 0, 0)
    assert liver.effect == 1
    assert liver.change.mean == pytest.approx(0.105, abs=0.003)
    assert liver.change.low > 0.1
    assert liver.p == pytest.approx(2 / 2**30)  # both extremes of all signs
    assert (overall.name, overall.label, overall.p_holm) == ("mean", None, None)
    back = compare(run(*(BASE + 0.1)), run(*BASE))[1]
    assert (back.effect, back.better, back.worse) == (-1, 0, 30)


def test_smaller_distances_are_better():
    far = compare(run(*BASE), run(*(BASE + 0.1)), "hd95_mm")[1]
    assert far.effect == 1
    assert far.change.mean == pytest.approx(-1)


def test_equal_runs_differ_in_nothing():
    for line in compare(run(*BASE), run(*BASE)):
        assert (line.p, line.effect, line.same, line.change.mean) == (1, 0, 30, 0)
    assert changed(run(*BASE), run(*BASE)) == []


def test_holm_by_hand():
    """Of two labels the smaller p counts twice, the larger once."""
    second = BASE + RNG.normal(0.01, 0.05, 30)
    first_run, second_run = run(*BASE) + run(*BASE, label=2), run(*(BASE + 0.1)) + run(*second, label=2)
    _, liver, spleen = compare(first_run, second_run)
    assert liver.p_holm == pytest.approx(2 * liver.p)
    assert spleen.p_holm == pytest.approx(spleen.p)
    assert spleen.p == pytest.approx(stats.wilcoxon(second - BASE).pvalue)


def test_cases_of_one_subject_count_once():
    first = [row(f"case{n:03}", 1, d, f"s{n // 2}") for n, d in enumerate(BASE)]
    second = [row(f"case{n:03}", 1, d + 0.1 + n / 1000, f"s{n // 2}") for n, d in enumerate(BASE)]
    line = compare(first, second)[1]
    assert (line.subjects, line.better) == (15, 15)
    assert line.p == pytest.approx(2 / 2**15)


def test_what_one_run_invents_and_the_other_does_not_counts():
    rightly = [row("a", 1, None, status="both empty", volume=0.0)]
    invented = [row("a", 1, 0.0, status="invented", volume=0.0)]
    line = compare(invented, rightly)[1]
    assert (line.first, line.second, line.better) == (0, 1, 1)
    assert compare(rightly, rightly)[1].subjects == 0


def test_the_cases_that_changed_most_come_first():
    after = BASE.copy()
    after[3] -= 0.4
    after[7] += 0.2
    found = changed(run(*BASE), run(*after))
    assert [(one.case, one.name) for one in found] == [("case003", "liver"), ("case007", "liver")]
    assert (found[0].first, found[0].second) == (BASE[3], after[3])


def test_runs_must_have_the_same_cases_and_references():
    with pytest.raises(InputError, match=r"A has label 1 of case case002, B does not; 2 cases in common.*--common"):
        paired({"A": run(0.1, 0.2, 0.3), "B": run(0.1, 0.2)})
    ours = paired({"A": run(0.1, 0.2, 0.3), "B": run(0.1, 0.2)}, common=True)
    assert [len(rows) for rows in ours.values()] == [2, 2]
    with pytest.raises(InputError, match=r"case a: liver has 1000 mm3 in the reference of A, 900 in that of B"):
        paired({"A": [row("a", 1, 0.5)], "B": [row("a", 1, 0.5, volume=900.0)]})
    with pytest.raises(InputError, match="no case in common"):
        paired({"A": [row("a", 1, 0.5)], "B": [row("b", 1, 0.5)]}, common=True)
    other = [CaseMetrics(**{**row("a", 1, 0.5).__dict__, "name": "kidney"})]
    with pytest.raises(InputError, match="'liver' in A and 'kidney' in B"):
        paired({"A": [row("a", 1, 0.5)], "B": other})


def test_runs_scored_in_other_ways_are_refused():
    one, other = row("a", 1, 0.5), replace(row("a", 1, 0.5), tolerance_mm=5.0)
    with pytest.raises(InputError, match=r"at 2 mm in A, at 5 in B.*--tolerance"):
        paired({"A": [one], "B": [other]})
    with pytest.raises(InputError, match="case a: A has label 1 twice"):
        paired({"A": [one, one], "B": [one]})
    with pytest.raises(InputError, match="a cldice in one run and none in another"):
        compare([one], [replace(one, cldice=None)], "cldice")


def test_the_mean_is_that_of_the_labels_however_many_cases_each_has():
    first = [*run(*[0.8] * 10), row("case000", 2, 0.9)]
    second = [*run(*[0.83] * 10), row("case000", 2, 0.8)]
    mean = compare(first, second)[0]
    assert (mean.first, mean.second) == (pytest.approx(0.85), pytest.approx(0.815))
    assert mean.change.mean == pytest.approx(-0.035)
    assert mean.better == 9


def test_rounding_is_no_difference():
    first = [row(f"c{n}", 1, 0.5, "s") for n in range(2)]
    second = [row("c0", 1, 0.6, "s"), row("c1", 1, 0.4, "s")]
    line = compare(first, second)[1]
    assert (line.same, line.effect, line.p) == (1, 0, 1)


def test_rows_come_in_one_order():
    ours = paired({"A": run(0.1, 0.2), "B": run(0.3, 0.4)[::-1]})
    assert [r.case for r in ours["B"]] == ["case000", "case001"]
    assert compare(*ours.values())[1].change.mean == pytest.approx(0.2)


def test_an_order_that_nothing_shakes():
    found = rank({"poor": run(*(BASE - 0.2)), "good": run(*BASE), "middling": run(*(BASE - 0.1))})
    assert [(p.run, p.rank, p.low, p.high, p.rank_of_cases) for p in found.places] == [
        ("good", 1, 1, 1, 1),
        ("middling", 2, 2, 2, 2),
        ("poor", 3, 3, 3, 3),
    ]
    assert (found.places[0].share, found.tau) == (1, 1)
    assert [p.run for p in rank({"far": run(*BASE), "near": run(*(BASE + 0.1))}, "hd_mm").places] == ["near", "far"]


def test_an_order_by_chance_is_told_as_one():
    found = rank({name: run(*np.random.default_rng(n).uniform(0, 1, 40)) for n, name in enumerate("abc")})
    assert found.tau < 0.9
    assert sum(p.share for p in found.places) == pytest.approx(1, abs=0.01)
    assert any(p.low < p.high for p in found.places)
    assert found == rank({name: run(*np.random.default_rng(n).uniform(0, 1, 40)) for n, name in enumerate("abc")})


def test_equal_runs_share_a_rank():
    found = rank({"a": run(*BASE), "b": run(*BASE)})
    assert {(p.rank, p.rank_of_cases) for p in found.places} == {(1.5, 1.5)}
    assert found.tau is None


def test_nothing_to_rank_by_is_refused():
    with pytest.raises(InputError, match="'size' is nothing"):
        rank({"a": run(*BASE), "b": run(*BASE)}, "size")
    nothing = [row("a", 1, None, status="both empty", volume=0.0)]
    with pytest.raises(InputError, match="no case has a dice"):
        rank({"a": nothing, "b": nothing})
