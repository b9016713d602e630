"""``medseg report``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.common import FOLDER, RunFolder

if TYPE_CHECKING:
    from medseg.dataset.task import Task
    from medseg.plan.plan import Plan
    from medseg.report.page import Curve, Decision, Overlay, Scored


@click.command()
@click.argument("run", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="The page.  [default: RUN/report.html]")
def report(run: Path, output: Path | None) -> None:
    """Draw one HTML page of RUN: scores, distributions, learning curves, cases.

    A Markdown table is written beside it.
    """
    from medseg.core.provenance import versions
    from medseg.io.files import write_text
    from medseg.report.page import RunPage, to_markdown
    from medseg.report.page import report as draw

    folder = RunFolder(run)
    task, plan = folder.task(), folder.plan()
    folds = folder.folds(task)
    scored, curves = tuple(_scored(folder, plan)), tuple(_curves(folder, plan))
    page = RunPage(
        title=task.title,
        task=task.name,
        description=task.description,
        cases=len(task.cases),
        folds=len(folds),
        decisions=(*_chosen(folder), *_decisions(plan)),
        scored=scored,
        curves=curves,
        overlays=tuple(_overlays(folder, task, scored)),
        provenance={"plan": plan.digest()[:16], "licence of the data": task.licence or "not stated", **versions()},
        commands=tuple(_commands(folder, scored)),
        warnings=tuple(_warnings(scored, len(task.cases))),
    )
    path = output or run / "report.html"
    write_text(path, draw(page))
    write_text(path.with_suffix(".md"), to_markdown(scored))
    click.echo(path)


def _folds(folder: RunFolder, plan: Plan, name: str) -> Iterator[tuple[str, int, Any]]:
    """What a file of that name holds, for every configuration and fold that has one."""
    from medseg.io.files import read_json

    for configuration in plan.configurations:
        for path in sorted((folder.path / configuration).glob(f"fold*/{name}")):
            yield configuration, int(path.parent.name.removeprefix("fold")), read_json(path)


def _scored(folder: RunFolder, plan: Plan) -> Iterator[Scored]:
    from medseg.evaluate.score import from_json
    from medseg.report.page import Scored

    for configuration, fold, document in _folds(folder, plan, "metrics.json"):
        yield Scored(configuration, fold, tuple(from_json(document)))


def _curves(folder: RunFolder, plan: Plan) -> Iterator[Curve]:
    from medseg.report.page import Curve

    for configuration, fold, document in _folds(folder, plan, "log.json"):
        yield Curve(configuration, fold, tuple(document["records"]))


def _overlays(folder: RunFolder, task: Task, scored: tuple[Scored, ...]) -> Iterator[Overlay]:
    """Best, median and worst case of each configuration, read anew from their files."""
    from medseg.dataset.task import load_case
    from medseg.io.sidecar import read_index, read_prediction
    from medseg.report.page import Overlay, case_dice, pick_cases

    for configuration in dict.fromkeys(one.configuration for one in scored):
        mine = [one for one in scored if one.configuration == configuration]
        rows = [row for one in mine for row in one.rows]
        fold_of = {row.case: one.fold for one in mine for row in one.rows}
        for kind, case in pick_cases(rows).items():
            volume, reference = load_case(task, task.case(case))
            index = read_index(folder.fold(configuration, fold_of[case]) / "predictions")
            prediction = read_prediction(index[case], task.labels, case)
            yield Overlay(
                case=case,
                configuration=configuration,
                kind=kind,
                image=volume.values[0],
                grid=volume.grid,
                reference=reference,
                prediction=prediction,
                dice=case_dice(rows)[case],
            )


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


def _commands(folder: RunFolder, scored: tuple[Scored, ...]) -> Iterator[str]:
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
    if len(set(each.values())) == 1:
        return f" --tolerance {next(iter(each.values()))}"
    return "".join(f" --tolerance {shlex.quote(f'{name}={mm}')}" for name, mm in each.items())


def _length(folder: RunFolder, one: Scored) -> str:
    """The options that a fold was trained with."""
    from medseg.io.files import read_json

    log = read_json(folder.fold(one.configuration, one.fold) / "log.json")
    return str(log.get("options", ""))


def _warnings(scored: tuple[Scored, ...], cases: int) -> Iterator[str]:
    for configuration in dict.fromkeys(one.configuration for one in scored):
        seen = {row.case for one in scored if one.configuration == configuration for row in one.rows}
        if len(seen) < cases:
            yield f"{configuration}: {len(seen)} of {cases} cases were scored, by the folds that were trained"
