"""What a SLURM cluster has, as its own programs tell, whether jobs fit it, and what becomes of those left to it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medseg.core.errors import InputError, MedsegError
from medseg.core.words import count

_PATIENCE = 30  # seconds for one of SLURM's programs
_PARTING = 120  # seconds for what is withdrawn to be gone; SLURM gives a job 30 to end
_AT_ONCE = 16


class Job(BaseModel):
    """What a job of the workflow asks for. ``partition`` is empty where none is named; ``memory_mb`` and ``minutes``
    None where that follows from what earlier jobs make."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: str
    partition: str = ""
    account: str = ""
    cores: int = 1
    gpus: int = 0
    memory_mb: int | None = None
    minutes: int | None = None


class Wanted(BaseModel):
    """What a workflow is about to do: its ``jobs``, ``slurm`` whether SLURM runs them,
    ``tasks`` and ``results`` its folders, ``ask_nodes`` how many nodes of each partition to ask. ``starts`` are the
    names that earlier starts gave to all their jobs, ``works`` the folder and the comment of this one's jobs, as squeue
    prints them."""

    model_config = ConfigDict(extra="forbid")

    results: Path
    tasks: list[Path] = []
    slurm: bool = False
    ask_nodes: int = Field(default=0, ge=0)
    jobs: list[Job] = []
    starts: frozenset[str] = frozenset()
    works: frozenset[str] = frozenset()


def read_wanted(text: str) -> Wanted:
    """From JSON. Raises InputError where it is something else."""
    try:
        return Wanted.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(f"it is no list of jobs ({where}: {first['msg']})", "Let the workflow call it") from None


@dataclass(frozen=True)
class NodeKind:
    """Nodes of one partition that are alike; ``up`` those that take jobs."""

    cores: int
    memory_mb: int
    gpus: int
    up: tuple[str, ...]


@dataclass
class Partition:
    """``minutes``: the longest that a job may take; None where there is no limit. ``cancels``: whether a job that is
    preempted is ended, and not started again later."""

    name: str
    minutes: int | None
    default: bool
    cancels: bool = False
    kinds: list[NodeKind] = field(default_factory=list)


def partitions() -> dict[str, Partition]:
    """By name. Raises MedsegError where SLURM does not answer."""
    return read_partitions(_told("sinfo", "--noheader", "--Node", "--format", "%P|%l|%c|%m|%G|%T|%N|%M"))


def read_partitions(told: str) -> dict[str, Partition]:
    """What ``sinfo`` printed: a line for each node and partition, of partition (its default one with a star), time
    limit, cores, megabytes, generic resources, state, name and what becomes of preempted jobs."""
    found: dict[str, Partition] = {}
    for line in told.splitlines():
        title, limit, cores, memory, gres, state, node, preempted = (part.strip() for part in line.split("|"))
        name, default, cancels = title.rstrip("*"), title.endswith("*"), "CANCEL" in preempted.upper()
        partition = found.setdefault(name, Partition(name, _minutes(limit), default, cancels))
        up = () if re.match(r"(down|drain|fail|unk|inval|maint|power_?down)", state, re.IGNORECASE) else (node,)
        partition.kinds.append(NodeKind(_number(cores), _number(memory), _gpus(gres), up))
    return found


def _number(text: str) -> int:
    """Of a column that may say 16+ for 16 or more."""
    return int(re.sub(r"\D", "", text) or 0)


def _gpus(gres: str) -> int:
    """How many "gpu:a100:4(S:0-1),lustre:1" has."""
    counted = re.findall(r"(?:^|,)gpu(?::[^:,()]+)*?(?::(\d+))?(?=[,(]|$)", gres)
    return sum(int(number or 1) for number in counted)


def _minutes(limit: str) -> int | None:
    """Of days-hours:minutes:seconds, as SLURM shortens it; None without a limit."""
    if not re.fullmatch(r"(\d+-)?[\d:]+", limit):
        return None
    days, _, rest = limit.rpartition("-")
    parts = [int(n) for n in rest.split(":")]
    while len(parts) < 3:
        parts.insert(0, 0)
    return int(days or 0) * 1440 + parts[0] * 60 + parts[1] + (1 if parts[2] else 0)


def faults(jobs: Sequence[Job], known: dict[str, Partition]) -> Iterator[str]:
    """What keeps jobs from ever running, one line each, and how to mend it."""
    names = ", ".join(sorted(known)) or "none"
    told = set()
    for job in jobs:
        for text in _of_job(job, known, names):
            if text not in told:
                told.add(text)
                yield text


def used(jobs: Sequence[Job], known: dict[str, Partition]) -> list[Partition]:
    """The partitions that jobs go to, by name."""
    found = [_partition(job, known) for job in jobs]
    return sorted({one.name: one for one in found if one}.values(), key=lambda one: one.name)


def _partition(job: Job, known: dict[str, Partition]) -> Partition | None:
    """The one it names, or the cluster's default; None where there is no such."""
    return known.get(job.partition) if job.partition else next((one for one in known.values() if one.default), None)


def _of_job(job: Job, known: dict[str, Partition], names: str) -> Iterator[str]:
    if job.account.startswith("CHANGE"):
        yield "the profile names no account (slurm_account): write yours into it, or leave the line out"
    partition = _partition(job, known)
    if partition is None:
        unnamed = not job.partition or job.partition.startswith("CHANGE")
        what = "the profile names no partition" if unnamed else f"the cluster has no partition {job.partition!r}"
        yield f"{what} (slurm_partition): write one of these into it: {names}"
        return
    if job.minutes and partition.minutes is not None and job.minutes > partition.minutes:
        yield (
            f"{job.rule} asks for {job.minutes} minutes, and {partition.name} lets a job run {partition.minutes}; "
            f"lower the budget, say --set-resources {job.rule}:runtime=MINUTES, or name another partition"
        )
    up = [kind for kind in partition.kinds if kind.up]
    if not up:
        yield f"{job.rule}: no node of {partition.name} takes jobs now; wait, or name another partition"
        return
    fitting = [
        kind
        for kind in up
        if kind.cores >= job.cores and kind.gpus >= job.gpus and kind.memory_mb >= (job.memory_mb or 0)
    ]
    if not fitting:
        memory = "memory yet unknown" if job.memory_mb is None else f"{job.memory_mb} MB"
        largest = max(up, key=lambda kind: (kind.gpus >= job.gpus, kind.memory_mb, kind.cores))
        yield (
            f"{job.rule} asks for {count(job.cores, 'core')}, {memory} and {count(job.gpus, 'GPU')}, and no node of "
            f"{partition.name} has them (the largest: {largest.cores}, {largest.memory_mb} MB, {largest.gpus}); "
            "lower threads or memory_mb (medseg.yaml), or name another partition"
        )


def ask_nodes(
    jobs: Sequence[Job], known: dict[str, Partition], paths: Sequence[Path], most: int
) -> tuple[list[str], int, int]:
    """What nodes do not see: faults, how many nodes answered, and how many were too busy. At most so many of each
    partition are asked, each by a job of its own that looks whether the ``paths`` can be read; the first of them, a
    folder, and the node's own temporary folder, whether they can be written."""
    wanted = [(partition.name, node) for partition in used(jobs, known) for node in _nodes(partition)[:most]]
    accounts = {job.partition: job.account for job in jobs if job.account}

    def ask(one: tuple[str, str]) -> list[str] | None:
        name, node = one
        return _ask(node, name, accounts.get(name, ""), paths)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip(wanted, pool.map(ask, wanted), strict=True))
    found = [f"node {node}: {what}" for (_, node), answer in answers.items() if answer for what in answer]
    silent = sum(answer is None for answer in answers.values())
    return found, len(answers) - silent, silent


def _nodes(partition: Partition) -> list[str]:
    return list(dict.fromkeys(node for kind in partition.kinds for node in kind.up))


_LOOK = """
for path in "$@"; do [ -r "$path" ] || echo "cannot read $path"; done
touch "$1/.medseg-$$" 2>/dev/null && rm "$1/.medseg-$$" || echo "cannot write $1"
touch "${TMPDIR:-/tmp}/.medseg-$$" 2>/dev/null && rm "${TMPDIR:-/tmp}/.medseg-$$" || echo "cannot write ${TMPDIR:-/tmp}"
echo looked
"""


def _ask(node: str, partition: str, account: str, paths: Sequence[Path]) -> list[str] | None:
    """What a node does not see; None where it had no time."""
    command = ["srun", "--immediate=20", "-N1", "-n1", "-w", node, "-p", partition, "-t", "1", "--mem", "50"]
    command += ["-A", account] if account else []
    # From /, since srun goes to the folder that it is called in, which may be the one that is not there.
    command += ["--chdir", "/", "sh", "-c", _LOOK, "sh", *map(str, paths)]
    try:
        ran = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = ran.stdout.splitlines()
    return lines[:-1] if lines[-1:] == ["looked"] else None


@dataclass(frozen=True)
class Left:
    """A job that an earlier start left to SLURM."""

    number: str
    state: str

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def left(starts: Collection[str], works: Collection[str]) -> list[Left]:
    """This user's jobs that an earlier start submitted for the same work. Raises MedsegError where SLURM is silent."""
    if not starts:
        return []
    return read_left(_told("squeue", "--me", "--noheader", "--format", "%i|%j|%T|%Z|%k"), starts, works)


def read_left(told: str, starts: Collection[str], works: Collection[str]) -> list[Left]:
    """What ``squeue`` printed: a line for each job, of number, name, state, folder and comment."""
    lines = [line.strip().split("|", 3) for line in told.splitlines() if line.count("|") >= 4]
    return [Left(number, state) for number, name, state, work in lines if name in starts and work in works]


def part_with(starts: Collection[str], works: Collection[str]) -> tuple[set[str], set[str]]:
    """The numbers of the jobs that earlier starts left and that are withdrawn now, and of those that run on.

    Who waits is withdrawn, or it would do later, and anew, what this start has done by then; who runs is kept from
    being requeued, since it would wait once more. Raises MedsegError where that does not come to an end."""
    withdrawn: set[str] = set()
    end = time.monotonic() + _PARTING
    while True:
        jobs = left(starts, works)
        waiting = {job.number for job in jobs if job.waits}
        # Whether it is requeued only its end tells.
        ending = {job.number for job in jobs if job.state == "COMPLETING"}
        running = {job.number for job in jobs} - waiting - ending
        for number in waiting:
            _ask_for("scancel", number)
        for number in running:
            _ask_for("scontrol", "update", f"JobId={number}", "Requeue=0")
        withdrawn |= waiting
        if not waiting | ending:
            return withdrawn, running
        if time.monotonic() > end:
            numbers = " ".join(sorted(waiting | ending))
            raise MedsegError(f"jobs of an earlier start do not end. See to it (scancel {numbers}), and start again.")
        time.sleep(1)


def _ask_for(*command: str) -> None:
    """Of a job, which may have ended meanwhile: whether it was done, the next look tells."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False)  # noqa: S603


def _told(*command: str) -> str:
    try:
        ran = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
    except FileNotFoundError:
        raise MedsegError(f"there is no {command[0]} here. Run this where jobs are submitted.") from None
    except subprocess.TimeoutExpired:
        raise MedsegError(f"SLURM does not answer ({command[0]}). Try again later.") from None
    if ran.returncode:
        why = ran.stderr.strip().splitlines()
        raise MedsegError(f"SLURM does not answer ({command[0]}: {why[-1] if why else ran.returncode}). Try later.")
    return ran.stdout
