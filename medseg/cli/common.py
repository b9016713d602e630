"""What several verbs share: options, progress bars, where a run keeps its files."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from medseg.core.errors import InputError

if TYPE_CHECKING:
    from medseg.core.progress import Progress
    from medseg.dataset.split import Fold
    from medseg.dataset.task import Case, Task
    from medseg.models.package import ModelPackage
    from medseg.plan.fingerprint import Fingerprint
    from medseg.plan.plan import Plan

F = TypeVar("F", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path)


def available_cores() -> int:
    """Cores that this process may use, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0))


def use_sleeping_threads() -> None:
    """Let OpenMP's threads sleep while they wait.

    To be called before torch is imported: its OpenMP reads the policy once. By default waiting
    threads spin, and two programs that share the cores then hold each other up, by far more than
    sleeping costs one that is alone (benchmarks/README.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_cores(threads: int | None) -> int:
    """Let torch compute on so many cores (all that there are, unless given), and tell how many."""
    use_sleeping_threads()
    import torch

    cores = threads or available_cores()
    torch.set_num_threads(cores)
    return cores


def threads_option(function: F) -> F:
    """``--threads``."""
    return click.option(
        "--threads", type=click.IntRange(min=1), default=None, help="Cores to compute on.  [default: all]"
    )(function)


def device_option(function: F) -> F:
    """``--device``."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where the network runs; auto takes the GPU where there is one.",
    )(function)


def seed_option(function: F) -> F:
    """``--seed``."""
    return click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")(
        function
    )


def configuration_option(function: F) -> F:
    """``--configuration``."""
    return click.option(
        "-c", "--configuration", default="3d", show_default=True, help="One of the plan's configurations."
    )(function)


def progress(what: str, unit: str = "case") -> Progress:
    """Wraps an iteration of known length in a bar, drawn on a terminal only."""

    def bar(rows: Iterable[Any], total: int) -> Iterable[Any]:
        from tqdm import tqdm

        return tqdm(rows, total=total, desc=what, disable=not sys.stderr.isatty(), leave=False, unit=unit)

    return bar


class Duration(click.ParamType[float]):
    """Seconds from ``90s``, ``15m``, ``2h``, ``1d`` or ``1h30m``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds, above zero."""
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        text = str(value).strip().lower()
        if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
            self.fail(f"{value!r} is no duration; write 90s, 15m or 1h30m", param, ctx)
        seconds = sum(float(n) * units[u] for n, u in re.findall(r"(\d+(?:\.\d+)?)([dhms])", text))
        if seconds <= 0:
            self.fail("a duration must be above zero", param, ctx)
        return seconds


class Budget(click.ParamType[tuple[str, float]]):
    """A duration, for all configurations ("") or, as ``3d=100s``, for one: its name and seconds."""

    name = "[name=]duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """The configuration's name, "" for all, and seconds above zero."""
        if isinstance(value, tuple):
            return value
        name, _, duration = str(value).rpartition("=")
        return name.strip(), Duration().convert(duration, param, ctx)


class Memory(click.ParamType[int]):
    """Bytes from ``4GiB``, ``500MiB``, ``4GB`` or ``4G`` (which means GiB)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, above zero."""
        units = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])(i?b)?", str(value).strip().lower())
        if not found:
            self.fail(f"{value!r} is no size; write 4GiB or 500MiB", param, ctx)
        unit = units[found[2]] if found[3] != "b" else 1000 ** ("kmgt".index(found[2]) + 1)
        size = int(float(found[1]) * unit)
        if size <= 0:
            self.fail("a size must be above zero", param, ctx)
        return size


class Patch(click.ParamType[tuple[int, ...]]):
    """Voxels along two or three axes, from ``96x96x64`` or ``256x256``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Two or three numbers of 8 to 1024."""
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"\d{1,4}(x\d{1,4}){1,2}", str(value).strip().lower()):
            self.fail(f"{value!r} is no patch; write 96x96x64 or 256x256", param, ctx)
        sizes = tuple(int(part) for part in str(value).strip().lower().split("x"))
        if not all(8 <= size <= 1024 for size in sizes):
            self.fail("a patch has 8 to 1024 voxels along each axis", param, ctx)
        return sizes


@dataclass(frozen=True)
class RunFolder:
    """Where a run on one task keeps its files; `medseg plan` makes it."""

    path: Path

    def __post_init__(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file", "Name the folder that `medseg plan` wrote")

    @property
    def index(self) -> Path:
        return self.path / "run.json"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def folds_file(self) -> Path:
        return self.path / "folds.json"

    def store(self, configuration: str) -> Path:
        """Preprocessed cases of a configuration."""
        return self.path / configuration / "preprocessed"

    def unlabelled(self, configuration: str) -> Path:
        """Likewise the scans without labels, where the plan learns from them."""
        return self.path / configuration / "unlabelled"

    def fold(self, configuration: str, fold: int) -> Path:
        """What a fold gives: model, log, predictions, metrics."""
        return self.path / configuration / f"fold{fold}"

    def checkpoints(self, configuration: str, fold: int) -> Path:
        """Checkpoints, apart from everything that a workflow declares as output and may delete."""
        return self.path / "checkpoints" / configuration / f"fold{fold}"

    def alone(self, *work: str) -> contextlib.AbstractContextManager[None]:
        """Nobody else does this ``work`` (train, 3d, fold0) of the run meanwhile: who is at it is waited for. What it
        leaves is then found done, as by one whose workflow was killed and started again. Raises InputError where
        nothing was planned here, before anything is written."""
        from medseg.io.files import alone, read_json

        if work == ("plan",):
            lock = self.path / f".{self.index.name}"  # with which `new_folder` has marked it
        else:
            read_json(self.index, self._remedy)
            lock = self.path.joinpath("checkpoints", *work[1:], f"{work[0]}.lock")
        return alone(lock, " ".join(work), lambda told: click.echo(told, err=True))

    def package(self, configuration: str, fold: int) -> ModelPackage | None:
        """The model of a fold; None where it has not been trained."""
        from medseg.models.package import INDEX, load_package

        folder = self.fold(configuration, fold) / "model"
        return load_package(folder) if (folder / INDEX).exists() else None

    @property
    def _remedy(self) -> str:
        return f"Run `medseg plan TASK -o {self.path}` first"

    @property
    def model(self) -> Path:
        """The package that `medseg choose` makes of the folds."""
        return self.path / "model"

    def task(self) -> Task:
        """The task that the run was planned for. Raises InputError where it is not there any more."""
        from medseg.dataset.task import load_task
        from medseg.io.files import read_json

        index = read_json(self.index, self._remedy)
        if not isinstance(index, dict) or index.get("format") != 1 or not isinstance(index.get("task"), str):
            raise InputError(f"{self.index} has another format", "Plan anew")
        folder = Path(index["task"])
        if not folder.is_dir():
            raise InputError(
                f"the task of this run is not at {folder} any more",
                f"Put it back, or run `medseg plan TASK -o {self.path}` with its new place",
            )
        return load_task(folder)

    def plan(self) -> Plan:
        """The run's plan, checked."""
        from medseg.plan.plan import read_plan

        return read_plan(self.plan_file)

    def fingerprint(self) -> Fingerprint:
        """What was measured of the task when the run was planned."""
        from medseg.plan.fingerprint import read_fingerprint

        return read_fingerprint(self.path / "fingerprint.json")

    def folds(self, task: Task) -> tuple[Fold, ...]:
        """The run's folds, checked."""
        from medseg.dataset.split import read_folds

        return read_folds(self.folds_file, task)


def unlabelled_cases(task: Task) -> tuple[Case, ...]:
    """The scans that a task lists under ``test``. Raises InputError where there are none, and where one is
    a training case too, and so not unseen where that is held out."""
    if not task.test:
        raise InputError(
            f"task {task.name} lists no scans without labels",
            'List them in dataset.json under "test", or plan without --unlabelled',
        )
    ids = [case.id for case in task.test]
    if twice := sorted({case.id for case in task.cases} & set(ids)) or sorted({i for i in ids if ids.count(i) > 1}):
        raise InputError(
            "it is listed twice in dataset.json, at least once under test", "List it in one place", case=twice[0]
        )
    return task.test


def unlabelled_for(task: Task, held_out: Iterable[str]) -> tuple[Case, ...]:
    """Those that a fold may learn from: not of a subject that has one of its ``held_out`` cases. Raises
    InputError as `unlabelled_cases` does."""
    unseen = {task.case(case).subject for case in held_out}
    return tuple(case for case in unlabelled_cases(task) if case.subject not in unseen)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM ends the run as an interruption does, so that what is being written is finished or
    taken away; the exit status is that of a process that was terminated."""

    def stop(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    # Where another verb has called this one, that verb's word on signals holds.
    if threading.current_thread() is not threading.main_thread() or callable(signal.getsignal(signal.SIGTERM)):
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def table(rows: list[list[str]], right: Iterable[int] = ()) -> str:
    """Aligned columns, the first row a heading; columns in ``right`` are flushed right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    flush = set(right)
    lines = [
        "  ".join(
            cell.rjust(w) if i in flush else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
