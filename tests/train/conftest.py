"""One thread for all, and a task of which few cases are labelled, preprocessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.core.resample import resample
from medseg.dataset.task import load_case, load_image, load_task
from medseg.io.runlog import RunLog
from medseg.io.store import CaseStore
from medseg.plan.plan import Decision, Plan
from medseg.preprocess.regrid import preprocess
from medseg.train.loop import Setup, train
from medseg.train.pretrain import pretrain


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def same() -> Callable[[Any, Any], bool]:
    """Whether two packages hold the same weights, bit by bit."""

    def compare(one: Any, other: Any) -> bool:
        pairs = list(zip(one.members, other.members, strict=True))
        return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)

    return compare


class Few:
    """Two labelled cases to train on, one held out, three without labels, and where runs keep their logs."""

    def __init__(self, plan: Plan, task_folder: Path, folder: Path) -> None:
        self.plan, self.folder, self.store = plan, folder, CaseStore(folder / "store")
        task = load_task(task_folder)
        for case in (*task.cases, *task.test):
            configuration = plan.configuration("3d")
            if case.label is None:
                self.store.write(case.id, preprocess(load_image(task, case), plan, configuration).values, None, {})
                continue
            volume, labels = load_case(task, case)
            prepared = preprocess(volume, plan, configuration)
            values = resample(labels, onto=prepared.grid).values
            places = {n: np.flatnonzero(values == n) for n in plan.label_set.numbers}
            self.store.write(case.id, prepared.values, values, places)
        self.store.finish(tuple(c.id for c in task.cases), plan.preparation("3d"), "3d")
        *train_ids, held_out = (case.id for case in task.cases)
        self.setup = Setup("3d", 0, tuple(train_ids), (held_out,), device="cpu", threads=1)
        self.unlabelled = [self.store.read(case.id) for case in task.test]

    def pretrain(self, log: str = "log", *, unlabelled: Any = None, **asked: Any) -> Any:
        scans = self.unlabelled if unlabelled is None else unlabelled
        return pretrain(self.plan, self.setup, self.store, RunLog(self.folder / log), scans, **asked)

    def train(self, log: str = "log", *, unlabelled: Any = None, **asked: Any) -> Any:
        scans = self.unlabelled if unlabelled is None else unlabelled
        return train(self.plan, self.setup, self.store, RunLog(self.folder / log), unlabelled=scans, **asked)[0]


def learning(plan: Plan, pretraining: float | None = None, consistency: float | None = None) -> Plan:
    """The plan with what it is to learn from scans without labels."""
    update = {
        name: None if value is None else Decision(value=value)
        for name, value in (("pretraining", pretraining), ("consistency", consistency))
    }
    return plan.model_copy(update={"training": plan.training.model_copy(update=update)})


@pytest.fixture
def few(tiny_task: Callable[..., Path], small_plan: Any, tmp_path: Path) -> Callable[..., Few]:
    """`few(pretraining=..., consistency=..., **plan)` makes a `Few`."""

    def make(pretraining: float | None = None, consistency: float | None = None, **options: Any) -> Few:
        task = tiny_task(tmp_path / "Task00_blobs", 3, unlabelled=3)
        return Few(learning(small_plan(**options), pretraining, consistency), task, tmp_path)

    return make
