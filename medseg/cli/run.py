"""``medseg run``: the whole workflow, for people who do not know Snakemake."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import click

from medseg.cli.common import FOLDER, Duration, available_cores, device_option, table
from medseg.core.errors import InputError, MedsegError
from medseg.core.words import count

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# What Snakemake says of itself, and nobody asked for.
_NOISE = (
    "Assuming unrestricted", "Building DAG", "Using shell", "Provided ", "Rules claiming", "Select jobs", "Execute ",
    "Using workflow specific", "Using profile", "Config file ", "Complete log", "Elapsed time", "RuleException",
    "CalledProcessError", "Command '", "Cannot restore", "WorkflowError", "At least one job", "Exiting because",
    "Nothing to be done", "Shutting down", "Will exit after", "Terminating processes", '  File "',
)  # fmt: skip
# A command of the workflow that failed, and where it wrote why.
_FAILED = re.compile(r"Command '.* > (\S+\.log) 2>&1.* returned non-zero exit status")
_LAST_LINES = 15
# How long jobs that were asked to stop may take to write what they write last.
_GRACE_S = 120.0


class Text(click.ParamType[str]):
    """A duration as it was written, since the workflow takes it so."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, if it is a duration."""
        Duration().convert(value, param, ctx)
        return str(value).strip().lower()


class Folds(click.ParamType[str]):
    """Numbers of folds, as ``0,2`` or ``0-4``, or ``all``: as JSON, or "all"."""

    name = "folds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The numbers, each once, in their order."""
        text = str(value).strip().lower()
        if text == "all":
            return text
        if not re.fullmatch(r"\d{1,3}(-\d{1,3})?(,\d{1,3}(-\d{1,3})?)*", text):
            self.fail(f"{value!r} are no folds; write 0, or 0,1,2, or 0-4, or all", param, ctx)
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
        folds = sorted({fold for first, *last in ends for fold in range(first, (last or [first])[0] + 1)})
        if not folds:
            self.fail(f"{value!r} are no folds; write the lower one first", param, ctx)
        return json.dumps(folds)


@click.command()
@click.argument("tasks", metavar="[TASK ...]", type=FOLDER, nargs=-1)
@click.option("-o", "--output", type=FOLDER, default=Path("results"), show_default=True, help="Where everything goes.")
@click.option("--cores", type=click.IntRange(min=1), help="Cores to use in all.  [default: all, or the profile's]")
@click.option(
    "-c",
    "--configuration",
    "configurations",
    type=click.Choice(["3d", "2d", "3d-low", "3d-cascade"]),
    multiple=True,
    help="What to train; repeatable.  [default: 3d and 2d]",
)
@click.option("--folds", type=Folds(), help="Folds to train: 0, or 0,1,2, or 0-4, or all.  [default: 0]")
@click.option("--of-folds", type=click.IntRange(min=2), help="Folds to deal the subjects to.  [default: 5]")
@click.option("--budget", type=Text(), help="How long to train each network: 90s, 15m, 2h.  [default: 15m]")
@click.option("--family", metavar="NAME", help="Family of networks; `medseg models families` lists them.")
@click.option("--seed", type=click.IntRange(min=0), help="Random seed.  [default: 0]")
@device_option
@click.option("--profile", metavar="NAME|FOLDER", help="Where it runs: one of medseg's profiles, or a folder of yours.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--unlock", is_flag=True, help="After a run that was killed: let this folder be used again.")
def run(
    tasks: tuple[Path, ...],
    output: Path,
    cores: int | None,
    configurations: tuple[str, ...],
    folds: str | None,
    of_folds: int | None,
    budget: str | None,
    family: str | None,
    seed: int | None,
    device: str,
    profile: str | None,
    dry_run: bool,
    unlock: bool,
) -> None:
    """Check, plan, train, predict, evaluate and report each TASK.

    Without a TASK, three made-up ones whose truth is known. What is done already is left as it is: after an
    interruption (ctrl-C, SIGTERM), or with other options, the same command goes on from there, a training from its
    last checkpoint. For all that can be configured, start Snakemake itself (pipelines/config.yaml).

    Exit status: that of Snakemake, 0 where all is done; 2 the input is wrong.
    """
    _require_snakemake()
    root = workflow()
    settings = {
        "tasks": [str(task) for task in _checked(tasks)],
        "results": str(_plain(output, "the results folder")),
        "configurations": list(dict.fromkeys(configurations)),
        "of_folds": of_folds,
        "folds": _all_folds(root, of_folds) if folds == "all" else json.loads(folds or "null"),
        "budget": budget,
        # The made-up tasks have budgets of their own.
        "phantoms": {"budget": {"3d": budget, "2d": budget}} if budget and not tasks else None,
        "family": _family(family),
        "seed": seed,
        "device": None if device == "auto" else device,  # or the profile's would not hold
    }
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile"), "--rerun-incomplete"]
    command += ["--quiet", "host", "reason", "rules"]
    if profile:
        command += ["--workflow-profile", str(_profile(profile, root))]
    if cores or not profile:
        command += ["--cores", str(cores or available_cores())]
    command += ["--dry-run"] * dry_run + ["--unlock"] * unlock + ["--config", *map(_entry, *_given(settings))]
    seen = _follow(command, dry_run)
    _end(seen, output, dry_run, unlock)


# ---- what is asked for --------------------------------------------------------------------------


def workflow() -> Path:
    """The folder that holds the Snakefile: in an installed package, or else in the clone that this is."""
    import medseg

    package = Path(medseg.__file__).parent
    for folder in (package / "workflow", package.parent):
        if (folder / "Snakefile").is_file() and (folder / "pipelines" / "config.yaml").is_file():
            return folder
    raise MedsegError("this medseg came without its workflow. Install it anew, or run it from a clone.")


def _require_snakemake() -> None:
    if importlib.util.find_spec("snakemake") is None:
        raise InputError("the workflow needs Snakemake, which is not installed", 'pip install "medseg[workflow]"')


def _checked(tasks: tuple[Path, ...]) -> list[Path]:
    for task in tasks:
        if not (task / "dataset.json").is_file():
            raise InputError(f"{task} is no Decathlon task: it has no dataset.json", "See data/README.md")
        _plain(Path(task.resolve().name), "the task's folder")
    names = [task.resolve().name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two tasks are called {twice}", "Rename one, since results go by that name")
    return list(tasks)


def _plain(path: Path, what: str) -> Path:
    """Paths that go through Snakemake's patterns and a shell are of letters that mean themselves there."""
    if shlex.quote(str(path)) != str(path):
        raise InputError(f"{what} is called {str(path)!r}", "Let it have no blanks and none of the shell's characters")
    return path


def _family(name: str | None) -> str | None:
    if name is not None:
        from medseg.plan.families import require_family

        require_family(name)
    return name


def _all_folds(root: Path, of_folds: int | None) -> list[int]:
    import yaml  # type: ignore[import-untyped]  # Snakemake brings it along

    written = yaml.safe_load((root / "pipelines" / "config.yaml").read_text())["of_folds"]
    return list(range(of_folds or int(written)))


def _profile(name: str, root: Path) -> Path:
    for folder in (root / "profiles" / name, Path(name)):
        if any((folder / f"config.{ending}").is_file() for ending in ("yaml", "v8+.yaml", "v9+.yaml")):
            return folder
    known = ", ".join(sorted(path.parent.name for path in (root / "profiles").glob("*/config*.yaml")))
    raise InputError(f"there is no profile {name}", f"Name one of medseg's ({known}), or a folder with a config.yaml")


def _given(settings: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """The settings that differ from pipelines/config.yaml, where nothing was said."""
    given = {key: value for key, value in settings.items() if value not in (None, [])}
    return list(given), list(given.values())


def _entry(key: str, value: Any) -> str:
    """A setting as Snakemake's command line reads it: it takes quotes at either end away, and then a folder
    called 2024 for a number, unless there are blanks around them."""
    return f"{key}={value}" if isinstance(value, int) else f"{key}= {json.dumps(value, ensure_ascii=False)} "


# ---- how it goes --------------------------------------------------------------------------------


@dataclass
class Seen:
    """How a run of Snakemake went: its status, what it told of results, what it refused, the logs of steps that
    failed, whether ``nothing`` was started after all, and whether it was asked to stop."""

    status: int = 0
    results: list[str] = field(default_factory=list)
    refused: str = ""
    early: list[str] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    started: bool = False
    nothing: bool = False
    locked: bool = False
    stopped: bool = False


def _follow(command: list[str], dry_run: bool) -> Seen:
    """Run Snakemake, pass on what it says of the work and the signals that this process gets."""
    seen = Seen()
    with _passing_on(seen) as children:
        # In a group of its own: ctrl-C reaches it once, from here, and not its jobs in whatever order.
        child = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if dry_run else None,
            stderr=subprocess.STDOUT if dry_run else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        children.append(child)
        stream = child.stdout if dry_run else child.stderr
        assert stream is not None  # noqa: S101
        with stream:
            _listen(stream, seen, dry_run)
        seen.status = child.wait()
    return seen


@contextlib.contextmanager
def _passing_on(seen: Seen) -> Iterator[list[subprocess.Popen[str]]]:
    """Let each signal to stop reach Snakemake, which then starts no more jobs, and its jobs, which save what they
    have; in the end none of them is left. Snakemake is to be put into the list that this gives."""
    import psutil

    children: list[subprocess.Popen[str]] = []
    jobs: dict[int, psutil.Process] = {}

    def stop(*_: Any) -> None:
        if not seen.stopped:
            click.echo("stopping; jobs save what they have", err=True)
        seen.stopped = True
        for child in children:
            with contextlib.suppress(psutil.Error):
                jobs.update({job.pid: job for job in psutil.Process(child.pid).children(recursive=True)})
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
        for job in jobs.values():
            with contextlib.suppress(psutil.Error):
                job.terminate()

    # Before Snakemake starts, which would else ignore what a shell made this process ignore. But nohup means it.
    wanted = [number for number in _SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield children
        for child in children:
            if child.poll() not in (None, 0):  # killed, it has stopped nothing; they are in its group
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGTERM)
        psutil.wait_procs(list(jobs.values()), timeout=_GRACE_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(stream: IO[str], seen: Seen, dry_run: bool) -> None:
    for line in map(str.rstrip, stream):
        seen.started = seen.started or line.startswith("Building DAG")
        seen.locked = seen.locked or line.startswith("LockException")
        if not seen.started:
            seen.early.append(line)
            if line.startswith("medseg: "):
                seen.refused = line.removeprefix("medseg: ")
        elif line.startswith(("report: ", "model: ")):
            seen.results.append(line)
        elif dry_run:
            if row := re.fullmatch(r"([a-z_]+) +(\d+)", line):
                seen.rows.append([row[1], row[2]])
            else:
                seen.early.append(line)
        elif failed := _FAILED.match(line):
            seen.logs.append(Path(failed[1]))
        elif "othing was started." in line:  # by the preflight, which has said why
            seen.nothing = True
            if not line.startswith("medseg: nothing"):
                click.echo(line, err=True)
        elif line and not seen.locked and not line.startswith(_NOISE):
            click.echo(line, err=True)


def _end(seen: Seen, output: Path, dry_run: bool, unlock: bool) -> None:
    """Say how it ended, and leave with Snakemake's status where that is not 0."""
    if seen.refused:
        fault, _, remedy = seen.refused.partition(". ")
        raise InputError(fault, remedy or "See pipelines/config.yaml")
    if seen.locked:
        raise InputError(
            "another run is at work in this folder, or one was killed here",
            "If none is at work any more, run the same command with --unlock added, and then without",
        )
    if seen.stopped:
        click.echo("medseg: stopped. The same command goes on from what is done.", err=True)
        raise SystemExit(_status(seen.status) or 1)
    if seen.status:
        _failed(seen, output, dry_run)
    if unlock:
        click.echo("this folder can be used again; the same command without --unlock goes on from what is done")
    elif dry_run:
        _show(seen.rows)
    else:
        click.echo("\n".join(seen.results) if seen.results else f"nothing to be done: all is in {output}")


def _failed(seen: Seen, output: Path, dry_run: bool) -> NoReturn:
    if dry_run or not seen.started:
        click.echo("\n".join(seen.early), err=True)
        click.echo("medseg: Snakemake cannot start the workflow; what it says stands above.", err=True)
    else:
        if seen.status < 0:
            click.echo(f"medseg: Snakemake was ended by {signal.Signals(-seen.status).name}.", err=True)
            raise SystemExit(_status(seen.status))
        if seen.nothing:
            click.echo("medseg: nothing was started; why stands above.", err=True)
            raise SystemExit(2)
        for log in seen.logs:
            click.echo(f"{log}:\n{_last_lines(log)}", err=True)
        click.echo(
            f"medseg: a step failed; why stands above, and in {output / 'logs'}. Mend it and run the same command: it "
            "goes on from what is done.",
            err=True,
        )
    raise SystemExit(_status(seen.status))


def _last_lines(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
    except OSError:
        return "(this log is not there)"


def _status(status: int) -> int:
    """A shell's word for how a process ended."""
    return 128 - status if status < 0 else status


def _show(rows: list[list[str]]) -> None:
    """The steps of a dry run, each once: Snakemake lists them before and after."""
    steps = {name: number for name, number in rows if name not in ("all", "total")}
    if not steps:
        click.echo("nothing would be done: all is there")
        return
    click.echo(table([["step", "times"], *([name, number] for name, number in steps.items())], right=(1,)))
    click.echo(f"{count(sum(map(int, steps.values())), 'step')} would be done")
