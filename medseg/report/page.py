"""One page per run: how well, how that is spread, how it was learned, what it looks like, and why.

Values in, one HTML text out. The page opens from disk and loads nothing. Without scripts it shows the summary, the
organs, the pictures and the plan; plots, the table of cases and the viewer are drawn by page.js.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid
from medseg.core.look import COLOURS
from medseg.core.volume import LabelMap
from medseg.evaluate.instances import InstanceSummary
from medseg.evaluate.score import NOTHING, CaseMetrics, summarise
from medseg.evaluate.statistics import agreement, intervals
from medseg.models.evaluation import Figure
from medseg.report import figures
from medseg.report.pictures import PICTURE_BYTES, SCAN_BYTES, Look, pictures, scans
from medseg.report.tables import (
    CASE_COLUMNS,
    DRAWN,
    ORGAN_COLUMNS,
    Scored,
    by_configuration,
    interval,
    mean_sd,
    text_of,
)

if TYPE_CHECKING:
    import jinja2

Sure = Mapping[tuple[int | None, str], Figure]
Kind = Literal["best", "median", "worst", "flagged"]

# A page is below 10 MB; outlines, tables and the page itself take the rest of it.
_PAGE_BYTES = 9_000_000
# It keeps so many rows of cases: those that are shown, and the worst ones.
_ROWS = 30_000
# From so many rows or pictures on, what is not on the screen is neither laid out nor drawn.
_LARGE, _MANY = 5000, 12
_COLOURS = len(COLOURS)


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
    """A case to look at: one channel (X, Y, Z) on its grid, both label maps on the same grid, its mean Dice (None where
    it has none), and why it is to be looked at."""

    case: str
    configuration: str
    kind: Kind
    image: NDArray[Any]
    grid: Grid
    reference: LabelMap
    prediction: LabelMap
    dice: float | None
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flagged:
    """A case that the model wants looked at, and why."""

    configuration: str
    case: str
    why: tuple[str, ...]


@dataclass(frozen=True)
class Counted:
    """How the things of one fold were found, one by one."""

    configuration: str
    fold: int
    summaries: tuple[InstanceSummary, ...]


@dataclass(frozen=True)
class Published:
    """What others report of the task: mean Dice of its labels in order, or of all together. ``alike`` says that the
    protocol is this run's."""

    system: str
    protocol: str
    source: str
    dice: tuple[float, ...]
    mean: float
    alike: bool


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
    flagged: tuple[Flagged, ...] = ()
    counted: tuple[Counted, ...] = ()
    published: tuple[Published, ...] = ()
    provenance: Mapping[str, str] | None = None
    commands: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


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


def report(run: RunPage) -> str:
    """The page of a run as one HTML text. The same run gives the same text.

    Raises InputError where a configuration scored a case twice, and where the label maps of an
    overlay do not lie on its grid.
    """
    groups = by_configuration(run.scored)
    colours = {name: n % _COLOURS for n, name in enumerate(_configurations(run))}
    sure = {name: intervals(rows, ("dice",)) for name, rows in groups.items()}
    overlays = sorted(run.overlays, key=lambda o: (o.configuration, get_args(Kind).index(o.kind), o.case))
    data, shown = _data(run, groups, colours), [_look(one) for one in overlays]
    plots = resource("vendor/echarts.min.js") if data["rows"] or data["curves"] else ""
    viewer = resource("vendor/niivue.umd.js") if shown else ""
    drawn = embedded(data)
    room = max(0, _PAGE_BYTES - len(plots) - len(viewer) - len(drawn.encode()))
    kept = scans(shown, min(SCAN_BYTES, 2 * room // 5))
    context = {
        "run": run,
        "organ_columns": ORGAN_COLUMNS,
        "mean_sd": mean_sd,
        "text": text_of,
        "colours": colours,
        "structure_colours": COLOURS,
        "headline": headline(run),
        "cards": [_card(name, rows, sure[name]) for name, rows in groups.items()],
        "organs": [_organ_table(name, rows, sure[name]) for name, rows in groups.items()],
        "scored_folds": {name: len({s.fold for s in run.scored if s.configuration == name}) for name in groups},
        "folds": _fold_table(run.scored),
        "counted": sorted(run.counted, key=lambda c: (c.configuration, c.fold)),
        "rows": len(data["rows"]),
        "rows_in_all": sum(len(s.rows) for s in run.scored),
        "standing": [_standing(c) for c in sorted(run.curves, key=lambda c: (c.configuration, c.fold)) if c.records],
        "predicted": any(s.predicted for s in run.scored),
        "reliable": data["reliable"],
        "agreement": data["agreement"],
        "large": len(data["rows"]) > _LARGE or len(shown) > _MANY,
        "pictures": list(zip(overlays, pictures(shown, min(PICTURE_BYTES, 3 * room // 5)), strict=True)),
        "data": drawn,
        "scans": embedded(kept),
        "script": resource("tables.js") + resource("viewer.js") + resource("page.js"),
        "plots": plots,
        "viewer": viewer,
        "decisions": _decisions(run.decisions),
    }
    return environment().get_template("page.html.j2").render(context)


@cache
def environment() -> jinja2.Environment:
    """Where the pages' templates are; what they are given is escaped."""
    import jinja2

    loader = jinja2.PackageLoader("medseg.report", package_path="")
    return jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


# ---- grouping


def _configurations(run: RunPage) -> list[str]:
    return sorted({x.configuration for group in (run.scored, run.curves, run.overlays) for x in group})


def _mean_dice(rows: Iterable[CaseMetrics]) -> float | None:
    """Mean Dice over labels, each label the mean over its cases."""
    return summarise(rows)[-1].dice_mean


# ---- what the page says


def headline(run: RunPage) -> str:
    """What came of a run, in a sentence or two."""
    groups = by_configuration(run.scored)
    if not groups:
        trained = "training has begun" if any(c.records for c in run.curves) else "no training has been logged"
        return f"This run is not finished: {trained}, and no case has been scored yet."
    ranked = sorted(groups, key=lambda name: (-(_mean_dice(groups[name]) or 0.0), name))
    rows = groups[ranked[0]]
    dice, cases = _mean_dice(rows), case_dice(rows)
    if dice is None:
        return "No structure was there to be compared in any scored case."
    missed, present = _missed(rows)
    verdict = (
        f"{missed} of {present} structures {'was' if missed == 1 else 'were'} missed entirely"
        if missed
        else "no structure was missed"
    )
    worst = next(iter(cases))
    named = f"Configuration {ranked[0]} reaches" if len(groups) > 1 else "The predictions reach"
    others = ", ".join(f"{name} {text_of(_mean_dice(groups[name]), 2)}" for name in ranked[1:])
    return (
        f"{named} a mean Dice of {dice:.2f}{others and f' ({others})'} on {_count(len(cases), 'case')} "
        f"(1 is perfect agreement); {verdict}, and {worst} is the worst case with {cases[worst]:.2f}."
    )


def _missed(rows: Iterable[CaseMetrics]) -> tuple[int, int]:
    """How many structures were missed, and how many there were to find."""
    states = [row.status for row in rows]
    return states.count("missed"), sum(state in ("ok", "missed") for state in states)


def _card(configuration: str, rows: Sequence[CaseMetrics], sure: Sure) -> dict[str, Any]:
    cases = case_dice(rows)
    missed, present = _missed(rows)
    dice = sure.get((None, "dice"))
    return {
        "configuration": configuration,
        "dice": text_of(dice.mean if dice else None, 3),
        "interval": interval(dice),
        "percent": round(100 * (dice.mean if dice else 0.0), 1),
        "cases": len(cases),
        "worst": next(iter(cases), None),
        "worst_dice": text_of(next(iter(cases.values()), None), 3),
        "median": text_of(median(cases.values()) if cases else None, 3),
        "missed": missed,
        "present": present,
        "invented": sum(row.status == "invented" for row in rows),
    }


def _organ_table(configuration: str, rows: Sequence[CaseMetrics], sure: Sure) -> dict[str, Any]:
    tolerances = {row.label: f"{row.tolerance_mm:g} mm" for row in rows}
    *organs, overall = summarise(rows)
    return {
        "configuration": configuration,
        # One tolerance for all stands in the heading, different ones beside each organ.
        "tolerance": next(iter(tolerances.values())) if len(set(tolerances.values())) == 1 else "",
        "tolerances": tolerances,
        "sure": {label: interval(one) for (label, _), one in sure.items()},
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
            "dice": text_of(_mean_dice(s.rows), 3),
            "missed": _missed(s.rows)[0],
        }
        for s in sorted(scored, key=lambda s: (s.configuration, s.fold))
        if s.rows
    ]


def _data(run: RunPage, groups: Mapping[str, Sequence[CaseMetrics]], colours: Mapping[str, int]) -> dict[str, Any]:
    """All that page.js draws, in the shortest form: names stand once, rows refer to them by their place."""
    rows = [(s, row) for s in sorted(run.scored, key=lambda s: (s.configuration, s.fold)) for row in s.rows]
    looked = {one.case for one in run.overlays} | {one.case for one in run.flagged}
    if len(rows) > _ROWS:
        dice = [2.0 if row.dice is None else row.dice for _, row in rows]
        worst = [rows[i] for i in sorted(range(len(rows)), key=lambda i: (rows[i][1].case not in looked, dice[i]))]
        rows = sorted(worst[:_ROWS], key=lambda pair: (pair[0].configuration, pair[0].fold))
    organs = list(dict(sorted({row.label: row.name for _, row in rows}.items())).values())
    cases = sorted({row.case for _, row in rows} | looked)
    names = list(colours)
    place = {what: {name: i for i, name in enumerate(known)} for what, known in (("organ", organs), ("case", cases))}
    return {
        "organs": organs,
        "cases": cases,
        "configurations": names,
        "columns": [{"heading": c.heading, "unit": c.unit, "digits": c.digits, "field": c.field} for c in CASE_COLUMNS],
        "drawn": [field for field in DRAWN if any(getattr(row, field) is not None for _, row in rows)],
        "rows": [
            [
                place["case"][row.case],
                place["organ"][row.name],
                names.index(one.configuration),
                one.fold,
                row.status,
                row.cut,
                round(row.reference_mm3 / 1000, 3),
                round(row.predicted_mm3 / 1000, 3),
                _rounded(one.predicted.get((row.case, row.label)), 3),
                *(_rounded(getattr(row, c.field), c.digits + 1) for c in CASE_COLUMNS),
            ]
            for one, row in rows
        ],
        "curves": [_curve(c) for c in sorted(run.curves, key=lambda c: (c.configuration, c.fold)) if c.records],
        "reliable": [
            {"configuration": s.configuration, "fold": s.fold, **asdict(one), "ece": one.ece}
            for s in run.scored
            for one in s.reliable
            if one.ece is not None
        ],
        "agreement": _agreements(groups),
        "flagged": {f"{f.configuration}|{f.case}": list(f.why) for f in run.flagged},
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _agreements(groups: Mapping[str, Sequence[CaseMetrics]]) -> list[dict[str, Any]]:
    """How far predicted volumes lie from the reference's, organ by organ."""
    found = []
    for configuration, rows in groups.items():
        for name in dict.fromkeys(row.name for row in rows):
            volumes = [(r.reference_mm3, r.predicted_mm3) for r in rows if r.name == name and r.status not in NOTHING]
            limits = agreement(*np.array(volumes).T / 1000) if volumes else None
            if limits:
                found.append({"configuration": configuration, "name": name, **asdict(limits)})
    return found


def _curve(curve: Curve) -> dict[str, Any]:
    """Loss and validation Dice against minutes, a line for each network."""
    lines: dict[str, list[list[tuple[float, float]]]] = {}
    for what in ("loss", "dice"):
        parts = [
            [(r["seconds"] / 60, r[what]) for r in part if r.get(what) is not None] for part in _networks(curve.records)
        ]
        thin = [[(round(x, 3), round(y, 4)) for x, y in figures.thinned(part)] for part in parts]
        lines[what] = [part for part in thin if part]
    return {"configuration": curve.configuration, "fold": curve.fold, **lines}


def _look(one: Overlay) -> Look:
    told = f"case {one.case}, {one.kind} of configuration {one.configuration}"
    key = f"{one.configuration}|{one.case}"
    return Look(key, one.case, told, one.image, one.grid, one.reference, one.prediction)


def embedded(data: Any) -> str:
    """JSON that may stand within a script element: no markup can begin in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def resource(name: str) -> str:
    """A text that is part of this package."""
    return (files("medseg.report") / name).read_text("utf-8")


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
        "best": text_of(max(dice, default=None), 3),
        "last": text_of(dice[-1] if dice else None, 3),
    }


def _decisions(decisions: Iterable[Decision]) -> dict[str, list[Decision]]:
    groups: dict[str, list[Decision]] = defaultdict(list)
    for decision in decisions:
        groups[decision.configuration].append(decision)
    return dict(sorted(groups.items()))


# ---- words


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
