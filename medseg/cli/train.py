"""``medseg train``."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from medseg.cli.common import (
    FOLDER,
    Memory,
    RunFolder,
    device_option,
    seed_option,
    threads_option,
    unlabelled_cases,
    unlabelled_for,
    use_cores,
)
from medseg.cli.folds import all_folds as every_fold
from medseg.cli.folds import require_unseen
from medseg.core.memory import allow_memory

if TYPE_CHECKING:
    from medseg.dataset.task import Task
    from medseg.io.store import StoredCase
    from medseg.models.package import ModelPackage
    from medseg.plan.plan import Plan

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class _Stop(BaseException):
    """What a signal raises where there is no step to end; not to be taken for a case that failed."""


def _stop() -> NoReturn:
    raise _Stop


@contextlib.contextmanager
def _on_signals(act: Callable[[], None]) -> Iterator[None]:
    """Act once on being asked to stop: by SIGTERM, by SIGUSR1, which a scheduler can be told to send some
    time before the end, or by ctrl-C. A second ctrl-C stops at once."""

    def ask(number: int, frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(other, lambda *_: None)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        act()

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _asked() -> Iterator[threading.Event]:
    """Set once the run is asked to stop."""
    asked = threading.Event()
    with _on_signals(asked.set):
        yield asked


@contextlib.contextmanager
def _taken_up_later() -> Iterator[None]:
    """A signal stops what is done within at once, as `StoppedError`: nothing but a training's steps has
    anything to save, and whatever is written appears whole or not at all."""
    try:
        with _on_signals(_stop):
            yield
    except _Stop:
        from medseg.train.loop import StoppedError

        raise StoppedError("stopped; the same command goes on from what is done") from None


@click.command()
@click.argument("run", type=FOLDER)
@click.option(
    "-c",
    "--configuration",
    "configurations",
    multiple=True,
    help="One of the plan's configurations.  [default: 3d; with --all-folds all, and may be repeated]",
)
@click.option("--all-folds", is_flag=True, help="Train, predict and evaluate every fold, then choose: see below.")
@click.option("--fold", type=click.IntRange(min=0), help="Fold of folds.json.  [default: 0]")
@click.option("--checkpoints", type=FOLDER, help="Folder for checkpoints and logs.  [default: RUN/checkpoints]")
@click.option("--mlflow", metavar="URI", help="Also tell an MLflow server how training goes.")
@click.option("--from", "start", type=FOLDER, help="A model to start from, as far as its layers fit.")
@click.option(
    "--memory", type=Memory(), help="Keep within this, as 8GB, or say that it is not enough.  [default: what is free]"
)
@click.option("--deterministic", is_flag=True, help="On a GPU too the same weights every time, bit for bit; slower.")
@seed_option
@device_option
@threads_option
@_taken_up_later()
def train(
    run: Path,
    configurations: tuple[str, ...],
    all_folds: bool,
    fold: int | None,
    checkpoints: Path | None,
    mlflow: str | None,
    start: Path | None,
    memory: int | None,
    deterministic: bool,
    seed: int,
    device: str,
    threads: int | None,
) -> None:
    """Train one fold of RUN; the model goes to RUN/CONFIGURATION/foldN/model.

    The plan says how many steps it takes. A run that was stopped or killed goes on from its last
    checkpoint when it is started again, and ends with the same weights. SIGTERM, SIGUSR1 and ctrl-C
    write a checkpoint first; the exit status is then, and to the end of the command, 75, "try again".
    With several GPUs:
    torchrun --nproc-per-node 4 -m medseg train RUN

    With --all-folds each fold of each configuration is preprocessed, trained, predicted and evaluated,
    one after the other, and `medseg choose` makes one model of them, RUN/model. What is done already
    is left as it is. A second stage (3d-cascade) comes after all folds of the first (3d-low).
    """
    if deterministic:  # read by CUDA's library of matrices when it is loaded
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if memory is not None:
        allow_memory(memory)
    cores = use_cores(threads)
    if all_folds:
        if fold is not None:
            raise click.UsageError("--fold trains one fold, --all-folds every one; give one of them")
        _refuse_torchrun()
        every_fold(
            run,
            configurations,
            seed=seed,
            device=device,
            threads=threads,
            checkpoints=checkpoints,
            deterministic=deterministic,
            start=start,
            mlflow=mlflow,
        )
        return
    fold = fold or 0
    if len(configurations) > 1:
        raise click.UsageError("Several configurations go with --all-folds")
    configuration = configurations[0] if configurations else "3d"
    with RunFolder(run).alone("train", configuration, f"fold{fold}") if _first() else contextlib.nullcontext():
        _train_fold(
            run,
            configuration,
            fold,
            checkpoints=checkpoints,
            mlflow=mlflow,
            start=start,
            deterministic=deterministic,
            seed=seed,
            device=device,
            cores=cores,
        )


def _first() -> bool:
    """Whether this is the first of torchrun's processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _train_fold(
    run: Path,
    configuration: str,
    fold: int,
    *,
    checkpoints: Path | None,
    mlflow: str | None,
    start: Path | None,
    deterministic: bool,
    seed: int,
    device: str,
    cores: int,
) -> None:
    from tqdm import tqdm

    from medseg.cli.stages import first_stage
    from medseg.core.errors import InputError
    from medseg.dataset.task import load_case
    from medseg.infer.agreement import measure
    from medseg.infer.engine import LEAST_DICE
    from medseg.io.files import new_folder, write_json
    from medseg.io.mlflow import MlflowTracker
    from medseg.io.runlog import RunLog
    from medseg.io.store import CaseStore
    from medseg.models.build import build
    from medseg.models.experience import experience
    from medseg.models.package import INDEX, load_package, record_engines, save_package
    from medseg.plan.watch import COMPARED_CASES, watching_of
    from medseg.preprocess.regrid import preprocess
    from medseg.train.calibrate import calibration_of, evenly
    from medseg.train.loop import Before, Progress, Setup, fitting
    from medseg.train.loop import train as train_network
    from medseg.train.pretrain import pretrain
    from medseg.train.ranks import Ranks

    folder = RunFolder(run)
    task, plan = folder.task(), folder.plan()
    folds = folder.folds(task)
    if fold >= len(folds):
        raise InputError(f"{folder.folds_file} has no fold {fold}", f"Its folds are 0 to {len(folds) - 1}")
    chosen = folds[fold]
    plan.configuration(configuration)
    trained = experience(folder.fingerprint(), chosen.train, plan.label_set)
    store = CaseStore(folder.store(configuration))
    stage = first_stage(folder, task, plan, configuration)
    models = stage.digests if stage else ()
    store.require(plan.preparation(configuration), configuration, models)
    unlabelled = _unlabelled(folder, configuration, plan, task, chosen.validation)
    output = folder.fold(configuration, fold)
    ranks = Ranks.of_torchrun()
    if ranks.first:
        new_folder(output / "model", holds=INDEX)
    setup = Setup(
        configuration=configuration,
        fold=fold,
        train=chosen.train,
        held_out=chosen.validation,
        previous=models,
        seed=seed,
        device=device,
        threads=cores,
        deterministic=deterministic,
    )
    begun = load_package(start) if start else None
    if begun:
        require_unseen(begun, task, chosen, fold)
    if begun and ranks.first:
        network = build(plan.configuration(configuration), plan.inputs(plan.configuration(configuration)), plan.outputs)
        fits, missing = fitting(begun, network)
        click.echo(
            f"starts from {begun.name}: {len(fits)} of {len(fits) + len(missing)} layers fit"
            + (f"; new are {', '.join(missing)}" if missing else ""),
            err=True,
        )
    looked = watching_of(plan.configuration(configuration))
    watched = evenly(chosen.validation, looked.cases if looked.times else 0)
    compared = watched[:COMPARED_CASES] or chosen.validation[:1]
    validation = [(case, *load_case(task, task.case(case))) for case in watched]
    before = (
        Before(stage.models[fold], {case: stage.found(task, case) for case in {*watched, *compared}}) if stage else None
    )
    tracker = None
    if mlflow and ranks.first:
        tracker = MlflowTracker(mlflow, f"{task.name} {configuration}", lambda text: click.echo(text, err=True))
    log = RunLog(checkpoints or folder.checkpoints(configuration, fold), tracker)
    quiet = not ranks.first or not sys.stderr.isatty()
    with _asked() as asked, tqdm(desc=f"train {configuration} fold {fold}", disable=quiet, unit="step") as bar:

        def show(now: Progress) -> None:
            before = "" if now.phase == "training" else f"{now.phase}: "
            bar.set_description(f"{now.phase} {configuration} fold {fold}", refresh=False)
            bar.total = now.steps
            bar.update(now.step - bar.n)
            dice = "-" if now.dice is None else f"{now.dice:.3f}"
            bar.set_postfix(loss=f"{now.loss:.3f}", dice=dice, refresh=False)
            if quiet and ranks.first and (now.step % plan.training.steps_per_epoch == 0 or now.step == now.steps):
                click.echo(
                    f"{before}step {now.step}/{now.steps} loss {now.loss:.3f} dice {dice} {now.seconds_left:.0f} s left"
                )

        watching: Any = {"progress": show, "stop": asked.is_set, "ranks": ranks}
        first = begun
        if plan.training.pretraining:
            first = pretrain(plan, setup, store, log, unlabelled, start=begun, **watching)
        package, records = train_network(
            plan,
            setup,
            store,
            log,
            unlabelled=unlabelled,
            validation=validation,
            before=before,
            start=first,
            **watching,
        )
    if not ranks.first:
        return
    if asked.is_set():  # during the last step
        _stop()
    if first is not begun and first is not None:
        package = replace(package, provenance=_pretrained(package, first))
    # Of a fold that has a log `medseg train --all-folds` takes it that all is there.
    log_file = output / "log.json"
    if log_file.exists() and _is_saved(package, output / "model"):
        click.echo(f"{package.name} is trained already; {output / 'model'} is left as it is")
        return
    calibration = calibration_of(
        package,
        lambda case: load_case(task, task.case(case)),
        device=device,
        most=looked.calibrated,
    )
    save_package(output / "model", replace(package, experience=trained, calibration=calibration), outdated=[log_file])
    saved = load_package(output / "model")
    scans = {case: volume for case, volume, _ in validation} or {
        case: load_case(task, task.case(case))[0] for case in compared
    }
    images = {
        case: preprocess(scans[case], plan, saved.configuration, before.found[case] if before else None).values
        for case in compared
    }
    engines = measure(saved, images, cores, tiles=looked.compared)
    record_engines(output / "model", engines)
    write_json(log_file, {"format": 1, "options": f"--seed {seed}", "records": list(records)})
    done = package.provenance
    count = len(package.members)
    steps = f"{done['steps']} steps" if count == 1 else f"{count} networks of {done['steps']} steps"
    whose = "" if count == 1 else ", of the last alone"
    score = f"Dice {records[-1]['dice']:.3f} on {len(watched)} held-out cases{whose}" if watched else "not validated"
    click.echo(f"{package.name}: {steps} in {done['seconds']:.0f} s, {score}; {output / 'model'}")
    if calibration:
        click.echo(
            f"predicted Dice is {calibration.dice_error:.3f} off on average, calibration error "
            f"{calibration.ece_before:.3f} before and {calibration.ece_after:.3f} after temperature "
            f"{calibration.temperature:.2f}, on {calibration.cases} held-out cases"
        )
    elif not looked.calibrated:
        click.echo("the plan leaves no time to calibrate it (configurations, watching), so its confidence is its own")
    else:
        click.echo("no structure was found in a held-out case, so the confidence of this model is not calibrated")
    for name, found in engines.items():
        if found.least_dice < LEAST_DICE:
            click.echo(
                f"{name} gives other labels than torch (Dice {found.least_dice:.4f}) and is not used unless asked for"
            )


def _is_saved(package: ModelPackage, folder: Path) -> bool:
    """Whether a folder holds a model of this very training: one that another job finished meanwhile, or an earlier
    run of this command."""
    from medseg.core.errors import MedsegError
    from medseg.models.package import INDEX, load_package

    if not (folder / INDEX).exists():
        return False
    try:
        saved = load_package(folder)
    except MedsegError:
        return False
    same = [(one.digest(), one.plan.digest(), one.trained_on, one.held_out) for one in (saved, package)]
    return same[0] == same[1]


def _unlabelled(
    folder: RunFolder, configuration: str, plan: Plan, task: Task, held_out: Sequence[str]
) -> list[StoredCase]:
    """The unlabelled cases that the plan wants, but for those of a subject that has a held-out case.
    Raises InputError where they were not preprocessed, or none is left."""
    from medseg.core.errors import InputError
    from medseg.io.store import CaseStore

    if not plan.training.wants_unlabelled:
        return []
    scans = [case.id for case in unlabelled_cases(task)]
    store = CaseStore(folder.unlabelled(configuration))
    store.require(plan.preparation(configuration), configuration)
    if set(scans) != set(store.cases()):
        raise InputError(f"{store.folder} holds other scans than dataset.json lists", "Run `medseg preprocess` again")
    if found := [store.read(case.id) for case in unlabelled_for(task, held_out)]:
        return found
    raise InputError(
        f"each scan without labels of {task.name} is of a subject that is held out", "Plan without --unlabelled"
    )


def _pretrained(package: ModelPackage, first: ModelPackage) -> dict[str, Any]:
    """The package's provenance with that of what it started from; ``start`` is what was named by --from."""
    before = {name: first.provenance[name] for name in ("steps", "seconds")}
    before["digest"] = first.digest()
    made = package.provenance | {"start": first.provenance["start"], "pretrained": before}
    return {**made, "unlabelled": first.provenance["unlabelled"]}


def _refuse_torchrun() -> None:
    from torch import distributed

    from medseg.core.errors import InputError

    if distributed.is_torchelastic_launched():
        raise InputError("--all-folds is one process", "Train each fold by torchrun, then run `medseg choose`")
