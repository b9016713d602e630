"""Counting by the command line: predictions that have instances, and those that have none."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.core.instances import InstanceMap
from medseg.core.volume import LabelMap, Volume
from medseg.dataset.phantom import phantom
from medseg.dataset.task import Task, load_instances, load_labels, load_task
from medseg.io.nifti import write_labels, write_volume
from medseg.io.sidecar import instances_of, write_index


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(phantom(tmp_path_factory.mktemp("phantom"), "counted", cases=5))


def predicted(task: Task, folder: Path, *, instances: bool) -> dict[str, InstanceMap]:
    """The reference of two cases as predictions, but that the first thing of each was missed."""
    found = {}
    for case in task.cases[:2]:
        labels, known = load_labels(task, case), load_instances(task, case)
        first = known.values == 1
        path = folder / f"{case.id}_seg.nii.gz"
        write_labels(path, LabelMap(np.where(first, 0, labels.values), labels.grid, labels.labels))
        record: dict[str, Any] = {"format": 1}
        if instances:
            write_volume(instances_of(path), Volume(np.where(first, 0, known.values)[None], known.grid))
            record["instances"] = [
                {"number": one.number, "label": task.labels.name_of(one.label), "score": 1 / one.number, "voxels": 1}
                for one in known.instances[1:]
            ]
        path.with_name(f"{case.id}_seg.json").write_text(json.dumps(record))
        found[case.id] = known
    write_index(folder / "predictions.json", "m", {case: f"{case}_seg.nii.gz" for case in found}, {})
    return found


@pytest.mark.parametrize("instances", [True, False])
def test_what_was_missed_is_told(medseg: Any, task: Task, tmp_path: Path, instances: bool) -> None:
    known = predicted(task, tmp_path, instances=instances)
    said = medseg("evaluate", tmp_path, task.folder, *([] if instances else ["--instances"]))
    assert said.status == 0, said
    total = sum(len(one.instances) for one in known.values())
    with (tmp_path / "instances.csv").open() as file:
        things = list(csv.DictReader(file))
    assert len(things) == total
    assert [(t["case"], t["reference"]) for t in things if t["status"] == "missed"] == [(c, "1") for c in known]
    assert all(t["status"] == "ok" and t["iou"] == "1.0" for t in things if t["reference"] != "1")
    document = json.loads((tmp_path / "instances.json").read_text())
    tubes = next(one for one in document["summary"] if one["name"] == "tube" and one["iou"] == 0.5)
    there = sum(one.label == 2 for row in known.values() for one in row.instances)
    assert tubes["references"] == there
    assert tubes["precision"] == 1
    assert tubes["recall"] == tubes["sensitivities"][0] == pytest.approx((there - 2) / there)
    assert "recall at 1 FP" in said.out
    shown = json.loads(medseg("evaluate", tmp_path, task.folder, "--iou", 0.2, "--json").out)
    assert {one["iou"] for one in shown["instances"]["summary"]} == {0.2}


def test_who_does_not_ask_gets_no_counts(medseg: Any, task: Task, tmp_path: Path) -> None:
    predicted(task, tmp_path, instances=False)
    assert "recall at 1 FP" not in medseg("evaluate", tmp_path, task.folder).out
    assert not (tmp_path / "instances.csv").exists()


def test_instances_that_do_not_go_together_are_refused(medseg: Any, task: Task, tmp_path: Path) -> None:
    case = task.cases[0].id
    predicted(task, tmp_path, instances=True)
    side, file = tmp_path / f"{case}_seg.json", tmp_path / f"{case}_instances.nii.gz"
    good = json.loads(side.read_text())

    def refused(record: Any, *words: str) -> None:
        side.write_text(json.dumps(record))
        medseg("evaluate", tmp_path, task.folder).refused(f"case {case}", *words)

    refused({**good, "instances": good["instances"][1:]}, f"{file.name} has the number 2, which its sidecar does not")
    refused({**good, "instances": [{**good["instances"][0], "label": "cube"}]}, "are not sound", "cube")
    refused({**good, "instances": [{**good["instances"][0], "score": 7}]}, "are not sound", "score")
    refused({"format": 1}, "its prediction has no instances, but others have")
    file.unlink()
    refused(good, "are missing", "medseg predict")
