"""A task in which some voxels have a label that the plan ignores: from planning to the chosen model."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.dataset.task import load_labels, load_task
from medseg.io.nifti import read_labels
from medseg.models.package import load_package

UNCLEAR = 3


def dices(found: Any, truth: Any, counts: Any) -> list[float]:
    pairs = [((found == n) & counts, (truth == n) & counts) for n in (1, 2)]
    return [float(2 * (a & b).sum() / (a.sum() + b.sum())) for a, b in pairs]


def test_what_is_ignored_is_neither_learnt_nor_scored(
    medseg: Any, tiny_task: Callable[..., Path], small_plan: Any, tmp_path: Path
) -> None:
    labels, run = ("left blob", "right blob", "unclear"), tmp_path / "run"
    task = tiny_task(tmp_path / "Task00_blobs", 4, labels=labels)
    assert "Fit for use." in medseg("check", task).out
    assert medseg("plan", task, "-o", run, "--folds", 2, "--machine", "cpu", "--no-measure").status == 0
    plan = json.loads((run / "plan.json").read_text())
    small = json.loads(small_plan(steps=120, steps_per_epoch=60, learning_rate=1e-2).model_dump_json())
    plan["configurations"] = small["configurations"]
    plan["training"] = small["training"] | {"ignore_label": UNCLEAR}
    plan["labels"] = [label for label in plan["labels"] if label["number"] != UNCLEAR]
    (run / "plan.json").write_text(json.dumps(plan))
    fold = run / "3d" / "fold0"
    for verb in (
        ("preprocess", run, "--threads", 1),
        ("train", run, "--threads", 1, "--device", "cpu"),
        ("predict", task, "--held-out", "-m", fold / "model", "-o", fold / "predictions", "--threads", 1),
        ("evaluate", fold / "predictions", task, "-o", fold),
        ("choose", run, "--partial", "--threads", 1),
        ("report", run),
    ):
        said = medseg(*verb)
        assert said.status == 0, said
    package = load_package(fold / "model")
    assert package.calibration is not None
    assert [one.number for one in package.calibration.structures] == [1, 2]

    loaded = load_task(task)
    wanted, otherwise = {}, {}
    for case in package.held_out:
        truth = load_labels(loaded, loaded.case(case)).values
        found = read_labels(fold / "predictions" / f"{case}_seg.nii.gz", package.plan.label_set).values
        wanted[case] = pytest.approx(dices(found, truth, truth != UNCLEAR))
        otherwise[case] = dices(found, truth, np.ones_like(truth, dtype=bool))
    assert wanted != otherwise  # something was found where nothing counts
    with (fold / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {"1", "2"}
    assert {case: [float(row["dice"]) for row in rows if row["case"] == case] for case in wanted} == wanted
    mean = np.mean([float(row["dice"]) for row in rows])
    log = json.loads((fold / "log.json").read_text())
    assert log["records"][-1]["dice"] == pytest.approx(mean, abs=1e-4)
    chosen = load_package(run / "model").evaluation
    assert chosen is not None
    assert chosen.dice.mean == pytest.approx(mean)
