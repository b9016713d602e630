"""One page over the runs of several tasks: what each reached, beside what others report, with links to their pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medseg.core.errors import InputError
from medseg.core.look import COLOURS
from medseg.evaluate.score import summarise
from medseg.evaluate.statistics import intervals
from medseg.report.page import RunPage, environment, headline, resource
from medseg.report.tables import by_configuration, interval, text_of


@dataclass(frozen=True)
class Run:
    """A run, and where its own page is, from the page over all; None where it has none."""

    page: RunPage
    link: str | None


def overview(runs: Sequence[Run]) -> str:
    """The page as one HTML text; runs in the order given. Raises InputError where two have one task's name."""
    names = [run.page.task for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two runs are of {twice[0]}", "Compare runs of one task with `medseg compare`")
    lines = [line for run in runs for line in _lines(run)]
    told = [
        {"task": run.page.task, "title": run.page.title, "headline": headline(run.page), "link": run.link}
        for run in runs
    ]
    warnings = [f"{run.page.task}: {warning}" for run in runs for warning in run.page.warnings]
    context = {
        "lines": lines,
        "runs": told,
        "warnings": warnings,
        "published": any(run.page.published for run in runs),
        "structure_colours": COLOURS,
        "script": resource("tables.js"),
    }
    return environment().get_template("overview.html.j2").render(context)


def _lines(run: Run) -> list[dict[str, Any]]:
    found = []
    for name, rows in by_configuration(run.page.scored).items():
        *organs, overall = summarise(rows)
        sure = intervals(rows, ("dice",))
        published = next((p for p in run.page.published if p.alike), None) or next(iter(run.page.published), None)
        found.append(
            {
                "task": run.page.task,
                "link": run.link,
                "configuration": name,
                "cases": overall.cases,
                "organs": len(organs),
                "dice": text_of(overall.dice_mean, 3),
                "interval": interval(sure.get((None, "dice"))) or "–",
                "by_organ": ", ".join(f"{one.name} {text_of(one.dice_mean, 3)}" for one in organs[:6])
                + ("…" if len(organs) > 6 else ""),
                "nsd": text_of(overall.nsd_mean, 3),
                "hd95": text_of(overall.hd95_mean_mm, 1),
                "missed": overall.missed,
                "flagged": sum(one.configuration == name for one in run.page.flagged),
                "published": f"{text_of(published.mean, 3)} {published.system}" if published else "–",
                "alike": published.alike if published else True,
                "protocol": published.protocol if published else "",
            }
        )
    return found
