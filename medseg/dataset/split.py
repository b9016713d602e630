"""Folds for cross-validation: by subject, never by case, in a file that a person can edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg.core.errors import InputError
from medseg.dataset.task import Task
from medseg.io.files import read_json, write_json

# Of fewer subjects a mean says little, and its interval less than it seems to (`statistics.bootstrap`).
FEW_SUBJECTS = 5
_SHAPE = 'Write {"format": 1, "folds": [{"train": [case ids], "validation": [case ids]}, ...]}'


@dataclass(frozen=True)
class Fold:
    """Case ids to train on and to validate on."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def make_folds(
    task: Task, count: int = 5, *, seed: int = 0, duplicates: Mapping[str, str] | None = None
) -> tuple[Fold, ...]:
    """Deal the task's subjects to ``count`` folds of near equal size, at random but repeatably.

    All cases of a subject fall on one side. ``duplicates`` names, for a case whose image equals
    another's, that other case: the two count as one subject. With fewer subjects than folds there
    are as many folds as subjects. Raises InputError where there are fewer than two of either.
    """
    if count < 2:
        raise InputError(f"{count} folds were asked for", "Cross-validation needs two or more")
    subject_of = subjects_of(task, duplicates)
    subjects = sorted(set(subject_of.values()))
    count = min(count, len(subjects))
    shuffled = [subjects[i] for i in np.random.default_rng(seed).permutation(len(subjects))]
    fold_of = {subject: place % count for place, subject in enumerate(shuffled)}
    return tuple(
        Fold(
            tuple(case.id for case in task.cases if fold_of[subject_of[case.id]] != number),
            tuple(case.id for case in task.cases if fold_of[subject_of[case.id]] == number),
        )
        for number in range(count)
    )


def subjects_of(task: Task, duplicates: Mapping[str, str] | None = None) -> dict[str, str]:
    """The subject of every training case, ``duplicates`` as in `make_folds`. Raises InputError where
    all are of one."""
    subject_of = {case.id: case.subject for case in task.cases}
    for case, twin in (duplicates or {}).items():
        old, new = subject_of[case], subject_of[twin]
        subject_of = {c: new if s == old else s for c, s in subject_of.items()}
    if len(set(subject_of.values())) < 2:
        raise InputError(
            f"task {task.name} has one subject only", "Add cases of others: cross-validation needs two or more"
        )
    return subject_of


def write_folds(path: Path, task: Task, folds: tuple[Fold, ...]) -> None:
    """Write ``folds.json``, with the subject of every case beside it for whoever edits it."""
    value = {
        "format": 1,
        "task": task.name,
        "folds": [{"train": list(f.train), "validation": list(f.validation)} for f in folds],
        "subjects": {case.id: case.subject for case in task.cases},
    }
    write_json(path, value)


def read_folds(path: Path, task: Task) -> tuple[Fold, ...]:
    """Folds from medseg's ``folds.json`` or nnU-Net's ``splits_final.json``.

    Raises InputError for an unknown case, a case on both sides of a fold and an empty side. In
    medseg's own file a subject on both sides is refused too; nnU-Net's files split by case, and
    are taken as they are (see `leaks`).
    """
    value = read_json(path)
    nnunet = isinstance(value, list)
    entries = value if nnunet else _own(value, path)
    try:
        folds = tuple(
            Fold(tuple(map(str, e["train"])), tuple(map(str, e["val" if nnunet else "validation"]))) for e in entries
        )
    except (TypeError, KeyError):
        raise InputError(f"{path} is not a list of folds", _SHAPE) from None
    known = {case.id for case in task.cases}
    for number, fold in enumerate(folds):
        _sound(fold, f"fold {number} of {path}", known)
    if not folds:
        raise InputError(f"{path} has no fold", _SHAPE)
    if not nnunet and (found := leaks(task, folds)):
        raise InputError(
            f"{path} has subject {found[0]} on both sides of a fold", "Keep all cases of a subject together"
        )
    return folds


def leaks(task: Task, folds: tuple[Fold, ...]) -> list[str]:
    """Subjects with cases on both sides of a fold: what is learnt of them is tested on them."""
    subject = {case.id: case.subject for case in task.cases}
    return sorted({s for f in folds for s in {subject[c] for c in f.train} & {subject[c] for c in f.validation}})


def _own(value: Any, path: Path) -> Any:
    if not isinstance(value, dict) or value.get("format") != 1:
        raise InputError(f"{path} is no folds file of format 1", _SHAPE)
    if strange := set(value) - {"format", "task", "folds", "subjects"}:
        raise InputError(f"{path} has the unknown key {sorted(strange)[0]!r}", _SHAPE)
    return value["folds"] if isinstance(value.get("folds"), list) else None


def _sound(fold: Fold, where: str, known: set[str]) -> None:
    if strange := sorted({*fold.train, *fold.validation} - known):
        raise InputError(f"{where} names the unknown case {strange[0]}", "Take the ids from dataset.json")
    if both := sorted({*fold.train} & {*fold.validation}):
        raise InputError(f"{where} has case {both[0]} on both sides", "Name it on one side")
    if not fold.train or not fold.validation:
        raise InputError(f"{where} has no case to {'validate' if fold.train else 'train'} on", "Name at least one")
