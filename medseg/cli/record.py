"""``medseg record``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from medseg.cli.common import FOLDER, RunFolder, available_cores, progress, threads_option
from medseg.core.errors import InputError
from medseg.core.words import count

if TYPE_CHECKING:
    from medseg.dataset.task import Task
    from medseg.plan.plan import Plan
    from medseg.report.results import Data, Fit, Protocol, Results, Software, TaskResults
    from medseg.report.tables import Scored

NAME, CRATE = "results.json", "ro-crate-metadata.json"


@click.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o", "--output", type=FOLDER, help=f"The file, at or above all RUNs.  [default: {NAME} in the folder they share]"
)
@click.option("--protocol", "protocol_file", type=FOLDER, help="The protocol that was followed: a JSON file.")
@click.option(
    "--constraints", type=FOLDER, help="The file that pins versions.  [default: constraints.txt of a clone of medseg]"
)
@threads_option
def record(
    runs: tuple[Path, ...],
    output: Path | None,
    protocol_file: Path | None,
    constraints: Path | None,
    threads: int | None,
) -> None:
    """Write down what RUNs reached, and all that is needed to repeat them.

    results.json holds hashes of the data, plans, folds, weights and predictions, seeds, steps, versions, the kind of
    machine, the scores of each case and the commands; ro-crate-metadata.json beside it says the same as an RO-Crate.
    Neither names this machine, a user or a path outside. `medseg verify` holds them against what is there.
    """
    from medseg.core.provenance import machine
    from medseg.io.files import write_json
    from medseg.report.crate import crate
    from medseg.report.results import Results, Tolerance, require_followed

    path = output or Path(os.path.commonpath([run.resolve() for run in runs])) / NAME
    if path.is_dir():
        raise InputError(f"{path} is a folder", f"Name a file in it, like {path / NAME}")
    if len({run.resolve() for run in runs}) < len(runs):
        raise click.UsageError("A run is named twice")
    protocol = read_protocol(protocol_file) if protocol_file else None
    cores = threads or available_cores()
    tasks = [_sound(run, path.parent, cores) for run in progress("record", "run")(runs, len(runs))]
    if protocol:
        require_followed(protocol, tasks)
    results = Results(
        format=1,
        protocol=protocol,
        tolerance=protocol.tolerance if protocol else Tolerance(),
        software=_software(constraints),
        machine=machine(),
        tasks=tuple(tasks),
    )
    metadata = crate(results, path.name, _made(path.parent, results))
    write_json(path, results.model_dump(mode="json"))
    write_json(path.with_name(CRATE), metadata)
    fits = sum(len(one.fits) for one in tasks)
    click.echo(f"{count(len(tasks), 'run')}, {count(fits, 'fold')}: {path}")


def _sound(run: Path, base: Path, threads: int) -> TaskResults:
    """`collected`, and InputError where a model does not tell how it was made, or a name is none that others can
    read."""
    from pydantic import ValidationError

    try:
        return collected(run, base, threads)
    except KeyError as error:
        raise InputError(
            f"a model of {run} does not tell its {error.args[0]}", "Train it with `medseg train`"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{run} cannot be recorded: {key}: {first['msg']}", "Rename it, or train it anew") from None


def read_protocol(path: Path) -> Protocol:
    """The protocol in a file. Raises InputError where it is missing or not sound."""
    from medseg.io.files import read_json
    from medseg.report.results import parse_protocol

    return parse_protocol(read_json(path, "Name a protocol's file"), str(path))


def collected(run: Path, base: Path, threads: int) -> TaskResults:
    """A run as ``results.json`` in the folder ``base`` has it. Raises InputError where the run lies elsewhere, nothing
    of it was scored, or a part is missing or was changed after it was written."""
    from medseg.cli.report import commands, scored_of
    from medseg.core.provenance import digest
    from medseg.io.files import read_json, sha256_of
    from medseg.report.results import PlanFile, TaskResults

    folder = RunFolder(run)
    task, plan = folder.task(), folder.plan()
    folder.folds(task)
    scored = list(scored_of(folder, plan))
    if not scored:
        raise InputError(f"nothing of {run} was scored", "Score its predictions with `medseg evaluate`")
    place = relative(run, base)
    return TaskResults(
        task=task.name,
        run=place,
        data=_data(task, threads),
        plan=PlanFile(path=relative(folder.plan_file, base), sha256=sha256_of(folder.plan_file), decides=plan.digest()),
        folds=digest(read_json(folder.folds_file)),
        fits=tuple(_fit(folder, one, plan) for one in scored),
        commands=tuple(commands(folder, scored)),
    )


def relative(path: Path, base: Path) -> str:
    """A path from a folder on, with slashes. InputError where it is not within."""
    try:
        return path.resolve().relative_to(base.resolve()).as_posix()
    except ValueError:
        raise InputError(
            f"{path} is not within {base}, and paths in {NAME} lead nowhere else", "Name a folder above it with -o"
        ) from None


def weights_of(fold: Path) -> dict[str, str]:
    """The hashes of a model's weights, those of the stage before it too, by their files from the fold's folder on."""
    from medseg.io.files import sha256_of

    files = sorted((fold / "model").rglob("*.safetensors"))
    return {path.relative_to(fold).as_posix(): sha256_of(path) for path in files}


def _data(task: Task, threads: int) -> Data:
    from medseg.dataset.hashes import hash_task
    from medseg.report.results import Data, DataFile, listed

    found = hash_task(task, threads)
    files = tuple(DataFile(path=path, sha256=sha, bytes=size) for path, (sha, size) in sorted(found.items()))
    return Data(sha256=listed({one.path: one.sha256 for one in files}), licence=task.licence, files=files)


def _fit(folder: RunFolder, one: Scored, plan: Plan) -> Fit:
    from medseg.io.files import sha256_of
    from medseg.io.sidecar import read_index, read_sidecar
    from medseg.report.results import Fit, Predicted, organs, rows_of

    fold = folder.fold(one.configuration, one.fold)
    package = folder.package(one.configuration, one.fold)
    if package is None:
        raise InputError(f"{fold} has scores and no model", "Train it, or take the scores away")
    made = package.provenance
    if package.plan.digest() != plan.digest():
        raise InputError(f"{fold} was trained by another plan than {folder.plan_file}", "Train it anew")
    index = read_index(fold / "predictions")
    cases = {row.case for row in one.rows}
    if cases != set(index) or cases != set(package.held_out):
        case = sorted((cases ^ set(index)) | (cases ^ set(package.held_out)))[0]
        fault = f"{fold} does not hold it out, predict it and score it"
        raise InputError(fault, "Predict and evaluate anew", case=case)
    if gone := [case for case, path in index.items() if not path.is_file()]:
        raise InputError("its prediction is missing", "Predict it again with `medseg predict`", case=gone[0])
    engines = {read_sidecar(path).get("engine") for path in index.values()}
    return Fit(
        configuration=one.configuration,
        fold=one.fold,
        seed=made["seed"],
        steps=made["steps"],
        device=made["device"],
        threads=made.get("threads"),
        deterministic=bool(made.get("deterministic")),
        started_from=made.get("start"),
        machine=made.get("machine", {}),
        versions=made.get("versions", {}),
        seconds=made["seconds"],
        ended=made.get("ended"),
        peak_memory_bytes=made.get("peak_memory_bytes"),
        model=package.digest(),
        weights=weights_of(fold),
        engine=engines.pop() if len(engines) == 1 else None,
        predictions=tuple(
            Predicted(case=case, path=f"predictions/{path.name}", sha256=sha256_of(path))
            for case, path in sorted(index.items())
        ),
        organs=organs(one.rows),
        rows=rows_of(one.rows),
    )


def _software(constraints: Path | None) -> Software:
    import medseg
    from medseg.core.provenance import versions
    from medseg.io.clone import clone, commit_of, departures
    from medseg.io.files import sha256_of
    from medseg.report.results import Software

    folder = clone()
    commit = commit_of(folder) if folder else None
    own = folder / "constraints.txt" if folder else None
    pins = constraints or (own if own and own.is_file() else None)
    return Software(
        medseg=medseg.__version__,
        commit=commit.sha if commit else None,
        dirty=commit.dirty if commit else None,
        versions=versions(),
        departures=departures(pins) if pins else (),
        constraints=sha256_of(pins) if pins else None,
    )


def _made(base: Path, results: Results) -> dict[str, tuple[str, int]]:
    """The files of the runs, from the folder of results.json on, that the crate tells of: SHA-256 and bytes."""
    from medseg.io.files import sha256_of

    return {
        path: (sha256_of(base / path), (base / path).stat().st_size)
        for path in _files(results.tasks)
        if (base / path).is_file()
    }


def _files(tasks: Sequence[TaskResults]) -> Iterator[str]:
    for one in tasks:
        yield one.plan.path
        run = PurePosixPath(one.run)
        yield from (str(run / name) for name in ("folds.json", "fingerprint.json", "report.html"))
        for fit in one.fits:
            fold = run / fit.configuration / f"fold{fit.fold}"
            yield from (f"{fold}/{path}" for path in fit.weights)
            yield from (f"{fold}/{name}" for name in ("model/package.json", "log.json", "metrics.json", "metrics.csv"))
            yield from (f"{fold}/{one.path}" for one in fit.predictions)
