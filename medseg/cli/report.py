"""``medseg report``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.common import FOLDER, RunFolder
from medseg.core.words import count

if TYPE_CHECKING:
    from medseg.dataset.task import Task
    from medseg.models.package import ModelPackage
    from medseg.plan.plan import Plan
    from medseg.report.page import Counted, Curve, Decision, Flagged, Kind, Overlay, RunPage
    from medseg.report.tables import Scored


# Of the cases that a model wants looked at, the page shows so many of a configuration.
_FLAGGED = 30


@click.command()
@click.argument("runs", nargs=-1, required=True, type=FOLDER, metavar="RUN...")
@click.option("-o", "--output", type=FOLDER, help="The page.  [default: RUN/report.html; of several runs: report.html]")
@click.option("--pdf", is_flag=True, help="Also write a summary of a few pages.")
def report(runs: tuple[Path, ...], output: Path | None, pdf: bool) -> None:
    """Draw one HTML page of RUN: scores, distributions, learning curves, cases; of several runs one over all tasks.

    Beside it stand the same numbers as report.json, metrics.csv and report.md (a table for a paper), or with -o x.html
    as x.json, x.csv and x.md. The page opens from disk and loads nothing.
    """
    if output and output.suffix != ".html":
        raise click.BadParameter("a page's name ends in .html", param_hint="--output")
    if len(runs) > 1:
        if pdf:
            raise click.UsageError("--pdf goes with one run")
        _over_all(runs, output or Path("report.html"))
        return
    from medseg.io.files import write_bytes, write_json, write_text
    from medseg.report.page import report as draw
    from medseg.report.tables import to_csv, to_json, to_markdown

    page, about = _page(RunFolder(runs[0]))
    path = output or runs[0] / "report.html"
    write_text(path, draw(page))
    write_text(path.with_suffix(".md"), to_markdown(page.scored))
    write_text(path.with_suffix(".csv") if output else path.with_name("metrics.csv"), to_csv(page.scored))
    write_json(path.with_suffix(".json"), to_json(page.scored, about))
    if pdf:
        from medseg.report.summary import summary

        write_bytes(path.with_suffix(".pdf"), summary(page))
    click.echo(path)


def _page(folder: RunFolder, *, pictures: bool = True) -> tuple[RunPage, dict[str, Any]]:
    """All that the page of a run shows, and what a program reads of it; without ``pictures`` no scan is read."""
    from dataclasses import asdict

    from medseg.report.page import RunPage
    from medseg.report.published import published

    task, plan = folder.task(), folder.plan()
    folds = folder.folds(task)
    scored, curves = tuple(scored_of(folder, plan)), tuple(_curves(folder, plan))
    flagged = tuple(_flagged(folder, scored))
    packages = {
        f"{one.configuration}, fold {one.fold}": package
        for one in scored
        if (package := folder.package(one.configuration, one.fold))
    }
    done = {one.configuration: [s.fold for s in scored if s.configuration == one.configuration] for one in scored}
    cases = [len({r.case for s in scored if s.configuration == name for r in s.rows}) for name in done]
    page = RunPage(
        title=task.title,
        task=task.name,
        description=task.description,
        cases=len(task.cases),
        folds=len(folds),
        decisions=(*_chosen(folder), *_decisions(plan)),
        scored=scored,
        curves=curves,
        overlays=tuple(_overlays(folder, task, scored, flagged)) if pictures else (),
        flagged=flagged,
        counted=tuple(_counted(folder, plan)),
        published=published(
            task.name,
            cases=min(cases, default=0),
            all_folds=len(folds) == 5 and all(len(one) == 5 for one in done.values()),
            by_subject=len({case.subject for case in task.cases}) < len(task.cases),
        ),
        provenance=_provenance(folder, task, plan, packages),
        commands=tuple(commands(folder, scored)),
        warnings=tuple(_warnings(scored, packages, len(task.cases))),
    )
    shown = {name: getattr(page, name) for name in ("title", "task", "description", "cases", "folds", "provenance")}
    about = shown | {
        "commands": list(page.commands),
        "warnings": list(page.warnings),
        "decisions": [asdict(one) for one in page.decisions],
        "flagged": [asdict(one) for one in flagged],
        "counted": [asdict(one) for one in page.counted],
        "published": [asdict(one) for one in page.published],
    }
    return page, about


def _over_all(runs: tuple[Path, ...], path: Path) -> None:
    """One page over several runs, which links to theirs."""
    import os
    from urllib.parse import quote

    from medseg.io.files import write_text
    from medseg.report.overview import Run, overview

    told = []
    for run in runs:
        page, _ = _page(RunFolder(run), pictures=False)
        theirs = run / "report.html"
        # From "./" on, whatever a folder is called.
        link = f"./{quote(Path(os.path.relpath(theirs, path.parent)).as_posix())}" if theirs.exists() else None
        told.append(Run(page, link))
    write_text(path, overview(told))
    click.echo(path)


def _provenance(folder: RunFolder, task: Task, plan: Plan, packages: Mapping[str, ModelPackage]) -> dict[str, str]:
    """Versions, seeds, hashes of data and models, hardware, time and memory, in words."""
    from medseg.core.provenance import versions

    told = {"data (SHA-256 of what was measured)": folder.fingerprint().digest()[:16], "plan": plan.digest()[:16]}
    told["licence of the data"] = task.licence or "not stated"
    for name, package in packages.items():
        made = package.provenance
        machine = made.get("machine", {})
        parts = [
            f"model {package.digest()[:16]}",
            f"seed {made.get('seed')}",
            f"{made.get('steps')} steps",
            f"{float(made.get('seconds', 0)) / 60:.1f} min",
            *([f"{made['peak_memory_bytes'] / 2**30:.2f} GiB"] if "peak_memory_bytes" in made else []),
            f"{made.get('device')}, {made.get('threads') or 'all'} threads",
            *(
                [f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB"]
                if machine
                else []
            ),
        ]
        told[name] = "; ".join(parts)
    return told | {f"version of {name}": number for name, number in versions().items()}


def _folds(folder: RunFolder, plan: Plan, name: str) -> Iterator[tuple[str, int, Any]]:
    """What a file of that name holds, for every configuration and fold that has one."""
    from medseg.io.files import read_json

    for configuration in plan.configurations:
        for path in sorted((folder.path / configuration).glob(f"fold*/{name}")):
            yield configuration, int(path.parent.name.removeprefix("fold")), read_json(path)


def scored_of(folder: RunFolder, plan: Plan) -> Iterator[Scored]:
    """The scores of every configuration and fold that has some."""
    from medseg.evaluate import calibration
    from medseg.evaluate.score import from_json
    from medseg.io.files import read_json
    from medseg.report.tables import Scored

    for configuration, fold, document in _folds(folder, plan, "metrics.json"):
        known = folder.fold(configuration, fold) / "calibration.json"
        reliable, predicted = calibration.from_json(read_json(known)) if known.exists() else ([], {})
        yield Scored(configuration, fold, tuple(from_json(document)), predicted, tuple(reliable))


def _predictions(folder: RunFolder, one: Scored) -> dict[str, Path]:
    """The label maps of a fold, as far as they are still there."""
    from medseg.io.sidecar import INDEX, read_index

    place = folder.fold(one.configuration, one.fold) / "predictions"
    return read_index(place) if (place / INDEX).exists() else {}


def _flagged(folder: RunFolder, scored: tuple[Scored, ...]) -> Iterator[Flagged]:
    """The cases that the models want looked at, the worst first."""
    from medseg.io.sidecar import flags_in, read_sidecar
    from medseg.report.page import Flagged, case_dice

    found = []
    for one in scored:
        dice = case_dice(one.rows)
        for case, path in _predictions(folder, one).items():
            if why := flags_in(read_sidecar(path)):
                found.append((dice.get(case, 2.0), Flagged(one.configuration, case, why)))
    yield from (flagged for _, flagged in sorted(found, key=lambda pair: (pair[0], pair[1].case)))


def _counted(folder: RunFolder, plan: Plan) -> Iterator[Counted]:
    from medseg.evaluate.instances import from_json
    from medseg.report.page import Counted

    for configuration, fold, document in _folds(folder, plan, "instances.json"):
        yield Counted(configuration, fold, tuple(from_json(document)))


def _curves(folder: RunFolder, plan: Plan) -> Iterator[Curve]:
    from medseg.report.page import Curve

    for configuration, fold, document in _folds(folder, plan, "log.json"):
        yield Curve(configuration, fold, tuple(document["records"]))


def _overlays(
    folder: RunFolder, task: Task, scored: tuple[Scored, ...], flagged: tuple[Flagged, ...]
) -> Iterator[Overlay]:
    """Best, median and worst case of each configuration, and those that are flagged, read anew from their files."""
    from medseg.dataset.task import load_case
    from medseg.evaluate.score import require_grid
    from medseg.io.sidecar import read_prediction
    from medseg.report.figures import trimmed
    from medseg.report.page import Overlay, case_dice, pick_cases

    for configuration in dict.fromkeys(one.configuration for one in scored):
        mine = [one for one in scored if one.configuration == configuration]
        rows = [row for one in mine for row in one.rows]
        index = {case: path for one in mine for case, path in _predictions(folder, one).items()}
        dice, why = case_dice(rows), {one.case: one.why for one in flagged if one.configuration == configuration}
        chosen: dict[str, Kind] = dict.fromkeys(list(why)[:_FLAGGED], "flagged")
        chosen |= {case: kind for kind, case in pick_cases(rows).items()}
        for case, kind in chosen.items():
            if case not in index:
                continue
            volume, reference = load_case(task, task.case(case))
            prediction = read_prediction(index[case], task.labels, case)
            require_grid(prediction.grid, volume.grid, case)
            seen = trimmed(volume.values[0], volume.grid, reference, prediction)
            yield Overlay(case, configuration, kind, *seen, dice.get(case), why.get(case, ()))


def _chosen(folder: RunFolder) -> Iterator[Decision]:
    """The model that `medseg choose` made, where it did."""
    from medseg.models.package import INDEX, load_package
    from medseg.report.page import Decision

    if not (folder.model / INDEX).exists():
        return
    package = load_package(folder.model)
    if known := package.evaluation:
        networks = f"{package.configuration_name}, the average of {len(package.members)} networks"
        reason = f"the best mean Dice out of fold: {known.compared[0].dice}, on {known.compared[0].cases} cases"
        if package.refinement:
            reason += (
                f"; {known.dice} with the post-processing below, which the model applies. The tables and pictures of "
                "this page show the folds' predictions without it"
            )
        yield Decision("model", networks, reason)
        for step in package.refinement.steps if package.refinement else ():
            yield Decision(f"post-processing of {step.name}", str(step), "it helps out of fold")


def _decisions(plan: Plan) -> Iterator[Decision]:
    from medseg.report.page import Decision

    rules = plan.normalisation
    kinds = ", ".join(f"{n.channel}: {n.kind}" for n in rules.value)
    yield Decision("normalisation", kinds, rules.reason)
    training = plan.training
    augmentation = training.augmentation.value.model_dump()
    varied = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in augmentation.items() if v != ())
    yield Decision("augmentation", varied, training.augmentation.reason)
    yield Decision("learning rate", f"{training.learning_rate.value:g}", training.learning_rate.reason)
    yield Decision("foreground", f"{training.foreground_share.value:g}", training.foreground_share.reason)
    for name, c in plan.configurations.items():
        spacing = " x ".join(f"{s:.3g}" for s in c.spacing.value)
        yield Decision("spacing (mm)", spacing, c.spacing.reason, name)
        yield Decision("patch (voxels)", " x ".join(map(str, c.patch.value)), c.patch.reason, name)
        yield Decision("batch", str(c.batch.value), c.batch.reason, name)
        features = ", ".join(map(str, c.network.value.features))
        yield Decision("network", f"{c.network.value.family} with {features} features", c.network.reason, name)


def commands(folder: RunFolder, scored: Sequence[Scored]) -> Iterator[str]:
    """The commands that make the run's results again, from its plan and folds."""
    yield "medseg plan TASK -o RUN --no-measure"
    yield "# THIS is the folder of this run. The same plan and folds, whatever budget and machine they were made for:"
    yield "cp THIS/plan.json THIS/folds.json RUN/"
    for configuration in dict.fromkeys(one.configuration for one in scored):
        yield f"medseg preprocess RUN -c {configuration}"
        for one in scored:
            if one.configuration == configuration:
                yield from _fold_commands(folder, one)
    if folder.model.exists():
        yield f"medseg choose RUN{_among(folder)}"
    yield "medseg report RUN"


def _among(folder: RunFolder) -> str:
    """Which folds of which configurations `medseg choose` chose among, as options."""
    from medseg.models.package import INDEX, load_package

    known = load_package(folder.model).evaluation if (folder.model / INDEX).exists() else None
    if known is None:
        return ""
    partial = any(len(one.folds) < known.of_folds for one in known.compared)
    among = "".join(f" -c {one.configuration}" for one in known.compared)
    return f"{among}{' --partial' if partial else ''}{' --crf' if known.with_crf else ''}"


def _fold_commands(folder: RunFolder, one: Scored) -> Iterator[str]:
    package = f"RUN/{one.configuration}/fold{one.fold}"
    yield f"medseg train RUN -c {one.configuration} --fold {one.fold} {_length(folder, one)}".rstrip()
    yield f"medseg predict TASK --held-out -m {package}/model -o {package}/predictions"
    yield f"medseg evaluate {package}/predictions TASK -o {package}{_tolerances(one)}"


def _tolerances(one: Scored) -> str:
    """The options that its cases were scored with."""
    import shlex

    each = {row.name: f"{row.tolerance_mm:g}" for row in one.rows}
    tubes = "".join(f" --tube {shlex.quote(name)}" for name in _tubes(one))
    if len(set(each.values())) == 1:
        return f" --tolerance {next(iter(each.values()))}{tubes}"
    return "".join(f" --tolerance {shlex.quote(f'{name}={mm}')}" for name, mm in each.items()) + tubes


def _tubes(one: Scored) -> list[str]:
    """What was scored as tubes, where that is not what goes by its name."""
    from medseg.core.labels import Label, LabelSet
    from medseg.evaluate.form import tubes

    labels = LabelSet(tuple(Label(name, number) for number, name in {row.label: row.name for row in one.rows}.items()))
    scored = {row.name for row in one.rows if row.cldice is not None}
    expected = {labels.name_of(number) for number in tubes(labels)}
    return [] if scored <= expected else sorted(scored)


def _length(folder: RunFolder, one: Scored) -> str:
    """The options that a fold was trained with."""
    from medseg.io.files import read_json

    log = read_json(folder.fold(one.configuration, one.fold) / "log.json")
    return str(log.get("options", ""))


def _warnings(scored: tuple[Scored, ...], packages: Mapping[str, ModelPackage], cases: int) -> Iterator[str]:
    for configuration in dict.fromkeys(one.configuration for one in scored):
        seen = {row.case for one in scored if one.configuration == configuration for row in one.rows}
        if len(seen) < cases:
            yield f"{configuration}: {len(seen)} of {cases} cases were scored, by the folds that were trained"
    for name, package in packages.items():
        if setbacks := package.provenance.get("setbacks"):
            yield f"{name}: training went back {count(int(setbacks), 'time')} from a loss that was no number"
