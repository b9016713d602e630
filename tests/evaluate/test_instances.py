"""Things counted: by hand, beside an obvious version, and beside MONAI's."""

from __future__ import annotations

import csv
import io
import json
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.instances import Instance, InstanceMap, described
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap
from medseg.evaluate.instances import (
    FALSE_POSITIVES,
    Matches,
    counting,
    from_json,
    hits_at,
    match,
    pairs_at,
    rows,
    summarise,
    to_csv,
    to_json,
)

LABELS = LabelSet.from_names(["nodule", "cyst"])
GRID = Grid.from_spacing((20, 4, 1), (1, 1, 2))


def things(*found: tuple[int, int, int, float], grid: Grid = GRID) -> InstanceMap:
    """Instances of (first, last, label, score) along x, numbered from 1."""
    values = np.zeros(grid.shape, dtype=np.int32)
    for number, (first, last, _, _) in enumerate(found, start=1):
        values[first : last + 1, 0, 0] = number
    labels, scores = ({n: one[i] for n, one in enumerate(found, start=1)} for i in (2, 3))
    return described(values, grid, labels, scores)


def known(predicted: list[float], reference: int, overlaps: list[tuple[int, int, float]], case: str = "a") -> Matches:
    """A record of so many instances, of which only scores and overlaps matter."""

    def one(number: int, score: float) -> Instance:
        return Instance(number, 1, score, 1, 0.001, (0.0, 0.0, 0.0))

    ours = tuple(one(n, score) for n, score in enumerate(predicted, start=1))
    return Matches(case, 1, "nodule", ours, tuple(one(n + 1, 1.0) for n in range(reference)), tuple(sorted(overlaps)))


def test_one_case_by_hand() -> None:
    """Nodules of 4 voxels at 0 and 10, of 2 at 16; predicted are 3 of the first's and one beside it, two of the
    second's, and something else where nothing is. A cyst where a nodule is counts for neither."""
    reference = things((0, 3, 1, 1.0), (10, 13, 1, 1.0), (16, 17, 1, 1.0))
    predicted = things((1, 4, 1, 0.9), (10, 11, 1, 0.5), (7, 8, 1, 0.7), (16, 17, 2, 0.8))
    nodules, cysts = match(predicted, reference, LABELS, case="a")
    assert [one.number for one in nodules.predicted] == [1, 3, 2]
    assert nodules.overlaps == ((0, 0, 3 / 5), (2, 1, 2 / 4))
    assert cysts.overlaps == ()
    low, high = (summarise([nodules], ious=[iou])[0] for iou in (0.5, 0.55))
    assert (low.references, low.predictions, low.found, low.cases) == (3, 3, 2, 1)
    assert (low.precision, low.recall, low.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert low.sq == pytest.approx(0.55)
    assert low.pq == pytest.approx(0.55 * 2 / 3)
    # Right, wrong, right: a precision of 1 up to a recall of 1/3 (34 of 101), then of 2/3 up to 2/3 (33).
    assert low.ap == pytest.approx((34 + 33 * 2 / 3) / 101)
    assert low.sensitivities == pytest.approx([1 / 3] * 3 + [2 / 3] * 4)
    assert low.recall_at_one == pytest.approx(2 / 3)
    assert (high.found, high.recall) == (1, pytest.approx(1 / 3))
    table = {(row.predicted, row.reference): row for row in rows([nodules, cysts])}
    assert {key: row.status for key, row in table.items()} == {
        (1, 1): "ok",
        (2, 2): "ok",
        (3, None): "invented",
        (None, 3): "missed",
        (4, None): "invented",
    }
    found = table[1, 1]
    assert (found.iou, found.score, found.predicted_ml, found.reference_ml) == pytest.approx((0.6, 0.9, 0.008, 0.008))
    assert found.x_mm == reference.instances[0].centre_mm[0]


# What a figure is where there is nothing: the table at the top of the module.


@pytest.mark.parametrize(
    ("predicted", "reference", "expected"),
    [
        ([], 1, (None, 0, 0, None, 0, 0, 0)),
        ([0.5], 0, (0, None, 0, None, 0, None, None)),
        ([], 0, (None,) * 7),
    ],
)
def test_nothing(predicted: list[float], reference: int, expected: tuple[float | None, ...]) -> None:
    one, mean = summarise([known(predicted, reference, [])], ious=[0.5])
    for summary in (one, mean):
        found = (summary.precision, summary.recall, summary.f1, summary.sq, summary.pq, summary.ap, summary.froc)
        assert found == expected
        assert (summary.recall_at_one is None) == (expected[6] is None)
    assert summarise([]) == []


def test_an_empty_scan_is_one_more_over_which_false_positives_are_counted() -> None:
    full = known([0.9, 0.8], 1, [(1, 0, 1.0)])
    assert summarise([full])[0].sensitivities == (0, 0, 0, 1, 1, 1, 1)
    assert summarise([full, known([], 0, [], "b")])[0].sensitivities == (0, 0, 1, 1, 1, 1, 1)


def test_equal_scores_come_together() -> None:
    """As of a model that gives none: one cut, whatever the order."""
    for overlaps in ([(0, 0, 0.8)], [(3, 0, 0.8)]):
        one = summarise([known([1.0] * 4, 1, overlaps)], ious=[0.5])[0]
        assert one.ap == pytest.approx(1 / 4)
        assert one.sensitivities == (0, 0, 0, 0, 0, 1, 1)


def test_of_equal_scores_the_one_that_fits_best_goes_first() -> None:
    reference = things((0, 9, 1, 1.0))
    (one, _) = match(things((0, 2, 1, 1.0), (3, 9, 1, 1.0)), reference, LABELS, case="a")
    assert [ours.number for ours in one.predicted] == [2, 1]


def test_pairs_are_as_many_as_can_be_and_hits_are_by_score() -> None:
    """The first would take what the second alone could have had."""
    one = known([0.9, 0.8], 2, [(0, 0, 0.4), (0, 1, 0.3), (1, 0, 0.35)])
    assert pairs_at(one, 0.3) == [(0, 1, 0.3), (1, 0, 0.35)]
    assert hits_at(one, 0.3).tolist() == [True, False]
    assert pairs_at(one, 0.38) == [(0, 0, 0.4)]


def test_what_is_ignored_counts_neither_way() -> None:
    reference = things((0, 3, 1, 1.0), (8, 9, 2, 1.0))
    truth = reference.semantic(LABELS)
    predicted = things((0, 3, 1, 1.0), (8, 9, 1, 0.5), (7, 12, 1, 0.7))
    assert counting(predicted, truth, None) is predicted
    kept = counting(predicted, truth, 2)
    assert [(one.number, one.voxels, one.score) for one in kept.instances] == [(1, 4, 1.0), (3, 4, 0.7)]
    assert [one.label for one in counting(reference, truth, 2).instances] == [1]
    assert isinstance(truth, LabelMap)


def test_refusals() -> None:
    other = things(grid=Grid.from_spacing((20, 4, 1), (2, 1, 2)))
    with pytest.raises(InputError, match=r"case a: .* mm apart"):
        match(things(), other, LABELS, case="a")
    with pytest.raises(InputError, match="case a: instance 1 has the label 7, which is not listed"):
        match(things((0, 1, 7, 1.0)), things(), LABELS, case="a")
    with pytest.raises(InputError, match="case a: label 1 comes twice"):
        summarise([known([], 0, []), known([], 0, [])])


# Beside an obvious version


@st.composite
def scenes(draw: st.DrawFn) -> list[tuple[InstanceMap, InstanceMap]]:
    """A few small cases of few instances, which overlap as they like."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    grid = Grid.from_spacing((5, 4, 3), (1, 2, 1.5))

    def one(ties: bool) -> InstanceMap:
        values = rng.integers(-4, 5, grid.shape).clip(0)
        scores = rng.choice([0.25, 0.5, 1.0], 5) if ties else rng.permutation(5) / 5
        return described(values, grid, {n: 1 + n % 2 for n in range(1, 5)}, dict(enumerate(scores.tolist())))

    ties = draw(st.booleans())
    return [(one(ties), one(False)) for _ in range(draw(st.integers(1, 3)))]


def overlap(ours: InstanceMap, theirs: InstanceMap, a: int, b: int) -> float:
    first, second = ours.values == a, theirs.values == b
    return float((first & second).sum() / (first | second).sum())


def best_pairing(table: np.ndarray, iou: float) -> tuple[int, float]:
    """The most pairs, and of those the largest sum, among all there are."""
    best = (0, 0.0)
    m, n = table.shape
    for size in range(1, min(m, n) + 1):
        for chosen in combinations(range(m), size):
            for others in permutations(range(n), size):
                shares = [table[a, b] for a, b in zip(chosen, others, strict=True)]
                if min(shares) >= iou:
                    best = max(best, (size, sum(shares)))
    return best


@settings(max_examples=25, deadline=None)
@given(scenes(), st.sampled_from([0.05, 0.1, 0.2]))
def test_beside_an_obvious_version(cases: list[tuple[InstanceMap, InstanceMap]], iou: float) -> None:
    records = [one for n, pair in enumerate(cases) for one in match(*pair, LABELS, case=str(n))]
    for label, summary in zip(LABELS.numbers, summarise(records, ious=[iou]), strict=False):
        most, scored, references = [], [], 0
        for ours, theirs in cases:
            mine = [i for i in ours.instances if i.label == label]
            there = [i for i in theirs.instances if i.label == label]
            table = np.array([[overlap(ours, theirs, a.number, b.number) for b in there] for a in mine])
            table = table.reshape(len(mine), len(there))
            most.append(best_pairing(table, iou))
            references += len(there)
            free = set(range(len(there)))
            for i in sorted(range(len(mine)), key=lambda i: (-mine[i].score, -table[i].max(initial=0), i)):
                fits = [(table[i, j], j) for j in free if table[i, j] >= iou]
                if fits:
                    free.remove(max(fits)[1])
                scored.append((mine[i].score, bool(fits)))
        found, total = sum(n for n, _ in most), sum(s for _, s in most)
        assert summary.found == found
        assert summary.references == references
        if found:
            assert summary.sq == pytest.approx(total / found)
            wrong, missed = len(scored) - found, references - found
            assert summary.pq == pytest.approx(total / (found + wrong / 2 + missed / 2))
        if references:
            cuts = sorted({score for score, _ in scored})
            counts = [[sum(hit is h for s, hit in scored if s >= c) for h in (True, False)] for c in cuts]
            reached = [max((r for r, w in counts if w <= fp * len(cases)), default=0) for fp in FALSE_POSITIVES]
            assert summary.sensitivities == pytest.approx([r / references for r in reached])
            precise = [
                max((r / (r + w) for r, w in counts if 100 * r >= percent * references), default=0)
                for percent in range(101)
            ]
            assert summary.ap == pytest.approx(np.mean(precise))


def test_average_precision_is_monais() -> None:
    coco = pytest.importorskip("monai.apps.detection.metrics.coco")
    from monai.apps.detection.metrics.matching import matching_batch

    ious = (0.1, 0.3, 0.5)
    metric = coco.COCOMetric(["nodule"], iou_list=ious, iou_range=(0.1, 0.5, 0.4), max_detection=[100], verbose=False)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        records, theirs = [], []
        for case, references in enumerate((7, 3, 0, 9, 4)):  # 23: no recall is a whole percentage
            table = rng.random((int(rng.integers(4, 12)), references))
            # Masks overlap with few others.
            table *= (rng.random(table.shape) < 0.3) * rng.random(table.shape)
            scores = np.sort(rng.permutation(1000)[: len(table)] / 1000 + case / 10000)[::-1]
            pairs = [(i, j, float(table[i, j])) for i, j in zip(*np.nonzero(table), strict=True)]
            records.append(known(scores.tolist(), references, pairs, str(case)))
            theirs += matching_batch(
                lambda a, b, table=table: table[np.ix_(a, b)],
                list(ious),
                [np.arange(len(table))],
                [np.zeros(len(table))],
                [scores],
                [np.arange(references)],
                [np.zeros(references)],
            )
        results, _ = metric(theirs)
        for iou, summary in zip(ious, summarise(records, ious=ious), strict=False):
            assert summary.ap == pytest.approx(results[f"AP_IoU_{iou:.2f}_MaxDet_100"], abs=1e-6)


# Files


def test_as_text_and_json() -> None:
    records = match(things((0, 3, 1, 0.5)), things((0, 3, 1, 1.0), (8, 9, 2, 1.0)), LABELS, case="a")
    table = list(csv.DictReader(io.StringIO(to_csv(rows(records)))))
    assert [(row["status"], row["name"], row["iou"]) for row in table] == [
        ("ok", "nodule", "1.0"),
        ("missed", "cyst", ""),
    ]
    document = json.loads(json.dumps(to_json(summarise(records), provenance={"task": "T"}), allow_nan=False))
    assert from_json(document) == summarise(records)
    for broken in ({}, [], document | {"format": 9}, document | {"summary": [{}]}):
        with pytest.raises(InputError, match="not sound"):
            from_json(broken)
    assert [(one["name"], one["iou"]) for one in document["summary"]] == [
        (name, iou) for name in ("nodule", "cyst") for iou in (0.1, 0.3, 0.5)
    ] + [("mean", iou) for iou in (0.1, 0.3, 0.5)]
    assert document["summary"][-1]["recall"] == 0.5
