"""``medseg verify``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.common import FOLDER, RunFolder, available_cores, table, threads_option
from medseg.cli.record import collected, weights_of
from medseg.core.errors import InputError
from medseg.core.words import count

if TYPE_CHECKING:
    from medseg.dataset.task import Task
    from medseg.evaluate.score import CaseMetrics
    from medseg.report.results import Finding, Fit, Results, TaskResults

# More than the results of a thousand folds of a thousand cases take; nothing larger is read.
_MOST_BYTES = 2**31
_OF_A_RUN = ("run.json", "plan.json")


@dataclass(frozen=True)
class Beside:
    """What is there of a recorded run: its folder, and its task; None for what is not."""

    recorded: TaskResults
    run: RunFolder | None
    task: Task | None


@click.command()
@click.argument("results", type=FOLDER)
@click.option(
    "--run",
    "runs",
    type=FOLDER,
    multiple=True,
    help="A run that RESULTS tells of; may be repeated.  [default: where it says]",
)
@click.option("--data", type=FOLDER, help="The folder of the tasks.  [default: where each run has its task]")
@click.option("--again", is_flag=True, help="Also train, predict and score anew, in WORK, and compare.")
@click.option(
    "-o", "--output", "work", type=FOLDER, metavar="WORK", help="With --again: a folder, new or of an earlier try."
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="With --again: where to train.  [default: as recorded]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@threads_option
def verify(
    results: Path,
    runs: tuple[Path, ...],
    data: Path | None,
    again: bool,
    work: Path | None,
    device: str | None,
    as_json: bool,
    threads: int | None,
) -> None:
    """Hold RESULTS, which `medseg record` wrote, against what is there.

    Data, plans, folds and weights are hashed, predictions are scored anew against the references, and means are taken
    anew: no metrics.json is believed. Each part is equal, different, or not there, and where it differs is said: which
    task, fold, case and organ, and by how much. With --again each fold is trained anew from the same plan, folds and
    seed; it is equal where weights and label maps are the same to the bit, or within tolerance where the mean Dice of
    each organ lies as near as RESULTS allows.

    Exit status: 0 equal or within tolerance, 1 something is different, 2 the input is wrong or nothing is there.
    """
    if again != (work is not None):
        raise click.UsageError("--again needs -o WORK, a folder to train in" if again else "-o goes with --again")
    if device and not again:
        raise click.UsageError("--device goes with --again")
    recorded = _read(results)
    found: list[Finding] = []
    there = _beside(recorded, results.parent, runs, data)
    for one in there:
        found += _checked(one, threads or available_cores())
    if again and work:
        for one in there:
            found += _again(one, recorded, work, device, threads)
    found += _followed(recorded)
    if all(one.verdict == "not there" for one in found if one.part not in ("means", "protocol")):
        raise InputError(
            f"none of the runs and data that {results} tells of is there",
            "Name each run with --run, or put the folder of the tasks with --data",
        )
    different = sum(one.verdict == "different" for one in found)
    if as_json:
        document = {"format": 1, "equal": not different, "findings": [asdict(one) for one in found]}
        click.echo(json.dumps(document))
    else:
        click.echo(
            table([["part", "where", "verdict", "what"], *([f.part, f.where, f.verdict, f.what] for f in found)])
        )
        click.echo(_summary(found, recorded.tolerance.dice))
    if different:
        raise SystemExit(1)


def _read(path: Path) -> Results:
    from medseg.io.files import read_json
    from medseg.report.results import parse

    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise InputError(f"{path} is larger than results are", "Name the file that `medseg record` wrote")
    return parse(read_json(path, "Name the file that `medseg record` wrote"), str(path))


def _summary(found: Sequence[Finding], tolerance: float) -> str:
    words = ("equal", "within tolerance", "different", "not there")
    counts = {word: sum(one.verdict == word for one in found) for word in words}
    told = ", ".join(f"{n} {word}" for word, n in counts.items() if n or word == "different")
    unseen = " What is not there was not checked." if counts["not there"] else ""
    near = f" The tolerance that was stated is a Dice of {tolerance:g}." if counts["within tolerance"] else ""
    return f"{count(len(found), 'part')}: {told}.{near}{unseen}"


def _beside(recorded: Results, base: Path, runs: tuple[Path, ...], data: Path | None) -> list[Beside]:
    """Each recorded run with what is there of it. InputError for a ``run`` that was not recorded."""
    folders = {_name_of(run, recorded): run for run in runs} or {one.run: base / one.run for one in recorded.tasks}
    if len(folders) < len(runs):
        raise click.UsageError("Two runs were recorded as one; name each once")
    there = []
    for one in recorded.tasks:
        place = folders.get(one.run)
        # The folder of results.json itself may be the run's, of which nothing else was handed on.
        run = RunFolder(place) if place and any((place / name).is_file() for name in _OF_A_RUN) else None
        there.append(Beside(one, run, _task(one, run, data)))
    return there


def _name_of(run: Path, recorded: Results) -> str:
    """Which of the recorded runs a folder is: of the same task, and of several the one of the same folder names."""
    from medseg.io.files import read_json

    index = read_json(RunFolder(run).index, "Name a run's folder")
    task = Path(str(index.get("task", "") if isinstance(index, dict) else "")).name
    alike = [one.run for one in recorded.tasks if one.task == task]
    if not alike:
        names = ", ".join(dict.fromkeys(one.task for one in recorded.tasks))
        raise InputError(
            f"{run} is a run on {task or 'nothing'}, and is none that was recorded", f"Those are on {names}"
        )
    parts = run.resolve().parts

    def shared(name: str) -> int:
        theirs = Path(name).parts
        return next((n for n in range(len(theirs), 0, -1) if parts[-n:] == theirs[-n:]), 0)

    return max(alike, key=shared)


def _task(one: TaskResults, run: RunFolder | None, data: Path | None) -> Task | None:
    """The task's data: within ``data`` where that is given (InputError where it is not), else where the run has it."""
    from medseg.dataset.task import load_task

    if data is not None:
        named = data if data.resolve().name == one.task and (data / "dataset.json").exists() else data / one.task
        return load_task(named)
    try:
        return run.task() if run else None
    except InputError:
        return None


def _checked(one: Beside, threads: int) -> Iterator[Finding]:
    """All that is there of a run, held against what was recorded."""
    from medseg.core.provenance import digest
    from medseg.io.files import read_json, sha256_of
    from medseg.report.results import compare_files, compare_values

    told, run = one.recorded, one.run
    place = told.run if told.run != "." else told.task
    recorded = {file.path: file.sha256 for file in told.data.files}
    yield from compare_files("data", place, recorded, _hashed(one.task, recorded, threads))
    if run is None:
        yield _absent("run", place)
    elif not run.plan_file.exists() or not run.folds_file.exists():
        yield _absent("plan and folds", place)
    else:
        yield compare_values("plan", place, told.plan.sha256, sha256_of(run.plan_file))
        try:
            yield compare_values("plan's decisions", place, told.plan.decides, run.plan().digest())
            yield compare_values("folds", place, told.folds, digest(read_json(run.folds_file)))
        except InputError as error:
            yield _unsound("plan and folds", place, error)
    for fit in told.fits:
        yield from _fold(fit, one, f"{place} {fit.name}", threads)


def _absent(part: str, where: str) -> Finding:
    from medseg.report.results import Finding

    return Finding(part, where, "not there")


def _unsound(part: str, where: str, error: InputError) -> Finding:
    from medseg.report.results import Finding

    where = f"{where}, case {error.case}" if error.case and error.case not in where else where
    return Finding(part, where, "different", error.fault)


def _hashed(task: Task | None, recorded: Mapping[str, str], threads: int) -> dict[str, str]:
    """The hashes of a task's files that are there, those that were recorded and those that it lists now."""
    from concurrent.futures import ThreadPoolExecutor

    from medseg.dataset.hashes import task_files
    from medseg.io.files import sha256_of

    if task is None:
        return {}
    names = [name for name in dict.fromkeys([*recorded, *task_files(task)]) if (task.folder / name).is_file()]
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of(task.folder / name), names), strict=True))


def _fold(fit: Fit, one: Beside, place: str, threads: int) -> Iterator[Finding]:
    from medseg.io.files import sha256_of
    from medseg.report.results import compare_files, compare_organs, compare_rows, organs

    # Of results.json itself: the means follow from the rows.
    try:
        yield from _as("means", compare_organs(place, fit.organs, organs(fit.scores), None))
    except InputError as error:
        yield _unsound("means", place, error)
        return
    if one.run is None:
        return
    folder = one.run.fold(fit.configuration, fit.fold)
    yield from compare_files("weights", place, fit.weights, weights_of(folder))
    yield from _model(fit, folder, place)
    maps = {p.path: sha256_of(folder / p.path) for p in fit.predictions if (folder / p.path).is_file()}
    yield from compare_files("predictions", place, {p.path: p.sha256 for p in fit.predictions}, maps)
    if not maps or one.task is None:
        yield _absent("scores", place)
        return
    try:
        anew = _scored_anew(fit, one.run, one.task, folder, threads)
        yield from compare_rows(place, fit.scores, anew)
    except InputError as error:
        yield _unsound("scores", place, error)
    yield from _written_scores(fit, folder, place)


def _as(part: str, found: Sequence[Finding]) -> list[Finding]:
    from dataclasses import replace

    return [replace(one, part=part) for one in found]


def _model(fit: Fit, folder: Path, place: str) -> Iterator[Finding]:
    """The package as a whole: whether it is sound, and was made as was recorded."""
    from medseg.models.package import INDEX, load_package
    from medseg.report.results import compare_values

    if not (folder / "model" / INDEX).exists():
        yield _absent("model", place)
        return
    try:
        package = load_package(folder / "model")
    except InputError as error:
        yield _unsound("model", place, error)
        return
    yield compare_values("model", place, fit.model, package.digest())
    for name in ("seed", "steps"):
        if package.provenance.get(name) != getattr(fit, name):
            yield compare_values(name, place, getattr(fit, name), str(package.provenance.get(name)))


def _scored_anew(fit: Fit, run: RunFolder, task: Task, folder: Path, threads: int) -> list[CaseMetrics]:
    """The scores of the label maps that are there of the cases that the folds hold out, as those recorded were
    made. InputError, of the case, where one is missing or not sound."""
    from medseg.dataset.task import load_labels
    from medseg.evaluate.score import score
    from medseg.io.sidecar import read_prediction

    held_out = run.folds(task)[fit.fold].validation if fit.fold < len(run.folds(task)) else ()
    path_of = {one.case: folder / one.path for one in fit.predictions}
    scores = fit.scores
    ignored = run.plan().training.ignore_label
    tolerances = {row.label: row.tolerance_mm for row in scores}
    tubular = {row.label for row in scores if row.cldice is not None}
    rows: list[CaseMetrics] = []
    for case in held_out:
        if case not in path_of:
            raise InputError("the fold holds it out, and no prediction of it was recorded", "Record anew", case=case)
        truth = load_labels(task, task.case(case))
        predicted = read_prediction(path_of[case], task.labels, case)
        rows += score(
            predicted,
            truth,
            case=case,
            subject=task.case(case).subject,
            tolerance_mm={n: tolerances.get(n, 2.0) for n in task.labels.numbers if n != ignored},
            tubular=tubular,
            ignored=ignored,
            threads=threads,
        )
    return rows


def _written_scores(fit: Fit, folder: Path, place: str) -> Iterator[Finding]:
    """metrics.json, which is nothing but a copy: told only where it says something else."""
    from medseg.evaluate.score import from_json
    from medseg.io.files import read_json
    from medseg.report.results import compare_rows

    path = folder / "metrics.json"
    if path.exists():
        try:
            found = compare_rows(place, fit.scores, from_json(read_json(path)))
        except InputError as error:
            found = [_unsound("metrics.json", place, error)]
        yield from _as("metrics.json", [one for one in found if one.verdict != "equal"])


def _followed(recorded: Results) -> Iterator[Finding]:
    from medseg.report.results import Finding, require_followed

    if recorded.protocol is None:
        return
    named = f"{recorded.protocol.name} {recorded.protocol.version}"
    try:
        require_followed(recorded.protocol, recorded.tasks)
    except InputError as error:
        yield Finding("protocol", named, "different", error.fault)
    else:
        same = recorded.protocol.tolerance == recorded.tolerance
        yield Finding(
            "protocol", named, "equal" if same else "different", "followed" if same else "has another tolerance"
        )


def _again(one: Beside, recorded: Results, work: Path, device: str | None, threads: int | None) -> Iterator[Finding]:
    """A run trained, predicted and scored anew from its plan, folds and seeds, and compared."""
    from medseg.report.results import compare_again

    told, run, task = one.recorded, one.run, one.task
    if run is None or task is None:
        raise InputError(
            f"{told.run} cannot be trained again without its plan, folds and data", "Name it with --run, and --data"
        )
    if other := next((fit for fit in told.fits if fit.started_from), None):
        raise InputError(f"{told.run} {other.name} was started from another model", "Verify it without --again")
    target = _work(run, task, work / told.run)
    with contextlib.redirect_stdout(sys.stderr):  # what the verbs say is no part of the answer
        for fit in _in_order(told, target):
            _fit_again(fit, target, task, device, threads)
    fits = {fit.name: fit for fit in collected(target.path, work, available_cores()).fits}
    for fit in told.fits:
        yield from compare_again(told.run if told.run != "." else told.task, fit, fits[fit.name], recorded.tolerance)


def _work(run: RunFolder, task: Task, path: Path) -> RunFolder:
    """A run's folder with the plan and folds of another: copied, not measured anew, since other times would make
    other steps."""
    from medseg.io.files import new_folder, write_bytes, write_json
    from medseg.plan.plan import write_plan

    target = RunFolder(new_folder(path, holds="run.json"))
    if path.resolve() == run.path.resolve():
        raise InputError(f"{path} is the run itself", "Name another folder with -o")
    write_plan(target.plan_file, run.plan())
    for name in ("folds.json", "fingerprint.json"):
        if not (run.path / name).is_file():
            raise InputError(f"{run.path / name} is missing", "Put it back; `medseg plan` made it")
        write_bytes(path / name, (run.path / name).read_bytes())
    write_json(target.index, {"format": 1, "task": str(task.folder.resolve())})
    return target


def _in_order(told: TaskResults, target: RunFolder) -> list[Fit]:
    """The folds, those first whose labels others are told."""
    plan = target.plan()
    return sorted(told.fits, key=lambda fit: plan.configuration(fit.configuration).previous is not None)


def _fit_again(fit: Fit, target: RunFolder, task: Task, device: str | None, threads: int | None) -> None:
    """What was done in an earlier try is left as it is."""
    from medseg.cli.folds import run_verb
    from medseg.io.store import INDEX as STORED

    fold = target.fold(fit.configuration, fit.fold)
    device = device or fit.device
    engine = fit.engine if fit.engine and device == fit.device else "auto"
    cores = ("--threads", str(threads or fit.threads or available_cores()))
    if not (target.store(fit.configuration) / STORED).exists():
        run_verb("preprocess", str(target.path), "-c", fit.configuration, *cores)
    if not (fold / "log.json").exists():
        how = ("--seed", str(fit.seed), "--device", device, *cores)
        exact = ("--deterministic",) if fit.deterministic and device == "cuda" else ()
        run_verb("train", str(target.path), "-c", fit.configuration, "--fold", str(fit.fold), *how, *exact)
    maps = str(fold / "predictions")
    run_verb(
        "predict", str(task.folder), "--held-out", "-m", str(fold / "model"), "-o", maps, "--engine", engine, *cores
    )
    each = {row.name: row.tolerance_mm for row in fit.scores}
    tubes = {row.name for row in fit.scores if row.cldice is not None}
    options = [part for name, mm in each.items() for part in ("--tolerance", f"{name}={mm}")]
    options += [part for name in sorted(tubes) for part in ("--tube", name)]
    run_verb("evaluate", maps, str(task.folder), "-o", str(fold), *options, *cores)
