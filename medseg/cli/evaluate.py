"""``medseg evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.common import FOLDER, available_cores, progress, table, threads_option
from medseg.core.errors import InputError
from medseg.core.words import count

if TYPE_CHECKING:
    from medseg.core.instances import InstanceMap
    from medseg.core.volume import LabelMap, Volume
    from medseg.dataset.task import Case, Task
    from medseg.evaluate.instances import InstanceSummary, Matches
    from medseg.evaluate.score import CaseMetrics, LabelSummary
    from medseg.models.evaluation import Figure


class Tolerance(click.ParamType[tuple[str, float]]):
    """A length in mm, for all labels ("") or, as ``liver=7``, for one: its name and the length."""

    name = "[label=]mm"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """The label's name, "" for all, and the length."""
        if isinstance(value, tuple):
            return value
        name, _, length = str(value).rpartition("=")
        try:
            mm = float(length)
        except ValueError:
            mm = -1.0
        if not 0 <= mm < float("inf"):
            self.fail(f"{value!r} is no length in mm; write 2 or liver=7", param, ctx)
        return name, mm


@click.command()
@click.argument("predictions", type=FOLDER)
@click.argument("task", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="Folder for metrics.csv and metrics.json.  [default: PREDICTIONS]")
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    type=Tolerance(),
    help="Of the NSD, in mm, for all labels or for one; may be repeated.  [default: that of a Decathlon task, else 2]",
)
@click.option(
    "--tube", "tubes", multiple=True, metavar="LABEL", help="Has a clDice; may be repeated.  [default: by its name]"
)
@click.option("--partial", is_flag=True, help="Score the cases that are there, though others of TASK are not.")
@click.option("--instances", is_flag=True, help="Count things too, also those of a model that only labels voxels.")
@click.option(
    "--iou",
    "ious",
    type=click.FloatRange(min=0, max=1, min_open=True),
    multiple=True,
    help="From which overlap on a thing is found; may be repeated.  [default: 0.1, 0.3 and 0.5]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@threads_option
def evaluate(
    predictions: Path,
    task: Path,
    output: Path | None,
    tolerances: tuple[tuple[str, float], ...],
    tubes: tuple[str, ...],
    partial: bool,
    instances: bool,
    ious: tuple[float, ...],
    as_json: bool,
    threads: int | None,
) -> None:
    """Score a folder of PREDICTIONS against the labels of TASK.

    PREDICTIONS is what `medseg predict` wrote, or any folder with a label map for each case of TASK, named as the case
    is, with or without _seg.

    Where the model was trained to ignore a label, voxels that have it do not count.

    Where the predictions have instances, or with --instances, these are scored too, into instances.csv (each
    thing found, missed or invented) and instances.json. A label map without instances has one wherever voxels
    of one label touch, of score 1; so has a TASK without instancesTr.

    Where there are probabilities (`medseg predict --save-probabilities`), calibration.json says whether they mean
    what they say.
    """
    import json

    from medseg.dataset.task import load_labels, load_task
    from medseg.evaluate import calibration
    from medseg.evaluate import instances as things
    from medseg.evaluate.score import score, summarise, to_csv, to_json
    from medseg.evaluate.statistics import intervals
    from medseg.io.files import write_json, write_text
    from medseg.io.sidecar import (
        expected_in,
        ignored_in,
        probabilities_in,
        read_instances,
        read_prediction,
        read_sidecar,
        tells_instances,
    )

    reference = load_task(task)
    index = _index(predictions, reference, partial=partial)
    allowed, tubular = _tolerances(tolerances, reference), _numbers(tubes, reference)
    told = {case: read_sidecar(path) for case, path in index.items()}
    counted = instances or bool(ious) or _have_instances(told)
    rows: list[CaseMetrics] = []
    matches: list[Matches] = []
    reliable = []
    expected: dict[str, Mapping[int, float]] = {}
    for case, path in progress("evaluate")(index.items(), len(index)):
        predicted = read_prediction(path, reference.labels, case)
        one, ignored = reference.case(case), ignored_in(told[case])
        truth = load_labels(reference, one)
        if counted:
            theirs = read_instances(path, reference.labels, case) if tells_instances(told[case]) else None
            matches.extend(_matched(reference, one, theirs, predicted, truth, ignored))
        if probable := probabilities_in(told[case], path):
            reliable.append(calibration.sums(_shares(probable, case), truth, case=case, ignored=ignored))
        expected[case] = expected_in(told[case], reference.labels)
        rows += score(
            predicted,
            truth,
            case=case,
            subject=one.subject,
            tolerance_mm={n: v for n, v in allowed.items() if n != ignored},
            tubular=tubular,
            ignored=ignored,
            threads=threads or available_cores(),
        )
    document = to_json(rows, provenance={"task": reference.name})
    folder = output or predictions
    cuts = tuple(sorted(set(ious))) or things.IOUS
    summaries = things.summarise(matches, ious=cuts)
    for stale in ("instances.csv", "instances.json", "calibration.json"):
        (folder / stale).unlink(missing_ok=True)  # of an earlier scoring
    if counted:
        document["instances"] = things.to_json(summaries, provenance={"task": reference.name})
        write_text(folder / "instances.csv", things.to_csv(things.rows(matches, iou=cuts[0])))
        write_json(folder / "instances.json", document["instances"])
    names = {label.number: label.name for label in reference.labels}
    known = calibration.to_json(calibration.reliability(reliable, names), expected)
    if reliable or any(expected.values()):
        write_json(folder / "calibration.json", known)
    write_text(folder / "metrics.csv", to_csv(rows))
    write_json(folder / "metrics.json", {k: v for k, v in document.items() if k != "instances"})
    if as_json:
        click.echo(json.dumps(document))
        return
    _show(summarise(rows), rows, intervals(rows, ("dice",)))
    if summaries:
        click.echo()
        _show_instances(summaries)


def _index(predictions: Path, task: Task, *, partial: bool) -> dict[str, Path]:
    """The label map of each case. InputError for a case without a reference, and where a folder that medseg did not
    write lacks a case of the task, unless ``partial``."""
    from medseg.io.sidecar import INDEX, by_name, read_index

    if (predictions / INDEX).exists():
        index = read_index(predictions)
        if not index:
            raise InputError(f"{predictions} holds no prediction", "Predict some cases first")
    else:
        index = by_name(predictions)
        labelled = [case.id for case in task.cases]
        if missing := [case for case in labelled if case not in index]:
            if len(missing) == len(labelled):
                name = next(iter(index))
                raise InputError(
                    f"none of the files of {predictions} is named as a case of {task.name} ({name}, {missing[0]})",
                    "Name each as its case, with or without _seg",
                )
            if not partial:
                has = "has" if len(missing) == 1 else "have"
                fault = f"{count(len(missing), 'case')} of {task.name} {has} no prediction, like {missing[0]}"
                raise InputError(fault, "Predict them too, or score the others with --partial")
    for case in index:
        task.case(case)
    return index


def _numbers(names: Sequence[str], task: Task) -> set[int] | None:
    """Of labels by name; None for no name."""
    by_name = {label.name: label.number for label in task.labels}
    for name in names:
        if name not in by_name:
            raise InputError(f"{task.name} has no label {name!r}", f"Its labels are {task.labels}")
    return {by_name[name] for name in names} or None


def _tolerances(given: Sequence[tuple[str, float]], task: Task) -> dict[int, float]:
    """In mm, of each label: as ``given``, else those of the Decathlon for its tasks, else 2."""
    from medseg.evaluate.score import DECATHLON_MM, TOLERANCE_MM

    found = dict.fromkeys(task.labels.numbers, DECATHLON_MM.get(task.name, TOLERANCE_MM))
    for name, value in sorted(given, key=lambda one: bool(one[0])):
        of = _numbers([name], task) if name else set(found)
        found |= dict.fromkeys(of or (), value)
    return found


def _shares(path: Path, case: str) -> Volume:
    from medseg.io.nifti import read_volume

    try:
        return read_volume(path)
    except InputError as error:
        raise error.of_case(case) from None


def _have_instances(told: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the predictions have instances. InputError where only some have."""
    from medseg.io.sidecar import tells_instances

    have = {case: tells_instances(record) for case, record in told.items()}
    if len(set(have.values())) > 1:
        without = next(case for case, tells in have.items() if not tells)
        raise InputError("its prediction has no instances, but others have", "Predict all by one model", case=without)
    return all(have.values())


def _matched(
    task: Task, case: Case, found: InstanceMap | None, predicted: LabelMap, truth: LabelMap, ignored: int | None
) -> list[Matches]:
    """The instances of a prediction, those ``found`` or wherever voxels of one label touch, beside the reference's."""
    from medseg.core.instances import components
    from medseg.dataset.task import load_instances
    from medseg.evaluate.instances import counting, match
    from medseg.evaluate.score import ignoring

    ours, theirs = ignoring(predicted, truth, ignored, case=case.id)
    wanted = load_instances(task, case) if case.instances else components(theirs)
    known = found or components(ours)
    return match(counting(known, truth, ignored), counting(wanted, truth, ignored), theirs.labels, case=case.id)


def _show(
    summaries: Sequence[LabelSummary], rows: Sequence[CaseMetrics], sure: Mapping[tuple[int | None, str], Figure]
) -> None:
    tolerances = {row.tolerance_mm for row in rows}
    at = f"NSD ({tolerances.pop():g} mm)" if len(tolerances) == 1 else "NSD"
    lines = [["structure", "cases", "missed", "invented", "Dice", "95 % interval", at, "HD95 (mm)", "ASSD (mm)"]]
    for one in summaries:
        figure = sure.get((one.label, "dice"))
        interval = f"{figure.low:.3f} to {figure.high:.3f}" if figure and figure.low is not None else "-"
        figures = [_figure(value) for value in (one.nsd_mean, one.hd95_mean_mm, one.assd_mean_mm)]
        counts = [str(n) for n in (one.cases, one.missed, one.invented)]
        lines.append([one.name, *counts, _figure(one.dice_mean), interval, *figures])
    click.echo(table(lines, right=range(1, len(lines[0]))))


def _show_instances(summaries: Sequence[InstanceSummary]) -> None:
    figures = ["precision", "recall", "F1", "PQ", "AP", "recall at 1 FP", "FROC"]
    lines = [["counted", "IoU from", "there", "predicted", "found", *figures]]
    for one in summaries:
        counts = (one.references, one.predictions, one.found)
        values = (one.precision, one.recall, one.f1, one.pq, one.ap, one.recall_at_one, one.froc)
        lines.append([one.name, f"{one.iou:g}", *map(str, counts), *map(_figure, values)])
    click.echo(table(lines, right=range(1, len(lines[0]))))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
