"""``medseg choose``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.common import FOLDER, RunFolder, progress, table, threads_option, use_cores
from medseg.cli.folds import FoldFolder, Lack
from medseg.core.errors import InputError

if TYPE_CHECKING:
    from medseg.core.volume import LabelMap
    from medseg.dataset.task import Task
    from medseg.models.package import ModelPackage
    from medseg.models.refinement import Refinement
    from medseg.plan.plan import Plan

# Cases on which engines are compared.
_COMPARED = 3


@click.command()
@click.argument("run", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="The package.  [default: RUN/model]")
@click.option("-c", "--configuration", "configurations", multiple=True, help="Only among these; may be repeated.")
@click.option("--partial", is_flag=True, help="Go on with the folds there are.")
@click.option("--crf", is_flag=True, help="Try moving borders to the scans' edges too. Takes some seconds a case.")
@threads_option
def choose(
    run: Path, output: Path | None, configurations: tuple[str, ...], partial: bool, crf: bool, threads: int | None
) -> None:
    """Make one model of the folds of RUN, by what they reached on their held-out cases.

    The configuration with the best mean Dice is taken, and the networks of its folds are averaged;
    for each structure, keeping the largest piece or dropping small ones is tried (and with --crf moving
    all borders to edges), and kept where it helps beyond luck. README.md in the package says how good it
    is, and what was decided why. Needs each fold's model, and its predictions from `medseg predict TASK --held-out`.
    """
    cores = use_cores(threads)
    from medseg.dataset.task import load_case, load_image, load_labels, require_same_grid
    from medseg.evaluate.score import ignoring
    from medseg.infer.agreement import measure
    from medseg.infer.predict import Predictor
    from medseg.infer.refine import post_processed
    from medseg.io.files import new_folder
    from medseg.io.sidecar import read_index, read_prediction
    from medseg.models.package import INDEX, load_package, record_engines, save_package
    from medseg.preprocess.regrid import preprocess
    from medseg.train.choose import choose as choose_model

    folder = RunFolder(run)
    task, plan = folder.task(), folder.plan()
    place = new_folder(output or folder.model, holds=INDEX)
    click.get_current_context().with_resource(folder.alone("choose"))
    folds = folder.folds(task)
    trained = _trained(folder, task, plan, configurations, partial)
    paths = {
        (name, case): path
        for name, packages in trained.items()
        for number, package in packages.items()
        for case, path in read_index(folder.fold(name, number) / "predictions").items()
        if case in package.held_out
    }

    def load(name: str, case: str) -> tuple[LabelMap, LabelMap]:
        return refine(name, case, None)

    def refine(name: str, case: str, refinement: Refinement | None) -> tuple[LabelMap, LabelMap]:
        reference = load_labels(task, task.case(case))
        prediction = read_prediction(paths[name, case], task.labels, case)
        require_same_grid(prediction, reference, case)
        used = next(iter(trained[name].values())).plan
        if refinement is not None:
            scan, intensities = load_image(task, task.case(case)), used.normalisation.value
            prediction = post_processed(prediction, scan, refinement, intensities)[0]
        ignored = used.training.ignore_label
        return ignoring(prediction, reference, ignored, case=case)

    package = choose_model(
        trained,
        load,
        task,
        folder.fingerprint(),
        of_folds=len(folds),
        refine=refine if crf else None,
        progress=progress("choose"),
    )
    save_package(place, package)
    saved = load_package(place)
    some = [case for p in trained[package.configuration_name].values() for case in p.held_out]
    some = some[:: max(1, len(some) // _COMPARED)][:_COMPARED]
    volumes = {case: load_case(task, task.case(case))[0] for case in some}
    first = Predictor(saved.previous, threads=cores) if saved.previous else None
    images = {
        case: preprocess(
            volume, saved.plan, saved.configuration, first.predict(volume).label_map if first else None
        ).values
        for case, volume in volumes.items()
    }
    record_engines(place, measure(saved, images, cores))
    _show(saved, place)


def _trained(
    folder: RunFolder, task: Task, plan: Plan, names: tuple[str, ...], partial: bool
) -> dict[str, dict[int, ModelPackage]]:
    """The folds of each configuration (of those that were begun, unless named). InputError for a fold that
    lacks something; with ``partial`` such a fold is left out, and told."""
    for name in names:
        plan.configuration(name)
    begun = names or [n for n in plan.configurations if any((folder.path / n).glob("fold*/model"))]
    found: dict[str, dict[int, ModelPackage]] = {}
    lacks: list[Lack] = []
    for name in begun:
        for number, cases in enumerate(folder.folds(task)):
            fold = FoldFolder(folder, name, number, cases)
            package = fold.whole(task)
            if isinstance(package, Lack):
                lacks.append(package)
            else:
                found.setdefault(name, {})[number] = package
    if lacks and not partial:
        more = f" ({len(lacks) - 1} more folds lack something)" if len(lacks) > 1 else ""
        raise InputError(
            f"{lacks[0].what}{more}",
            f"Run `{lacks[0]}`, or `medseg train {folder.path} --all-folds` for all, "
            "or add --partial to go on with the folds there are",
        )
    if not found:
        raise InputError(f"{folder.path} has no fold with a model and its predictions", "Train and predict one first")
    for lack in lacks:
        click.echo(f"left out: {lack.what}", err=True)
    return found


def _show(package: ModelPackage, place: Path) -> None:
    from medseg.models.refinement import Crf

    known = package.evaluation
    if known is None:
        return
    rows = [["configuration", "folds", "cases", "Dice", "95 % interval", "the first is better by"]]
    for one in known.compared:
        ends = "-" if one.dice.low is None else f"{one.dice.low:.3f} to {one.dice.high:.3f}"
        behind = "" if one.behind is None else str(one.behind)
        rows.append([one.configuration, str(len(one.folds)), str(one.cases), f"{one.dice.mean:.3f}", ends, behind])
    click.echo(table(rows, right=(1, 2, 3)))
    for step in package.refinement.steps if package.refinement else ():
        click.echo(f"post-processing of {step.name}: {step}")
    for tried in known.tried:
        if isinstance(tried.rule, Crf):
            click.echo(f"tried: {tried.rule}; Dice {tried.gain.mean:+.4f}, {'kept' if tried.kept else 'not kept'}")
    if known.dice.low is None:
        click.echo(f"{known.subjects} subjects are too few to say how good it is on others: there is no interval")
    networks = f"{len(package.members)} network{'s' if len(package.members) > 1 else ''}"
    click.echo(f"{package.name}: {networks}, Dice {known.dice} out of fold; {place}")
