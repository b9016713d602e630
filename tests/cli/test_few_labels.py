"""A task of which few cases are labelled: planned, pretrained, trained beside a teacher, and scored."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg.models.package import load_package
from medseg.plan.plan import read_plan

BOTH = ("--unlabelled", "pretrain", "--unlabelled", "teacher")


def planned(medseg: Any, task: Path, run: Path, small_plan: Any, *options: str, steps: int = 100) -> Any:
    """A run whose networks learn in seconds."""
    said = medseg("plan", task, "-o", run, "--folds", 2, "--machine", "cpu", "--no-measure", *options)
    assert said.status == 0, said
    plan = json.loads((run / "plan.json").read_text())
    small = json.loads(small_plan(steps=steps, steps_per_epoch=50, learning_rate=1e-2).model_dump_json())
    plan["configurations"] = small["configurations"]
    plan["training"] = small["training"] | {
        k: v for k, v in plan["training"].items() if k in ("pretraining", "consistency")
    }
    (run / "plan.json").write_text(json.dumps(plan))
    return said


@pytest.fixture(scope="module")
def done(
    medseg: Any, tiny_task: Callable[..., Path], small_plan: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("few")
    task, run = tiny_task(folder / "Task00_blobs", 4, unlabelled=4), folder / "run"
    said = {"plan": planned(medseg, task, run, small_plan, *BOTH)}
    said["preprocess"] = medseg("preprocess", run, "--threads", 1)
    said["train"] = medseg("train", run, "--threads", 1, "--device", "cpu")
    model, predictions = run / "3d" / "fold0" / "model", run / "3d" / "fold0" / "predictions"
    said["predict"] = medseg("predict", task, "--held-out", "-m", model, "-o", predictions, "--threads", 1)
    said["evaluate"] = medseg("evaluate", predictions, task, "-o", run / "3d" / "fold0")
    return run, said


def test_two_labelled_cases_and_four_scans_end_in_a_model(done: tuple[Path, dict[str, Any]]) -> None:
    run, said = done
    for verb in ("plan", "preprocess", "train", "predict", "evaluate"):
        assert said[verb].status == 0, said[verb]
    assert "4 scans without labels in" in said["preprocess"].out
    assert "pretraining: step 100/100" in said["train"].out
    assert "\nstep 100/100" in said["train"].out
    package = load_package(run / "3d" / "fold0" / "model")
    scans = [f"blob_{n:03d}" for n in range(4, 8)]
    assert package.provenance["unlabelled"] == scans
    assert package.provenance["start"] is None
    assert package.provenance["pretrained"]["steps"] == 100
    training = read_plan(run / "plan.json").training
    assert training.pretraining is not None
    assert "4 scans without labels" in training.pretraining.reason
    assert training.consistency is not None


def test_scans_without_labels_are_nowhere_among_the_labelled(done: tuple[Path, dict[str, Any]]) -> None:
    run, _ = done
    scans = {f"blob_{n:03d}" for n in range(4, 8)}
    package = load_package(run / "3d" / "fold0" / "model")
    assert not scans & {*package.trained_on, *package.held_out}
    folds = json.loads((run / "folds.json").read_text())
    assert not scans & {c for fold in folds["folds"] for side in fold.values() for c in side}
    assert not scans & set(json.loads((run / "3d" / "preprocessed" / "store.json").read_text())["cases"])
    assert scans == set(json.loads((run / "3d" / "unlabelled" / "store.json").read_text())["cases"])
    assert not list((run / "3d" / "unlabelled").glob("*.labels.npy"))
    with (run / "3d" / "fold0" / "metrics.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == set(package.held_out)


def test_what_a_plan_without_them_says_is_as_ever(medseg: Any, tiny_task: Callable[..., Path], tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "Task00_blobs", 4, unlabelled=2)
    plain, one = tmp_path / "plain", tmp_path / "one"
    options = ("--machine", "cpu", "--no-measure", "--steps", 90)
    assert medseg("plan", task, "-o", plain, *options).status == 0
    text = (plain / "plan.json").read_text()
    assert "consistency" not in text
    assert "pretraining" not in text
    assert medseg("plan", task, "-o", one, *options, *BOTH).status == 0
    before, after = (read_plan(run / "plan.json") for run in (plain, one))
    cheap, dear = (plan.configuration("3d").cost for plan in (before, after))
    assert cheap is not None
    assert dear is not None
    assert dear.seconds_per_step == pytest.approx(7 / 3 * cheap.seconds_per_step, rel=1e-3)
    assert dear.hours == pytest.approx(10 / 3 * cheap.hours, rel=0.01)
    assert 1 < dear.memory_bytes / cheap.memory_bytes < 2
    assert before.configuration("3d").steps.value == after.configuration("3d").steps.value == 90
    assert before.preparation("3d") == after.preparation("3d")
    assert before.digest() != after.digest()


def test_a_task_without_scans_is_refused(
    medseg: Any, tiny_task: Callable[..., Path], small_plan: Any, tmp_path: Path
) -> None:
    task = tiny_task(tmp_path / "Task00_blobs", 4)
    refused = medseg("plan", task, "-o", tmp_path / "run", "--no-measure", "--unlabelled", "teacher")
    refused.refused("Task00_blobs lists no scans without labels", '"test"')
    planned(medseg, task, tmp_path / "run", small_plan)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    plan["training"]["pretraining"] = {"value": 1.0}
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    medseg("preprocess", tmp_path / "run").refused("lists no scans without labels")


def test_a_scan_that_cannot_be_read_or_is_a_training_case_is_named(
    medseg: Any, tiny_task: Callable[..., Path], small_plan: Any, tmp_path: Path
) -> None:
    task, run = tiny_task(tmp_path / "Task00_blobs", 4, unlabelled=2), tmp_path / "run"
    planned(medseg, task, run, small_plan, "--unlabelled", "pretrain")
    (task / "imagesTs" / "blob_005.nii.gz").write_bytes(b"no scan")
    medseg("preprocess", run, "--threads", 1).refused("blob_005")
    assert not (run / "3d" / "unlabelled" / "store.json").exists()
    described = json.loads((task / "dataset.json").read_text())
    described["test"] = ["./imagesTr/blob_001.nii.gz"]
    (task / "dataset.json").write_text(json.dumps(described))
    medseg("preprocess", run, "--threads", 1).refused("blob_001", "listed twice")


def test_scans_not_preprocessed_are_missed_and_those_of_a_held_out_subject_left_out(
    medseg: Any, tiny_task: Callable[..., Path], small_plan: Any, tmp_path: Path
) -> None:
    task, run = tiny_task(tmp_path / "Task00_blobs", 4, unlabelled=2), tmp_path / "run"
    planned(medseg, task, run, small_plan, "--unlabelled", "teacher", steps=2)
    assert medseg("preprocess", run, "--threads", 1).status == 0
    index = run / "3d" / "unlabelled" / "store.json"
    text = index.read_text()
    index.unlink()
    medseg("train", run, "--threads", 1).refused("unlabelled/store.json is missing", "medseg preprocess")
    index.write_text(text)
    held_out = json.loads((run / "folds.json").read_text())["folds"][0]["validation"]
    (task / "subjects.json").write_text(json.dumps({"blob_004": held_out[0]}))
    assert medseg("train", run, "--threads", 1, "--device", "cpu").status == 0
    assert load_package(run / "3d" / "fold0" / "model").provenance["unlabelled"] == ["blob_005"]
    (task / "subjects.json").write_text(json.dumps({"blob_004": held_out[0], "blob_005": held_out[0]}))
    medseg("train", run, "--threads", 1).refused("of a subject that is held out")


def test_a_copy_of_a_training_case_under_another_name_is_refused(
    medseg: Any, tiny_task: Callable[..., Path], small_plan: Any, tmp_path: Path
) -> None:
    task, run = tiny_task(tmp_path / "Task00_blobs", 4, unlabelled=2), tmp_path / "run"
    planned(medseg, task, run, small_plan, "--unlabelled", "teacher")
    image = nib.load(task / "imagesTr" / "blob_001.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), task / "imagesTs" / "blob_005.nii.gz")
    medseg("preprocess", run, "--threads", 1).refused("case blob_005: ", "equals that of the training case blob_001")
    assert not (run / "3d" / "unlabelled" / "store.json").exists()


def test_other_scans_under_test_have_all_folds_trained_anew(
    medseg: Any, tiny_task: Callable[..., Path], small_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, run = tiny_task(tmp_path / "Task00_blobs", 4, unlabelled=3), tmp_path / "run"
    planned(medseg, task, run, small_plan, "--unlabelled", "teacher", steps=2)
    every = ("train", run, "--all-folds", "--threads", 1, "--device", "cpu")
    assert medseg(*every).status == 0
    called: list[str] = []
    monkeypatch.setattr("medseg.cli.folds.run_verb", lambda *words: called.append(words[0]))
    assert medseg(*every).status == 0
    assert called == ["choose"]
    called.clear()
    described = json.loads((task / "dataset.json").read_text())
    described["test"].pop()
    (task / "dataset.json").write_text(json.dumps(described))
    assert medseg(*every).status == 0
    assert called == ["preprocess", "train", "train", "choose"]
