"""This machine: what there is of it for this process, and whether that is enough."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

import medseg
from medseg.core.finding import Finding, Verdict
from medseg.core.memory import control_groups, free_memory, memory_limit
from medseg.core.provenance import processor_name
from medseg.core.words import count

_GIB, _MIB = 2**30, 2**20
# Predicting takes a few hundred MiB beyond the libraries, the example workflow 1 GiB; plans count on some GiB.
_LEAST_FREE, _EASY_FREE = 1 * _GIB, 4 * _GIB
_LEAST_TEMPORARY, _EASY_TEMPORARY = 100 * _MIB, 1 * _GIB
_EASY_SHM = 64 * _MIB
_LEAST_FILES, _EASY_FILES = 128, 1024
_DAY = 86400.0


@dataclass(frozen=True)
class Machine:
    """Facts. ``cores`` may be used by this process, of ``machine_cores``; ``quota`` is how many cores' time a control
    group gives it, None where it limits nothing. ``memory`` is what the machine has, ``memory_limit`` what this process
    may take of it, ``memory_free`` what is left, in bytes."""

    system: str
    python: str
    architecture: str
    processor: str
    instructions: frozenset[str]
    cores: int
    machine_cores: int
    quota: float | None
    memory: int
    memory_limit: int
    memory_free: int


@dataclass(frozen=True)
class Surroundings:
    """Facts. Whether a file can be made in the home folder (None: there is no such folder); bytes free where temporary
    files go and in shared memory (None: there is no such place, or it cannot be written); files that may be
    open at once; and by how many seconds the clock is behind the time at which medseg was installed."""

    home_writable: bool | None
    temporary_free: int | None
    shared_free: int | None
    open_files: int
    clock_behind: float


def look_at_machine() -> Machine:
    """What Linux tells of the machine, without its name or its user's."""
    quotas = list(_quotas())
    return Machine(
        system=_system(),
        python=platform.python_version(),
        architecture=platform.machine(),
        processor=processor_name(),
        instructions=frozenset(_instructions()),
        cores=len(os.sched_getaffinity(0)),
        machine_cores=psutil.cpu_count() or 1,
        quota=min(quotas) if quotas else None,
        memory=int(psutil.virtual_memory().total),
        memory_limit=memory_limit(),
        memory_free=free_memory(),
    )


def look_around() -> Surroundings:
    """What else a process lives on; nothing is left anywhere."""
    return Surroundings(
        home_writable=_can_write(Path.home()),
        temporary_free=_room(None),
        shared_free=_room(Path("/dev/shm")),  # noqa: S108
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        clock_behind=Path(medseg.__file__).stat().st_mtime - time.time(),
    )


def judge_machine(machine: Machine) -> list[Finding]:
    """Is there enough of it?"""
    return [*_judge_system(machine), *_judge_processor(machine), *_judge_memory(machine)]


def _judge_system(machine: Machine) -> Iterator[Finding]:
    text = f"{machine.system}, Python {machine.python}"
    if machine.system.startswith("Linux"):
        yield Finding("machine", "ok", text)
    else:
        yield Finding("machine", "problem", f"{text}: medseg runs on Linux", "Use Linux, on Windows within WSL 2")


def _judge_processor(machine: Machine) -> Iterator[Finding]:
    there = [name for name in ("AVX2", "AVX-512", "bf16") if name in machine.instructions]
    instructions = ", ".join(there) or "none of AVX2, AVX-512, bf16"
    text = f"{machine.processor}, {machine.architecture}; instructions: {instructions}"
    if machine.architecture in ("x86_64", "AMD64") and "AVX2" not in machine.instructions:
        yield Finding(
            "machine", "note", text, "Networks run many times slower without AVX2: let a virtual machine pass the "
            "processor through (CPU type 'host'), or take a newer one",
        )  # fmt: skip
    else:
        yield Finding("machine", "ok", text)
    text = f"{count(machine.cores, 'core')} of {machine.machine_cores} for this process"
    if machine.quota is not None and machine.quota < machine.cores - 0.5:
        whole = max(1, round(machine.quota))
        yield Finding(
            "machine", "note", f"{text}, but a control group gives it the time of only {machine.quota:g}",
            f"Say --threads {whole}, for `medseg run` --cores {whole}: more threads than that hold each other up",
        )  # fmt: skip
    else:
        yield Finding("machine", "ok", text)


def _judge_memory(machine: Machine) -> Iterator[Finding]:
    limited = machine.memory_limit < machine.memory
    text = f"{_gib(machine.memory_free)} of memory free of {_gib(machine.memory_limit)}"
    text += f", to which a control group limits it ({_gib(machine.memory)} in the machine)" if limited else ""
    more = "Ask the scheduler or the container for more" if limited else "End other programs, or use a larger machine"
    if machine.memory_free < _LEAST_FREE:
        yield Finding("machine", "problem", f"{text}; at least {_gib(_LEAST_FREE)} is needed", more)
    elif machine.memory_free < _EASY_FREE:
        yield Finding("machine", "note", f"{text}, which is enough for small scans only", more)
    else:
        yield Finding("machine", "ok", text)


def judge_surroundings(around: Surroundings) -> list[Finding]:
    """Is there what programs take for granted?"""
    return [
        _judge_temporary(around.temporary_free),
        _judge_shared(around.shared_free),
        _judge_home(around.home_writable),
        _judge_files(around.open_files),
        _judge_clock(around.clock_behind),
    ]


def _judge_temporary(free: int | None) -> Finding:
    if free is None:
        return Finding(
            "surroundings", "problem", "no folder for temporary files can be written",
            "Make /tmp writable, or set TMPDIR to a folder that is",
        )  # fmt: skip
    text = f"{_gib(free)} free for temporary files"
    if free < _EASY_TEMPORARY:
        word: Verdict = "problem" if free < _LEAST_TEMPORARY else "note"
        return Finding("surroundings", word, text, "Clean up there, or set TMPDIR to a folder with more room")
    return Finding("surroundings", "ok", text)


def _judge_shared(free: int | None) -> Finding:
    if free is None:
        return Finding(
            "surroundings", "problem", "/dev/shm cannot be written, so that processes cannot work together",  # noqa: S108
            "Mount it as tmpfs, mode 1777; in a container leave it as the runtime makes it",
        )  # fmt: skip
    if free < _EASY_SHM:
        return Finding(
            "surroundings", "note", f"{_mib(free)} of shared memory free (/dev/shm)",
            "medseg takes next to none; for several GPUs start a container with --shm-size 1g",
        )  # fmt: skip
    return Finding("surroundings", "ok", f"{_gib(free)} of shared memory free (/dev/shm)")


def _judge_home(writable: bool | None) -> Finding:
    if writable:
        return Finding("surroundings", "ok", "the home folder can be written")
    text = "there is no home folder" if writable is None else "the home folder cannot be written"
    return Finding(
        "surroundings", "note", text, "Models cannot be installed there: name another place with --models-dir"
    )


def _judge_files(most: int) -> Finding:
    text = "any number of files open at once" if most < 0 else f"{most} files open at once"
    if 0 <= most < _EASY_FILES:
        word: Verdict = "problem" if most < _LEAST_FILES else "note"
        return Finding("surroundings", word, text, f"Allow more: ulimit -n {_EASY_FILES}")
    return Finding("surroundings", "ok", text)


def _judge_clock(behind: float) -> Finding:
    if behind > _DAY:
        return Finding(
            "surroundings", "problem", f"the clock is {count(round(behind / _DAY), 'day')} before medseg was installed",
            "Set it (timedatectl set-ntp true): the workflow tells by file times what is to be done",
        )  # fmt: skip
    return Finding("surroundings", "ok", "the clock is right, as far as the times of medseg's own files tell")


# ---- looking ------------------------------------------------------------------------------------


def _system() -> str:
    try:
        release = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        release = ""
    return f"{platform.system()} {platform.release()}" + (f" ({release})" if release else "")


def _instructions() -> Iterator[str]:
    """Those of which medseg's speed depends, by the names that people use."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        flags = set(line.partition(":")[2].split())
    for name, marks in {"AVX2": {"avx2"}, "AVX-512": {"avx512f"}, "bf16": {"avx512_bf16", "amx_bf16", "bf16"}}.items():
        if marks & flags:
            yield name


def _quotas() -> Iterator[float]:
    """How many cores' time each limited control group gives."""
    for version, folder in control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if float(quota) > 0:
                yield float(quota) / float(period)


def _can_write(folder: Path) -> bool | None:
    if not folder.is_dir():
        return None
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _room(folder: Path | None) -> int | None:
    """Bytes free in a folder, None for that of temporary files; None where nothing can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder or tempfile.gettempdir()).free
    except OSError:
        return None


def _gib(size: int) -> str:
    return f"{size / _GIB:.3g} GiB" if size >= _GIB / 10 else _mib(size)


def _mib(size: int) -> str:
    return f"{size / _MIB:.3g} MiB"
