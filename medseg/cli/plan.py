"""``medseg plan``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.common import (
    FOLDER,
    Budget,
    Memory,
    RunFolder,
    available_cores,
    progress,
    seed_option,
    threads_option,
    unlabelled_cases,
    use_sleeping_threads,
)

if TYPE_CHECKING:
    from medseg.dataset.split import Fold
    from medseg.dataset.task import Task
    from medseg.plan.cost import Kind, Meter
    from medseg.plan.plan import Configuration
    from medseg.plan.scale import Target

# Of the memory that is free or that a GPU has, training may take so much unless told otherwise.
_FREE_SHARE, _GPU_SHARE = 0.8, 0.95
_FOLDS = 5


@click.command()
@click.argument("task", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, required=True, help="The run's folder: new, or one of this task.")
@click.option(
    "--folds", type=click.IntRange(min=2), help="Folds to deal the subjects to.  [default: those that there are, or 5]"
)
@click.option("--splits", type=FOLDER, help="Folds to use instead: folds.json, or nnU-Net's splits_final.json.")
@click.option("--machine", type=click.Choice(["cpu", "gpu"]), help="What the plan is for.  [default: this machine]")
@click.option(
    "--budget",
    type=Budget(),
    multiple=True,
    help="How long training one fold may take (90s, 15m, 2h), or 3d=2h for one configuration; repeatable.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Training steps, instead of a budget.")
@click.option(
    "--gpu-memory", type=Memory(), help="Memory of the GPU that training may take.  [default: what it has, or 8GiB]"
)
@click.option(
    "--memory", type=Memory(), help="Memory that training on a processor may take.  [default: 8GiB, or what is free]"
)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Time training steps on this machine; without, time and memory are reckoned only.",
)
@threads_option
@click.option(
    "--family",
    metavar="NAME",
    default="unet",
    show_default=True,
    help="Family of networks; `medseg models families` lists them.",
)
@click.option(
    "--optional-channel", "optional", metavar="NAME", multiple=True, help="A channel that scans may lack; repeatable."
)
@click.option(
    "--unlabelled",
    type=click.Choice(["pretrain", "teacher"]),
    multiple=True,
    help="Learn from the scans that TASK lists under test too: by pretraining, by a mean teacher; repeatable.",
)
@seed_option
def plan(
    task: Path,
    output: Path,
    folds: int | None,
    splits: Path | None,
    machine: Kind | None,
    budget: tuple[tuple[str, float], ...],
    steps: int | None,
    gpu_memory: int | None,
    memory: int | None,
    measure: bool,
    threads: int | None,
    family: str,
    optional: tuple[str, ...],
    unlabelled: tuple[str, ...],
    seed: int,
) -> None:
    """Measure TASK and decide how to train on it.

    Writes plan.json (each decision with its reason, and what it will cost), folds.json and
    fingerprint.json. All may be edited. When the command runs again, an earlier plan that decides otherwise
    is moved aside, and folds.json is kept, or where it has another number of folds than --folds says or
    --splits takes its place, moved aside too.
    """
    kind: Kind = machine or ("gpu" if gpu_memory else "cpu" if memory else _this_machine())
    _require_sense(kind, budget, steps, gpu_memory, memory, measure)
    from medseg.dataset.split import leaks, make_folds, read_folds, write_folds
    from medseg.dataset.task import load_task
    from medseg.io.files import new_folder, write_json
    from medseg.plan.families import require_family
    from medseg.plan.fingerprint import fingerprint
    from medseg.plan.plan import write_plan
    from medseg.plan.planner import plan as make_plan
    from medseg.plan.unlabelled import Unlabelled

    require_family(family, unlabelled=bool(unlabelled))
    loaded = load_task(task)
    scans = len(unlabelled_cases(loaded)) if unlabelled else 0
    wanted = Unlabelled(scans, pretrain="pretrain" in unlabelled, teacher="teacher" in unlabelled)
    run = RunFolder(new_folder(output, holds="run.json"))
    _require_same_task(run, loaded.name)
    with run.alone("plan"):
        measured = fingerprint(loaded, progress=progress("measure"))
        at_hand = measure and (kind == "cpu" or _this_machine() == "gpu")
        target = _target(kind, dict(budget), steps, gpu_memory if kind == "gpu" else memory, at_hand)
        meter = _meter(kind, threads or available_cores()) if at_hand else None
        decided = make_plan(
            measured, loaded.labels, wanted.leaves(target), meter=meter, optional_channels=optional, family=family
        )
        if unlabelled:
            decided = wanted.decided(decided, len(loaded.cases), target)
        kept = not splits and run.folds_file.exists()
        if splits:
            dealt = read_folds(splits, loaded)
            if found := leaks(loaded, dealt):
                click.echo(f"warning: {splits} has {len(found)} subjects on both sides of a fold", err=True)
        elif kept and _as_many(dealt := run.folds(loaded), folds, loaded):
            click.echo(f"kept {run.folds_file}", err=True)
        else:
            kept, count = False, folds or _FOLDS
            dealt = make_folds(loaded, count, seed=seed, duplicates=measured.duplicates)
            if len(dealt) < count:
                click.echo(f"{len(dealt)} folds, not {count}: there are no more subjects", err=True)
        write_json(run.index, {"format": 1, "task": str(task.resolve())})
        write_json(run.path / "fingerprint.json", measured.model_dump(mode="json"))
        if not kept:
            _keep_edited_folds(run, loaded, dealt)
            write_folds(run.folds_file, loaded, dealt)
        _keep_edited(run.plan_file, decided.digest())
        write_plan(run.plan_file, decided)
        for name, c in decided.configurations.items():
            click.echo(_told(name, c))
        axes = ", ".join("xyz"[axis] for axis in decided.training.augmentation.value.mirror) or "no axis"
        click.echo(f"mirrored along {axes} (why, and all other reasons, in {run.plan_file})")
        click.echo(f"{len(loaded.cases)} cases in {len(dealt)} folds; {run.plan_file} may be edited")


def _require_sense(
    kind: str,
    budget: tuple[tuple[str, float], ...],
    steps: int | None,
    gpu_memory: int | None,
    memory: int | None,
    measure: bool,
) -> None:
    """UsageError for options that do not go together."""
    names = [name for name, _ in budget]
    if twice := [name for name in names if names.count(name) > 1]:
        raise click.UsageError(f"two budgets for {twice[0] or 'all configurations'}")
    if budget and steps:
        raise click.UsageError("give --steps or --budget, not both")
    if budget and not measure:
        raise click.UsageError("--budget becomes a number of steps by measuring one; leave out --no-measure")
    if kind == "cpu" and gpu_memory:
        raise click.UsageError("--gpu-memory is for --machine gpu; a processor's is --memory")
    if kind == "gpu" and memory:
        raise click.UsageError("--memory is for --machine cpu; a GPU's is --gpu-memory")


def _target(kind: Kind, budgets: dict[str, float], steps: int | None, memory: int | None, at_hand: bool) -> Target:
    """What to plan for: this machine, where it is ``at_hand``, or one that is like most."""
    from medseg.core.memory import free_memory
    from medseg.infer.engine import processor_has_bf16
    from medseg.plan.scale import USUAL_MEMORY, Target

    if kind == "cpu":
        usual = min(USUAL_MEMORY, int(_FREE_SHARE * free_memory()))
        return Target(kind, memory or usual, processor_has_bf16(), budgets, steps)
    if not at_hand:
        return Target(kind, memory or USUAL_MEMORY, True, budgets, steps)
    from medseg.train.measure import find_gpu

    gpu = find_gpu()
    return Target(kind, min(memory or gpu.memory_bytes, int(_GPU_SHARE * gpu.memory_bytes)), gpu.half, budgets, steps)


def _meter(kind: Kind, threads: int) -> Meter:
    """Measures steps on this machine, as `medseg train` will take them."""
    from medseg.train.measure import measure_step

    use_sleeping_threads()
    device = "cuda" if kind == "gpu" else "cpu"
    return lambda configuration, channels, classes: measure_step(
        configuration, channels, classes, kind=device, threads=threads
    )


def _told(name: str, c: Configuration) -> str:
    """A configuration in one line."""
    from medseg.core.words import duration
    from medseg.plan.cost import gib

    size = "x".join(map(str, c.patch.value))
    spacing = "x".join(f"{s:.3g}" for s in c.spacing.value)
    text = f"{name}: patch {size} at {spacing} mm, batch {c.batch.value}"
    if c.steps is None or c.cost is None:
        return text
    steps = f"{c.steps.value} steps of {c.cost.seconds_per_step:.3g} s"
    if c.members and c.members.value > 1:
        steps = f"{c.members.value} networks of {steps}"
    known = f"measured on {c.cost.measured_on}" if c.cost.measured_on else "reckoned, not measured"
    return (
        f"{text}, {c.network.value.family} of {c.network.value.features[0]} features; {steps}, "
        f"{duration(3600 * c.cost.hours)}, {gib(c.cost.memory_bytes)} ({known}), {gib(c.cost.disk_bytes)} of disk"
    )


def _require_same_task(run: RunFolder, name: str) -> None:
    """InputError where the folder is a run on another task (one that has moved is the same)."""
    from medseg.core.errors import InputError
    from medseg.io.files import read_json

    index = read_json(run.index) if run.index.exists() else {}
    earlier = Path(str(index.get("task", name) if isinstance(index, dict) else name)).name
    if earlier != name:
        raise InputError(f"{run.path} is a run on {earlier}", "Name another folder with -o")


def _this_machine() -> Kind:
    """Whether there is an NVIDIA GPU, asked of the driver's device files: torch takes seconds."""
    return "gpu" if Path("/dev/nvidia0").exists() else "cpu"


def _keep_edited(path: Path, digest: str) -> None:
    """Move an earlier plan that decides otherwise aside, over none that was moved there before."""
    from medseg.core.errors import InputError
    from medseg.plan.plan import read_plan

    if not path.exists():
        return
    try:
        same = read_plan(path).digest() == digest
    except InputError:
        same = False
    if not same:
        _move_aside(path)


def _as_many(dealt: tuple[Fold, ...], folds: int | None, task: Task) -> bool:
    """Whether there are as many folds as are asked for, if a number is, or as there are subjects for."""
    return folds is None or len(dealt) == min(folds, len({case.subject for case in task.cases}))


def _keep_edited_folds(run: RunFolder, task: Task, dealt: tuple[Fold, ...]) -> None:
    """Likewise folds that are others."""
    from medseg.core.errors import InputError

    if not run.folds_file.exists():
        return
    try:
        same = run.folds(task) == dealt
    except InputError:
        same = False
    if not same:
        _move_aside(run.folds_file)


def _move_aside(path: Path) -> None:
    numbered = (path.with_name(f"{path.stem}.earlier.{number}.json") for number in itertools.count(2))
    names = itertools.chain([path.with_name(f"{path.stem}.earlier.json")], numbered)
    aside = next(name for name in names if not name.exists())  # each may hold someone's work
    path.replace(aside)
    click.echo(f"the earlier {path.stem} {'are' if path.stem == 'folds' else 'is'} now {aside}", err=True)
