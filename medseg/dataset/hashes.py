"""The files of a task, by their SHA-256: whether two people speak of the same data."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medseg.core.errors import InputError
from medseg.dataset.task import Task
from medseg.io.files import sha256_of


def task_files(task: Task) -> tuple[str, ...]:
    """``dataset.json`` and every file that it or the folder lists: images, labels, instances, scans without labels;
    and ``subjects.json``, where there is one. As paths from the task's folder on, with slashes."""
    return tuple(dict.fromkeys(path.relative_to(task.folder).as_posix() for path in _listed(task)))


def _listed(task: Task) -> Iterator[Path]:
    for name in ("dataset.json", "subjects.json"):
        if (task.folder / name).exists():
            yield task.folder / name
    for case in (*task.cases, *task.test):
        yield from (path for path in (case.image, case.label, case.instances) if path is not None)


def hash_task(task: Task, threads: int = 1) -> dict[str, tuple[str, int]]:
    """SHA-256 and bytes of each of the `task_files`. InputError where one is missing."""

    def one(name: str) -> tuple[str, int]:
        path = task.folder / name
        if not path.is_file():
            raise InputError(f"{name} of {task.name} is missing", "Put it back; `medseg check` tells all that is amiss")
        return sha256_of(path), path.stat().st_size

    names = task_files(task)
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
