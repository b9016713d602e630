"""``medseg check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.common import FOLDER, progress, table
from medseg.core.words import count

if TYPE_CHECKING:
    from medseg.dataset.check import CaseCheck, CheckReport


@click.command()
@click.argument("task", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option("-o", "--output", type=FOLDER, help="Also write the JSON to this file.")
def check(task: Path, as_json: bool, output: Path | None) -> None:
    """Read every case of TASK and say what is wrong with it.

    Exit status 2 where something must be mended.
    """
    from medseg.dataset.check import check as check_task
    from medseg.io.files import write_json

    report = check_task(task, progress=progress("check"))
    if output:
        write_json(output, report.as_json())
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=1))
    else:
        rows = [["case", "voxels", "spacing (mm)", "axes", "channels", "labels", "verdict"]]
        click.echo(table(rows + [_row(case) for case in report.cases]))
        for problem in report.problems:
            click.echo(f"{problem.severity}: {problem}")
        for case in report.cases:
            for problem in case.problems:
                click.echo(f"{problem.severity}: case {case.id}: {problem}")
        click.echo(_summary(report))
    if not report.ok:
        raise SystemExit(2)


def _summary(report: CheckReport) -> str:
    counts = report.as_json()["counts"]
    text = (
        f"{report.task}: {count(len(report.cases), 'case')}, {counts['ok']} ok, {counts['warning']} with warnings, "
        f"{counts['error']} with errors"
    )
    for severity in ("error", "warning"):
        if found := sum(problem.severity == severity for problem in report.problems):
            text += f"; {count(found, severity)} of the dataset"
    return f"{text}. {'Fit for use.' if report.ok else 'Not fit for use.'}"


def _row(case: CaseCheck) -> list[str]:
    return [
        case.id,
        "x".join(map(str, case.shape)) if case.shape else "-",
        "x".join(f"{s:.3g}" for s in case.spacing) if case.spacing else "-",
        case.orientation or "-",
        str(case.channels) if case.channels else "-",
        " ".join(map(str, case.labels)) or "-",
        case.verdict,
    ]
