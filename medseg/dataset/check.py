"""Is a task sound? Every case read, every fault named, a verdict per case."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.progress import Progress, silent
from medseg.core.provenance import digest
from medseg.core.volume import Volume
from medseg.core.words import count
from medseg.dataset.split import FEW_SUBJECTS, subjects_of
from medseg.dataset.task import (
    Case,
    Pairing,
    Task,
    UnpairedError,
    in_place,
    load_image,
    load_instances,
    load_labels,
    load_task,
    pair_files,
    require_same_grid,
)
from medseg.io.nifti import is_nifti, read_raw_labels, read_volume

# A case this much larger or coarser than its task's median is likelier to have strayed in than to
# belong: within one Decathlon task sizes stay within a factor of eight.
_STRANGE_VOXELS = 20.0
_STRANGE_SPACING = 4.0

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """What is wrong and how to mend it; an ``error`` must be mended, a ``warning`` looked at."""

    severity: Literal["error", "warning"]
    fault: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.fault.rstrip('.')}. {self.remedy.rstrip('.')}."


@dataclass(frozen=True)
class CaseCheck:
    """What was found of one case. ``labels`` counts voxels per label number; spacing in mm."""

    id: str
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    orientation: str | None = None
    channels: int | None = None
    labels: dict[int, int] = field(default_factory=dict)
    image_hash: str | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def verdict(self) -> str:
        """``error``, ``warning`` or ``ok``: the worst of its problems."""
        severities = {p.severity for p in self.problems}
        return "error" if "error" in severities else "warning" if severities else "ok"

    def with_problem(self, severity: Literal["error", "warning"], fault: str, remedy: str) -> CaseCheck:
        """The same with one problem more."""
        return replace(self, problems=(*self.problems, Problem(severity, fault, remedy)))


@dataclass(frozen=True)
class CheckReport:
    """A task's check: what is wrong with the folder as a whole, and one row a case."""

    task: str
    problems: tuple[Problem, ...]
    cases: tuple[CaseCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing must be mended (warnings may remain)."""
        return not any(p.severity == "error" for p in self.problems) and all(c.verdict != "error" for c in self.cases)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        cases = [
            {**asdict(c), "labels": {str(k): v for k, v in c.labels.items()}, "verdict": c.verdict} for c in self.cases
        ]
        verdicts = [c.verdict for c in self.cases]
        counts = {v: verdicts.count(v) for v in ("ok", "warning", "error")}
        return {
            "format": 1,
            "task": self.task,
            "ok": self.ok,
            "counts": counts,
            "problems": [asdict(p) for p in self.problems],
            "cases": cases,
        }


def check(folder: Path, *, progress: Progress = silent) -> CheckReport:
    """Read every case of a task and say what is wrong with it.

    A folder without a readable ``dataset.json`` is checked too, as far as pairing its files by name
    allows, so that everything wrong is found in one go. ``progress`` wraps the iteration over cases
    (rows and their number). Raises InputError where there is no folder or nothing that looks like
    a case.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", "Name the folder of a Decathlon task")
    problems: list[Problem] = []
    task: Task | None = None
    pairing = Pairing({}, ())
    try:
        task = load_task(folder)
        cases = list(task.cases)
    except InputError as error:
        pairing = pair_files(folder)
        # What does not pair is told below, of the folder or of each case.
        problems += [] if isinstance(error, UnpairedError) else [_error(error)]
        problems += [_error(fault) for fault in pairing.faults if fault.case is None]
        cases = _paired(folder, pairing)
    if not cases:
        raise InputError(problems[0].fault, problems[0].remedy)
    if task is not None:
        problems += _unlisted(task) + _unknown_subjects(task)
    amiss = {fault.case: fault for fault in pairing.faults}
    rows = list(_each(cases, lambda case: _check_case(folder, task, case, amiss.get(case.id)), progress))
    twins = _twins(rows)
    rows = _duplicates(_strangers(rows))
    if task is not None:
        problems += _absent_labels(task, rows) + _few_subjects(task, twins)
    return CheckReport(folder.resolve().name, tuple(problems), tuple(rows))


def _each(cases: list[Case], function: Callable[[Case], CaseCheck], progress: Progress) -> Iterator[CaseCheck]:
    # Threads serve: decompression and numpy let go of the interpreter.
    with ThreadPoolExecutor(max(1, min(8, len(os.sched_getaffinity(0))))) as pool:
        rows = pool.map(function, cases)
        yield from progress(rows, len(cases))


def _check_case(folder: Path, task: Task | None, case: Case, unpaired: InputError | None) -> CaseCheck:
    row = CaseCheck(case.id, problems=(_error(unpaired),) if unpaired else ())
    volume: Volume | None = None
    try:
        if task or case.image.exists():  # without a task what is not there was told with the pairing
            volume = load_image(task, case) if task else _in_place(read_volume, folder, case.image)
            row = _describe(row, volume.grid, volume.channels)
            row = replace(row, image_hash=digest(np.ascontiguousarray(volume.values).tobytes()))
            row = _intensities(row, volume)
    except InputError as error:
        row = row.with_problem("error", error.fault, error.remedy)
    if case.label is None:
        return row
    try:
        if task:
            label_map = load_labels(task, case)
            values, grid = label_map.values, label_map.grid
            if volume:
                require_same_grid(volume, label_map, case.id)
            if case.instances:
                load_instances(task, case)
        else:
            values, grid = _in_place(read_raw_labels, folder, case.label)
    except InputError as error:
        return row.with_problem("error", error.fault, error.remedy)
    if volume is None:
        row = _describe(row, grid, None)
    numbers, counts = np.unique(values, return_counts=True)
    row = replace(row, labels={int(n): int(c) for n, c in zip(numbers, counts, strict=True) if n != 0})
    if not row.labels:
        row = row.with_problem("warning", "its label map is empty", "Check that nothing was to be outlined in it")
    return row


def _describe(row: CaseCheck, grid: Grid, channels: int | None) -> CaseCheck:
    spacing = tuple(round(s, 4) for s in grid.spacing)
    return replace(row, shape=grid.shape, spacing=spacing, orientation=grid.orientation, channels=channels)


def _intensities(row: CaseCheck, volume: Volume) -> CaseCheck:
    for number, channel in enumerate(volume.values):
        if channel.min() == channel.max():
            row = row.with_problem("warning", f"channel {number} is constant", "Check that it was exported whole")
    return row


def _error(error: InputError) -> Problem:
    return Problem("error", error.fault, error.remedy)


def _in_place(read: Callable[[Path], T], folder: Path, path: Path) -> T:
    try:
        return read(path)
    except InputError as error:
        raise in_place(error, folder, path) from None


def _paired(folder: Path, pairing: Pairing) -> list[Case]:
    """Cases by file name, for a folder whose dataset.json cannot be used."""
    return [
        Case(name, image or folder / "imagesTr" / f"{name}.nii.gz", label, name)
        for name, (image, label) in pairing.files.items()
    ]


def _niftis(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if is_nifti(p)) if folder.is_dir() else []


def _unlisted(task: Task) -> list[Problem]:
    listed = {p.resolve() for case in task.cases for p in (case.image, case.label) if p}
    found = [p for name in ("imagesTr", "labelsTr") for p in _niftis(task.folder / name) if p.resolve() not in listed]
    if not found:
        return []
    names = ", ".join(f"{p.parent.name}/{p.name}" for p in found[:3]) + (", ..." if len(found) > 3 else "")
    fault = f"{count(len(found), 'file')} {'is' if len(found) == 1 else 'are'} not listed in dataset.json ({names})"
    return [Problem("warning", fault, "List them or move them elsewhere; they are not used")]


def _unknown_subjects(task: Task) -> list[Problem]:
    known = {case.id for case in (*task.cases, *task.test)}
    strange = sorted(set(task.subjects) - known)
    if not strange:
        return []
    names = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
    fault = f"subjects.json names {count(len(strange), 'case')} that dataset.json does not ({names})"
    return [
        Problem("warning", fault, "Correct their ids; a case whose subject is unknown counts as a person of its own")
    ]


def _absent_labels(task: Task, rows: list[CaseCheck]) -> list[Problem]:
    """What `medseg plan` would refuse: a structure that is nowhere cannot be learnt."""
    if any(row.verdict == "error" for row in rows):
        return []  # it may be in a case that could not be read
    present = {number for row in rows for number in row.labels}
    if not present:
        return [
            Problem("error", f"the label maps of {task.name} are all empty", "Add cases in which something is outlined")
        ]
    return [
        Problem("error", f"no case has the label {label.number} {label.name}", "Take it off dataset.json or add cases")
        for label in task.labels
        if label.number not in present
    ]


def _twins(rows: list[CaseCheck]) -> dict[str, str]:
    """For each case whose image equals an earlier one's, that earlier case."""
    first: dict[str, str] = {}
    known = [(row.id, row.image_hash) for row in rows if row.image_hash]
    return {case: first[image] for case, image in known if first.setdefault(image, case) != case}


def _few_subjects(task: Task, twins: Mapping[str, str]) -> list[Problem]:
    try:
        subjects = len(set(subjects_of(task, twins).values()))
    except InputError as error:
        return [_error(error)]
    if subjects >= FEW_SUBJECTS:
        return []
    fault = f"{subjects} subjects are few: scores on them say little about others, and get no interval"
    return [Problem("warning", fault, f"Add cases of more, {FEW_SUBJECTS} at the very least")]


def _strangers(rows: list[CaseCheck]) -> list[CaseCheck]:
    """Mark cases whose size or spacing is far from their task's."""
    known = [row for row in rows if row.shape and row.spacing]
    if len(known) < 3:
        return rows
    voxels = np.median([np.prod(row.shape or 0) for row in known])
    spacing = np.median([sorted(row.spacing or ()) for row in known], axis=0)
    marked = []
    for row in rows:
        if row.shape and row.spacing:
            size = float(np.prod(row.shape) / voxels)
            step = np.max(np.abs(np.log(np.array(sorted(row.spacing)) / spacing)))
            if max(size, 1 / size) > _STRANGE_VOXELS or step > np.log(_STRANGE_SPACING):
                shape = "x".join(map(str, row.shape))
                steps = "x".join(f"{s:g}" for s in row.spacing)
                row = row.with_problem(
                    "warning",
                    f"{shape} voxels of {steps} mm are unlike the task's other cases",
                    "Check that it belongs to this task",
                )
        marked.append(row)
    return marked


def _duplicates(rows: list[CaseCheck]) -> list[CaseCheck]:
    same: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.image_hash:
            same[row.image_hash].append(row.id)
    return [
        row.with_problem(
            "warning",
            f"its image equals that of {', '.join(i for i in same[row.image_hash] if i != row.id)}",
            "Keep one, or give both one subject in subjects.json, lest it is trained on and tested on",
        )
        if row.image_hash and len(same[row.image_hash]) > 1
        else row
        for row in rows
    ]
