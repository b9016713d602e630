"""Label maps in, rows of numbers out: one row per case and label, and a summary of many rows.

What a label's row says where one of the two label maps does not hold it is decided here, once:

================  =========  ==========  ==========================  =========================
status            reference  prediction  overlaps                    distances
================  =========  ==========  ==========================  =========================
"ok"              present    present     measured                    measured
"missed"          present    absent      0                           diagonal of the image
"invented"        absent     present     0                           diagonal of the image
"both empty"      absent     absent      None                        None
"not computable"  (no voxel counts)      None                        None
================  =========  ==========  ==========================  =========================

Overlaps are Dice, IoU, precision, recall, boundary IoU, clDice and NSD, distances HD, HD95, ASSD and that of the
centroids. None is "does not apply" and enters no mean. The diagonal is the largest distance that the image
has room for: a missed organ counts as badly as can be and never drops out of a mean. No voxel counts
where the reference has the label that is ignored everywhere.

Where the image's border cuts a structure, its surface there and its volume are those of the part in the image, in
both label maps alike; ``cut`` says in which of them it touches the border.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

import numpy as np

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap
from medseg.evaluate.form import boundary_iou, centroid_distance, cldice, tubes
from medseg.evaluate.overlap import Mask, dice, iou, precision, recall
from medseg.evaluate.surface import assd, hausdorff, nsd, surface_distances

FORMAT_VERSION = 2

OK, MISSED, INVENTED, BOTH_EMPTY, NOT_COMPUTABLE = "ok", "missed", "invented", "both empty", "not computable"
# By whether the label is predicted, and whether it is in the reference.
_STATUS = {(True, True): OK, (False, True): MISSED, (True, False): INVENTED, (False, False): BOTH_EMPTY}
# Those of which nothing is measured.
NOTHING = (BOTH_EMPTY, NOT_COMPUTABLE)
# The same pairs, of whether a structure touches the border of the image.
_CUT = {(True, True): "both", (True, False): "prediction", (False, True): "reference", (False, False): ""}

# What larger, and what smaller numbers are better of.
OVERLAPS = ("dice", "iou", "precision", "recall", "boundary_iou", "cldice", "nsd")
DISTANCES = ("hd_mm", "hd95_mm", "assd_mm", "centroid_mm")

TOLERANCE_MM = 2.0
# Of the NSD, in mm, as experts chose them for the tasks of the Medical Segmentation Decathlon (Antonelli et al.,
# Nature Communications 2022).
DECATHLON_MM = {
    "Task01_BrainTumour": 5.0,
    "Task02_Heart": 4.0,
    "Task03_Liver": 7.0,
    "Task04_Hippocampus": 1.0,
    "Task05_Prostate": 4.0,
    "Task06_Lung": 2.0,
    "Task07_Pancreas": 5.0,
    "Task08_HepaticVessel": 3.0,
    "Task09_Spleen": 3.0,
    "Task10_Colon": 4.0,
}

_UNREADABLE = "Score the cases again with this version of medseg"

Box = tuple[slice, ...]


@dataclass(frozen=True)
class CaseMetrics:
    """One label of one case of a ``subject``. ``status``, ``cut`` and the meaning of None are told at the top of this
    module.

    Overlaps go from 0 to 1; ``nsd`` is the normalised surface Dice at ``tolerance_mm``, which is the width of
    the border of ``boundary_iou`` too, and ``cldice`` that of the centre lines, None for what is no tube. Distances
    are in mm. ``volume_error_mm3`` is predicted minus reference; in percent it is of the reference, and None
    where that is empty.

    Raises InputError for an unknown status and for a number that is not finite.
    """

    case: str
    subject: str
    label: int
    name: str
    status: str
    cut: str
    dice: float | None
    iou: float | None
    precision: float | None
    recall: float | None
    boundary_iou: float | None
    cldice: float | None
    nsd: float | None
    tolerance_mm: float
    hd_mm: float | None
    hd95_mm: float | None
    assd_mm: float | None
    centroid_mm: float | None
    reference_mm3: float
    predicted_mm3: float
    volume_error_mm3: float
    volume_error_percent: float | None

    def __post_init__(self) -> None:
        if self.status not in (*_STATUS.values(), NOT_COMPUTABLE):
            raise InputError(f"label {self.label} has the status {self.status!r}", _UNREADABLE, case=self.case)
        if self.cut not in _CUT.values():
            raise InputError(f"label {self.label} is cut in {self.cut!r}", _UNREADABLE, case=self.case)
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} of label {self.label} is {value}", "Use None", case=self.case)


@dataclass(frozen=True)
class LabelSummary:
    """One label over its cases, or all labels (``label`` None, ``name`` "mean").

    ``cases`` is the number of cases that the figures stand on, missed and invented ones included,
    those empty in both and those not computable excluded; ``cut`` counts those of them that the image's border cuts.
    ``dice_std`` is the sample standard deviation, None below two
    cases. ``volume_error_percent_median`` is the median absolute error over the cases that have
    the label in the reference. A figure that stands on nothing is None.

    Over all labels each figure is the mean of the labels' figures, every label counting the same;
    ``cases`` are those in which any label counted, and the other counts are sums.
    """

    label: int | None
    name: str
    cases: int
    missed: int
    invented: int
    both_empty: int
    not_computable: int
    cut: int
    dice_mean: float | None
    dice_median: float | None
    dice_std: float | None
    iou_mean: float | None
    precision_mean: float | None
    recall_mean: float | None
    boundary_iou_mean: float | None
    cldice_mean: float | None
    nsd_mean: float | None
    hd_mean_mm: float | None
    hd95_mean_mm: float | None
    assd_mean_mm: float | None
    centroid_mean_mm: float | None
    volume_error_percent_median: float | None


_FIGURES = tuple(name for name, kind in get_type_hints(LabelSummary).items() if kind == (float | None))
_COUNTS = ("missed", "invented", "both_empty", "not_computable", "cut")


def score(
    prediction: LabelMap,
    reference: LabelMap,
    *,
    case: str,
    subject: str | None = None,
    tolerance_mm: float | Mapping[int, float] = TOLERANCE_MM,
    tubular: Collection[int] | None = None,
    ignored: int | None = None,
    threads: int = 1,
) -> list[CaseMetrics]:
    """A row for each label of the reference, in order of their numbers.

    ``tolerance_mm`` is that of the normalised surface Dice, one for all or one for each label
    number. Labels that are ``tubular`` (those whose names say so) have a clDice. Voxels where the reference has the
    label ``ignored`` do not count. A case without a ``subject`` is one of its own.
    Both label maps must lie on the same grid and name the same labels; nothing is
    resampled. Work is confined to the box around each label, and ``threads`` labels are scored at a time.

    Raises InputError where the grids or labels differ, where a voxel holds a number that is no
    label, and where a tolerance is missing, superfluous, negative or not finite.
    """
    require_grid(prediction.grid, reference.grid, case)
    _same_labels(prediction, reference, case)
    counts = ignored is None or bool((reference.values != ignored).any())
    prediction, reference = ignoring(prediction, reference, ignored)
    tolerances = _tolerances(tolerance_mm, reference, case)
    ours, theirs = _boxes(prediction, "prediction", case), _boxes(reference, "reference", case)
    long = tubes(reference.labels) if tubular is None else tubular

    def row(label: Label) -> CaseMetrics:
        boxes = ours.get(label.number), theirs.get(label.number)
        box = _around([b for b in boxes if b is not None])
        masks = [m.values[box] == label.number for m in (prediction, reference)]
        voxel, grid, tolerance = reference.grid.voxel_volume, reference.grid, tolerances[label.number]
        predicted, expected = (float(np.count_nonzero(mask) * voxel) for mask in masks)
        status = _STATUS[boxes[0] is not None, boxes[1] is not None] if counts else NOT_COMPUTABLE
        return CaseMetrics(
            case=case,
            subject=case if subject is None else subject,
            label=label.number,
            name=label.name,
            status=status,
            cut=_CUT[_touches(boxes[0], grid), _touches(boxes[1], grid)],
            **_measures(status, masks, grid, box, tolerance, tube=label.number in long),
            tolerance_mm=tolerance,
            reference_mm3=expected,
            predicted_mm3=predicted,
            volume_error_mm3=predicted - expected,
            volume_error_percent=100 * (predicted - expected) / expected if expected else None,
        )

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(row, reference.labels))


def ignoring(
    prediction: LabelMap, reference: LabelMap, number: int | None, *, case: str | None = None
) -> tuple[LabelMap, LabelMap]:
    """Both label maps with nothing where the reference has the label ``number``, and without that label: what
    is found there is neither right nor wrong. As they are where it is None. A structure that goes on into what
    is ignored ends at its border in both, for surface distances too.

    Raises InputError where they are not on one grid.
    """
    if number is None:
        return prediction, reference
    require_grid(prediction.grid, reference.grid, case)
    counts = reference.values != number

    def left(one: LabelMap) -> LabelMap:
        labels = LabelSet(tuple(label for label in one.labels if label.number != number))
        return LabelMap(one.values * counts, one.grid, labels)

    return left(prediction), left(reference)


def diagonal_mm(grid: Grid) -> float:
    """The longest distance within an image, from outer corner to outer corner, in mm."""
    edges = grid.affine[:3, :3] * grid.shape
    # Four diagonals, of one length only where the axes are at right angles.
    signs = np.array([(1, 1, 1), (1, 1, -1), (1, -1, 1), (-1, 1, 1)])
    return float(np.linalg.norm(signs @ edges.T, axis=1).max())


def summarise(rows: Iterable[CaseMetrics]) -> list[LabelSummary]:
    """A summary of each label, in order of their numbers, and last one over all labels.

    No rows give no summary. Raises InputError where a label of a case comes twice and where one
    label goes by two names.
    """
    groups: dict[int, list[CaseMetrics]] = {}
    seen = set()
    for row in rows:
        if (row.case, row.label) in seen:
            raise InputError(f"label {row.label} comes twice", "Score each case once", case=row.case)
        seen.add((row.case, row.label))
        group = groups.setdefault(row.label, [])
        if group and group[0].name != row.name:
            raise InputError(
                f"label {row.label} is {row.name!r} here and {group[0].name!r} elsewhere",
                "Summarise cases of one task only",
                case=row.case,
            )
        group.append(row)
    labels = [_summarise_label(groups[number]) for number in sorted(groups)]
    return [*labels, _summarise_all(labels, groups)] if labels else []


def to_csv(rows: Iterable[CaseMetrics]) -> str:
    """The rows as comma-separated text under a line of column names; None is an empty cell."""
    return written(CaseMetrics, rows)


def written(kind: type[Any], rows: Iterable[Any]) -> str:
    """Rows of one ``kind``, a dataclass, as `to_csv` has them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def to_json(rows: Sequence[CaseMetrics], *, provenance: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The rows and their summary as a document that JSON can hold, without NaN.

    ``provenance`` says where the label maps come from; it must itself be fit for JSON.
    """
    return {
        "format": FORMAT_VERSION,
        "provenance": dict(provenance) if provenance is not None else None,
        "rows": [asdict(row) for row in rows],
        "summary": [asdict(summary) for summary in summarise(rows)],
    }


def from_json(document: Mapping[str, Any]) -> list[CaseMetrics]:
    """The rows of a document written by :func:`to_json`. The summary follows from them and is not read.

    Raises InputError for another format version, for keys that are missing or unknown, and for
    values of the wrong type.
    """
    if not isinstance(document, Mapping):
        raise InputError("the scores are no table of keys", _UNREADABLE)
    version = document.get("format")
    if version != FORMAT_VERSION:
        raise InputError(f"scores of format version {version!r}, not {FORMAT_VERSION}", _UNREADABLE)
    _same_keys(document, {"format", "provenance", "rows", "summary"}, "the scores")
    if not isinstance(document["rows"], list):
        raise InputError("the rows of the scores are no list", _UNREADABLE)
    return [_row(row, f"row {number} of the scores") for number, row in enumerate(document["rows"], start=1)]


def require_grid(prediction: Grid, reference: Grid, case: str | None) -> None:
    """InputError unless both are one grid, up to rounding of the affine."""
    if prediction.matches(reference):
        return
    if prediction.shape != reference.shape:
        fault = f"the prediction has shape {prediction.shape}, the reference {reference.shape}"
    else:
        fault = f"prediction and reference lie up to {prediction.distance(reference):.3g} mm apart"
    raise InputError(fault, "Predict on the grid of the scan that the reference was drawn on", case=case)


def _same_labels(prediction: LabelMap, reference: LabelMap, case: str) -> None:
    ours, theirs = ([(label.number, label.name) for label in m.labels] for m in (prediction, reference))
    if ours != theirs:
        raise InputError(
            f"the prediction's labels are {prediction.labels or 'none'}, the reference's {reference.labels or 'none'}",
            "Score with the labels that the model was trained on",
            case=case,
        )


def _tolerances(tolerance_mm: float | Mapping[int, float], reference: LabelMap, case: str) -> dict[int, float]:
    numbers = reference.labels.numbers
    given = tolerance_mm if isinstance(tolerance_mm, Mapping) else dict.fromkeys(numbers, tolerance_mm)
    if set(given) != set(numbers):
        differ = ", ".join(str(n) for n in sorted(set(given) ^ set(numbers)))
        raise InputError(
            f"tolerances and labels do not agree on the label {differ}",
            f"Give one tolerance in mm for each of {reference.labels}",
            case=case,
        )
    for number, value in given.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(
                f"the tolerance of label {number} is {value} mm", "Give a length of 0 mm or more", case=case
            )
    return {number: float(value) for number, value in given.items()}


def _boxes(labels: LabelMap, whose: str, case: str) -> dict[int, Box]:
    """The box around each label that is there; InputError for a number that is no label."""
    from scipy.ndimage import find_objects

    known = labels.labels.numbers
    largest = max(known, default=0)
    low, high = int(labels.values.min()), int(labels.values.max())
    found = find_objects(labels.values, max_label=largest) if largest else []
    boxes = {number: box for number, box in enumerate(found, start=1) if box is not None}
    strange = sorted({n for n in boxes if n not in known} | {n for n in (low, high) if n < 0 or n > largest})
    if strange:
        raise InputError(
            f"the {whose} holds {', '.join(str(n) for n in strange)}, which is no label",
            f"Name every number, or set it to 0; the labels are {labels.labels or 'none'}",
            case=case,
        )
    return boxes


def _touches(box: Box | None, grid: Grid) -> bool:
    """Whether what fills a box touches the border of the image, along any axis that it has more than one voxel of."""
    sides = zip(box or (), grid.shape, strict=False)
    return any(n > 1 and (side.start == 0 or side.stop == n) for side, n in sides)


def _measures(
    status: str, masks: Sequence[Mask], grid: Grid, box: Box, tolerance: float, *, tube: bool
) -> dict[str, float | None]:
    """The table at the top of this module, for masks that fill a box of the grid."""
    found: dict[str, float | None] = dict.fromkeys((*OVERLAPS, *DISTANCES))
    if status in NOTHING:
        return found
    if status != OK:
        found |= dict.fromkeys(OVERLAPS, 0.0) | dict.fromkeys(DISTANCES, diagonal_mm(grid))
        return found | ({} if tube else {"cldice": None})
    ours, theirs = masks
    inside = grid.window([s.start for s in box], ours.shape)
    between = surface_distances(ours, theirs, inside)
    return {
        "dice": dice(ours, theirs),
        "iou": iou(ours, theirs),
        "precision": precision(ours, theirs),
        "recall": recall(ours, theirs),
        "boundary_iou": boundary_iou(ours, theirs, inside, tolerance, [a for a, n in enumerate(grid.shape) if n == 1]),
        "cldice": cldice(ours, theirs) if tube else None,
        "nsd": nsd(between, tolerance),
        "hd_mm": hausdorff(between),
        "hd95_mm": hausdorff(between, 95),
        "assd_mm": assd(between),
        "centroid_mm": centroid_distance(ours, theirs, inside),
    }


def _around(boxes: list[Box]) -> Box:
    """The box around boxes; an empty one around none."""
    if not boxes:
        return (slice(0, 0),) * 3
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def _summarise_label(rows: list[CaseMetrics]) -> LabelSummary:
    dices = [row.dice for row in rows if row.dice is not None]
    errors = [abs(row.volume_error_percent) for row in rows if row.volume_error_percent is not None]
    counts = {status: sum(row.status == status for row in rows) for status in (MISSED, INVENTED, *NOTHING)}
    counted = [row for row in rows if row.status not in NOTHING]
    return LabelSummary(
        label=rows[0].label,
        name=rows[0].name,
        cases=len(counted),
        missed=counts[MISSED],
        invented=counts[INVENTED],
        both_empty=counts[BOTH_EMPTY],
        not_computable=counts[NOT_COMPUTABLE],
        cut=sum(bool(row.cut) for row in counted),
        dice_median=float(np.median(dices)) if dices else None,
        dice_std=float(np.std(dices, ddof=1)) if len(dices) > 1 else None,
        volume_error_percent_median=float(np.median(errors)) if errors else None,
        **{f"{name}_mean": _mean(getattr(row, name) for row in rows) for name in OVERLAPS},
        **{f"{name[:-3]}_mean_mm": _mean(getattr(row, name) for row in rows) for name in DISTANCES},
    )


def _summarise_all(labels: list[LabelSummary], groups: Mapping[int, list[CaseMetrics]]) -> LabelSummary:
    counted = {row.case for rows in groups.values() for row in rows if row.status not in NOTHING}
    return LabelSummary(
        label=None,
        name="mean",
        cases=len(counted),
        **{name: sum(getattr(one, name) for one in labels) for name in _COUNTS},
        **{name: _mean(getattr(one, name) for one in labels) for name in _FIGURES},  # type: ignore[arg-type]
    )


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _row(row: Any, where: str) -> CaseMetrics:
    types = get_type_hints(CaseMetrics)
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is no table of keys", _UNREADABLE)
    _same_keys(row, set(types), where)
    values = {}
    for name, value in row.items():
        # JSON writes 1.0 as it likes; True would pass as the integer 1.
        number = float(value) if type(value) is int and not isinstance(value, types[name]) else value
        if isinstance(number, bool) or not isinstance(number, types[name]):
            raise InputError(f"{name} in {where} is {value!r}", _UNREADABLE)
        values[name] = number
    return CaseMetrics(**values)


def _same_keys(found: Mapping[str, Any], wanted: set[str], where: str) -> None:
    for what, keys in (("unknown", set(found) - wanted), ("missing", wanted - set(found))):
        if keys:
            raise InputError(f"{what} in {where}: {', '.join(sorted(map(str, keys)))}", _UNREADABLE)
