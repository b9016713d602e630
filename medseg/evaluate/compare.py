"""Runs on the same cases, side by side: is one better, of which organs, and how sure is their order?

Means are over cases, as everywhere. Whether they differ is asked of subjects: where one has several cases, the mean of
their differences counts once, and intervals are over draws of subjects. A structure that neither the
reference nor a run has is right, and counts in pairs as an overlap of 1 and a distance of 0 where another run
invents it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.words import count
from medseg.evaluate.score import BOTH_EMPTY, DISTANCES, NOTHING, OVERLAPS, CaseMetrics
from medseg.evaluate.statistics import RESAMPLES, bootstrap, drawn_means, draws, mean_over_labels, table
from medseg.models.evaluation import Figure

Float64 = NDArray[np.float64]

# A reference of the same voxels has the same volume up to the rounding of a float in a file.
_SAME_VOLUME = 1e-6
_CHANGED = 10
# Decimals of a difference: what is smaller is rounding.
_ROUNDING = 9
_TASK = "Compare runs that were scored against the same label maps"


@dataclass(frozen=True)
class Difference:
    """A ``field`` of one label (``label`` None: of the mean over labels) in two runs, the first and the second.

    ``first`` and ``second`` are means over cases (of the labels' means, for the mean over labels), ``change`` is the
    second less the first, with its bootstrap interval over subjects. ``p`` is that of Wilcoxon's
    signed rank test of the subjects' differences (two-sided, those that are zero split between both signs), and
    ``p_holm`` that after Holm's correction for the number of labels. ``effect`` is the matched-pairs
    rank-biserial correlation (Kerby 2014), -1 to 1 and positive where the second is better. ``better``, ``worse`` and
    ``same`` count subjects of the second run. None where there is nothing to tell.
    """

    label: int | None
    name: str
    field: str
    subjects: int
    first: float | None
    second: float | None
    change: Figure | None
    p: float | None
    p_holm: float | None
    effect: float | None
    better: int
    worse: int
    same: int


@dataclass(frozen=True)
class Change:
    """A case and label, and a field of it in two runs."""

    case: str
    label: int
    name: str
    first: float
    second: float


@dataclass(frozen=True)
class Place:
    """A run among others: its ``rank`` by the mean over labels of a field, the ends of the 95 % interval of that rank
    over bootstrap draws of subjects, in which ``share`` of the draws none is before it, and the mean of its ranks case
    by case and label by label (``rank_of_cases``), which asks how often and not by how much."""

    run: str
    mean: float
    rank: float
    low: float
    high: float
    share: float
    rank_of_cases: float


@dataclass(frozen=True)
class Ranking:
    """Runs in order, the best first, and Kendall's tau of that order with those of the bootstrap draws, in the
    mean: 1 where resampling never changes it (as challengeR tells it, Wiesenfarth et al. 2021)."""

    field: str
    subjects: int
    places: tuple[Place, ...]
    tau: float | None


def paired(runs: Mapping[str, Sequence[CaseMetrics]], *, common: bool = False) -> dict[str, list[CaseMetrics]]:
    """The rows of the cases and labels that all runs have, in one order. ``common`` allows a run to have more.

    Raises InputError where runs have other cases or labels than the first, or other references (another volume of a
    structure), where they were scored with other tolerances, where a run has a case twice, and where they have none in
    common.
    """
    known = {run: {(row.case, row.label): row for row in rows} for run, rows in runs.items()}
    for run, rows in runs.items():
        if len(known[run]) != len(rows):
            twice = next(key for key, times in Counter((row.case, row.label) for row in rows).items() if times > 1)
            raise InputError(
                f"{run} has label {twice[1]} twice", "Name one fold, or runs of folds apart", case=twice[0]
            )
    shared = set.intersection(*(set(rows) for rows in known.values()))
    if not shared:
        raise InputError(f"{' and '.join(runs)} have no case in common", _TASK)
    first, *others = known
    for run in others:
        if not common and (more := set(known[first]) ^ set(known[run])):
            has, lacks = (first, run) if next(iter(sorted(more))) in known[first] else (run, first)
            case, label = next(iter(sorted(more)))
            raise InputError(
                f"{has} has label {label} of case {case}, {lacks} does not; {_cases(shared)} in common",
                "Score the same cases of both, or compare those in common with --common",
            )
        for key in sorted(shared):
            ours, theirs = known[first][key], known[run][key]
            if ours.name != theirs.name:
                raise InputError(f"label {ours.label} is {ours.name!r} in {first} and {theirs.name!r} in {run}", _TASK)
            if abs(ours.reference_mm3 - theirs.reference_mm3) > _SAME_VOLUME * max(ours.reference_mm3, 1):
                fault = (
                    f"{ours.name} has {ours.reference_mm3:g} mm3 in the reference of {first}, {theirs.reference_mm3:g}"
                )
                raise InputError(f"{fault} in that of {run}", _TASK, case=ours.case)
            if ours.tolerance_mm != theirs.tolerance_mm:
                fault = f"{ours.name} was scored at {ours.tolerance_mm:g} mm in {first}"
                raise InputError(f"{fault}, at {theirs.tolerance_mm:g} in {run}", "Score with the same --tolerance")
    order = sorted(shared)
    return {run: [rows[key] for key in order] for run, rows in known.items()}


def compare(first: Sequence[CaseMetrics], second: Sequence[CaseMetrics], field: str = "dice") -> list[Difference]:
    """A line for each label, in order of their numbers, and first of all one of the mean over labels: the rows as
    `paired` gives them."""
    from statsmodels.stats.multitest import multipletests

    labels = {row.label: row.name for row in first}
    values = _values([first, second], field, list(labels))
    subjects = _owners(first)
    lines = [_difference(None, "mean", field, values, subjects)]
    lines += [
        _difference(number, name, field, values[:, :, [i]], subjects) for i, (number, name) in enumerate(labels.items())
    ]
    tested = [i for i, line in enumerate(lines) if line.label is not None and line.p is not None]
    if tested:
        _, corrected, _, _ = multipletests([lines[i].p for i in tested], method="holm")
        for i, p in zip(tested, corrected, strict=True):
            lines[i] = replace(lines[i], p_holm=float(p))
    return lines


def changed(
    first: Sequence[CaseMetrics], second: Sequence[CaseMetrics], field: str = "dice", most: int = _CHANGED
) -> list[Change]:
    """The cases and labels that differ most between two runs, the largest difference first."""
    labels = sorted({row.label for row in first})
    values = _values([first, second], field, labels)
    cases, names = list(dict.fromkeys(row.case for row in first)), {row.label: row.name for row in first}
    steps = np.abs(values[1] - values[0])
    order = np.argsort(-np.nan_to_num(steps).ravel(), kind="stable")
    found = []
    for place in order[:most]:
        i, j = np.unravel_index(place, steps.shape)
        if steps[i, j] > 0:
            one, other = (float(v[i, j]) for v in values)
            found.append(Change(cases[i], labels[j], names[labels[j]], one, other))
    return found


def rank(
    runs: Mapping[str, Sequence[CaseMetrics]], field: str = "dice", *, resamples: int = RESAMPLES, seed: int = 0
) -> Ranking:
    """The order of runs (two or more, the rows as `paired` gives them), and how sure it is. Runs with the same mean
    share a rank. Deterministic. InputError where there is nothing to rank."""
    from scipy.stats import kendalltau, rankdata

    rows = list(runs.values())
    labels = list(dict.fromkeys(row.label for row in rows[0]))
    values, owners = _values(rows, field, labels), np.asarray(_owners(rows[0]))
    counted = ~np.isnan(values).all(axis=(0, 2))
    if not counted.any():
        raise InputError(f"no case has a {field}", "Compare by something that was measured")
    values, subjects = values[:, counted], owners[counted]
    sign = -1 if field in OVERLAPS else 1
    means = np.array([mean_over_labels(one) for one in values])
    names, owner = np.unique(subjects, return_inverse=True)
    weights = draws(len(names), resamples, seed)[:, owner]
    drawn = np.stack([drawn_means(one, weights) for one in values], axis=1)
    ranks, ranked = rankdata(sign * means), rankdata(sign * drawn, axis=1)
    cells = values.reshape(len(rows), -1)
    known = np.asarray(~np.isnan(cells).any(axis=0))
    of_cases = rankdata(sign * cells[:, known], axis=0).mean(axis=1)
    orders, times = np.unique(ranked, axis=0, return_counts=True)
    taus = np.array([kendalltau(ranks, one).statistic for one in orders])
    told = np.asarray(np.isfinite(taus))
    low, high = np.quantile(ranked, [0.025, 0.975], axis=0)
    places = [
        Place(
            run,
            float(means[i]),
            float(ranks[i]),
            float(low[i]),
            float(high[i]),
            float((ranked[:, i] == ranked.min(axis=1)).mean()),
            float(of_cases[i]),
        )
        for i, run in enumerate(runs)
    ]
    tau = float(np.average(taus[told], weights=times[told])) if told.any() else None
    return Ranking(field, len(names), tuple(sorted(places, key=lambda one: (one.rank, one.run))), tau)


def _difference(label: int | None, name: str, field: str, values: Float64, subjects: Sequence[str]) -> Difference:
    """The line of labels from their values (2, cases, labels)."""
    from scipy.stats import rankdata, wilcoxon

    change = values[1] - values[0]
    of_cases = _over_labels(change)
    there = ~np.isnan(of_cases)
    owners = np.asarray(subjects)[there]
    names, owner = np.unique(owners, return_inverse=True)
    line = Difference(label, name, field, len(names), None, None, None, None, None, None, 0, 0, 0)
    if not len(names):
        return line
    steps = np.round(np.bincount(owner, of_cases[there]) / np.bincount(owner), _ROUNDING)
    gains = steps if field in OVERLAPS else -steps
    ranks = rankdata(np.abs(gains))
    effect = float(ranks @ np.sign(gains) / ranks.sum()) if gains.any() else 0.0
    return replace(
        line,
        first=mean_over_labels(values[0]),
        second=mean_over_labels(values[1]),
        change=bootstrap(change, list(subjects)),
        p=float(wilcoxon(gains, zero_method="zsplit").pvalue) if gains.any() else 1.0,
        effect=effect,
        better=int((gains > 0).sum()),
        worse=int((gains < 0).sum()),
        same=int((gains == 0).sum()),
    )


def _cases(keys: Iterable[tuple[str, int]]) -> str:
    return count(len({case for case, _ in keys}), "case")


def _owners(rows: Sequence[CaseMetrics]) -> list[str]:
    return list({row.case: row.subject for row in rows}.values())


def _values(runs: Sequence[Sequence[CaseMetrics]], field: str, labels: Sequence[int]) -> Float64:
    """A field of runs as (runs, cases, labels): NaN where no run has a number, and the best one there is for a
    structure that is rightly not found where another run has it."""
    if field not in (*OVERLAPS, *DISTANCES):
        raise InputError(
            f"{field!r} is nothing that runs are compared by", f"There are {', '.join((*OVERLAPS, *DISTANCES))}"
        )
    values = np.stack([table(rows, field, labels)[0] for rows in runs])
    best = 1.0 if field in OVERLAPS else 0.0
    place = {case: i for i, case in enumerate(dict.fromkeys(row.case for row in runs[0]))}
    column = {label: j for j, label in enumerate(labels)}
    known = np.asarray(~np.isnan(values).all(axis=0))
    computed = np.zeros(values.shape, dtype=bool)
    for run, rows in enumerate(runs):
        for row in rows:
            at = place[row.case], column[row.label]
            computed[run, *at] = row.status not in NOTHING
            if row.status == BOTH_EMPTY and known[at]:
                values[run, *at] = best
    if (computed & np.isnan(values) & known).any():
        raise InputError(f"a label has a {field} in one run and none in another", "Score both with the same --tube")
    return values


def _over_labels(values: Float64) -> Float64:
    """The mean (cases,) over labels of (cases, labels); NaN where there is none."""
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0).sum(axis=1), known.sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
