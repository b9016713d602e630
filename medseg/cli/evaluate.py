"""``medseg evaluate``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.common import FOLDER, progress, table
from medseg.core.errors import InputError

if TYPE_CHECKING:
    from medseg.core.volume import LabelMap
    from medseg.dataset.task import Task
    from medseg.evaluate.instances import InstanceSummary, Matches
    from medseg.evaluate.score import LabelSummary


@click.command()
@click.argument("predictions", type=FOLDER)
@click.argument("task", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="Folder for metrics.csv and metrics.json.  [default: PREDICTIONS]")
@click.option("--tolerance", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Of the NSD, in mm.")
@click.option("--instances", is_flag=True, help="Count things too, also those of a model that only labels voxels.")
@click.option(
    "--iou",
    "ious",
    type=click.FloatRange(min=0, max=1, min_open=True),
    multiple=True,
    help="From which overlap on a thing is found; may be repeated.  [default: 0.1, 0.3 and 0.5]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def evaluate(
    predictions: Path,
    task: Path,
    output: Path | None,
    tolerance: float,
    instances: bool,
    ious: tuple[float, ...],
    as_json: bool,
) -> None:
    """Score a folder of PREDICTIONS against the labels of TASK.

    Where the model was trained to ignore a label, voxels that have it do not count.

    Where the predictions have instances, or with --instances, these are scored too, into instances.csv (each
    thing found, missed or invented) and instances.json. A label map without instances has one wherever voxels
    of one label touch, of score 1; so has a TASK without instancesTr.
    """
    import json

    from medseg.dataset.task import load_labels, load_task
    from medseg.evaluate import instances as things
    from medseg.evaluate.score import evaluate as evaluate_cases
    from medseg.evaluate.score import ignoring, summarise, to_csv, to_json
    from medseg.io.files import write_json, write_text
    from medseg.io.sidecar import ignored_in, read_index, read_prediction

    reference = load_task(task)
    index = read_index(predictions)
    if not index:
        raise InputError(f"{predictions} holds no prediction", "Predict some cases first")
    counted = instances or bool(ious) or _have_instances(index)
    matches: list[Matches] = []

    def pairs() -> Iterator[tuple[str, LabelMap, LabelMap]]:
        for case, path in progress("evaluate")(index.items(), len(index)):
            predicted = read_prediction(path, reference.labels, case)
            truth = load_labels(reference, reference.case(case))
            if counted:
                matches.extend(_matched(case, path, reference, predicted, truth))
            yield case, *ignoring(predicted, truth, ignored_in(path), case=case)

    rows = evaluate_cases(pairs(), tolerance_mm=tolerance)
    document = to_json(rows, provenance={"task": reference.name, "tolerance_mm": tolerance})
    folder = output or predictions
    write_text(folder / "metrics.csv", to_csv(rows))
    write_json(folder / "metrics.json", document)
    cuts = tuple(sorted(set(ious))) or things.IOUS
    summaries = things.summarise(matches, ious=cuts)
    if counted:
        document["instances"] = things.to_json(summaries, provenance={"task": reference.name})
        write_text(folder / "instances.csv", things.to_csv(things.rows(matches, iou=cuts[0])))
        write_json(folder / "instances.json", document["instances"])
    if as_json:
        click.echo(json.dumps(document))
        return
    _show(summarise(rows), tolerance)
    if summaries:
        click.echo()
        _show_instances(summaries)


def _have_instances(index: Mapping[str, Path]) -> bool:
    """Whether the predictions have instances. InputError where only some have."""
    from medseg.io.sidecar import tells_instances

    told = {case: tells_instances(path) for case, path in index.items()}
    if len(set(told.values())) > 1:
        without = next(case for case, tells in told.items() if not tells)
        raise InputError("its prediction has no instances, but others have", "Predict all by one model", case=without)
    return all(told.values())


def _matched(case: str, path: Path, task: Task, predicted: LabelMap, truth: LabelMap) -> list[Matches]:
    """The instances of a prediction beside those of the reference."""
    from medseg.core.instances import components
    from medseg.dataset.task import load_instances
    from medseg.evaluate.instances import counting, match
    from medseg.evaluate.score import ignoring
    from medseg.io.sidecar import ignored_in, read_instances, tells_instances

    ignored, one = ignored_in(path), task.case(case)
    ours, theirs = ignoring(predicted, truth, ignored, case=case)
    found = read_instances(path, task.labels, case) if tells_instances(path) else components(ours)
    wanted = load_instances(task, one) if one.instances else components(theirs)
    return match(counting(found, truth, ignored), counting(wanted, truth, ignored), theirs.labels, case=case)


def _show(summaries: Sequence[LabelSummary], tolerance: float) -> None:
    heading = ["structure", "cases", "missed", "Dice", "IoU", "HD95 (mm)", "ASSD (mm)", f"NSD ({tolerance:g} mm)"]
    lines = [heading]
    for one in summaries:
        figures = (one.dice_mean, one.iou_mean, one.hd95_mean_mm, one.assd_mean_mm, one.nsd_mean)
        lines.append([one.name, str(one.cases), str(one.missed), *map(_figure, figures)])
    click.echo(table(lines, right=range(1, len(heading))))


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
