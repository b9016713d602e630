"""A model that counts: a map of its things beside the labels, and a row for each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.core.labels import LabelSet
from medseg.io.nifti import read_labels, read_volume
from medseg.models.build import build
from medseg.models.package import ModelPackage, save_package


@pytest.fixture
def model(small_plan: Any, tmp_path: Path) -> Path:
    """One that has learnt nothing, and finds something anywhere: all boxes are likely."""
    torch.set_num_threads(1)
    plan = small_plan(labels={1: "nodule", 4: "vessel"}, family="mask-rcnn")
    torch.manual_seed(0)
    fresh: Any = build(plan.configuration("3d"), 1, 3)
    with torch.no_grad():
        fresh.box_head.classes.bias += torch.tensor([0.0, 3.0, 2.9])
        fresh.mask_head.logits.bias += 5
    package = ModelPackage(plan, "3d", (fresh.state_dict(),), ("a",), ("b",), {"seed": 0})
    save_package(tmp_path / "model", package)
    return tmp_path / "model"


@pytest.mark.parametrize("engine", ["openvino", "torch-cpu"])
def test_things_are_written_and_told(made: Any, medseg: Any, model: Path, tmp_path: Path, engine: str) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    shutil.copy(made.task / "imagesTs" / "blob_006.nii.gz", scans / "a.nii.gz")
    how = ("-m", model, "--threads", 1, "--engine", engine)
    outcome = medseg("predict", scans, *how)
    assert outcome.status == 0, outcome
    files = ["a.nii.gz", "a_instances.nii.gz", "a_seg.json", "a_seg.nii.gz"]
    assert sorted(p.name for p in scans.iterdir()) == files
    record = json.loads((scans / "a_seg.json").read_text())
    labels = read_labels(scans / "a_seg.nii.gz", LabelSet.from_names(["a", "b", "c", "d"]))
    counted = read_volume(scans / record["instance_map"])
    assert counted.grid.matches(labels.grid)
    numbers, sizes = np.unique(counted.values[counted.values > 0], return_counts=True)
    rows = record["instances"]
    assert rows
    assert [(row["number"], row["voxels"]) for row in rows] == list(zip(numbers.tolist(), sizes.tolist(), strict=True))
    for row in rows:
        assert set(row) == {"number", "label", "score", "voxels", "volume_ml", "centre_mm"}
        assert row["label"] in ("nodule", "vessel")
        assert 0.1 <= row["score"] <= 1
        index = np.argwhere(counted.values[0] == row["number"])
        assert row["centre_mm"] == pytest.approx(counted.grid.to_world(index).mean(axis=0).tolist(), abs=1e-3)
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("nodule")]
    assert line.split()[-1] == str(sum(row["label"] == "nodule" for row in rows))
    # Once more, and the map is no scan.
    assert medseg("predict", scans, *how).status == 0
    assert sorted(p.name for p in scans.iterdir()) == files
    # What is not wanted is not counted either.
    only = medseg("predict", scans / "a.nii.gz", *how, "--only", "vessel", "--json")
    (told,) = json.loads(only.out)["predictions"]
    assert {row["label"] for row in told["instances"]} <= {"vessel"}


def test_a_strangers_map_is_left_alone(made: Any, medseg: Any, model: Path, tmp_path: Path) -> None:
    scan = tmp_path / "a.nii.gz"
    shutil.copy(made.task / "imagesTs" / "blob_006.nii.gz", scan)
    shutil.copy(scan, tmp_path / "a_instances.nii.gz")
    medseg("predict", scan, "-m", model, "--threads", 1).refused("a_instances.nii.gz is there already")
