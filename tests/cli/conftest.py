"""The command line, called as the console script calls it, and one run on a small task."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and how it ended."""

    status: int
    out: str
    err: str

    def refused(self, *words: str, status: int = 2) -> None:
        """Check that it ended in one line that says so, and holds the words."""
        lines = self.err.splitlines()
        assert self.status == status, self
        assert len(lines) == 1, self
        assert lines[0].startswith("medseg: ")
        assert "Traceback" not in self.err
        for word in words:
            assert word in lines[0]


def call(*arguments: Any) -> Outcome:
    from medseg.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["medseg", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return Outcome(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def medseg() -> Callable[..., Outcome]:
    """`medseg(*arguments)`, in this process."""
    return call


@dataclass(frozen=True)
class Made:
    """A task, and a run on it as far as a trained model for fold 0 with its predictions and scores."""

    task: Path
    run: Path
    outcomes: dict[str, Outcome]

    @property
    def fold(self) -> Path:
        return self.run / "3d" / "fold0"

    @property
    def model(self) -> Path:
        return self.fold / "model"

    def copy(self, folder: Path) -> Made:
        """Another, to spoil."""
        shutil.copytree(self.task, folder / self.task.name)
        shutil.copytree(self.run, folder / "run")
        index = json.loads((folder / "run" / "run.json").read_text())
        index["task"] = str(folder / self.task.name)
        (folder / "run" / "run.json").write_text(json.dumps(index))
        return Made(folder / self.task.name, folder / "run", self.outcomes)


@pytest.fixture(scope="session")
def made(tiny_task: Callable[..., Path], small_plan: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The main path, walked once. The plan is edited to a network that learns in seconds."""
    folder = tmp_path_factory.mktemp("made")
    one = Made(tiny_task(folder / "Task00_blobs", 6, unlabelled=2), folder / "run", {})
    one.outcomes["check"] = call("check", one.task)
    one.outcomes["plan"] = call("plan", one.task, "-o", one.run, "--folds", 3, "--machine", "cpu", "--no-measure")
    plan = json.loads((one.run / "plan.json").read_text())
    small = json.loads(small_plan(steps=160, steps_per_epoch=160, learning_rate=1e-2).model_dump_json())
    plan["configurations"] = small["configurations"]
    plan["training"] = small["training"]
    (one.run / "plan.json").write_text(json.dumps(plan))
    one.outcomes["preprocess"] = call("preprocess", one.run, "--threads", 1)
    one.outcomes["train"] = call("train", one.run, "--threads", 1, "--device", "cpu")
    predictions = one.fold / "predictions"
    one.outcomes["predict"] = call(
        "predict", one.task, "--held-out", "-m", one.model, "-o", predictions, "--threads", 1
    )
    one.outcomes["evaluate"] = call("evaluate", predictions, one.task, "-o", one.fold)
    one.outcomes["report"] = call("report", one.run)
    return one
