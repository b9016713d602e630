"""How much memory there is to take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

# What a control group may take, what it has taken, and what of that is files that nobody looks at, by version.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def resident_memory(*, most: bool = False) -> int:
    """Bytes of this process's memory, as Linux counts them: now, or the ``most`` that they ever were. (getrusage tells
    what a process was forked from, too.)"""
    what = "VmHWM" if most else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


# What this process may take in all, where whoever started it has said so.
_allowed: list[int] = []


def allow_memory(most: int) -> None:
    """From now on this process takes itself to have so many bytes in all, as one does that is ended for more."""
    _allowed[:] = [most]


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, of any control group that it is in, or of what it was
    allowed."""
    told = [most - resident_memory() for most in _allowed]
    return max(0, min([int(psutil.virtual_memory().available), *_left(), *told]))


def memory_limit() -> int:
    """Bytes that this process could take of an idle machine: all that it has, or what a control group allows."""
    limits = []
    for version, folder in control_groups("memory"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((folder / _FILES[version][0]).read_text()))
    return min([int(psutil.virtual_memory().total), *limits])


def _left() -> Iterator[int]:
    """What each limited control group leaves, from this process's own up to the root."""
    for version, folder in control_groups("memory"):
        most, taken, files = _FILES[version]
        # A group without a limit, or that is not seen from within a container, limits nothing.
        with contextlib.suppress(OSError, ValueError):
            limit, used = int((folder / most).read_text()), int((folder / taken).read_text())
            yield limit - max(0, used - _counted(folder / "memory.stat", files))


def control_groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of each control group that limits this process, from its own up to the root."""
    try:
        lines = [line.split(":", 2) for line in _OWN.read_text().splitlines()]
    except OSError:
        return
    for number, controllers, path in (line for line in lines if len(line) == 3):
        if number == "0":
            version, root = 2, _CGROUPS
        elif controller in controllers.split(","):
            version, root = 1, _CGROUPS / controller
        else:
            continue
        own = Path(path)
        for folder in (own, *own.parents):
            yield version, root / folder.relative_to("/")


def _counted(stat: Path, name: str) -> int:
    """A number of memory.stat; 0 where there is none."""
    try:
        rows = (line.split() for line in stat.read_text().splitlines())
        return next((int(row[1]) for row in rows if row[0] == name), 0)
    except OSError:
        return 0
