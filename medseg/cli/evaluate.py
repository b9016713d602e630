"""``medseg evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.common import FOLDER, progress, table

if TYPE_CHECKING:
    from medseg.core.volume import LabelMap


@click.command()
@click.argument("predictions", type=FOLDER)
@click.argument("task", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="Folder for metrics.csv and metrics.json.  [default: PREDICTIONS]")
@click.option("--tolerance", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Of the NSD, in mm.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def evaluate(predictions: Path, task: Path, output: Path | None, tolerance: float, as_json: bool) -> None:
    """Score a folder of PREDICTIONS against the labels of TASK.

    Where the model was trained to ignore a label, voxels that have it do not count.
    """
    import json

    from medseg.core.errors import InputError
    from medseg.dataset.task import load_labels, load_task
    from medseg.evaluate.score import evaluate as evaluate_cases
    from medseg.evaluate.score import ignoring, summarise, to_csv, to_json
    from medseg.io.files import write_json, write_text
    from medseg.io.sidecar import ignored_in, read_index, read_prediction

    reference = load_task(task)
    index = read_index(predictions)
    if not index:
        raise InputError(f"{predictions} holds no prediction", "Predict some cases first")

    def pairs() -> Iterator[tuple[str, LabelMap, LabelMap]]:
        for case, path in progress("evaluate")(index.items(), len(index)):
            predicted = read_prediction(path, reference.labels, case)
            truth = load_labels(reference, reference.case(case))
            yield case, *ignoring(predicted, truth, ignored_in(path), case=case)

    rows = evaluate_cases(pairs(), tolerance_mm=tolerance)
    document = to_json(rows, provenance={"task": reference.name, "tolerance_mm": tolerance})
    folder = output or predictions
    write_text(folder / "metrics.csv", to_csv(rows))
    write_json(folder / "metrics.json", document)
    if as_json:
        click.echo(json.dumps(document))
        return
    heading = ["structure", "cases", "missed", "Dice", "IoU", "HD95 (mm)", "ASSD (mm)", f"NSD ({tolerance:g} mm)"]
    lines = [heading]
    for one in summarise(rows):
        figures = (one.dice_mean, one.iou_mean, one.hd95_mean_mm, one.assd_mean_mm, one.nsd_mean)
        lines.append([one.name, str(one.cases), str(one.missed), *("-" if f is None else f"{f:.3f}" for f in figures)])
    click.echo(table(lines, right=range(1, len(heading))))
