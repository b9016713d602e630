"""One page per run: how well, how that is spread, how it was learned, what it looks like, and why.

Values in, one HTML text out. The page opens from disk, loads nothing, and works without scripts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.look import COLOURS
from medseg.core.volume import LabelMap
from medseg.evaluate.score import CaseMetrics, LabelSummary, summarise
from medseg.report import figures

if TYPE_CHECKING:
    import jinja2

Kind = Literal["best", "median", "worst"]

# Pictures may fill this much of a page of 10 MB; where they are more, they lose resolution.
_PICTURE_BYTES = 5_000_000
_SIDES = (512, 256, 128, 64)
# Beyond these, a page gets too heavy for a browser: the points lose their labels, and the table of
# cases keeps the worst rows.
_LABELLED_POINTS = 6000
_TABLE_ROWS = 10_000
_COLOURS = len(COLOURS)


@dataclass(frozen=True)
class Scored:
    """What one fold of a configuration reached: a row per case and label."""

    configuration: str
    fold: int
    rows: tuple[CaseMetrics, ...]


@dataclass(frozen=True)
class Curve:
    """The log of one training: records with ``step``, ``steps`` (in all), ``seconds`` (elapsed),
    ``loss``, ``learning_rate``, and in some ``dice`` (mean over the validation cases)."""

    configuration: str
    fold: int
    records: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Decision:
    """One line of a plan and its reason. Without a configuration it holds for all."""

    name: str
    value: str
    reason: str
    configuration: str = ""


@dataclass(frozen=True, eq=False)
class Overlay:
    """A case to look at: one channel (X, Y, Z) on its grid, both label maps on the same grid, and
    its mean Dice."""

    case: str
    configuration: str
    kind: Kind
    image: NDArray[Any]
    grid: Grid
    reference: LabelMap
    prediction: LabelMap
    dice: float


@dataclass(frozen=True, eq=False)
class RunPage:
    """All that the page of a run shows; whatever is not there yet is left empty.

    ``cases`` and ``folds`` are how many the task has; ``provenance`` is shown as it is, and
    ``commands`` are the lines that repeat the run.
    """

    title: str
    task: str
    description: str = ""
    cases: int | None = None
    folds: int | None = None
    decisions: tuple[Decision, ...] = ()
    scored: tuple[Scored, ...] = ()
    curves: tuple[Curve, ...] = ()
    overlays: tuple[Overlay, ...] = ()
    provenance: Mapping[str, str] | None = None
    commands: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column of numbers: the field they are in, what stands above them, and how many decimals."""

    field: str
    heading: str
    unit: str
    digits: int

    def of(self, row: CaseMetrics | LabelSummary) -> str:
        """The field of a row as text."""
        return _text(getattr(row, self.field), self.digits)


CASE_COLUMNS = (
    Column("dice", "Dice", "", 3),
    Column("iou", "IoU", "", 3),
    Column("hd95_mm", "HD95", "mm", 1),
    Column("assd_mm", "ASSD", "mm", 2),
    Column("nsd", "NSD", "", 3),
    Column("volume_error_percent", "Volume error", "%", 1),
)
ORGAN_COLUMNS = (
    Column("dice_median", "Dice", "median", 3),
    Column("iou_mean", "IoU", "mean", 3),
    Column("hd95_mean_mm", "HD95", "mean, mm", 1),
    Column("assd_mean_mm", "ASSD", "mean, mm", 2),
    Column("nsd_mean", "NSD", "mean", 3),
    Column("volume_error_percent_median", "Volume error", "median, %", 1),
)


def case_dice(rows: Iterable[CaseMetrics]) -> dict[str, float]:
    """Mean Dice over labels of each case, worst first, ties by case. Labels without a Dice (absent
    from both maps) do not count; nor does a case that has none other."""
    dice: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.dice is not None:
            dice[row.case].append(row.dice)
    means = {case: fmean(values) for case, values in dice.items()}
    return dict(sorted(means.items(), key=lambda item: (item[1], item[0])))


def pick_cases(rows: Iterable[CaseMetrics]) -> dict[Kind, str]:
    """The best, median and worst case by mean Dice over labels.

    Of an even number the lower median. No case comes twice: two give the best and the worst, one
    the median, none an empty answer.
    """
    ranked = list(case_dice(rows))
    places: list[tuple[Kind, int]] = [("best", -1), ("median", (len(ranked) - 1) // 2), ("worst", 0)]
    few: dict[int, tuple[Kind, ...]] = {0: (), 1: ("median",), 2: ("best", "worst")}
    kinds = few.get(len(ranked), ("best", "median", "worst"))
    return {kind: ranked[place] for kind, place in places if kind in kinds}


def to_markdown(scored: Iterable[Scored]) -> str:
    """A Markdown table for a paper or a README: a row per configuration and organ over the cases of
    all folds, and one for the mean over organs.

    Raises InputError where a configuration scored a case twice.
    """
    head = ["Configuration", "Organ", "n", "Dice (mean ± sd)", *(f"{c.heading} ({c.unit})" for c in ORGAN_COLUMNS)]
    lines = [_piped([*head, "Missed"]), _piped(["---", "---", *["---:"] * (len(head) - 1)])]
    for configuration, rows in _by_configuration(scored).items():
        for one in summarise(rows):
            name = one.name if one.label is not None else "**mean over organs**"
            cells = [str(one.cases), _mean_sd(one), *(c.of(one) for c in ORGAN_COLUMNS), str(one.missed)]
            lines.append(_piped([configuration, name, *cells]))
    return "\n".join(lines) + "\n"


def report(run: RunPage) -> str:
    """The page of a run as one HTML text. The same run gives the same text.

    Raises InputError where a configuration scored a case twice, and where the label maps of an
    overlay do not lie on its grid.
    """
    groups = _by_configuration(run.scored)
    colours = {name: n % _COLOURS for n, name in enumerate(_configurations(run))}
    context = {
        "run": run,
        "case_columns": CASE_COLUMNS,
        "organ_columns": ORGAN_COLUMNS,
        "mean_sd": _mean_sd,
        "colours": colours,
        "structure_colours": COLOURS,
        "headline": _headline(run, groups),
        "cards": [_card(name, rows) for name, rows in groups.items()],
        "organs": [_organ_table(name, rows) for name, rows in groups.items()],
        "scored_folds": {name: len({s.fold for s in run.scored if s.configuration == name}) for name in groups},
        "folds": _fold_table(run.scored),
        "strips": _strips(groups),
        "curves": _curves(run.curves, colours),
        "pictures": _pictures(run.overlays),
        "cases": _case_table(run.scored),
        "decisions": _decisions(run.decisions),
    }
    return _template().render(context)


@cache
def _template() -> jinja2.Template:
    import jinja2

    loader = jinja2.PackageLoader("medseg.report", package_path="")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html.j2")


# ---- grouping


def _configurations(run: RunPage) -> list[str]:
    return sorted({x.configuration for group in (run.scored, run.curves, run.overlays) for x in group})


def _by_configuration(scored: Iterable[Scored]) -> dict[str, list[CaseMetrics]]:
    groups: dict[str, list[CaseMetrics]] = defaultdict(list)
    for one in sorted(scored, key=lambda s: (s.configuration, s.fold)):
        if one.rows:
            groups[one.configuration].extend(one.rows)
    return dict(groups)


def _mean_dice(rows: Iterable[CaseMetrics]) -> float | None:
    """Mean Dice over labels, each label the mean over its cases."""
    return summarise(rows)[-1].dice_mean


# ---- what the page says


def _headline(run: RunPage, groups: Mapping[str, Sequence[CaseMetrics]]) -> str:
    if not groups:
        trained = "training has begun" if any(c.records for c in run.curves) else "no training has been logged"
        return f"This run is not finished: {trained}, and no case has been scored yet."
    ranked = sorted(groups, key=lambda name: (-(_mean_dice(groups[name]) or 0.0), name))
    rows = groups[ranked[0]]
    dice, cases = _mean_dice(rows), case_dice(rows)
    if dice is None:
        return "No structure was present in any scored case, so there is nothing to compare."
    missed, present = _missed(rows)
    verdict = (
        f"{missed} of {present} structures {'was' if missed == 1 else 'were'} missed entirely"
        if missed
        else "no structure was missed"
    )
    worst = next(iter(cases))
    named = f"Configuration {ranked[0]} reaches" if len(groups) > 1 else "The predictions reach"
    others = ", ".join(f"{name} {_text(_mean_dice(groups[name]), 2)}" for name in ranked[1:])
    return (
        f"{named} a mean Dice of {dice:.2f}{others and f' ({others})'} on {_count(len(cases), 'case')} "
        f"(1 is perfect agreement); {verdict}, and {worst} is the worst case with {cases[worst]:.2f}."
    )


def _missed(rows: Iterable[CaseMetrics]) -> tuple[int, int]:
    """How many structures were missed, and how many there were to find."""
    states = [row.status for row in rows]
    return states.count("missed"), sum(state in ("ok", "missed") for state in states)


def _card(configuration: str, rows: Sequence[CaseMetrics]) -> dict[str, Any]:
    cases = case_dice(rows)
    missed, present = _missed(rows)
    dice = _mean_dice(rows)
    return {
        "configuration": configuration,
        "dice": _text(dice, 3),
        "percent": round(100 * (dice or 0.0), 1),
        "cases": len(cases),
        "worst": next(iter(cases), None),
        "worst_dice": _text(next(iter(cases.values()), None), 3),
        "median": _text(median(cases.values()) if cases else None, 3),
        "missed": missed,
        "present": present,
        "invented": sum(row.status == "invented" for row in rows),
    }


def _organ_table(configuration: str, rows: Sequence[CaseMetrics]) -> dict[str, Any]:
    tolerances = {row.label: f"{row.tolerance_mm:g} mm" for row in rows}
    *organs, overall = summarise(rows)
    return {
        "configuration": configuration,
        # One tolerance for all stands in the heading, different ones beside each organ.
        "tolerance": next(iter(tolerances.values())) if len(set(tolerances.values())) == 1 else "",
        "tolerances": tolerances,
        "organs": organs,
        "overall": overall,
    }


def _fold_table(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Mean Dice of each fold; nothing where there is only one."""
    if len({s.fold for s in scored if s.rows}) < 2:
        return []
    return [
        {
            "configuration": s.configuration,
            "fold": s.fold,
            "cases": len(case_dice(s.rows)),
            "dice": _text(_mean_dice(s.rows), 3),
            "missed": _missed(s.rows)[0],
        }
        for s in sorted(scored, key=lambda s: (s.configuration, s.fold))
        if s.rows
    ]


def _strips(groups: Mapping[str, Sequence[CaseMetrics]]) -> list[dict[str, Any]]:
    """For Dice and for HD95: a strip per organ and configuration on one common axis.

    A missed or invented organ has the Dice 0. Its distance is a convention, not a measurement: it
    is left out of the strip and counted beside it.
    """
    labelled = sum(map(len, groups.values())) <= _LABELLED_POINTS
    names = {row.label: row.name for rows in groups.values() for row in rows}
    found = []
    for column, low, high in ((CASE_COLUMNS[0], 0.8, 1.0), (CASE_COLUMNS[2], 0.0, None)):
        measured = {
            name: [row for row in rows if row.status == "ok" or (column.field == "dice" and row.dice is not None)]
            for name, rows in groups.items()
        }
        every = [getattr(row, column.field) for rows in measured.values() for row in rows]
        if not every:
            continue
        along = figures.axis(every, low=low, high=high)
        organs = []
        for label, name in sorted(names.items()):
            lines = []
            for configuration, rows in measured.items():
                organ = [row for row in rows if row.label == label]
                pairs = [
                    (f"{r.case}: {column.of(r)} {column.unit}".rstrip() if labelled else "", getattr(r, column.field))
                    for r in organ
                ]
                counted = sum(r.label == label and r.status != "both empty" for r in groups[configuration])
                middle = _text(median(v for _, v in pairs) if pairs else None, column.digits)
                lines.append((configuration, figures.strip(pairs, along), middle, counted - len(organ)))
            organs.append((name, lines))
        found.append({"column": column, "axis": along, "organs": organs})
    return found


def _curves(curves: Sequence[Curve], colours: Mapping[str, int]) -> dict[str, Any]:
    """Loss and validation Dice against minutes, and where each training stands."""
    ordered = sorted((c for c in curves if c.records), key=lambda c: (c.configuration, c.fold))
    panels = []
    for field, heading, low, high in (("loss", "Training loss", None, None), ("dice", "Validation Dice", None, 1.0)):
        points = {
            (c.configuration, c.fold): [
                line
                for part in _networks(c.records)
                if (line := figures.thinned([(r["seconds"] / 60, r[field]) for r in part if r.get(field) is not None]))
            ]
            for c in ordered
        }
        every = [p for lines in points.values() for line in lines for p in line]
        if not every:
            continue
        across = figures.axis((x for x, _ in every), low=0.0)
        up = figures.axis((y for _, y in every), low=low, high=high, count=4)
        lines = [
            {
                "configuration": name,
                "fold": fold,
                "colour": colours[name],
                "path": "".join(figures.line(line, across, up) for line in parts),
                "end": (across.percent(parts[-1][-1][0]), round(100 - up.percent(parts[-1][-1][1]), 2)),
                "last": f"{parts[-1][-1][1]:.3f}",
            }
            for (name, fold), parts in points.items()
            if parts
        ]
        panels.append({"heading": heading, "across": across, "up": up, "lines": lines})
    return {"panels": panels, "lines": [_standing(c) for c in ordered]}


def _networks(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Records by network: where several are trained one after the other, steps begin anew with each."""
    parts: list[list[Mapping[str, Any]]] = []
    for record in records:
        if not parts or record["step"] <= parts[-1][-1]["step"]:
            parts.append([])
        parts[-1].append(record)
    return parts


def _standing(curve: Curve) -> dict[str, Any]:
    last = curve.records[-1]
    dice = [r["dice"] for r in curve.records if r.get("dice") is not None and math.isfinite(r["dice"])]
    return {
        "configuration": curve.configuration,
        "fold": curve.fold,
        "step": int(last["step"]),
        "steps": int(last["steps"]),
        "minutes": f"{last['seconds'] / 60:.1f}",
        "loss": f"{last['loss']:.3f}" if last.get("loss") is not None else "–",
        "best": _text(max(dice, default=None), 3),
        "last": _text(dice[-1] if dice else None, 3),
    }


def _pictures(overlays: Sequence[Overlay]) -> list[dict[str, Any]]:
    order = {"best": 0, "median": 1, "worst": 2}
    ordered = sorted(overlays, key=lambda o: (o.configuration, order[o.kind], o.case))
    views = [_planes(overlay) for overlay in ordered]
    return [
        _picture(overlay, shown, images)
        for overlay, shown, images in zip(ordered, views, _within_budget(views), strict=True)
    ]


def _planes(overlay: Overlay) -> tuple[figures.Plane, figures.Plane, figures.Plane]:
    try:
        return figures.planes(overlay.image, overlay.grid, overlay.reference, overlay.prediction)
    except InputError as error:
        raise error.of_case(overlay.case) from error


def _within_budget(views: Sequence[Sequence[figures.Plane]]) -> list[list[tuple[str, int]]]:
    """The image of each plane and how many pixels went into one, as sharp as the page allows."""
    images: list[list[tuple[str, int]]] = []
    for side in _SIDES:
        images = []
        for shown in views:
            small = [figures.shrunk(plane.grey, side) for plane in shown]
            images.append([(figures.png(grey), n) for grey, n in small])
        if sum(len(uri) for group in images for uri, _ in group) <= _PICTURE_BYTES:
            break
    return images


def _picture(overlay: Overlay, shown: Sequence[figures.Plane], images: Sequence[tuple[str, int]]) -> dict[str, Any]:
    seen = np.unique(np.concatenate([np.unique(m) for p in shown for m in (p.reference, p.prediction)]))
    organs = [(label, n % _COLOURS) for n, label in enumerate(overlay.reference.labels) if label.number in seen]
    drawn = []
    for plane, (uri, n) in zip(shown, images, strict=True):
        height, width = plane.size_mm
        bar = next((mm for mm in (20, 5) if mm <= width / 3), 1)
        here = [
            f"{label.name} {_found(plane, label.number)}"
            for label, _ in organs
            if label.number in plane.reference or label.number in plane.prediction
        ]
        drawn.append(
            {
                "plane": plane,
                "uri": uri,
                "position": _text(plane.position, 0),
                "bar": bar,
                "bar_x": (round(0.96 * width - bar, 2), round(0.96 * width, 2)),
                "bar_y": round(0.96 * height, 2),
                "height": round(height, 3),
                "width": round(width, 3),
                "image_height": round(math.ceil(plane.grey.shape[0] / n) * n * plane.pixel_mm[0], 3),
                "image_width": round(math.ceil(plane.grey.shape[1] / n) * n * plane.pixel_mm[1], 3),
                "half": (round(plane.pixel_mm[1] / 2, 6), round(plane.pixel_mm[0] / 2, 6)),
                "paths": [
                    (
                        colour,
                        figures.outline(plane.prediction == label.number),
                        figures.outline(plane.reference == label.number),
                    )
                    for label, colour in organs
                ],
                "alt": f"{plane.name.capitalize()} plane of case {overlay.case}, {overlay.kind} of configuration "
                f"{overlay.configuration}. Shown: {', '.join(here) or 'no structure'}.",
            }
        )
    return {"overlay": overlay, "dice": _text(overlay.dice, 3), "organs": organs, "planes": drawn}


def _found(plane: figures.Plane, number: int) -> str:
    reference, prediction = plane.reference == number, plane.prediction == number
    total = int(reference.sum()) + int(prediction.sum())
    return f"(overlap in this plane {2 * int((reference & prediction).sum()) / total:.2f})"


def _case_table(scored: Sequence[Scored]) -> dict[str, Any]:
    rows = [(s.configuration, s.fold, row) for s in scored for row in s.rows]
    total = len(rows)
    if total > _TABLE_ROWS:
        rows = sorted(rows, key=lambda r: (2.0 if r[2].dice is None else r[2].dice, r[0], r[2].case))[:_TABLE_ROWS]
    rows.sort(key=lambda r: (r[0], r[1], r[2].case, r[2].label))
    return {"rows": rows, "total": total}


def _decisions(decisions: Iterable[Decision]) -> dict[str, list[Decision]]:
    groups: dict[str, list[Decision]] = defaultdict(list)
    for decision in decisions:
        groups[decision.configuration].append(decision)
    return dict(sorted(groups.items()))


# ---- words


def _text(value: float | None, digits: int) -> str:
    """A number with a true minus sign, never before zero; a dash where there is none."""
    return "–" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def _mean_sd(one: LabelSummary) -> str:
    mean = _text(one.dice_mean, 3)
    # Over all organs there is no spread over cases to tell, only the mean of the organs' own.
    return mean if one.dice_std is None or one.label is None else f"{mean} ± {_text(one.dice_std, 3)}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _piped(cells: Iterable[str]) -> str:
    return "| " + " | ".join(c.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
