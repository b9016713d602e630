"""``medseg compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.common import FOLDER, table
from medseg.core.errors import InputError

if TYPE_CHECKING:
    from medseg.evaluate.compare import Change, Difference, Ranking
    from medseg.evaluate.score import CaseMetrics


@click.command()
@click.argument("runs", nargs=-1, required=True, type=FOLDER, metavar="RUN_A RUN_B [RUN]...")
@click.option(
    "--by", metavar="COLUMN", default="dice", show_default=True, help="Of metrics.csv: nsd, hd95_mm, recall and others."
)
@click.option("--common", is_flag=True, help="Compare the cases and labels that all runs have, if some have more.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the tables.")
def compare(runs: tuple[Path, ...], by: str, common: bool, as_json: bool) -> None:
    """Compare runs on the same cases: is B better than A, of which structures, and how sure is that?

    A RUN is what `medseg evaluate` wrote (metrics.json or its folder), or a configuration of a run with all of its
    folds, as run/3d. Subjects are compared, not cases. Of two runs each structure has its change with a 95 % interval,
    Wilcoxon's signed rank test with Holm's correction, and the rank-biserial correlation as effect (1: B is better in
    every subject). Of more they are put in order, with how sure that is under resampling, and the first is compared
    with each other one.
    """
    import json
    from dataclasses import asdict

    from medseg.evaluate import compare as side_by_side

    if len(runs) < 2:
        raise click.UsageError("Name two runs or more")
    if len(set(runs)) < len(runs):
        raise click.UsageError("A run is named twice")
    rows = side_by_side.paired({str(run): _rows(run) for run in runs}, common=common)
    ranking = side_by_side.rank(rows, by)
    document: dict[str, Any] = {"format": 1, "by": by, "runs": list(rows), "ranking": asdict(ranking)}
    if len(runs) == 2:
        first, second = rows.values()
        lines, cases = side_by_side.compare(first, second, by), side_by_side.changed(first, second, by)
        document |= {"differences": _plain(lines), "changed": [asdict(one) for one in cases]}
    else:
        best = ranking.places[0].run
        pairs = {one.run: side_by_side.compare(rows[best], rows[one.run], by)[0] for one in ranking.places[1:]}
        document |= {"best": best, "behind": {name: _plain([line])[0] for name, line in pairs.items()}}
    if as_json:
        click.echo(json.dumps(document))
    elif len(runs) == 2:
        _show_two(list(rows), lines, cases, by)
    else:
        _show_many(ranking, pairs)


def _plain(lines: Sequence[Difference]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [asdict(line) | {"change": line.change.model_dump() if line.change else None} for line in lines]


def _rows(run: Path) -> list[CaseMetrics]:
    """What was scored of a run, over all folds. InputError where nothing was, or several configurations."""
    from medseg.evaluate.score import from_json
    from medseg.io.files import read_json

    return [row for path in _metrics(run) for row in from_json(read_json(path))]


def _metrics(run: Path) -> list[Path]:
    if run.is_file():
        return [run]
    if (run / "metrics.json").exists():
        return [run / "metrics.json"]
    if folds := sorted(run.glob("fold*/metrics.json")):
        return folds
    configurations = sorted({path.parent.parent for path in run.glob("*/fold*/metrics.json")})
    if len(configurations) > 1:
        names = " or ".join(str(one) for one in configurations)
        raise InputError(f"{run} has several configurations", f"Name one: {names}")
    if not configurations:
        raise InputError(f"nothing of {run} has been scored", "Score its predictions with `medseg evaluate`")
    return sorted(configurations[0].glob("fold*/metrics.json"))


def _show_two(runs: list[str], lines: Sequence[Difference], cases: Sequence[Change], by: str) -> None:
    first, second = runs
    click.echo(f"A: {first}\nB: {second}\n")
    shown = [[by, "subjects", "A", "B", "B - A", "p", "p (Holm)", "effect", "B better, worse, same"]]
    for line in lines:
        figures = (_figure(line.first), _figure(line.second), str(line.change or "-"))
        counts = f"{line.better}, {line.worse}, {line.same}"
        sure = (_p(line.p), _p(line.p_holm), _signed(line.effect))
        shown.append([line.name, str(line.subjects), *figures, *sure, counts])
    click.echo(table(shown, right=range(1, len(shown[0]))))
    if cases:
        click.echo("\nWhat changed most:")
        changed = [["case", "structure", "A", "B"]]
        changed += [[one.case, one.name, _figure(one.first), _figure(one.second)] for one in cases]
        click.echo(table(changed, right=(2, 3)))


def _show_many(ranking: Ranking, behind: Mapping[str, Difference]) -> None:
    shown = [
        ["rank", "run", ranking.field, "ranks (95 %)", "first in", "mean rank of cases", "to the first", "p (alone)"]
    ]
    for one in ranking.places:
        line = behind.get(one.run)
        away = (str(line.change or "-"), _p(line.p)) if line else ("", "")
        ranks = f"{one.low:g} to {one.high:g}"
        cells = (_figure(one.mean), ranks, f"{one.share:.0%}", f"{one.rank_of_cases:.2f}")
        shown.append([f"{one.rank:g}", one.run, *cells, *away])
    click.echo(table(shown, right=(0, *range(2, len(shown[0])))))
    tau = "-" if ranking.tau is None else f"{ranking.tau:.2f}"
    click.echo(f"\n{ranking.subjects} subjects. The order agrees with those of bootstrap draws by Kendall's tau {tau}.")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
