"""``medseg models``: from nnU-Net's folder to a prediction by an installed name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

FLAT = Path(__file__).parents[1] / "models" / "nnunet" / "flat"


@pytest.mark.slow
def test_import_export_install_list_info_predict(medseg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr("medseg.models.shelf.shipped", lambda: tmp_path / "shipped")
    done = medseg("models", "import", FLAT / "models", "-o", tmp_path / "flat")
    assert done.status == 0, done
    assert "nnunet-plain" in done.out
    assert medseg("models", "export", tmp_path / "flat", "-o", tmp_path / "flat.zip").status == 0
    assert medseg("models", "list").out == "no model is installed\n"
    assert medseg("models", "install", tmp_path / "flat.zip", "--name", "organs").out.split()[-1] == "organs"
    (row,) = json.loads(medseg("models", "list", "--json").out)
    facts = json.loads(medseg("models", "info", "organs", "--json").out)
    assert row == {"name": "organs", **facts}
    assert facts["structures"]["1"] == "liver"
    assert facts["training_cases"] == 8
    assert facts["origin"] == "nnU-Net v2"
    shutil.copy(FLAT / "scan_0.nii.gz", tmp_path / "scan.nii.gz")
    made = medseg("predict", tmp_path / "scan.nii.gz", "-m", "organs", "--threads", 1)
    assert made.status == 0, made
    assert (tmp_path / "scan_seg.nii.gz").is_file()


def test_what_is_wrong_is_one_line(medseg: Any, tmp_path: Path) -> None:
    medseg("models", "import", tmp_path / "none", "-o", tmp_path / "p").refused("missing")
    medseg("models", "import", tmp_path, "-o", tmp_path / "p").refused("no trained model", "plans.json")
    medseg("models", "info", "none", "--models-dir", tmp_path).refused("no model package none")
    medseg("models", "install", tmp_path, "--models-dir", tmp_path).refused("0 model packages")
