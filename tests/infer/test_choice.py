"""Which model a scan is for: one, or none is guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.volume import Volume
from medseg.dataset.task import Task, load_image, load_task
from medseg.infer.choice import choose_model, require_fit, require_some, unfit
from medseg.models.experience import experience
from medseg.models.package import ModelPackage
from medseg.plan.fingerprint import fingerprint


@pytest.fixture(scope="module")
def task(tiny_task: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(tiny_task(tmp_path_factory.mktemp("choice") / "Task00_blobs", 6))


@pytest.fixture(scope="module")
def package(task: Task, small_plan: Any) -> ModelPackage:
    """A model without networks, which nothing here asks for."""
    seen = experience(fingerprint(task), [case.id for case in task.cases[:5]], task.labels)
    return ModelPackage(small_plan(), "3d", (), ("a",), (), {}, experience=seen)


@pytest.fixture(scope="module")
def scan(task: Task) -> Volume:
    return load_image(task, task.cases[5])


@pytest.fixture(scope="module")
def large(scan: Volume) -> Volume:
    """Which with -m is only told to be unlike."""
    return Volume(scan.values, Grid(scan.grid.shape, scan.grid.affine @ np.diag([3.0, 3, 3, 1])))


def test_the_one_that_fits_is_taken(scan: Volume, package: ModelPackage) -> None:
    assert unfit(scan, package) is None
    others: dict[str, ModelPackage | str] = {"old": replace(package, experience=None), "broken": "it is broken"}
    assert choose_model(scan, {"blobs": package, **others}) == "blobs"
    # One model under two names is one.
    assert choose_model(scan, {"blobs": package, "again": replace(package)}) in ("blobs", "again")


def test_of_several_none_is_guessed(scan: Volume, package: ModelPackage, small_plan: Any) -> None:
    other = replace(package, plan=small_plan(steps=6))
    with pytest.raises(InputError, match=r"a scan for 2 models on this machine \(a, b\)\. Name one with -m"):
        choose_model(scan, {"a": package, "b": other})


def test_what_is_only_unlike_is_not_taken_and_each_reason_has_a_line(large: Volume, package: ModelPackage) -> None:
    two = replace(package, plan=package.plan.model_copy(update={"channels": ("T1", "T2")}))
    models = {"blobs": package, "old": replace(package, experience=None), "broken": "it is broken", "two": two}
    with pytest.raises(InputError, match="no scan for any model on this machine") as caught:
        choose_model(large, models)
    first, *lines = str(caught.value).splitlines()
    assert "-m" in first
    assert "medseg models install" in first
    assert "medseg plan" in first
    assert lines[0].startswith("  blobs: spacing: 3 x 3 x 6 mm; the model was trained on 1 x 1 x 2 mm")
    assert lines[1:] == [
        "  old: it does not say what scans it was trained on",
        "  broken: it is broken",
        "  two: the scan has 1 channels, the model takes 2 (T1, T2).",
    ]
    with pytest.raises(InputError, match="no scan for blobs, the model that was taken for this call"):
        require_fit(large, package, "blobs")


def test_no_model_at_all() -> None:
    with pytest.raises(InputError, match="none on this machine"):
        require_some({})
