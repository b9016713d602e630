"""``medseg plan``."""

from __future__ import annotations

from pathlib import Path

import click

from medseg.cli.common import FOLDER, RunFolder, progress, seed_option


@click.command()
@click.argument("task", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, required=True, help="The run's folder: new, or one of this task.")
@click.option(
    "--folds", type=click.IntRange(min=2), default=5, show_default=True, help="Folds to deal the subjects to."
)
@click.option("--splits", type=FOLDER, help="Folds to use instead: folds.json, or nnU-Net's splits_final.json.")
@click.option("--machine", type=click.Choice(["cpu", "gpu"]), help="What the plan is for.  [default: this machine]")
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs that the plan asks for.")
@click.option(
    "--optional-channel", "optional", metavar="NAME", multiple=True, help="A channel that scans may lack; repeatable."
)
@seed_option
def plan(
    task: Path,
    output: Path,
    folds: int,
    splits: Path | None,
    machine: str | None,
    epochs: int | None,
    optional: tuple[str, ...],
    seed: int,
) -> None:
    """Measure TASK and decide how to train on it.

    Writes plan.json (each decision with its reason), folds.json and fingerprint.json. All may be
    edited; folds.json is kept when the command runs again.
    """
    from medseg.dataset.split import leaks, make_folds, read_folds, write_folds
    from medseg.dataset.task import load_task
    from medseg.io.files import new_folder, write_json
    from medseg.plan.fingerprint import fingerprint
    from medseg.plan.plan import write_plan
    from medseg.plan.planner import plan as make_plan

    loaded = load_task(task)
    run = RunFolder(new_folder(output, holds="run.json"))
    _require_same_task(run, loaded.name)
    measured = fingerprint(loaded, progress=progress("measure"))
    decided = make_plan(
        measured, loaded.labels, machine=machine or _this_machine(), epochs=epochs, optional_channels=optional
    )
    if splits:
        dealt = read_folds(splits, loaded)
        if found := leaks(loaded, dealt):
            click.echo(f"warning: {splits} has {len(found)} subjects on both sides of a fold", err=True)
    elif run.folds_file.exists():
        dealt = run.folds(loaded)
        click.echo(f"kept {run.folds_file}", err=True)
    else:
        dealt = make_folds(loaded, folds, seed=seed, duplicates=measured.duplicates)
    write_json(run.index, {"format": 1, "task": str(task.resolve())})
    write_json(run.path / "fingerprint.json", measured.model_dump(mode="json"))
    if splits or not run.folds_file.exists():
        write_folds(run.folds_file, loaded, dealt)
    _keep_edited(run.plan_file, decided.digest())
    write_plan(run.plan_file, decided)
    for name, c in decided.configurations.items():
        size = "x".join(map(str, c.patch.value))
        spacing = "x".join(f"{s:.3g}" for s in c.spacing.value)
        click.echo(f"{name}: patch {size} at {spacing} mm, batch {c.batch.value} ({c.patch.reason})")
    click.echo(f"{len(loaded.cases)} cases in {len(dealt)} folds; {run.plan_file} may be edited")


def _require_same_task(run: RunFolder, name: str) -> None:
    """InputError where the folder is a run on another task (one that has moved is the same)."""
    from medseg.core.errors import InputError
    from medseg.io.files import read_json

    index = read_json(run.index) if run.index.exists() else {}
    earlier = Path(str(index.get("task", name) if isinstance(index, dict) else name)).name
    if earlier != name:
        raise InputError(f"{run.path} is a run on {earlier}", "Name another folder with -o")


def _this_machine() -> str:
    """Whether there is an NVIDIA GPU, asked of the driver's device files: torch takes seconds."""
    return "gpu" if Path("/dev/nvidia0").exists() else "cpu"


def _keep_edited(path: Path, digest: str) -> None:
    """Move an earlier plan that decides otherwise aside: it may hold someone's work."""
    from medseg.core.errors import InputError
    from medseg.plan.plan import read_plan

    if not path.exists():
        return
    try:
        same = read_plan(path).digest() == digest
    except InputError:
        same = False
    if not same:
        aside = path.with_name("plan.earlier.json")
        path.replace(aside)
        click.echo(f"the earlier plan is now {aside}", err=True)
