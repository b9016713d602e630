"""Scoring label maps of any program, and runs beside each other."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg.core.volume import LabelMap
from medseg.dataset.task import Task, load_labels, load_task
from medseg.io.nifti import ShareFile, read_labels, write_labels
from medseg.io.sidecar import write_index


@pytest.fixture(scope="module")
def task(tiny_task: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("task")
    return load_task(tiny_task(folder / "Task04_Hippocampus", 6, labels=("Anterior", "bile duct")))


def others(task: Task, folder: Path, step: int = 1, suffix: str = "") -> Path:
    """What another program might have made: the references, moved by some voxels."""
    for case in task.cases:
        labels = load_labels(task, case)
        moved = LabelMap(np.roll(labels.values, step, axis=0), labels.grid, labels.labels)
        write_labels(folder / f"{case.id}{suffix}.nii.gz", moved)
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", ["", "_seg"])
def test_any_folder_of_label_maps_is_scored(medseg: Any, task: Task, tmp_path: Path, suffix: str) -> None:
    folder = others(task, tmp_path / "theirs", suffix=suffix)
    said = medseg("evaluate", folder, task.folder, "-o", tmp_path / "scores")
    assert said.status == 0, said
    found = rows(tmp_path / "scores")
    assert len(found) == 2 * len(task.cases)
    assert {row["tolerance_mm"] for row in found} == {"1.0"}  # the Decathlon's for this task
    assert {row["name"]: bool(row["cldice"]) for row in found} == {"Anterior": False, "bile duct": True}
    assert all(0 < float(row["dice"]) < 1 and float(row["centroid_mm"]) == pytest.approx(1) for row in found)
    assert "95 % interval" in said.out
    assert not (tmp_path / "scores" / "calibration.json").exists()


def test_tolerances_and_tubes_may_be_named(medseg: Any, task: Task, tmp_path: Path) -> None:
    folder = others(task, tmp_path / "theirs")
    options = ("--tolerance", "bile duct=0.5", "--tolerance", 3, "--tube", "Anterior", "--threads", 1)
    assert medseg("evaluate", folder, task.folder, *options).status == 0
    found = {row["name"]: row for row in rows(folder)}
    assert (found["Anterior"]["tolerance_mm"], found["bile duct"]["tolerance_mm"]) == ("3.0", "0.5")
    assert found["Anterior"]["cldice"]
    assert not found["bile duct"]["cldice"]
    medseg("evaluate", folder, task.folder, "--tolerance", "liver=2").refused("no label 'liver'", "1 Anterior")
    medseg("evaluate", folder, task.folder, "--tolerance", "wide").refused("'wide' is no length in mm", "liver=7")
    medseg("evaluate", folder, task.folder, "--tube", "aorta").refused("no label 'aorta'")


def test_a_missing_prediction_is_no_score(medseg: Any, task: Task, tmp_path: Path) -> None:
    folder = others(task, tmp_path / "theirs")
    (folder / "blob_003.nii.gz").unlink()
    medseg("evaluate", folder, task.folder).refused("1 case of Task04_Hippocampus", "like blob_003", "--partial")
    assert not (folder / "metrics.json").exists()
    assert medseg("evaluate", folder, task.folder, "--partial").status == 0
    assert len(rows(folder)) == 10


def test_predictions_without_a_reference_are_refused(medseg: Any, task: Task, tmp_path: Path) -> None:
    folder = others(task, tmp_path / "theirs")
    shutil.copy(folder / "blob_003.nii.gz", folder / "somebody.nii.gz")
    medseg("evaluate", folder, task.folder).refused("Task04_Hippocampus has no case somebody")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "blob_003.nii.gz", alone / "pred1.nii.gz")
    medseg("evaluate", alone, task.folder).refused("named as a case", "pred1", "blob_000")
    medseg("evaluate", tmp_path / "nowhere", task.folder).refused("has no label map")


def test_a_case_twice_is_refused(medseg: Any, task: Task, tmp_path: Path) -> None:
    folder = others(task, tmp_path / "theirs")
    shutil.copy(folder / "blob_003.nii.gz", folder / "blob_003_seg.nii.gz")
    medseg("evaluate", folder, task.folder).refused("case blob_003", "are of one case")


def spoilt(task: Task, folder: Path, change: Callable[[Any, Any], tuple[Any, Any]]) -> Path:
    others(task, folder)
    image = nib.load(folder / "blob_002.nii.gz")
    values, affine = change(np.asarray(image.dataobj), image.affine)
    nib.save(nib.Nifti1Image(values, affine), folder / "blob_002.nii.gz")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v, a: (v.astype(np.float32) * 0.5, a), ("not whole numbers",)),
        (lambda v, a: (v * 3, a), ("has the value 3", "1 Anterior, 2 bile duct")),
        (lambda v, a: (v, a + np.eye(4, k=3) * 5), ("mm apart",)),
        (lambda v, a: (v[:-1], a), ("has shape", "the reference")),
    ],
    ids=["floats", "unknown label", "moved", "cropped"],
)
def test_label_maps_that_are_none_or_lie_elsewhere_are_refused(
    medseg: Any, task: Task, tmp_path: Path, change: Any, words: tuple[str, ...]
) -> None:
    said = medseg("evaluate", spoilt(task, tmp_path / "theirs", change), task.folder)
    said.refused("case blob_002", *words)


def test_whole_numbers_saved_as_floats_are_labels(medseg: Any, task: Task, tmp_path: Path) -> None:
    folder = spoilt(task, tmp_path / "theirs", lambda v, a: (v.astype(np.float64), a))
    assert medseg("evaluate", folder, task.folder).status == 0


def test_probabilities_are_looked_at(medseg: Any, task: Task, tmp_path: Path) -> None:
    case = task.cases[0]
    labels = load_labels(task, case)
    path = tmp_path / f"{case.id}_seg.nii.gz"
    write_labels(path, labels)
    sure = np.stack([(labels.values == n) * 0.8 + 0.1 for n in range(3)]).astype(np.float32)
    with ShareFile(tmp_path / "p.nii.gz", 3, labels.grid) as file:
        file.put((slice(None),) * 3, sure)  # type: ignore[arg-type]
    organs = [{"number": 1, "predicted_dice": 0.93}, {"number": 2, "predicted_dice": None}]
    path.with_name(f"{case.id}_seg.json").write_text(json.dumps({"probabilities": "p.nii.gz", "organs": organs}))
    write_index(tmp_path / "predictions.json", "m", {case.id: path.name}, {})
    assert medseg("evaluate", tmp_path, task.folder).status == 0
    known = json.loads((tmp_path / "calibration.json").read_text())
    assert known["predicted_dice"] == {case.id: {"1": 0.93}}
    # Of all voxels a few are the organ, of which it is 0.9 sure; of the others 0.1.
    share = np.mean(read_labels(path, task.labels).values == 1)
    assert known["labels"][0]["ece"] == pytest.approx(0.1, abs=1e-4)
    assert sum(known["labels"][0]["voxels"]) == labels.values.size
    assert max(n / labels.values.size for n in known["labels"][0]["voxels"][-3:]) == pytest.approx(share)


@pytest.fixture(scope="module")
def scored(medseg: Any, task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two configurations; and another one."""
    folder = tmp_path_factory.mktemp("scored")
    for name, step in (("run/3d/fold0", 1), ("run/2d/fold0", 2), ("other", 3)):
        made = others(task, folder / name / "predictions", step)
        assert medseg("evaluate", made, task.folder, "-o", folder / name).status == 0
    return folder


def test_two_runs_side_by_side(medseg: Any, scored: Path) -> None:
    said = medseg("compare", scored / "run" / "2d", scored / "run" / "3d")
    assert said.status == 0, said
    assert "What changed most" in said.out
    found = json.loads(medseg("compare", scored / "run" / "2d", scored / "run" / "3d", "--json").out)
    mean, first, second = found["differences"]
    assert (mean["label"], first["name"], second["name"]) == (None, "Anterior", "bile duct")
    assert (first["better"], first["effect"], first["p"]) == (6, 1, 2 / 2**6)
    assert first["p_holm"] == pytest.approx(4 / 2**6)
    assert found["ranking"]["places"][0]["run"] == str(scored / "run" / "3d")


def test_many_runs_in_order(medseg: Any, scored: Path) -> None:
    runs = (scored / "other", scored / "run" / "2d", scored / "run" / "3d" / "fold0" / "metrics.json")
    said = medseg("compare", *runs, "--by", "hd95_mm")
    assert said.status == 0, said
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert "3d" in lines[2]
    assert "Kendall's tau 1.00" in said.out
    found = json.loads(medseg("compare", *runs, "--json").out)
    assert found["best"] == str(runs[2])
    assert set(found["behind"]) == {str(run) for run in runs[:2]}


def test_what_cannot_be_compared_is_refused(medseg: Any, scored: Path, tmp_path: Path) -> None:
    medseg("compare", scored / "other").refused("two runs or more")
    medseg("compare", scored / "other", scored / "other").refused("named twice")
    medseg("compare", scored / "run", scored / "other").refused("several configurations", "run/2d or", "run/3d")
    medseg("compare", tmp_path, scored / "other").refused("has been scored", "medseg evaluate")
    few = json.loads((scored / "other" / "metrics.json").read_text())
    few["rows"] = few["rows"][2:]
    (tmp_path / "few.json").write_text(json.dumps(few))
    medseg("compare", tmp_path / "few.json", scored / "other").refused("case blob_000", "5 cases in common", "--common")
    assert medseg("compare", tmp_path / "few.json", scored / "other", "--common").status == 0
    (tmp_path / "old.json").write_text(json.dumps(few | {"format": 1}))
    medseg("compare", tmp_path / "old.json", scored / "other").refused("format version 1", "Score the cases again")
