"""Every family, as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg.plan.families import TRAINED


@pytest.fixture(scope="module")
def blobs(tiny_task: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_task(
        tmp_path_factory.mktemp("families") / "Task00_blobs", 5, shape=(30, 34, 28), spacing=(1.0, 1.0, 1.0)
    )


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.slow
def test_a_family_is_planned_trained_and_used(family: str, medseg: Any, blobs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = medseg("plan", blobs, "-o", run, "--family", family, "--steps", 2, "--no-measure", "--machine", "cpu")
    assert said.status == 0, said
    assert f"{family} of" in said.out
    for verb in (("preprocess", run, "-c", "3d"), ("train", run, "--threads", 1, "--device", "cpu")):
        said = medseg(*verb)
        assert said.status == 0, said
    model, found = run / "3d" / "fold0" / "model", tmp_path / "found.nii.gz"
    assert json.loads((model / "plan.json").read_text())["configurations"]["3d"]["network"]["value"]["family"] == family
    said = medseg("predict", "-m", model, blobs / "imagesTr" / "blob_000.nii.gz", "-o", found)
    assert said.status == 0, said
    assert found.exists()


@pytest.mark.slow
def test_the_classic_of_one_structure_has_a_sigmoid(
    medseg: Any, tiny_task: Callable[..., Path], tmp_path: Path
) -> None:
    task = tiny_task(tmp_path / "Task00_blobs", 5, shape=(30, 34, 28), spacing=(1.0, 1.0, 1.0), labels=("blob",))
    run = tmp_path / "run"
    how = ("--family", "unet-classic", "--steps", 40, "--no-measure", "--machine", "cpu")
    assert medseg("plan", task, "-o", run, *how).status == 0
    plan = json.loads((run / "plan.json").read_text())
    assert [region["labels"] for region in plan["regions"]] == [[1]]
    assert medseg("preprocess", run, "-c", "3d").status == 0
    said = medseg("train", run, "--threads", 1, "--device", "cpu")
    assert said.status == 0, said
    model, found = run / "3d" / "fold0" / "model", tmp_path / "found"
    assert medseg("predict", task, "--held-out", "-m", model, "-o", found).status == 0
    assert medseg("evaluate", found, task, "-o", tmp_path).status == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "metrics.json").read_text())["summary"]}
    assert rows["blob"]["dice_mean"] > 0.7


def test_families_are_listed_with_what_they_cost(medseg: Any) -> None:
    said = medseg("models", "families", "--patch", "16x16", "--features", 2, "--json")
    assert said.status == 0, said
    rows = json.loads(said.out)
    assert [row["family"] for row in rows] == list(TRAINED)
    for row in rows:
        assert row["parameters"] > 0
        assert row["multiplications"] > 0
        assert row["memory_bytes"] > 0
        assert row["good_for"]


@pytest.mark.parametrize("patch", ["7x7", "16", "16x16x16x16", "0x16x16", "ax2", "5000x16"])
def test_a_patch_that_is_none_is_refused(patch: str, medseg: Any) -> None:
    said = medseg("models", "families", "--patch", patch)
    assert said.status == 2
    assert "patch" in said.err


def test_an_unknown_family_names_those_that_there_are(medseg: Any, blobs: Path, tmp_path: Path) -> None:
    said = medseg("plan", blobs, "-o", tmp_path / "run", "--family", "unet3+")
    said.refused("unet3+", *TRAINED)
    assert not (tmp_path / "run").exists()


def test_things_that_are_counted_are_not_learnt_without_labels(medseg: Any, blobs: Path, tmp_path: Path) -> None:
    said = medseg("plan", blobs, "-o", tmp_path / "run", "--family", "mask-rcnn", "--unlabelled", "teacher")
    assert said.status == 2
