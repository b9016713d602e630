"""``medseg inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.common import FOLDER, progress, table

if TYPE_CHECKING:
    from medseg.io.dicom import Series
    from medseg.io.scan import ImageFile


@click.command()
@click.argument("scan", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the tables.")
def inspect(scan: Path, as_json: bool) -> None:
    """List what SCAN holds: a DICOM or image file, a folder with all below it, or a zip.

    The number before a DICOM series chooses it: predict SCAN --series N. No patient's name,
    identifier or UID is shown. Exit status 2 where nothing can be used.
    """
    from medseg.io.scan import look

    series, files = look(scan, progress=progress("inspect", unit="file"))
    if as_json:
        record = {"format": 1, "series": [_series(s) for s in series], "files": [_file(f) for f in files]}
        click.echo(json.dumps(record, indent=1))
    else:
        _show(series, files)
    problems = [s.problem for s in series] + [f.problem for f in files]
    if all(problems):
        raise SystemExit(2)


def _show(series: list[Series], files: list[ImageFile]) -> None:
    if series:
        rows = [["series", "scanner's", "modality", "description", "slices", "size", "spacing (mm)", "axes", "verdict"]]
        click.echo(table(rows + [_row(s) for s in series], right=(0, 1, 4)))
        for one in series:
            for note in one.notes:
                click.echo(f"note: series {one.number}: {note}")
            if one.problem and one.kind == "image":
                click.echo(f"refused: series {one.number}: {one.problem}")
    if series and files:
        click.echo()
    if files:
        rows = [["file", "size", "spacing (mm)", "axes", "channels", "verdict"]]
        for file in files:
            verdict = "usable" if file.problem is None else "refused"
            rows.append(
                [file.name, _size(file.size), _mm(file.spacing), file.axes or "-", _word(file.channels), verdict]
            )
        click.echo(table(rows, right=(4,)))
        for file in files:
            if file.problem:
                click.echo(f"refused: {file.problem}")


def _row(series: Series) -> list[str]:
    verdict = "usable" if series.usable else "refused" if series.kind == "image" else series.kind
    return [
        str(series.number),
        _word(series.series_number),
        series.modality,
        series.description,
        str(series.slices),
        _size(series.size),
        _mm(series.spacing),
        series.grid.orientation if series.grid else "-",
        verdict,
    ]


def _series(series: Series) -> dict[str, Any]:
    return {
        "number": series.number,
        "series_number": series.series_number,
        "modality": series.modality,
        "description": series.description,
        "kind": series.kind,
        "slices": series.slices,
        "size": series.size,
        "spacing": series.spacing,
        "axes": series.grid.orientation if series.grid else None,
        "usable": series.usable,
        "problem": str(series.problem) if series.problem else None,
        "notes": list(series.notes),
    }


def _file(file: ImageFile) -> dict[str, Any]:
    return {
        "file": file.name,
        "size": file.size,
        "spacing": file.spacing,
        "axes": file.axes,
        "channels": file.channels,
        "usable": file.problem is None,
        "problem": str(file.problem) if file.problem else None,
    }


def _word(value: int | None) -> str:
    return "-" if value is None else str(value)


def _size(size: tuple[int, ...] | None) -> str:
    return "x".join(map(str, size)) if size else "-"


def _mm(spacing: tuple[float, ...] | None) -> str:
    return "x".join(f"{s:.3g}" for s in spacing) if spacing else "-"
