"""Things that are counted, beside a reference: which were found, which were missed, which were invented.

A predicted instance is right where its overlap (intersection over union, IoU) with a reference instance of the
same label is at least some threshold, one to one. Two rules say which with which, each its metrics' own:

- for precision, recall, F1 and panoptic quality as many pairs as there can be, and of these the ones with the
  largest IoU in sum (so do StarDist, Weigert et al. 2020, and panoptica, Kofler et al. 2023);
- for average precision and FROC, which cut at a score, the surest first, each taking the free reference that
  it overlaps most (so does COCO, Lin et al. 2014).

What a figure is where there is nothing, of all the cases that are looked at together:

==========  ===========  =========  ======  ====  ====  ====  ====  =====
reference   prediction   precision  recall  F1    SQ    PQ    AP    FROC
==========  ===========  =========  ======  ====  ====  ====  ====  =====
some        none         None       0       0     None  0     0     0
none        some         0          None    0     None  0     None  None
none        none         None       None    None  None  None  None  None
==========  ===========  =========  ======  ====  ====  ====  ====  =====

None is "does not apply" and enters no mean. A case in which nothing is and nothing was found still is a scan
among those over which false positives are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from medseg.core.errors import InputError
from medseg.core.instances import Instance, InstanceMap, described
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap
from medseg.evaluate.score import INVENTED, MISSED, OK, require_grid, written

FORMAT_VERSION = 1
# Counted things are small: half of a nodule of few voxels is easily missed.
IOUS = (0.1, 0.3, 0.5)
# False positives a scan at which FROC looks, as LUNA16 does (Setio et al. 2017).
FALSE_POSITIVES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
# Precision is read at so many recalls, as COCO does.
_RECALLS = np.linspace(0, 1, 101)
# Rounding must not decide whether a recall of 7 in 10 is one of 0.7.
_ROUNDING = 1e-9

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Pair = tuple[int, int, float]


@dataclass(frozen=True)
class Matches:
    """One label of one case: what was ``predicted``, the surest first, and what the ``reference`` has; and of
    each two that share a voxel, where they stand in these and their IoU."""

    case: str
    label: int
    name: str
    predicted: tuple[Instance, ...]
    reference: tuple[Instance, ...]
    overlaps: tuple[Pair, ...]


@dataclass(frozen=True)
class InstanceRow:
    """One thing of one case, found ("ok"), "missed" or "invented": its numbers in prediction and reference,
    volumes, the score of the prediction, the IoU of both, and the middle, x, y, z in RAS+ mm, of the reference
    where there is one."""

    case: str
    label: int
    name: str
    status: str
    predicted: int | None
    reference: int | None
    score: float | None
    iou: float | None
    predicted_ml: float | None
    reference_ml: float | None
    x_mm: float
    y_mm: float
    z_mm: float


@dataclass(frozen=True)
class InstanceSummary:
    """One label over all cases at one IoU, or all labels (``label`` None, ``name`` "mean"): each figure the
    mean of the labels', each count their sum.

    ``precision``, ``recall``, ``f1`` and ``found`` are of all instances whatever their score. Panoptic quality
    is ``pq`` = ``sq`` times ``f1`` (its "recognition quality"), ``sq`` being the mean IoU of those found
    (Kirillov et al. 2019, who take an IoU above 0.5). ``ap`` is COCO's average precision. ``sensitivities``
    are the recalls that a cut of the score reaches with at most `FALSE_POSITIVES` a scan, ``froc`` is their
    mean (Setio et al. 2017). Instances of equal score come together or not at all.
    """

    label: int | None
    name: str
    iou: float
    cases: int
    references: int
    predictions: int
    found: int
    precision: float | None
    recall: float | None
    f1: float | None
    sq: float | None
    pq: float | None
    ap: float | None
    froc: float | None
    sensitivities: tuple[float, ...] | None

    @property
    def recall_at_one(self) -> float | None:
        """The recall at one false positive a scan."""
        return None if self.sensitivities is None else self.sensitivities[FALSE_POSITIVES.index(1.0)]


_FIGURES = tuple(name for name, kind in get_type_hints(InstanceSummary).items() if kind == (float | None))


def match(prediction: InstanceMap, reference: InstanceMap, labels: LabelSet, *, case: str) -> list[Matches]:
    """A record for each label, in order of their numbers: all that `summarise` needs to know of a case.

    Raises InputError where the grids differ, and for an instance of a label that ``labels`` does not have.
    """
    require_grid(prediction.grid, reference.grid, case)
    for one in (*prediction.instances, *reference.instances):
        if one.label not in labels.numbers:
            fault = f"instance {one.number} has the label {one.label}, which is not listed"
            raise InputError(fault, f"The labels are {labels or 'none'}", case=case)
    shared = _shared(prediction, reference)
    found = []
    for label in labels:
        ours, theirs = ({i.number: i for i in m.instances if i.label == label.number} for m in (prediction, reference))
        pairs = [(a, b, iou) for (a, b), iou in shared.items() if a in ours and b in theirs]
        best = dict.fromkeys(ours, 0.0)
        for number, _, iou in pairs:
            best[number] = max(iou, best[number])
        # Of equal scores the one that fits best goes first, whatever its number.
        order = sorted(ours, key=lambda number: (-ours[number].score, -best[number], number))
        place, other = ({number: i for i, number in enumerate(numbers)} for numbers in (order, theirs))
        overlaps = tuple(sorted((place[a], other[b], iou) for a, b, iou in pairs))
        found.append(
            Matches(case, label.number, label.name, tuple(ours[n] for n in order), tuple(theirs.values()), overlaps)
        )
    return found


def counting(instances: InstanceMap, reference: LabelMap, ignored: int | None) -> InstanceMap:
    """The instances without the voxels where the reference has the label ``ignored``, and without those that
    are of that label; as they are where it is None."""
    if ignored is None:
        return instances
    known = {one.number: one for one in instances.instances}
    values = instances.values * (reference.values != ignored)
    labels, scores = ({n: getattr(one, what) for n, one in known.items()} for what in ("label", "score"))
    return described(values, instances.grid, labels, scores)


def pairs_at(one: Matches, iou: float) -> list[Pair]:
    """As many of the overlaps of at least ``iou`` as can be, one to one; of several choices the one whose
    IoUs have the largest sum."""
    there = [pair for pair in one.overlaps if pair[2] >= iou]
    if not there:
        return []
    ours, theirs = ({n: i for i, n in enumerate(sorted({pair[side] for pair in there}))} for side in (0, 1))
    at = {(ours[pair[0]], theirs[pair[1]]): pair for pair in there}
    gain = np.zeros((len(ours), len(theirs)))
    for (i, j), pair in at.items():
        gain[i, j] = min(gain.shape) + pair[2]  # one pair more is worth more than all IoUs together
    chosen = zip(*linear_sum_assignment(gain, maximize=True), strict=True)
    return sorted(at[int(i), int(j)] for i, j in chosen if gain[i, j] > 0)


def hits_at(one: Matches, iou: float) -> Bool:
    """Whether each predicted instance (n,), the surest first, finds a reference that none before it found."""
    by: dict[int, list[tuple[float, int]]] = {}
    for mine, other, overlap in one.overlaps:
        if overlap >= iou:
            by.setdefault(mine, []).append((overlap, other))
    hit, taken = np.zeros(len(one.predicted), dtype=np.bool_), set()
    for mine in sorted(by):
        free = [pair for pair in by[mine] if pair[1] not in taken]
        if free:
            taken.add(max(free)[1])
            hit[mine] = True
    return hit


def summarise(matches: Iterable[Matches], *, ious: Sequence[float] = IOUS) -> list[InstanceSummary]:
    """A summary of each label at each IoU, and last those over all labels. No records give none.

    Raises InputError where a label of a case comes twice.
    """
    groups: dict[tuple[int, str], dict[str, Matches]] = {}
    for one in matches:
        group = groups.setdefault((one.label, one.name), {})
        if one.case in group:
            raise InputError(f"label {one.label} comes twice", "Match each case once", case=one.case)
        group[one.case] = one
    labels = [[_summarise_label(list(groups[key].values()), iou) for iou in ious] for key in sorted(groups)]
    return [one for label in labels for one in label] + [_mean_of(list(at)) for at in zip(*labels, strict=True)]


def rows(matches: Iterable[Matches], *, iou: float = IOUS[0]) -> list[InstanceRow]:
    """A row for every thing in prediction or reference, paired where they overlap by at least ``iou``."""
    found = []
    for one in matches:
        pairs = {mine: (one.reference[other], share) for mine, other, share in pairs_at(one, iou)}
        for i, ours in enumerate(one.predicted):
            theirs, share = pairs.get(i, (None, None))
            found.append(_row(one, theirs or ours, ours, theirs, share))
        seen = {theirs.number for theirs, _ in pairs.values()}
        found += [_row(one, theirs, None, theirs) for theirs in one.reference if theirs.number not in seen]
    return found


def to_csv(things: Iterable[InstanceRow]) -> str:
    """The rows as comma-separated text under a line of column names; None is an empty cell."""
    return written(InstanceRow, things)


def to_json(summaries: Sequence[InstanceSummary], *, provenance: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The summaries as a document that JSON can hold, without NaN."""
    return {
        "format": FORMAT_VERSION,
        "provenance": dict(provenance) if provenance is not None else None,
        "false_positives": list(FALSE_POSITIVES),
        "summary": [asdict(one) for one in summaries],
    }


def from_json(document: Any) -> list[InstanceSummary]:
    """The summaries of a document that `to_json` wrote. InputError for anything else."""
    try:
        if document["format"] != FORMAT_VERSION:
            raise ValueError(f"format {document['format']!r}")
        curves = [row["sensitivities"] for row in document["summary"]]
        return [
            InstanceSummary(**row | {"sensitivities": None if curve is None else tuple(map(float, curve))})
            for row, curve in zip(document["summary"], curves, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the scores of instances are not sound ({error!r})", "Score the cases again") from None


def _shared(prediction: InstanceMap, reference: InstanceMap) -> dict[tuple[int, int], float]:
    """The IoU of each two numbers, the prediction's first, that share a voxel."""
    both = (prediction.values > 0) & (reference.values > 0)
    step = int(reference.values.max(initial=0)) + 1
    keys, counts = np.unique(
        prediction.values[both].astype(np.int64) * step + reference.values[both], return_counts=True
    )
    ours, theirs = ({one.number: one.voxels for one in m.instances} for m in (prediction, reference))
    return {
        (a, b): n / (ours[a] + theirs[b] - n)
        for a, b, n in zip((keys // step).tolist(), (keys % step).tolist(), counts.tolist(), strict=True)
    }


def _row(
    one: Matches, shown: Instance, ours: Instance | None, theirs: Instance | None, iou: float | None = None
) -> InstanceRow:
    x, y, z = shown.centre_mm
    return InstanceRow(
        case=one.case,
        label=one.label,
        name=one.name,
        status=OK if ours and theirs else INVENTED if ours else MISSED,
        predicted=ours.number if ours else None,
        reference=theirs.number if theirs else None,
        score=ours.score if ours else None,
        iou=iou,
        predicted_ml=ours.volume_ml if ours else None,
        reference_ml=theirs.volume_ml if theirs else None,
        x_mm=x,
        y_mm=y,
        z_mm=z,
    )


def _summarise_label(cases: list[Matches], iou: float) -> InstanceSummary:
    references, predictions = sum(len(one.reference) for one in cases), sum(len(one.predicted) for one in cases)
    overlaps = [pair[2] for one in cases for pair in pairs_at(one, iou)]
    found, both = len(overlaps), references + predictions
    f1 = 2 * found / both if both else None
    sq = float(np.mean(overlaps)) if found else None
    right, wrong = _cuts(cases, iou)
    recalls = _sensitivities(right, wrong, references, len(cases)) if references else None
    return InstanceSummary(
        label=cases[0].label,
        name=cases[0].name,
        iou=iou,
        cases=len(cases),
        references=references,
        predictions=predictions,
        found=found,
        precision=found / predictions if predictions else None,
        recall=found / references if references else None,
        f1=f1,
        sq=sq,
        pq=None if f1 is None else f1 * (sq or 0.0),
        ap=_average_precision(right, wrong, references) if references else None,
        froc=float(np.mean(recalls)) if recalls else None,
        sensitivities=recalls,
    )


def _cuts(cases: list[Matches], iou: float) -> tuple[Float64, Float64]:
    """How many predicted instances are right, and how many wrong, above each cut (n,) of the score, the
    highest first."""
    scores = np.array([-one.score for case in cases for one in case.predicted])
    hits = np.concatenate([hits_at(case, iou) for case in cases])
    order = np.argsort(scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=np.inf) > 0)
    right, wrong = (np.cumsum(which[order], dtype=np.float64)[last] for which in (hits, ~hits))
    return right, wrong


def _average_precision(right: Float64, wrong: Float64, references: int) -> float:
    """The mean over 101 recalls of the best precision at that recall or more; 0 beyond what is reached."""
    precision = np.maximum.accumulate((right / (right + wrong))[::-1])[::-1]
    at = np.searchsorted(right / references + _ROUNDING, _RECALLS)
    return float(np.append(precision, 0.0)[at].mean())


def _sensitivities(right: Float64, wrong: Float64, references: int, scans: int) -> tuple[float, ...]:
    recalls = []
    for rate in FALSE_POSITIVES:
        allowed = right[wrong <= rate * scans + _ROUNDING]
        recalls.append(float(allowed.max(initial=0)) / references)
    return tuple(recalls)


def _mean_of(labels: list[InstanceSummary]) -> InstanceSummary:
    first = labels[0]
    curves = [one.sensitivities for one in labels if one.sensitivities is not None]
    return InstanceSummary(
        label=None,
        name="mean",
        iou=first.iou,
        cases=max(one.cases for one in labels),
        references=sum(one.references for one in labels),
        predictions=sum(one.predictions for one in labels),
        found=sum(one.found for one in labels),
        sensitivities=tuple(float(v) for v in np.mean(curves, axis=0)) if curves else None,
        **{name: _mean([getattr(one, name) for one in labels]) for name in _FIGURES},
    )


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
